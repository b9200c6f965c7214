"""Push-T: features that are pymunk's own geometry, exact states, the upstream reward."""

import sys

import numpy as np
import pytest

import envs

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
        np.testing.assert_allclose(features[6:], np.array(corners).ravel(), atol=1e-3)
        np.testing.assert_allclose(features[4:6], [np.cos(state[4]), np.sin(state[4])], atol=1e-6)
        np.testing.assert_allclose(features[:4], state[:4], atol=1e-4)


def test_features_equal_gym_pushts_keypoints():
    upstream = Upstream(obs_type="environment_state_agent_pos")
    observation, _ = upstream.reset(seed=4)
    ours, _ = envs.make("pusht").reset(seed=4)
    np.testing.assert_allclose(ours[6:], observation["environment_state"], atol=1e-3)
    np.testing.assert_allclose(ours[:2], observation["agent_pos"], atol=1e-4)


def test_features_take_any_leading_axes():
    states = random_states(12)
    batched = envs.pusht_features(states.reshape(3, 4, 5))
    assert batched.shape == (3, 4, 22)
    assert batched.dtype == np.float32
    one_by_one = np.stack([envs.pusht_features(state) for state in states])
    np.testing.assert_array_equal(batched.reshape(12, 22), one_by_one)


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
    used.set_state([100, 100, 250, 250, 1.0])
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
            assert reward == pytest.approx(expected, abs=1e-12)  # upstream's wavers in the last bit
            assert info["score"] == reward


def test_set_state_is_exact_and_repeatable():
    env = envs.make("pusht")
    for state in random_states(20, seed=1):
        observation, info = env.set_state(state)
        np.testing.assert_allclose(observation, envs.pusht_features(state), atol=1e-3)
        assert 0.0 <= info["score"] <= 1.0
    state = [150.0, 300.0, 256.0, 256.0, 0.5]
    env.set_state(state)
    first = push(env, seed=0)
    env.set_state(state)
    for ours, theirs in zip(push(env, seed=0), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="five finite numbers"):
        env.set_state([1.0, 2.0, 3.0])


def test_the_goal_pose_is_success_and_terminates():
    env = envs.make("pusht")
    _, info = env.set_state([50.0, 50.0, 256.0, 256.0, np.pi / 4])
    assert info["is_success"] is False  # success belongs to control steps
    assert info["score"] == 1.0
    _, reward, terminated, truncated, info = env.step(np.array([50.0, 50.0], np.float32))
    assert (terminated, truncated) == (True, False)
    assert info["is_success"] is True
    assert reward == info["score"] == 1.0


def test_truncates_after_300_steps():
    env = envs.make("pusht")
    env.set_state([60.0, 60.0, 350.0, 350.0, 0.0])
    for step in range(1, 301):
        _, _, terminated, truncated, info = env.step(np.array([60.0, 60.0], np.float32))
        assert (terminated, truncated) == (False, step == 300)
    assert info["is_success"] is False
    assert env.metadata["render_fps"] == Upstream.metadata["render_fps"]


def test_draws_a_frame():
    env = envs.make("pusht", render_mode="rgb_array", image_size=96)
    envs.check_rendering(env)
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


def test_mirror_commutes_with_the_features_and_with_the_physics() -> None:
    def mirror_state(state: np.ndarray) -> np.ndarray:
        x, y, bx, by, angle = state
        return np.array([512 - y, 512 - x, 512 - by, 512 - bx, np.pi / 2 - angle])

    generator = np.random.default_rng(0)
    env, mirrored_env = envs.make("pusht"), envs.make("pusht")
    for _ in range(5):
        state = np.array([*generator.uniform(100, 400, 4), generator.uniform(-np.pi, np.pi)])
        features, _ = env.unwrapped.set_state(state)
        image, _ = mirrored_env.unwrapped.set_state(mirror_state(state))
        for _ in range(20):
            action = generator.uniform(100, 400, 2).astype(np.float32)
            expected, mirrored_action = envs.pusht_mirror(features, action)
            # The contact solver visits contacts in an order of its own: images drift apart by fractions of a pixel.
            np.testing.assert_allclose(image, expected, atol=3.0)
            np.testing.assert_allclose(image[4:6], expected[4:6], atol=0.03)
            assert not np.allclose(image, features, atol=10.0)
            features, reward, *_ = env.step(action)
            image, mirrored_reward, *_ = mirrored_env.step(mirrored_action)
            assert abs(reward - mirrored_reward) < 0.02
    np.testing.assert_allclose(envs.pusht_mirror(*envs.pusht_mirror(features, action))[1], action, rtol=1e-6)
