"""Checkpoints through time and trouble: older schemas, kept ones, kills and full disks."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policy import DiffusionPolicy, Sampler, TrainSettings, load_checkpoint, save_checkpoint
from policy.checkpoint import SaveError, digest_of, keep_checkpoint, keeping, read_history, resume_training
from policy.checkpoint.files import SCHEMA_VERSION, Folder
from policy.checkpoint.keeping import rank
from policy.checkpoint.resuming import SETTINGS_OF_BEFORE
from policy.data.demonstrations import Demonstrations
from policy.training.preparation import prepare_run
from tests.conftest import ENVIRONMENT, ROOT, randomize, small_config

DATA = ROOT / "tests" / "data"
GOLDEN = sorted(DATA.glob("checkpoint_schema*/"))
CONFIG = small_config(obs_size=8, hidden_size=8)


def new_state(config=CONFIG):
    states = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    data = Demonstrations(
        observations={"state": states}, actions=-states[:, :2], episode_ends=np.array([8, 20], dtype=np.int64)
    )
    return prepare_run(config, data, TrainSettings(val_fraction=0.0), seed=0, device="cpu").state


def stepped_state():
    """With a memory of its optimiser, as every state has that training saves."""
    state = new_state()
    sum(p.square().sum() for p in state.policy.parameters()).backward()
    state.optimizer.step()
    return state


def save(folder: Path, state) -> Path:
    save_checkpoint(folder, state, env=None, execution_horizon=8, training={"seed": 0})
    return folder


# Older schemas


def test_there_is_a_golden_checkpoint_of_every_schema():
    assert [path.name for path in GOLDEN] == [f"checkpoint_schema{n}" for n in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_acts_as_it_did(golden):
    expected = load_file(f"{golden}.golden.safetensors")
    loaded = load_checkpoint(golden)
    found = loaded.policy.sample_actions({"state": expected["observations"]}, ddim_steps=8, noise=expected["noise"])
    # Not bit for bit: another processor sums in another order.
    torch.testing.assert_close(found, expected["actions"], rtol=0, atol=1e-5)
    assert (loaded.env, loaded.execution_horizon) == ({"name": "planar"}, 8)
    assert loaded.sampler == (Sampler(eta=0.5) if golden == GOLDEN[3] else Sampler())  # recorded since schema 4
    assert loaded.training["step"] == 60
    other = loaded.policy.sample_actions({"state": expected["observations"]}, ddim_steps=4, noise=expected["noise"])
    assert (other - expected["actions"]).abs().max() > 1e-3  # the tolerance does tell results apart


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_resumes(golden):
    loaded = load_checkpoint(golden)
    state = new_state_of(loaded)
    resume_training(golden, state, loaded.training)
    assert state.step == 60
    assert [entry["step"] for entry in state.history] == [20, 40, 60]
    assert torch.equal(state.ema.denoiser.leave.weight, loaded.policy.denoiser.leave.weight)
    assert not torch.equal(state.policy.denoiser.leave.weight, loaded.policy.denoiser.leave.weight)
    with pytest.raises(ValueError, match=r"other settings \(training: learning_rate was 0.001\)"):
        resume_training(golden, state, {**loaded.training, "learning_rate": 1.0})


def test_a_checkpoint_without_a_setting_of_today_resumes_with_what_was_done_before_and_with_nothing_else():
    golden = GOLDEN[0]
    loaded = load_checkpoint(golden)
    state = new_state_of(loaded)
    resume_training(golden, state, {**vars(TrainSettings()), **loaded.training})
    assert state.step == 60
    assert "precision" not in loaded.training
    with pytest.raises(ValueError, match=r'other settings \(training: precision was "float32"\)'):
        resume_training(golden, state, {**loaded.training, "precision": "bfloat16"})


@pytest.mark.parametrize("golden", GOLDEN[:2], ids=lambda path: path.name)
def test_a_run_of_before_the_skip_connection_goes_on_without_it_alone(golden):
    loaded = load_checkpoint(golden)
    assert loaded.policy.encoder.skip is None
    encoder = {name: value for name, value in loaded.policy.config.encoder.items() if name != "skip"}
    state = new_state_of(loaded, dataclasses.replace(loaded.policy.config, encoder=encoder))
    assert state.policy.encoder.skip is not None
    with pytest.raises(
        ValueError, match=r"other settings \(policy: encoder\.skip was false\): to go on, give the same"
    ):
        resume_training(golden, state, loaded.training)


def test_every_setting_that_the_first_schema_did_not_note_has_a_value_of_before():
    noted = load_checkpoint(GOLDEN[0]).training.keys()
    # See `train_policy`: what a run does about bad losses is no part of what it is.
    assert vars(TrainSettings()).keys() - noted - {"on_bad_loss"} <= SETTINGS_OF_BEFORE.keys()


def new_state_of(loaded, config=None):
    states = np.zeros((20, 4), dtype=np.float32)
    data = Demonstrations(
        observations={"state": states}, actions=states[:, :2], episode_ends=np.array([8, 20], dtype=np.int64)
    )
    return prepare_run(config or loaded.policy.config, data, TrainSettings(), seed=0, device="cpu").state


# Kept ones


def run_through(folder: Path, entries, keep_last=2) -> None:
    """Save and keep after each entry, as training does; the weights tell the steps apart."""
    state = new_state()
    for entry in entries:
        state.step = entry["step"]
        with torch.no_grad():
            state.ema.denoiser.leave.bias.fill_(state.step)
        if len(entry) > 1:
            state.history.append(entry)
        keep_checkpoint(save(folder / "checkpoint", state), state, keep_last=keep_last)


def kept(folder: Path) -> dict[str, float]:
    """Each kept checkpoint's weights, as the step they were made at."""
    return {
        path.name: load_checkpoint(path).policy.denoiser.leave.bias[0].item()
        for path in sorted((folder / "checkpoints").iterdir())
    }


