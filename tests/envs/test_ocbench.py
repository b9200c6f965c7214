"""OCBench: seeds that mean one episode, experts that leave numpy's global generator alone, and what is refused."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

import envs

pytest.importorskip("ocbench", reason="pip install 'ddim-policy[ocbench]'")
import gymnasium

from envs.ocbench import ocbench_tasks

BLOCK, SWITCH = "block-cpu-lite-single-task1", "switch-cpu-lite-3x3-task1"


@functools.cache
def used(task):
    """An environment that other tests have used too. Making one takes a second and a half."""
    return envs.make("ocbench", task=task)


def played(env, seed, steps=1000):
    """Play the expert; return observations, actions and the last info."""
    observation, info = env.reset(seed=seed)
    expert = envs.make_expert("ocbench", env, seed)
    observations, actions = [observation], []
    over = False
    while not over and len(actions) < steps:
        actions.append(expert(observation))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        over = terminated or truncated
    return np.array(observations), np.array(actions), info


def test_a_seed_means_one_episode_whatever_happened_before():
    env = used(BLOCK)
    expected = played(env, 7, 25)[0]
    played(env, 9, 30)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(played(env, 7, 25)[0], expected)
    assert not np.array_equal(env.reset(seed=8)[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in ocbench_tasks() if not task.startswith("visual-")])
def test_a_seed_means_one_episode_in_a_fresh_environment_of_every_task(task):
    expected = played(envs.make("ocbench", task=task), 7, 60)[0]
    other = envs.make("ocbench", task=task)
    played(other, 9, 65)
    np.testing.assert_array_equal(played(other, 7, 60)[0], expected)


def test_there_are_27_tasks_from_state_and_their_visual_twins():
    tasks = ocbench_tasks()
    assert len(set(tasks)) == len(tasks) == 54
    assert tasks[27:] == [f"visual-{task}" for task in tasks[:27]]


def test_the_expert_draws_nothing_from_the_global_generator_and_follows_from_its_seed():
    env = used(BLOCK)
    np.random.seed(3)  # noqa: NPY002
    first = played(env, 0, 12)[1]
    left = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert left == np.random.random()  # noqa: NPY002
    np.testing.assert_array_equal(played(env, 0, 12)[1], first)
    observation, _ = env.reset(seed=0)
    other = envs.make_expert("ocbench", env, 1)
    for action in first:
        if not np.array_equal(chosen := other(observation), action):
            break
        observation, *_ = env.step(chosen)
    else:
        pytest.fail("another seed chose the same actions")


@pytest.mark.slow
def test_an_episode_ends_with_its_success_and_agrees_with_the_bare_task():
    observations, actions, info = played(used(SWITCH), 5)
    assert info == {"is_success": True, "score": 1.0}
    assert np.abs(actions).max() <= 1.0
    bare = gymnasium.make(f"{SWITCH}-v0", disable_env_checker=True)
    observation, _ = bare.reset(seed=5)
    for expected, action in zip(observations, actions, strict=False):
        np.testing.assert_array_equal(observation.astype(np.float32), expected)
        observation, _, terminated, _, info = bare.step(action)
    assert terminated
    assert info["success"]


@pytest.mark.parametrize("p_mistake", [0.0, 1.0])
def test_an_expert_makes_mistakes_at_the_rate_of_its_environment(p_mistake, monkeypatch):
    env = used(BLOCK)
    monkeypatch.setattr(env.unwrapped, "p_mistake", p_mistake)
    expert = envs.make_expert("ocbench", env, 5)
    expert(env.reset(seed=5)[0])
    assert expert._controller._active_segment["is_potential_high_level_mistake"] == (p_mistake == 1.0)


def test_actions_are_clipped():
    env = used(BLOCK)
    assert (env.max_episode_steps, env.metadata["render_fps"]) == (200, 10)
    env.reset(seed=0)
    wide = env.step(np.full(7, 5.0, np.float32))[0]
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.ones(7, np.float32))[0], wide)


@pytest.mark.slow
def test_mistakes_take_time(monkeypatch):
    env = used(BLOCK)
    without = played(env, 5)[1]
    monkeypatch.setattr(env.unwrapped, "p_mistake", 0.9)
    assert len(played(env, 5)[1]) > len(without)


@pytest.mark.slow
def test_the_time_limit_is_the_tasks_own_or_the_users():
    short = envs.make("ocbench", task=BLOCK, max_episode_steps=2)
    short.reset(seed=0)
    assert [short.step(np.zeros(7, np.float32))[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "block-lite-single-task1"}, r"needs a GPU; choose .* such as block-cpu-lite-single-task1, "),
        ({"task": "visual-hanoi-single-task2"}, r"needs a GPU; .* visual-hanoi-cpu-lite-single-task2"),
        ({"task": "chamber-cpu-easy-task1"}, r"is not one of its lite tasks.* chamber-cpu-lite-easy-task1"),
        ({"task": "blok"}, r"'blok' is not known; choose a lite one on the CPU, such as block-cpu-lite"),
        ({"p_mistake": 1.5}, r"p_mistake=1.5 is out of range; it is a probability"),
        ({"image_size": 0}, r"image_size must be above 0; got 0"),
    ],
)
def test_what_it_has_not_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        envs.make("ocbench", **options)


def test_the_expert_is_of_its_own_environments_only():
    with pytest.raises(ValueError, match="needs an OCBench environment, got PlanarEnv"):
        envs.make_expert("ocbench", envs.make("planar"), 0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ocbench", None)
    monkeypatch.setitem(sys.modules, "ocbench.envs.env", None)
    with pytest.raises(envs.MissingExtraError, match=r"^OCBench is not installed; run: pip install .*\[ocbench\]'$"):
        envs.make("ocbench")


@pytest.mark.slow
def test_pictures_of_the_visual_twin_show_the_same_episode():
    """In a process of its own, because software rendering may crash one that has drawn with other contexts."""
    code = f"""
import numpy as np, envs
tasks = "{BLOCK}", "visual-{BLOCK}"
state, visual = (envs.make("ocbench", task=task, image_size=32, render_mode="rgb_array") for task in tasks)
seen, _ = visual.reset(seed=0)
state.reset(seed=0)
assert visual.observation_space.contains(seen) and list(seen) == ["front", "side", "wrist"], seen
assert len({{picture.tobytes() for picture in seen.values()}}) == 3
action = envs.make_expert("ocbench", visual, 0)(seen)
state.step(action)
visual.step(action)
joints = [env.unwrapped.simulator.unwrapped.data.qpos for env in (state, visual)]
np.testing.assert_array_equal(*joints)
assert state.render().shape == (32, 32, 3) and state.render().std() > 10
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=900)
