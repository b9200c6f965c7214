"""The errors of chunks against naive computations, and trainings of which it is known how they go."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, Sampler, TrainSettings
from policy.data.demonstrations import Demonstrations
from policy.data.windows import Windows
from policy.statistics.fit import conclude
from policy.training.errors import (
    EPISODES,
    NEIGHBOURS,
    SAMPLES,
    WINDOWS,
    ErrorMeter,
    action_deviation,
    by_episode,
    nearest,
    select,
    squared_errors,
)
from policy.training.loop import train
from policy.training.preparation import fit_normalizers, prepare_run
from tests.conftest import randomize, small_config

CONFIG = small_config(obs_size=16, hidden_size=32)


def laid_out(lengths, seed=0):
    """Random observations and actions; the second action never changes."""
    drawn = np.random.default_rng(seed)
    total = sum(lengths)
    actions = drawn.normal(size=(total, 2)).astype(np.float32)
    actions[:, 1] = 0.3
    return Demonstrations(
        observations={"state": drawn.normal(size=(total, 3)).astype(np.float32)},
        actions=actions,
        episode_ends=np.cumsum(lengths),
    )


def windows_of(data, episodes, **layout):
    return Windows(data, np.asarray(episodes, dtype=np.int64), **{"obs_horizon": 2, "action_horizon": 8, **layout})


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_equally_many_windows_of_each_chosen_episode(count):
    lengths = np.random.default_rng(1).integers(1, 60, size=50)
    windows = windows_of(laid_out(lengths), np.arange(count) + 3)
    found, again = select(windows), select(windows)
    assert len(found.windows) == WINDOWS * min(count, EPISODES)
    assert (found.windows == again.windows).all()
    episodes = windows._locate(found.windows)[1]
    assert (episodes == found.episodes).all()
    assert len(np.unique(episodes)) == min(count, EPISODES)
    for episode in np.unique(episodes):
        own = found.windows[episodes == episode]
        assert len(np.unique(own)) >= min(WINDOWS, lengths[3 + episode]) / 2


def test_the_unit_is_the_deviation_over_the_training_episodes_alone():
    data = laid_out([5, 9, 7, 4])
    found = action_deviation(windows_of(data, [0, 2]))
    own = np.concatenate([data.actions[:5], data.actions[14:21]])
    assert found[0] == pytest.approx(own[:, 0].std(), rel=1e-6)
    assert math.isnan(found[1])


@pytest.mark.parametrize("past_actions", [0, 2])
def test_the_errors_of_samples_and_of_their_average_against_loops(past_actions):
    data = laid_out([12, 9, 30])
    windows = windows_of(data, [0, 2], past_actions=past_actions)
    numbers = np.arange(len(windows))[::3]
    samples = []

    def sample_actions(observations, generator):
        rows = len(observations["state"])
        samples.append(torch.randn(rows, 8, 2, generator=generator))
        return samples[-1]

    config = SimpleNamespace(past_actions=past_actions, auxiliary_shapes={})
    program = SimpleNamespace(config=config, sample_actions=sample_actions)
    deviation = np.array([2.0, 0.5])
    found = squared_errors(program, windows, numbers, deviation)
    assert len(samples) == SAMPLES
    batch = windows.gather(numbers)
    for row in range(len(numbers)):
        inside = batch["mask"][row, past_actions:].numpy()
        demonstrated = batch["actions"][row, past_actions:].numpy()
        own = [((sample[row].numpy() - demonstrated) / deviation) ** 2 for sample in samples]
        average = ((np.mean([sample[row].numpy() for sample in samples], 0) - demonstrated) / deviation) ** 2
        expected = (np.mean([e[0] for e in own], 0), np.mean([e[inside].mean(0) for e in own], 0))
        assert np.allclose([found.sampled_first_action[row], found.sampled_chunk[row]], expected, rtol=1e-5)
        expected = (average[0], average[inside].mean(0))
        assert np.allclose([found.averaged_first_action[row], found.averaged_chunk[row]], expected, rtol=1e-5)
    again = squared_errors(program, windows, numbers, deviation)
    assert (found.sampled_chunk == again.sampled_chunk).all()


def test_the_error_of_an_episode_leaves_out_what_never_changes():
    squares = np.array([[1.0, np.nan], [3.0, np.nan], [16.0, np.nan]])
    assert by_episode(squares, np.array([4, 4, 9])).tolist() == [math.sqrt(2), 4]


def test_the_nearest_training_windows_against_a_loop():
    data = laid_out([20, 15, 10])
    training, held_out = windows_of(data, [0, 1]), windows_of(data, [2])
    policy = DiffusionPolicy(CONFIG)
    fit_normalizers(policy, training)
    numbers = np.array([0, 4, 9])
    found = nearest(policy, training, held_out, numbers, np.ones(2))
    known, asked = training.gather(np.arange(len(training))), held_out.gather(numbers)
    normalize = policy.observation_normalizers["state"].normalize
    points = normalize(known["observations"]["state"]).flatten(1).numpy()
    for row in range(len(numbers)):
        point = normalize(asked["observations"]["state"][row]).flatten().numpy()
        distances = np.sqrt(np.square(points - point).mean(1))
        assert found.distances[row] == pytest.approx(distances.min(), rel=1e-4)
        chunk = known["actions"].numpy()[np.argsort(distances)[:NEIGHBOURS]].mean(0)
        inside = asked["mask"][row].numpy()
        squares = np.square(chunk - asked["actions"][row].numpy())[inside].mean(0)
        assert np.allclose(found.errors[row], squares, rtol=1e-4, atol=1e-9)


def test_measuring_names_every_dimension_that_changes_and_leaves_everything_as_it_was():
    data = laid_out([20, 15, 10, 12])
    training, held_out = windows_of(data, [0, 1]), windows_of(data, [2, 3])
    policy = DiffusionPolicy(CONFIG).eval()
    randomize(policy)
    fit_normalizers(policy, training)
    before, state = torch.random.get_rng_state(), {k: v.clone() for k, v in policy.state_dict().items()}
    meter = ErrorMeter(training, held_out, Sampler(ddim_steps=2, eta=0.5))
    found = meter.metrics(policy)
    assert found == meter.metrics(policy)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())
    for split in ("train", "val"):
        for name in ("sampled_first_action", "sampled_chunk", "averaged_first_action", "averaged_chunk"):
            assert found[f"{split}/{name}_error/0"] == pytest.approx(found[f"{split}/{name}_error"])
            assert f"{split}/{name}_error/1" not in found
        assert found[f"{split}/averaged_chunk_error"] < found[f"{split}/sampled_chunk_error"]
    assert found["fit/episodes"] == 2
    assert {type(value) for value in found.values()} == {float}
    alone = ErrorMeter(training, windows_of(data, []), Sampler(ddim_steps=2, eta=0.5)).metrics(policy)
    assert alone == {name: value for name, value in found.items() if name.startswith("train/")}


def test_actions_that_never_change_have_no_unit():
    data = laid_out([20, 15])
    data.actions[:] = 0.1
    with pytest.raises(ValueError, match="no action of the training episodes ever changes"):
        ErrorMeter(windows_of(data, [0]), windows_of(data, [1]), Sampler())


def walks(episodes, length=30, noise=0.0):
    """Points that run to a goal of their own: the action is the way that is left, and chance."""
    drawn = np.random.default_rng(0)
    starts = drawn.uniform(-1, 1, size=(episodes, 2))
    shares = 0.9 ** np.arange(length)
    places = (starts[:, None] * shares[:, None]).reshape(-1, 2)
    actions = -places + noise * drawn.normal(size=places.shape)
    states = np.concatenate([places, np.zeros_like(places[:, :1])], axis=1)
    return Demonstrations(
        observations={"state": states.astype(np.float32)},
        actions=actions.astype(np.float32),
        episode_ends=length * np.arange(1, episodes + 1),
    )


class NoLog:
    def log(self, metrics, step):
        pass


def trained(data, config=CONFIG, **settings):
    """The history of a training."""
    settings = TrainSettings(
        **{
            "batch_size": 64,
            "warmup_steps": 20,
            "log_every": 1000,
            "val_every": 1000,
            "learning_rate": 3e-3,
            **settings,
        }
    )
    run = prepare_run(config, data, settings, seed=0, device="cpu")
    meter = ErrorMeter(run.training, run.validation, Sampler(ddim_steps=4))
    train(run, settings, seed=0, tracker=NoLog(), save=lambda state: None, measure=meter.metrics)
    return run


@pytest.mark.parametrize(
    ("data", "settings", "kind"),
    [
        (walks(60), {"steps": 10, "val_fraction": 0.2}, "under-trained"),
        pytest.param(walks(60), {"steps": 10, "val_fraction": 0.02}, "undecided", marks=pytest.mark.slow),
        pytest.param(walks(60), {"steps": 300, "val_fraction": 0.2}, "precise", marks=pytest.mark.slow),
        pytest.param(walks(20), {"steps": 200, "val_fraction": 0.85}, "over-fitted", marks=pytest.mark.slow),
    ],
)
def test_a_training_of_which_it_is_known_how_it_goes(data, settings, kind):
    found = conclude(trained(data, **settings).state.history)
    assert found.kind == kind, found


def test_a_measured_training_ends_with_the_same_weights(demonstrations):
    settings = TrainSettings(steps=5, batch_size=16, warmup_steps=1)
    runs = [prepare_run(CONFIG, demonstrations, settings, seed=0, device="cpu") for _ in range(2)]
    for run, measure in zip(
        runs, (None, ErrorMeter(runs[1].training, runs[1].validation, Sampler()).metrics), strict=True
    ):
        train(run, settings, seed=0, tracker=NoLog(), save=lambda state: None, measure=measure)
    one, other = (run.state.ema.state_dict() for run in runs)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert "train/averaged_chunk_error" not in runs[0].state.history[-1]
    assert "train/averaged_chunk_error" in runs[1].state.history[-1]
