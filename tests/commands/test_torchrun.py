"""`torchrun ... ddim-train`: real processes, stopped and killed; `tests/training/test_share.py` has what they train."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ENVIRONMENT, PROGRAMS

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Shapes and settings of the suite's smallest real training; 24 has halves and thirds.
SETTINGS = [
    "experiment=planar",
    "tracker=none",
    "train.batch_size=24",
    "train.warmup_steps=5",
    "train.log_every=1",
    "train.val_every=50",
    "train.save_every=5",
    "train.rollout_every=0",
    "denoiser.hidden_size=16",
    "denoiser.dropout=0.1",
    "encoder.noise=0.01",
    "encoder.hidden_size=32",
    "obs_size=32",
]


class Training:
    """Several processes of `ddim-train`, started by torchrun."""

    def __init__(self, processes: int, *overrides: object, command: str = "ddim-train") -> None:
        # A port that is free, so that trainings of several tests do not meet.
        launch = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "--no-python", PROGRAMS / command]
        self.process = subprocess.Popen(
            [*launch, *map(str, overrides)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out, err

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(child)
        raise AssertionError(f"no rank {rank}")


def wait_for_step(training: Training, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while step_of(folder) < step:
        assert training.process.poll() is None, training.end()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def step_of(folder: Path) -> int:
    try:
        return json.loads((folder / "checkpoint/training.json").read_text())["step"]
    except OSError:
        return 0


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [entry["train/loss"] for entry in entries]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint/policy.safetensors")


def errors(err: str) -> list[str]:
    return re.findall(r"^error: .*$", err, re.MULTILINE)


@pytest.fixture(scope="session")
def data(planar_run) -> Path:
    return planar_run / "planar-v0"


@pytest.fixture(scope="session")
def alone(data, run_command, made_once) -> Path:
    """Thirty steps of one process."""

    def make(folder: Path) -> None:
        run_command("train", *SETTINGS, "train.steps=30", f"dataset.path={data}", f"output_dir={folder}")

    return made_once("trained-alone", make)


def assert_same(folder: Path, alone: Path) -> None:
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    expected = weights(alone)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_what_one_trains_and_the_first_alone_speaks(data, alone, tmp_path, processes):
    rollouts = ("train.rollout_every=15", "train.rollout_episodes=2")
    code, out, err = Training(
        processes, *SETTINGS, *rollouts, "train.steps=30", f"dataset.path={data}", f"output_dir={tmp_path}"
    ).end()
    assert code == 0, err
    assert_same(tmp_path, alone)
    for said in ("training windows from", "30 steps in", "checkpoint: ", "step 15: loss", "step 30: loss"):
        assert out.count(said) == 1, out
    assert len(set(re.findall(r"^train: ", err.replace("\r", "\n"), re.MULTILINE))) == 1
    assert "warning" not in err.lower()
    assert list((tmp_path / "training_videos").glob("*.mp4"))
    assert (tmp_path / "training.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stopped", "number"),
    [
        (2, 1, "all", signal.SIGTERM),
        (1, 2, "all", signal.SIGTERM),
        (2, 3, "all", signal.SIGINT),
        (3, 2, "the last", signal.SIGTERM),
    ],
)
def test_a_run_that_is_stopped_saves_once_and_goes_on_with_another_number_of_processes(
    data, alone, tmp_path, before, after, stopped, number
):
    whole = [*SETTINGS, f"dataset.path={data}", f"output_dir={tmp_path}", "train.steps=30", "train.keep_last=30"]
    training = Training(before, *whole)
    wait_for_step(training, tmp_path, 5)
    os.kill(training.process.pid if stopped == "all" else training.worker(before - 1), number)
    code, out, err = training.end()
    assert code != 0
    assert errors(err) == []
    (said,) = re.findall(r"stopped at step (\d+) and saved: ", out)
    step = step_of(tmp_path)
    assert step == int(said)
    assert 5 <= step < 30
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {*range(5, step, 5), step}
    code, out, err = Training(after, *whole).end()
    assert code == 0, err
    assert out.count(f"going on at step {step} of 30") == 1
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_rollout_repeats_it(data, tmp_path):
    rollouts = ("train.rollout_every=5", "train.rollout_episodes=200", "videos=0")
    run = [*SETTINGS, *rollouts, f"dataset.path={data}", f"output_dir={tmp_path}", "train.steps=10"]
    training = Training(2, *run)
    wait_for_step(training, tmp_path, 5)
    time.sleep(0.2)
    training.process.send_signal(signal.SIGTERM)
    _, out, err = training.end()
    assert errors(err) == []
    assert "step 5: loss" not in out
    assert out.count("stopped at step 5 and saved: ") == 1, out
    code, out, err = Training(2, *run).end()
    assert code == 0, err
    assert out.count("step 5: loss") == out.count("step 10: loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_process_that_dies_ends_the_run_with_one_sentence_that_names_the_checkpoint(data, tmp_path, rank):
    training = Training(3, *SETTINGS, "train.steps=100000", f"dataset.path={data}", f"output_dir={tmp_path}")
    wait_for_step(training, tmp_path, 10)
    os.kill(training.worker(rank), signal.SIGKILL)
    code, _, err = training.end()
    assert code == 1
    (said,) = errors(err)
    assert said == (
        "error: another process of this training ended before its time; the last good checkpoint is"
        f" {tmp_path}/checkpoint"
    )
    assert step_of(tmp_path) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "command", "words"),
    [
        (["train.batch_size=25"], "ddim-train", "25 windows in a step cannot be shared equally by 2 processes"),
        (["train.batch_size=12", "train.rectify_steps=2"], "ddim-train", "3 windows in a step cannot be shared"),
        (["recipe=auto", "recipe.budget=1min"], "ddim-train", "recipe=auto tries recipes in one process"),
        (["train.step=3"], "ddim-train", "unknown setting of train 'step'"),
        (["dataset.max_episodes=1000"], "ddim-train", "has 40 episodes"),
        (["device=cuda:0"], "ddim-train", "device=cuda:0 names one device for 2 processes"),
        (["--multirun", "seed=1,2"], "ddim-train", "start --multirun without torchrun"),
        ([], "ddim-rollout", "start ddim-rollout without torchrun"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_in_one_sentence(data, tmp_path, overrides, command, words):
    ours = ["checkpoint=none"] if command == "ddim-rollout" else [*SETTINGS, f"dataset.path={data}"]
    code, out, err = Training(2, *ours, f"output_dir={tmp_path}/run", *overrides, command=command).end()
    assert code == 1  # torchrun's own
    (said,) = errors(err)
    assert words in said
    assert out == ""
    assert not (tmp_path / "run/checkpoint").exists()
