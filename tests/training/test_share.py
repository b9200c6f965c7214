"""Several processes that train one policy, beside one process that does it alone."""

import dataclasses
import multiprocessing
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from policy import TrainSettings
from policy.common.torchrun import World, process_group
from policy.training.loop import train
from policy.training.preparation import prepare_run
from tests.conftest import small_config

# Dropout and noise in both networks; several timesteps of each chunk; windows that reach past their episode's end.
PLAIN = small_config(obs_size=16, hidden_size=32)
CONFIG = dataclasses.replace(
    PLAIN,
    encoder={**PLAIN.encoder, "noise": 0.1, "dropout": 0.2},
    denoiser={**PLAIN.denoiser, "dropout": 0.2},
)
SETTINGS = TrainSettings(
    steps=12,
    rectify_steps=8,
    batch_size=24,
    timesteps_per_chunk=2,
    warmup_steps=3,
    log_every=1,
    val_every=10,
    val_fraction=0.2,
)


class Silent:
    def log(self, metrics, step):
        pass


def trained(demonstrations, world=None, stop_at=None):
    run = prepare_run(CONFIG, demonstrations, SETTINGS, seed=3, device="cpu")
    shared = {} if world is None else {"world": world}
    train(run, SETTINGS, seed=3, tracker=Silent(), save=lambda state: None, **shared)
    return run.state


def _work(rank: int, size: int, folder: Path, work, arguments) -> None:
    try:
        torch.set_num_threads(1)
        world = World(rank=rank, size=size, local_rank=rank)
        with process_group(world, f"file://{folder}/store"):
            torch.save(work(*arguments, world=world), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def together(size: int, folder: Path, work, *arguments) -> list:
    """Call a function in several processes that are connected, and return what each returned."""
    folder.mkdir()
    fork = multiprocessing.get_context("fork")  # nothing is imported again
    processes = [fork.Process(target=_work, args=(rank, size, folder, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    failed = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert not failed, failed[0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def state_of(demonstrations, world=None):
    state = trained(demonstrations, world)
    return state.history, state.policy.state_dict(), state.ema.state_dict()


def test_two_processes_train_what_one_trains(demonstrations, tmp_path):
    history, weights, average = state_of(demonstrations)
    first, second = together(2, tmp_path / "two", state_of, demonstrations)
    a = [e["train/loss"] for e in history]
    b = [e["train/loss"] for e in first[0]]
    print(np.abs(np.array(a) - np.array(b)).max())
    assert a == pytest.approx(b, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(first[1][name], value, rtol=0, atol=1e-4)
        assert torch.equal(first[1][name], second[1][name])
        assert torch.equal(first[2][name], second[2][name])
