"""Where things could as well be, in demonstrations of a gantry that puts two things away, in either order."""

import dataclasses
import itertools

import numpy as np
import pytest

from policy.data.corrections import find_corrections
from policy.data.demonstrations import Demonstrations
from policy.data.exchange import STAYS, find_exchange

EPISODES, LEG = 30, 15
# Places in the vector: the gripper, two things, and the colour that the first one has where it is.
GRIPPER, THINGS, COLOUR = [0, 1], ([2, 3], [4, 5]), 6
APART_GOALS = np.array([[2.0, -2.0], [-2.0, -2.0]])
STACKED_GOALS = np.array([[2.0, -2.0], [2.1, -1.9]])
# What the gripper does in the four legs of an episode.
TO_FIRST, CARRIES_FIRST, TO_SECOND, CARRIES_SECOND = (slice(leg * LEG, (leg + 1) * LEG) for leg in range(4))
HORIZONS = (1, 4)


def colour(place):
    return np.sin(place[..., 0]) + np.cos(place[..., 1])


def gantry(*, goals=APART_GOALS, episodes=EPISODES, in_turn=False, seed=0):
    """Demonstrations, and (episodes, 2) which thing is put away first and which one second."""
    rng = np.random.default_rng(seed)
    states, actions, orders = [], [], []
    for _ in range(episodes):
        order = np.arange(2) if in_turn else rng.permutation(2)
        starts = np.stack([rng.uniform([-3, 1], [-1, 3]), rng.uniform([1, 1], [3, 3])])
        ends = goals + rng.uniform(-0.05, 0.05, (2, 2))
        stops = [rng.uniform(-1, 1, 2), *(where for thing in order for where in (starts[thing], ends[thing]))]
        ease = (1 - np.cos(np.linspace(0, np.pi, LEG + 1)))[:-1, None] / 2
        legs = [start + ease * (end - start) for start, end in itertools.pairwise(stops)]
        gripper = np.concatenate([*legs, stops[-1:]])
        things = np.repeat(starts[None], len(gripper), axis=0)
        for thing, carries in zip(order, (CARRIES_FIRST, CARRIES_SECOND), strict=True):
            things[carries, thing] = gripper[carries]
            things[carries.stop :, thing] = ends[thing]
        states.append(np.column_stack([gripper, things.reshape(len(gripper), 4), colour(things[:, 0])]))
        actions.append(np.diff(gripper, axis=0, append=gripper[-1:]) / 2)
        orders.append(order)
    return Demonstrations(
        observations={"state": np.concatenate(states).astype(np.float32)},
        actions=np.concatenate(actions).astype(np.float32),
        episode_ends=len(gripper) * np.arange(1, episodes + 1),
    ), np.stack(orders)


def found_in(demonstrations, episodes=None):
    episodes = np.arange(demonstrations.num_episodes) if episodes is None else episodes
    corrections = find_corrections(demonstrations, episodes, ["state"], action_horizon=HORIZONS[1])
    return find_exchange(demonstrations, episodes, corrections, HORIZONS)


def by_turn(exchange, orders):
    """(episodes, steps) groups of the thing that is put away first, and of the other one."""
    groups = exchange.groups.reshape(len(orders), -1, 2)
    return [groups[np.arange(len(orders)), :, orders[:, turn]] for turn in range(2)]


@pytest.fixture(scope="module")
def made():
    demonstrations, orders = gantry()
    return demonstrations, orders, found_in(demonstrations)


def test_a_number_that_moves_with_a_thing_alone_belongs_to_it(made):
    assert made[2].places == [[*THINGS[0], COLOUR], THINGS[1]]


def test_a_thing_that_is_next_stays_and_the_other_one_may_be_elsewhere(made):
    _, orders, exchange = made
    first, second = by_turn(exchange, orders)
    assert (first[:, TO_FIRST] == STAYS).all()
    assert (first[:, CARRIES_FIRST] == STAYS).all()
    # Within a chunk of its own turn it matters; the gripper may pass by it, too.
    assert (second[:, : CARRIES_FIRST.stop - HORIZONS[1]] != STAYS).mean() > 0.9
    assert (second[:, TO_SECOND] == STAYS).all()
    assert (second[:, CARRIES_SECOND] == STAYS).all()
    # What was put away may be elsewhere once the gripper is gone.
    assert (first[:, TO_SECOND.stop - 5 : CARRIES_SECOND.stop] != STAYS).mean() > 0.8
    assert (first[:, TO_SECOND.start] == STAYS).all()


