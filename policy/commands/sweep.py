"""`ddim-sweep`: run cells on the same episodes, compare them, and answer in one sentence which one to use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from policy.commands.looks import fast_cells, in_earlier_order, run_looks, wanted_plan
from policy.commands.shards import run_shard
from policy.commands.stage import (
    FIRST_SEED,
    NUM_ENVS,
    Stage,
    check_broken,
    filmed,
    set_stage,
)
from policy.common.errors import SaveError, reason_of
from policy.common.output import output_folder
from policy.diffusion.sampler import Sampler
from policy.inference.backends import DEFAULT_BACKEND, DEFAULT_WEIGHTS
from policy.rollout.cells import controllers_of
from policy.rollout.episodes import MakeEnv
from policy.rollout.ledger import Ledger
from policy.rollout.watch import ENV_PATIENCE
from policy.statistics.results import EpisodeResult
from policy.sweep.conclusion import Conclusion, Swept, conclude, telling_seeds, title_of
from policy.sweep.grid import SweepCell, axis_values, fixed_calls, ids_of, make_cells, repeats, with_backends
from policy.sweep.live import LivePage, live_page
from policy.sweep.looks import LEDGER, LookPlan, counted_results, planned_looks
from policy.sweep.merging import read_swept
from policy.sweep.plot import plot_rows
from policy.sweep.recipes import check_same_recipe, grouped, grouped_cells, recipe_row, recipes_of
from policy.sweep.report import Clip, write_report
from policy.sweep.rows import Row, label_of, shared
from policy.sweep.shards import Shard, check_whole
from policy.sweep.table import format_table, write_files
from policy.sweep.timing import check_max_ms, check_threads, latencies_of
from policy.tracking.tracker import OpenRun, TrackedRun

REPORT = "report.html"
VIDEOS = 2


def sweep(
    make_env: MakeEnv,
    *,
    checkpoint: Path | list[Path | list[Path]] | None = None,
    ddim_steps: int | list[int] = [1, 2, 4, 8, 16, 50],  # noqa: B006  (never changed)
    episodes: int = 600,
    adaptive: bool = True,
    looks: int | None = None,
    seed: int = FIRST_SEED,
    num_envs: int = NUM_ENVS,
    workers: int | None = None,
    device: str = "cpu",
    sampler: dict[str, Any] | None = None,
    controller: dict[str, Any] | None = None,
    execution_horizon: int | list[int] | None = None,
    backend: str | list[str] = DEFAULT_BACKEND,
    weights: str | list[str] = DEFAULT_WEIGHTS,
    env: dict[str, Any] | None = None,
    on_env_error: Literal["count", "stop"] = "count",
    env_patience: float = ENV_PATIENCE,
    env_vector: bool = False,
    margin: float = 0.05,
    max_ms: float | None = None,
    mix: bool = False,
    threads: int = 1,
    videos: int | None = None,
    watch: bool = False,
    shard: str | int | None = None,
    merge: list[Path] | None = None,
    output_dir: Path | None = None,
    tracker: OpenRun,
) -> None:
    """Sweep ddim_steps, or any other setting, against success; the same command with the same output_dir resumes.

    Args:
        make_env: makes an environment from its settings.
        checkpoint: the folder that training wrote, or several; an inner list, as [[a0,a1],[b0,b1]], holds the training
            seeds of one recipe, which is one cell.
        ddim_steps: denoising steps; a list makes an axis.
        episodes: the most that a cell runs; all cells run the same episodes with the same initial noise.
        adaptive: compare the cells at several looks, and end those that are decided; otherwise, and with recipes or
            shards, all cells run all episodes, and are compared once.
        looks: how many, equally spaced; by default 6, or fewer where a look would add less than 20 episodes.
        seed: seed of the first episode; the others count up from it.
        num_envs: environments that run at once; no result depends on it.
        workers: number of processes; by default one per core.
        device: `cpu` or `cuda`.
        sampler: the other sampler settings, by default as in training; a list makes an axis.
        controller: behaviour while a plan is computed, see `ControllerSettings`; a list makes an axis.
        execution_horizon: actions executed before the next plan, by default as in training; a list makes an axis.
        backend: runs the sampling: `eager`, `fused`, `compile`, `onnx` or `cuda_graph`, or `auto`,
            the fastest of them that fits this machine and agrees with `eager`; a list makes an axis.
        weights: `float32`, or `int8` with `backend=onnx`; a list makes an axis.
        env: another environment, or changed settings of the checkpoint's.
        on_env_error: what to do with an episode that the simulator cannot end: `count` it as a failure with its
            reason, or `stop` the sweep.
        env_patience: seconds that one call of the simulator may take before it counts as hanging.
        env_vector: let one simulator step all environments in one call, on one core or on its GPU; no result depends
            on it.
        margin: the difference of success rates from which a cell counts as worse, in (0, 1).
        max_ms: milliseconds that the median plan of a cell may take; slower cells are left out before any episode.
        mix: whether episodes may be compared that were run with other versions, another simulator or on another
            processor than the rest; the report then says so.
        threads: threads of the plans whose latency is measured; episodes run on one for each worker.
        videos: episodes to record with each of the shown cells for the report; by default 2.
        watch: serve the report to a browser on this machine while the sweep runs, and keep it up to date.
        shard: K/N, as 3/16, runs the K-th of N shares of every cell's episodes, in a folder of its own, and compares
            nothing; `merge` does that when all shards have run.
        merge: folders of finished sweeps and shards; their results are merged, and no episode is run.
        output_dir: receives the files; by default a new folder under outputs/sweep.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
        WorkerError: more than 5 % of the episodes broke off, after all files are written.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin is a share of the episodes, above 0 and below 1; got {margin}")
    check_max_ms(max_ms)
    check_threads(threads)
    if merge:
        _merge(merge, mix=mix, margin=margin, output_dir=output_dir, tracker=tracker)
        return
    share = None if shard is None else Shard.parse(str(shard), episodes)
    if checkpoint is None:
        raise ValueError("checkpoint is missing: add checkpoint=... (--help shows an example)")
    recipes = recipes_of(checkpoint)
    checkpoints = [*chain(*recipes)]
    stage = set_stage(
        make_env,
        checkpoints,
        env=env,
        seed=seed,
        episodes=episodes,
        num_envs=num_envs,
        device=device,
        env_patience=env_patience,
        env_vector=env_vector,
    )
    cells = _cells_of(
        stage,
        recipes,
        ddim_steps=ddim_steps,
        sampler=sampler or {},
        controller=controller or {},
        execution_horizon=execution_horizon,
        backend=backend,
        weights=weights,
    )
    _check_counts(episodes, videos, workers, env_vector=env_vector)
    planned = _planned_looks(recipes, episodes, looks, adaptive=adaptive)
    folder = output_folder(output_dir, "sweep")
    groups = grouped_cells(with_backends(cells, folder / LEDGER), recipes)
    open_run = partial(tracker, folder=folder, config={"checkpoint": [str(c) for c in checkpoints], "env": stage.env})
    if share:
        run_shard(
            *(share, stage, groups, folder, open_run),
            num_envs=num_envs,
            workers=workers,
            on_env_error=on_env_error,
            mix=mix,
            threads=threads,
            margin=margin,
        )
        return
    shown = live_page(folder / REPORT, title_of(stage.env), {"environment": stage.env}) if watch else nullcontext()
    with shown as page:
        with Ledger(folder / LEDGER) as ledger:
            check_whole(ledger)
            run = open_run()
            groups = in_earlier_order(groups, ledger)
            asked = ids_of([*chain(*groups)])
            groups, latencies, left_out = fast_cells(groups, asked, max_ms, threads, ledger)
            cells = [*chain(*groups)]
            for cell in cells:
                ledger.introduce(cell.settings)
            wanted = partial(
                wanted_plan,
                groups,
                ledger,
                looks=planned,
                asked=asked,
                max_ms=max_ms,
                left_out=left_out,
                seed=seed,
                margin=margin,
            )
            refresh = partial(_refresh, page, groups, ledger, stage.seeds) if page else lambda: None
            plan, mixed = run_looks(
                *(stage, cells, wanted, ledger, num_envs, on_env_error),
                workers=workers,
                mix=mix,
                after_each=refresh,
            )
            results, unpaired = grouped(counted_results(plan, ledger), groups), ledger.unpaired
            made_with = ledger.made_with(plan.cells, plan.seeds)
        firsts = [group[0] for group in groups]
        rows = _rows(groups, results, latencies or latencies_of(firsts, threads), plan)
        swept = Swept(
            rows=rows,
            results=[[*chain(*found)] for found in results],
            env=stage.env,
            warnings=[*stage.warnings, *mixed, *filter(None, [unpaired])],
            paired=not unpaired,
            left_out=left_out,
            plan=plan,
            alpha=plan.alpha,
            made_with=made_with,
            members=[[str(cell.checkpoint.path) for cell in group] for group in groups],
        )
        count = min(VIDEOS, episodes) if videos is None else videos
        record = partial(_recorded, stage, firsts, rows, [found[0] for found in results], count, folder / "videos")
        publish(folder, conclude(swept, margin), run, record)
    check_broken([*chain(*swept.results)])


