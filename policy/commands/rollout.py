"""`ddim-rollout`: measure the success and the latency of a trained policy, and record videos."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from policy.commands.dataset import record_settings, recorded_as
from policy.commands.stage import (
    EPISODES,
    FIRST_SEED,
    NUM_ENVS,
    OnEnvError,
    Stage,
    check_broken,
    filmed,
    run_missing,
    set_stage,
    settle_provenance,
    stop_if_broken,
)
from policy.common.device import torch_threads
from policy.common.files import json_text, write_text
from policy.common.next_line import next_line
from policy.common.output import output_folder
from policy.common.progress import progress, say
from policy.control.real_time import Pace, RealTimeController, format_timing, summarize_timing
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler, steps_to_compare
from policy.inference.backends import DEFAULT_BACKEND, DEFAULT_WEIGHTS, SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import Cell, controllers_of, program_of
from policy.rollout.episodes import EPISODES_FILE, MakeEnv, play_episode, write_episodes
from policy.rollout.latency import measure_latency, timed_controller
from policy.rollout.ledger import Ledger, cell_id
from policy.rollout.watch import ENV_PATIENCE, watched
from policy.statistics.results import EpisodeResult, describe_broken, format_summary, summarize
from policy.sweep.grid import SweepCell, make_cells, with_backends
from policy.tracking.tracker import OpenRun

LEDGER, SUMMARY = "rollout.jsonl", "rollout.json"
# The largest number of denoising steps that a sweep visits by default.
MOST_STEPS_OF_A_SWEEP = 50


def roll_out(
    make_env: MakeEnv,
    *,
    checkpoint: Path,
    episodes: int = EPISODES,
    seed: int = FIRST_SEED,
    num_envs: int = NUM_ENVS,
    device: str = "cpu",
    sampler: partial[Sampler],
    backend: str = DEFAULT_BACKEND,
    weights: str = DEFAULT_WEIGHTS,
    execution_horizon: int | None = None,
    controller: ControllerSettings,
    control_rate: float | None = None,
    env: dict[str, Any] | None = None,
    on_env_error: Literal["count", "stop"] = "count",
    env_patience: float = ENV_PATIENCE,
    env_vector: bool = False,
    mix: bool = False,
    video: int = 0,
    record: Path | None = None,
    record_successes: bool = False,
    output_dir: Path | None = None,
    tracker: OpenRun,
) -> None:
    """Roll out a checkpoint: success, score, latency and videos; the same command with the same output_dir resumes.

    Args:
        make_env: makes an environment from its settings.
        checkpoint: the folder that training wrote.
        episodes: number of episodes.
        seed: seed of the first episode; the others count up from it.
        num_envs: environments that run at once; no result depends on it.
        device: `cpu` or `cuda`.
        sampler: sampling settings; those that are left open are as in training.
        backend: runs the sampling: `eager`, `fused`, `compile`, `onnx` or `cuda_graph`, or `auto`,
            the fastest of them that fits this machine and agrees with `eager`.
        weights: `float32`, or `int8` with `backend=onnx`.
        execution_horizon: actions executed before the next plan; by default as in training.
        controller: behaviour while a plan is computed, see `ControllerSettings`.
        control_rate: control steps per second of a real-time rollout in one environment; by default, episodes run in
            simulated time, as fast as possible.
        env: another environment, or changed settings of the checkpoint's.
        on_env_error: what to do with an episode that the simulator cannot end: `count` it as a failure with its
            reason, or `stop` the rollout.
        env_patience: seconds that one call of the simulator may take before it counts as hanging.
        env_vector: let one simulator step all environments in one call, on one core or on its GPU; no result depends
            on it.
        mix: whether a rollout may go on whose episodes were run with other versions, another simulator or on another
            processor; the summary then says so.
        video: number of first episodes to record as mp4.
        record: a folder that does not exist; the episodes are written there as a Minari dataset for ddim-train.
        record_successes: write only the episodes that succeeded.
        output_dir: receives `episodes.json`, the summary `rollout.json`, the ledger `rollout.jsonl` and the videos; by
            default a new folder under outputs/rollout.
        tracker: opens the tracked run.

    Raises:
        ValueError: settings that do not fit, before any episode starts.
        WorkerError: more than 5 % of the episodes broke off, after all files are written.
    """
    dataset = record_settings(record, record_successes, output_dir)
    stage = set_stage(
        make_env,
        [checkpoint],
        env=env,
        seed=seed,
        episodes=episodes,
        num_envs=num_envs,
        device=device,
        env_patience=env_patience,
        env_vector=env_vector,
        control_rate=control_rate,
    )
    (loaded,) = stage.checkpoints
    policy = loaded.policy
    chosen = loaded.sampler_with(sampler.keywords)
    sweep_cell = _cell_of(stage, policy.settled(chosen), controller, execution_horizon, backend, weights)
    if not 0 <= video <= episodes:
        raise ValueError(f"video must be within 0..{episodes} (the episodes); got {video}")
    (sweep_cell,) = with_backends([sweep_cell], output_dir and output_dir / LEDGER)
    cell = sweep_cell.cell
    program = program_of(policy, cell)  # invalid settings raise here, before any work
    driver = None if control_rate is None else _real_time_controller(policy, cell, program, control_rate, stage)
    folder = output_folder(output_dir, "rollout")
    with _ledger(folder, sweep_cell, resumes=driver is None) as ledger:
        missing = bool(ledger.missing(cell_id(sweep_cell.settings), stage.seeds))
        mixed = [] if driver else settle_provenance(stage, [sweep_cell], ledger, missing=missing, mix=mix)
        tracking = tracker(folder=folder, config={"checkpoint": str(checkpoint), "env": stage.env})
        if driver is None:
            with recorded_as(dataset, stage, sweep_cell.settings, ledger) as recording_stage:
                (results,) = run_missing(recording_stage, [sweep_cell], ledger, num_envs, on_env_error, title="rollout")
        else:
            results = _against_the_clock(driver, stage, folder, on_env_error)
        unpaired = ledger.unpaired
        made_with = [stage.made_with] if driver else ledger.made_with([cell_id(sweep_cell.settings)], stage.seeds)
        file = write_episodes(results, folder)  # by which another rollout knows that this folder is taken
    (latency,) = measure_latency([timed_controller(policy, cell, program)])
    summary = {
        **cell.sampler.record(),
        **asdict(controller),
        **summarize(results),
        **latency.row,
    }
    tracking.log_table("rollout", [summary])
    tracking.finish()
    print(format_summary(summary))
    broken = describe_broken(results)
    for warning in broken:
        print(f"warning: {warning}")
    print(
        f"one plan: {summary['latency_ms_median']:.1f} ms with {cell.sampler.ddim_steps} ddim_steps"
        f" (median, batch {controller.candidates}, one thread{', on a busy machine' * latency.busy})"
    )
    print(f"episodes: {file}")
    said = [*stage.warnings, *mixed, *filter(None, [unpaired]), *broken]
    facts = {"env": stage.env, "checkpoint": str(checkpoint)}
    write_text(folder / SUMMARY, json_text({**facts, **summary, "warnings": said, "made_with": made_with}, indent=1))
    if video:
        (simulated,) = controllers_of([policy], [cell], stage.action_space)
        _film(simulated, stage, stage.seeds[:video], folder)
    # A later start leaves fewer timesteps, maybe fewer than a sweep visits by default, and so does a short schedule.
    limits = chosen.given.keys() & {"ddim_steps", "start", "warm_start"}
    limited = limits or policy.schedule.num_steps < MOST_STEPS_OF_A_SWEEP
    steps = steps_to_compare(cell.sampler.ddim_steps) if limited else None
    others = {name: value for name, value in sampler.keywords.items() if name != "ddim_steps"}
    shared = {"checkpoint": checkpoint, "env": env, "env_vector": env_vector or None}
    print(next_line("ddim-sweep", **shared, ddim_steps=steps, sampler=others))
    check_broken(results)


def _cell_of(
    stage: Stage,
    sampler: Sampler,
    controller: ControllerSettings,
    execution_horizon: int | None,
    backend: str,
    weights: str,
) -> SweepCell:
    """Check the settings, and return them as the only cell of a sweep."""
    chosen = asdict(sampler)
    (cell,) = make_cells(
        stage.checkpoints,
        stage.env,
        ddim_steps=chosen.pop("ddim_steps"),
        sampler=chosen,
        controller=asdict(controller),
        execution_horizon=execution_horizon,
        backend=backend,
        weights=weights,
    )
    return cell


def _ledger(folder: Path, cell: SweepCell, *, resumes: bool) -> Ledger:
    """Open the rollout's ledger, which locks the folder.

    Args:
        folder: the rollout's folder.
        cell: the rollout's settings.
        resumes: whether the ledger's episodes may be used; those of a real-time rollout are not repeatable.

    Raises:
        ValueError: the folder holds another rollout.
    """
    ledger = Ledger(folder / LEDGER)
    known, written = ledger.finished(), (folder / EPISODES_FILE).exists()
    if known - {cell_id(cell.settings)} or (written and not (resumes and known)):
        ledger.close()
        raise ValueError(
            f"{folder} holds another rollout, which would be overwritten: choose another output_dir=, or remove"
            f" {EPISODES_FILE} and {LEDGER} there"
        )
    return ledger


def _real_time_controller(
    policy: DiffusionPolicy, cell: Cell, program: SamplerProgram, control_rate: float, stage: Stage
) -> RealTimeController:
    with torch_threads(1):
        return RealTimeController(
            policy,
            control_rate=control_rate,
            sampler=cell.sampler,
            execution_horizon=cell.execution_horizon,
            settings=cell.controller,
            program=program,
            action_space=stage.action_space,
        )


def _against_the_clock(
    controller: RealTimeController, stage: Stage, folder: Path, on_env_error: OnEnvError
) -> list[EpisodeResult]:
    """Run all episodes one after the other in real time, and report their timing."""
    results, timings, overruns, control_rate = [], [], 0, controller.control_rate
    with (
        controller,
        torch_threads(1),
        watched(stage.make_env, stage.env_patience) as make_env,
        closing(make_env()) as simulator,
        progress(total=len(stage.seeds), desc=f"rollout at {control_rate:g} Hz", unit="episode") as bar,
    ):
        for seed in stage.seeds:
            pace = Pace(control_rate)
            results.append(play_episode(controller, simulator, seed, pace))
            timings.append(controller.timing)
            stop_if_broken(results[-1], on_env_error)
            overruns += max(0, pace.overruns - 1)  # the first overrun is due to the reset
            bar.update()
    summary = summarize_timing(timings, control_rate, overruns)
    file = folder / "real_time.json"
    write_text(file, json_text(summary, indent=1))
    print(format_timing(summary))
    print(f"timing: {file}")
    return results


def _film(controller: RecedingHorizonController, stage: Stage, seeds: Sequence[int], folder: Path) -> None:
    """Repeat episodes and record them."""

    def file_of(number: int, result: EpisodeResult) -> Path:
        return folder / f"episode_{result.seed}_{'success' if result.success else 'failure'}.mp4"

    for _, file in filmed(stage, [(controller, seed) for seed in seeds], file_of):
        say(f"video: {file}")
