"""Several processes that train one policy, beside one process that does it alone."""

import dataclasses
import multiprocessing
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout

from policy import DENOISERS, TrainSettings
from policy.common.torchrun import ALONE, World, process_group
from policy.data.demonstrations import Demonstrations
from policy.model.denoisers.modulated_mlp import ModulatedMLP
from policy.training.loop import train
from policy.training.preparation import prepare_run
from policy.training.share import check_shares, draws, gather_part
from tests.conftest import small_config

# Dropout and noise in both networks; several timesteps of each chunk; windows that reach past their episode's end.
PLAIN = small_config(obs_size=16, hidden_size=32)
CONFIG = dataclasses.replace(
    PLAIN,
    encoder={**PLAIN.encoder, "noise": 0.1, "dropout": 0.2},
    denoiser={**PLAIN.denoiser, "dropout": 0.2},
)
SETTINGS = TrainSettings(
    steps=12, rectify_steps=8, batch_size=24, timesteps_per_chunk=2, warmup_steps=3, log_every=1, val_fraction=0.2
)


class Silent:
    def log(self, metrics, step):
        pass


def trained(demonstrations, config, settings, first_step=None, world=ALONE):
    """The losses of all steps, the weights, and their average."""
    run = prepare_run(config, demonstrations, settings, seed=3, device="cpu")
    if first_step:
        run.state.step = first_step[world.rank]
    train(run, settings, seed=3, tracker=Silent(), save=lambda state: None, world=world)
    losses = [entry["train/loss"] for entry in run.state.history]
    return losses, run.state.policy.state_dict(), run.state.ema.state_dict()


def _work(rank, size, folder, work, arguments):
    try:
        torch.set_num_threads(1)
        world = World(rank=rank, size=size, local_rank=rank)
        with process_group(world, f"file://{folder}/store"):
            torch.save(work(*arguments, world=world), folder / f"{rank}.pt")
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())


