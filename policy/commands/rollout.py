"""A whole rollout of a trained policy: success with its interval, latency, videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gymnasium.spaces import Box

from policy.checkpoint import Checkpoint, choose_env, load_checkpoint
from policy.common.device import check_device
from policy.common.output import episode_seeds, output_folder, write_episodes
from policy.common.progress import progress
from policy.control.real_time import Pace, RealTimeController, format_timing, summarize_timing
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.inference import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.episodes import (
    Cell,
    Env,
    EpisodeResult,
    check_num_envs,
    check_spaces,
    chunk_latency,
    controllers_of,
    format_summary,
    play_episode,
    program_of,
    summarize,
    torch_threads,
)
from policy.rollout.video import record_videos
from policy.rollout.workers import RolloutPool
from policy.tracking.wandb_tracker import StartRun


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Checkpoints in their environment, everything checked before any work.

    Attributes:
        checkpoints: loaded.
        env: settings of the environment.
        make_env: makes it.
        seeds: of the episodes.
        action_space: of the environment.
    """

    checkpoints: list[Checkpoint]
    env: dict[str, Any]
    make_env: Callable[..., Env]
    seeds: range
    action_space: Box


def prepare(
    make_env: Callable[..., Env],
    checkpoints: Sequence[Path],
    env: dict[str, Any] | None,
    seed: int,
    episodes: int,
    num_envs: int,
    device: str,
) -> Setting:
    """Load checkpoints and check them against each other and their environment, before any work.

    Args:
        make_env: makes an environment from its settings.
        checkpoints: folders that training wrote.
        env: another environment than the checkpoints', or some settings of it.
        seed: of the first episode.
        episodes: how many.
        num_envs: environments at once.
        device: `cpu` or `cuda`.

    Returns:
        Everything ready to run.

    Raises:
        ValueError: what does not fit.
    """
    check_num_envs(num_envs)
    seeds = episode_seeds(seed, episodes)
    loaded = [load_checkpoint(folder, check_device(device)) for folder in checkpoints]
    chosen = [choose_env(checkpoint, env) for checkpoint in loaded]
    if other := next((number for number, settings in enumerate(chosen) if settings != chosen[0]), None):
        raise ValueError(
            f"{loaded[0].path} acts in {chosen[0]}, {loaded[other].path} in {chosen[other]}: a sweep compares"
            " policies in one environment"
        )
    with closing(make_env(**chosen[0])) as probe:
        for checkpoint in loaded:
            check_spaces(checkpoint.policy.config, probe)
        action_space = probe.action_space
    assert isinstance(action_space, Box)
    return Setting(
        checkpoints=loaded,
        env=chosen[0],
        make_env=partial(make_env, **chosen[0]),
        seeds=seeds,
        action_space=action_space,
    )


