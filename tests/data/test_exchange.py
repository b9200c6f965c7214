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
# What the gripper does in the five legs of an episode.
LEGS = [slice(leg * LEG, (leg + 1) * LEG) for leg in range(5)]
TO_FIRST, CARRIES_FIRST, TO_SECOND, CARRIES_SECOND, RETREATS = LEGS
AROUND = (0, 4)


def colour(place):
    return np.sin(place[..., 0]) + np.cos(place[..., 1])


def gantry(*, goals=APART_GOALS, episodes=EPISODES, leg=LEG, in_turn=False, seed=0):
    """Demonstrations, and (episodes, 2) which thing is put away first and which one second."""
    rng = np.random.default_rng(seed)
    states, actions, orders = [], [], []
    for _ in range(episodes):
        order = np.arange(2) if in_turn else rng.permutation(2)
        starts = np.stack([rng.uniform([-3, 1], [-1, 3]), rng.uniform([1, 1], [3, 3])])
        ends = goals + rng.uniform(-0.05, 0.05, (2, 2))
        stops = [
            rng.uniform(-1, 1, 2),
            *(where for thing in order for where in (starts[thing], ends[thing])),
            np.zeros(2),
        ]
        ease = (1 - np.cos(np.linspace(0, np.pi, leg + 1)))[:-1, None] / 2
        legs = [start + ease * (end - start) for start, end in itertools.pairwise(stops)]
        gripper = np.concatenate([*legs, stops[-1:]])
        things = np.repeat(starts[None], len(gripper), axis=0)
        for thing, begin in zip(order, (leg, 3 * leg), strict=True):
            things[begin : begin + leg, thing] = gripper[begin : begin + leg]
            things[begin + leg :, thing] = ends[thing]
        states.append(np.column_stack([gripper, things.reshape(len(gripper), 4), colour(things[:, 0])]))
        actions.append(np.diff(gripper, axis=0, append=gripper[-1:]) / 2)
        orders.append(order)
    return Demonstrations(
        observations={"state": np.concatenate(states).astype(np.float32)},
        actions=np.concatenate(actions).astype(np.float32),
        episode_ends=len(gripper) * np.arange(1, episodes + 1),
    ), np.stack(orders)


def found_in(demonstrations, episodes=None, around=AROUND):
    episodes = np.arange(demonstrations.num_episodes) if episodes is None else episodes
    corrections = find_corrections(demonstrations, episodes, ["state"], action_horizon=AROUND[1])
    return find_exchange(demonstrations, episodes, corrections, around)


def changed(demonstrations, states):
    """The same demonstrations with other states (episodes, steps, D), of a gripper that goes where it is seen."""
    actions = np.diff(states[..., GRIPPER], axis=1, append=states[:, -1:, GRIPPER]) / 2
    return dataclasses.replace(
        demonstrations,
        observations={"state": states.reshape(-1, states.shape[2]).astype(np.float32)},
        actions=actions.reshape(-1, 2).astype(np.float32),
        episode_ends=states.shape[1] * np.arange(1, len(states) + 1),
    )


def states_of(demonstrations):
    return demonstrations.observations["state"].reshape(demonstrations.num_episodes, -1, 7).copy()


def check_poses(exchange):
    """Each group holds where a thing was at the beginning, or where it was put."""
    assert len(exchange.poses) == 4
    for poses in exchange.poses:
        goal = APART_GOALS[[*map(len, exchange.places)].index(poses.shape[1])]
        assert (poses[:, 1] > 0.9).all() or (np.linalg.norm(poses[:, :2] - goal, axis=1) < 0.1).all()


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
    assert (second[:, : CARRIES_FIRST.stop - AROUND[1]] != STAYS).mean() > 0.9
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
    assert (second[:, TO_FIRST.start : TO_FIRST.stop - AROUND[1]] != STAYS).mean() > 0.9
    assert (first[:, TO_SECOND.stop - AROUND[1] - 4 : TO_SECOND.stop - AROUND[1]] != STAYS).mean() > 0.5