def _cells_of(
    stage: Stage, recipes: Sequence[Sequence[Path]], *, sampler: dict[str, Any], **axes: Any
) -> list[SweepCell]:
    """The cells that the settings ask for; say of those that they ask for in vain why there are none."""
    given = {"sampler.ddim_steps", *(f"sampler.{name}" for name in sampler)}
    for recipe in grouped(stage.checkpoints, recipes):
        check_same_recipe(recipe, given if axes["execution_horizon"] is None else {*given, "execution_horizon"})
    cells = make_cells(stage.checkpoints, stage.env, sampler=sampler, **axes)
    steps = axis_values("ddim_steps", axes["ddim_steps"])
    solvers = axis_values("sampler.solver", sampler.get("solver", Sampler.solver))
    etas = axis_values("sampler.eta", sampler.get("eta", Sampler.eta))
    for said in (*fixed_calls(stage.checkpoints), *repeats(steps, solvers, etas)):
        print(said)
    return cells


def _check_counts(episodes: int, videos: int | None, workers: int | None, *, env_vector: bool) -> None:
    """Reject numbers of videos and workers that cannot be."""
    if videos is not None and not 0 <= videos <= episodes:
        raise ValueError(f"videos must be within 0..{episodes} (the episodes); got {videos}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more; got {workers}")
    if workers is not None and env_vector:
        raise ValueError(f"workers={workers} are processes, and env_vector=true runs in one: leave one of them out")


