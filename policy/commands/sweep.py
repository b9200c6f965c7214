"""A whole sweep: cells run on the same episodes, compared, and summed up in the sentence a user came for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.commands.rollout import Setting, prepare
from policy.common.output import output_folder
from policy.common.progress import progress
from policy.rollout.episodes import Env, EpisodeResult, controllers_of
from policy.rollout.ledger import Ledger
from policy.rollout.video import record_videos
from policy.rollout.workers import RolloutPool
from policy.statistics import Recommendation, compare_success, recommend
from policy.sweep.grid import Row, SweepCell, axis_values, make_cells, row_of, varying
from policy.sweep.report import Clip, write_report
from policy.sweep.table import format_table, plot_rows, write_files
from policy.tracking.wandb_tracker import Run, StartRun

LEDGER = "episodes.jsonl"
VIDEOS = 2


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """Cells and their results, whether run here or merged."""

    rows: list[Row]
    results: list[list[EpisodeResult]]
    env: dict[str, Any]


def sweep(
    make_env: Callable[..., Env],
    *,
    checkpoint: Path | list[Path] | None = None,
    ddim_steps: int | list[int] = [1, 2, 4, 8, 16, 50],  # noqa: B006  (never changed)
    episodes: int = 50,
    seed: int = 100_000,
    num_envs: int = 32,
    workers: int | None = None,
    device: str = "cpu",
    sampler: dict[str, Any] | None = None,
    controller: dict[str, Any] | None = None,
    execution_horizon: int | list[int] | None = None,
    backend: str | list[str] = "fused",
    weights: str | list[str] = "float32",
    env: dict[str, Any] | None = None,
    margin: float = 0.05,
    videos: int | None = None,
    merge: list[Path] | None = None,
    output_dir: Path | None = None,
    tracker: StartRun,
) -> None:
    """Sweep ddim_steps, and any other setting, against success; the same command with the same output_dir goes on.

    Args:
        make_env: makes an environment from its settings.
        checkpoint: the folder that training wrote, or several.
        ddim_steps: denoising steps; a list makes an axis.
        episodes: in each cell; all cells run the same episodes with the same initial noise.
        seed: of the first episode; the others count up from it.
        num_envs: environments at once; no result depends on it.
        workers: processes; by default one a core.
        device: `cpu` or `cuda`.
        sampler: the other sampler settings; a list makes an axis.
        controller: what happens while a plan is made, see `ControllerSettings`; a list makes an axis.
        execution_horizon: actions executed before the next plan, by default as in training; a list makes an axis.
        backend: what samples: `eager`, `fused`, `compile`, `onnx` or `cuda_graph`; a list makes an axis.
        weights: `float32`, or `int8` with `backend=onnx`; a list makes an axis.
        env: another environment than the checkpoint's, or some settings of it.
        margin: a loss of success, as a share, that is small enough not to matter in the recommendation.
        videos: episodes to record side by side for the report; by default 2.
        merge: folders of sweeps of single cells; their results are put together instead of running any.
        output_dir: receives the files; by default a new folder under outputs/sweep.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin is a share of the episodes, above 0 and below 1; got {margin}")
    if merge:
        if checkpoint is not None:
            raise ValueError("merge= puts sweeps together that have run: leave checkpoint= out")
        swept = _merged(merge)
        folder = output_folder(output_dir, "sweep")
        run = tracker(folder=folder, config={"merge": [str(path) for path in merge]})
        _conclude(folder, swept, margin, run, lambda chosen: [])
        return
    if checkpoint is None:
        raise ValueError("checkpoint is missing: add checkpoint=... (--help shows an example)")
    checkpoints = axis_values("checkpoint", checkpoint)
    setting = prepare(make_env, checkpoints, env, seed, episodes, num_envs, device)
    cells = make_cells(
        setting.checkpoints,
        setting.env,
        ddim_steps=ddim_steps,
        sampler=sampler or {},
        controller=controller or {},
        execution_horizon=execution_horizon,
        backend=backend,
        weights=weights,
    )
    if videos is not None and not 0 <= videos <= episodes:
        raise ValueError(f"videos must be within 0..{episodes} (the episodes); got {videos}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more; got {workers}")
    folder = output_folder(output_dir, "sweep")
    with Ledger(folder / LEDGER) as ledger:
        tracking = tracker(folder=folder, config={"checkpoint": [str(c) for c in checkpoints], "env": setting.env})
        ids = [ledger.introduce(cell.settings) for cell in cells]
        _run_missing(setting, cells, ids, ledger, num_envs, workers)
        results = [ledger.results(cell, setting.seeds) for cell in ids]
    ran = zip(ids, cells, results, strict=True)
    timed = progress(ran, total=len(cells), desc="latency", unit="cell")  # some backends compile for seconds
    rows = [{"cell": name, **row_of(cell, found)} for name, cell, found in timed]
    swept = _Swept(rows=rows, results=results, env=setting.env)

    def record(chosen: Sequence[int]) -> list[Clip]:
        count = min(VIDEOS, episodes) if videos is None else videos
        seeds = _telling_seeds([results[number] for number in chosen], count)
        return _recorded(setting, cells, rows, chosen, seeds, folder / "videos") if seeds else []

    _conclude(folder, swept, margin, tracking, record)


