"""Push-T: features that agree with pymunk's geometry, exact states, the upstream reward."""

import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs import pusht_geometry

gym_pusht = pytest.importorskip("gym_pusht.envs", reason="pip install 'ddim-policy[pusht]'")
pymunk = pytest.importorskip("pymunk", reason="pip install 'ddim-policy[pusht]'")
Upstream = gym_pusht.PushTEnv


def random_states(count, seed=0):
    generator = np.random.default_rng(seed)
    low, high = [50, 50, 120, 120, -2 * np.pi], [450, 450, 390, 390, 4 * np.pi]
    return generator.uniform(low, high, size=(count, 5))


def push(env, seed, steps=60):
    """Push towards random targets near the block; return observations and rewards."""
    generator = np.random.default_rng(seed)
    observations, rewards = [], []
    block = np.array([256.0, 256.0])
    for _ in range(steps):
        observation, reward, *_ = env.step((block + generator.uniform(-90, 90, 2)).astype(np.float32))
        block = observation[2:4]
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


def test_corners_are_the_shapes_vertices_in_the_world():
    upstream = Upstream(obs_type="state")
    upstream.reset(seed=0)
    for state in random_states(50):
        upstream.block.angle = float(state[4])
        upstream.block.position = state[2:4].tolist()
        corners = [
            upstream.block.local_to_world(vertex) for shape in upstream._block_shapes for vertex in shape.get_vertices()
        ]
        features = envs.pusht_features(state)
        np.testing.assert_allclose(features[6:22], np.array(corners).ravel(), atol=1e-3)
        np.testing.assert_allclose(features[4:6], [np.cos(state[4]), np.sin(state[4])], atol=1e-6)
        np.testing.assert_allclose(features[:4], state[:4], atol=1e-4)


def test_features_equal_gym_pushts_keypoints():
    upstream = Upstream(obs_type="environment_state_agent_pos")
    observation, _ = upstream.reset(seed=4)
    ours, _ = envs.make("pusht").reset(seed=4)
    np.testing.assert_allclose(ours[6:22], observation["environment_state"], atol=1e-3)
    np.testing.assert_allclose(ours[:2], observation["agent_pos"], atol=1e-4)


def test_features_say_how_far_the_block_is_from_the_target():
    on_target = envs.pusht_features([100, 100, 256, 256, np.pi / 4])
    np.testing.assert_allclose(on_target[22:38], 0, atol=1e-5)
    shifted = envs.pusht_features([100, 100, 256 + 3, 256 - 6, np.pi / 4])[22:38].reshape(8, 2)
    np.testing.assert_allclose(shifted, np.tanh([[0.1, -0.2]] * 8), atol=1e-5)
    upstream = Upstream()
    upstream.reset(seed=0)
    np.testing.assert_allclose(upstream.goal_pose, pusht_geometry.TARGET_POSE)


def test_features_say_where_the_agent_is_for_the_block():
    upstream = Upstream()
    upstream.reset(seed=0)
    for state in random_states(20):
        upstream.block.angle = float(state[4])
        upstream.block.position = state[2:4].tolist()
        seen = np.array(upstream.block.world_to_local(state[:2].tolist()))
        np.testing.assert_allclose(envs.pusht_features(state)[38:], np.clip(seen, -200, 200), atol=1e-3)


def test_features_take_any_leading_axes():
    states = random_states(12)
    batched = envs.pusht_features(states.reshape(3, 4, 5))
    assert batched.shape == (3, 4, 40)
    assert batched.dtype == np.float32
    one_by_one = np.stack([envs.pusht_features(state) for state in states])
    np.testing.assert_array_equal(batched.reshape(12, 40), one_by_one)


def test_features_do_not_jump_at_a_full_turn():
    state = random_states(1)[0]
    turned = state + np.array([0, 0, 0, 0, 2 * np.pi])
    np.testing.assert_allclose(envs.pusht_features(state), envs.pusht_features(turned), atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (2, 6), ()])
def test_features_refuse_another_width(shape):
    with pytest.raises(ValueError, match="got shape"):
        envs.pusht_features(np.zeros(shape))