def val(step, loss):
    return {"step": step, "val/loss": loss}


def rollout(step, success, score=0.0):
    return {"step": step, "val/loss": 0.0, "rollout/success_rate": success, "rollout/score_mean": score}


@pytest.mark.parametrize(
    ("entries", "best"),
    [
        ([val(1, 0.5), val(2, 0.3), val(3, 0.4)], 2),
        ([val(1, 0.5), val(2, 0.3), val(3, 0.3)], 3),  # as good, and trained for longer
        ([val(1, float("nan")), val(2, 0.3), val(3, float("nan"))], 2),
        ([rollout(1, 0.5), rollout(2, 0.9), rollout(3, 0.8)], 2),
        ([rollout(1, 0.9, 0.5), rollout(2, 0.9, 0.7), rollout(3, 0.9, 0.6)], 2),
        ([val(1, 0.001), rollout(2, 0.0), val(3, 0.0001)], 2),  # a rollout says more than any loss
        ([rollout(1, 0.5), {"step": 2}, {"step": 3}], 1),  # saved without a figure of its own
    ],
)
def test_the_last_few_and_the_best_are_kept(tmp_path, entries, best):
    run_through(tmp_path, entries)
    assert kept(tmp_path) == {"best": best, "step_0000002": 2, "step_0000003": 3}
    assert load_checkpoint(tmp_path / "checkpoint").training["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoints" / "best").training["step"] == best


def test_rank_is_none_where_nothing_is_known():
    assert rank({"step": 1, "train/loss": 0.1}) is None
    assert rank(rollout(1, 0.0)) > rank(val(1, 0.0))


def test_none_are_kept_where_none_are_asked_for(tmp_path):
    run_through(tmp_path, [val(1, 0.5), val(2, 0.6)], keep_last=0)
    assert kept(tmp_path) == {"best": 1}
    run_through(tmp_path / "bare", [{"step": 1}], keep_last=0)
    assert not (tmp_path / "bare" / "checkpoints").exists()


def test_a_kept_checkpoint_takes_no_space_until_a_newer_one_comes(tmp_path):
    run_through(tmp_path, [val(1, 0.5)])
    names = ["config.json", "policy.safetensors", "checksums.json"]
    folder = tmp_path / "checkpoints" / "step_0000001"
    assert {file.name for file in folder.iterdir()} == set(names)
    assert all((folder / name).samefile(tmp_path / "checkpoint" / name) for name in names[:2])
    assert json.loads((folder / "checksums.json").read_text()).keys() == set(names[:2])