def _run_missing(
    setting: Setting,
    cells: Sequence[SweepCell],
    ids: Sequence[str],
    ledger: Ledger,
    num_envs: int,
    workers: int | None,
) -> None:
    """Run the episodes that the ledger does not hold, and write each down as it ends."""
    tasks = [(number, seed) for number, cell in enumerate(ids) for seed in ledger.missing(cell, setting.seeds)]
    total = len(cells) * len(setting.seeds)
    if len(tasks) < total:
        print(f"{total - len(tasks)} of {total} episodes are on disk already")
    if not tasks:
        return
    policies = [checkpoint.policy for checkpoint in setting.checkpoints]
    with (
        RolloutPool(policies, setting.make_env, min(num_envs, len(tasks)), workers=workers) as pool,
        progress(total=total, initial=total - len(tasks), desc="sweep", unit="episode") as bar,
    ):
        outcomes: dict[int, list[bool]] = {number: [] for number in range(len(cells))}
        for (number, _), result in pool.run([cell.cell for cell in cells], tasks):
            ledger.add(ids[number], result)
            outcomes[number].append(result.success)
            success = sum(outcomes[number]) / len(outcomes[number])
            bar.set_postfix(cell=f"{number + 1}/{len(cells)}", success=f"{success:.0%}", refresh=False)
            bar.update()


def _merged(folders: Sequence[Path]) -> _Swept:
    """The cells of several sweeps, side by side.

    Raises:
        ValueError: a folder without a finished sweep, other environments or episodes, or one cell twice.
    """
    rows: list[Row] = []
    results: list[list[EpisodeResult]] = []
    first: dict[str, Any] = {}
    for folder in folders:
        try:
            document = json.loads((folder / "sweep.json").read_text())
            found = {row["cell"]: row for row in document["cells"]}
            episodes = {
                cell: [EpisodeResult.from_row(row) for row in document["episodes"] if row["cell"] == cell]
                for cell in found
            }
            seen = {
                "env": document["env"],
                "seeds": sorted({result.seed for listed in episodes.values() for result in listed}),
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no finished sweep ({error!r}): run it to its end first") from error
        first = first or seen
        if differs := [name for name in seen if seen[name] != first[name]]:
            raise ValueError(f"{folder} has other {differs[0]} than {folders[0]}: only equal ones can be compared")
        if repeated := found.keys() & {row["cell"] for row in rows}:
            raise ValueError(f"{folder} repeats the cell {min(repeated)}: leave it or the other out")
        rows += found.values()
        results += episodes.values()
    if not rows or any([result.seed for result in listed] != first["seeds"] for listed in results):
        raise ValueError(f"the cells of {', '.join(map(str, folders))} have not all run the same episodes")
    return _Swept(rows=rows, results=results, env=first["env"])


def _conclude(
    folder: Path, swept: _Swept, margin: float, tracking: Run, record: Callable[[Sequence[int]], list[Clip]]
) -> None:
    """Compare the cells and write everything that people and programs look at."""
    rows, success = swept.rows, [[result.success for result in found] for found in swept.results]
    cost = [(row["ddim_steps"], row["latency_ms_median"]) for row in rows]
    advice = recommend(success, cost, margin=margin)
    answer = answer_of(rows, advice)
    compared = compare_success(success, advice.best)
    differences = [
        {"difference": c.difference, "difference_low": c.low, "difference_high": c.high, "p_value": c.adjusted_p_value}
        for c in compared
    ]
    rows = [
        {**row, **to_best, "not_worse": verdict.verdict}
        for row, to_best, verdict in zip(rows, differences, advice.cells, strict=True)
    ]
    title = " ".join(str(value) for value in swept.env.values())
    pictures = [folder / "sweep.png", folder / "sweep.svg"]
    plot_rows(rows, pictures, title=title)
    cells = [{"cell": row["cell"]} for row in rows]
    episode_rows = [
        {**cell, **result.row()} for cell, found in zip(cells, swept.results, strict=True) for result in found
    ]
    files = write_files(folder, rows, episode_rows, {"env": swept.env, "margin": margin, "answer": answer})
    print(format_table(rows))
    print(answer)
    clips = record(_shown(rows, advice))
    report = folder / "report.html"
    write_report(
        report,
        rows,
        title=title,
        answer=answer,
        chosen=advice.cell,
        differences=["best" if n == advice.best else _difference(row) for n, row in enumerate(rows)],
        clips=clips,
        without_clips="No episodes were recorded: nothing can be drawn here, or videos=0.",
        settings={
            "environment": swept.env,
            "checkpoints": _checkpoints(rows),
            "seeds": _seeds(swept),
            "margin": margin,
        },
    )
    tracking.log_table("sweep", rows, pictures[0], [clip.file for clip in clips])
    tracking.finish()
    print(f"files: {', '.join(str(file) for file in (*files, *pictures, report))}")


def answer_of(rows: Sequence[Row], advice: Recommendation) -> str:
    """The sentence a user came for: how few steps suffice, and what they cost."""
    if advice.cell is None:
        return f"No recommendation yet: {advice.sentence}."
    row = rows[advice.cell]
    return (
        f"{label_of(rows, row)}: {advice.sentence}. Success {row['success_rate']:.0%}"
        f" ({row['success_low']:.0%} to {row['success_high']:.0%}), {row['latency_ms_median']:.1f} ms a chunk: planning"
        f" keeps pace up to {row['control_rate_hz']:.0f} Hz."
    )


def label_of(rows: Sequence[Row], row: Row) -> str:
    """What tells a row from the others, in words."""
    return ", ".join(f"{axis} {row[axis]}" for axis in ("ddim_steps", *varying(rows)))


def _difference(row: Row) -> str:
    points = [100 * row[key] for key in ("difference", "difference_low", "difference_high")]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


def _checkpoints(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["checkpoint"] for row in rows))