def _merge(folders: list[Path], *, mix: bool, margin: float, output_dir: Path | None, tracker: OpenRun) -> None:
    """Compare the cells of sweeps that have run."""
    merged = read_swept(folders, mix=mix)
    for given in merged.warnings:
        warnings.warn(given, stacklevel=3)
    folder = output_folder(output_dir, "sweep")
    if folder.resolve() in [path.resolve() for path in folders]:
        raise ValueError(f"output_dir={folder} is one of the sweeps to merge, and would be lost: choose another")
    run = tracker(folder=folder, config={"merge": [str(path) for path in folders]})
    publish(folder, conclude(merged.at(margin), margin), run, lambda chosen: [])


def _planned_looks(
    recipes: Sequence[Sequence[Path]], episodes: int, looks: int | None, *, adaptive: bool
) -> tuple[int, ...]:
    """The looks that the settings ask for; recipes are compared once."""
    planned = planned_looks(episodes, looks, adaptive=adaptive)
    if len(planned) > 1 and max(map(len, recipes)) > 1:
        print(f"recipes run as a fixed grid: their cells are compared once, after all {episodes} episodes")
        return planned[-1:]
    return planned


def _rows(
    groups: Sequence[Sequence[SweepCell]],
    results: Sequence[Sequence[Sequence[EpisodeResult]]],
    latencies: Sequence[Row],
    plan: LookPlan,
) -> list[Row]:
    """The row of each cell or recipe; in an adaptive sweep it says after how many episodes the cell stopped."""
    return [
        {**recipe_row(group, found, latency), **({"stopped": len(found[0])} if plan.adaptive else {})}
        for group, found, latency in zip(groups, results, latencies, strict=True)
    ]


