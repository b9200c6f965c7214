"""Any Gymnasium id: the rules of success, and the environments that are refused with a reason."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs.gym_env import parse_success


class Counter(gymnasium.Env):
    """Counts its steps, terminates after three, and rewards each with 1; its options are observed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    observation_space = spaces.Dict({"count": spaces.Box(0, 9, (2,)), "bias": spaces.Box(0, 9, (1,))})
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None, key="success", offset=0.0):
        self.render_mode, self.key, self.offset, self.count = render_mode, key, offset, 0.0

    def observe(self):
        return {"count": np.full(2, self.count, np.float32), "bias": np.full(1, self.offset, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0.0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        return self.observe(), 1.0, self.count >= 3, False, {self.key: float(self.count >= 2)}


class Buttons(Counter):
    """The same with a choice of two buttons."""

    action_space = spaces.Discrete(2)


gymnasium.register("envs_test/Counter-v0", entry_point=Counter, max_episode_steps=10)
gymnasium.register("envs_test/Buttons-v0", entry_point=Buttons, max_episode_steps=10)


def outcomes(**kwargs):
    """Play three steps; return (is_success, score) per step."""
    env = envs.make("gym", id="envs_test/Counter-v0", **kwargs)
    env.reset(seed=0)
    infos = [env.step(np.zeros(1, np.float32))[-1] for _ in range(3)]
    return [(info["is_success"], info["score"]) for info in infos]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [(False, 0.0), (True, 1.0), (True, 1.0)]),
        ({"kwargs": {"key": "is_success"}}, [(False, 0.0), (True, 1.0), (True, 1.0)]),
        ({"success": "info:won", "kwargs": {"key": "won"}}, [(False, 0.0), (True, 1.0), (True, 1.0)]),
        ({"success": "termination"}, [(False, 0.0), (False, 0.0), (True, 1.0)]),
        ({"success": "return>=2"}, [(False, 0.5), (False, 1.0), (True, 1.0)]),
        ({"success": "return>=4"}, [(False, 0.25), (False, 0.5), (False, 0.75)]),
        ({"success": "return>=-0.5e1"}, [(False, 0.0), (False, 0.0), (True, 1.0)]),
    ],
)
def test_success_is_read_as_told(kwargs, expected):
    assert outcomes(**kwargs) == expected


@pytest.mark.parametrize("text", ["", "info:", "return>200", "return >= 2", "return>=many", "terminated"])
def test_a_malformed_rule_is_refused(text):
    with pytest.raises(ValueError, match=r"allowed: 'info:KEY', 'termination' or 'return>=NUMBER'"):
        parse_success(text)


def test_the_first_info_says_that_nothing_is_achieved_yet():
    env = envs.make("gym", id="envs_test/Counter-v0", kwargs={"offset": 7.0})
    observation, info = env.reset(seed=0)
    assert {key: value.tolist() for key, value in observation.items()} == {"bias": [7.0], "count": [0.0, 0.0]}
    assert (info["is_success"], info["score"]) == (False, 0.0)
    assert env.metadata["render_fps"] == 25


def test_a_return_starts_anew_with_each_episode():
    env = envs.make("gym", id="envs_test/Counter-v0", success="return>=3")
    for _ in range(2):
        env.reset(seed=0)
        assert env.step(np.zeros(1, np.float32))[-1]["score"] == pytest.approx(1 / 3)


def test_pendulum_is_reproducible_and_knows_its_control_rate():
    fresh = envs.make("gym", id="Pendulum-v1", success="return>=-200")
    used = envs.make("gym", id="Pendulum-v1", success="return>=-200")
    used.reset(seed=1)
    used.step(np.ones(1, np.float32))
    first, second = fresh.reset(seed=3)[0], used.reset(seed=3)[0]
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float32
    for _ in range(20):
        action = np.array([0.7], np.float32)
        np.testing.assert_array_equal(fresh.step(action)[0], used.step(action)[0])
    assert fresh.metadata["render_fps"] == pytest.approx(20)  # dt = 0.05 s; its metadata says 30


