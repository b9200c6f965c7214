"""Phases of training: where each begins, its own warm-up and cosine, and that the loop walks whatever list there is."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import TrainSettings
from policy.common.seeding import derive_generator
from policy.training import loop
from policy.training.loop import train
from policy.training.phases import Demonstrated, phases_of
from policy.training.preparation import prepare_run
from policy.training.rectification import Rectified
from policy.training.settings import learning_rate
from tests.conftest import small_config

CONFIG = small_config(obs_size=8, hidden_size=16)
SETTINGS = TrainSettings(
    steps=5, rectify_steps=4, batch_size=8, warmup_steps=2, log_every=2, val_every=100, save_every=100, val_fraction=0.2
)


class Silent:
    def log(self, metrics, step):
        pass


def prepared(demonstrations, settings=SETTINGS):
    return prepare_run(CONFIG, demonstrations, settings, seed=0, device="cpu")


def go(run, settings=SETTINGS, stop_at=math.inf, saves=None):
    train(
        run,
        settings,
        seed=3,
        tracker=Silent(),
        save=lambda state: None if saves is None else saves.append(state.step),
        should_stop=lambda: run.state.step >= stop_at,
    )
    return run.state


# --- where a step belongs ----------------------------------------------------------------------------------------


def test_without_rectification_there_is_one_phase():
    plain = TrainSettings(steps=7)
    assert plain.phase_lengths == [7]
    assert plain.all_steps == 7
    assert [type(phase) for phase in phases_of(plain)] == [Demonstrated]


def test_each_length_has_its_phase():
    assert SETTINGS.phase_lengths == [5, 4]
    assert SETTINGS.all_steps == 9
    assert [type(phase) for phase in phases_of(SETTINGS)] == [Demonstrated, Rectified]


def test_places_count_anew_in_every_phase_and_the_end_belongs_to_the_last():
    places = [SETTINGS.place(step) for step in range(10)]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert TrainSettings(steps=2).place(2) == (0, 2)


def with_lengths(lengths, **changes):
    """Settings of a training with phases of these lengths."""

    class Settings(TrainSettings):
        phase_lengths = lengths

    return Settings(**changes)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), warmup=st.integers(0, 40))
def test_every_phase_warms_up_and_falls_to_zero_as_a_training_of_its_own(lengths, warmup):
    several = with_lengths(lengths, warmup_steps=warmup, learning_rate=0.5)
    assert several.all_steps == sum(lengths)
    step = 0
    for number, length in enumerate(lengths):
        alone = with_lengths([length], warmup_steps=warmup, learning_rate=0.5)
        for place in range(length):
            assert several.place(step) == (number, place)
            assert learning_rate(step, several) == learning_rate(place, alone)
            step += 1
    assert several.place(step) == (len(lengths) - 1, lengths[-1])
    assert learning_rate(step, several) == 0


def test_the_learning_rate_at_the_boundary_of_two_phases():
    both = TrainSettings(steps=1000, rectify_steps=500, warmup_steps=100, learning_rate=2e-3)
    last, first = learning_rate(999, both), learning_rate(1000, both)
    assert 0 < last < 1e-5 * 2e-3
    assert first == learning_rate(0, both) == pytest.approx(2e-3 / 101)
    rates = [learning_rate(step, both) for step in range(1000, 1500)]
    assert all(a < b for a, b in pairwise(rates[:90]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert rates[100:] == pytest.approx([1e-3 * (1 + math.cos(math.pi * n / 500)) for n in range(100, 500)])
    assert learning_rate(1500, both) == 0


# --- the walk ----------------------------------------------------------------------------------------------------


class Spy:
    """A phase on demonstrations that notes what is asked of it."""

    def __init__(self, name, notes):
        self.name, self.notes, self.step = name, notes, None

    def begin(self, state):
        self.state = state
        self.notes.append(("begin", self.name, state.step))

    def rows(self, windows):
        return windows

    def examples(self, batch, generator):
        assert not torch.is_autocast_enabled("cpu")
        expected = derive_generator(3, 2, self.state.step)
        assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=expected))
        self.notes.append(("examples", self.name, self.state.step))
        return {"made by": self.name, "batch": batch}

    def loss(self, policy, examples, generator):
        assert policy is self.state.policy
        assert examples["made by"] == self.name
        self.notes.append(("loss", self.name, self.state.step, torch.is_autocast_enabled("cpu")))
        return policy.loss(examples["batch"], generator)

    def validation_loss(self, policy, batch, generator):
        return policy.loss(batch, generator)


@pytest.fixture
def spies(monkeypatch):
    """Replaces all phases; gives what is noted of them."""
    notes = []

    def replace(lengths):
        names = "abcdef"[: len(lengths)]
        monkeypatch.setattr(TrainSettings, "phase_lengths", property(lambda self: list(lengths)))
        monkeypatch.setattr(loop, "phases_of", lambda settings: [Spy(name, notes) for name in names])
        return notes

    return replace


def steps_of(notes, kind="loss"):
    return [(name, step) for noted, name, step, *_ in notes if noted == kind]


def test_phases_are_walked_in_order_and_each_is_begun_before_its_first_step(spies, demonstrations):
    notes, saves = spies([2, 3]), []
    state = go(prepared(demonstrations), saves=saves)
    assert state.step == 5
    assert saves == [5]
    assert steps_of(notes) == [("a", 0), ("a", 1), ("b", 2), ("b", 3), ("b", 4)]
    assert steps_of(notes, "examples") == steps_of(notes)
    assert steps_of(notes, "begin") == [("a", 0), ("b", 2)]
    assert [note[:2] for note in notes[:3]] == [("begin", "a"), ("examples", "a"), ("loss", "a")]
    assert notes.index(("begin", "b", 2)) == notes.index(("examples", "b", 2)) - 1


@pytest.mark.parametrize(
    ("stop_at", "begun"),
    [
        (1, [("a", 1), ("b", 2), ("c", 5)]),
        (2, [("b", 2), ("c", 5)]),  # between two phases: the first one is not begun again
        (3, [("b", 3), ("c", 5)]),
        (5, [("c", 5)]),
        (6, [("c", 6)]),
        (7, []),
    ],
)
def test_a_resumed_run_begins_again_the_phase_it_is_in_and_no_earlier_one(spies, demonstrations, stop_at, begun):
    notes = spies([2, 3, 2])
    run = prepared(demonstrations)
    go(run, stop_at=stop_at)
    before = list(notes)
    notes.clear()
    go(run)
    assert run.state.step == 7
    assert steps_of(notes, "begin") == begun
    assert [step for _, step in steps_of([*before, *notes])] == list(range(7))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_examples_are_made_in_float32_and_the_loss_in_the_precision_asked_for(spies, demonstrations, precision):
    notes = spies([1, 1])
    settings = dataclasses.replace(SETTINGS, precision=precision)
    go(prepared(demonstrations, settings), settings)
    assert [note[-1] for note in notes if note[0] == "loss"] == [precision == "bfloat16"] * 2


class Pulled:
    """A third phase, as an extension might have one: towards half of the weights that there were at its beginning."""

    def begin(self, state):
        if "pulled" not in vars(state):
            state.pulled = {name: 0.5 * p.detach() for name, p in state.ema.named_parameters()}
        self.target = state.pulled

    def rows(self, windows):
        return windows

    def examples(self, batch, generator):
        return torch.rand((), generator=generator)

    def loss(self, policy, examples, generator):
        return (1 + examples) * sum((p - self.target[name]).square().sum() for name, p in policy.named_parameters())


@pytest.fixture
def third(monkeypatch):
    """A third phase after the two that there are: a length and a phase, and nothing else."""
    lengths = TrainSettings.phase_lengths.fget
    monkeypatch.setattr(TrainSettings, "phase_lengths", property(lambda self: [*lengths(self), 6]))
    monkeypatch.setattr(loop, "phases_of", lambda settings: [*phases_of(settings), Pulled()])


@pytest.mark.usefixtures("third")
def test_a_third_phase_is_walked_with_a_warm_up_of_its_own(demonstrations):
    assert SETTINGS.phase_lengths == [5, 4, 6]
    run, distances, rates = prepared(demonstrations), [], []

    def watch():
        state = run.state
        rates.append(state.optimizer.param_groups[0]["lr"])
        if "pulled" in vars(state):
            distances.append(
                sum((p - state.pulled[name]).square().sum().item() for name, p in state.policy.named_parameters())
            )
        return False

    train(run, SETTINGS, seed=3, tracker=Silent(), save=lambda state: None, should_stop=watch)
    assert run.state.step == 15
    assert len(distances) == 6
    assert all(after < before for before, after in pairwise(distances))  # its loss, and no other
    assert rates == [learning_rate(step, SETTINGS) for step in range(15)]
    assert rates[0] == rates[5] == rates[9]
    assert run.state.history[-1]["step"] == 15


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("stop_at", [4, 9, 12])
def test_a_run_with_a_third_phase_can_be_stopped_anywhere(demonstrations, stop_at):
    whole, parts = go(prepared(demonstrations)), prepared(demonstrations)
    go(parts, stop_at=stop_at)
    assert parts.state.step == stop_at
    go(parts)
    assert parts.state.history == whole.history
    for one, other in zip(parts.state.ema.parameters(), whole.ema.parameters(), strict=True):
        assert torch.equal(one, other)
