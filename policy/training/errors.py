"""The errors of a policy's chunks on held-out and on training episodes.

The unit is one standard deviation of the training actions, of each dimension for itself: a chunk that is always the
mean action has an error of 1. A sampled chunk differs from the demonstrated one even if the policy is perfect, because
demonstrators are random and so are samples: its error is then √2 times the demonstrators' own deviation. The average of
several samples leaves the samples' part out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from policy.common.observations import Batch, Observations, is_image
from policy.common.seeding import derive_generator
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, SamplerProgram, compile_sampler
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.statistics.fit import MOST_EPISODES, compared_episodes

# Episodes of each split that are measured, and windows of each. Both splits have equally many windows an episode,
# because the logarithm of an episode's error, by which the splits are compared, depends on their number.
EPISODES, WINDOWS = MOST_EPISODES, 8
# Sampled chunks of each window.
SAMPLES = 8
# Windows sampled at once.
BATCH_SIZE = 128
# Training windows among which the nearest ones are looked for, and how many of these are averaged.
CANDIDATES, NEIGHBOURS = 20_000, 5
# An action dimension with a smaller standard deviation, relative to its mean, is constant but for rounding.
LEAST_DEVIATION = 1e-6

Array = NDArray[np.float64]


class Selection(NamedTuple):
    """N windows of a split.

    Attributes:
        windows: (N,) window numbers.
        episodes: (N,) the episode of each, as its index in `Windows.episodes`.
    """

    windows: NDArray[np.int64]
    episodes: NDArray[np.int64]


class WindowErrors(NamedTuple):
    """Squared errors of the chunks of N windows, in variances of the training actions, (N, action_dim) each.

    Attributes:
        sampled_first_action: of a sample's first action, averaged over the samples.
        sampled_chunk: of a sample's whole chunk, averaged over the samples.
        averaged_first_action: of the first action of the average of the samples.
        averaged_chunk: of the whole chunk of the average of the samples.
    """

    sampled_first_action: Array
    sampled_chunk: Array
    averaged_first_action: Array
    averaged_chunk: Array


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The training windows whose observations are nearest to those of N windows.

    Attributes:
        distances: (N,) to the nearest one: root mean square difference of the normalised observations.
        errors: (N, action_dim) squared errors of the average of the nearest windows' chunks, as in `WindowErrors`.
    """

    distances: Array
    errors: Array


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The errors of one policy.

    Attributes:
        training: of windows of training episodes.
        training_episodes: (N,) the episode of each of these windows.
        held_out: of windows of held-out episodes; None if there are none.
        held_out_episodes: (M,) the episode of each of these.
        neighbours: of the held-out windows; None if there are none, or if the policy observes only images.
    """

    training: WindowErrors
    training_episodes: NDArray[np.int64]
    held_out: WindowErrors | None
    held_out_episodes: NDArray[np.int64]
    neighbours: Neighbours | None

    def metrics(self) -> dict[str, float]:
        """Return the errors as entries of a run's history.

        Returns:
            Root mean square errors under `train/` and `val/`, and how the two compare from episode to episode under
            `fit/`, see `compared_episodes`.
        """
        metrics = root_mean_squares("train", self.training)
        if self.held_out is None:
            return metrics
        metrics |= root_mean_squares("val", self.held_out)
        near = self.neighbours
        if near:
            metrics["val/neighbour_chunk_error"] = math.sqrt(np.nanmean(near.errors))
        return metrics | compared_episodes(
            by_episode(self.held_out.averaged_chunk, self.held_out_episodes),
            by_episode(self.training.averaged_chunk, self.training_episodes),
            by_episode(near.errors, self.held_out_episodes) if near else None,
        )


class ErrorMeter:
    """Measures policies on the same windows of a training's episodes, with the same noise.

    Args:
        training: windows of the training episodes.
        validation: windows of the held-out episodes; may be empty.
        sampler: settings of the sampler.

    Raises:
        ValueError: no action of the training episodes ever changes.
    """

    def __init__(self, training: Windows, validation: Windows, sampler: Sampler) -> None:
        self._training, self._validation, self._sampler = training, validation, sampler
        self._ours, self._others = select(training), select(validation)
        self._deviation = action_deviation(training)
        self._neighbours: Neighbours | None = None
        if np.isnan(self._deviation).all():
            raise ValueError("no action of the training episodes ever changes, so there is no unit for errors")

    def measure(self, policy: DiffusionPolicy) -> Measurement:
        """Measure a policy; its normalisers are the same in every call."""
        program = compile_sampler(policy, self._sampler, backend=PLAIN_BACKEND)
        held_out = None
        if len(self._validation):
            held_out = squared_errors(program, self._validation, self._others.windows, self._deviation)
            self._neighbours = self._neighbours or nearest(
                policy, self._training, self._validation, self._others.windows, self._deviation
            )
        return Measurement(
            training=squared_errors(program, self._training, self._ours.windows, self._deviation),
            training_episodes=self._ours.episodes,
            held_out=held_out,
            held_out_episodes=self._others.episodes,
            neighbours=self._neighbours,
        )

    def metrics(self, policy: DiffusionPolicy) -> dict[str, float]:
        """Measure a policy, and return its errors as entries of a run's history."""
        return self.measure(policy).metrics()


