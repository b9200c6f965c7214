"""How much of an error in where the robot is a policy corrects within one chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from policy.common.observations import is_image
from policy.common.seeding import derive_generator
from policy.data.corrections import Corrections, find_corrections
from policy.data.demonstrations import Demonstrations
from policy.data.holding import NOTHING
from policy.data.relations import thinned
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.training.corrective_noise import CorrectiveNoise
from policy.training.settings import TrainSettings

# Episodes and windows that are looked at, and the error: a share of what a number usually moves within a chunk.
EPISODES, WINDOWS, ERROR = 200, 96, 0.5
# A policy that corrects less of an error than this within a chunk hardly corrects it at all. Measured on one task only:
# with 3 % of the wrist's error corrected, 1 of 24 episodes succeeded, with 36 % or more, 12 of 24.
HARDLY = 0.3
# With this success or more in the last rollout while training, the task needs no more precision than the policy has.
SOLVED = 0.9
# Settings of a training that make a policy correct more.
ADVISED = {"corrective_noise": 0.5, "action_weights": "spread"}


class Recovery(NamedTuple):
    """What becomes of an error of one number.

    Attributes:
        number: the number that follows an action, such as `state[5]`.
        corrected: the share that the actions of a chunk correct: 1 all of it, 0 nothing.
    """

    number: str
    corrected: float


def measure_recoveries(policy: DiffusionPolicy, training: Windows, sampler: Sampler) -> list[Recovery]:
    """Move the robot in windows of training episodes, and see how far the policy's chunks lead it back.

    Args:
        policy: the policy.
        training: its training windows, of which up to 200 episodes are looked at.
        sampler: settings of the sampler.

    Returns:
        One for each number that follows an action; none where no action is a displacement, where pictures would show
        where the robot was, or where something else always moves.
    """
    config = policy.config
    keys = list(config.observation_shapes)
    if (
        any(map(is_image, config.observation_shapes.values()))
        or training.demonstrations.actions.shape[1] != config.action_dim
    ):
        return []
    some = _some_episodes(training, keys)
    everything = np.arange(some.num_episodes)
    try:
        corrections = find_corrections(some, everything, keys, config.action_horizon)
    except ValueError:  # no number follows an action
        return []
    windows = Windows(
        some,
        everything,
        obs_horizon=config.obs_horizon,
        action_horizon=config.action_horizon,
        past_actions=config.past_actions,
    )
    return recoveries(policy, windows, corrections, sampler)


def _some_episodes(training: Windows, keys: Sequence[str]) -> Demonstrations:
    data, episodes = training.demonstrations, thinned(training.episodes, EPISODES)
    spans = [slice(data.episode_starts[episode], data.episode_ends[episode]) for episode in episodes]
    return Demonstrations(
        observations={key: np.concatenate([data.observations[key][span] for span in spans]) for key in keys},
        actions=np.concatenate([data.actions[span] for span in spans]),
        episode_ends=np.cumsum([span.stop - span.start for span in spans]),
    )


def recoveries(policy: DiffusionPolicy, windows: Windows, corrections: Corrections, sampler: Sampler) -> list[Recovery]:
    """Move each number that follows the action to both sides, and denoise the same noise on either side.

    What the chunks differ by, times what an action moves, is the correction.

    Args:
        policy: the policy.
        windows: windows of the demonstrations that `corrections` was found in.
        corrections: what follows the policy's actions, and what moves along.
        sampler: settings of the sampler.

    Returns:
        One for each number; none if there is no window in which nothing moves but the robot and what it holds.
    """
    marked = windows.marking(corrections.held)
    movable = np.flatnonzero(corrections.held >= NOTHING)  # each transition is the newest of one window
    if not len(movable):
        return []
    batch = marked.gather(thinned(movable, WINDOWS))
    mover = CorrectiveNoise(corrections, 1.0, policy.config.past_actions)
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)

    def chunks(offsets: torch.Tensor) -> torch.Tensor:
        seen = {**batch["observations"], **mover.displaced(batch["observations"], offsets, batch["held"])}
        return program.sample_actions(observed(policy.config, seen), generator=derive_generator(0)).cpu()

    found = []
    for place, followed in enumerate(corrections.followed):
        offsets = torch.zeros(len(batch["held"]), len(corrections.followed))
        offsets[:, place] = ERROR * followed.reach
        apart = (chunks(offsets) - chunks(-offsets))[..., followed.action].sum(dim=1).mean()
        corrected = -apart * followed.gain / (2 * ERROR * followed.reach)
        found.append(Recovery(corrections.names[followed.number], float(corrected)))
    return found


def describe_recoveries(
    found: Sequence[Recovery], training: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> str:
    """Say in one sentence what a chunk corrects, and what to do where it is next to nothing.

    Args:
        found: what becomes of an error of each number.
        training: settings of the training, of which those that it has already are not advised.
        history: log entries of the training; nothing is advised where its last rollout solved nearly every episode.
    """
    shares = ", ".join(f"{one.number} {round(100 * one.corrected)}%" for one in found)
    sentence = f"of an error in where the robot is, one chunk corrects {shares}"
    hardly = [one.number for one in found if one.corrected < HARDLY]
    success = [entry["rollout/success_rate"] for entry in history if "rollout/success_rate" in entry]
    if not hardly or (success and success[-1] >= SOLVED):
        return sentence
    sentence += f"; it hardly corrects {', '.join(hardly)}"
    usual = {name: getattr(TrainSettings, name) for name in ADVISED}
    advised = [f"train.{name}={value}" for name, value in ADVISED.items() if {**usual, **training}[name] == usual[name]]
    return f"{sentence}: train with {' '.join(advised)}" if advised else sentence
