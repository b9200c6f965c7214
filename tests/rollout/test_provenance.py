"""What episodes were run with: what is recorded, what counts as a difference, and how a mixture is refused."""

import sys

import gymnasium
import numpy as np
import pytest
import torch

import envs
from policy.rollout.provenance import (
    UNKNOWN,
    accept_mixture,
    describe_provenance,
    differences,
    provenance,
    with_packages,
)

# A package of somebody's own: its environment, and what that rests on.
PACKAGE = {
    "__init__.py": "",
    "env.py": """
import gymnasium, numpy as np
from . import gravity
from .limits import (
    STEPS,
    FEW as few,
)

class Falling(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.fullpath = __file__.replace("env.py", "robot.xml")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {"is_success": False}
""",
    "gravity.py": "import json\nfrom my_falling.deep.constants import G\n",
    "limits.py": "STEPS, FEW = 100, 3\n",
    "deep/__init__.py": "",
    "deep/constants.py": "G = 9.81\n",
    "training.py": "import my_falling.env\n",
    "robot.xml": "<mujoco/>",
}
HASHED = {"my_falling/env.py", "my_falling/gravity.py", "my_falling/limits.py", "my_falling/deep/constants.py"}


@pytest.fixture
def falling(tmp_path, monkeypatch):
    """The folder of the package, and how to make its environment as a new process would."""
    folder = tmp_path / "my_falling"
    for name, text in PACKAGE.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def make(steps=50):
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_falling"]:
            del sys.modules[name]
        gymnasium.registry.pop("MyFalling-v0", None)
        gymnasium.register("MyFalling-v0", "my_falling.env:Falling", max_episode_steps=steps)
        return envs.make("gym", id="MyFalling-v0")

    yield folder, make
    gymnasium.registry.pop("MyFalling-v0", None)


def changed(before, after):
    assert all(before[group].keys() == after[group].keys() for group in before)
    return {name for group in before for name in before[group] if before[group][name] != after[group][name]}


def test_versions_machine_and_sources_are_recorded():
    env = envs.make("planar")
    found = provenance(env, "cpu")
    assert found.keys() == {"versions", "machine", "environment"}
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["gymnasium"] == gymnasium.__version__
    assert "ddim-policy" in found["versions"]
    assert found["machine"].keys() == {"processor"}
    assert found["machine"]["processor"]
    assert {"envs/planar.py", "envs/checked.py", "envs/spaces.py"} <= found["environment"].keys()
    assert all(name.startswith("envs/") for name in found["environment"])  # neither ours nor Gymnasium's wrappers
    env.reset(seed=3)
    assert provenance(env, "cpu") == found == provenance(envs.make("planar"), "cpu")


def test_the_simulator_inside_an_environment_is_found():
    pytest.importorskip("gym_pusht")
    found = provenance(envs.make("pusht"), "cpu")
    assert {"gym-pusht", "pymunk"} <= found["versions"].keys()
    assert {"envs/pusht.py", "envs/pusht_geometry.py", "gym_pusht/envs/pusht.py"} <= found["environment"].keys()


def test_simulators_in_a_list_are_found():
    class Several(gymnasium.Env):
        def __init__(self):
            self.tasks = [envs.make("planar")]
            self.itself = self

    assert "envs/planar.py" in provenance(Several(), "cpu")["environment"]


def test_an_environment_rests_on_what_it_imports_from_its_own_package(falling):
    folder, make = falling
    before = provenance(make(), "cpu")
    assert HASHED | {"robot.xml"} <= before["environment"].keys()
    for name in ("env.py", "limits.py", "deep/constants.py"):
        with (folder / name).open("a") as file:
            file.write("# another line\n")
        after = provenance(make(), "cpu")
        assert changed(before, after) == {f"my_falling/{name}"}
        before = after
    (folder / "training.py").write_text("print('of no importance')\n")
    assert provenance(make(), "cpu") == before
    (folder / "robot.xml").write_text("<mujoco></mujoco>")
    assert changed(before, provenance(make(), "cpu")) == {"robot.xml"}


def test_another_registration_is_another_environment(falling):
    _, make = falling
    before, after = provenance(make(), "cpu"), provenance(make(steps=60), "cpu")
    assert changed(before, after) == {"the registration of MyFalling-v0"}


