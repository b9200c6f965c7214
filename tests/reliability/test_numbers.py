"""Numbers that are none, and data at the edge of what can be learnt from."""

import dataclasses
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, TrainSettings, load_checkpoint
from policy.commands.train import train_policy
from policy.data.demonstrations import Demonstrations
from policy.diffusion.sampler import Sampler
from policy.model.normalizer import Normalizer
from policy.tracking.tracker import NoTracker
from policy.training.loop import train
from policy.training.preparation import prepare_run
from tests.conftest import small_config

CONFIG = small_config(obs_size=16, hidden_size=32)
SETTINGS = TrainSettings(
    steps=30, batch_size=8, warmup_steps=5, learning_rate=1e-2, log_every=10, val_every=10, save_every=4
)
PRECISIONS = ["float32", "bfloat16"]


def prepared(demonstrations, settings=SETTINGS, config=CONFIG):
    return prepare_run(config, demonstrations, settings, seed=0, device="cpu")


def go(run, settings=SETTINGS, save=lambda state: None):
    train(run, settings, seed=0, tracker=NoTracker(), save=save)


def tensors(run):
    memory = run.state.optimizer.state_dict()["state"]
    return {
        **{f"policy.{k}": v.clone() for k, v in run.state.policy.state_dict().items()},
        **{f"ema.{k}": v.clone() for k, v in run.state.ema.state_dict().items()},
        **{f"optimizer.{i}.{k}": v.clone() for i, m in memory.items() for k, v in m.items()},
    }


def damage_loss(run, steps, value):
    """Give these steps, counted from 1, a loss of `value` times what it is."""
    genuine, calls = run.state.policy.loss, iter(range(1, 1_000))

    def loss(*args, **kwargs):
        return genuine(*args, **kwargs) * (value if next(calls) in steps else 1.0)

    run.state.policy.loss = loss


def damage_gradient(run, steps, value):
    """Give these steps a gradient of `value` in one place; their losses are fine."""
    calls = iter(range(1, 1_000))

    def replace(gradient):
        return torch.full_like(gradient, value) if next(calls) in steps else gradient

    run.state.policy.denoiser.leave.bias.register_hook(replace)


DAMAGES = pytest.mark.parametrize(
    ("damage", "value", "said"),
    [
        (damage_loss, math.nan, "the loss nan and"),
        (damage_loss, math.inf, "the loss inf and"),
        (damage_gradient, math.nan, "a gradient of norm nan"),
        (damage_gradient, -math.inf, "a gradient of norm inf"),
    ],
)


@pytest.mark.parametrize("precision", PRECISIONS)
@DAMAGES
def test_a_bad_step_stops_with_its_number_its_episodes_and_nothing_saved_since(
    demonstrations, precision, damage, value, said
):
    settings = dataclasses.replace(SETTINGS, precision=precision)
    run, saves = prepared(demonstrations, settings), []
    damage(run, {6}, value)
    windows = run.training.batch_at(5, settings.batch_size, 0)
    ends = np.cumsum([demonstrations.episode_ends[0], *np.diff(demonstrations.episode_ends)][: len(run.training)])
    assert len(run.training.episodes) == len(ends)  # nothing is held out: window w is transition w
    episodes = sorted({int(np.searchsorted(ends, w, side="right")) for w in windows})
    with pytest.raises(FloatingPointError) as caught:
        go(run, settings, save=lambda state: saves.append(state.step))
    message = str(caught.value)
    assert message.startswith("step 6 has the loss ")
    assert said in message
    assert f"on a batch of the episodes {', '.join(map(str, episodes))}: lower train.learning_rate" in message
    assert saves == [4]
    assert all(v.isfinite().all() for v in tensors(run).values())