def test_keys_are_chosen_by_option():
    env = envs.make("gym", id="envs_test/Counter-v0", observation_keys=["count"])
    assert list(env.reset(seed=0)[0]) == list(env.observation_space) == ["count"]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"id": "envs_test/Counter-v0", "observation_keys": ["cont"]}, ["'cont'", "Did you mean 'count'?"]),
        ({"id": "envs_test/Buttons-v0"}, ["Discrete(2)", "continuous actions"]),
        ({"id": "Pendulun-v1"}, ["'Pendulun-v1'", "Did you mean 'Pendulum-v1'?"]),
        ({"id": "Pendulum-v99"}, ["'Pendulum-v99'", "Did you mean 'Pendulum-v1'?"]),
        ({"id": "no_such_module:Thing-v0"}, ["no_such_module"]),
        ({"id": "no_such_module.py:Thing-v0"}, ["Write it without '.py': no_such_module:Thing-v0."]),
        ({"id": "envs_test/Counter-v0", "kwargs": {"ofset": 1}}, ["ofset"]),
        ({"id": "envs_test/Counter-v0", "succes": "termination"}, ["Did you mean 'success'?"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(kwargs, words):
    with pytest.raises(ValueError) as error:
        envs.make("gym", **kwargs)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_module_ids_import_their_module(monkeypatch, tmp_path):
    (tmp_path / "envs_test_plugin.py").write_text(
        "import gymnasium\ngymnasium.register('envs_test/Late-v0', entry_point='envs.planar:PlanarEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Ids of other packages are written 'module:Id'"):
        envs.make("gym", id="envs_test/Late-v0")
    env = envs.make("gym", id="envs_test_plugin:envs_test/Late-v0")
    assert env.reset(seed=0)[0].shape == (4,)


@pytest.mark.parametrize(
    ("id", "module", "extra"),
    [
        ("gymnasium_robotics:FetchReach-v4", "gymnasium_robotics", "robotics"),
        ("FetchReach-v4", "gymnasium_robotics", "robotics"),
        ("HandManipulateBlock-v1", "gymnasium_robotics", "robotics"),
        ("PointMaze_Large-v3", "gymnasium_robotics", "robotics"),
        ("AdroitHandPen-v1", "gymnasium_robotics", "robotics"),
        ("FrankaKitchen-v1", "gymnasium_robotics", "robotics"),
        ("gym_pusht/PushT-v0", "gym_pusht", "pusht"),
        ("Meta-World/MT1", "metaworld", "metaworld"),
    ],
)
def test_a_missing_extra_ends_in_the_install_command(monkeypatch, id, module, extra):
    monkeypatch.delitem(gymnasium.registry, id, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(envs.MissingExtraError, match=rf"pip install 'ddim-policy\[{extra}\]'$"):
        envs.make("gym", id=id)


KNOWN = {
    "FetchReach-v4": ("gymnasium_robotics", "robotics"),
    "gym_pusht/PushT-v0": ("gym_pusht", "pusht"),
    "Meta-World/MT1": ("metaworld", "metaworld"),
}


def test_ids_of_known_packages_need_no_module():
    """In a process of its own, where nothing has imported the packages yet."""
    for module, extra in KNOWN.values():
        pytest.importorskip(module, reason=f"pip install 'ddim-policy[{extra}]'")
    code = (
        "import sys, gymnasium\n"
        "from envs.gym_env import make_gym, require_registered\n"
        f"for id, (module, _) in {KNOWN}.items():\n"
        "    assert id not in gymnasium.registry and module not in sys.modules, id\n"
        "    require_registered(id)\n"
        "    assert id in gymnasium.registry and module in sys.modules, id\n"
        "    if module != 'metaworld':\n"  # which takes more than a second
        "        print('made', make_gym(id).unwrapped.spec.id)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    made = [line for line in done.stdout.splitlines() if line.startswith("made")]
    assert made == ["made FetchReach-v4", "made gym_pusht/PushT-v0"], done.stderr


@pytest.mark.slow
def test_meta_worlds_own_id_is_made():
    pytest.importorskip("metaworld", reason="pip install 'ddim-policy[metaworld]'")
    env = envs.make("gym", id="Meta-World/MT1", kwargs={"env_name": "reach-v3"})
    assert env.unwrapped.spec.id == "Meta-World/MT1"
    assert env.reset(seed=0)[0].shape == (39,)


def test_a_mistyped_id_of_a_known_package_is_named():
    pytest.importorskip("gymnasium_robotics", reason="pip install 'ddim-policy[robotics]'")
    with pytest.raises(ValueError, match=r"'FetchReech-v4' is not .* Did you mean 'FetchReach-v4'\?"):
        envs.make("gym", id="FetchReech-v4")


def test_fetch_reports_its_own_success():
    pytest.importorskip("gymnasium_robotics", reason="pip install 'ddim-policy[robotics]'")
    env = envs.make("gym", id="gymnasium_robotics:FetchReach-v4")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.metadata["render_fps"] == pytest.approx(25)
    for _ in range(40):  # drive the hand to the goal
        direction = np.clip(10 * (observation["desired_goal"] - observation["achieved_goal"]), -1, 1)
        observation, *_, info = env.step(np.append(direction, 0.0).astype(np.float32))
    assert info["is_success"] is True
    assert info["score"] == 1.0
