"""The README's code and commands, run as a reader would."""

import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_examples_print_what_the_readme_says():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 5
    assert results.failed == 0


def test_own_environment_and_own_demonstrations_train_and_sweep(tmp_path):
    files = {}
    for language, code in BLOCKS:
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", code)):
            files[name[1]] = code
            (tmp_path / name[1]).write_text(code)
    assert files.keys() == {"my_env.py", "my_demos.py"}
    assert len([line for line in files["my_env.py"].splitlines() if line.strip()]) <= 18
    commands = next(code for language, code in BLOCKS if language == "bash" and "my_demos.py" in code)
    binaries = {"python": [sys.executable]}
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line)
        command = [*binaries.get(program, [str(Path(sys.executable).parent / program)]), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    rows = json.loads(next(tmp_path.glob("outputs/sweep/*/sweep.json")).read_text())["cells"]
    assert [row["ddim_steps"] for row in rows] == [1, 2, 8]
    assert max(row["success_rate"] for row in rows) > 0.5


def test_every_command_in_the_readme_exists_and_takes_its_settings():
    commands = [
        line
        for language, code in BLOCKS
        if language == "bash"
        for line in code.splitlines()
        if line.startswith("python scripts/")
    ]
    assert len(commands) >= 6
    for line in commands:
        script, *overrides = shlex.split(line)[1:]
        assert (ROOT / script).is_file()
        assert all(re.fullmatch(r"[a-z_.]+=.+", override) for override in overrides)


@pytest.mark.parametrize("target", ["demo", "test", "setup", "help"])
def test_make_targets_of_the_readme_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