def select(windows: Windows, episodes: int = EPISODES, each: int = WINDOWS) -> Selection:
    """Choose episodes at random, and in each of them windows spread over its length; always the same ones."""
    lengths = windows.demonstrations.episode_lengths[windows.episodes]
    firsts = np.cumsum(lengths) - lengths
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.permutation(len(lengths))[:episodes])
    places = ((np.arange(each) + generator.random((len(chosen), each))) / each * lengths[chosen, None]).astype(int)
    return Selection(windows=(firsts[chosen, None] + places).ravel(), episodes=chosen.repeat(each))


def action_deviation(training: Windows) -> Array:
    """Return the standard deviation of each action dimension over some episodes; NaN where it is constant."""
    data = training.demonstrations
    spans = [slice(*ends) for ends in zip(data.episode_starts, data.episode_ends, strict=True)]
    own = [data.actions[spans[episode]] for episode in training.episodes]
    count = training.num_transitions
    mean = np.sum([actions.sum(0, dtype=np.float64) for actions in own], axis=0) / count
    variance = np.sum([np.square(actions - mean).sum(0) for actions in own], axis=0) / count
    deviation = np.sqrt(variance)
    return np.where(deviation > LEAST_DEVIATION * np.abs(mean), deviation, np.nan)


def squared_errors(
    program: SamplerProgram, windows: Windows, numbers: NDArray[np.int64], deviation: Array
) -> WindowErrors:
    """Sample chunks on windows, and compare them with the demonstrated ones; the noise is the same in every call.

    Args:
        program: samples the chunks.
        windows: the windows of a split.
        numbers: the windows to measure, one or more.
        deviation: see `action_deviation`.

    Returns:
        The errors.
    """
    found = [
        _against(batch, samples.numpy(), program.config, deviation)
        for batch, samples in sampled(program, windows, numbers, SAMPLES)
    ]
    return WindowErrors(*map(np.concatenate, zip(*found, strict=True)))


