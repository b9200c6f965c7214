"""A whole training run: from demonstrations to a checkpoint that acts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from policy.checkpoint import check_env, is_checkpoint, keep_checkpoint, resume_training, save_checkpoint
from policy.common.arguments import unknown_name
from policy.common.device import check_device
from policy.common.interrupt import stop_on_signal
from policy.common.locks import only_process
from policy.common.output import output_folder
from policy.control.timeline import check_execution_horizon
from policy.data.demonstrations import Augment, Demonstrations
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy, PolicyConfig
from policy.rollout.episodes import Cell, Env, check_num_envs, check_spaces, run_in_process, summarize
from policy.tracking.wandb_tracker import StartRun
from policy.training.loop import TrainSettings, prepare_run
from policy.training.loop import train as train_loop
from policy.training.state import TrainState

# Episodes rolled out while training, apart from those demonstrated (from 0) and those reported (from 100000).
ROLLOUT_SEED = 50_000


def clone_behaviour(
    make_env: Callable[..., Env],
    *,
    dataset: Demonstrations,
    env: dict[str, Any] | None = None,
    encoder: dict[str, Any],
    denoiser: dict[str, Any],
    schedule: dict[str, Any],
    sampler: Sampler,
    train: TrainSettings,
    tracker: StartRun,
    augment: Augment | None = None,
    prediction_type: str = "sample",
    auxiliary: Sequence[str] = (),
    auxiliary_weight: float = 1.0,
    loss_weighting: str = "none",
    min_snr_gamma: float = 5.0,
    obs_horizon: int = 2,
    action_horizon: int = 8,
    obs_size: int = 287,
    execution_horizon: int = 8,
    seed: int = 0,
    num_envs: int = 8,
    device: str = "cpu",
    output_dir: Path | None = None,
    expected: list[dict[str, float]] | None = None,
) -> None:
    """Train a diffusion policy on demonstrations; the same command with the same output_dir goes on where it stopped.

    Args:
        make_env: makes an environment from the settings in `env`.
        dataset: the demonstrations.
        env: the environment they come from; a Minari dataset of `scripts/collect.py` brings its own.
        encoder: `{"name": ..., **settings}`.
        denoiser: `{"name": ..., **settings}`.
        schedule: settings of `make_schedule`.
        sampler: for the rollouts while training.
        train: see `TrainSettings`.
        tracker: opens the tracked run.
        augment: a symmetry of the task, as a function of observations and actions; doubles the training episodes.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        auxiliary: observations that only the demonstrations have, which the policy learns to tell; see `PolicyConfig`.
        auxiliary_weight: what they count for.
        loss_weighting: what errors count for at each timestep, `none` or `min_snr`; see `policy.diffusion.schedule.loss_weights`.
        min_snr_gamma: γ of `min_snr`.
        obs_horizon: observations looked back on.
        action_horizon: actions in one chunk.
        obs_size: width of the observation embedding.
        execution_horizon: actions executed before the next plan.
        seed: of the split, the weights and every training step.
        num_envs: environments in the rollouts while training.
        device: `cpu` or `cuda`.
        output_dir: receives `checkpoint/`; by default a new folder under outputs/train.
        expected: what a preset reaches, at each of some `ddim_steps`: `success_rate` and `score_mean`; only printed.

    Raises:
        ValueError: settings that do not fit each other, the data or the environment, before training starts; or
            another process trains in this folder.
        FloatingPointError: see `policy.training.loop.train`; names the last good checkpoint.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    if not env and dataset.metadata.get("env"):
        env = check_env(dataset.metadata["env"], dataset.source)
    shapes = dataset.observation_shapes
    for key in auxiliary:
        if key not in shapes:
            raise unknown_name("auxiliary observation", key, shapes)
    config = PolicyConfig(
        observation_shapes={key: shape for key, shape in shapes.items() if key not in auxiliary},
        auxiliary_shapes={key: shapes[key] for key in auxiliary},
        auxiliary_weight=auxiliary_weight,
        action_dim=dataset.actions.shape[1],
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        obs_size=obs_size,
        prediction_type=prediction_type,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
        encoder=encoder,
        denoiser=denoiser,
        schedule=schedule,
    )
    check_execution_horizon(execution_horizon, action_horizon)
    check_num_envs(num_envs)
    run = prepare_run(config, dataset, train, seed=seed, device=check_device(device), augment=augment)
    sampler.check(run.state.policy.schedule.num_steps)
    if env:
        with closing(make_env(**env)) as probe:
            check_spaces(config, probe)

    folder = output_folder(output_dir, "train")
    checkpoint = folder / "checkpoint"
    settings = {
        # Until a first loss that is not finite, runs that would stop and runs that would skip are the same.
        **{key: value for key, value in vars(train).items() if key != "on_bad_loss"},
        "seed": seed,
        "dataset": dataset.source,
        "episodes": dataset.num_episodes,
        "augment": augment and getattr(augment, "func", augment).__name__,
    }
    with only_process(folder):
        if is_checkpoint(checkpoint):
            resume_training(checkpoint, run.state, settings)
            print(f"going on at step {run.state.step} of {train.all_steps}: {checkpoint}")
            if checkpoint.exists():  # a kill may have come after it was saved and before it was kept
                keep_checkpoint(checkpoint, run.state, keep_last=train.keep_last)

        parameters = sum(p.numel() for p in run.state.policy.parameters())
        print(
            f"{len(run.training)} training windows from {len(run.training.episodes)} episodes"
            f" ({len(run.validation.episodes)} held out), {parameters / 1e6:.2f} M parameters"
        )
        if env is None:
            print("no environment is known, so there are no rollouts while training: env=... adds them")
        tracking = tracker(folder=folder, config={"env": env, **settings, **vars(config)})
        rollout = (
            partial(_rollout, partial(make_env, **env), num_envs, train, sampler, execution_horizon) if env else None
        )

        def save(state: TrainState) -> None:
            save_checkpoint(checkpoint, state, env=env, execution_horizon=execution_horizon, training=settings)
            keep_checkpoint(checkpoint, state, keep_last=train.keep_last)

        first_step, began = run.state.step, time.perf_counter()
        try:
            with stop_on_signal() as should_stop:
                train_loop(run, train, seed=seed, tracker=tracking, save=save, rollout=rollout, should_stop=should_stop)
        except FloatingPointError as error:
            kept = f"the last good checkpoint is {checkpoint}" if is_checkpoint(checkpoint) else "nothing was saved yet"
            raise FloatingPointError(f"{error}; {kept}") from error
        seconds = time.perf_counter() - began
        rate = (run.state.step - first_step) * min(train.batch_size, len(run.training)) / seconds
        print(f"{run.state.step - first_step} steps in {seconds:.1f} s, {rate:.0f} transitions a second")
        if skipped := run.state.skipped:
            print(f"{len(skipped)} of {run.state.step} steps skipped, not finite: {', '.join(map(str, skipped))}")
        tracked = tracking.finish()
        if run.state.step < train.all_steps:
            print(f"stopped at step {run.state.step} and saved: the same command with output_dir={folder} goes on")
            raise KeyboardInterrupt  # what would come after a whole training must not start
        print(f"checkpoint: {checkpoint}" + (f"   tracked: {tracked}" if tracked else ""))
        for row in expected or []:
            print("the preset as committed reaches: " + ", ".join(f"{name}={value:g}" for name, value in row.items()))
        print(f"next: python scripts/rollout.py checkpoint={checkpoint}")


def _rollout(
    make_env: Callable[[], Env],
    num_envs: int,
    settings: TrainSettings,
    sampler: Sampler,
    execution_horizon: int,
    policy: DiffusionPolicy,
) -> dict[str, float]:
    seeds = range(ROLLOUT_SEED, ROLLOUT_SEED + settings.rollout_episodes)
    simulators = [make_env() for _ in range(min(num_envs, len(seeds)))]
    cell = Cell(sampler=sampler, execution_horizon=execution_horizon, backend="fused")
    results = [result for _, result in run_in_process([policy], simulators, [cell], [(0, seed) for seed in seeds])]
    for simulator in simulators:
        simulator.close()
    summary = summarize(sorted(results, key=lambda result: result.seed))
    return {key: summary[key] for key in ("success_rate", "score_mean", "return_mean")}
