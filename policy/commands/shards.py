"""Run a shard of a sweep: its share of every cell's episodes, with nothing compared and nothing stopped early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from policy.commands.looks import wanted_plan
from policy.commands.stage import OnEnvError, Stage, check_broken, run_missing, settle_provenance
from policy.rollout.ledger import Ledger
from policy.statistics.results import EpisodeResult, describe_broken
from policy.sweep.grid import SweepCell, ids_of
from policy.sweep.looks import LEDGER
from policy.sweep.recipes import grouped, recipe_row
from policy.sweep.rows import uniform
from policy.sweep.shards import Shard, begin_shard, write_shard
from policy.sweep.table import format_table
from policy.sweep.timing import latencies_of
from policy.tracking.tracker import TrackedRun


def run_shard(
    shard: Shard,
    stage: Stage,
    groups: Sequence[Sequence[SweepCell]],
    folder: Path,
    open_run: Callable[[], TrackedRun],
    *,
    num_envs: int,
    workers: int | None,
    on_env_error: OnEnvError,
    mix: bool,
    threads: int,
    margin: float,
) -> None:
    """Run the episodes of a shard that its ledger lacks, and write what `merge=` needs.

    Args:
        shard: which share of the episodes.
        stage: the checkpoints and the environment, with the seeds of the whole sweep.
        groups: the cells of each row of the sweep.
        folder: of this shard.
        open_run: opens the tracked run, which receives the table.
        num_envs: environments that run at once.
        workers: number of processes; None for one per core.
        on_env_error: what to do with an episode that broke off.
        mix: see `settle_provenance`.
        threads: of the plans whose latency is measured.
        margin: of the sweep's plan; `merge=` chooses its own.

    Raises:
        ValueError: the folder holds something else.
        WorkerError: see `run_tasks` and `check_broken`.
    """
    cells = [*chain(*groups)]
    share = dataclasses.replace(stage, seeds=shard.seeds(stage.seeds))
    with Ledger(folder / LEDGER) as ledger:
        wanted = wanted_plan(
            groups,
            ledger,
            looks=(len(stage.seeds),),
            asked=ids_of(cells),
            max_ms=None,
            left_out="",
            seed=stage.seeds.start,
            margin=margin,
        )
        begin_shard(ledger, shard, [cell.settings for cell in cells], wanted)
        run = open_run()
        print(
            f"shard {shard}: the episodes with seeds {share.seeds[0]} to {share.seeds[-1]} of each cell; all of them"
            " run, and merge= compares the cells when all shards have run"
        )
        missing = any(ledger.missing(cell, share.seeds) for cell in wanted.cells)
        settle_provenance(share, cells, ledger, missing=missing, mix=mix)
        found = run_missing(share, cells, ledger, num_envs, on_env_error, title=f"shard {shard}", workers=workers)
        results = grouped(found, groups)
        warnings = [*stage.warnings, *filter(None, [ledger.unpaired])]
    _publish(folder, stage, groups, results, warnings, threads, run)
    check_broken([*chain(*chain(*results))])


def _publish(
    folder: Path,
    stage: Stage,
    groups: Sequence[Sequence[SweepCell]],
    results: Sequence[Sequence[Sequence[EpisodeResult]]],
    warnings: list[str],
    threads: int,
    run: TrackedRun,
) -> None:
    """Measure the latencies, and write, print and track the rows of a share."""
    latencies = latencies_of([group[0] for group in groups], threads)
    rows = [recipe_row(*one) for one in zip(groups, results, latencies, strict=True)]
    members = [[str(cell.checkpoint.path) for cell in group] for group in groups]
    file = write_shard(folder, rows=rows, env=stage.env, warnings=warnings, members=members)
    run.log_table("sweep", uniform(rows))
    run.finish()
    print(format_table(uniform(rows)))
    for warning in describe_broken([*chain(*chain(*results))]):
        print(f"warning: {warning}")
    print(f"files: {folder / LEDGER}, {file}")