def test_the_file_of_a_function_that_makes_or_changes_an_environment_counts(falling):
    folder, make = falling
    (folder / "family.py").write_text("def observe(observation):\n    return observation\n")
    env = make()
    from my_falling.family import observe

    space = env.observation_space
    seen = provenance(gymnasium.wrappers.TransformObservation(env, observe, space), "cpu")
    assert seen["environment"].keys() - provenance(env, "cpu")["environment"].keys() == {"my_falling/family.py"}


def test_a_source_that_is_no_longer_python_is_hashed_all_the_same(falling):
    folder, make = falling
    env = make()
    (folder / "env.py").write_text("def (")
    assert "my_falling/env.py" in provenance(env, "cpu")["environment"]


def test_a_package_is_found_by_its_module():
    """Also one that is not called like it, and without asking for the modules of all packages."""
    found = with_packages({"versions": {"torch": "2.7.0"}}, ["yaml", "gymnasium", "no_such_module"])["versions"]
    assert found == {"torch": "2.7.0", "PyYAML": found["PyYAML"], "gymnasium": gymnasium.__version__}


def test_a_gpu_is_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert provenance(envs.make("planar"), "cuda")["machine"]["gpu"] == "a GPU"


# --- differences -------------------------------------------------------------------------------------------------

OLD = {
    "versions": {"torch": "2.7.0", "numpy": "2.0.0"},
    "machine": {"processor": "one"},
    "environment": {"envs/planar.py": "0123456789ab"},
}
NEW = {
    "versions": {"torch": "2.13.0", "numpy": "2.0.0", "mujoco": "3.3.0"},
    "machine": {"processor": "one"},
    "environment": {"envs/planar.py": "ba9876543210", "envs/spaces.py": "0"},
}
MANY = {"versions": {str(number): "old" for number in range(6)}}, {"versions": {str(n): "new" for n in range(6)}}
ASKED = {"where": "out/episodes.jsonl", "instead": "Choose another output_dir="}


def test_only_names_that_both_have_can_differ():
    assert differences([OLD, NEW]) == ["torch 2.7.0 and 2.13.0", "envs/planar.py 0123456789ab and ba9876543210"]
    assert differences([OLD, NEW, {"versions": {"torch": "2.8.0"}}])[0] == "torch 2.7.0 and 2.13.0 and 2.8.0"
    assert differences([OLD]) == differences([OLD, OLD]) == differences([OLD, UNKNOWN]) == differences([]) == []
    assert differences([OLD, {**OLD, "versions": {**OLD["versions"], "mujoco": "3.3.0"}}]) == []


def test_provenances_are_described_without_the_hashes():
    assert describe_provenance([OLD]) == "torch 2.7.0, numpy 2.0.0, processor one"
    assert describe_provenance([UNKNOWN, OLD, {"versions": {"torch": "2.8.0"}}]).endswith("processor one; torch 2.8.0")
    assert describe_provenance([UNKNOWN]) == describe_provenance([]) == ""


def test_a_mixture_is_refused_with_both_named_or_accepted():
    assert accept_mixture([OLD, OLD], False, **ASKED) == accept_mixture([UNKNOWN], False, **ASKED) == []
    with pytest.raises(ValueError) as refused:
        accept_mixture([OLD, NEW], False, **ASKED)
    assert str(refused.value) == (
        "out/episodes.jsonl would mix episodes that were not run alike: torch 2.7.0 and 2.13.0, envs/planar.py"
        " 0123456789ab and ba9876543210. Choose another output_dir=, or accept the mixture with mix=true: the report"
        " shows it"
    )
    (said,) = accept_mixture([OLD, NEW], True, **ASKED)
    assert said.startswith("the episodes were not all run alike (mix=true): torch 2.7.0 and 2.13.0, envs/planar.py")
    (said,) = accept_mixture(MANY, True, **ASKED)
    assert said.endswith("2 old and new, 3 old and new, and 2 more")


def test_episodes_of_unknown_provenance_are_no_mixture_but_are_named():
    (said,) = accept_mixture([UNKNOWN, OLD], False, **ASKED)
    assert said.startswith("some of the episodes come from a version that did not record what they were run with")
