"""What a process knows of the others that torchrun started; `tests/training/test_share.py` connects some."""

import sys
import warnings

import pytest
import torch

from policy.common.errors import PeerError
from policy.common.progress import progress
from policy.common.torchrun import (
    ALONE,
    World,
    check_launch,
    has_last_word,
    joined_world,
    only_first_prints,
    peers_needed,
    process_group,
    started_world,
)


@pytest.fixture
def second(monkeypatch):
    """This process as the second of three, as torchrun starts it."""
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)


def test_a_process_of_its_own_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # left behind by another launcher
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert started_world() == joined_world() == ALONE
    assert ALONE.first
    assert [ALONE.any(flag) for flag in (True, False)] == [True, False]
    assert ALONE.same(3)
    assert ALONE.mean(torch.tensor(3.0)) == 3.0
    assert ALONE.tell("folder", "here") == "here"
    assert ALONE.device("cuda:1") == "cuda:1"
    check_launch("sweep", multirun=True)
    with process_group(ALONE):
        ALONE.wait()
    assert has_last_word()


@pytest.mark.usefixtures("second")
def test_a_process_that_is_not_the_first_is_silent(capfd):
    assert started_world() == World(rank=1, size=3, local_rank=1)
    assert joined_world() == ALONE  # it is not connected yet
    assert not has_last_word()
    with only_first_prints():
        print("out")
        warnings.warn("a warning", stacklevel=1)
        print("an error", file=sys.stderr)
        list(progress([1, 2], total=2, desc="bar", unit="step"))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "an error\n")


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(
    ("command", "multirun", "words"),
    [("rollout", False, "start ddim-rollout without"), ("train", True, "start --multirun without torchrun")],
)
def test_several_processes_are_for_one_training(command, multirun, words):
    check_launch("train", multirun=False)
    with pytest.raises(ValueError, match=rf"^torchrun started 3 processes, which only one ddim-train .*: {words}"):
        check_launch(command, multirun=multirun)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [World(rank=rank, size=4, local_rank=rank % 2).device("cuda") for rank in range(4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
    ]
    assert taken == [0, 1, 0, 1]
    assert World(rank=3, size=4, local_rank=3).device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"^torchrun started process 3 on a machine with 2 GPUs: .*--nproc-per-node=2"):
        World(rank=2, size=4, local_rank=2).device("cuda")
    with pytest.raises(ValueError, match=r"^device=cuda:1 names one device for 4 processes: give device=cuda"):
        World(size=4).device("cuda:1")


def test_only_a_connection_that_broke_off_tells_of_another_process(monkeypatch):
    ignored = []
    monkeypatch.setattr("signal.signal", lambda *given: ignored.append(given))
    with pytest.raises(RuntimeError, match=r"^out of memory$"), peers_needed():
        raise RuntimeError("out of memory")
    assert ignored == []
    with pytest.raises(PeerError, match=r"^another process of this training ended before its time$"), peers_needed():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert len(ignored) == 1
