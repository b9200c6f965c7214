"""The door: what a simulator may return, what ends an episode with a reason, and what is refused."""

import os
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import envs
from envs.checked import CheckedEnv, as_bool
from envs.errors import EnvContractError, RenderingUnavailableError

STILL = np.zeros(2, np.float32)


class Simulator(gymnasium.Env):
    """Stands still for five steps; returns what it is told to at the third."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = spaces.Box(-2, 2, (4,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    max_episode_steps = 5
    made = 0

    def __init__(self, third=None, start=None, info=None, frame=None):
        type(self).made += 1
        self.third, self.start, self.info, self.frame, self.steps = third, start, info, frame, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return (np.zeros(4, np.float32), {}) if self.start is None else self.start()

    def step(self, action):
        self.steps += 1
        info = {"is_success": False} if self.info is None else self.info
        if self.third is not None and self.steps == 3:
            return self.third()
        return np.full(4, self.steps / 10, np.float32), 0.5, False, False, info

    def render(self):
        return self.frame()


gymnasium.register("envs_test/Still-v0", entry_point=Simulator, max_episode_steps=5)


def checked(**told):
    return CheckedEnv(lambda: Simulator(**told), "still")


def raising(error):
    def call():
        raise error

    return call


def values(observation=None, reward=0.0, info=None):
    observation = np.zeros(4, np.float32) if observation is None else observation
    return lambda: (observation, reward, False, False, {"is_success": False} if info is None else info)


def played(env, steps=5):
    env.reset(seed=0)
    return [env.step(STILL) for _ in range(steps)]


def test_a_sound_simulator_is_left_alone_but_for_success_score_and_the_time_limit():
    steps = played(checked())
    assert [truncated for _, _, _, truncated, _ in steps] == [False] * 4 + [True]
    assert [info for *_, info in steps] == [{"is_success": False, "score": 0.0}] * 5
    np.testing.assert_array_equal(steps[1][0], np.full(4, 0.2, np.float32))
    assert played(CheckedEnv(Simulator, "still", max_episode_steps=2), 2)[1][3] is True


@pytest.mark.parametrize(
    ("third", "reason"),
    [
        (values(np.full(4, np.nan, np.float32)), "observation not finite"),
        (values(np.zeros(3, np.float32)), "observation is float32 of shape (3,), but it is declared as float32 of sha"),
        (values([0.0] * 4), "observation is a list, but it is declared as float32 of shape (4,)"),
        (values(np.zeros(4, complex)), "observation is complex128 of shape (4,)"),
        (values(reward=np.inf), "reward not finite"),
        (
            raising(RuntimeError("mujoco:\n unstable")),
            "RuntimeError in step(): mujoco: unstable (test_checked.py, line",
        ),
        (raising(ZeroDivisionError()), "ZeroDivisionError in step() (test_checked.py, line"),
        (lambda: sys.exit(3), "sys.exit(3) in step() (test_checked.py, line"),
    ],
)
def test_an_episode_that_cannot_go_on_ends_with_a_reason_and_the_next_one_is_sound(third, reason):
    env = checked(third=third)
    made = Simulator.made
    *_, second, last = played(env, 3)
    observation, reward, terminated, truncated, info = last
    assert info["broke_off"].startswith(reason)
    assert (reward, terminated, truncated, info["is_success"], info["score"]) == (0.0, False, True, False, 0.0)
    np.testing.assert_array_equal(observation, second[0])
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(STILL)
    assert "broke_off" not in env.reset(seed=1)[1]
    assert Simulator.made == made + 1  # in a simulator that did not break


def test_a_reset_that_fails_is_an_episode_that_broke_off():
    observation, info = checked(start=raising(OSError("no such scene"))).reset(seed=0)
    assert info["broke_off"].startswith("OSError in reset(): no such scene")
    assert Simulator.observation_space.contains(observation)


def test_a_simulator_that_changes_the_current_folder_moves_no_relative_path(tmp_path):
    before = os.getcwd()

    def start():
        os.chdir(tmp_path)
        return np.zeros(4, np.float32), {}

    checked(start=start).reset(seed=0)
    assert os.getcwd() == before


def test_ctrl_c_goes_through():
    with pytest.raises(KeyboardInterrupt):
        played(checked(third=raising(KeyboardInterrupt())))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"third": lambda: (np.zeros(4), 0.0, True, {})}, "step() returned 4 values (ndarray, float, bool, dict)"),
        ({"third": values(info=[])}, "step() returned 5 values"),
        ({"third": values(reward="much")}, "the reward must be one number; got 'much'"),
        ({"third": values(reward=np.zeros(2))}, "the reward must be one number"),
        ({"start": lambda: np.zeros(4, np.float32)}, "reset() returned float32 of shape (4,)"),
        ({"start": lambda: (np.zeros(4, np.float32), None)}, "reset() returned 2 values (ndarray, NoneType)"),
        ({"info": {"is_success": float("nan")}}, "info['is_success'] must be a bool, 0 or 1"),
        ({"info": {"is_success": True, "score": 1.5}}, "info['score'] must be a number in [0, 1]; got 1.5"),
        (
            {"info": {"sucess": True}},
            "'is_success' was in no info of a whole episode; it has sucess. Did you mean 'suc",
        ),
        (
            {"info": {}},
            "'is_success' was in no info of a whole episode; it is empty. The environment's step() must put it into",
        ),
    ],
)
def test_what_gymnasium_has_no_place_for_is_refused_in_one_sentence(told, said):
    with pytest.raises(EnvContractError) as error:
        played(checked(**told))
    assert str(error.value).startswith("still: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reset_without_a_seed_is_refused_and_one_without_options_is_fine():
    class NoSeed(Simulator):
        def reset(self):
            return np.zeros(4, np.float32), {}

    class NoOptions(Simulator):
        def reset(self, seed=None):
            return np.zeros(4, np.float32), {}

    with pytest.raises(EnvContractError, match=r"old: reset\(\) cannot be called with seed="):
        CheckedEnv(NoSeed, "old").reset(seed=0)
    assert CheckedEnv(NoOptions, "old").reset(seed=0)[1] == {"is_success": False, "score": 0.0}


NUMBERS = (np.bool_, np.int64, np.uint8, np.float32, np.float64, int, float)


@given(st.booleans(), st.sampled_from(NUMBERS), st.sampled_from([(), (1,), (1, 1)]))
def test_a_truth_value_of_any_numeric_type_is_taken(truth, kind, shape):
    assert as_bool("still", "it", truth) is truth
    assert as_bool("still", "it", kind(truth)) is truth
    assert as_bool("still", "it", np.full(shape, truth, dtype=kind)) is truth


@given(
    st.one_of(
        st.floats(allow_nan=True).filter(lambda x: x not in (0, 1)),
        st.integers().filter(lambda x: x not in (0, 1)),
        st.text(),
        st.none(),
        st.dictionaries(st.text(), st.booleans()),
        st.lists(st.booleans()).filter(lambda x: len(x) != 1),
    )
)
def test_everything_else_is_no_truth_value(value):
    with pytest.raises(EnvContractError, match="still: it must be a bool, 0 or 1"):
        as_bool("still", "it", value)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"is_success": True, "success": False}, "info has is_success=True and success=False: choose one"),
        ({"success": "False"}, r"info\['success'\] must be a bool, 0 or 1"),
    ],
)
def test_the_rule_of_success_does_not_guess(info, said):
    with pytest.raises(EnvContractError, match=said):
        played(envs.make("gym", id="envs_test/Still-v0", kwargs={"info": info}))


def test_a_key_that_is_there_only_on_success_counts_as_seen_for_good():
    env = envs.make("gym", id="envs_test/Still-v0", kwargs={"info": {}, "third": values(info={"success": True})})
    assert [info["is_success"] for *_, info in played(env)] == [False, False, True, False, False]
    env.unwrapped.third = None
    assert not any(info["is_success"] for *_, info in played(env))


def test_without_a_time_limit_an_environment_is_refused_until_it_is_given_one():
    class Endless(Simulator):
        max_episode_steps = None

    gymnasium.register("envs_test/Endless-v0", entry_point=Endless)
    with pytest.raises(ValueError, match=r"envs_test/Endless-v0 has no time limit.*add env\.max_episode_steps=N"):
        envs.make("gym", id="envs_test/Endless-v0")
    assert played(envs.make("gym", id="envs_test/Endless-v0", max_episode_steps=3), 3)[2][3] is True
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="max_episode_steps must be a whole number, 1 or more"):
            envs.make("planar", max_episode_steps=wrong)


@pytest.mark.parametrize(("shape", "drawn"), [((6, 4, 3),) * 2, ((6, 4, 4), (6, 4, 3)), ((6, 4), (6, 4, 3))])
def test_a_frame_is_a_new_rgb_picture(shape, drawn):
    buffer = np.zeros(shape, np.uint8)
    env = checked(frame=lambda: buffer)
    first = env.render()
    buffer += 7
    assert (first.shape, first.dtype, first.max(), env.render().min()) == (drawn, np.uint8, 0, 7)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (lambda: None, r"render\(\) gave None; \(H, W, 3\) uint8 is needed"),
        (lambda: np.zeros((6, 4, 3), np.float32), r"render\(\) gave float32 of shape \(6, 4, 3\)"),
        (lambda: "picture", r"render\(\) gave a str"),
        (raising(NotImplementedError()), r"cannot draw itself: it has no render\(\)"),
    ],
)
def test_what_is_no_picture_is_one_sentence(frame, said):
    with pytest.raises(RenderingUnavailableError, match=f"still.*{said}"):
        checked(frame=frame).render()


def test_a_simulator_that_cannot_be_closed_harms_nobody():
    env = checked()
    env.unwrapped.close = raising(RuntimeError("no window"))
    with pytest.warns(UserWarning, match=r"still: close\(\) failed \(RuntimeError in close\(\): no window"):
        env.close()
