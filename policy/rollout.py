"""Whole runs with a trained policy: a rollout with videos, and a sweep with its picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from policy.checkpoint import Checkpoint, choose_env, load_checkpoint
from policy.controller import RecedingHorizonController, check_execution_horizon
from policy.device import check_device
from policy.evaluation import (
    PLAN_BATCH,
    Env,
    EpisodeResult,
    check_num_envs,
    check_spaces,
    chunk_latency,
    format_summary,
    record_episode,
    summarize,
)
from policy.output import episode_seeds, output_folder, write_episodes
from policy.progress import progress
from policy.sampler import Sampler
from policy.sweep import check_cells, format_table, plot_rows, run_sweep, write_rows
from policy.tracking import StartRun
from policy.video import write_video
from policy.workers import RolloutPool


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A checkpoint in its environment, everything checked before any work."""

    checkpoint: Checkpoint
    env: dict[str, Any]
    make_env: Callable[..., Env]
    seeds: range
    execution_horizon: int


def _prepare(
    make_env: Callable[..., Env],
    checkpoint: Path,
    env: dict[str, Any] | None,
    seed: int,
    episodes: int,
    num_envs: int,
    execution_horizon: int | None,
    device: str,
) -> _Setting:
    check_num_envs(num_envs)
    seeds = episode_seeds(seed, episodes)
    loaded = load_checkpoint(checkpoint, check_device(device))
    horizon = loaded.execution_horizon if execution_horizon is None else execution_horizon
    check_execution_horizon(horizon, loaded.policy.config.action_horizon)
    chosen = choose_env(loaded, env)
    with closing(make_env(**chosen)) as probe:
        check_spaces(loaded.policy.config, probe)
    return _Setting(
        checkpoint=loaded,
        env=chosen,
        make_env=partial(make_env, **chosen),
        seeds=seeds,
        execution_horizon=horizon,
    )


def roll_out(
    make_env: Callable[..., Env],
    *,
    checkpoint: Path,
    episodes: int = 50,
    seed: int = 100_000,
    num_envs: int = 16,
    device: str = "cpu",
    sampler: Sampler,
    execution_horizon: int | None = None,
    env: dict[str, Any] | None = None,
    video: int = 0,
    output_dir: Path | None = None,
    tracker: StartRun,
) -> None:
    """Roll a checkpoint out: success with its interval, score, return, latency, and videos of the first episodes.

    Args:
        make_env: makes an environment from its settings.
        checkpoint: the folder that training wrote.
        episodes: how many.
        seed: of the first episode; the others count up from it.
        num_envs: environments at once; no result depends on it.
        device: `cpu` or `cuda`.
        sampler: how chunks are sampled.
        execution_horizon: actions executed before the next plan; by default as in training.
        env: another environment than the checkpoint's, or some settings of it.
        video: how many of the first episodes to record as mp4.
        output_dir: receives `episodes.json` and the videos; by default a new folder under outputs/rollout.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
    """
    setting = _prepare(make_env, checkpoint, env, seed, episodes, num_envs, execution_horizon, device)
    policy = setting.checkpoint.policy
    sampler.check(policy.schedule.num_steps)
    if not 0 <= video <= episodes:
        raise ValueError(f"video must be within 0..{episodes} (the episodes); got {video}")
    folder = output_folder(output_dir, "rollout")
    tracking = tracker(folder=folder, config={"checkpoint": str(checkpoint), "env": setting.env})

    with (
        RolloutPool(policy, setting.make_env, min(num_envs, episodes)) as pool,
        progress(total=episodes, desc="rollout", unit="episode") as bar,
    ):
        results = pool.run(
            setting.seeds,
            sampler=sampler,
            execution_horizon=setting.execution_horizon,
            on_episode=lambda result: bar.update(),
        )
    summary = {**asdict(sampler), **summarize(results), **chunk_latency(policy, sampler)}
    tracking.log_table("rollout", [summary])
    tracking.finish()
    print(format_summary(summary))
    print(
        f"one chunk: {summary['latency_ms_median']:.1f} ms with {sampler.ddim_steps} ddim_steps"
        " (median, batch 1, one thread)"
    )
    print(f"episodes: {write_episodes(results, folder)}")
    if video:
        controller = RecedingHorizonController(
            policy=policy, sampler=sampler, execution_horizon=setting.execution_horizon, plan_batch=PLAN_BATCH
        )
        _record(controller, setting.make_env, setting.seeds[:video], folder)
    print(f"next: python scripts/sweep.py checkpoint={checkpoint}")