@pytest.mark.parametrize("precision", PRECISIONS)
@DAMAGES
def test_a_skipped_step_changes_neither_weights_nor_the_optimisers_memory(
    demonstrations, precision, damage, value, said
):
    """Stopped right after steps 5, 6 and 7, of which the sixth is bad."""
    settings = dataclasses.replace(SETTINGS, precision=precision, on_bad_loss="skip", save_every=1, steps=7)
    run, after = prepared(demonstrations, settings), {}
    damage(run, {6}, value)
    with pytest.warns(UserWarning, match=rf"^step 6 has .*{said}.* episodes \d.*: skipped$"):
        go(run, settings, save=lambda state: after.update({state.step: tensors(run)}))
    assert run.state.skipped == [6]
    assert [k for k, v in after[6].items() if not k.startswith("ema.") and not torch.equal(v, after[5][k])] == []
    changed = [k for k, v in after[7].items() if not torch.equal(v, after[6][k])]
    assert any(k.startswith("policy.") for k in changed)
    assert any(k.endswith("exp_avg_sq") for k in changed)
    assert all(v.isfinite().all() for v in after[7].values())


def test_a_run_whose_second_half_is_skipped_ends_with_an_error_and_saves_nothing(demonstrations):
    """As at an absurd learning rate, after which no batch has a finite loss."""
    settings = dataclasses.replace(SETTINGS, on_bad_loss="skip", steps=8, save_every=100)
    run, saves = prepared(demonstrations, settings), []
    damage_loss(run, {5, 6, 7, 8}, math.nan)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(FloatingPointError, match=r"^step 8 .*, like 3 before it: lower train\.learning_rate"),
    ):
        go(run, settings, save=lambda state: saves.append(state.step))
    assert saves == []


def test_a_skipped_step_is_the_step_of_a_run_that_never_took_it(demonstrations):
    """Against a loop that leaves the optimiser's step out by hand."""
    settings = dataclasses.replace(SETTINGS, on_bad_loss="skip")
    run, by_hand = prepared(demonstrations, settings), prepared(demonstrations, settings)
    damage_loss(run, {2, 9}, math.nan)
    genuine, calls = by_hand.state.optimizer.step, iter(range(1, 1_000))
    by_hand.state.optimizer.step = lambda: None if next(calls) in {2, 9} else genuine()
    with pytest.warns(UserWarning, match="skipped"):
        go(run, settings)
    go(by_hand, settings)
    assert run.state.skipped == [2, 9]
    expected = tensors(by_hand)
    assert [k for k, v in tensors(run).items() if not torch.equal(v, expected[k])] == []


def test_skipped_steps_are_counted_in_the_history_and_left_out_of_the_mean(demonstrations):
    settings = dataclasses.replace(SETTINGS, on_bad_loss="skip")
    run = prepared(demonstrations, settings)
    damage_loss(run, {3, 11, 12}, math.nan)
    with pytest.warns(UserWarning, match="skipped"):
        go(run, settings)
    logged = [entry for entry in run.state.history if "train/learning_rate" in entry]
    assert [(entry["step"], entry["train/skipped_steps"]) for entry in logged] == [(10, 1), (20, 3), (30, 3)]
    assert all(math.isfinite(value) for entry in run.state.history for value in entry.values())


def test_an_interval_of_skipped_steps_alone_logs_no_loss(demonstrations):
    settings = dataclasses.replace(SETTINGS, on_bad_loss="skip")
    run = prepared(demonstrations, settings)
    damage_loss(run, set(range(11, 21)), math.inf)
    with pytest.warns(UserWarning, match="skipped"):
        go(run, settings)
    logged = [entry for entry in run.state.history if "train/learning_rate" in entry]
    assert ["train/loss" in entry for entry in logged] == [True, False, True]


def test_a_hundred_bad_steps_in_a_row_stop_also_a_run_that_skips(demonstrations):
    settings = dataclasses.replace(SETTINGS, on_bad_loss="skip", steps=300, save_every=7)
    run, saves = prepared(demonstrations, settings), []
    damage_loss(run, {3, *range(11, 300)}, math.nan)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(FloatingPointError, match=r"^step 110 has .* like 99 before it"),
    ):
        go(run, settings, save=lambda state: saves.append(state.step))
    assert saves[-1] == 105
    assert all(v.isfinite().all() for v in tensors(run).values())