def test_it_may_be_where_others_had_it_that_had_moved_as_often(made):
    demonstrations, orders, exchange = made
    states = demonstrations.observations["state"].reshape(EPISODES, -1, 7)
    for thing, own in enumerate(exchange.places):
        groups = exchange.groups.reshape(EPISODES, -1, 2)[..., thing]
        before = np.unique(groups[orders[:, 1] == thing][:, TO_FIRST])
        after = np.unique(groups[orders[:, 0] == thing][:, CARRIES_SECOND])
        for found, step in ((before, 0), (after, -1)):
            (group,) = found[found != STAYS]
            poses = exchange.poses[group]
            assert len(poses) == EPISODES
            np.testing.assert_array_equal(poses, states[:, step, own])


def test_what_a_thing_is_put_onto_matters(made):
    demonstrations, orders = gantry(goals=STACKED_GOALS, in_turn=True)
    first, second = by_turn(found_in(demonstrations), orders)
    assert (first[:, CARRIES_SECOND] == STAYS).all()
    assert (second[:, TO_FIRST.start : TO_FIRST.stop - HORIZONS[1]] != STAYS).mean() > 0.9
    assert (first[:, TO_SECOND.stop - HORIZONS[1] - 4 : TO_SECOND.stop - HORIZONS[1]] != STAYS).mean() > 0.5


def test_poses_are_of_the_given_episodes_alone():
    demonstrations, _ = gantry()
    exchange = found_in(demonstrations, np.arange(5, 25))
    groups = exchange.groups.reshape(EPISODES, -1, 2)
    assert {len(poses) for poses in exchange.poses} == {20}
    assert (groups[:5] == STAYS).all()
    assert (groups[25:] == STAYS).all()
    assert (groups[5:25] != STAYS).any()


def test_a_few_demonstrations_have_too_few_poses():
    demonstrations, _ = gantry(episodes=12)
    assert found_in(demonstrations).poses
    few = found_in(demonstrations, np.arange(9))
    assert few.poses == []
    assert (few.groups == STAYS).all()


def test_a_pause_is_part_of_a_motion(made):
    """The thing that is carried stops for three steps; it has moved once all the same."""
    demonstrations, orders, exchange = made
    states = demonstrations.observations["state"].reshape(EPISODES, -1, 7).copy()
    middle = CARRIES_FIRST.start + 8
    paused = np.concatenate([states[:, :middle], np.repeat(states[:, [middle]], 3, axis=1), states[:, middle:]], axis=1)
    actions = np.diff(paused[..., :2], axis=1, append=paused[:, -1:, :2]) / 2
    slower = Demonstrations(
        observations={"state": paused.reshape(-1, 7)},
        actions=actions.reshape(-1, 2),
        episode_ends=paused.shape[1] * np.arange(1, EPISODES + 1),
    )
    again = found_in(slower)
    assert len(again.poses) == len(exchange.poses)
    first, _ = by_turn(again, orders)
    assert (first[:, CARRIES_FIRST.start : CARRIES_FIRST.stop + 3] == STAYS).all()


def test_nothing_is_exchanged_where_there_is_one_thing_or_an_observation_tells_where_they_were(made):
    demonstrations, _, _ = made
    state = demonstrations.observations["state"]
    alone = dataclasses.replace(demonstrations, observations={"state": state[:, :4]})
    telling = np.column_stack([state, state[:, GRIPPER] - state[:, THINGS[0]]])
    told = dataclasses.replace(demonstrations, observations={"state": telling})
    for seen in (alone, told):
        exchange = found_in(seen)
        assert exchange.places == []
        assert exchange.groups.shape == (len(state), 0)


def test_a_thing_that_is_moved_soon_is_known_to_move():
    """The gripper wanders about for long afterwards: the first motion begins in the first tenth of the episode."""
    demonstrations, orders = gantry(in_turn=True)
    states = demonstrations.observations["state"].reshape(EPISODES, -1, 7)
    rng = np.random.default_rng(1)
    wander = rng.normal(0, 0.1, (EPISODES, 230, 2)).cumsum(axis=1)
    later = np.repeat(states[:, -1:], 230, axis=1)
    later[..., GRIPPER] += wander.astype(np.float32)
    long = np.concatenate([states, later], axis=1)
    actions = np.diff(long[..., :2], axis=1, append=long[:, -1:, :2]) / 2
    exchange = found_in(
        Demonstrations(
            observations={"state": long.reshape(-1, 7)},
            actions=actions.reshape(-1, 2),
            episode_ends=long.shape[1] * np.arange(1, EPISODES + 1),
        )
    )
    assert exchange.places == [[*THINGS[0], COLOUR], THINGS[1]]
    first, _ = by_turn(exchange, orders)
    assert (first[:, : CARRIES_FIRST.stop] == STAYS).all()