def _record(
    controller: RecedingHorizonController, make_env: Callable[..., Env], seeds: Sequence[int], folder: Path
) -> None:
    """Replay episodes with pictures; where nothing can be drawn, say so in one line."""
    try:
        with (
            closing(make_env(render_mode="rgb_array")) as env,
            progress(total=len(seeds), desc="video", unit="episode") as bar,
        ):
            for seed in seeds:
                result, frames = record_episode(controller, env, seed)
                file = folder / f"episode_{seed}_{'success' if result.success else 'failure'}.mp4"
                write_video(file, frames, fps=round(env.metadata["render_fps"]))
                bar.update()
                print(f"video: {file}")
    except RuntimeError as error:
        print(f"no video: {error}")


def sweep(
    make_env: Callable[..., Env],
    *,
    checkpoint: Path,
    ddim_steps: list[int] = [1, 2, 4, 8, 16, 50],  # noqa: B006  (never changed)
    episodes: int = 50,
    seed: int = 100_000,
    num_envs: int = 16,
    device: str = "cpu",
    sampler: Sampler,
    execution_horizon: int | None = None,
    env: dict[str, Any] | None = None,
    output_dir: Path | None = None,
    tracker: StartRun,
) -> None:
    """Sweep ddim_steps against success: a table, sweep.csv, sweep.json and sweep.png.

    Args:
        make_env: makes an environment from its settings.
        checkpoint: the folder that training wrote.
        ddim_steps: the cells.
        episodes: in each cell; all cells run the same episodes with the same initial noise.
        seed: of the first episode; the others count up from it.
        num_envs: environments at once; no result depends on it.
        device: `cpu` or `cuda`.
        sampler: the other sampler settings.
        execution_horizon: actions executed before the next plan; by default as in training.
        env: another environment than the checkpoint's, or some settings of it.
        output_dir: receives the files; by default a new folder under outputs/sweep.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
    """
    setting = _prepare(make_env, checkpoint, env, seed, episodes, num_envs, execution_horizon, device)
    policy = setting.checkpoint.policy
    check_cells(ddim_steps, policy.schedule.num_steps)
    if sampler.ddim_steps not in (Sampler().ddim_steps, *ddim_steps):
        raise ValueError(
            f"a sweep takes its steps from ddim_steps=[...]: sampler.ddim_steps={sampler.ddim_steps} is not one"
        )
    folder = output_folder(output_dir, "sweep")
    tracking = tracker(folder=folder, config={"checkpoint": str(checkpoint), "env": setting.env})

    def show(steps: int, result: EpisodeResult) -> None:
        bar.set_postfix(ddim_steps=steps, refresh=False)
        bar.update()

    with (
        RolloutPool(policy, setting.make_env, min(num_envs, episodes)) as pool,
        progress(total=episodes * len(ddim_steps), desc="sweep", unit="episode") as bar,
    ):
        rows = []
        for row in run_sweep(
            policy,
            pool,
            ddim_steps=ddim_steps,
            seeds=setting.seeds,
            sampler=sampler,
            execution_horizon=setting.execution_horizon,
            on_episode=show,
        ):
            rows.append(row)
            write_rows(rows, folder)  # an interrupted sweep keeps its finished cells
    picture = folder / "sweep.png"
    plot_rows(rows, picture, title=" ".join(str(value) for value in setting.env.values()))
    tracking.log_table("sweep", rows, picture)
    tracking.finish()
    print(format_table(rows))
    print(f"files: {folder / 'sweep.csv'}, {folder / 'sweep.json'}, {picture}")
