"""The built wheel in an empty environment: complete, importable, and its commands run, away from the checkout.

It needs the package registry, for everything that constraints.txt names and the project depends on.
"""

import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.reliability

ROOMS = ("policy", "envs", "conf", "scripts")
COMMANDS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])


def run(*command: object, cwd: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    """As a user in a folder of their own would; nothing leads back to the checkout."""
    leading = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in leading} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == check, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what earlier builds left in the checkout must not fill its gaps."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The folder of the programs of an environment with the wheel and what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    began = time.perf_counter()
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    run(*pip, "check", cwd=folder)
    packages = len(run(*pip, "list", cwd=folder).stdout.splitlines()) - 2
    print(f"{wheel.name} and {packages - 1} more packages installed in {time.perf_counter() - began:.0f} s")
    yield programs
    shutil.rmtree(folder)  # more than a gigabyte, which pytest would keep


def test_the_wheel_holds_every_file_of_the_rooms(wheel):
    kept = {".py", ".pyi", ".yaml", ".html", ".md", ".typed"}
    expected = {
        str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*") if file.suffix in kept
    }
    expected |= {f"{room}/py.typed" for room in ("policy", "envs")}
    assert len(expected) > 100
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_packages_are_the_installed_ones(environment, tmp_path):
    code = "import policy, envs, scripts, conf\nfor m in (policy, envs, scripts, conf): print(m.__file__)"
    places = run(environment / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(environment.parent) for place in places)


def test_every_command_helps(environment, tmp_path):
    for command in COMMANDS:
        said = run(environment / command, "--help", cwd=tmp_path).stdout
        assert "Example:" in said
        assert "Settings (NAME=VALUE):" in said
    print(f"{len(COMMANDS)} commands help: {', '.join(COMMANDS)}")


def test_from_demonstrations_to_a_sweep(environment, tmp_path):
    def call(name: str, *overrides: str, check: int = 0):
        return run(environment / f"ddim-{name}", *overrides, cwd=tmp_path, check=check)

    data, checkpoint = "dataset.path=data/planar-v0", "checkpoint=run/checkpoint"
    call("collect", "env=planar", "episodes=10", "output_dir=data")
    call("inspect", data, "output_dir=inspected")
    call("train", "experiment=planar", data, "train.steps=20", "train.warmup_steps=5", "output_dir=run")
    assert list(tmp_path.glob("run/wandb/offline-run-*"))
    assert "success" in call("rollout", checkpoint, "episodes=4", "num_envs=2", "output_dir=rollout").stdout
    call("sweep", checkpoint, "ddim_steps=[1,2]", "episodes=2", "num_envs=2", "output_dir=sweep")
    assert (tmp_path / "sweep" / "report.html").stat().st_size > 10_000
    refusal = call("export", checkpoint, "output_dir=export", check=2).stderr
    assert "pip install 'ddim-policy[export]'" in refusal
    assert "Traceback" not in refusal
    print("collect, inspect, train, rollout and sweep ran; export asked for its extra")