def test_where_there_are_no_hard_links_there_are_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(keeping.os, "link", refuse)
    run_through(tmp_path, [val(1, 0.5), val(2, 0.6)])
    assert kept(tmp_path) == {"best": 1, "step_0000001": 1, "step_0000002": 2}


def test_what_an_earlier_run_left_does_not_push_out_the_new(tmp_path):
    run_through(tmp_path, [val(7, 0.001), val(8, 0.002)])
    run_through(tmp_path, [val(1, 0.5), val(2, 0.6)])
    assert kept(tmp_path) == {"best": 1, "step_0000001": 1, "step_0000002": 2}


def test_a_damaged_best_is_replaced(tmp_path):
    run_through(tmp_path, [val(1, 0.5)])
    (tmp_path / "checkpoints" / "best" / "config.json").unlink()
    state = new_state()
    state.step, state.history = 2, [val(1, 0.5), val(2, 0.9)]
    keep_checkpoint(save(tmp_path / "checkpoint", state), state, keep_last=0)
    assert load_checkpoint(tmp_path / "checkpoints" / "best").training["step"] == 2


def test_a_kept_checkpoint_does_not_resume_and_says_why(tmp_path):
    run_through(tmp_path, [val(1, 0.5)])
    with pytest.raises(ValueError, match=r"best/training.* is missing"):
        resume_training(tmp_path / "checkpoints" / "best", new_state(), {"seed": 0})


# Kills and full disks

WRITER = """
import sys
from pathlib import Path
from tests.reliability.test_checkpoint_faults import save, stepped_state
from policy.checkpoint import keep_checkpoint
state, folder = stepped_state(), Path(sys.argv[1])
print("ready", flush=True)
while True:
    state.step += 1
    state.history = [{"step": state.step, "val/loss": 1.0}]
    keep_checkpoint(save(folder / "checkpoint", state), state, keep_last=2)
"""


def kill_a_writer(folder: Path, after: float) -> int:
    """SIGKILL a process that does nothing but save; gives the step that is there then."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, folder], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    while not (folder / "checkpoint").exists():
        time.sleep(0.001)
    time.sleep(after)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    loaded = load_checkpoint(folder / "checkpoint")
    resume_training(folder / "checkpoint", new_state(), {"seed": 0})
    for path in (folder / "checkpoints").glob("[!.]*"):
        assert load_checkpoint(path).training["step"] <= loaded.training["step"]
    return loaded.training["step"]


@pytest.mark.reliability
def test_a_kill_in_the_middle_of_saving_leaves_a_whole_checkpoint(tmp_path):
    delays = np.random.default_rng(0).uniform(0, 1, 20)
    steps = [kill_a_writer(tmp_path / str(n), delay) for n, delay in enumerate(delays)]
    print(
        f"kills while saving: {len(steps)}, whole checkpoints found: {len(steps)}, at steps {min(steps)}..{max(steps)}"
    )
    assert max(steps) > 1


def test_a_checkpoint_may_be_replaced_while_it_is_read(tmp_path):
    folder, stop = save(tmp_path / "checkpoint", stepped_state()), threading.Event()

    def replace_it_again_and_again():
        state = stepped_state()
        while not stop.is_set():
            state.step += 1
            with torch.no_grad():
                next(state.ema.parameters()).fill_(state.step)
            save(folder, state)
            stop.wait(0.1)

    with ThreadPoolExecutor(1) as thread:
        saving = thread.submit(replace_it_again_and_again)
        try:
            loaded = [load_checkpoint(folder) for _ in range(30)]
        finally:
            stop.set()
        saving.result()
    assert len({found.digest for found in loaded}) > 1
    for found in loaded:  # weights and record are of one save
        step = found.training["step"]
        assert step == 0 or next(found.policy.parameters()).flatten()[0] == step


@pytest.mark.parametrize("read", [load_checkpoint, digest_of, read_history])
def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, read):
    folder, newer = save(tmp_path / "checkpoint", stepped_state()), stepped_state()
    with torch.no_grad():
        next(newer.ema.parameters()).fill_(1.0)
    save(tmp_path / "newer", newer)
    verify = Folder.verify

    def verify_and_replace(self, name):
        found = verify(self, name)
        if (tmp_path / "newer").exists():
            folder.rename(tmp_path / "old")
            (tmp_path / "newer").rename(folder)
        return found

    monkeypatch.setattr(Folder, "verify", verify_and_replace)
    read(folder)
    assert not (tmp_path / "newer").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all space but so many bytes."""
    stat = os.statvfs(folder)
    file = folder / "ballast"
    file.write_bytes(b"\0" * max(0, stat.f_bavail * stat.f_frsize - leave))
    return file