def roll_out(
    make_env: Callable[..., Env],
    *,
    checkpoint: Path,
    episodes: int = 50,
    seed: int = 100_000,
    num_envs: int = 32,
    device: str = "cpu",
    sampler: Sampler,
    backend: str = "fused",
    weights: str = "float32",
    execution_horizon: int | None = None,
    controller: ControllerSettings,
    control_rate: float | None = None,
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
        backend: what samples: `eager`, `fused`, `compile`, `onnx` or `cuda_graph`.
        weights: `float32`, or `int8` with `backend=onnx`.
        execution_horizon: actions executed before the next plan; by default as in training.
        controller: what happens while a plan is made.
        control_rate: control steps a second against the clock, in one environment; by default as fast as possible.
        env: another environment than the checkpoint's, or some settings of it.
        video: how many of the first episodes to record as mp4.
        output_dir: receives `episodes.json` and the videos; by default a new folder under outputs/rollout.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
    """
    setting = prepare(make_env, [checkpoint], env, seed, episodes, num_envs, device)
    loaded = setting.checkpoints[0]
    policy = loaded.policy
    sampler.check(policy.schedule.num_steps)
    horizon = loaded.execution_horizon if execution_horizon is None else execution_horizon
    controller.check(horizon, policy.config.action_horizon)
    cell = Cell(sampler=sampler, execution_horizon=horizon, controller=controller, backend=backend, weights=weights)
    program = program_of(policy, cell)  # refused here, before any work
    if not 0 <= video <= episodes:
        raise ValueError(f"video must be within 0..{episodes} (the episodes); got {video}")
    driver = None if control_rate is None else _real_time_controller(policy, cell, program, control_rate, setting)
    folder = output_folder(output_dir, "rollout")
    tracking = tracker(folder=folder, config={"checkpoint": str(checkpoint), "env": setting.env})

    if driver is None:
        results = _as_fast_as_possible(policy, cell, setting, num_envs)
    else:
        results = _against_the_clock(driver, setting, folder)
    summary = {
        **asdict(sampler),
        **asdict(controller),
        **summarize(results),
        **chunk_latency(program, controller.candidates),
    }
    tracking.log_table("rollout", [summary])
    tracking.finish()
    print(format_summary(summary))
    print(
        f"one plan: {summary['latency_ms_median']:.1f} ms with {sampler.ddim_steps} ddim_steps"
        f" (median, batch {controller.candidates}, one thread)"
    )
    print(f"episodes: {write_episodes(results, folder)}")
    if video:
        (simulated,) = controllers_of([policy], [cell], setting.action_space)
        _record(simulated, setting.make_env, setting.seeds[:video], folder)
    print(f"next: python scripts/sweep.py checkpoint={checkpoint}")


def _as_fast_as_possible(policy: DiffusionPolicy, cell: Cell, setting: Setting, num_envs: int) -> list[EpisodeResult]:
    """All episodes, in simulated time, in the order of their seeds."""
    tasks, by_seed = [(0, seed) for seed in setting.seeds], {}
    with (
        RolloutPool([policy], setting.make_env, min(num_envs, len(tasks))) as pool,
        progress(total=len(tasks), desc="rollout", unit="episode") as bar,
    ):
        for (_, seed), result in pool.run([cell], tasks):
            by_seed[seed] = result
            bar.update()
    return [by_seed[seed] for seed in setting.seeds]


def _real_time_controller(
    policy: DiffusionPolicy, cell: Cell, program: SamplerProgram, control_rate: float, setting: Setting
) -> RealTimeController:
    with torch_threads(1):
        return RealTimeController(
            policy,
            control_rate=control_rate,
            sampler=cell.sampler,
            execution_horizon=cell.execution_horizon,
            settings=cell.controller,
            program=program,
            action_space=setting.action_space,
        )


def _against_the_clock(controller: RealTimeController, setting: Setting, folder: Path) -> list[EpisodeResult]:
    """All episodes, one after the other at the control rate; says how the deadlines were kept."""
    results, timings, overruns, control_rate = [], [], 0, controller.control_rate
    with (
        controller,
        torch_threads(1),
        closing(setting.make_env()) as simulator,
        progress(total=len(setting.seeds), desc=f"rollout at {control_rate:g} Hz", unit="episode") as bar,
    ):
        for seed in setting.seeds:
            pace = Pace(control_rate)
            results.append(play_episode(controller, simulator, seed, pace))
            timings.append(controller.timing)
            overruns += max(0, pace.overruns - 1)  # the first is the reset
            bar.update()
    summary = summarize_timing(timings, control_rate, overruns)
    file = folder / "real_time.json"
    file.write_text(json.dumps(summary, indent=1))
    print(format_timing(summary))
    print(f"timing: {file}")
    return results


def _record(
    controller: RecedingHorizonController, make_env: Callable[..., Env], seeds: Sequence[int], folder: Path
) -> None:
    """Replay episodes with pictures; where nothing can be drawn, say so in one line."""

    def file_of(number: int, result: EpisodeResult) -> Path:
        return folder / f"episode_{result.seed}_{'success' if result.success else 'failure'}.mp4"

    try:
        for _, file in record_videos(make_env, [(controller, seed) for seed in seeds], file_of):
            print(f"video: {file}")
    except RuntimeError as error:
        print(f"no video: {error}")
