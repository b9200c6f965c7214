"""The looks of a sweep: planned before its first episode, kept in the ledger, and followed from what the ledger holds.

A plan says at which numbers of episodes the cells are compared, and how much of the 5 % of wrong recommendations it may
spend. A later command that asks for something else (more episodes, another margin, other cells or recipes) makes a
further plan from what is left, so that all answers on one ledger together keep the promise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policy.rollout.cells import Task
from policy.rollout.ledger import Ledger, Recorded
from policy.statistics.recommendation import Recommendation, recommend
from policy.statistics.results import EpisodeResult
from policy.statistics.sequential import ERROR, Plan, Progress, follow, plan_looks, stage_alpha

# The ledger of a sweep, in its folder.
LEDGER = "episodes.jsonl"
MOST_LOOKS = 6
LEAST_EPISODES = 20


@dataclass(frozen=True, kw_only=True)
class LookPlan:
    """A plan of looks, with the cells and episodes that it is for.

    Attributes:
        asked: ids of the cells that the command asked for.
        max_ms: the limit of their latency, or None.
        left_out: a sentence about the cells that were slower than that.
        cells: ids of the cells that take part, in their order.
        recipes: how many of them make each row, one after the other: 1, or the number of training seeds of a recipe.
            The same cells as other recipes are another question, with another answer that may be wrong.
        cost: what ranks them, see `costs_of`.
        seed: of the first episode.
        looks: see `Plan`.
        margin: see `Plan`.
        alpha: see `Plan`.
    """

    asked: tuple[str, ...]
    max_ms: float | None
    left_out: str
    cells: tuple[str, ...]
    recipes: tuple[int, ...]
    cost: tuple[float, ...]
    seed: int
    looks: tuple[int, ...]
    margin: float
    alpha: float

    @property
    def adaptive(self) -> bool:
        """Whether there is more than one look."""
        return len(self.looks) > 1

    @property
    def seeds(self) -> range:
        """Seeds of all episodes, of which a cell may run fewer."""
        return range(self.seed, self.seed + self.looks[-1])

    def progress(self, success: Sequence[Sequence[bool]]) -> Progress:
        """Follow the plan as far as the cells' outcomes go."""
        return follow(Plan(looks=self.looks, margin=self.margin, alpha=self.alpha), success, self.cost)

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> LookPlan:
        """Read what `dataclasses.asdict` and JSON made of a plan; one without `recipes` is of single checkpoints.

        Raises:
            ValueError: it is none.
        """
        try:
            whole = {"recipes": [1] * len(row["cells"]), **row}
            lists = ("asked", "cells", "recipes", "cost", "looks")
            plan = LookPlan(**{**whole, **{name: tuple(whole[name]) for name in lists}})
            Plan(looks=plan.looks, margin=plan.margin, alpha=plan.alpha)
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{dict(row)} is no plan of looks ({error!r})") from error


