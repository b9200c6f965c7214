"""Real training processes, stopped and killed, that end where an undisturbed one does, to the last bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from policy.common.locks import only_process
from tests.conftest import ENVIRONMENT, ROOT

STEPS = 120
# Entries, validations, rollouts and checkpoints fall on different steps; dropout and noise need the generators.
SETTINGS = [
    "experiment=planar",
    "tracker=none",
    f"train.steps={STEPS}",
    "train.batch_size=32",
    "train.warmup_steps=20",
    "train.log_every=7",
    "train.val_every=15",
    "train.save_every=1",
    "train.rollout_every=50",
    "train.rollout_episodes=2",
    "train.on_bad_loss=skip",
    "denoiser.hidden_size=16",
    "denoiser.dropout=0.1",
    "encoder.noise=0.01",
    "encoder.hidden_size=32",
    "obs_size=32",
]


class Training:
    """A `scripts/train.py` of its own, in a folder."""

    def __init__(self, data: Path, folder: Path) -> None:
        command = [sys.executable, ROOT / "scripts/train.py", *SETTINGS, f"dataset.path={data}", f"output_dir={folder}"]
        self.folder = folder
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def wait_for_start(self) -> str:
        """Until it has told how much there is to train on; gives what it told."""
        told = ""
        while "training windows" not in told:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            told += line
        return told

    def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def wait_until(holds: Callable[[], object], training: Training, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and training.process.poll() is None:
        assert time.monotonic() < deadline, "it never came to that"


def half_written(folder: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return folder / ".checkpoint.new"


def step_of(folder: Path) -> int:
    file = folder / "checkpoint/training.json"
    try:
        return json.loads(file.read_text())["step"]
    except OSError:  # not there yet, or just being replaced
        return 0


def files(folder: Path) -> dict[str, bytes]:
    """The history of a finished run, and every file of its checkpoints, the last and the best ones included."""
    found = [folder / "history.jsonl"]
    found += [path for name in ("checkpoint", "checkpoints") for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def assert_same_run(folder: Path, whole: Path) -> None:
    got, expected = files(folder), files(whole)
    assert {"checkpoint/policy.safetensors", "checkpoint/training.safetensors", "checkpoint/training.json"} <= set(got)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    logged = [entry["step"] for entry in json.loads(got["checkpoint/training.json"])["history"]]
    assert logged == sorted({*range(7, STEPS, 7), *range(15, STEPS, 15), *range(50, STEPS, 50), STEPS})


@pytest.fixture(scope="session")
def data(planar_run) -> Path:
    return planar_run / "planar-v0"


@pytest.fixture(scope="session")
def whole(data, run_command, made_once) -> Path:
    """A run that nothing disturbs."""
    return made_once("whole", lambda folder: finish(run_command, data, folder))


def finish(run_command, data: Path, folder: Path, **settings) -> subprocess.CompletedProcess[str]:
    """The same training in this process, to its end."""
    return run_command("train", *SETTINGS, f"dataset.path={data}", f"output_dir={folder}", **settings)


@pytest.mark.reliability
def test_stopped_killed_and_locked_out_a_run_ends_as_if_nothing_had_been(data, whole, run_command, tmp_path):
    training = Training(data, tmp_path)
    training.wait_for_start()
    wait_until(lambda: step_of(tmp_path) > 10, training)
    code, out, err = training.end(signal.SIGTERM)  # Ctrl-C likewise, in test_commands
    assert code == 130, err
    stopped = re.search(r"stopped at step (\d+) and saved: the same command with output_dir=(\S+) goes on", out)
    assert stopped, out
    assert int(stopped[1]) == step_of(tmp_path) < STEPS
    assert stopped[2] == str(tmp_path)

    training = Training(data, tmp_path)
    assert f"going on at step {stopped[1]} of {STEPS}" in training.wait_for_start()
    wait_until(lambda: step_of(tmp_path) > int(stopped[1]), training)
    pid = training.process.pid
    training.process.send_signal(signal.SIGSTOP)  # it stays where it is, however long a second one takes to start
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {pid} on "), only_process(tmp_path):
        pass
    err = finish(run_command, data, tmp_path, check=2).stderr
    assert re.match(rf"^error: {tmp_path} is in use by process {pid} on \S+: wait for it, stop it with", err), err
    training.process.send_signal(signal.SIGCONT)
    wait_until(half_written(tmp_path).exists, training)
    assert training.end(signal.SIGKILL)[0] == -signal.SIGKILL

    out = finish(run_command, data, tmp_path).stdout
    assert f"process {pid} on " in out
    assert "was killed while it worked" in out
    assert_same_run(tmp_path, whole)
    with only_process(tmp_path):  # it let go
        pass


def test_a_lock_file_of_a_dead_process_keeps_nobody_out(tmp_path, capsys):
    (tmp_path / ".train.lock").write_text("4194305 on elsewhere")  # beyond the largest process id
    with only_process(tmp_path):
        assert "process 4194305 on elsewhere was killed" in capsys.readouterr().out
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"), only_process(tmp_path):
            pass
    with only_process(tmp_path):
        assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"cannot lock .*: choose another output_dir="),
        only_process(tmp_path / "none"),
    ):
        pass


@pytest.mark.reliability
def test_twenty_kills_change_nothing(data, whole, tmp_path):
    """At random moments: of the run, and within the writing of a checkpoint."""
    kills, seed = 20, 0
    draw = random.Random(seed)
    writing, reached = 0, []
    for kill in range(kills):
        training = Training(data, tmp_path)
        training.wait_for_start()
        before = step_of(tmp_path)
        target = before + draw.randint(1, (STEPS - before) // (kills - kill + 1))
        wait_until(lambda target=target: step_of(tmp_path) >= target, training)
        if kill % 2:  # as soon as the next checkpoint is begun, and a little later
            wait_until(half_written(tmp_path).exists, training)
            time.sleep(draw.uniform(0, 0.004))
        else:
            time.sleep(draw.uniform(0, 0.05))
        code, _, err = training.end(signal.SIGKILL)
        assert code == -signal.SIGKILL, f"the run ended before the kill: {err}"
        writing += half_written(tmp_path).exists()
        reached.append(step_of(tmp_path))
    code, _, err = Training(data, tmp_path).end()
    assert code == 0, err
    assert_same_run(tmp_path, whole)
    print(f"\n{kills} kills (seed {seed}) at steps {reached} of {STEPS}, {writing} in the middle of a checkpoint:")
    print(f"{len(files(tmp_path))} files of checkpoints equal those of an undisturbed run, bit for bit")
    assert writing >= 5
