"""Does a sweep that stops early keep its promise, and what does it save? Simulated sweeps, no policy and no robot.

    python -m scripts.bench.sweep
    python -m scripts.bench.sweep sweeps=500

An episode of a simulated sweep has a difficulty that all cells share and luck of each cell's own, both normal:
`correlation` is the part of the difficulty. The adaptive plan (at most 600 episodes a cell, six looks) and the fixed
grid (500 episodes a cell, one look) see the same episodes. Every sweep goes through the functions of
`policy.statistics` that the command uses, many sweeps at a time.

First table: scenarios, with the share of sweeps that recommend the cheapest cell that is truly less than the margin
worse than the best ("right"), and the episodes that the adaptive plan saves of the fixed grid's. Second table: all
cells but the most expensive are worse than it by exactly the margin, so that every recommendation of a cheaper cell is
wrong; for each way of stopping the share of sweeps that ever recommended one. Third table: how often intervals of truly
equal cells' differences to the best cell exclude 0. Exit code 1 where an error exceeds 5 % by more than chance
explains. With 4,000 sweeps of each kind it takes half an hour on one core, most of it for 48 cells.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from policy.common.progress import say
from policy.statistics.paired import PairedDifference, compare_success
from policy.statistics.recommendation import Pairs, adjust, compare_pairs
from policy.statistics.sequential import ERROR, Plan, State, begin, plan_looks, stage_alpha, step
from policy.statistics.simultaneous import compare_with_best
from scripts.bench.arguments import given_settings
from scripts.bench.report import machine, write_report

Array = NDArray[Any]
SWEEPS, MARGIN, ADAPTIVE, FIXED, LOOKS = 4000, 0.05, 600, 500, 6
CORRELATIONS = (0.0, 0.5, 0.9)
# Success rates by rising cost. Both measured curves are those of docs/demo.md and docs/pusht.md; where the demo's shows
# 50 of 50, 0.995 is assumed.
SCENARIOS = {
    "demo": (0.12, 0.90, 0.995, 0.995, 0.995, 0.995),
    "one good of five": (0.7, 0.7, 0.9, 0.7, 0.7),
    "ramp": (0.70, 0.76, 0.82, 0.88, 0.94, 0.97),
    "step": (0.5, 0.5, 0.9, 0.9, 0.9, 0.9),
    "all equal": (0.9,) * 6,
    "Push-T": (0.91, 0.92, 0.93, 0.94, 0.93, 0.94),
}
# Sweeps whose intervals are computed, at most: one after the other, they take longer.
INTERVALS = 400
# Simulated at once: about so many pairs of cells.
PAIRS_AT_ONCE = 40_000


def main() -> int:
    """Simulate; `sweeps=` takes another number of sweeps of each kind, `cells=` other numbers of cells."""
    given = given_settings(sys.argv[1:], "sweep")
    sweeps, cells = int(given.get("sweeps", SWEEPS)), [int(n) for n in given.get("cells", "2,6,48").split(",")]
    print(machine("scipy"))
    rows = []
    for name, correlation in product(SCENARIOS, CORRELATIONS):
        rows.append(scenario(name, correlation, sweeps))
        say(str(rows[-1]))
    errors = []
    for behaviour, count, correlation in product(behaviours(), cells, CORRELATIONS):
        errors.append(error(behaviour, count, correlation, sweeps))
        say(str(errors[-1]))
    differences = [false_differences(count, correlation, sweeps) for count, correlation in product(cells, CORRELATIONS)]
    write_report("sweep_scenarios", rows)
    write_report("sweep_errors", errors)
    write_report("sweep_intervals", differences)
    return int(any(row["wrong"] > most(ERROR, row["sweeps"]) for row in errors))


def most(rate: float, sweeps: int) -> float:
    """The greatest share that chance explains where the true one is `rate`: three standard errors more."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / sweeps)


def scenario(name: str, correlation: float, sweeps: int) -> dict[str, Any]:
    """The adaptive plan beside the fixed grid on the same episodes, as a row of the table."""
    rates, plan = np.array(SCENARIOS[name]), first_plan()
    costs, found = np.arange(len(rates)), []
    for solved in outcomes(rates, ADAPTIVE, correlation, sweeps):
        chosen, stopped = follow_all(plan, solved, costs)
        found.append((chosen, fixed(solved, costs), stopped.sum(1)))
    adaptive, grid, episodes = (np.concatenate(part) for part in zip(*found, strict=True))
    good = rates > rates.max() - MARGIN + 1e-9
    right, wrong = int(np.flatnonzero(good)[0]), np.append(~good, False)  # index -1: no recommendation
    return {
        "scenario": name,
        "correlation": correlation,
        "sweeps": sweeps,
        "right": float((adaptive == right).mean()),
        "right, fixed": float((grid == right).mean()),
        "wrong": float(wrong[adaptive].mean()),
        "wrong, fixed": float(wrong[grid].mean()),
        "episodes saved": float(1 - episodes.mean() / (FIXED * len(rates))),
    }


def first_plan(looks: int = LOOKS) -> Plan:
    """The plan that a sweep starts with by default, or with other looks."""
    return Plan(looks=plan_looks(ADAPTIVE, looks), margin=MARGIN, alpha=stage_alpha(1))