def _refresh(page: LivePage, groups: Sequence[Sequence[SweepCell]], ledger: Ledger, seeds: range) -> None:
    """Show the episodes that the ledger holds."""
    page.refresh(
        groups,
        lambda: [[ledger.present(cell, seeds) for cell in ids_of(group)] for group in groups],
        sum(map(len, groups)) * len(seeds),
    )


def publish(
    folder: Path, conclusion: Conclusion, run: TrackedRun, record: Callable[[Sequence[int]], list[Clip]]
) -> None:
    """Write, print and track a conclusion.

    Args:
        folder: receives the files.
        conclusion: the conclusion of the sweep.
        run: the tracked run; receives the table, its plot and the videos.
        record: records episodes of the cells with the given indices; called after the tables are written.
    """
    swept, rows, advice = conclusion.swept, conclusion.rows, conclusion.advice
    files = write_files(folder, rows, swept.episodes, conclusion.summary)
    print(format_table(rows))
    if together := shared(rows):
        print(f"every cell: {together}")
    between = [*(one["sentence"] for one in conclusion.between), conclusion.scope] if conclusion.between else []
    print("\n".join(filter(None, [conclusion.answer, conclusion.what_to_try, *between])))
    for warning in conclusion.found:  # the others were given before the run
        print(f"warning: {warning}")
    clips = record(conclusion.shown)
    pictures, report = [folder / "sweep.png", folder / "sweep.svg"], folder / REPORT
    try:
        plot_rows(
            rows,
            pictures,
            title=title_of(swept.env),
            paired=swept.paired,
            margin=conclusion.margin,
            chosen=advice.cell,
        )
        write_report(
            report,
            rows,
            title=title_of(swept.env),
            answer=conclusion.answer,
            facts=conclusion.facts,
            comparisons=[*(compared["sentence"] for compared in conclusion.between), conclusion.scope],
            warnings=conclusion.warnings,
            chosen=advice.cell,
            differences=conclusion.differences,
            margin=conclusion.margin,
            clips=clips,
            without_clips="No episodes were recorded: nothing can be drawn here, videos=0, or sweeps were merged.",
            settings=conclusion.settings,
            paired=swept.paired,
        )
    except Exception as error:  # whatever a drawing library stumbles over, the tables are there
        tables = ", ".join(map(str, files))
        raise SaveError(
            f"no pictures and no report ({reason_of(error)}): the tables are whole ({tables}), and the same"
            " command draws again"
        ) from error
    finally:
        run.log_table("sweep", rows, pictures[0] if pictures[0].exists() else None, [clip.file for clip in clips])
        run.finish()
    print(f"files: {', '.join(str(file) for file in (*files, *pictures, report))}")


def _recorded(
    stage: Stage,
    cells: Sequence[SweepCell],
    rows: Sequence[Row],
    results: Sequence[Sequence[EpisodeResult]],
    count: int,
    folder: Path,
    chosen: Sequence[int],
) -> list[Clip]:
    """Repeat the most telling episodes of the chosen cells and record them."""
    seeds = telling_seeds([results[number] for number in chosen], count)
    if not seeds:
        return []
    policies, shown = [c.policy for c in stage.checkpoints], [cells[number].cell for number in chosen]
    controllers = controllers_of(policies, shown, stage.action_space)
    takes = [
        (number, controller, seed) for seed in seeds for number, controller in zip(chosen, controllers, strict=True)
    ]
    folder.mkdir(exist_ok=True)

    def file_of(take: int, result: EpisodeResult) -> Path:
        return folder / f"{rows[takes[take][0]]['cell']}_{result.seed}.mp4"

    clips = []
    videos = filmed(stage, [(controller, seed) for _, controller, seed in takes], file_of)
    for (result, file), (number, *_) in zip(videos, takes, strict=False):  # the rest could not be drawn
        outcome = "success" if result.success else f"failure, score {result.score:.2f}"
        caption = f"{label_of(rows, rows[number])}: {outcome} after {result.steps} steps"
        clips.append(Clip(seed=result.seed, caption=caption, file=file))
    return clips
