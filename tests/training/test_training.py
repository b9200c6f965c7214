"""The training loop, its parts against naive computations."""

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policy import TrainSettings
from policy.common.seeding import derive_generator
from policy.data.demonstrations import Demonstrations
from policy.data.windows import split_episodes
from policy.model.diffusion_policy import observed
from policy.training.loop import train, update_ema, validation_loss
from policy.training.phases import Demonstrated
from policy.training.preparation import prepare_run, start_training
from policy.training.settings import learning_rate
from policy.training.state import restore_record, run_record
from tests.conftest import small_config

CONFIG = small_config(obs_size=16, hidden_size=32)
SETTINGS = TrainSettings(
    steps=60, batch_size=32, warmup_steps=5, log_every=10, val_every=20, save_every=25, val_fraction=0.2
)


class Recorder:
    """A tracker that keeps what it was told."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict]] = []

    def log(self, metrics, step):
        self.entries.append((step, metrics))


def prepared(demonstrations, config=CONFIG, settings=SETTINGS, seed=0):
    return prepare_run(config, demonstrations, settings, seed=seed, device="cpu")


def go(run, settings=SETTINGS, seed=0, **callbacks):
    """Train; gives what was tracked and the steps at which the state was saved."""
    tracker, saves = Recorder(), []
    callbacks.setdefault("save", lambda state: saves.append(state.step))
    train(run, settings, seed=seed, tracker=tracker, **callbacks)
    return tracker, saves


@pytest.fixture
def smooth() -> Demonstrations:
    """Points on circles: what comes next follows from the state, so that a chunk can be learnt."""
    angles = np.concatenate([start + 0.2 * np.arange(20) for start in range(6)])
    states = np.stack([np.cos(angles), np.sin(angles), np.zeros_like(angles)], axis=1).astype(np.float32)
    return Demonstrations(
        observations={"state": states}, actions=-states[:, :2], episode_ends=20 * np.arange(1, 7, dtype=np.int64)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_falls(smooth, prediction_type):
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-2)
    run = prepared(smooth, dataclasses.replace(CONFIG, prediction_type=prediction_type), settings)
    tracker, saves = go(run, settings)
    losses = [metrics["train/loss"] for _, metrics in tracker.entries if "train/loss" in metrics]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
    validation = [metrics["val/loss"] for _, metrics in tracker.entries if "val/loss" in metrics]
    assert len(validation) == 3
    assert validation[-1] < validation[0]
    assert saves == [25, 50, 60]
    assert run.state.history == [{"step": step, **metrics} for step, metrics in tracker.entries]


def test_what_only_demonstrations_have_is_learnt_and_not_needed_to_act(smooth):
    hidden = {"heading": 3 * smooth.observations["state"][:, 1:2] + 7}
    demonstrations = dataclasses.replace(smooth, observations={**smooth.observations, **hidden})
    config = dataclasses.replace(CONFIG, auxiliary_shapes={"heading": (1,)})
    run = prepared(demonstrations, config, dataclasses.replace(SETTINGS, rectify_steps=20, learning_rate=1e-2))
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-2, steps=300, rectify_steps=20)
    go(run, settings)
    policy, batch = run.state.ema, run.training.gather(np.arange(60))
    embedding = policy.embed(observed(policy.config, batch["observations"]))
    normalized = policy.auxiliary_heads["heading"](embedding)
    heading = policy.auxiliary_normalizers["heading"].unnormalize(normalized)
    error = (heading - batch["observations"]["heading"][:, -1]).square().mean().sqrt().item()
    assert error < hidden["heading"].std() / 5
    assert policy.sample_actions(observed(policy.config, batch["observations"]), ddim_steps=2).shape == (60, 8, 2)


def test_every_step_depends_on_the_seed_alone(demonstrations):
    one, same, other = (prepared(demonstrations) for _ in range(3))
    go(one)
    torch.manual_seed(1234)
    torch.rand(7)
    go(same)
    go(other, seed=1)
    weights = [run.state.policy.denoiser.leave.weight for run in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(
        *(prepared(demonstrations, seed=seed).state.policy.encoder.layers[0].weight for seed in (0, 1))
    )


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine_to_zero():
    settings = TrainSettings(steps=1000, warmup_steps=100, learning_rate=2e-3)
    rates = [learning_rate(step, settings) for step in range(1000)]
    cosine = [2e-3 * 0.5 * (1 + math.cos(math.pi * step / 1000)) for step in range(1000)]
    assert rates[100:] == pytest.approx(cosine[100:])
    assert [r / c for r, c in zip(rates[:100], cosine[:100], strict=True)] == pytest.approx(
        [(step + 1) / 101 for step in range(100)]
    )
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert 0 < rates[-1] < 1e-5 * 2e-3
    assert max(rates) < 2e-3
    assert learning_rate(0, TrainSettings(warmup_steps=0, learning_rate=0.5)) == 0.5


def test_the_optimiser_steps_at_the_scheduled_rate(demonstrations):
    run = prepared(demonstrations)
    go(run, should_stop=lambda: run.state.step == 3)
    assert [g["lr"] for g in run.state.optimizer.param_groups] == [learning_rate(2, SETTINGS)] * 2


@pytest.mark.parametrize("max_decay", [0.999, 0.5, 0.0])
def test_the_weight_average_against_a_naive_computation(demonstrations, max_decay):
    run = prepared(demonstrations)
    policy, ema = run.state.policy, run.state.ema
    naive = {name: p.detach().double().numpy().copy() for name, p in policy.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for n in range(25):
        with torch.no_grad():
            for p in policy.parameters():
                p += torch.randn(p.shape, generator=generator)
        update_ema(ema, policy, n, max_decay)
        decay = min(max_decay, (1 + n) / (10 + n))
        for name, p in policy.named_parameters():
            naive[name] = decay * naive[name] + (1 - decay) * p.detach().double().numpy()
    for name, p in ema.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), naive[name], atol=1e-4, err_msg=name)


def test_statistics_of_a_batch_normalisation_reach_the_average(demonstrations):
    run = prepared(demonstrations)
    for policy in (run.state.policy, run.state.ema):
        policy.encoder.add_module("plugin", torch.nn.BatchNorm1d(3))
    run.state.policy.encoder.plugin(5 + torch.ones(32, 3))
    update_ema(run.state.ema, run.state.policy, 0, 0.9999)
    assert run.state.ema.encoder.plugin.running_mean.tolist() == pytest.approx([0.6] * 3)


def test_the_average_keeps_no_autograd_graph(demonstrations):
    """A graph would grow by every step: 20 MB per 1000 of them."""
    run = prepared(demonstrations)
    go(run, should_stop=lambda: run.state.step == 3)
    assert [name for name, p in run.state.ema.named_parameters() if p.requires_grad or p.grad_fn] == []


def test_the_average_follows_the_weights_with_the_state_step_as_its_count(demonstrations):
    run = prepared(demonstrations)
    start = run.state.policy.denoiser.leave.bias.detach().clone()
    go(run, should_stop=lambda: run.state.step == 1)
    expected = 0.1 * start + 0.9 * run.state.policy.denoiser.leave.bias.detach()  # update 0: decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(run.state.ema.denoiser.leave.bias, expected)


def test_weight_decay_is_on_matrices_only(demonstrations):
    """Without gradients AdamW only decays: p <- p * (1 - lr * weight_decay)."""
    policy = prepared(demonstrations).state.policy
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(torch.ones_like(p))
    state = start_training(policy, TrainSettings(learning_rate=0.1, weight_decay=0.5))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    parameters = list(policy.parameters())
    assert {p.ndim for p in parameters} == {1, 2}
    for p in parameters:
        expected = 1 - 0.1 * 0.5 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(parameters)


def spoil(run):
    with torch.no_grad():
        run.state.policy.denoiser.leave.bias.fill_(float("nan"))
    return run


def test_a_loss_that_is_not_finite_stops_training_and_says_what_to_do(demonstrations):
    with pytest.raises(FloatingPointError, match=r"^step 1 has the loss nan .*: lower train\.learning_rate"):
        go(spoil(prepared(demonstrations)))


def test_a_loss_that_is_not_finite_is_never_saved_over_a_good_checkpoint(demonstrations):
    """Also where checkpoints are written more often than the loss is logged."""
    settings = dataclasses.replace(SETTINGS, save_every=4, log_every=50)
    saves = []
    with pytest.raises(FloatingPointError):
        go(spoil(prepared(demonstrations)), settings, save=lambda state: saves.append(state.step))
    assert saves == []


def test_a_stop_never_saves_a_loss_that_is_not_finite(demonstrations):
    run, saves = spoil(prepared(demonstrations)), []
    with pytest.raises(FloatingPointError):
        go(run, save=lambda state: saves.append(state.step), should_stop=lambda: run.state.step == 3)
    assert saves == []


def test_normalisers_are_fitted_on_training_episodes_only(demonstrations):
    _, held_out = split_episodes(demonstrations.originals, SETTINGS.val_fraction, 0)
    assert len(held_out) == 1
    row = demonstrations.episode_starts[held_out[0]]
    states, actions = demonstrations.observations["state"].copy(), demonstrations.actions.copy()
    states[row], actions[row] = 1e6, -1e6
    run = prepared(
        Demonstrations(observations={"state": states}, actions=actions, episode_ends=demonstrations.episode_ends)
    )
    assert run.validation.episodes.tolist() == held_out.tolist()
    kept = np.ones(len(actions), bool)
    kept[row : demonstrations.episode_ends[held_out[0]]] = False
    for normalizer, values in (
        (run.state.policy.observation_normalizers["state"], states[kept]),
        (run.state.policy.action_normalizer, actions[kept]),
        (run.state.ema.action_normalizer, actions[kept]),
    ):
        normalised = normalizer.normalize(torch.from_numpy(values))
        torch.testing.assert_close(normalised.amin(0), -torch.ones(values.shape[1]))
        torch.testing.assert_close(normalised.amax(0), torch.ones(values.shape[1]))


def test_the_normalisers_do_not_move_while_training(demonstrations):
    run = prepared(demonstrations)
    before = {k: v.clone() for k, v in run.state.policy.named_buffers()}
    go(run)
    assert all(torch.equal(before[k], v) for k, v in run.state.policy.named_buffers())
    assert all(torch.equal(before[k], v) for k, v in run.state.ema.named_buffers())


def test_the_validation_loss_is_the_same_every_time(demonstrations):
    config = dataclasses.replace(
        CONFIG,
        encoder={**CONFIG.encoder, "noise": 0.5, "dropout": 0.5},
        denoiser={**CONFIG.denoiser, "dropout": 0.5},
    )
    run = prepared(demonstrations, config)
    go(run, should_stop=lambda: run.state.step == 5)
    first = validation_loss(Demonstrated(SETTINGS), run.state.ema, run.validation)
    torch.manual_seed(99)
    assert validation_loss(Demonstrated(SETTINGS), run.state.ema, run.validation) == first
    assert math.isfinite(first)
    assert first > 0
    go(run)
    assert validation_loss(Demonstrated(SETTINGS), run.state.ema, run.validation) != first


def test_the_validation_loss_is_over_held_out_windows(demonstrations):
    """Against the loss of exactly those windows; training on more cannot change which they are."""
    run = prepared(demonstrations)
    length = int(np.diff([0, *demonstrations.episode_ends])[run.validation.episodes[0]])
    assert len(run.validation) == length
    everything = run.validation.gather(np.arange(length))
    with torch.no_grad():
        expected = run.state.ema.loss(everything, derive_generator(0)).item()
    assert validation_loss(Demonstrated(SETTINGS), run.state.ema, run.validation) == expected


def test_the_validation_loss_of_chunks_that_take_many_rows_is_over_all_held_out_episodes(demonstrations):
    """A rectification looks at fewer windows; they are spread over the episodes, too."""
    run, seen = prepared(demonstrations), []
    phase = SimpleNamespace(
        rows=lambda count: 3,
        validation_loss=lambda policy, batch, generator: seen.append(batch["observations"]["state"]) or torch.zeros(()),
    )
    validation_loss(phase, run.state.ema, run.validation)
    last = run.validation.gather(np.array([0, len(run.validation) - 1]))["observations"]["state"]
    assert len(seen[0]) == 3
    assert torch.equal(seen[0][[0, -1]], last)


def test_a_metric_that_was_not_finite_is_none_where_a_run_goes_on(demonstrations):
    run = prepared(demonstrations)
    record = {**run_record(run.state), "history": [{"step": 1, "val/loss": None, "train/loss": 0.5}]}
    restore_record(run.state, record)
    assert run.state.history == [{"step": 1, "train/loss": 0.5}]


def test_without_held_out_episodes_there_is_no_validation_loss(demonstrations):
    settings = dataclasses.replace(SETTINGS, val_fraction=0.0)
    run = prepared(demonstrations, settings=settings)
    tracker, _ = go(run, settings)
    assert len(run.training.episodes) == demonstrations.num_episodes
    assert not any("val/loss" in metrics for _, metrics in tracker.entries)


def test_should_stop_saves_once_and_returns(demonstrations):
    run = prepared(demonstrations)
    _, saves = go(run, should_stop=lambda: run.state.step >= 7)
    assert (saves, run.state.step) == ([7], 7)


def test_a_finished_run_trains_no_further(demonstrations):
    run = prepared(demonstrations)
    go(run)
    before = run.state.policy.denoiser.leave.weight.detach().clone()
    _, saves = go(run)
    assert saves == []
    assert torch.equal(before, run.state.policy.denoiser.leave.weight)


def test_rollouts_get_the_average_and_their_figures_are_logged(demonstrations):
    settings = dataclasses.replace(SETTINGS, rollout_every=30)
    run, seen = prepared(demonstrations, settings=settings), []

    def rollout(policy):
        seen.append(policy)
        return {"success_rate": 0.25}

    tracker, _ = go(run, settings, rollout=rollout)
    assert [policy is run.state.ema for policy in seen] == [True, True]
    assert [step for step, m in tracker.entries if m.get("rollout/success_rate") == 0.25] == [30, 60]


def test_the_terminal_shows_validation_loss_and_rollout_success_beside_the_loss(demonstrations, capsys):
    settings = dataclasses.replace(SETTINGS, rollout_every=30, rollout_episodes=4)
    run = prepared(demonstrations, settings=settings)
    go(run, settings, rollout=lambda policy: {"success_rate": 0.25, "score_mean": 0.5})
    printed, last = capsys.readouterr(), run.state.history[-1]
    shown = f"loss={last['train/loss']:.4f}, validation loss={last['val/loss']:.4f}, rollout success=25%"
    assert printed.err.rstrip().endswith(f"{shown}]")
    at_30, at_60 = printed.out.splitlines()
    # The validation loss is that of step 20, the newest one.
    loss, validation = (run.state.history[n][key] for n, key in ((2, "train/loss"), (1, "val/loss")))
    assert at_30 == (f"step 30: loss {loss:.4f}, validation loss {validation:.4f}, rollout success 25% (of 4 episodes)")
    assert at_60.startswith("step 60: loss ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("batch_size", "log_every", "val_every", "save_every", "rollout_episodes")),
        *((name, 0.0) for name in ("learning_rate", "grad_clip")),
        *((name, -1) for name in ("steps", "weight_decay", "warmup_steps", "rollout_every")),
        *((name, value) for name in ("ema_decay", "val_fraction") for value in (-0.1, 1.0)),
        *((name, math.nan) for name in ("learning_rate", "grad_clip", "weight_decay", "ema_decay", "val_fraction")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"train\.{name} must be .*; got {value}"):
        TrainSettings(**{name: value})