def test_what_a_thing_falls_onto_matters():
    """The gripper lets go of the thing that it stacks, and is far away when that comes to rest."""
    demonstrations, orders = gantry(goals=STACKED_GOALS, in_turn=True)
    states = states_of(demonstrations)
    states[:, CARRIES_SECOND.stop - 2 :, GRIPPER] += [0, 4]
    first, _ = by_turn(found_in(changed(demonstrations, states)), orders)
    assert (first[:, CARRIES_SECOND] == STAYS).all()


def test_a_thing_may_be_measured_from_elsewhere(made):
    """Its origin is not the gripper's."""
    demonstrations, _, exchange = made
    states = states_of(demonstrations)
    states[..., THINGS[1]] += [3, -5]
    found = found_in(changed(demonstrations, states))
    np.testing.assert_array_equal(found.groups, exchange.groups)


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
    """In half of the episodes, what is carried first stops for three steps; it has moved once all the same."""
    demonstrations, _, _ = made
    states = states_of(demonstrations)
    middle = CARRIES_FIRST.start + 8
    still = np.repeat(states[:, [middle]], 3, axis=1)
    still[::2] = states[::2, -1:]  # the others rest at the end
    parts = np.concatenate([states[1::2, :middle], still[1::2], states[1::2, middle:]], axis=1)
    states = np.concatenate([states, still], axis=1)
    states[1::2] = parts
    check_poses(found_in(changed(demonstrations, states)))


def test_a_nudge_does_not_count_as_a_motion(made):
    """In half of the episodes, the second thing is pushed a little by someone else while the gripper is on its way."""
    demonstrations, orders, _ = made
    states = states_of(demonstrations)
    for episode in range(0, EPISODES, 2):
        states[episode, 5 : CARRIES_SECOND.start, THINGS[orders[episode, 1]]] += 0.05
    check_poses(found_in(changed(demonstrations, states)))


def test_what_still_moves_at_the_end_rests_nowhere(made):
    demonstrations, orders, _ = made
    cut = found_in(changed(demonstrations, states_of(demonstrations)[:, : CARRIES_SECOND.stop - 3]))
    check_poses(cut)
    first, _ = by_turn(cut, orders)
    assert (first[:, CARRIES_SECOND.start + 2 :] != STAYS).mean() > 0.8


@pytest.mark.parametrize("around", [(0, 4), (3, 1), (2, 30)])
def test_a_thing_that_matters_anywhere_in_a_window_stays(made, around):
    demonstrations, _, _ = made
    stays = found_in(demonstrations, around=(0, 0)).groups.reshape(EPISODES, -1, 2) == STAYS
    found = found_in(demonstrations, around=around).groups.reshape(EPISODES, -1, 2) == STAYS
    assert 0 < stays.mean() < found.mean() < 1
    for step in range(stays.shape[1]):
        window = stays[:, max(step - around[0], 0) : step + around[1] + 1]
        np.testing.assert_array_equal(found[:, step], window.any(axis=1))


def test_jumps_between_short_episodes_are_no_moves():
    demonstrations, _ = gantry(episodes=60, leg=8)
    assert found_in(demonstrations).places == [[*THINGS[0], COLOUR], THINGS[1]]


def test_a_number_that_tells_of_two_things_forbids_it(made):
    demonstrations, _, _ = made
    states = states_of(demonstrations)
    between = states[..., THINGS[0]] - states[..., THINGS[1]]
    for telling in (between, np.linalg.norm(between, axis=-1, keepdims=True)):
        assert found_in(changed(demonstrations, np.concatenate([states, telling], axis=2))).places == []


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
    states = states_of(demonstrations)
    later = np.repeat(states[:, -1:], 230, axis=1)
    later[..., GRIPPER] += np.random.default_rng(1).normal(0, 0.1, (EPISODES, 230, 2)).cumsum(axis=1)
    exchange = found_in(changed(demonstrations, np.concatenate([states, later], axis=1)))
    assert exchange.places == [[*THINGS[0], COLOUR], THINGS[1]]
    first, _ = by_turn(exchange, orders)
    assert (first[:, : CARRIES_FIRST.stop] == STAYS).all()
