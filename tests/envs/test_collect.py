"""Demonstrations: successful, reproducible, ended soon after success, and the expert's own actions."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import envs
from envs.checked import CheckedEnv
from envs.planar import PlanarEnv, PlanarExpert

PLANAR = partial(envs.make_expert, "planar")


def collect(**kwargs):
    defaults = {"episodes": 3, "seed": 0}
    return list(envs.collect_episodes(envs.make("planar"), PLANAR, **(defaults | kwargs)))


def assert_equal_episodes(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_episodes_are_laid_out_as_in_minari():
    for episode in collect(episodes=5):
        steps = len(episode)
        assert episode.observations.shape == (steps + 1, 4)
        assert episode.actions.shape == (steps, 2)
        assert episode.observations.dtype == episode.actions.dtype == episode.rewards.dtype == np.float32
        for flags in (episode.terminations, episode.truncations, episode.is_success):
            assert flags.shape == (steps,)
            assert flags.dtype == np.bool_
        ends = episode.terminations | episode.truncations
        assert ends[-1]
        assert not ends[:-1].any()
        assert episode.is_success.any()


def test_the_arguments_alone_decide_the_result():
    expected = collect(noise=0.2)
    used = envs.make("planar")
    used.reset(seed=77)
    used.step(np.ones(2, np.float32))
    again = list(envs.collect_episodes(used, PLANAR, episodes=3, seed=0, noise=0.2))
    assert_equal_episodes(again, expected)
    assert_equal_episodes(collect(episodes=1, seed=expected[2].seed, noise=0.2), expected[2:])
    assert not np.array_equal(collect(seed=50)[0].observations, expected[0].observations)


def test_replaying_an_episode_gives_its_observations():
    env = envs.make("planar")
    for episode in collect():
        observation, _ = env.reset(seed=episode.seed)
        replayed = [observation] + [env.step(action)[0] for action in episode.actions]
        np.testing.assert_array_equal(replayed, episode.observations)


def test_noise_is_executed_but_not_recorded():
    (episode,) = collect(episodes=1, noise=0.3)
    expert = PlanarExpert(episode.seed)
    clean = np.array([expert(observation) for observation in episode.observations[:-1]])
    np.testing.assert_array_equal(episode.actions, clean)
    moved = np.diff(episode.observations[:, :2], axis=0)
    assert np.abs(moved - 0.04 * clean).max() > 0.005


def test_a_simulator_and_an_expert_may_answer_with_one_array_each():
    """Gymnasium does not ask for a new array in every step."""

    class Reusing(PlanarEnv):
        def reset(self, *, seed=None, options=None):
            observation, info = super().reset(seed=seed, options=options)
            self.buffer = observation.copy()
            return self.buffer, info

        def step(self, action):
            self.buffer[:], *rest = super().step(action)
            return self.buffer, *rest

    def reusing_expert(env, seed):
        expert, buffer = PLANAR(env, seed), np.zeros(2, np.float32)

        def act(observation):
            buffer[:] = expert(observation)
            return buffer

        return act

    env = CheckedEnv(Reusing, "reusing", PlanarEnv.max_episode_steps)
    assert_equal_episodes(list(envs.collect_episodes(env, reusing_expert, episodes=3, seed=0)), collect())


def test_failed_attempts_are_skipped_and_the_next_seed_is_tried():
    def fails_on_even_seeds(env, seed):
        return PlanarExpert(seed) if seed % 2 else lambda observation: np.array([0.0, 1.0], np.float32)

    episodes = envs.collect_episodes(envs.make("planar"), fails_on_even_seeds, episodes=3, seed=10)
    assert [episode.seed for episode in episodes] == [11, 13, 15]


def test_a_hopeless_expert_ends_in_an_error():
    def still(env, seed):
        return lambda observation: np.zeros(2, np.float32)

    with pytest.raises(RuntimeError, match="Only 0 of 2 demonstrations succeeded in 20 attempts"):
        list(envs.collect_episodes(envs.make("planar"), still, episodes=2, seed=0))


@pytest.mark.parametrize("argument", [{"episodes": 0}, {"seed": -1}, {"noise": -0.1}, {"linger_steps": -1}])
def test_an_argument_out_of_range_is_refused_at_the_call(argument):
    name = next(iter(argument))
    with pytest.raises(ValueError, match=f"{name}=.* out of range"):
        envs.collect_episodes(envs.make("planar"), PLANAR, **({"episodes": 1, "seed": 0} | argument))


@pytest.fixture(scope="module")
def reach():
    pytest.importorskip("metaworld", reason="pip install 'ddim-policy[metaworld]'")
    return envs.make("metaworld", task="reach-v3")


@pytest.mark.parametrize("linger_steps", [0, 1, 7])
def test_demonstrations_end_soon_after_their_first_success(reach, linger_steps):
    factory = partial(envs.make_expert, "metaworld")
    (episode,) = envs.collect_episodes(reach, factory, episodes=1, seed=0, linger_steps=linger_steps)
    assert len(episode) == int(episode.is_success.argmax()) + 1 + linger_steps
    assert episode.truncations[-1]
    assert not episode.terminations.any()


@pytest.mark.parametrize("name", ["pusht", "gym"])
def test_without_an_expert_demonstrations_must_come_from_a_dataset(name):
    with pytest.raises(ValueError, match="must come from a dataset"):
        envs.make_expert(name, envs.make("planar"), 0)


def test_an_expert_of_another_environment_is_refused():
    with pytest.raises(ValueError, match="needs a Meta-World environment, got PlanarEnv"):
        envs.make_expert("metaworld", envs.make("planar"), 0)
    with pytest.raises(ValueError, match="Did you mean 'planar'"):
        envs.make_expert("plannar", envs.make("planar"), 0)
