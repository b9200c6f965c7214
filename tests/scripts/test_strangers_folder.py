"""A command run inside a stranger's folder runs nothing that lies there, until a setting names a module in it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policy import load_checkpoint
from tests.conftest import ENVIRONMENT, PROGRAMS, as_a_process

# Names under which Python or a library in use would import a module of the current folder, if it were searched.
MODULES = (
    "hydra",
    "hydra_plugins/evil",
    "matplotlib",
    "multiprocessing/__init__",
    "numpy",
    "policy",
    "sitecustomize",
    "struct",
    "torch",
    "usercustomize",
    "wandb",
)
# Groups of entry points that the libraries in use load.
GROUPS = ("gymnasium.envs", "hydra.plugins", "numcodecs.codecs", "torch.backends", "zarr.codecs", "wandb.triggers")
SMALL = ("train.steps=1", "train.batch_size=8", "train.warmup_steps=1", "train.rollout_every=0")
REACH = """
import gymnasium, numpy as np
class Reach(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}
    def step(self, action):
        return np.zeros(4, np.float32), 0.0, True, False, {"is_success": True}
gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=5)
"""


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder with a file in every place where the libraries would look; each leaves a mark when it is executed."""
    folder, mark = tmp_path / "stranger", tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write(__file__ + '\\n')\n"
    for name in (*MODULES, "evil_entry"):
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    for kind in ("dist-info", "egg-info"):
        info = folder / f"evil-1.0.{kind}"
        info.mkdir()
        (info / ("METADATA" if kind == "dist-info" else "PKG-INFO")).write_text("Name: evil\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("".join(f"[{group}]\nx = evil_entry:f\n" for group in GROUPS))
    (folder / "matplotlibrc").write_text("font.size: 2.5\nsavefig.dpi: 7\n")
    (folder / ".env").write_text("WANDB_BASE_URL=http://stranger.invalid\n")
    for wandb in ("wandb", ".wandb"):
        (folder / wandb).mkdir()
        (folder / wandb / "settings").write_text("[default]\nbase_url = http://stranger.invalid\nentity = stranger\n")
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "-C", folder, "config", "core.fsmonitor", f"sh -c 'echo git >> {mark}'"], check=True)
    return folder


def mark(stranger):
    path = stranger.parent / "mark"
    return path.read_text() if path.exists() else ""


def start(folder, name, *settings, **variables):
    command = [PROGRAMS / f"ddim-{name}", *map(str, settings)]
    env = {**ENVIRONMENT, **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def saved_with(planar_run, env, folder):
    """The trained policy, saved again with the settings of another environment."""
    policy = load_checkpoint(planar_run / "checkpoint").policy
    policy.origin = dataclasses.replace(policy.origin, env=env)
    policy.save_pretrained(folder)


def test_the_marks_would_be_left(stranger):
    subprocess.run([sys.executable, "-c", "import multiprocessing, struct"], cwd=stranger, check=False)
    assert "multiprocessing" in mark(stranger)


@pytest.mark.reliability
def test_processes_of_a_sweep_run_nothing_in_a_strangers_folder(stranger, planar_run, tmp_path):
    settings = ("ddim_steps=[1]", "episodes=2", "num_envs=2", "workers=2", "videos=0", "tracker=wandb")
    done = start(stranger, "sweep", f"checkpoint={planar_run}/checkpoint", *settings, f"output_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert mark(stranger) == ""
    assert (tmp_path / "out/report.html").exists()
    records = list((tmp_path / "out/wandb").glob("offline-run-*/*.wandb"))
    assert len(records) == 1
    assert b"stranger" not in records[0].read_bytes().replace(os.fsencode(stranger), b"")


@pytest.mark.reliability
@pytest.mark.parametrize("name", ["inspect", "train", "rollout", "collect"])
def test_no_command_runs_anything_in_a_strangers_folder(name, stranger, planar_run, tmp_path):
    settings = {
        "inspect": (f"dataset.path={planar_run}/planar-v0",),
        "train": (f"dataset.path={planar_run}/planar-v0", *SMALL),
        "rollout": (f"checkpoint={planar_run}/checkpoint", "episodes=2", "num_envs=2", "video=1"),
        "collect": ("env=planar", "episodes=1"),
    }[name]
    done = start(stranger, name, *settings, f"output_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert mark(stranger) == ""


def test_a_module_that_a_setting_names_is_found_and_its_folder_is_searched_last(
    planar_run, tmp_path, monkeypatch, run_command
):
    (tmp_path / "reach_here.py").write_text(f"import reach_besides\n{REACH}")
    (tmp_path / "reach_besides.py").write_text("")
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/evil.py").write_text("raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path)
    checkpoint = f"checkpoint={planar_run}/checkpoint"
    common = ("episodes=1", "num_envs=1", "sampler.ddim_steps=1")
    done = run_command("rollout", checkpoint, "env=gym", "env.id=reach_here:Reach-v0", *common, "output_dir=out")
    assert "100 %" in done.stdout or "100%" in done.stdout
    assert str(tmp_path) not in sys.path[:-1]
    assert str(tmp_path) not in sys.path
    # A checkpoint that was trained there names the module, and only the user has it imported.
    saved_with(planar_run, {"name": "gym", "id": "reach_here:Reach-v0", "success": "termination"}, tmp_path / "saved")
    refused = run_command("rollout", "checkpoint=saved", *common, "output_dir=refused", check=2)
    assert "if you trust it, add env.id=reach_here:Reach-v0" in refused.stderr
    run_command("rollout", "checkpoint=saved", "env.id=reach_here:Reach-v0", *common, "output_dir=trusted")


def test_the_current_folder_is_not_searched_while_nothing_names_a_module(tmp_path, monkeypatch, planar_run):
    from scripts import rollout

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("policy.commands.rollout.set_stage", lambda *given, **settings: 1 / 0)
    with as_a_process("rollout.py", f"checkpoint={planar_run}/checkpoint"):
        with pytest.raises(ZeroDivisionError):
            rollout.main()
        assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "module"), [("envs", "envs.reach"), ("envs", "envs"), ("policy", "policy.reach"), ("scripts", "scripts.r")]
)
def test_a_folder_of_the_users_with_a_name_of_ours_is_named_beside_ours(
    name, module, planar_run, tmp_path, monkeypatch, run_command
):
    (tmp_path / name).mkdir()
    for file in ("__init__", "reach", "r"):
        (tmp_path / name / f"{file}.py").write_text(REACH)
    monkeypatch.chdir(tmp_path)
    settings = ("env=gym", f"env.id={module}:Reach-v0", "episodes=1", "output_dir=out")
    error = run_command("rollout", f"checkpoint={planar_run}/checkpoint", *settings, check=2).stderr
    assert f"there are two packages called {name}: Python takes" in error
    assert f"and not {tmp_path / name}: rename yours" in error
    assert error.count("\n") == 1
    if module != "envs":
        error = run_command("rollout", f"plugins=[{module}]", "checkpoint=x", check=2).stderr
        assert f"plugins=[{module}]: there are two packages called {name}" in error


