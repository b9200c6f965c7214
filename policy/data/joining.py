"""Several datasets as one: the episodes of one follow those of the other, and no array is copied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from policy.common.control_rate import TOLERANCE, stated_rate
from policy.common.files import distinct_names
from policy.data.demonstrations import Demonstrations
from policy.data.frames import Frames
from policy.data.joined_array import JoinedArray


def check_alike(first: Demonstrations, other: Demonstrations) -> None:
    """Check that one policy can learn from two datasets.

    Args:
        first: a dataset.
        other: another one.

    Raises:
        ValueError: their keys, shapes, control rates, or the places of their pictures differ; the message names both
            datasets and all that differs.
    """
    differing = [*_different_shapes(first, other), *_different_frames(first, other)]
    one, two = (stated_rate(dataset.metadata.get("rate_hz")) for dataset in (first, other))
    if one and two and not math.isclose(one, two, rel_tol=TOLERANCE):
        differing.append(
            f"{one:g} Hz in the first and {two:g} Hz in the second, so that an action takes effect for another time:"
            " resample one of them"
        )
    if differing:
        raise ValueError(
            f"one policy cannot be trained on both {first.source} and {other.source}: {'; '.join(differing)}"
        )


def _different_shapes(first: Demonstrations, other: Demonstrations) -> list[str]:
    shapes = [{**one.observation_shapes, "actions": one.actions.shape[1:]} for one in (first, other)]
    differing = [
        f"{key!r} is {' and '.join(f'{_shown(one.get(key))} in the {place}' for one, place in _placed(shapes))}"
        for key in {**shapes[0], **shapes[1]}
        if shapes[0].get(key) != shapes[1].get(key)
    ]
    if differing:
        differing[-1] += " (dataset.observation_keys=, action_key= and image_size= choose and resize those of all)"
    return differing


def _different_frames(first: Demonstrations, other: Demonstrations) -> list[str]:
    """Pictures of the same shape, of which some are decoded, or in videos of another size."""
    differing = []
    for key in first.observations:
        if first.observation_shapes[key] != other.observation_shapes.get(key):
            continue
        stored = [one.frames[key].stored if key in one.frames else None for one in (first, other)]
        if stored[0] != stored[1]:
            where = [f"{_stored(one)} in the {place}" for one, place in _placed(stored)]
            differing.append(f"{key!r} is {' and '.join(where)}: add dataset.decode=cache, which decodes those of all")
    return differing


def _placed(pair: Sequence[Any]) -> Sequence[tuple[Any, str]]:
    return [*zip(pair, ("first", "second"), strict=True)]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _stored(size: tuple[int, int] | None) -> str:
    return "decoded" if size is None else f"left in videos of {size[1]} x {size[0]}"


def join(datasets: Sequence[Demonstrations]) -> Demonstrations:
    """Join datasets that `check_alike` finds alike.

    The names of episodes begin with that of their dataset. What the datasets say of themselves is kept where all that
    say it agree; tasks are put together, and anything else is listed, different environments as `envs`.

    Args:
        datasets: the datasets; a single one is returned as it is.

    Returns:
        The demonstrations.
    """
    first, *others = datasets
    if not others:
        return first
    sources = [one.source for one in datasets]
    prefixed = [*zip(distinct_names(sources), datasets, strict=True)]
    firsts = np.cumsum([0, *(one.num_episodes for one in datasets)])
    starts = np.cumsum([0, *(len(one.actions) for one in datasets)])
    return Demonstrations(
        observations={key: _joined([one.observations[key] for one in datasets]) for key in first.observations},
        actions=_joined([one.actions for one in datasets]),
        episode_ends=np.concatenate(
            [one.episode_ends + start for one, start in zip(datasets, starts, strict=False)], dtype=np.int64
        ),
        episode_names=[f"{name}/{episode}" for name, one in prefixed for episode in one.episode_names],
        originals=np.concatenate([start + one.originals for one, start in zip(datasets, firsts, strict=False)]),
        held_out=[int(start) + n for one, start in zip(datasets, firsts, strict=False) for n in one.held_out],
        source=", ".join(sources),
        joined_from=sources,
        metadata=_metadata(datasets),
        skipped={f"{name}/{episode}": why for name, one in prefixed for episode, why in one.skipped.items()},
        decode_workers=first.decode_workers,
    )


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Frames):
        return Frames([*chain.from_iterable(part.clips for part in parts)], first.stored, first.resized_to)
    return JoinedArray(parts)


def _metadata(datasets: Sequence[Demonstrations]) -> Mapping[str, Any]:
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(chain.from_iterable(one.metadata for one in datasets)):
        values = [one.metadata[key] for one in datasets if one.metadata.get(key) is not None]
        distinct = _without_repetition(values)
        if key == "tasks" and all(isinstance(value, list) for value in values):
            joined[key] = _without_repetition([*chain.from_iterable(values)])
        elif key == "rate_hz":
            joined[key] = next(filter(None, map(stated_rate, values)), None)
        elif len(distinct) > 1:
            joined["envs" if key == "env" else key] = distinct
        else:
            joined[key] = next(iter(distinct), None)
    return joined


def _without_repetition(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
