"""What a robot holds, where it is known: a gripper that carries two things one after the other."""

import numpy as np
import pytest

from policy.data.demonstrations import Demonstrations
from policy.data.holding import NOTHING, UNKNOWN, Thing, held_at, moves_of, things_of
from policy.data.relations import Relations, find_relations

EPISODES, STEPS = 20, 80
# Places: the gripper's position, the cosine and sine of its yaw, its opening, which trembles; then two things.
GRIPPER, YAW, OPENING, FIRST, FIRST_YAW, SECOND = [0, 1], 2, 4, [5, 6], 7, [9, 10]
ROBOT = {*GRIPPER, YAW, YAW + 1}
FIRST_HELD, SECOND_HELD = slice(20, 40), slice(50, 70)


def scenes(seed=0):
    """(EPISODES, STEPS, 11); the first thing is turned while it is held, the second is not."""
    rng = np.random.default_rng(seed)
    shape = (EPISODES, STEPS)
    gripper = rng.normal(0, 0.03, (*shape, 2)).cumsum(axis=1)
    gripper[:, 25:30, 0] = gripper[:, 25:26, 0]  # straight up for a while: the first number of gripper and thing rests
    gripper[:, 30:, 0] += gripper[:, 25, None, 0] - gripper[:, 30, None, 0]
    yaw = rng.normal(0, 0.03, shape).cumsum(axis=1)
    yaw[:, SECOND_HELD] = yaw[:, [50]]
    yaw[:, 70:] += yaw[:, [50]] - yaw[:, [70]]
    opening = 0.5 + rng.normal(0, 0.001, shape)
    first = carried(gripper, FIRST_HELD) + rng.uniform(-1, 1, (EPISODES, 1, 2))
    turned = carried(yaw[..., None], FIRST_HELD)[..., 0] + rng.uniform(-3, 3, (EPISODES, 1))
    second = carried(gripper, SECOND_HELD) + rng.uniform(-1, 1, (EPISODES, 1, 2))
    columns = [gripper, np.cos(yaw), np.sin(yaw), opening, first, np.cos(turned), np.sin(turned), second]
    return np.concatenate([np.atleast_3d(each) for each in columns], axis=2)


def carried(robot, held):
    """How far something has been moved that goes with the robot in a part of each episode."""
    moves = np.diff(robot, axis=1, prepend=robot[:, :1])
    inside = np.zeros(robot.shape[1])
    inside[held.start + 1 : held.stop] = 1
    return (moves * inside[:, None]).cumsum(axis=1)


def demonstrations(scene):
    return Demonstrations(
        observations={"state": scene.reshape(-1, scene.shape[2]).astype(np.float32)},
        actions=np.zeros((EPISODES * STEPS, 1), np.float32),
        episode_ends=STEPS * np.arange(1, EPISODES + 1),
    )


@pytest.fixture(scope="module")
def things():
    return things_of(find_relations(demonstrations(scenes()), ["state"]), GRIPPER, [YAW], ROBOT)


def held(scene, things):
    numbers = scene.reshape(-1, scene.shape[2])
    found = held_at(numbers, moves_of(numbers, STEPS * np.arange(1, EPISODES + 1), ROBOT), things)
    return found.reshape(EPISODES, STEPS)


def test_things_are_what_goes_with_the_gripper(things):
    assert things == [
        Thing(numbers=FIRST, partners=GRIPPER, cosines=[FIRST_YAW], turned_by=[YAW]),
        Thing(numbers=SECOND, partners=GRIPPER, cosines=[], turned_by=[]),
    ]
    assert things[0].places == [*FIRST, FIRST_YAW, FIRST_YAW + 1]


def test_each_thing_is_held_while_it_goes_with_the_gripper(things):
    found = held(scenes(), things)
    inside = {1: slice(22, 38), 2: slice(52, 68)}
    assert (found[:, 22:38] == 1).mean() > 0.9
    assert (found[:, 52:68] == 2).mean() > 0.9
    for free in (slice(0, 18), slice(42, 48), slice(72, 80)):
        assert (found[:, free] == NOTHING).mean() > 0.9
    for thing, part in inside.items():
        assert {*np.unique(found[:, part])} <= {thing, UNKNOWN}


def test_a_thing_that_slips_is_not_held(things):
    scene = scenes()
    scene[:, 30:, FIRST[1]] += 0.5
    found = held(scene, things)
    assert (found[:, 29:31] == UNKNOWN).all()
    assert (found[:, 33:38] == 1).mean() > 0.9


def test_while_something_else_moves_it_is_not_known(things):
    scene = scenes()
    scene[:, 30:, SECOND[0]] += 0.5  # someone else moves the second thing while the robot holds the first one
    scene[:, 60:, OPENING] += 0.4  # and the gripper opens while the second one is held
    found = held(scene, things)
    assert (found[:, 29:31] == UNKNOWN).all()
    assert (found[:, 59:61] == UNKNOWN).all()


def test_the_order_of_their_coordinates_tells_things_apart():
    relations = Relations(differences=((0, 5), (0, 9), (1, 6), (1, 10), (5, 9)), direction_differences=())
    assert [thing.numbers for thing in things_of(relations, GRIPPER, [YAW], ROBOT)] == [FIRST, SECOND]
    assert things_of(Relations((), ()), GRIPPER, [YAW], ROBOT) == []


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_episodes_are_looked_at_as_well(steps):
    numbers = np.random.default_rng(0).normal(size=(4 * steps, 3))
    found = held_at(numbers, moves_of(numbers, steps * np.arange(1, 5), {0}), [Thing([1], [0], [], [])])
    assert len(found) == len(numbers)
    assert {*found.tolist()} <= {UNKNOWN, NOTHING, 1}
