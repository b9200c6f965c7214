"""Sweeps that stop early: tests at looks that are planned before the first episode, and cells that need no more data.

A *look* tests every pair of cells on the episodes so far. Looking often gives more chances of a wrong recommendation.
A plan therefore spends its `alpha` over its looks: after n of at most N episodes, a pair's tests together may err with
probability alpha (n / N)^2 (Lan and DeMets 1983, Biometrika 70, 659-663; the power family of Hwang, Shih and DeCani and
of Jennison and Turnbull). The level of each look follows by integrating over the paths that did not reject before, for
sums of independent episodes. It is applied to the p-value of the exact test.

A pair's *sequential p-value* is the least alpha with which its tests would have rejected by now. It can only fall, and
under the hypothesis it is at most alpha with a probability of at most alpha, no matter when or why one stops. It
therefore goes through the same steps as the p-value of one look, see `recommendation` (Liu and Anderson 2008,
Biometrika 95, 247-251). The rules below, which say when a cell needs no more episodes, do not enter this argument. They
may be overruled and may depend on the outcomes.

A cell is a *candidate* while it could still be recommended: no cell that costs the same or less is accepted, it is not
shown to be worse, and it is not futile. It is futile when the last look will probably not accept it against one of the
others. The cheapest candidate and the cells against which it is undecided run on. Where these cells have seen different
numbers of episodes, the others catch up first. The stage ends when no candidate is left, most often because the
cheapest one is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from policy.statistics.checks import Array, cells_by_episodes, check_fraction
from policy.statistics.counts import wins_over
from policy.statistics.paired import bisect
from policy.statistics.recommendation import (
    Pairs,
    Recommendation,
    adjust,
    advise,
    allowed_loss,
    compare_pairs,
    levels_in_force,
    ranks,
    shown_worse,
)

# All stages of a sweep together recommend a wrong cell with at most this probability.
ERROR = 0.05
# The share of the error that is left which each stage may spend: the first one 0.0475, the second one 0.0024.
SHARE = 0.95
# A cell is futile when the last look would accept it with less than this probability, if it goes on as `_power` says.
FUTILE = 0.25
# How much of a difference that was observed so far is expected of the episodes to come: luck evens out.
PERSISTS = 0.25
# Overall levels for which the levels of the looks are computed; between them they are interpolated.
LEVELS = np.geomspace(1e-8, 0.5, 62)
# More looks than this save hardly any episodes, and their levels take long to compute.
MOST_LOOKS = 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The looks of one stage of a sweep, fixed before its first episode.

    Attributes:
        looks: rising numbers of episodes per cell at which the pairs are tested.
        margin: the difference of success rates from which a cell counts as worse, in (0, 1).
        alpha: the probability of a wrong recommendation that this stage may spend, in (0, 0.5).

    Raises:
        ValueError: looks that do not rise or are below 1, or a margin or an alpha outside its range.
    """

    looks: tuple[int, ...]
    margin: float
    alpha: float

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.looks or list(self.looks) != sorted(set(self.looks)) or self.looks[0] < 1:
            raise ValueError(f"looks must be one or more rising numbers of episodes, 1 or more; got {self.looks}")
        check_fraction("margin", self.margin)
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must be above 0 and below 0.5; got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come.

    Attributes:
        running: indices of the cells that run on to the next look, or catch up with the others; empty when the stage
            has ended. A cell that is not among them may be needed again after a later look.
        target: the number of episodes that the running cells must have come to before the next call changes anything.
        stopped: for each cell the number of episodes at which it stopped, or has been tested so far.
        recommendation: as of the last look whose episodes are all there; None before the first one.
    """

    running: tuple[int, ...]
    target: int
    stopped: tuple[int, ...]
    recommendation: Recommendation | None


def stage_alpha(stage: int) -> float:
    """The probability of a wrong recommendation that a stage may spend, 1 for the first; their sum never exceeds ERROR.

    Raises:
        ValueError: a stage below 1.
    """
    if stage < 1:
        raise ValueError(f"stage must be 1 or more; got {stage}")
    return ERROR * SHARE * (1 - SHARE) ** (stage - 1)


def plan_looks(episodes: int, looks: int) -> tuple[int, ...]:
    """Numbers of episodes after which to look: equal steps, rounded up, the last one after all episodes.

    Raises:
        ValueError: episodes or looks below 1, more looks than episodes, or more than `MOST_LOOKS`.

    Example:
        >>> plan_looks(600, 6)
        (100, 200, 300, 400, 500, 600)
    """
    if not 1 <= looks <= min(episodes, MOST_LOOKS):
        raise ValueError(
            f"looks must be 1 to the number of episodes, {episodes}, and at most {MOST_LOOKS}; got {looks}: take fewer"
        )
    return tuple(math.ceil(episodes * look / looks) for look in range(1, looks + 1))


def follow(plan: Plan, success: Sequence[ArrayLike], cost: Sequence[float]) -> Progress:
    """Replay a plan from its first look on the outcomes that are there.

    Nothing but the plan and the outcomes decides, so that a sweep that was interrupted stops where it would have
    stopped without. Outcomes of a cell beyond the look at which it stopped are ignored.

    Args:
        plan: the looks.
        success: for each cell its outcomes, true or false; column n of all cells is the same episode.
        cost: (K,) finite numbers. Of cells with equal costs the more successful one is recommended.

    Returns:
        Which cells run on, and the recommendation so far.

    Raises:
        ValueError: no cells, outcomes other than true and false, or malformed costs.
    """
    solved = [_outcomes(row) for row in success]
    costs = ranks(cost, len(solved))
    state, look = begin(len(solved)), 0
    while state.running.any():
        target = plan.looks[look]
        if any(len(solved[cell]) < target for cell in np.flatnonzero(state.running)):
            break
        there = [cell for cell, row in enumerate(solved) if state.running[cell] or state.stopped[cell] == target]
        wins = np.zeros(state.pairs.wins.shape)
        wins[np.ix_(there, there)] = wins_over(np.stack([solved[cell][:target] for cell in there]))
        state = step(plan, look, wins, costs, state)
        look += bool(state.moves_on)
    return Progress(
        running=tuple(np.flatnonzero(state.running).tolist()),
        target=plan.looks[min(look, len(plan.looks) - 1)],
        stopped=tuple(state.stopped.tolist()),
        recommendation=_advise(plan, state, costs) if state.stopped.any() else None,
    )


@dataclass(frozen=True, kw_only=True)
class State:
    """Where one stage stands, or many simulated ones at once, along the leading axes.

    Attributes:
        pairs: the last comparison of each pair, with its sequential p-values.
        stopped: (..., K) int, episodes so far.
        running: (..., K) bool, cells that run on.
        moves_on: (...) bool, whether they run to the next look, and not only catch up with the others at this one.
    """

    pairs: Pairs
    stopped: Array
    running: Array
    moves_on: Array


def begin(*shape: int) -> State:
    """The state before the first look, of (..., K) cells."""
    pair = (*shape, shape[-1])
    return State(
        pairs=Pairs(
            wins=np.zeros(pair),
            episodes=np.ones(pair, dtype=int),
            not_worse=np.where(np.eye(shape[-1], dtype=bool), 0.0, np.ones(pair)),
            worse=np.ones(pair),
        ),
        stopped=np.zeros(shape, dtype=int),
        running=np.ones(shape, dtype=bool),
        moves_on=np.zeros(shape[:-1], dtype=bool),
    )


def step(plan: Plan, look: int, wins: Array, costs: Array, state: State) -> State:
    """Test the pairs of cells that are there at a look, and say which cells run on.

    Args:
        plan: the looks.
        look: index of this one.
        wins: (..., K, K), episodes of this look that only the row's cell solved; it is not read for a pair with a cell
            that did not come this far.
        costs: (K,), see `ranks`.
        state: before; the running cells have come to this look.
    """
    episodes = plan.looks[look]
    stopped = np.where(state.running, episodes, state.stopped)
    here = (stopped == episodes) & state.running.any(-1, keepdims=True)
    new = here[..., None] & here[..., None, :] & (state.pairs.episodes < episodes)
    now, before = compare_pairs(np.where(new, wins, 0), episodes, plan.margin), state.pairs
    pairs = Pairs(
        wins=np.where(new, now.wins, before.wins),
        episodes=np.where(new, episodes, before.episodes),
        not_worse=np.where(new, _lower(before.not_worse, now.not_worse, plan, look), before.not_worse),
        worse=np.where(new, _lower(before.worse, now.worse, plan, look), before.worse),
    )
    needed = _needed(plan, pairs, costs)
    behind = needed & (stopped < episodes)
    catch_up = np.asarray(behind.any(-1))[..., None]
    return State(pairs=pairs, stopped=stopped, running=np.where(catch_up, behind, needed), moves_on=~catch_up[..., 0])


def _needed(plan: Plan, pairs: Pairs, costs: Array) -> Array:
    """(..., K) bool, the cheapest candidate and the cells against which it is undecided."""
    adjusted = adjust(pairs.not_worse, costs)
    undecided, levels = adjusted > plan.alpha, levels_in_force(adjusted, costs, plan.alpha)
    won = ~undecided.any(-1)
    cheapest = np.where(won, costs, len(costs)).min(-1, keepdims=True)
    hopeless = (_power(pairs, plan, levels) < FUTILE) & ~_accepted_at_last(pairs, plan, levels)
    futile = (undecided & hopeless).any(-1)
    candidate = (costs < cheapest) & ~futile & ~shown_worse(pairs, plan.alpha)
    order = np.where(candidate, costs, len(costs))
    first = candidate & (np.arange(len(costs)) == order.argmin(-1)[..., None])
    return first | (first[..., None] & undecided).any(-2)


def _lower(before: Array, p_values: Array, plan: Plan, look: int) -> Array:
    return np.minimum(before, sequential_p_values(p_values, plan.looks, look))


def _power(pairs: Pairs, plan: Plan, levels: Array) -> Array:
    """(..., K, K) probability that the last look shows cell i not worse than cell j, given the episodes so far.

    The true difference is taken to be `PERSISTS` times the observed one.
    """
    last, left = plan.looks[-1], plan.looks[-1] - pairs.episodes
    allowed = allowed_loss(pairs, plan.margin, _levels_of_last(plan, levels), last)
    ahead = _expected(pairs, plan) + last * allowed
    return np.where(left > 0, ndtr(ahead / np.sqrt(np.maximum(left, 1) * pairs.discordant)), 0)


def _accepted_at_last(pairs: Pairs, plan: Plan, levels: Array) -> Array:
    """(..., K, K) bool, whether the last look shows cell i not worse than cell j if all goes as `_power` expects.

    That is the exact test, with as many discordant episodes as were observed: where there were none, the approximation
    of `_power`, which takes there to be some, is far too careful.
    """
    last = plan.looks[-1]
    difference = np.rint(_expected(pairs, plan))
    different = np.rint((pairs.wins + np.swapaxes(pairs.wins, -1, -2)) / pairs.episodes * last)
    different = np.maximum(different, np.abs(difference))
    different += (different - difference) % 2
    fits = (different <= last) & (pairs.episodes < last)
    wins = np.where(fits, (different + difference) / 2, 0)
    accepted = compare_pairs(wins, last, plan.margin).not_worse <= _levels_of_last(plan, levels)
    return np.asarray(fits & accepted)


def _expected(pairs: Pairs, plan: Plan) -> Array:
    """(..., K, K) by how many episodes more cell i is expected to solve than cell j up to the last look."""
    return pairs.differences * (pairs.episodes + PERSISTS * (plan.looks[-1] - pairs.episodes))


def _levels_of_last(plan: Plan, levels: Array) -> Array:
    """`nominal_levels` at the last look."""
    return nominal_levels(plan.looks, len(plan.looks) - 1, levels)


def _advise(plan: Plan, state: State, costs: Array) -> Recommendation:
    levels = levels_in_force(adjust(state.pairs.not_worse, costs), costs, plan.alpha)
    return advise(
        state.pairs,
        _levels_of_last(plan, levels),
        costs,
        margin=plan.margin,
        alpha=plan.alpha,
        confidence=1 - ERROR,
        episodes=plan.looks[-1],
    )


def sequential_p_values(p_values: ArrayLike, looks: tuple[int, ...], look: int) -> Array:
    """The least overall level at which the test of a look would reject.

    Args:
        p_values: (...) of the test at this look alone.
        looks: all planned looks.
        look: index of this one.

    Returns:
        (...) levels; 1 where the level would have to exceed the greatest of `LEVELS`.
    """
    levels = _boundaries(looks)[look]
    with np.errstate(divide="ignore"):
        return np.exp(np.interp(np.log(p_values), np.log(levels), np.log(LEVELS), right=0.0))


def nominal_levels(looks: tuple[int, ...], look: int, level: ArrayLike) -> Array:
    """The level at which the p-value of one look counts, (...), so that all looks together have the overall `level`."""
    return np.exp(np.interp(np.log(level), np.log(LEVELS), np.log(_boundaries(looks)[look])))


@lru_cache(maxsize=64)
def _boundaries(looks: tuple[int, ...]) -> Array:
    """The level of each look for each of `LEVELS`, (looks, LEVELS), by integration (Armitage, McPherson and Rowe 1969).

    The sum of n standardised episodes, divided by sqrt(N), is a Brownian motion at time n / N. Its density over the
    paths that crossed no boundary before is kept at the nodes of a Gauss-Legendre rule from far below to the boundary.
    """
    times = np.array(looks) / looks[-1]
    spent = np.diff(times**2, prepend=0.0)
    # As many nodes as tell apart what one step between looks adds.
    count = max(48, math.ceil(11 / math.sqrt(np.diff(times, prepend=0.0).min())))
    nodes, weights = np.polynomial.legendre.leggauss(count)
    position, mass = np.zeros((len(LEVELS), 1)), np.ones((len(LEVELS), 1))
    found = []
    for time, share, step in zip(times, spent, np.diff(times, prepend=0.0), strict=True):
        bound = _crossed(position, mass, LEVELS * share, math.sqrt(step), 9 * math.sqrt(time))
        found.append(ndtr(-bound / math.sqrt(time)))
        low = -7 * math.sqrt(time)
        half = (bound[:, None] - low) / 2
        after = low + half * (nodes + 1)
        density = [
            np.exp(-(((to[:, None] - begin) ** 2) / (2 * step))) @ weight / math.sqrt(2 * math.pi * step)
            for to, begin, weight in zip(after, position, mass, strict=True)
        ]
        position, mass = after, np.array(density) * half * weights
    # A level that rises with the overall one lets the least overall level be looked up.
    return np.maximum.accumulate(np.array(found), axis=1)


def _crossed(position: Array, mass: Array, probability: Array, deviation: float, reach: float) -> Array:
    """Find the bounds that paths at (L, M) positions of this mass cross with (L,) probabilities in one normal step."""

    def crosses_more(bound: Array) -> Array:
        return np.asarray((mass * ndtr((position - bound[:, None]) / deviation)).sum(1) > probability)

    return bisect(crosses_more, np.full(len(probability), -reach), np.full(len(probability), reach))


def _outcomes(row: ArrayLike) -> Array:
    return cells_by_episodes([row], "success", bool)[0] if len(np.asarray(row)) else np.zeros(0, dtype=bool)