def outcomes(rates: Array, episodes: int, correlation: float, sweeps: int) -> Iterator[Array]:
    """Simulated outcomes, (S, K, N) bool, in blocks of S sweeps; the same ones for the same arguments."""
    generator = np.random.default_rng(0)
    bounds = ndtri(rates).astype(np.float32)[:, None]
    at_once = max(1, min(PAIRS_AT_ONCE // len(rates) ** 2, 2_000_000 // (episodes * len(rates))))
    for start in range(0, sweeps, at_once):
        count = min(at_once, sweeps - start)
        difficulty = generator.standard_normal((count, 1, episodes), dtype=np.float32)
        luck = generator.standard_normal((count, len(rates), episodes), dtype=np.float32)
        yield np.sqrt(np.float32(correlation)) * difficulty + np.sqrt(np.float32(1 - correlation)) * luck < bounds


def wins_at(solved: Array, looks: Sequence[int]) -> list[Array]:
    """For each look, (S, K, K) wins of each cell over each other."""
    wins, total, before = [], np.zeros((len(solved), solved.shape[1], solved.shape[1])), 0
    for look in looks:
        part = solved[:, :, before:look].astype(np.float32)
        total = total + part @ (1 - part).swapaxes(1, 2)
        wins.append(total)
        before = look
    return wins


def follow_all(plan: Plan, solved: Array, costs: Array) -> tuple[Array, Array]:
    """What `sequential.follow` says of each of S sweeps: the recommended cell (-1 for none) and where cells stopped."""
    state = begin(*solved.shape[:2])
    for look, wins in enumerate(wins_at(solved, plan.looks)):
        here = np.flatnonzero(state.running.any(1))
        while here.size:
            part = step(plan, look, wins[here], costs, _take(state, here))
            _put(state, here, part)
            here = here[~part.moves_on]
    return chosen(state.pairs, costs, plan.alpha), state.stopped


def fixed(solved: Array, costs: Array) -> Array:
    """What `recommend` says of each of S sweeps after `FIXED` episodes."""
    pairs = compare_pairs(wins_at(solved, (FIXED,))[0], FIXED, MARGIN)
    return chosen(pairs, costs, ERROR)


def chosen(pairs: Pairs, costs: Array, alpha: float) -> Array:
    """The cheapest accepted cell of each of S sweeps, whose cells all cost differently; -1 for none."""
    accepted = (adjust(pairs.not_worse, costs) <= alpha).all(-1)
    cheapest = np.where(accepted, costs, len(costs)).argmin(-1)
    return np.where(accepted.any(-1), cheapest, -1)


def _arrays(state: State) -> list[Array]:
    return [getattr(state.pairs, field.name) for field in fields(Pairs)] + [state.stopped, state.running]


def _take(state: State, index: Array) -> State:
    *pairs, stopped, running = (array[index] for array in _arrays(state))
    names = [field.name for field in fields(Pairs)]
    moves_on = np.zeros(len(index), dtype=bool)
    return State(
        pairs=Pairs(**dict(zip(names, pairs, strict=True))), stopped=stopped, running=running, moves_on=moves_on
    )


def _put(state: State, index: Array, part: State) -> None:
    for array, new in zip(_arrays(state), _arrays(part), strict=True):
        array[index] = new


def behaviours() -> dict[str, list[tuple[Plan, float]]]:
    """Ways to use one folder: stages, each a plan and the share of the cells, the most expensive ones, that it has."""

    def stage(number: int, episodes: int, looks: int, margin: float = MARGIN) -> Plan:
        return Plan(looks=plan_looks(episodes, looks), margin=margin, alpha=stage_alpha(number))

    first = first_plan()
    return {
        "one stage": [(first, 1.0)],
        "a look every 10 episodes": [(first_plan(ADAPTIVE // 10), 1.0)],
        "more episodes, twice": [(first, 1.0), (stage(2, 1200, 12), 1.0), (stage(3, 1800, 18), 1.0)],
        "a second stage of any length": [(first, 1.0)]
        + [(stage(2, 100 * looks, looks), 1.0) for looks in range(7, 13)],
        "margin changed, and back": [(first, 1.0), (stage(2, 600, 6, 0.03), 1.0), (stage(3, 1200, 12), 1.0)],
        "cells added": [(first, 0.5), (stage(2, 600, 6), 1.0)],
    }


def error(behaviour: str, cells: int, correlation: float, sweeps: int) -> dict[str, Any]:
    """The share of sweeps that ever recommend a cell that is worse by the margin, as a row of the table."""
    rates = np.full(cells, 0.95 - MARGIN)
    rates[-1] = 0.95
    stages, found = behaviours()[behaviour], []
    for solved in outcomes(rates, max(plan.looks[-1] for plan, _ in stages), correlation, sweeps):
        wrong = np.zeros(len(solved), dtype=bool)
        for plan, share in stages:
            part = solved[:, -max(2, round(share * cells)) :]
            cell, _ = follow_all(plan, part, np.arange(part.shape[1]))
            wrong |= (cell >= 0) & (cell < part.shape[1] - 1)
        found.append(wrong)
    return {
        "stopping": behaviour,
        "cells": cells,
        "correlation": correlation,
        "sweeps": sweeps,
        "wrong": float(np.concatenate(found).mean()),
    }


def false_differences(cells: int, correlation: float, sweeps: int) -> dict[str, Any]:
    """How often some interval of truly equal cells' differences to the best one excludes 0, as a row of the table."""
    found = []
    for solved in chain.from_iterable(outcomes(np.full(cells, 0.9), FIXED, correlation, min(sweeps, INTERVALS))):
        best = int(solved.mean(1).argmax())
        found.append([_excludes_0(compare(solved, best)) for compare in (compare_with_best, compare_success)])
    together, separately = np.mean(found, axis=0)
    return {
        "equal cells": cells,
        "correlation": correlation,
        "sweeps": len(found),
        "some simultaneous interval excludes 0": float(together),
        "some separate one": float(separately),
    }


def _excludes_0(cells: Sequence[PairedDifference]) -> bool:
    return any(cell.low > 0 or cell.high < 0 for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
