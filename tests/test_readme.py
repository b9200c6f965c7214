"""The README's code and commands, run as a reader would."""

import doctest
import json
import re
import shlex
import subprocess
import sys

import gymnasium
import pytest

from tests.conftest import ENVIRONMENT, PROGRAMS, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_examples_print_what_the_readme_says():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 5
    assert results.failed == 0


@pytest.fixture
def own_files(tmp_path):
    """The README's own environment and demonstrations in a folder, and the commands that use them, word by word."""
    files = {}
    for language, code in BLOCKS:
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", code)):
            files[name[1]] = code
            (tmp_path / name[1]).write_text(code)
    assert files.keys() == {"my_env.py", "my_demos.py"}
    assert len([line for line in files["my_env.py"].splitlines() if line.strip()]) <= 18
    commands = next(code for language, code in BLOCKS if language == "bash" and "my_demos.py" in code)
    return tmp_path, [shlex.split(line) for line in commands.strip().splitlines()]


def check_swept(folder):
    rows = json.loads(next(folder.glob("outputs/sweep/*/sweep.json")).read_text())["cells"]
    assert [row["ddim_steps"] for row in rows] == [1, 2, 8]
    assert max(row["success_rate"] for row in rows) > 0.5


def test_own_environment_and_own_demonstrations_train_and_sweep(own_files, run_command, plain_reports, monkeypatch):
    """The commands in this process, with a smaller network."""
    folder, (demonstrate, train, sweep) = own_files
    assert [line[0] for line in (demonstrate, train, sweep)] == ["python", "ddim-train", "ddim-sweep"]
    assert run_in(folder, [sys.executable, *demonstrate[1:]]).returncode == 0
    monkeypatch.chdir(folder)
    small = ["obs_size=64", "denoiser.hidden_size=32", "denoiser.num_layers=2", "train.batch_size=64", "tracker=none"]
    try:
        run_command("train", *train[1:], *small)
        run_command("sweep", *sweep[1:], "videos=0")
    finally:
        sys.modules.pop("my_env", None)
        gymnasium.registry.pop("PointReach-v0", None)
    check_swept(folder)


@pytest.mark.slow
def test_own_environment_and_own_demonstrations_train_and_sweep_word_by_word(own_files):
    """The commands as a reader types them."""
    folder, commands = own_files
    for program, *arguments in commands:
        run = sys.executable if program == "python" else PROGRAMS / program
        done = run_in(folder, [run, *arguments])
        assert done.returncode == 0, f"{program} {arguments}\n{done.stdout}\n{done.stderr}"
    check_swept(folder)


def run_in(folder, command):
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("target", ["demo", "test", "setup", "help"])
def test_make_targets_of_the_readme_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