def _seeds(swept: _Swept) -> str:
    seeds = [result.seed for result in swept.results[0]]
    return f"{min(seeds)} to {max(seeds)}"


def _shown(rows: Sequence[Row], advice: Recommendation) -> list[int]:
    """The cells worth watching side by side: the cheapest, the recommended one and the best."""
    cheapest = min(range(len(rows)), key=lambda number: (rows[number]["ddim_steps"], number))
    chosen = advice.best if advice.cell is None else advice.cell
    return sorted({cheapest, chosen, advice.best}, key=lambda number: (rows[number]["ddim_steps"], number))


def _telling_seeds(results: Sequence[Sequence[EpisodeResult]], count: int) -> list[int]:
    """Episodes in which cells differ come first, then those that all solved, then the rest; failures are not hidden."""
    by_seed = [[found[n].success for found in results] for n in range(len(results[0]))]
    split = [n for n, solved in enumerate(by_seed) if any(solved) and not all(solved)]
    solved_by_all = [n for n, solved in enumerate(by_seed) if all(solved)]
    failed_by_all = [n for n, solved in enumerate(by_seed) if not any(solved)]
    kinds = [kind for kind in (split, solved_by_all, failed_by_all) if kind]
    turns = [kind[turn] for turn in range(max(map(len, kinds))) for kind in kinds if turn < len(kind)]
    return [results[0][n].seed for n in turns[:count]]


def _recorded(
    setting: Setting,
    cells: Sequence[SweepCell],
    rows: Sequence[Row],
    chosen: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
) -> list[Clip]:
    """Run episodes again with pictures; where nothing can be drawn, say so in one line."""
    policies, shown = [c.policy for c in setting.checkpoints], [cells[number].cell for number in chosen]
    controllers = controllers_of(policies, shown, setting.action_space)
    takes = [
        (number, controller, seed) for seed in seeds for number, controller in zip(chosen, controllers, strict=True)
    ]
    folder.mkdir(exist_ok=True)

    def file_of(take: int, result: EpisodeResult) -> Path:
        return folder / f"{rows[takes[take][0]]['cell']}_{result.seed}.mp4"

    clips = []
    try:
        videos = record_videos(setting.make_env, [(controller, seed) for _, controller, seed in takes], file_of)
        for (number, *_), (result, file) in zip(takes, videos, strict=True):
            outcome = "success" if result.success else f"failure, score {result.score:.2f}"
            caption = f"{label_of(rows, rows[number])}: {outcome} after {result.steps} steps"
            clips.append(Clip(seed=result.seed, caption=caption, file=file))
    except (RuntimeError, ValueError) as error:  # an environment need not know how to draw
        print(f"no video: {error}")
    return clips