def together(size: int, folder: Path, work, *arguments) -> list:
    """Call a function in several processes that are connected; gives what each returned, or why the first failed."""
    folder.mkdir()
    fork = multiprocessing.get_context("fork")  # nothing is imported again
    processes = [fork.Process(target=_work, args=(rank, size, folder, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for failed in sorted(folder.glob("*.txt")):
        raise RuntimeError(failed.read_text())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def assert_trained_alike(size, folder, demonstrations, config, settings):
    losses, weights, average = trained(demonstrations, config, settings)
    assert len(losses) == settings.all_steps
    assert losses[0] != losses[-1]
    first, *others = together(size, folder, trained, demonstrations, config, settings)
    assert first[0] == pytest.approx(losses, abs=1e-5)
    for other in others:  # they never part
        assert other[0] == first[0]
        assert all(torch.equal(other[1][name], value) for name, value in first[1].items())
        assert all(torch.equal(other[2][name], value) for name, value in first[2].items())
    return [(weights[name], first[1][name], average[name], first[2][name]) for name in weights]


def test_two_processes_train_what_one_trains(demonstrations, tmp_path):
    for weight, theirs, average, their_average in assert_trained_alike(
        2, tmp_path / "two", demonstrations, CONFIG, SETTINGS
    ):
        torch.testing.assert_close(theirs, weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(their_average, average, rtol=0, atol=1e-4)


def pictures(shape=(40, 40, 3)) -> Demonstrations:
    generator = np.random.default_rng(0)
    ends = np.cumsum([40, 30, 50, 20]).astype(np.int64)
    states = generator.uniform(-1, 1, (ends[-1], 3)).astype(np.float32)
    return Demonstrations(
        observations={
            "state": states,
            "image": generator.integers(0, 256, (ends[-1], *shape), np.uint8),
            "hidden": 2 * states[:, :1],
        },
        actions=-states[:, :2],
        episode_ends=ends,
    )


class WithAnUnusedWeight(ModulatedMLP):
    """A denoiser as an extension might have one."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.unused = torch.nn.Parameter(torch.ones(3))


CASES = {
    "unet": {"denoiser": {"name": "unet", "widths": (16, 32), "dropout": 0.2}},
    "transformer": {"denoiser": {"name": "transformer", "hidden_size": 32, "num_layers": 1, "dropout": 0.2}},
    "encoder_decoder": {
        "denoiser": {"name": "encoder_decoder", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.2}
    },
    "residual_mlp": {"denoiser": {"name": "residual_mlp", "hidden_size": 32, "num_layers": 1, "dropout": 0.2}},
    "unused": {"denoiser": {"name": "unused", "hidden_size": 32, "num_layers": 1, "dropout": 0.2}},
    "image": {"encoder": {"name": "image", "channels": (16,), "noise": 0.1, "dropout": 0.2}},
    "resnet": {"encoder": {"name": "resnet", "depth": 18, "width": 16, "crop": (32, 32)}},
    "flow": {"objective": "flow"},
    "mip": {"objective": "mip"},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_network_is_trained_alike(case, size, tmp_path, monkeypatch):
    """Twenty steps of 96 windows, of which a quarter are padded."""
    monkeypatch.setitem(DENOISERS._parts, "unused", WithAnUnusedWeight)
    settings = dataclasses.replace(
        SETTINGS, steps=20 if case == "mip" else 14, rectify_steps=0 if case == "mip" else 6, batch_size=96
    )
    pixels = {"image": (40, 40, 3)} if "encoder" in CASES[case] else {}
    config = dataclasses.replace(
        CONFIG, observation_shapes={"state": (3,), **pixels}, auxiliary_shapes={"hidden": (1,)}, **CASES[case]
    )
    data = pictures()
    data = dataclasses.replace(data, observations={key: data.observations[key] for key in ("state", "hidden", *pixels)})
    assert_trained_alike(size, tmp_path / "several", data, config, settings)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_part_of_a_batch_weighs_as_much_as_its_actions_count(demonstrations, size, tmp_path):
    """All windows of one process's part may be whole, and those of another padded."""
    settings = dataclasses.replace(SETTINGS, steps=20, rectify_steps=0, batch_size=6, mask_padding=True)
    run = prepare_run(PLAIN, demonstrations, settings, seed=3, device="cpu")
    windows = run.training.batch_at(0, 6, 3)
    parts = [gather_part(run.training, windows, World(rank=rank, size=size)) for rank in range(size)]
    sums = [int(part["mask"].sum()) for part in parts]
    assert len(set(sums)) > 1
    assert [part["counted"] for part in parts] == [sum(sums) / size] * size
    assert_trained_alike(size, tmp_path / "several", demonstrations, PLAIN, settings)


DRAWS = {
    "randn": lambda x: torch.randn(len(x), 5),
    "randn of a size": lambda x: torch.randn((len(x), 5)),
    "a row of numbers": lambda x: torch.rand(len(x)),
    "several for each row": lambda x: torch.randint(100, (3 * len(x),)),
    "a range": lambda x: torch.randint(3, 100, (len(x), 2)),
    "a generator": lambda x: torch.randn(len(x), 4, generator=torch.Generator().manual_seed(5)),
    "like": lambda x: torch.randn_like(x),
    "uniform like": lambda x: torch.rand_like(x),
    "dropout": lambda x: dropout(x, 0.3),
    "a module": torch.nn.Dropout(0.3),
    "nothing dropped": torch.nn.Dropout(0.0),
    "not in training": torch.nn.Dropout(0.3).eval(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", ["rows first", "rows last", "channels last"])
def test_the_parts_of_random_numbers_are_those_of_one_process(draw, size, layout):
    x = torch.arange(18 * 4 * 7.0).reshape(18, 4, 7) + 1
    order = {"rows first": (0, 1, 2), "rows last": (2, 0, 1), "channels last": (0, 2, 1)}[layout]
    x = x.permute(order).contiguous().permute([order.index(axis) for axis in range(3)])
    torch.manual_seed(1)
    whole = draw(x)
    parts = []
    for rank, part in enumerate(x.chunk(size)):
        dense = part.permute(order).contiguous().permute([order.index(axis) for axis in range(3)])
        torch.manual_seed(1)
        with draws(World(rank=rank, size=size)):
            parts.append(draw(dense))
    assert torch.equal(torch.cat(parts), whole)


def test_what_is_not_random_is_left_alone():
    with draws(World(rank=1, size=2)):
        assert torch.equal(torch.zeros(4) + torch.arange(4), torch.arange(4.0))


def test_a_batch_without_equal_parts_is_refused():
    check_shares(96, World(rank=0, size=3))
    check_shares(7, ALONE)
    with pytest.raises(ValueError, match=r"^25 windows in a step cannot be shared equally by 2 processes: choose"):
        check_shares(25, World(rank=0, size=2))


@pytest.mark.slow
def test_processes_that_do_not_train_the_same_are_refused(demonstrations, tmp_path):
    with pytest.raises(RuntimeError, match="the processes go on at different steps, process 0 at 2: output_dir="):
        together(2, tmp_path / "steps", trained, demonstrations, PLAIN, SETTINGS, [2, 3])


def _data_of_its_own(demonstrations, world):
    ends = demonstrations.episode_ends - (world.rank == 1) * np.arange(len(demonstrations.episode_ends))
    rows = slice(ends[-1])
    data = dataclasses.replace(
        demonstrations,
        observations={key: values[rows] for key, values in demonstrations.observations.items()},
        actions=demonstrations.actions[rows],
        episode_ends=ends,
    )
    return trained(data, PLAIN, SETTINGS, world=world)


@pytest.mark.slow
def test_processes_that_read_different_demonstrations_are_refused(demonstrations, tmp_path):
    with pytest.raises(RuntimeError, match=r"the processes read different demonstrations, process 0 \d+ windows: "):
        together(2, tmp_path / "data", _data_of_its_own, demonstrations)
