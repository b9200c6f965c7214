"""The plan of successive halving: how long each rung trains, so that the budget is enough whichever recipes remain.

All recipes train up to the steps of the first rung. The better half of them trains on, up to twice as many steps, and
so on, until two remain (Jamieson and Talwalkar 2016). A rung goes on where the one before it stopped: every recipe
follows the learning rates of its complete training, and stops early. Where rollouts do not tell the recipes of a rung
apart, those that are left share the rest of the budget instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policy.common.durations import duration_text, exact_text

# Planned are this share of the budget: the machine may become slower.
SHARE = 0.85
# At most this share of what is planned goes into rollouts: as many episodes for each recipe on each rung, up to 100.
ROLLOUT_SHARE = 1 / 2
MOST_EPISODES = 100
# Fewer episodes than this do not decide between recipes.
LEAST_EPISODES = 10
# The first rung trains for at least this share of a complete training, or else its losses say little about its end.
LEAST_SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a recipe costs, in seconds.

    Attributes:
        step: of one training step.
        rung: of each rung besides its steps: loading, measuring, saving.
    """

    step: float
    rung: float


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One rung of the plan.

    Attributes:
        candidates: number of recipes on it.
        steps: training steps at its end.
    """

    candidates: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a search.

    Attributes:
        rungs: from the first to the last, from which one recipe is chosen.
        episodes: that each recipe is rolled out for on each rung; 0 without rollouts.
    """

    rungs: tuple[Rung, ...]
    episodes: int


def sizes_of(candidates: int) -> list[int]:
    """The number of recipes on each rung, halved and rounded up until two remain.

    >>> sizes_of(7)
    [7, 4, 2]
    """
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def seconds_needed(plan: Plan, costs: Sequence[Cost], episode_seconds: float) -> float:
    """The seconds that a plan takes if the most expensive recipes remain on every rung.

    Args:
        plan: the plan.
        costs: of all recipes.
        episode_seconds: what one episode costs.
    """
    dearest_steps = sorted((cost.step for cost in costs), reverse=True)
    dearest_rungs = sorted((cost.rung for cost in costs), reverse=True)
    needed = sum(rung.candidates for rung in plan.rungs) * plan.episodes * episode_seconds
    before = 0
    for rung in plan.rungs:
        needed += (rung.steps - before) * sum(dearest_steps[: rung.candidates])
        needed += sum(dearest_rungs[: rung.candidates])
        before = rung.steps
    return needed