def test_weights_that_are_not_finite_are_never_saved(demonstrations):
    """A learning rate beyond float32: the first step's loss and gradient are finite, its update is not."""
    settings = dataclasses.replace(SETTINGS, learning_rate=1e39, warmup_steps=0, save_every=1, on_bad_loss="skip")
    run, saves = prepared(demonstrations, settings), []
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 1: lower train\.learning_rate"):
        go(run, settings, save=lambda state: saves.append(state.step))
    assert saves == []


def test_a_stopped_run_names_its_last_good_checkpoint_and_goes_on_from_there_skipping(
    demonstrations, tmp_path, monkeypatch, capsys
):
    genuine = DiffusionPolicy.loss
    calls = iter([*range(1, 11), *range(9, 100)])  # stopped when step 10 is logged, resumed from step 8

    def loss(self, *args, **kwargs):
        value = genuine(self, *args, **kwargs)
        return value * math.nan if self.training and next(calls) == 10 else value

    monkeypatch.setattr(DiffusionPolicy, "loss", loss)

    def clone(on_bad_loss):
        train_policy(
            lambda: pytest.fail("no environment is known"),
            dataset=demonstrations,
            policy={name: getattr(CONFIG, name) for name in ("encoder", "denoiser", "schedule")},
            sampler=partial(Sampler),
            train=dataclasses.replace(SETTINGS, on_bad_loss=on_bad_loss),
            tracker=NoTracker,
            output_dir=tmp_path,
        )

    with pytest.raises(
        FloatingPointError, match=rf"^step 10 has .*; the last good checkpoint is {tmp_path}/checkpoint$"
    ):
        clone("stop")
    assert load_checkpoint(tmp_path / "checkpoint").training["step"] == 8
    with pytest.warns(UserWarning, match=r"^step 10 has .*: skipped$"):
        clone("skip")
    printed = capsys.readouterr().out
    assert "going on at step 8 of 30" in printed
    assert "1 of 30 steps skipped, not finite: 10\n" in printed


def circles() -> Demonstrations:
    """What comes next follows from the state, so that a chunk can be learnt."""
    angles = np.concatenate([start + 0.2 * np.arange(20) for start in range(6)])
    states = np.stack([np.cos(angles), np.sin(angles), np.zeros_like(angles)], axis=1).astype(np.float32)
    return Demonstrations(
        observations={"state": states}, actions=-states[:, :2], episode_ends=20 * np.arange(1, 7, dtype=np.int64)
    )


