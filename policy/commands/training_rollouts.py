"""The rollouts of a training: the environment is tried before it, and a few episodes are run, and filmed, during it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from policy.common.control_rate import describe_mismatch, stated_rate
from policy.common.errors import reason_of
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import Cell, controllers_of
from policy.rollout.episodes import TRAINED, Controller, MakeEnv, check_spaces, describe_clipping, run_in_process
from policy.rollout.probe import unrepeatable
from policy.rollout.video import record_videos
from policy.rollout.watch import helpers_ended, watched
from policy.statistics.results import EpisodeResult, describe_broken, summarize
from policy.tracking.training_page import video_name
from policy.training.settings import TrainSettings
from policy.training.state import TrainState

# First seed of the rollouts during training. Demonstrations use seeds from 0, reported results those from 100000.
ROLLOUT_SEED = 50_000

# Records episodes of the policy that a controller drives.
Film = Callable[[MakeEnv, Controller], None]


def tried(
    make_env: MakeEnv,
    env: dict[str, Any],
    env_patience: float,
    policy: DiffusionPolicy,
    rate: float | None,
    names: Mapping[str, str],
    *,
    rolls_out: bool,
) -> tuple[Any, bool]:
    """Check an environment against the policy and the demonstrations' rate before training.

    Returns:
        Its `tasks`, if any, and whether a seed fixes an episode, which is tried only if there will be rollouts.

    Raises:
        ValueError: its observations or actions are not the policy's.
    """
    with helpers_ended(), watched(make_env, env_patience) as make, closing(make(**env)) as probe:
        check_spaces(policy.config, probe, names, setting_of_names=TRAINED, family=env["name"])
        clipping = describe_clipping(policy, probe)
        mismatch = describe_mismatch(rate, stated_rate(probe.metadata.get("render_fps")))
        unfixed = unrepeatable(probe, ROLLOUT_SEED)[1] if rolls_out else ""
        tasks = getattr(probe.unwrapped, "tasks", None)
    for warning in filter(None, (mismatch, clipping, unfixed)):
        warnings.warn(warning, stacklevel=3)
    return tasks, not unfixed


def rolled_out(
    play: Callable[..., list[EpisodeResult]], settings: TrainSettings, film: Film, policy: DiffusionPolicy
) -> dict[str, float]:
    """Run a short rollout of the averaged policy, and return its metrics."""
    results = play(policy, range(ROLLOUT_SEED, ROLLOUT_SEED + settings.rollout_episodes), film)
    for sentence in describe_broken(results):
        warnings.warn(sentence, stacklevel=2)
    summary = summarize(results)
    return {key: summary[key] for key in ("success_rate", "score_mean", "return_mean")}


def played(
    make_env: MakeEnv,
    num_envs: int,
    env_patience: float,
    sampler: Sampler,
    execution_horizon: int,
    policy: DiffusionPolicy,
    seeds: range,
    film: Film | None = None,
) -> list[EpisodeResult]:
    """Run episodes with these seeds, film some if asked, and return the results by seed."""
    cell = Cell(sampler=sampler, execution_horizon=execution_horizon)
    with helpers_ended(), watched(make_env, env_patience) as make, ExitStack() as simulators:
        opened = [simulators.enter_context(closing(make())) for _ in range(min(num_envs, len(seeds)))]
        results = [result for _, result in run_in_process([policy], opened, [cell], [(0, seed) for seed in seeds])]
        if film:
            film(make, *controllers_of([policy], [cell], opened[0].action_space))
    return sorted(results, key=lambda result: result.seed)


def film_episodes(
    state: TrainState, folder: Path, seeds: Sequence[int], make_env: MakeEnv, controller: Controller
) -> None:
    """Record episodes of a rollout for the run's page; one that cannot be drawn is a warning."""

    def file_of(number: int, result: EpisodeResult) -> Path:
        return folder / video_name(state.step, result.seed, success=result.success)

    try:
        if seeds:
            folder.mkdir(exist_ok=True)
            deque(record_videos(make_env, [(controller, seed) for seed in seeds], file_of), maxlen=0)
    except Exception as error:  # an environment need not know how to draw
        warnings.warn(f"no videos of this run ({reason_of(error)}): videos=0 leaves them out", stacklevel=2)