def plan_halving(costs: Sequence[Cost], budget: float, spent: float, steps: int, episode_seconds: float | None) -> Plan:
    """Plan the longest rungs that the budget allows.

    With an environment, every rung has rollouts. If these are too dear for every rung, all recipes train on a single
    one and are rolled out there; if they are too dear even then, there are none.

    Args:
        costs: of each recipe, two or more.
        budget: the whole budget, in seconds.
        spent: what of it was spent before, in seconds.
        steps: of a complete training; the last rung is not longer.
        episode_seconds: what one episode of a rollout costs; None without an environment.

    Returns:
        The plan.

    Raises:
        ValueError: the budget is too small for rungs of `LEAST_SHARE`; the message says which one would do.
    """
    planned, seconds = SHARE * (budget - spent), episode_seconds or 0.0
    least = max(1, math.floor(LEAST_SHARE * steps))
    halved = sizes_of(len(costs))
    courses = [(halved, 0)]
    if episode_seconds is not None:
        played = [(sizes, _affordable(sizes, planned, episode_seconds)) for sizes in (halved, [len(costs)])]
        courses = [(sizes, episodes) for sizes, episodes in played if episodes >= LEAST_EPISODES] + courses

    def plan_of(first: int, sizes: Sequence[int], episodes: int) -> Plan:
        rungs = (Rung(candidates=size, steps=min(steps, first * 2**number)) for number, size in enumerate(sizes))
        return Plan(rungs=tuple(rungs), episodes=episodes)

    for sizes, episodes in courses:
        needed = seconds_needed(plan_of(least, sizes, episodes), costs, seconds)
        if needed <= planned:
            break
    else:
        raise ValueError(
            f"recipe.budget={exact_text(budget)} is too small for {len(costs)} recipes, which need"
            f" {duration_text(spent + needed / SHARE)} on this machine: raise it"
        )
    longest = max(least, steps // 2 ** (len(sizes) - 1))
    first = least
    for bit in reversed(range(longest.bit_length())):  # the largest number of steps that fits, bit by bit
        longer = first + 2**bit
        if longer <= longest and seconds_needed(plan_of(longer, sizes, episodes), costs, seconds) <= planned:
            first = longer
    return plan_of(first, sizes, episodes)


def plan_fastest(
    costs: Mapping[str, Cost], budget: float, spent: float, steps: int, episode_seconds: float | None
) -> tuple[Plan, list[str]]:
    """Plan for as many recipes as the budget allows; the slowest are left out first, and the first one never.

    Of those that are about as fast as each other or as the first one, later ones are left out first: which of them is
    faster on a busy machine is chance.

    With an environment, up to half of the recipes are left out before the rollouts are.

    Args:
        costs: of each recipe, by name, two or more; the others as in `plan_halving`.
        budget: the whole budget, in seconds.
        spent: what of it was spent before, in seconds.
        steps: of a complete training.
        episode_seconds: what one episode of a rollout costs; None without an environment.

    Returns:
        The plan, and the names of the recipes that it is for.

    Raises:
        ValueError: the budget is too small even for the first and the fastest other one.
    """
    first, *others = costs
    times = {name: max(1.0, costs[name].step / max(costs[first].step, 1e-9)) for name in others}
    by_speed = [first, *sorted(others, key=lambda name: round(math.log2(times[name])))]
    least = min(2, len(costs))
    found, refused = [], ""
    for count in range(len(costs), least - 1, -1):
        names = by_speed[:count]
        try:
            plan = plan_halving([costs[name] for name in names], budget, spent, steps, episode_seconds)
        except ValueError as error:
            refused = str(error)
        else:
            found.append((plan, [name for name in costs if name in names]))
    if not found:
        timed = f", or name two of these {len(costs)} in recipe.candidates=, so that the others are not timed"
        raise ValueError(refused + (timed if len(costs) > 2 else ""))
    played = [(plan, names) for plan, names in found if plan.episodes and len(names) >= len(costs) / 2]
    return (played or found)[0]


def plan_last_rung(
    plan: Plan, done: int, costs: Sequence[Cost], left: float, steps: int, episode_seconds: float
) -> Plan:
    """Replace the rungs that are left by a single one, on which these recipes share the rest of the budget evenly.

    Args:
        plan: the plan.
        done: number of rungs that are complete, one or more.
        costs: of each recipe that goes on.
        left: of the budget, in seconds.
        steps: of a complete training; the rung is not longer.
        episode_seconds: what one episode of a rollout costs.

    Returns:
        The new plan; it ends with the complete rungs if nothing is left for more steps.
    """
    kept, before = plan.rungs[:done], plan.rungs[done - 1].steps
    for_steps = SHARE * left - sum(cost.rung + plan.episodes * episode_seconds for cost in costs)
    longest = min(steps, before + math.floor(for_steps / max(1e-9, sum(cost.step for cost in costs))))
    more = (Rung(candidates=len(costs), steps=longest),) if longest > before else ()
    return Plan(rungs=(*kept, *more), episodes=plan.episodes)


def _affordable(sizes: Sequence[int], planned: float, episode_seconds: float) -> int:
    """The episodes that each recipe may be rolled out for on each rung."""
    return min(MOST_EPISODES, math.floor(max(0.0, ROLLOUT_SHARE * planned / (sum(sizes) * max(episode_seconds, 1e-9)))))