def test_in_bfloat16_the_loss_falls_as_far_and_the_weights_stay_float32():
    losses, runs = {}, {}
    for precision in PRECISIONS:
        settings = dataclasses.replace(SETTINGS, steps=200, batch_size=32, precision=precision)
        runs[precision] = prepared(circles(), settings)
        go(runs[precision], settings)
        logged = [entry["train/loss"] for entry in runs[precision].state.history if "train/loss" in entry]
        losses[precision] = logged[-1]
        assert logged[-1] < 0.3 * logged[0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    halves = tensors(runs["bfloat16"])
    assert {v.dtype for v in halves.values()} == {torch.float32}
    # The counter-check: rounding to 8 bits leaves traces.
    assert not torch.equal(
        halves["policy.denoiser.leave.weight"], tensors(runs["float32"])["policy.denoiser.leave.weight"]
    )


@pytest.mark.parametrize(("name", "value"), [("precision", "float16"), ("on_bad_loss", "ignore")])
def test_a_word_that_is_no_option_is_refused_with_the_options(name, value):
    with pytest.raises(ValueError, match=rf"unknown train\.{name} '{value}'.*; allowed: \w+, \w+"):
        TrainSettings(**{name: value})


def acting(demonstrations) -> DiffusionPolicy:
    run = prepared(demonstrations)
    go(run)
    return run.state.ema


def sample(policy, states, **settings) -> torch.Tensor:
    observations = {"state": torch.as_tensor(states).expand(len(states), 2, 3)}
    return policy.sample_actions(observations, ddim_steps=5, generator=torch.Generator().manual_seed(0), **settings)


FAR = [1e3, 1e6, 1e30, float(np.finfo(np.float32).max), math.inf]


@pytest.mark.parametrize("far", [*FAR, *(-x for x in FAR)])
def test_far_outside_the_training_range_actions_are_finite_and_within_the_demonstrated_ones(demonstrations, far):
    policy = acting(demonstrations)
    state = torch.tensor([[far, 0.0, far]])[:, None]
    assert sample(policy, state, clip=None).isfinite().all()
    chunk = sample(policy, state)[0].numpy()
    low, high = demonstrations.actions.min(axis=0), demonstrations.actions.max(axis=0)
    assert ((low - 1e-5 <= chunk) & (chunk <= high + 1e-5)).all()


def test_beyond_ten_half_ranges_values_are_held_and_before_they_are_not():
    normalizer = Normalizer((1,))
    normalizer.fit([2.0], [6.0])  # middle 4, half range 2
    x = torch.tensor([[4.0 + 2 * y] for y in (9.5, -9.5, 10.5, 1000.0, -1000.0, math.inf, -math.inf)])
    assert normalizer.normalize(x).flatten().tolist() == [9.5, -9.5, 10.0, 10.0, -10.0, 10.0, -10.0]
    assert normalizer.normalize(torch.tensor([[math.nan]])).isnan().all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1e39), (-1e300, 0.0)])
def test_limits_that_float32_cannot_hold_are_refused(low, high):
    with pytest.raises(ValueError, match="too large for float32"):
        Normalizer((1,)).fit([low], [high])


def test_the_whole_range_of_float32_can_be_fitted():
    largest = float(np.finfo(np.float32).max)
    normalizer = Normalizer((1,))
    normalizer.fit([-largest], [largest])
    assert normalizer.normalize(torch.tensor([[-largest], [0.0], [largest]])).flatten().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("transitions", [1, 2, 25])
def test_one_episode_is_enough_whatever_its_length(transitions):
    """One transition makes every dimension constant: then its action is all there is to say."""
    generator = np.random.default_rng(0)
    states = generator.uniform(-1, 1, (transitions, 3)).astype(np.float32)
    demonstrations = Demonstrations(
        observations={"state": states}, actions=-states[:, :2], episode_ends=np.array([transitions])
    )
    run = prepared(demonstrations)
    go(run)
    assert (len(run.training), len(run.validation)) == (transitions, 0)
    assert all(math.isfinite(value) for entry in run.state.history for value in entry.values())
    chunk = sample(run.state.ema, torch.from_numpy(states)[:, None])
    assert chunk.isfinite().all()
    if transitions == 1:
        np.testing.assert_array_equal(chunk[0].numpy(), np.repeat(-states[:, :2], 8, axis=0))


def test_constant_and_near_constant_dimensions_train_and_act_as_their_constants():
    data = circles()
    states, actions = data.observations["state"].copy(), data.actions.copy()
    jitter = np.random.default_rng(0).uniform(-1e-4, 1e-4, len(states))
    states[:, 1], states[:, 2], actions[:, 1] = 5.0, 7.0 + jitter, -3.0
    run = prepared(Demonstrations(observations={"state": states}, actions=actions, episode_ends=data.episode_ends))
    go(run)
    losses = [entry["train/loss"] for entry in run.state.history if "train/loss" in entry]
    assert losses[-1] < losses[0]
    seen, elsewhere = torch.tensor([[0.5, 5.0, 7.0]])[:, None], torch.tensor([[0.5, -400.0, 900.0]])[:, None]
    assert torch.equal(sample(run.state.ema, seen), sample(run.state.ema, elsewhere))
    assert (sample(run.state.ema, seen)[..., 1] == -3.0).all()