def test_a_seed_means_one_episode_whatever_happened_before():
    fresh, used = envs.make("pusht"), envs.make("pusht")
    used.reset(seed=8)
    push(used, seed=1)
    used.unwrapped.set_state([100, 100, 250, 250, 1.0])
    push(used, seed=2, steps=10)
    np.testing.assert_array_equal(used.reset(seed=5)[0], fresh.reset(seed=5)[0])
    for ours, theirs in zip(push(used, seed=3), push(fresh, seed=3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(fresh.reset(seed=6)[0], fresh.reset(seed=7)[0])


def test_unseeded_resets_follow_from_the_last_seed():
    env = envs.make("pusht")
    env.reset(seed=1)
    first, second = env.reset()[0], env.reset()[0]
    env.reset(seed=1)
    np.testing.assert_array_equal(env.reset()[0], first)
    assert not np.array_equal(first, second)


def test_initial_states_and_rewards_are_gym_pushts():
    env, upstream = envs.make("pusht"), Upstream(obs_type="state")
    for seed in range(5):
        ours, _ = env.reset(seed=seed)
        theirs, _ = upstream.reset(seed=seed)
        np.testing.assert_array_equal(ours, envs.pusht_features(theirs))
        for target in np.random.default_rng(seed).uniform(50, 450, size=(40, 2)).astype(np.float32):
            ours, reward, terminated, _, info = env.step(target)
            theirs, expected, expected_terminated, _, _ = upstream.step(target.astype(np.float64))
            np.testing.assert_array_equal(ours, envs.pusht_features(theirs))
            assert terminated == expected_terminated
            assert reward == pytest.approx(expected, abs=1e-12)  # the last bit of upstream's varies
            assert info["score"] == reward


def test_set_state_is_exact_and_repeatable():
    env = envs.make("pusht")
    for state in random_states(20, seed=1):
        observation, info = env.unwrapped.set_state(state)
        np.testing.assert_allclose(observation, envs.pusht_features(state), atol=1e-3)
        assert 0.0 <= info["score"] <= 1.0
    state = [150.0, 300.0, 256.0, 256.0, 0.5]
    env.unwrapped.set_state(state)
    first = push(env, seed=0)
    env.unwrapped.set_state(state)
    for ours, theirs in zip(push(env, seed=0), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="five finite numbers"):
        env.unwrapped.set_state([1.0, 2.0, 3.0])


def test_the_goal_pose_is_success_and_terminates():
    env = envs.make("pusht")
    _, info = env.unwrapped.set_state([50.0, 50.0, 256.0, 256.0, np.pi / 4])
    assert info["is_success"] is False  # success belongs to control steps
    assert info["score"] == 1.0
    _, reward, terminated, truncated, info = env.step(np.array([50.0, 50.0], np.float32))
    assert (terminated, truncated) == (True, False)
    assert info["is_success"] is True
    assert reward == info["score"] == 1.0


def test_truncates_after_300_steps():
    env = envs.make("pusht")
    env.unwrapped.set_state([60.0, 60.0, 350.0, 350.0, 0.0])
    for step in range(1, 301):
        _, _, terminated, truncated, info = env.step(np.array([60.0, 60.0], np.float32))
        assert (terminated, truncated) == (False, step == 300)
    assert info["is_success"] is False
    assert env.metadata["render_fps"] == Upstream.metadata["render_fps"]


def test_draws_a_frame():
    env = envs.make("pusht", render_mode="rgb_array", image_size=96)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (96, 96, 3)
    assert frame.dtype == np.uint8
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 3


def test_a_missing_extra_ends_in_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(envs.MissingExtraError, match=r"pip install 'ddim-policy\[pusht\]'$"):
        envs.make("pusht")


def test_a_pymunk_that_is_too_new_ends_in_its_pin(monkeypatch):
    monkeypatch.setattr(pymunk, "version", "7.0.1")
    with pytest.raises(envs.MissingExtraError, match="pip install 'pymunk<7'"):
        envs.make("pusht")


@pytest.mark.parametrize("action", [np.full(2, np.nan), np.zeros(3), np.zeros((1, 2))])
def test_an_action_that_is_not_two_finite_numbers_is_refused(action):
    env = envs.make("pusht")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="An action is 2 finite numbers"):
        env.step(action)


KINDS = ["features", "keypoints", "keypoints_agent_pos", "corners", "image"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gymnasiums_own_checker_accepts_every_observation(kind):
    env = envs.make("pusht", observation=kind)
    check_env(env, skip_render_check=True, skip_close_check=True)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert [*env.unwrapped.observation_spaces] == KINDS


def test_an_unknown_observation_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'keypoints'"):
        envs.make("pusht", observation="keypoint")


def test_every_observation_is_of_the_same_physics():
    features, keypoints, image = (envs.make("pusht", observation=kind) for kind in ("features", "keypoints", "image"))
    for state in random_states(5):
        described, pointed, seen = (env.unwrapped.set_state(state)[0] for env in (features, keypoints, image))
        for target in np.random.default_rng(1).uniform(100, 400, size=(10, 2)).astype(np.float32):
            np.testing.assert_array_equal(pointed["agent_pos"], described[:2])
            np.testing.assert_array_equal(seen["agent_pos"], described[:2])
            pose = [*described[:4], np.arctan2(described[5], described[4])]
            np.testing.assert_allclose(pointed["keypoint"], envs.pusht_keypoints(pose), atol=1e-3)
            described, pointed, seen = (env.step(target)[0] for env in (features, keypoints, image))


def test_one_vector_holds_the_keypoints_and_then_the_finger():
    apart, joined = (envs.make("pusht", observation=kind) for kind in ("keypoints", "keypoints_agent_pos"))
    seen, state = apart.reset(seed=3)[0], joined.reset(seed=3)[0]
    np.testing.assert_array_equal(state, [*seen["keypoint"], *seen["agent_pos"]])


def test_the_picture_is_gym_pushts_own():
    upstream, env = Upstream(obs_type="pixels_agent_pos"), envs.make("pusht", observation="image")
    ours, theirs = env.reset(seed=5)[0], upstream.reset(seed=5)[0]
    for target in np.random.default_rng(0).uniform(50, 450, size=(20, 2)).astype(np.float32):
        np.testing.assert_array_equal(ours["image"], theirs["pixels"])
        np.testing.assert_array_equal(ours["agent_pos"], theirs["agent_pos"].astype(np.float32))
        ours, theirs = env.step(target)[0], upstream.step(target.astype(np.float64))[0]


def test_the_corners_are_gym_pushts_own():
    upstream, env = Upstream(obs_type="environment_state_agent_pos"), envs.make("pusht", observation="corners")
    ours, theirs = env.reset(seed=5)[0], upstream.reset(seed=5)[0]
    for target in np.random.default_rng(0).uniform(50, 450, size=(60, 2)).astype(np.float32):
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            np.testing.assert_array_equal(ours[key], values.astype(np.float32))
        state = np.asarray(env.unwrapped._simulator.get_obs())
        np.testing.assert_allclose(envs.pusht_corners(state), ours["environment_state"], rtol=2e-7)
        ours, theirs = env.step(target)[0], upstream.step(target.astype(np.float64))[0]


# Rows of data/state and data/keypoint in the public demonstrations, pusht_cchi_v7_replay.zarr.zip.
RECORDED = {
    0: (
        [222.0, 97.0, 222.994, 381.599, 3.008],
        "201.814 293.595 283.592 374.652 162.809 391.093 219.86 356.247 220.575 258.004"
        " 179.962 354.229 258.245 343.838 231.295 317.055 199.889 386.42",
    ),
    5000: (
        [116.227, 133.867, 176.614, 236.508, 2.228],
        "99.688 188.804 214.831 188.97 140.482 285.567 156.563 220.679 88.013 150.301"
        " 126.768 247.29 175.142 184.871 137.147 184.766 163.569 256.178",
    ),
    12345: (
        [263.844, 320.995, 319.407, 291.547, 0.311],
        "300.718 380.113 261.703 271.781 377.831 308.834 311.343 315.786 268.484 404.19"
        " 346.503 334.751 271.35 310.498 284.177 346.262 342.342 297.122",
    ),
    20000: (
        [363.712, 356.498, 290.952, 270.904, 0.561],
        "250.874 352.065 239.956 237.44 343.261 302.146 277.127 292.385 213.675 367.391"
        " 306.482 319.48 239.696 277.34 243.249 315.168 311.786 281.995",
    ),
}
RECORDED = {row: (state, [float(x) for x in points.split()]) for row, (state, points) in RECORDED.items()}

# data/img at (row, column) of row 12345: table, target, block, finger, wall.
SHADES = {
    (10, 10): (255, 255, 255),
    (44, 41): (144, 238, 144),
    (58, 58): (143, 163, 184),
    (60, 49): (78, 126, 255),
    (1, 48): (233, 233, 233),
}


@pytest.mark.parametrize("row", RECORDED)
def test_keypoints_are_those_of_the_demonstrations(row):
    state, keypoints = RECORDED[row]
    # The angle is rounded to 0.0005 rad here, and the furthest point is 124 pixels off the origin.
    np.testing.assert_allclose(envs.pusht_keypoints(state), keypoints, atol=0.08)
    observation, _ = envs.make("pusht", observation="keypoints").unwrapped.set_state(state)
    np.testing.assert_allclose(observation["keypoint"], keypoints, atol=0.08)
    np.testing.assert_allclose(observation["agent_pos"], state[:2], atol=1e-4)


def test_the_picture_shows_what_the_demonstrations_show():
    observation, _ = envs.make("pusht", observation="image").unwrapped.set_state(RECORDED[12345][0])
    shades = {pixel: observation["image"][pixel].tolist() for pixel in SHADES}
    assert shades == {pixel: pytest.approx(shade, abs=2) for pixel, shade in SHADES.items()}


def test_demonstrations_become_what_the_environment_gives():
    states = np.array([state for state, _ in RECORDED.values()], np.float32)
    keypoints = np.array([points for _, points in RECORDED.values()], np.float32).reshape(-1, 9, 2)
    pictures = np.zeros((4, 96, 96, 3), np.uint8)
    features = envs.pusht_state_features({"state": states})
    assert list(features) == ["state"]
    np.testing.assert_array_equal(features["state"], envs.pusht_features(states))
    changed = envs.pusht_agent_pos({"keypoint": keypoints, "state": states})
    shown = envs.pusht_agent_pos({"image": pictures, "state": states})
    cornered = envs.pusht_state_corners({"state": states})
    for kind, given in {"keypoints": changed, "corners": cornered, "image": shown}.items():
        space = envs.make("pusht", observation=kind).observation_space
        assert space.contains({key: values[0] for key, values in given.items()})
    np.testing.assert_array_equal(changed["keypoint"].reshape(4, 9, 2), keypoints)
    for given in ({"state": states}, {"state": states, "keypoint": keypoints}):
        joined = envs.pusht_keypoints_agent_pos(given)
        assert list(joined) == ["state"]
        np.testing.assert_allclose(joined["state"][:, :18], changed["keypoint"], atol=0.6)
        np.testing.assert_array_equal(joined["state"][:, 18:], states[:, :2])
        assert envs.make("pusht", observation="keypoints_agent_pos").observation_space.contains(joined["state"][0])
    np.testing.assert_array_equal(shown["agent_pos"], states[:, :2])
    np.testing.assert_array_equal(cornered["environment_state"], features["state"][:, 6:22])


def test_pictures_drawn_of_states_are_those_that_the_environment_shows():
    env = envs.make("pusht", observation="image")
    for seed in range(3):
        shown, _ = env.reset(seed=seed)
        state = np.asarray(env.unwrapped._simulator.get_obs(), np.float32)
        # Other states are drawn before and after: the picture must not show any trace of them.
        drawn = envs.pusht_pictures({"state": np.stack([state + 30, state, state - 30])})
        assert env.observation_space.contains({key: values[1] for key, values in drawn.items()})
        assert np.abs(drawn["image"][1].astype(int) - shown["image"]).mean() < 0.02
        assert np.abs(drawn["image"][0].astype(int) - shown["image"]).mean() > 1
        np.testing.assert_array_equal(drawn["agent_pos"][1], shown["agent_pos"])
    states = np.stack([state, state + 1])
    told = envs.pusht_pictures_and_features({"state": states})
    assert told.keys() == {"image", "agent_pos", "state"}
    np.testing.assert_array_equal(told["state"], envs.pusht_features(states))
    with pytest.raises(ValueError, match="'img'"):
        envs.pusht_pictures({"state": state[None], "img": shown["image"][None]})


@pytest.mark.parametrize(
    "transform",
    [envs.pusht_state_features, envs.pusht_agent_pos, envs.pusht_keypoints_agent_pos, envs.pusht_state_corners],
)
def test_a_transform_names_what_it_misses(transform):
    with pytest.raises(ValueError, match=r"need the key 'state'.* got action, img"):
        transform({"img": np.zeros(1), "action": np.zeros(1)})
    with pytest.raises(ValueError, match=r"got shape \(3, 2\)"):
        transform({"state": np.zeros((3, 2))})


def mirror_state(state: np.ndarray) -> np.ndarray:
    x, y, bx, by, angle = state
    return np.array([512 - y, 512 - x, 512 - by, 512 - bx, np.pi / 2 - angle])


def test_mirror_commutes_with_the_features_and_with_the_physics() -> None:
    generator = np.random.default_rng(0)
    env, mirrored_env = envs.make("pusht"), envs.make("pusht")
    for _ in range(5):
        state = np.array([*generator.uniform(100, 400, 4), generator.uniform(-np.pi, np.pi)])
        features, _ = env.unwrapped.set_state(state)
        image, _ = mirrored_env.unwrapped.set_state(mirror_state(state))
        for _ in range(20):
            action = generator.uniform(100, 400, 2).astype(np.float32)
            mirrored, mirrored_action = envs.pusht_mirror({"state": features}, action)
            expected = mirrored["state"]
            # The contact solver visits contacts in an order of its own: images drift apart by fractions of a pixel.
            np.testing.assert_allclose(image, expected, atol=3.0)
            np.testing.assert_allclose(image[4:6], expected[4:6], atol=0.03)
            assert not np.allclose(image, features, atol=10.0)
            features, reward, *_ = env.step(action)
            image, mirrored_reward, *_ = mirrored_env.step(mirrored_action)
            assert abs(reward - mirrored_reward) < 0.02
    np.testing.assert_allclose(envs.pusht_mirror(*envs.pusht_mirror({}, action))[1], action, rtol=1e-6)


def demonstration(states):
    """An episode's observations of given states, and actions near the agent's positions."""
    observations = {"state": states, "keypoint": pusht_geometry.pusht_keypoints(states).reshape(-1, 9, 2)}
    return observations, states[:, :2] + 3.0


def test_hindsight_ends_on_the_target_and_keeps_everything_about_the_block():
    states = random_states(30)
    states[:, :4] = 200 + 0.2 * states[:, :4]  # well within the table
    observations, actions = demonstration(states)
    moved, moved_actions = envs.pusht_hindsight(observations, actions)
    np.testing.assert_allclose(moved["state"][-1, 2:], [256, 256, np.pi / 4], atol=1e-3)
    env = envs.make("pusht")
    _, info = env.unwrapped.set_state(np.array([100, 100, *moved["state"][-1, 2:]]))
    assert info["score"] > 0.999

    def in_block(points, state):
        cosine, sine = np.cos(state[:, 4]), np.sin(state[:, 4])
        x, y = (points - state[:, 2:4]).T
        return np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=1)

    for before, after in ((states[:, :2], moved["state"][:, :2]), (actions, moved_actions)):
        np.testing.assert_allclose(in_block(after, moved["state"]), in_block(before, states), atol=1e-3)
    np.testing.assert_allclose(
        moved["keypoint"], pusht_geometry.pusht_keypoints(moved["state"]).reshape(-1, 9, 2), atol=1e-3
    )
    again, again_actions = envs.pusht_hindsight(moved, moved_actions)
    np.testing.assert_allclose(again["state"], moved["state"], atol=1e-3)
    np.testing.assert_allclose(again_actions, moved_actions, atol=1e-3)


def test_hindsight_keeps_dtypes_and_stays_on_the_table():
    states = random_states(30).astype(np.float32)
    observations, actions = demonstration(states)
    moved, moved_actions = envs.pusht_hindsight(observations, actions.astype(np.float32))
    assert {key: value.dtype for key, value in moved.items()} == dict.fromkeys(observations, np.dtype(np.float32))
    assert moved_actions.dtype == np.float32
    for places in (moved["state"][:, :2], moved_actions):
        assert places.min() >= 0
        assert places.max() <= 512


def test_a_moved_demonstration_is_what_the_simulator_does():
    """The physics is the same everywhere on the table: moved actions move the block in the same way, elsewhere."""
    env, elsewhere = envs.make("pusht"), envs.make("pusht")
    start = np.array([250.0, 180.0, 256.0, 256.0, 0.2])
    push = np.stack([np.full(25, 250.0), np.linspace(180, 300, 25)], axis=1).astype(np.float32)
    env.unwrapped.set_state(start)
    path = [start]
    for action in push:
        _, _, _, _, info = env.step(action)
        path.append(np.array([*env.unwrapped._simulator.agent.position, *info["block_pose"]]))
    moved, moved_push = envs.pusht_hindsight({"state": np.array(path)}, np.concatenate([push, push[-1:]]))
    elsewhere.unwrapped.set_state(moved["state"][0])
    for action in moved_push[:-1].astype(np.float32):
        _, _, _, _, info = elsewhere.step(action)
    assert np.linalg.norm(np.array(path)[-1, 2:4] - start[2:4]) > 20
    np.testing.assert_allclose(info["block_pose"][:2], [256, 256], atol=1.0)
    np.testing.assert_allclose(info["block_pose"][2], np.pi / 4, atol=0.02)


def slide(start, end, steps=100):
    """An episode in which the block goes straight from one pose to another, the finger 30 pixels beside it."""
    poses = np.linspace(start, end, steps)
    poses[:, 2] = (poses[:, 2] + np.pi) % (2 * np.pi) - np.pi  # as recorded angles jump
    return demonstration(np.column_stack([poses[:, :2] + 30, poses]))


@pytest.mark.parametrize("turned", [0.0, 2.5])
def test_parts_on_the_way_end_before_their_pose_is_the_target(turned):
    observations, actions = slide([200, 250, 2.0], [300, 250, 2.0 + turned])
    whole, *parts = envs.pusht_hindsight_on_the_way(observations, actions, count=3, distance=10)
    for key, values in envs.pusht_hindsight(observations, actions)[0].items():
        np.testing.assert_array_equal(whole[0][key], values)
    step = np.hypot(100, 40 * turned) / 99
    assert len(parts) == 3
    for number, (moved, moved_actions) in enumerate(parts, 1):
        length = len(moved_actions)
        assert length == pytest.approx(number * 99 / 4 - 10 / step, abs=2)
        assert len(moved["state"]) == len(moved["keypoint"]) == length
        x, y, angle = moved["state"][-1, 2:]
        left = np.hypot(np.hypot(x - 256, y - 256), 40 * ((angle - np.pi / 4 + np.pi) % (2 * np.pi) - np.pi))
        assert 10 <= left + 1e-3 <= 10 + 2 * step
        np.testing.assert_allclose(
            np.linalg.norm(moved_actions - moved["state"][:, 2:4], axis=1), np.hypot(33, 33), rtol=1e-5
        )


def test_parts_that_would_leave_the_table_are_left_out():
    observations, actions = slide([60, 60, 0.0], [450, 450, 0.0])
    # The poses are 110, 221, 331 and 441 pixels on; the block may start up to 256 - 50 pixels from the target.
    assert len(envs.pusht_hindsight_on_the_way(observations, actions)) == 1 + 1
    assert len(envs.pusht_hindsight_on_the_way(*slide([200, 250, 0.0], [200, 250, 0.0]))) == 1  # the block stays


def in_block(state, points):
    """Points (T, ..., 2) in the frame of the block of each row."""
    points = points.reshape(len(state), -1, 2) - state[:, None, 2:4]
    cosine, sine = np.cos(state[:, 4, None]), np.sin(state[:, 4, None])
    x, y = points[..., 0], points[..., 1]
    return np.stack([x * cosine + y * sine, y * cosine - x * sine], axis=-1)


def test_varied_copies_keep_each_touch_on_the_block_and_end_as_they_were_demonstrated():
    observations, actions = slide([180, 250, 2.0], [330, 250, 2.5])  # 1.53 pixels of way a step, turns included
    settings = {"count": 1, "copies": 2, "shift": 10.0, "exact": 30.0, "fade": 100.0}
    whole, part, *copies = envs.pusht_hindsight_varied(observations, actions, **settings)
    plain = envs.pusht_hindsight_on_the_way(observations, actions, count=1)
    for (found, found_actions), (known, known_actions) in zip([whole, part], plain, strict=True):
        np.testing.assert_array_equal(found_actions, known_actions)
        np.testing.assert_array_equal(found["state"], known["state"])
    starts = set()
    for (original, its_actions), (moved, moved_actions) in zip([whole, whole, part, part], copies, strict=True):
        here, there = (array["state"].astype(float) for array in (moved, original))
        for copied, shown in (
            (here[:, :2], there[:, :2]),
            (moved["keypoint"], original["keypoint"]),
            (moved_actions, its_actions),
        ):
            np.testing.assert_allclose(in_block(here, copied), in_block(there, shown), atol=1e-3)
        off = np.abs(here - there)[:, 2:]
        assert (off[0] > 0.01).all()
        assert (np.diff(off, axis=0) <= 1e-3).all()
        starts.add(off[0, 0])
    assert len(starts) == 4
    for moved, _ in copies[:2]:
        off = np.abs(moved["state"] - whole[0]["state"])[:, 2:]
        np.testing.assert_allclose(off[:13], off[[0] * 13], atol=1e-3)  # 151 - 130 pixels of way
        assert (off[14] < off[0]).all()
        assert (off[-20:] == 0).all()
        assert (off[-23] > 0).any()


def displaced_by(demonstration, of):
    """Shift and turn of a copy's first row."""
    return (demonstration[0]["state"][0] - of[0]["state"][0])[2:]


def test_variations_are_those_of_the_actions_and_the_seed():
    settings = {"count": 1, "copies": 1, "shift": 10.0}
    whole, _, *first = envs.pusht_hindsight_varied(*slide([180, 250, 2.0], [330, 250, 2.5]), **settings)
    *_, again, _ = envs.pusht_hindsight_varied(*slide([180, 250, 2.0], [330, 250, 2.5]), **settings)
    *_, other, _ = envs.pusht_hindsight_varied(*slide([180, 250, 2.0], [330, 250, 2.5]), **settings, seed=1)
    elsewhere, _, copy, _ = envs.pusht_hindsight_varied(*slide([180, 251, 2.0], [330, 251, 2.5]), **settings)
    assert len(first) == 2
    np.testing.assert_array_equal(first[0][0]["state"], again[0]["state"])
    assert (displaced_by(first[0], whole) != displaced_by(other, whole)).all()
    assert (np.abs(displaced_by(first[0], whole) - displaced_by(copy, elsewhere)) > 1e-3).all()


def test_displacements_far_from_the_target_spread_as_stated():
    observations, actions = slide([200, 250, 2.0], [330, 250, 2.0])
    whole, *copies = envs.pusht_hindsight_varied(
        observations, actions, count=1, distance=200.0, copies=400, shift=4.0, turn=0.1, exact=10.0, fade=50.0
    )
    assert len(copies) == 400  # no part is so long
    spread = np.std([displaced_by(copy, whole) for copy in copies], axis=0)
    np.testing.assert_allclose(spread, [4.0, 4.0, 0.1], rtol=0.15)


def test_a_varied_part_fades_towards_its_pose_and_not_its_end():
    observations, actions = slide([180, 250, 2.0], [330, 250, 2.0])  # 1.52 pixels a step
    settings = {"count": 1, "distance": 40.0, "copies": 1, "shift": 4.0, "turn": 0.0, "exact": 10.0, "fade": 60.0}
    _, part, _, copy = envs.pusht_hindsight_varied(observations, actions, **settings)
    off = np.abs(copy[0]["state"] - part[0]["state"])[:, 2]
    np.testing.assert_allclose(off[-1] / off[0], (40 - 10) / 60, atol=0.03)


def test_copies_that_would_leave_the_table_are_left_out():
    observations, actions = slide([180, 250, 2.0], [330, 250, 2.5])
    _, _, *copies = envs.pusht_hindsight_varied(observations, actions, count=1, copies=20, shift=300.0)
    assert 0 < len(copies) < 40
    for moved, targets in copies:
        assert moved["state"][:, 2:4].min() >= 50
        assert moved["state"][:, 2:4].max() <= 512 - 50
        assert (moved["state"].dtype, targets.dtype) == (observations["state"].dtype, actions.dtype)
        for places in (moved["state"][:, :2], targets):
            assert places.min() >= 0
            assert places.max() <= 512


def test_copies_whose_finger_would_leave_the_table_are_left_out():
    near, _ = slide([180, 250, 2.0], [330, 250, 2.5])
    far = demonstration(near["state"] + [170, 170, 0, 0, 0])
    settings = {"count": 1, "copies": 20, "shift": 10.0}
    assert len(envs.pusht_hindsight_varied(*demonstration(near["state"]), **settings)) == 2 + 40
    assert 2 < len(envs.pusht_hindsight_varied(*far, **settings)) < 2 + 40


def test_an_action_that_is_not_a_number_is_left_to_the_reader_of_demonstrations():
    observations, actions = slide([180, 250, 2.0], [330, 250, 2.5])
    actions[3] = np.nan
    (_, whole), *_ = envs.pusht_hindsight_varied(observations, actions)
    assert np.isnan(whole[3]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"copies": 0},
        {"shift": -1.0},
        {"shift": np.inf},
        {"turn": np.nan},
        {"exact": -1.0},
        {"fade": 0.0},
        {"fade": np.inf},
        {"seed": -1},
    ],
)
def test_numbers_of_copies_and_displacements_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"copies must be 1 or more.*; got copies="):
        envs.pusht_hindsight_varied(*slide([200, 250, 0.0], [300, 250, 0.0]), **settings)


