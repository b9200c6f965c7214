"""The multimodal test bed: valid, reproducible, solvable on both sides and not by averaging them."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs.planar import PlanarExpert


def rollout(env, policy, seed):
    """Play one episode; return all observations and the last info."""
    observation, info = env.reset(seed=seed)
    observations, done = [observation], False
    while not done:
        observation, _, terminated, truncated, info = env.step(policy(observation))
        observations.append(observation)
        done = terminated or truncated
    return np.array(observations), info


def expert_of_side(side):
    return next(expert for expert in map(PlanarExpert, range(100)) if expert.side == side)


def test_passes_gymnasiums_check_without_a_warning(recwarn):
    check_env(gymnasium.make("ddim_policy/Planar-v0", render_mode="rgb_array").unwrapped)
    assert [str(w.message) for w in recwarn if "WARN" in str(w.message)] == []


def test_is_registered_with_gymnasium():
    env = gymnasium.make("ddim_policy/Planar-v0")
    assert env.reset(seed=0)[0].shape == (4,)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_expert_succeeds_on_either_side_in_40_to_60_steps(side):
    env = envs.make("planar")
    expert = expert_of_side(side)
    for seed in range(50):
        observations, info = rollout(env, expert, seed)
        assert info["is_success"]
        assert info["score"] == 1.0
        assert 38 <= len(observations) - 1 <= 60
        at_obstacle = observations[np.abs(observations[:, 1]).argmin()]
        assert np.sign(at_obstacle[0]) == side


def test_the_mean_of_both_sides_always_hits_the_obstacle():
    env = envs.make("planar")
    left, right = expert_of_side(-1.0), expert_of_side(1.0)
    for seed in range(50):
        _, info = rollout(env, lambda observation: (left(observation) + right(observation)) / 2, seed)
        assert info["collided"]
        assert not info["is_success"]


def test_the_experts_sides_are_balanced_and_independent_of_the_start():
    env = envs.make("planar")
    sides = np.array([PlanarExpert(seed).side for seed in range(400)])
    starts = np.array([env.reset(seed=seed)[0][0] for seed in range(400)])
    # Four standard errors for 400 fair coins.
    assert abs(sides.mean()) < 0.2
    assert abs(np.corrcoef(sides, starts)[0, 1]) < 0.2


def test_a_seed_means_one_episode_whatever_happened_before():
    fresh, used = envs.make("planar"), envs.make("planar")
    rollout(used, PlanarExpert(3), seed=11)
    used.step(np.ones(2, np.float32))
    expected, _ = rollout(fresh, PlanarExpert(0), seed=5)
    actual, _ = rollout(used, PlanarExpert(0), seed=5)
    np.testing.assert_array_equal(actual, expected)
    assert not np.array_equal(fresh.reset(seed=6)[0], fresh.reset(seed=7)[0])
    assert not np.array_equal(fresh.reset()[0], fresh.reset()[0])


def test_truncates_after_80_steps_with_the_score_of_the_progress_made():
    env = envs.make("planar")
    _, info = env.reset(seed=0)
    assert info == {"is_success": False, "score": 0.0}
    for step in range(1, 81):
        _, _, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert (terminated, truncated) == (False, step == 80)
    assert info["score"] == 0.0
    env.reset(seed=0)
    for _ in range(5):
        *_, info = env.step(np.array([0.0, 1.0], np.float32))
    assert 0.0 < info["score"] < 0.3


def test_draws_an_upright_frame():
    env = envs.make("planar", render_mode="rgb_array", image_size=64)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (64, 64, 3)
    assert frame.dtype == np.uint8
    assert (frame[32, 32] == (70, 70, 70)).all()  # the obstacle in the middle
    blue = np.argwhere((frame == (40, 80, 200)).all(axis=-1))
    green = np.argwhere((frame == (140, 210, 140)).all(axis=-1))
    assert blue[:, 0].mean() > 48  # the agent starts at the bottom, the goal is at the top
    assert green[:, 0].mean() < 16


def test_rendering_without_a_render_mode_says_what_to_do():
    env = envs.make("planar")
    env.reset(seed=0)
    with pytest.raises(envs.RenderingUnavailableError, match="make it with render_mode='rgb_array'"):
        env.render()


def pendulum(**options):
    envs.make_vector("gym", worlds=2, id="Pendulum-v1", success="termination", **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: envs.make("plannar"),
            ["'plannar'", "Did you mean 'planar'?", "metaworld, metaworld_tasks, ocbench, planar, pusht"],
        ),
        (lambda: envs.make("planar", image_sise=3), ["'image_sise'", "Did you mean 'image_size'?"]),
        (lambda: envs.make("planar", render_mode="human"), ["'human'", "'rgb_array'"]),
        (lambda: envs.make("gym"), ["needs the option 'id'"]),
        (lambda: envs.make_vector("gym", worlds=2), ["needs the option 'id'"]),
        (lambda: envs.make_vector("gym", worlds=2, idd="Ant-v5"), ["'idd'", "Did you mean 'id'?"]),
        (lambda: envs.make("planar", max_episode_steps=81), ["ends an episode after 80", "give 80 or fewer"]),
        (lambda: envs.make("planar", image_size=0), ["image_size must be above 0; got 0"]),
        (lambda: pendulum(control_hz=-5.0), ["control_hz must be above 0; got -5.0"]),
        (lambda: pendulum(control_hz=0.0), ["control_hz must be above 0; got 0.0"]),
        (lambda: pendulum(max_episode_steps=-1), ["max_episode_steps must be a whole number, 1 or more; got -1"]),
        (lambda: pendulum(max_episode_steps=True), ["max_episode_steps must be a whole number, 1 or more; got True"]),
        (lambda: pendulum(max_episode_steps=0), ["max_episode_steps must be a whole number, 1 or more; got 0"]),
    ],
)
def test_a_wrong_name_or_option_is_answered_with_the_right_one(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("action", [np.full(2, np.nan), np.zeros(3), np.zeros((1, 2))])
def test_an_action_that_is_not_two_finite_numbers_is_refused(action):
    env = envs.make("planar")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="An action is 2 finite numbers"):
        env.step(action)
