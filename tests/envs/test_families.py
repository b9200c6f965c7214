"""Every file of conf/env: its environment is made, stepped and reset, and reports success as it should."""

import functools
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import envs

FILES = {path.stem: path for path in (Path(__file__).resolve().parents[2] / "conf" / "env").glob("*.yaml")}
EXTRAS = {
    "gymnasium_robotics": "robotics",
    "gym_pusht": "pusht",
    "metaworld": "metaworld",
    "mujoco": "robotics",
    "ocbench": "ocbench",
}

# File, changes from the command line, the simulator's package, the observed shapes, and the width of an action.
FAMILIES = [
    ("planar", {}, None, {"": (4,)}, 2),
    ("gym", {"id": "Pendulum-v1", "kwargs": {"g": 5.0}}, None, {"": (3,)}, 1),
    ("pusht", {}, "gym_pusht", {"": (40,)}, 2),
    ("pusht", {"observation": "keypoints"}, "gym_pusht", {"keypoint": (18,), "agent_pos": (2,)}, 2),
    ("pusht", {"observation": "corners"}, "gym_pusht", {"environment_state": (16,), "agent_pos": (2,)}, 2),
    ("pusht", {"observation": "image"}, "gym_pusht", {"image": (96, 96, 3), "agent_pos": (2,)}, 2),
    ("metaworld", {}, "metaworld", {"": (69,)}, 4),
    ("metaworld", {"observation": "state"}, "metaworld", {"": (39,)}, 4),
    ("metaworld_tasks", {"tasks": ["reach-v3", "push-v3"]}, "metaworld", {"": (71,)}, 4),
    ("ocbench", {}, "ocbench", {"": (28,)}, 7),
    ("fetch", {}, "gymnasium_robotics", {"observation": (10,), "achieved_goal": (3,), "desired_goal": (3,)}, 4),
    (
        "fetch",
        {"id": "FetchPush-v4"},
        "gymnasium_robotics",
        {"observation": (25,), "achieved_goal": (3,), "desired_goal": (3,)},
        4,
    ),
    ("pointmaze", {}, "gymnasium_robotics", {"observation": (4,), "achieved_goal": (2,), "desired_goal": (2,)}, 2),
    ("adroit", {}, "gymnasium_robotics", {"": (39,)}, 28),
    ("adroit", {"id": "AdroitHandHammer-v1"}, "gymnasium_robotics", {"": (46,)}, 26),
    ("kitchen", {"observation_keys": ["observation"]}, "gymnasium_robotics", {"observation": (59,)}, 9),
    (
        "kitchen",
        {"kwargs": {"tasks_to_complete": ["microwave"]}},
        "gymnasium_robotics",
        {"observation": (59,), "achieved_goal/microwave": (1,), "desired_goal/microwave": (1,)},
        9,
    ),
    ("mujoco", {}, "mujoco", {"": (17,)}, 6),
    ("mujoco", {"id": "Hopper-v5", "success": "return>=3800"}, "mujoco", {"": (11,)}, 3),
]


def make(file, **changes):
    """Make the family of a file as a command does, with changes from the command line.

    Each is made once: a kitchen takes a second.
    """
    changed = OmegaConf.merge(OmegaConf.load(FILES[file]), changes)
    return make_once(OmegaConf.to_yaml(changed))


@functools.cache
def make_once(text):
    return envs.make(**OmegaConf.to_container(OmegaConf.create(text)))


def need(module):
    if module is not None:
        pytest.importorskip(module, reason=f"pip install 'ddim-policy[{EXTRAS[module]}]'")


def by_key(observation):
    return observation if isinstance(observation, dict) else {"": observation}


def test_every_file_is_tried():
    assert {family[0] for family in FAMILIES} == FILES.keys()


@pytest.mark.parametrize(("file", "changes", "module", "shapes", "width"), FAMILIES, ids=str)
def test_a_family_steps_reports_and_starts_again_from_its_seed(file, changes, module, shapes, width):
    need(module)
    env = make(file, **changes)
    assert env.action_space.shape == (width,)
    assert env.metadata["render_fps"] > 0
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(12)]
    runs = []
    for _ in range(2):
        observation, info = env.reset(seed=3)
        assert (info["is_success"], 0.0 <= info["score"] <= 1.0) == (False, True)
        run = [observation]
        for action in actions:
            observation, reward, terminated, truncated, info = env.step(action)
            run.append(observation)
            assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
            assert type(info["is_success"]) is bool
            assert 0.0 <= info["score"] <= 1.0
        runs.append(run)
    for first, second in zip(*runs, strict=True):
        assert {key: value.shape for key, value in by_key(first).items()} == shapes
        assert env.observation_space.contains(first)
        for key, value in by_key(first).items():
            assert value.dtype == (np.uint8 if value.ndim == 3 else np.float32)
            np.testing.assert_array_equal(value, by_key(second)[key])
    assert any(not np.array_equal(value, by_key(runs[0][0])[key]) for key, value in by_key(runs[0][-1]).items())


def test_the_kitchen_is_solved_when_its_tasks_are():
    need("gymnasium_robotics")
    env = make("kitchen", kwargs={"tasks_to_complete": ["microwave"]})
    env.reset(seed=0)
    assert env.step(np.zeros(9, np.float32))[-1]["is_success"] is False
    robot = env.unwrapped.robot_env
    joint = robot.model.joint("microwave").qposadr[0]
    robot.data.qpos[joint] = env.unwrapped.goal["microwave"][0]  # the door of the microwave, opened by hand
    *_, terminated, _, info = env.step(np.zeros(9, np.float32))
    assert terminated
    assert (info["is_success"], info["score"]) == (True, 1.0)


def test_the_maze_is_solved_at_its_goal():
    need("gymnasium_robotics")
    env = make("pointmaze")
    observation, _ = env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[-1]["is_success"] is False
    point = env.unwrapped.point_env
    point.set_state(observation["desired_goal"].astype(np.float64), np.zeros(2))
    assert env.step(np.zeros(2, np.float32))[-1]["is_success"] is True


def test_the_door_is_open_when_its_hinge_says_so():
    need("gymnasium_robotics")
    env = make("adroit")
    env.reset(seed=0)
    assert env.step(np.zeros(28, np.float32))[-1]["is_success"] is False
    base = env.unwrapped
    base.data.qpos[base.model.joint("door_hinge").qposadr[0]] = 1.5
    assert env.step(np.zeros(28, np.float32))[-1]["is_success"] is True


@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Swimmer-v5"])
def test_the_thresholds_of_mujoco_are_gymnasiums_own(id):
    import gymnasium

    comment = FILES["mujoco"].read_text()
    threshold = int(gymnasium.spec(id).reward_threshold)
    assert f"{id.split('-')[0]} {threshold}" in comment
    if id == OmegaConf.load(FILES["mujoco"]).id:
        assert OmegaConf.load(FILES["mujoco"]).success == f"return>={threshold}"
