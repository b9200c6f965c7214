"""What `recipe=auto` needs of demonstrations, and what they allow a recipe to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.data.corrections import find_corrections
from policy.data.demonstrations import Demonstrations
from policy.data.relations import Relations, find_relations, state_vectors
from policy.data.windows import split_episodes
from policy.recipe.candidates import Allowed, Policy
from policy.statistics.fit import FEWEST_EPISODES
from policy.training.settings import TrainSettings

# Fewer episodes than this are too few to hold some out.
LEAST_DEMONSTRATIONS = 10
LEAST_HELD_OUT = 2


def check_data(dataset: Demonstrations, train: TrainSettings, seed: int) -> None:
    """Check that there are demonstrations enough to compare recipes.

    Raises:
        ValueError: too few, or too few of them are held out; the message says what to do.
    """
    count = dataset.num_originals
    if count < LEAST_DEMONSTRATIONS:
        raise ValueError(
            f"recipe=auto compares recipes on held-out episodes, and {dataset.source} has only {count}: give"
            f" {LEAST_DEMONSTRATIONS} or more, or leave recipe= out"
        )
    if (dataset.actions[:] == dataset.actions[0]).all():
        raise ValueError(
            f"recipe=auto compares errors in standard deviations of the actions, and those of {dataset.source} never"
            " change: leave recipe= out"
        )
    held_out = len(split_episodes(dataset.originals, train.val_fraction, seed, dataset.held_out)[1])
    if held_out < LEAST_HELD_OUT:
        by_file, subset = (
            (" by the file", "dataset.subset=..., which sets none aside, and ") if dataset.held_out else ("", "")
        )
        enough = max(0.1, math.ceil(100 * FEWEST_EPISODES / count) / 100)
        raise ValueError(
            f"recipe=auto compares recipes on held-out episodes, and of {count} episodes {held_out or 'none'} is held"
            f" out{by_file}: give {subset}train.val_fraction={enough:.2g}"
        )


def allowed_by(
    dataset: Demonstrations, policy: Policy, auxiliary: Sequence[str], action_horizon: int, training: NDArray[np.int64]
) -> Allowed:
    """Find out what the demonstrations allow a recipe to do.

    Args:
        dataset: the demonstrations.
        policy: the user's settings of the policy; one with relations of the user's own gets no others.
        auxiliary: keys of privileged observations.
        action_horizon: control steps in a chunk.
        training: numbers of the training episodes.
    """
    relations: Mapping[str, Any] = {}
    if not any(policy.get(name) for name in Relations._fields):
        with suppress(ValueError):  # too many numbers to compare
            found = find_relations(dataset, state_vectors(dataset, auxiliary))
            relations = found._asdict() if any(found) else {}
    if auxiliary:  # noise may not be where these are
        return Allowed(relations=relations, corrections=False)
    corrections = False
    with suppress(ValueError):  # no action is a displacement, or there are pictures
        find_corrections(dataset, training, dataset.observations, action_horizon)
        corrections = True
    return Allowed(relations=relations, corrections=corrections)
