"""Like quantities are found by what they do, without names or units."""

from itertools import pairwise

import numpy as np
import pytest

from policy.data.demonstrations import Demonstrations
from policy.data.relations import find_relations

EPISODES, STEPS = 30, 40


def carried(seed=0):
    """A gripper walks at random; an object lies still until the middle of an episode, and then goes with it.

    The columns of `b`: the gripper's two coordinates, a joint that drives the first one, a constant. Of `a`: the
    object's two coordinates, a goal's first coordinate, noise.
    """
    rng = np.random.default_rng(seed)
    gripper = rng.normal(0, 0.02, (EPISODES, STEPS, 2)).cumsum(axis=1) + rng.uniform(-1, 1, (EPISODES, 1, 2))
    thing = np.maximum(np.arange(STEPS) - STEPS // 2, 0)
    place = gripper[:, STEPS // 2 + thing]
    goal = np.broadcast_to(place[:, -1:, :1] + rng.normal(0, 0.01, (EPISODES, 1, 1)), (EPISODES, STEPS, 1))
    noise = rng.normal(size=(EPISODES, STEPS, 1))
    joint = 3 * gripper[..., :1] + 0.02 * noise
    rows = EPISODES * STEPS
    return Demonstrations(
        observations={
            "b": np.concatenate([gripper, joint, np.ones_like(noise)], axis=2).reshape(rows, 4).astype(np.float32),
            "a": np.concatenate([place, goal, noise], axis=2).reshape(rows, 4).astype(np.float32),
        },
        actions=np.zeros((rows, 1), np.float32),
        episode_ends=STEPS * np.arange(1, EPISODES + 1, dtype=np.int64),
    )


def test_what_moves_together_and_what_ends_together_is_alike():
    # In the vector a, b: the object is 0 and 1, its goal 2, noise 3, the gripper 4 and 5, the joint 6.
    assert find_relations(carried(), ["b", "a"]).differences == ((0, 2), (0, 4), (1, 5), (2, 4))


def visits(seed=0):
    """A gripper drives, in a random order, to a handle, to a button and to a place that is drawn anew; then home.

    The columns: the gripper, the handle, the button's place doubled (another unit), a number of each episode.
    """
    rng = np.random.default_rng(seed)
    episodes, ends = [], []
    for _ in range(EPISODES):
        handle, button, own, away = rng.uniform(-1, 1, 4)
        stops = [rng.uniform(-1, 1), *rng.permutation([handle + 0.3, button, away]), -1.5]
        smooth = (1 - np.cos(np.linspace(0, np.pi, rng.integers(20, 40)))) / 2
        path = np.concatenate([a + (b - a) * smooth for a, b in pairwise(stops)])
        episodes.append(np.stack([path, *(np.full_like(path, value) for value in (handle, 2 * button, own))], axis=1))
        ends.append(len(path))
    return Demonstrations(
        observations={"state": np.concatenate(episodes).astype(np.float32)},
        actions=np.zeros((sum(ends), 1), np.float32),
        episode_ends=np.cumsum(ends),
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_number_that_stops_at_the_same_distance_from_a_place_meets_it(seed):
    assert find_relations(visits(seed), ["state"]).differences == ((0, 1),)


def test_unrelated_numbers_are_not_alike():
    rng = np.random.default_rng(0)
    walks = rng.normal(0, 0.02, (2_000, 6)).cumsum(axis=0).astype(np.float32)
    data = Demonstrations(
        observations={"state": walks},
        actions=np.zeros((2_000, 1), np.float32),
        episode_ends=np.arange(100, 2_001, 100, dtype=np.int64),
    )
    assert find_relations(data, ["state"]) == ((), ())


@pytest.mark.parametrize("steps", [1, 2])
def test_few_and_short_episodes_have_no_relations(steps):
    data = Demonstrations(
        observations={"state": np.arange(6 * steps, dtype=np.float32).reshape(2 * steps, 3)},
        actions=np.zeros((2 * steps, 1), np.float32),
        episode_ends=np.array([steps, 2 * steps]),
    )
    assert find_relations(data, ["state"]) == ((), ())


def test_a_number_that_is_there_twice_has_no_difference():
    numbers = np.random.default_rng(0).normal(size=(12, 1)).repeat(2, axis=1).astype(np.float32)
    data = Demonstrations(
        observations={"state": numbers}, actions=np.zeros((12, 1), np.float32), episode_ends=np.arange(1, 13)
    )
    assert find_relations(data, ["state"]) == ((), ())


def test_more_numbers_than_can_be_compared_are_refused():
    data = Demonstrations(
        observations={"state": np.zeros((4, 3_000), np.float32)},
        actions=np.zeros((4, 1), np.float32),
        episode_ends=np.array([2, 4]),
    )
    with pytest.raises(ValueError, match="has 3,000: choose some"):
        find_relations(data, ["state"])


def test_directions_that_turn_together_are_alike():
    """A gripper turns; a box turns with it from the middle of an episode on; a third direction turns by itself."""
    rng = np.random.default_rng(0)
    gripper = rng.normal(0, 0.1, (EPISODES, STEPS)).cumsum(axis=1) + rng.uniform(-3, 3, (EPISODES, 1))
    thing = np.maximum(np.arange(STEPS) - STEPS // 2, 0)
    box = gripper[:, STEPS // 2 + thing] + rng.integers(4, size=(EPISODES, 1)) * np.pi / 2
    other = rng.normal(0, 0.1, (EPISODES, STEPS)).cumsum(axis=1)
    angles = np.stack([gripper, other, box], axis=2).reshape(-1, 3)
    columns = [np.ones(len(angles))]  # a constant 1 and a sine beside it are no direction
    for angle in angles.T:
        columns += [np.sin(angle) * 0.5, np.cos(angle), np.sin(angle)]
    data = Demonstrations(
        observations={"state": np.stack(columns, axis=1).astype(np.float32)},
        actions=np.zeros((len(angles), 1), np.float32),
        episode_ends=STEPS * np.arange(1, EPISODES + 1, dtype=np.int64),
    )
    assert find_relations(data, ["state"]).direction_differences == ((2, 8),)
