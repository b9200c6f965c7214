"""What an action moves, found in demonstrations of an arm whose kinematics are known."""

import dataclasses

import numpy as np
import pytest

from policy.data.carrying import find_carried
from policy.data.corrections import find_corrections
from policy.data.demonstrations import Demonstrations

GAINS = (0.6, 1.5)
# Places in the vector: two joints, the hand's position, the cosine and sine of its yaw, two velocities, an object, and
# where the hand is from it.
JOINTS, HAND, COSINE, VELOCITIES, OBJECT, APART, WIDTH = [0, 1], [2, 3], 4, [6, 7], [8, 9], [10, 11], 12


def kinematics(joints):
    """Position (..., 2) and yaw (...,) of the hand of a planar arm with links of length 1 and 0.7."""
    first, second = joints[..., 0], joints[..., 0] + joints[..., 1]
    place = np.stack([np.cos(first) + 0.7 * np.cos(second), np.sin(first) + 0.7 * np.sin(second)], axis=-1)
    return place, second


def arm(*, episodes=30, steps=60, gains=GAINS, seed=0):
    """An arm that wanders; in the last third of each episode it carries the object along."""
    rng = np.random.default_rng(seed)
    observations, actions = [], []
    for _ in range(episodes):
        waves = rng.uniform(0.1, 0.4, 3) * np.arange(steps)[:, None] + rng.uniform(0, 7, 3)
        action = 0.15 * np.sin(waves) + rng.normal(0, 0.01, (steps, 3))
        joints = rng.uniform(-1, 1, 2) + np.cumsum(
            np.vstack([np.zeros(2), action[:-1, :2] * gains + rng.normal(0, 1e-3, (steps - 1, 2))]), axis=0
        )
        place, yaw = kinematics(joints)
        held = np.arange(steps) >= 2 * steps // 3
        thing = np.where(held[:, None], place - place[2 * steps // 3], 0) + rng.uniform(-1, 1, 2)
        velocities = rng.normal(size=(steps, 2))
        observations.append(
            np.column_stack([joints, place, np.cos(yaw), np.sin(yaw), velocities, thing, place - thing])
        )
        actions.append(action)
    return Demonstrations(
        observations={"state": np.concatenate(observations).astype(np.float32)},
        actions=np.concatenate(actions).astype(np.float32),
        episode_ends=steps * np.arange(1, episodes + 1),
    )


def armed(seed=0):
    """The same arm, whose velocities are observed, and a hand that its third action opens until it is blocked."""
    plain = arm(seed=seed)
    state, actions = plain.observations["state"].copy(), plain.actions.copy()
    joints = state[:, JOINTS].reshape(30, 60, 2)
    state[:, VELOCITIES] = 10 * np.diff(joints, axis=1, prepend=joints[:, :1]).reshape(-1, 2)
    opening = np.zeros((30, 60))
    for step in range(1, 60):
        opening[:, step] = np.clip(opening[:, step - 1] + 2 * actions.reshape(30, 60, 3)[:, step - 1, 2], 0, 0.3)
    state = np.column_stack([state, opening.reshape(-1)]).astype(np.float32)
    return dataclasses.replace(plain, observations={"state": state})


@pytest.fixture(scope="module")
def demonstrations():
    return arm()


@pytest.fixture(scope="module")
def found(demonstrations):
    return find_corrections(demonstrations, np.arange(28), ["state"], action_horizon=8)


def test_the_joints_follow_the_action_and_nothing_else_does(found):
    assert [(one.number, one.action) for one in found.followed] == [(0, 0), (1, 1)]
    np.testing.assert_allclose([one.gain for one in found.followed], GAINS, rtol=0.01)


def test_the_reach_is_what_a_joint_moves_within_a_chunk(found, demonstrations):
    joints = demonstrations.observations["state"].reshape(30, 60, -1)[:28, :, :2]
    moved = (joints[:, 8:] - joints[:, :-8]).reshape(-1, 2).std(axis=0)
    np.testing.assert_allclose([one.reach for one in found.followed], moved, rtol=0.1)


def test_the_hand_is_carried_by_the_joints_and_its_yaw_turns_with_both(found):
    assert list(found.carried.numbers) == HAND
    assert list(found.carried.cosines) == [COSINE]
    np.testing.assert_allclose(found.carried.turns, [[1], [1]], atol=0.01)


def test_where_the_hand_is_from_the_object_changes_with_the_hand(found):
    assert list(found.carried.apart) == APART
    moved = np.array([[0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -0.2]])  # of the joints and the hand
    np.testing.assert_allclose(moved @ found.carried.slopes, moved[:, 2:], atol=0.02)


def test_the_object_is_held_where_it_goes_with_the_hand(found):
    (thing,) = found.things
    assert (list(thing.numbers), list(thing.partners)) == (OBJECT, HAND)
    held = found.held.reshape(30, 60)
    assert (held[:, :39] == 0).all()
    assert (held[:, 42:] == 1).mean() > 0.95
    assert not found.parted.any()  # where the hand is from the object does not change while it is held


def test_velocities_and_what_an_action_drives_are_blurred(found):
    assert found.blurred == []  # the arm's own are noise, and its third action moves nothing
    seen = armed()
    blurred = find_corrections(seen, np.arange(30), ["state"], action_horizon=8).blurred
    assert [one.number for one in blurred] == [*VELOCITIES, WIDTH]
    values = seen.observations["state"][:, [*VELOCITIES, WIDTH]]
    np.testing.assert_allclose([one.noise for one in blurred], values.std(axis=0) * [1, 1, 0.3], rtol=0.03)
    assert (blurred[2].low, blurred[2].high) == (0, pytest.approx(0.3))
    twice = dataclasses.replace(seen, actions=np.hstack([seen.actions, seen.actions[:, 2:]]))  # one for each finger
    assert find_corrections(twice, np.arange(30), ["state"], action_horizon=8).blurred == blurred


@pytest.mark.parametrize(("share", "is_hand"), [(0.09, True), (0.07, True), (0.02, False)])
def test_a_hand_that_only_settles_as_an_episode_begins_is_one_all_the_same(share, is_hand):
    """A thing on a table settles, too, by less of what is usual for it."""
    seen = armed()
    opening = seen.observations["state"][:, WIDTH].reshape(30, 60)
    opening = np.where(np.arange(60) < 14, opening[:, 14:15], opening)
    usual = np.sqrt(np.square(np.diff(opening)).mean())
    opening[:, 0] -= share * usual
    state = seen.observations["state"].copy()
    state[:, WIDTH] = opening.reshape(-1)
    seen = dataclasses.replace(seen, observations={"state": state})
    blurred = find_corrections(seen, np.arange(30), ["state"], action_horizon=8).blurred
    assert (WIDTH in [one.number for one in blurred]) is is_hand


def test_a_hand_that_only_ever_closes_is_blurred():
    """As with OCBench's switches: there is no other direction to tell it from."""
    seen = armed()
    actions = seen.actions.copy()
    actions[:, 2] = np.where(np.arange(60) < 12, 0.15, 0.01)[None].repeat(30, 0).reshape(-1)
    lagging = actions[:, 2].reshape(30, 60) * np.random.default_rng(0).uniform(0, 4, (30, 60))
    opening = np.minimum(np.cumsum(lagging, axis=1), 1.5)
    state = seen.observations["state"].copy()
    state[:, WIDTH] = opening.reshape(-1)
    closing = dataclasses.replace(seen, observations={"state": state}, actions=actions)
    found = find_corrections(closing, np.arange(30), ["state"], action_horizon=8)
    assert WIDTH in {*(one.number for one in found.blurred)}


def test_what_an_action_moves_now_and_then_without_showing_its_direction_is_not_blurred_in_place_of_the_hand():
    """A button that is pressed goes exactly as the hand does, and its place tells nothing of where the hand goes."""
    rng, seen = np.random.default_rng(0), armed()
    pressed = np.where(rng.random((30, 60)) < 0.1, 0.4 * seen.actions[:, 2].reshape(30, 60), 0)
    button = rng.uniform(-1, 1, (30, 1)) + np.cumsum(np.roll(pressed, 1, axis=1), axis=1)
    state = np.column_stack([seen.observations["state"], button.reshape(-1)]).astype(np.float32)
    seen = dataclasses.replace(seen, observations={"state": state})
    blurred = find_corrections(seen, np.arange(30), ["state"], action_horizon=8).blurred
    assert [one.number for one in blurred] == [*VELOCITIES, WIDTH]


@pytest.mark.parametrize(("end", "follows"), [(2, True), (1.2, True), (0.4, False)])
def test_a_joint_follows_its_action_although_it_is_now_and_then_at_an_end_of_its_range(end, follows):
    seen = arm(gains=(0.6, 1.5))
    moved = 2 * seen.actions[:, 2].reshape(30, 60)
    wrist = np.zeros((30, 60))
    for step in range(1, 60):
        wrist[:, step] = np.clip(wrist[:, step - 1] + moved[:, step - 1], -end, end)
    stays = (np.diff(wrist) == 0).mean()
    assert 0.05 < stays < 0.25 if follows else stays > 0.4
    state = np.column_stack([seen.observations["state"], wrist.reshape(-1)]).astype(np.float32)
    seen = dataclasses.replace(seen, observations={"state": state})
    found = find_corrections(seen, np.arange(30), ["state"], action_horizon=8)
    gains = {one.number: one.gain for one in found.followed}
    assert gains.get(WIDTH) == (pytest.approx(2, rel=0.02) if follows else None)
    assert (WIDTH in [one.number for one in found.blurred]) is not follows


def test_a_goal_a_constant_and_how_far_a_goal_is_are_no_velocities():
    """A robot that goes straight to its goal moves in proportion to it, and to how far it still is."""
    rng = np.random.default_rng(0)
    goals = rng.uniform(0.5, 1, (30, 1)) * rng.choice([-1, 1], (30, 1))
    places = goals * (1 - 0.9 ** np.arange(41))
    sensed = goals - places + rng.normal(0, 0.02, places.shape)
    columns = [places, np.broadcast_to(goals, places.shape), sensed, np.full(places.shape, 9.81)]
    moves = np.diff(places, axis=1)
    seen = Demonstrations(
        observations={"state": np.stack(columns, axis=2)[:, :40].reshape(-1, 4).astype(np.float32)},
        actions=moves.reshape(-1, 1).astype(np.float32),
        episode_ends=40 * np.arange(1, 31),
    )
    found = find_corrections(seen, np.arange(30), ["state"], action_horizon=8)
    assert [one.number for one in found.followed] == [0]
    assert found.blurred == []


def test_an_arm_that_lags_and_what_it_carries_are_not_blurred():
    plain = arm()
    rng = np.random.default_rng(1)
    actions = plain.actions.reshape(30, 60, 3)
    hand = np.zeros((30, 60))
    for step in range(1, 60):  # half of the way in the first step, the rest later
        hand[:, step] = hand[:, step - 1] + 0.5 * actions[:, step - 1, 2] + 0.5 * actions[:, max(step - 4, 0), 2]
    thing = np.where(np.arange(60) < 40, hand[:, 40:41], hand) + rng.uniform(-1, 1, (30, 1))
    state = np.column_stack([plain.observations["state"], hand.reshape(-1), thing.reshape(-1)]).astype(np.float32)
    seen = dataclasses.replace(plain, observations={"state": state})
    assert find_corrections(seen, np.arange(30), ["state"], action_horizon=8).blurred == []


def test_a_clock_does_not_follow_an_action_that_never_changes(demonstrations):
    """A gripper that is always open: the noise would be divided by how much the clock's steps differ."""
    starts = np.repeat(demonstrations.episode_starts, np.diff(demonstrations.episode_ends, prepend=0))
    clock = ((np.arange(len(demonstrations.actions)) - starts) / 60).astype(np.float32)[:, None]
    state = np.concatenate([demonstrations.observations["state"], clock], axis=1)
    actions = np.concatenate([demonstrations.actions, np.ones_like(clock)], axis=1)
    timed = dataclasses.replace(demonstrations, observations={"state": state}, actions=actions)
    episodes = np.arange(timed.num_episodes)
    plain, beside = (find_corrections(data, episodes, ["state"], 8) for data in (demonstrations, timed))
    assert [one.number for one in beside.followed] == [one.number for one in plain.followed]


def test_an_action_that_names_a_place_needs_no_correction(demonstrations):
    places = demonstrations.observations["state"][:, :2]
    absolute = Demonstrations(
        observations=demonstrations.observations,
        actions=np.vstack([places[1:], places[-1:]]),
        episode_ends=demonstrations.episode_ends,
    )
    with pytest.raises(ValueError, match=r"change by a constant times a number of the action.*use encoder\.noise"):
        find_corrections(absolute, np.arange(30), ["state"], action_horizon=8)


def test_pictures_would_show_the_robot_where_it_was(demonstrations):
    pictures = Demonstrations(
        observations={**demonstrations.observations, "front": np.zeros((1800, 2, 2, 3), np.uint8)},
        actions=demonstrations.actions,
        episode_ends=demonstrations.episode_ends,
    )
    with pytest.raises(ValueError, match=r"the pictures \['front'\] would show what was there: leave these"):
        find_corrections(pictures, np.arange(30), ["state", "front"], action_horizon=8)
    assert find_corrections(pictures, np.arange(30), ["state"], action_horizon=8).followed


def test_contacts_in_a_few_transitions_do_not_hide_what_follows():
    touched = arm()
    state = touched.observations["state"]
    rng = np.random.default_rng(1)
    state[rng.choice(len(state), len(state) // 40, replace=False), 0] += 0.3
    found = find_corrections(touched, np.arange(30), ["state"], action_horizon=8)
    assert (0, 0) in [(one.number, one.action) for one in found.followed]


def test_episodes_of_one_transition_are_refused_in_the_usual_sentence(demonstrations):
    short = dataclasses.replace(demonstrations, episode_ends=np.arange(1, 1 + len(demonstrations.actions)))
    with pytest.raises(ValueError, match="there are none in these demonstrations"):
        find_corrections(short, np.arange(30), ["state"], action_horizon=8)


def test_a_number_follows_one_action_where_two_are_alike(demonstrations):
    first = demonstrations.actions[:, :1]
    noisy = first + np.random.default_rng(0).normal(0, 0.02, first.shape).astype(np.float32)
    for actions in ([first, noisy], [noisy, first]):
        alike = dataclasses.replace(demonstrations, actions=np.hstack([*actions, demonstrations.actions[:, 1:]]))
        found = find_corrections(alike, np.arange(30), ["state"], action_horizon=8)
        exact = next(place for place, one in enumerate(actions) if one is first)
        assert [(one.number, one.action) for one in found.followed] == [(0, exact), (1, 2)]


@pytest.mark.parametrize("episodes", [[0, 1], [3]])
def test_a_goal_of_a_few_episodes_is_not_carried(demonstrations, episodes):
    """Within an episode, where the robot is tells the goal, too."""
    goals = np.repeat(np.random.default_rng(0).uniform(-1, 1, (30, 2)), 60, axis=0).astype(np.float32)
    state = np.hstack([demonstrations.observations["state"], goals])
    seen = dataclasses.replace(demonstrations, observations={"state": state})
    with np.errstate(all="raise"):
        carried = find_corrections(seen, np.array(episodes), ["state"], action_horizon=8).carried
    assert list(carried.numbers) == HAND
    assert list(carried.apart) == APART


def test_what_rests_early_moves_nothing_along():
    """In Meta-World's hammer, two carried numbers had slopes of 1e289: the robot, shown elsewhere, was nan."""
    rng = np.random.default_rng(0)
    first = np.linspace(-1, 1, 40) + rng.normal(0, 0.02, (20, 40))
    other = np.cumsum(rng.normal(0, 0.05, (20, 40)), axis=1)
    goal = np.repeat(rng.uniform(-1, 1, (20, 1)), 40, axis=1)
    rests = np.maximum(first, 0)
    trembles = rests + rng.normal(0, 1e-9, rests.shape)
    numbers = np.dstack([first, other, rests, rests, trembles, first - other, first - 2 * other - goal])
    early = np.repeat((np.arange(39) < 8)[None], 20, axis=0).ravel()
    now, change = numbers[:, :-1].reshape(-1, 7), np.diff(numbers, axis=1).reshape(-1, 7)
    found = find_carried(now, change, early, np.repeat(np.arange(20), 39), [0, 1])
    assert (list(found.numbers), list(found.apart)) == ([2, 3, 4, 5], [6])
    assert not found.slopes[2:5].any()
    moved = np.array([[0.1, 0.2, 0.1, 0.1, 0.1, -0.1]])
    np.testing.assert_allclose(moved @ found.slopes, [[-0.3]], atol=1e-9)
