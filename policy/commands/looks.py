"""Run the episodes of a sweep from look to look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from policy.commands.stage import (
    OnEnvError,
    Pool,
    Stage,
    rollout_pool,
    run_tasks,
    say_on_disk,
    settle_provenance,
    warn_unpaired,
)
from policy.common.progress import progress
from policy.rollout.ledger import Ledger, cell_id
from policy.sweep.grid import SweepCell, ids_of
from policy.sweep.looks import (
    LookPlan,
    can_stop_early,
    describe_plan,
    has_results,
    keep,
    missing_tasks,
    plans_of,
    settle,
)
from policy.sweep.recipes import recipe_axes
from policy.sweep.rows import Row
from policy.sweep.timing import latencies_of, within


def in_earlier_order(groups: list[list[SweepCell]], ledger: Ledger) -> list[list[SweepCell]]:
    """Put cells in the order in which an earlier command listed the same ones: another order asks nothing new.

    Args:
        groups: the cells of each row.
        ledger: of the sweep.

    Returns:
        The groups, and the cells in each of them, in that order.
    """
    asked = {*ids_of([*chain(*groups)])}
    earlier = next((plan.asked for plan in plans_of(ledger) if {*plan.asked} == asked), None)
    if earlier is None:
        return groups

    def place(cell: SweepCell) -> int:
        return earlier.index(cell_id(cell.settings))

    return sorted((sorted(group, key=place) for group in groups), key=lambda group: place(group[0]))


def fast_cells(
    groups: list[list[SweepCell]], asked: tuple[str, ...], max_ms: float | None, threads: int, ledger: Ledger
) -> tuple[list[list[SweepCell]], list[Row] | None, str]:
    """Leave out the cells that are too slow; a sweep that has episodes leaves out the same ones as before.

    Args:
        groups: the cells of each row. Those of a recipe stay or go together, as the first one's latency decides.
        asked: the ids of all of them.
        max_ms: milliseconds that the median plan of a cell may take; None for no limit.
        threads: of each plan.
        ledger: of the sweep.

    Returns:
        The groups that stay, the latencies of their first cells if they had to be measured, and a sentence about the
        others.

    Raises:
        ValueError: no cell is fast enough.
    """
    if max_ms is None:
        return groups, None, ""
    for plan in (plan for plan in plans_of(ledger) if has_results(plan, ledger)):
        kept = [group for group in groups if {*ids_of(group)} <= {*plan.cells}]
        stay = ids_of([*chain(*kept)])
        if (plan.asked, plan.max_ms, plan.cells) == (asked, max_ms, stay):
            print(
                f"the cells within max_ms={max_ms:g} stay as chosen before the first episode, whatever is measured now"
            )
            return kept, None, plan.left_out
    firsts = [group[0] for group in groups]
    latencies = latencies_of(firsts, threads)  # before the episodes, so that no result has a say
    fast, left_out = within([recipe_axes(group) for group in groups], latencies, max_ms)
    return [groups[number] for number in fast], [latencies[number] for number in fast], left_out


def wanted_plan(
    groups: Sequence[Sequence[SweepCell]],
    ledger: Ledger,
    *,
    looks: tuple[int, ...],
    asked: tuple[str, ...],
    max_ms: float | None,
    left_out: str,
    seed: int,
    margin: float,
) -> LookPlan:
    """What a command asks for; cells that cannot be paired, and a single one, are looked at once.

    Args:
        groups: the cells of each row.
        ledger: of the sweep.
        looks: the numbers of episodes at which cells that can stop early are compared.
        asked: see `LookPlan`.
        max_ms: see `LookPlan`.
        left_out: see `LookPlan`.
        seed: see `LookPlan`.
        margin: see `LookPlan`.

    Returns:
        The plan, before `settle` says what it may spend.
    """
    cells = [*chain(*groups)]
    several = can_stop_early(ledger) and len(cells) > 1
    return LookPlan(
        asked=asked,
        max_ms=max_ms,
        left_out=left_out,
        cells=ids_of(cells),
        recipes=tuple(map(len, groups)),
        cost=tuple(cell.multiply_adds for cell in cells),
        seed=seed,
        looks=looks if several else looks[-1:],
        margin=margin,
        alpha=0,
    )


def run_looks(
    stage: Stage,
    cells: Sequence[SweepCell],
    wanted: Callable[[], LookPlan],
    ledger: Ledger,
    num_envs: int,
    on_env_error: OnEnvError,
    *,
    workers: int | None,
    mix: bool,
    after_each: Callable[[], None],
) -> tuple[LookPlan, list[str]]:
    """Run what the plan of looks still needs; a plan that has come to its end runs nothing.

    Args:
        stage: the checkpoints, the environment and the seeds.
        cells: the cells to run.
        wanted: what this command asks for, which depends on what the ledger holds and says of its cells.
        ledger: receives the plan and the results.
        num_envs: environments that run at once.
        on_env_error: what to do with an episode that broke off.
        workers: number of processes; by default one per core.
        mix: see `settle_provenance`.
        after_each: called before the first episode, and after each.

    Returns:
        The plan, and the warnings of `settle_provenance`.

    Raises:
        ValueError: the missing episodes would be run with something else than the finished ones, and `mix` is False.
        WorkerError: an episode broke off and `on_env_error` is `stop`, or the processes failed.
    """
    plan = settle(ledger, wanted()) if ledger.finished() else None
    missing = plan is None or bool(missing_tasks(plan, ledger))
    mixed = settle_provenance(stage, cells, ledger, missing=missing, mix=mix)
    if plan and not missing:
        print(describe_plan(plan, keep(ledger, plan)))
        warn_unpaired(ledger)
        say_on_disk(_finished(plan, ledger), len(cells) * plan.looks[-1])
        return plan, mixed
    with rollout_pool(stage, ledger, min(num_envs, len(cells) * len(stage.seeds)), workers=workers) as pool:
        plan = settle(ledger, wanted())  # only now is it known whether a seed fixes the episode
        print(describe_plan(plan, keep(ledger, plan)))
        _run_all(pool, plan, cells, ledger, on_env_error, after_each)
    return plan, mixed


def _run_all(
    pool: Pool,
    plan: LookPlan,
    cells: Sequence[SweepCell],
    ledger: Ledger,
    on_env_error: OnEnvError,
    after_each: Callable[[], None],
) -> None:
    total, finished = len(cells) * plan.looks[-1], _finished(plan, ledger)
    say_on_disk(finished, total)
    after_each()
    with progress(total=total, initial=finished, desc="sweep", unit="episode") as bar:
        while tasks := missing_tasks(plan, ledger):
            run_tasks(pool, cells, plan.cells, tasks, ledger, on_env_error, bar, after_each)


def _finished(plan: LookPlan, ledger: Ledger) -> int:
    return sum(len(plan.seeds) - len(ledger.missing(cell, plan.seeds)) for cell in plan.cells)