def planned_looks(episodes: int, looks: int | None, *, adaptive: bool) -> tuple[int, ...]:
    """The numbers of episodes at which to look.

    Args:
        episodes: the most that a cell runs.
        looks: how many; None for six, or fewer where a look would add less than 20 episodes, which decide nothing.
        adaptive: otherwise there is one look.

    Raises:
        ValueError: looks that do not fit.
    """
    if not adaptive:
        if looks not in (None, 1):
            raise ValueError(f"adaptive=false looks once, after all episodes: leave looks={looks} out")
        return (episodes,)
    return plan_looks(episodes, max(1, min(MOST_LOOKS, episodes // LEAST_EPISODES)) if looks is None else looks)


def plans_of(ledger: Recorded) -> list[LookPlan]:
    """The plans of earlier commands, in the order in which they were made, without those that were replaced.

    Each plan may spend less than those before it, but for one that replaces the one before, which nobody followed: that
    may spend the same.
    """
    plans = [LookPlan.from_row(row) for row in ledger.plans]
    return [plan for number, plan in enumerate(plans) if all(plan.alpha != one.alpha for one in plans[number + 1 :])]


def settle(ledger: Ledger, wanted: LookPlan) -> LookPlan:
    """Find the plan that an earlier command made for the same wish, or make one from what earlier plans left.

    Args:
        ledger: of the sweep.
        wanted: its `alpha` is not used.

    Returns:
        The plan, with its share of the wrong recommendations.

    Raises:
        ValueError: the wish chooses among results that were seen.
    """
    earlier = plans_of(ledger)
    if found := next((plan for plan in earlier if dataclasses.replace(plan, alpha=wanted.alpha) == wanted), None):
        return found
    followed = [plan for plan in earlier if has_results(plan, ledger)]  # the others have told nobody anything
    _check_choice(ledger, wanted, followed)
    return dataclasses.replace(wanted, alpha=_alpha_left(ledger, followed))


def has_results(plan: LookPlan, ledger: Ledger) -> bool:
    """Whether an episode of a plan has finished."""
    return any(len(ledger.missing(cell, plan.seeds)) < len(plan.seeds) for cell in plan.cells)


def _alpha_left(ledger: Ledger, earlier: Sequence[LookPlan]) -> float:
    """What the next plan may spend; a plan whose line was removed, as a damaged one may be, has still been spent."""
    if not earlier:
        return stage_alpha(2 if ledger.began_checked else 1)
    spent = min(plan.alpha for plan in earlier)
    return next(alpha for alpha in map(stage_alpha, itertools.count(len(earlier) + 1)) if alpha < spent)


def _check_choice(ledger: Ledger, wanted: LookPlan, earlier: Sequence[LookPlan]) -> None:
    """Refuse to compare only a part of what was seen: whoever chooses it by its results can make a worse cell win.

    No small share of the wrong recommendations covers that, because a part can be chosen in too many ways. A single
    cell is compared with nothing, and cells without results can be chosen by nothing.

    Raises:
        ValueError: a cell is left out, or episodes are.
    """
    if len(wanted.cells) == 1:
        return
    way_out = "or begin with seeds that nobody has seen (seed=)"
    seen = {cell for cell in ledger.finished() if len(ledger.missing(cell, wanted.seeds)) < len(wanted.seeds)}
    others = seen.difference(wanted.cells)
    if others and others != seen:
        raise ValueError(
            f"{ledger.path} has results of {len(others)} more {'cells' if len(others) > 1 else 'cell'} for these seeds,"
            " and an answer that leaves out cells after their results were seen is not sure: sweep all of them,"
            f" {way_out}"
        )
    started = [plan.seeds for plan in earlier if not {*plan.cells}.isdisjoint(wanted.cells)]
    if not earlier and seen:  # an earlier version ran its episodes without a plan
        started = [ledger.span(seen)]
    whole = _with_all(wanted.seeds, started)
    if whole != wanted.seeds:
        cut = next(seeds for seeds in started if _with_all(wanted.seeds, [seeds]) != wanted.seeds)
        raise ValueError(
            f"{ledger.path} holds a sweep of these cells with seed={cut.start} and {len(cut)} episodes, and an answer"
            " that leaves out episodes after they were seen is not sure: take them all, with"
            f" seed={whole.start} and episodes={len(whole)} or more, {way_out}"
        )


def _with_all(seeds: range, others: Sequence[range]) -> range:
    """Widen a range of seeds until it holds, of others, all that it overlaps."""
    for _ in others:  # each of them may bring the next one within reach
        for other in others:
            if other.start < seeds.stop and seeds.start < other.stop:
                seeds = range(min(seeds.start, other.start), max(seeds.stop, other.stop))
    return seeds


def keep(ledger: Ledger, plan: LookPlan) -> int:
    """Write a plan down, unless the ledger has it, and return its number there: 1 for the first."""
    if plan not in plans_of(ledger):
        ledger.note_plan(dataclasses.asdict(plan))
    return plans_of(ledger).index(plan) + 1


def leading_results(plan: LookPlan, ledger: Ledger) -> list[list[EpisodeResult]]:
    """The results of each cell up to its first episode that is missing."""
    found = []
    for cell in plan.cells:
        missing = ledger.missing(cell, plan.seeds)
        found.append(ledger.present(cell, plan.seeds[: plan.seeds.index(missing[0]) if missing else None]))
    return found


def missing_tasks(plan: LookPlan, ledger: Ledger) -> list[Task]:
    """The episodes that the next look needs; none if the plan has come to its end."""
    progress = plan.progress(success_of(leading_results(plan, ledger)))
    seeds = plan.seeds[: progress.target]
    return [(number, seed) for number in progress.running for seed in ledger.missing(plan.cells[number], seeds)]


def counted_results(plan: LookPlan, ledger: Ledger) -> list[list[EpisodeResult]]:
    """The results of each cell up to the look at which it stopped; those after it belong to other plans."""
    found = leading_results(plan, ledger)
    return [results[:count] for results, count in zip(found, plan.progress(success_of(found)).stopped, strict=True)]


def success_of(results: Sequence[Sequence[EpisodeResult]]) -> list[list[bool]]:
    """Whether each cell solved its episodes."""
    return [[result.success for result in found] for found in results]


def advice_on(
    success: Sequence[Sequence[bool]],
    cost: Sequence[float],
    margin: float,
    plan: LookPlan | None,
    *,
    alpha: float,
    paired: bool,
) -> Recommendation:
    """Recommend a cell, as the plan says.

    Args:
        success: the outcomes of each cell.
        cost: what ranks the cells, without a plan.
        margin: the difference of success rates from which a cell counts as worse, without a plan.
        plan: None for merged sweeps, which are looked at once.
        alpha: the probability of a wrong recommendation that one look may spend.
        paired: whether equal seeds are equal episodes; cells that are not paired have a single look.
    """
    if plan and paired:
        advice = plan.progress(success).recommendation
        assert advice is not None, "a plan that has come to its end has had a look"
        return advice
    once = recommend(success, plan.cost if plan else cost, margin=margin, confidence=1 - alpha, paired=paired)
    return dataclasses.replace(once, confidence=1 - ERROR)  # of all plans on the ledger together


def can_stop_early(ledger: Ledger) -> bool:
    """Whether several looks make sense: not for cells that cannot be paired.

    A ledger that an earlier version began has been looked at with nothing planned: it goes on as one fixed grid.
    """
    return not ledger.unpaired and (bool(ledger.plans) or not ledger.finished())


def describe_plan(plan: LookPlan, number: int) -> str:
    """Say at how many episodes a plan looks.

    Args:
        plan: the plan.
        number: 1 for the first plan on its ledger.
    """
    looks = ", ".join(map(str, plan.looks))
    at = (
        f"up to {plan.looks[-1]} episodes a cell, compared at {looks}"
        if plan.adaptive
        else f"one look at {looks} episodes"
    )
    rest = f"; plan {number} on this ledger, with {100 * plan.alpha:.2g} % of wrong answers left to it"
    return at + (rest if number > 1 else "")


def describe_saving(plan: LookPlan, results: Sequence[Sequence[EpisodeResult]], *, decided: bool) -> str:
    """Say how many episodes were not needed; empty for a plan of one look.

    Args:
        plan: the plan, at its end.
        results: of each cell.
        decided: whether a cell is recommended.
    """
    ran, most = sum(map(len, results)), len(plan.cells) * plan.looks[-1]
    if not plan.adaptive:
        return ""
    if decided:
        return f"{ran:,} of at most {most:,} episodes decided this."
    if ran == most:
        return ""
    return f"The sweep ended after {ran:,} of at most {most:,} episodes, as the rest would hardly have decided it."