@pytest.mark.parametrize("settings", [{"count": 0}, {"distance": 0.0}, {"distance": np.nan}])
def test_numbers_of_poses_and_distances_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"count must be 1 or more and distance above 0; got count="):
        envs.pusht_hindsight_on_the_way(*slide([200, 250, 0.0], [300, 250, 0.0]), **settings)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        ({}, "need the key 'state'"),
        ({"state": np.zeros((3, 4))}, "got shape"),
        ({"state": np.zeros((3, 5)), "img": np.zeros((3, 8, 8, 3))}, "Push-T observation to move 'img'|'img'"),
    ],
)
def test_hindsight_refuses_what_it_cannot_move(observations, words):
    with pytest.raises(ValueError, match=words):
        envs.pusht_hindsight(observations, np.zeros((3, 2)))


@pytest.mark.parametrize("kind", ["keypoints", "corners"])
def test_mirrored_points_are_those_of_the_mirrored_state(kind):
    env, mirrored_env = (envs.make("pusht", observation=kind) for _ in range(2))
    for state in random_states(20):
        mirrored, _ = envs.pusht_mirror(env.unwrapped.set_state(state)[0], np.zeros(2, np.float32))
        expected, _ = mirrored_env.unwrapped.set_state(mirror_state(state))
        for key, values in expected.items():
            assert mirrored[key].dtype == np.float32
            np.testing.assert_allclose(mirrored[key], values, atol=1e-3)


