"""Numbers by which a policy knows its demonstrations by heart, and is no better for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy.common.observations import is_image, vector_widths
from policy.common.seeding import derive_generator
from policy.data.relations import number_names, staying_put
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, SamplerProgram, compile_sampler
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.errors import Selection, action_deviation, select, squares_of
from policy.training.numbers import joined_numbers, split_numbers
from policy.training.recovery import some_episodes

# Episodes of each split that are looked at, windows of each of them, and how often its numbers are exchanged.
EPISODES, WINDOWS, EXCHANGES = 16, 12, 3
# Things that are looked at.
MOST_THINGS = 12
# A number tells episodes apart if, of its values in them, so large a share are different ones: values in different
# parts of its range, of which there are this many.
DIFFERENT, PARTS = 0.5, 1_000
# What matters on training episodes raises their squared error by this share, and what helps on held-out ones by that.
# Measured on one task: six numbers of a cube that nobody touches raised the first by 14 to 35 % and the second by -3 to
# 3 %, the places of a drawer and of a window by 55 and 115 %, and by 7 and 17 %.
MATTERS, HELPS = 0.1, 0.05
# A policy that repeats its demonstrations to the last bit has this error all the same, in variances of the actions.
LEAST_ERROR = 1e-12
# With fewer held-out episodes, nothing is told.
FEW = 8


def known_by_heart(policy: DiffusionPolicy, training: Windows, validation: Windows, sampler: Sampler) -> list[int]:
    """Find numbers that tell demonstrations apart, and do not help on others.

    The pose of a thing that nobody touches is a name for each demonstration, by which a policy learns what its
    demonstrator happened to do in it. Such numbers stay put during an episode. Exchanged for those of another episode,
    they raise the error on training episodes, and not on held-out ones. Neighbours in a vector are exchanged together.
    A thing of which the policy sees a number in a difference, too, is left alone.

    Args:
        policy: the policy.
        training: its training windows.
        validation: windows of held-out episodes.
        sampler: settings of the sampler.

    Returns:
        Their places in the vector of all numbers, the keys in sorted order. None with few held-out episodes, where
        pictures would show what is exchanged, or where the data have other actions.
    """
    config = policy.config
    if (
        len(validation.episodes) < FEW
        or any(map(is_image, config.observation_shapes.values()))
        or training.demonstrations.actions.shape[1] != config.action_dim
    ):
        return []
    (values, things), deviation = _things(config, training), action_deviation(training)
    if not things or np.isnan(deviation).all():
        return []
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)
    ours, others = (
        _rises(program, windows, select(windows, EPISODES, WINDOWS), values, things, deviation)
        for windows in (training, validation)
    )
    return [
        place
        for thing, here, there in zip(things, ours, others, strict=True)
        if here >= MATTERS and there < HELPS
        for place in thing
    ]


def describe_by_heart(places: Sequence[int], config: PolicyConfig) -> str:
    """Say which numbers were found, one or more, and what to do about it."""
    names = number_names(vector_widths(config.observation_shapes))
    ignored = ",".join(map(str, sorted({*config.ignored, *places})))
    return (
        f"it tells training episodes apart by {', '.join(names[place] for place in places)}, which stay put in each of"
        f" them and seem no help on held-out ones: try a new training with ignored=[{ignored}], or record more"
        " demonstrations"
    )


def _things(config: PolicyConfig, training: Windows) -> tuple[NDArray[Any], list[list[int]]]:
    """The values (episodes, D) of all numbers at the beginnings of training episodes, and runs of those that tell."""
    widths = vector_widths(config.observation_shapes)
    some = some_episodes(training, list(widths))
    numbers, starts = np.concatenate([some.observations[key] for key in widths], axis=1), some.episode_starts
    values, span = numbers[starts], np.ptp(numbers, axis=0)
    parts = np.round((values - values.min(axis=0)) / np.where(span > 0, span, 1) * PARTS)
    different = np.array([len(np.unique(part)) for part in parts.T])
    tells = staying_put(numbers, starts) & (different >= DIFFERENT * some.num_episodes)
    directions = {place for pair in config.direction_differences for cosine in pair for place in (cosine, cosine + 1)}
    seen_apart = {place for pair in config.differences for place in pair} | directions | {*config.end_differences}
    tells[list(config.ignored)] = False
    places = np.flatnonzero(tells)
    vector = np.repeat(np.arange(len(widths)), list(widths.values()))[places]
    runs = np.split(places, np.flatnonzero((np.diff(places) > 1) | (np.diff(vector) > 0)) + 1)
    return values, [run.tolist() for run in runs if len(run) and seen_apart.isdisjoint(run.tolist())][:MOST_THINGS]


def _rises(
    program: SamplerProgram,
    windows: Windows,
    chosen: Selection,
    values: NDArray[Any],
    things: Sequence[Sequence[int]],
    deviation: NDArray[np.float64],
) -> list[float]:
    """By what share the squared error of chunks rises where a thing's numbers are those of another episode.

    Args:
        program: samples the chunks.
        windows: the windows of a split.
        chosen: those that are looked at.
        values: (M, D) all numbers at the beginnings of training episodes.
        things: places of the numbers of each thing.
        deviation: see `action_deviation`.

    Returns:
        The rise of each thing.
    """
    batch, widths = windows.gather(chosen.windows), vector_widths(program.config.observation_shapes)
    inside = batch["mask"].numpy()[:, program.config.past_actions :]
    seen = joined_numbers(batch["observations"], widths)
    _, episode = np.unique(chosen.episodes, return_inverse=True)

    def error(numbers: torch.Tensor) -> float:
        chunks = program.sample_actions(split_numbers(numbers, widths), generator=derive_generator(0))
        return float(np.nanmean(squares_of(batch, chunks.cpu().numpy(), program.config, deviation)[inside]))

    def exchanged(thing: Sequence[int], generator: np.random.Generator) -> torch.Tensor:
        others = values[generator.integers(len(values), size=episode.max() + 1)][episode]
        numbers = seen.clone()
        numbers[..., thing] = torch.from_numpy(others[:, None, thing]).to(numbers)
        return numbers

    def rise(thing: Sequence[int]) -> float:
        generator = np.random.default_rng(0)
        return float(np.mean([error(exchanged(thing, generator)) for _ in range(EXCHANGES)])) / usual - 1

    usual = max(error(seen), LEAST_ERROR)
    return [rise(thing) for thing in things]