def sampled(
    program: SamplerProgram, windows: Windows, numbers: NDArray[np.int64], samples: int
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Gather windows, some at a time, and sample chunks on them; the noise is the same in every call.

    Args:
        program: samples the chunks.
        windows: the windows of a split.
        numbers: the windows to sample on, one or more.
        samples: number of chunks of each window.

    Yields:
        N windows and the chunks (samples, N, action_horizon, action_dim) on the CPU.
    """
    generator = derive_generator(0)
    for part in np.array_split(numbers, math.ceil(len(numbers) / BATCH_SIZE)):
        batch = windows.gather(part)
        seen = observed(program.config, batch["observations"])
        yield batch, torch.stack([program.sample_actions(seen, generator=generator).cpu() for _ in range(samples)])


def _against(batch: Batch, samples: NDArray[np.float32], config: PolicyConfig, deviation: Array) -> WindowErrors:
    """Compare samples (S, N, action_horizon, action_dim) with the demonstrated chunks."""
    each = squares_of(batch, samples, config, deviation)
    average = squares_of(batch, samples.mean(0, keepdims=True), config, deviation)
    inside = batch["mask"].numpy()[:, config.past_actions :, None]
    counted = inside / inside.sum(1, keepdims=True)
    return WindowErrors(
        each[:, :, 0].mean(0), (each * counted).sum(2).mean(0), average[0, :, 0], (average[0] * counted).sum(1)
    )


def squares_of(batch: Batch, chunks: NDArray[np.float32], config: PolicyConfig, deviation: Array) -> Array:
    """Return the squared errors of chunks (..., N, action_horizon, action_dim) in variances, padding included."""
    demonstrated = batch["actions"].numpy()[:, config.past_actions :]
    return np.square((chunks - demonstrated) / deviation)


def root_mean_squares(split: str, errors: WindowErrors) -> dict[str, float]:
    """Return each error over all windows: of all dimensions, and under `/0`, `/1`, ... of each that is not constant."""
    found = {}
    for name, squares in errors._asdict().items():
        found[f"{split}/{name}_error"] = math.sqrt(np.nanmean(squares))
        by_dimension = np.sqrt(squares.mean(0)).tolist()
        found |= {
            f"{split}/{name}_error/{dimension}": value
            for dimension, value in enumerate(by_dimension)
            if not math.isnan(value)
        }
    return found


def by_episode(squares: Array, episodes: NDArray[np.int64]) -> Array:
    """Return the root mean square error of each episode from the squared errors (N, action_dim) of its windows."""
    return np.sqrt([np.nanmean(squares[episodes == episode]) for episode in np.unique(episodes)])


def nearest(
    policy: DiffusionPolicy, training: Windows, windows: Windows, numbers: NDArray[np.int64], deviation: Array
) -> Neighbours | None:
    """Find the training windows whose observations are nearest to those of other windows, and take their chunks.

    Args:
        policy: normalises the observations; those without a normaliser for vectors, which are images, are left out.
        training: windows of the training episodes, of which up to 20,000 are looked at.
        windows: windows of other episodes.
        numbers: those to find neighbours of.
        deviation: see `action_deviation`.

    Returns:
        The neighbours, or None for a policy that observes only images.
    """
    keys = [key for key, shape in policy.config.observation_shapes.items() if not is_image(shape)]
    if not keys:
        return None
    count = min(CANDIDATES, training.num_transitions)
    candidates = np.linspace(0, training.num_transitions - 1, count).astype(np.int64)
    known, asked = training.showing(keys).gather(candidates), windows.showing(keys).gather(numbers)
    places = _normalized(policy, asked["observations"])
    distances = torch.cdist(places, _normalized(policy, known["observations"])) / math.sqrt(places.shape[1])
    found = distances.topk(min(NEIGHBOURS, count), largest=False)
    average = known["actions"].numpy()[found.indices.cpu().numpy(), policy.config.past_actions :].mean(1)
    return Neighbours(
        distances=found.values[:, 0].cpu().numpy().astype(np.float64),
        errors=_against(asked, average[None], policy.config, deviation).averaged_chunk,
    )


def _normalized(policy: DiffusionPolicy, vectors: Observations) -> torch.Tensor:
    """All observations of each window as one row."""
    parts = [policy.observation_normalizers[key].normalize(value.to(policy.device)) for key, value in vectors.items()]
    return torch.cat([part.flatten(1) for part in parts], dim=1)