def test_a_mirrored_picture_is_that_of_the_mirrored_state():
    env, mirrored_env = (envs.make("pusht", observation="image") for _ in range(2))
    for state in random_states(20):
        observation, _ = env.unwrapped.set_state(state)
        mirrored, _ = envs.pusht_mirror(observation, np.zeros(2, np.float32))
        expected, _ = mirrored_env.unwrapped.set_state(mirror_state(state))
        difference = np.abs(mirrored["image"].astype(float) - expected["image"])
        # A mirrored edge is one of the table's 512 pixels off, which is a fifth of a pixel in this picture.
        assert difference.mean() < 1.0
        assert np.abs(observation["image"].astype(float) - expected["image"]).mean() > 2.0
        assert (difference.max(axis=-1) > 100).mean() < 0.01
    again, _ = envs.pusht_mirror(mirrored, np.zeros(2, np.float32))
    np.testing.assert_array_equal(again["image"], observation["image"])


def test_mirror_takes_any_leading_axes():
    states = random_states(6).reshape(2, 3, 5)
    generator = np.random.default_rng(0)
    observations = {
        "state": envs.pusht_features(states),
        "keypoint": envs.pusht_keypoints(states),
        "environment_state": envs.pusht_corners(states),
        "agent_pos": states[..., :2].astype(np.float32),
        "image": generator.integers(0, 255, (2, 3, 8, 8, 3), dtype=np.uint8),
    }
    actions = generator.uniform(0, 512, (2, 3, 4, 2)).astype(np.float32)
    mirrored, mirrored_actions = envs.pusht_mirror(observations, actions)
    assert mirrored.keys() == observations.keys()
    assert mirrored_actions.shape == actions.shape
    for index in np.ndindex(2, 3):
        one = {key: value[index] for key, value in observations.items()}
        alone, alone_actions = envs.pusht_mirror(one, actions[index])
        np.testing.assert_array_equal(mirrored_actions[index], alone_actions)
        for key, value in alone.items():
            assert value.dtype == observations[key].dtype
            np.testing.assert_allclose(mirrored[key][index], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        ({"img": np.zeros((96, 96, 3))}, "Did you mean 'image'"),
        ({"state": np.zeros((4, 5))}, r"'state' to mirror is \(..., 40\); got shape \(4, 5\)"),
        ({"keypoint": np.zeros((4, 9, 2))}, r"'keypoint' to mirror is \(..., 18\)"),
        ({"environment_state": np.zeros(18)}, r"'environment_state' to mirror is \(..., 16\)"),
        ({"agent_pos": np.zeros(3)}, r"'agent_pos' to mirror is \(..., 2\)"),
        ({"image": np.zeros((96, 80, 3))}, "as high as wide"),
        ({"image": np.zeros((96, 96))}, "as high as wide"),
    ],
)
def test_mirror_refuses_what_it_does_not_know(observations, words):
    with pytest.raises(ValueError, match=words):
        envs.pusht_mirror(observations, np.zeros(2, np.float32))


def recorded_points(path):
    """Read the nine points in the block's own frame, and each row's largest residual, from the demonstrations' file."""
    import zarr

    root = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    states, keypoints = (np.asarray(root[f"data/{key}"][:], np.float64) for key in ("state", "keypoint"))
    cosine, sine = np.cos(states[:, 4:]), np.sin(states[:, 4:])
    x, y = np.moveaxis(keypoints - states[:, None, 2:4], -1, 0)
    local = np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)
    points = np.median(local, axis=0)
    return points, np.abs(local - points).max(axis=(1, 2))


if __name__ == "__main__":
    found, residuals = recorded_points(sys.argv[1])
    print(np.array2string(found, precision=5, suppress_small=True, separator=", "))
    print("residuals in pixels, quantiles 0.5, 0.9, 0.99, 1:", np.quantile(residuals, [0.5, 0.9, 0.99, 1]))