def test_a_folder_that_hides_a_package_of_ours_is_named_beside_it(tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/__init__.py").touch()
    done = start(tmp_path, "rollout", "--help", PYTHONPATH=".")
    assert done.returncode == 2
    assert f"there are two packages called envs: Python takes {tmp_path / 'envs'}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"name": "planer"}, "Did you mean 'planar'?"),
        ({"name": "planar", "image_sice": 3}, "did you mean 'image_size'?"),
        ({"name": "planar", "image_size": "large"}, "env.image_size should be int; got 'large'"),
        ({"name": "planar", "max_episode_steps": [3]}, "env.max_episode_steps should be"),
        ({"name": "gym", "id": ["Pendulum-v1"]}, "whose id is not a text"),
        ({"name": "gym", "id": "os:system"}, "if you trust it, add env.id=os:system"),
        ({"name": "gym", "id": "my_env:Reach-v0"}, "if you trust it, add env.id=my_env:Reach-v0"),
        ({"name": "gym", "id": "Ant-v5", "kwargs": {"xml_file": "evil.xml"}}, "env.kwargs.xml_file='evil.xml'"),
    ],
)
def test_an_environment_in_a_checkpoint_is_checked_before_it_is_made(
    env, said, planar_run, tmp_path, monkeypatch, run_command
):
    (tmp_path / "my_env.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    saved_with(planar_run, env, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["env"] == env
    error = run_command("rollout", "checkpoint=saved", "episodes=1", "output_dir=out", check=2).stderr
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mark").exists()
    assert "my_env" not in sys.modules


def test_a_function_of_the_users_is_named_as_module_and_function(planar_run, tmp_path, monkeypatch, run_command):
    (tmp_path / "my_halves.py").write_text(
        "def half(observations):\n    return {k: v / 2 for k, v in observations.items()}\n"
    )
    monkeypatch.chdir(tmp_path)
    data = f"dataset.path={planar_run}/planar-v0"
    run_command("inspect_data", data, "dataset.transform=my_halves:half", "output_dir=halves")
    run_command("inspect_data", data, "output_dir=whole")
    means = [json.loads(Path(f"{name}/inspect.json").read_text())["keys"][0]["whole"] for name in ("halves", "whole")]
    assert means[0]["max"] == pytest.approx(means[1]["max"] / 2)
    for wrong in ("my_halves.half", ":half"):
        error = run_command("inspect_data", data, f"dataset.transform={wrong!r}", check=2).stderr
        assert "dataset.transform takes a function as module:function" in error
    for wrong, said in (("my_halfes:half", "my_halfes"), ("my_halves:halff", "halff")):
        error = run_command("inspect_data", data, f"dataset.transform={wrong}", check=2).stderr
        assert said in error
        assert error.count("\n") == 1