def test_a_full_disk_leaves_the_checkpoint_of_before(small_disk):
    state = new_state()
    checkpoint = save(small_disk / "checkpoint", state)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    refused = 0
    for leave in (0, 4096, size // 4, size // 2, size - 4096):  # full at each of the files
        ballast = fill(small_disk, leave)
        state.step += 1
        with pytest.raises(
            SaveError, match=r"could not be written \(.*No space left on device.*what was saved before it is whole"
        ):
            save(checkpoint, state)
        assert load_checkpoint(checkpoint).training["step"] == 0
        assert [file.name for file in small_disk.iterdir() if file != ballast] == ["checkpoint"]
        ballast.unlink()
        refused += 1
    save(checkpoint, state)
    assert load_checkpoint(checkpoint).training["step"] == refused


def test_a_full_disk_before_the_first_checkpoint_leaves_nothing(small_disk):
    ballast = fill(small_disk, 4096)
    with pytest.raises(SaveError, match="No space left on device"):
        save(small_disk / "checkpoint", new_state())
    assert list(small_disk.iterdir()) == [ballast]


def test_a_full_disk_leaves_the_shared_policy_of_before(small_disk):
    before, after = (DiffusionPolicy(CONFIG) for _ in range(2))
    randomize(after)
    folder = small_disk / "policy"
    ballast = fill(small_disk, 4096)
    with pytest.raises(SaveError, match=r"could not be saved to .*No space left on device"):
        before.save_pretrained(folder)
    assert list(small_disk.iterdir()) == [ballast]
    ballast.unlink()
    before.save_pretrained(folder)
    (folder / "video.mp4").write_bytes(b"1")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    size = sum(map(len, files.values()))
    for leave in (0, 4096, size // 2, size - 4096):  # full at each of the files
        ballast = fill(small_disk, leave)
        with pytest.raises(SaveError) as refusal:
            after.save_pretrained(folder)
        assert "No space left on device" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
        ballast.unlink()
    after.save_pretrained(folder)
    weights = DiffusionPolicy.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in after.state_dict().items())
    assert {file.name for file in folder.iterdir()} == files.keys()


@pytest.mark.reliability
def test_training_onto_a_full_disk_stops_with_one_sentence_and_goes_on_once_there_is_space(
    small_disk, tmp_path, run_script
):
    run_script("collect", "env=planar", "episodes=10", f"output_dir={tmp_path}")
    sizes = ["encoder.hidden_size=16", "denoiser.hidden_size=16", "denoiser.num_layers=1", "obs_size=32"]
    command = [
        *("train", "experiment=planar", f"dataset.path={tmp_path}/planar-v0", *sizes),
        *("train.steps=400", "train.save_every=20", "train.rollout_every=0", "train.keep_last=400", "tracker=none"),
        *("hydra.run.dir=" + str(tmp_path / "hydra"), f"output_dir={small_disk}/run"),
    ]
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 1_600_000)
    full = run_script(*command, check=1)
    (sentence,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in sentence
    assert "give the same command again" in sentence
    assert "Traceback" not in full.stderr
    last_good = load_checkpoint(small_disk / "run" / "checkpoint").training["step"]
    assert last_good > 0
    ballast.unlink()
    again = run_script(*command)
    assert f"going on at step {last_good} of 400" in again.stdout
    assert load_checkpoint(small_disk / "run" / "checkpoint").training["step"] == 400
    print(f"disk full after step {last_good}; with space again, the run went on to step 400")
