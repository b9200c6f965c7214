"""Rectification: pairs of the teacher's own making, and one denoising step that does what many did."""

import dataclasses

import numpy as np
import pytest
import torch

from policy import TrainSettings
from policy.checkpoint import resume_training, save_checkpoint
from policy.data.demonstrations import Demonstrations
from policy.training.loop import train
from policy.training.preparation import check_rectifiable, prepare_run
from policy.training.rectification import (
    SMALL_ERROR,
    TIMESTEPS_A_PAIR,
    pair_timesteps,
    pairs,
    pairs_of,
    rectification_loss,
    start_rectification,
)
from policy.training.settings import learning_rate
from tests.conftest import randomize, small_config

CONFIG = small_config(obs_size=16, hidden_size=32)
SETTINGS = TrainSettings(
    steps=20,
    rectify_steps=20,
    batch_size=32,
    warmup_steps=3,
    log_every=10,
    val_every=20,
    save_every=1,
    val_fraction=0.2,
)


class Silent:
    def log(self, metrics, step):
        pass


@pytest.fixture(scope="module")
def forked() -> Demonstrations:
    """Left or right from one and the same place: the mean of the two leads nowhere."""
    episodes = 64
    sides = np.repeat(np.where(np.arange(episodes) % 2, 1.0, -1.0), 8)
    return Demonstrations(
        observations={"state": np.zeros((8 * episodes, 3), np.float32)},
        actions=np.stack([sides, np.tile(np.linspace(-1, 1, 8), episodes)], axis=1).astype(np.float32),
        episode_ends=8 * np.arange(1, episodes + 1, dtype=np.int64),
    )


def prepared(demonstrations, settings=SETTINGS, config=CONFIG):
    return prepare_run(config, demonstrations, settings, seed=0, device="cpu")


def go(run, settings=SETTINGS, save=lambda state: None, should_stop=lambda: False):
    train(run, settings, seed=0, tracker=Silent(), save=save, should_stop=should_stop)
    return run.state


def rows(count):
    return {"state": torch.zeros(count, CONFIG.obs_horizon, 3)}


@pytest.mark.parametrize(
    ("timesteps_per_chunk", "rows"), [(1, 32 // TIMESTEPS_A_PAIR), (2, 64 // TIMESTEPS_A_PAIR), (9, 32)]
)
def test_a_pair_is_a_noise_and_what_the_teacher_makes_of_it(forked, timesteps_per_chunk, rows):
    run = prepared(forked)
    teacher = start_rectification(run.state, ddim_steps=4)
    batch = run.training.gather(np.arange(pairs_of(32, timesteps_per_chunk)))
    made, noise = pairs(teacher, batch, torch.Generator().manual_seed(3))
    assert len(made["actions"]) == len(noise) == len(noise.unique(dim=0)) == rows
    assert made["mask"].all()
    seen = batch["observations"]["state"]
    expected = run.state.ema.sample_actions({"state": seen}, ddim_steps=4, noise=noise)
    torch.testing.assert_close(made["actions"], expected, rtol=0, atol=1e-5)
    assert torch.equal(made["observations"]["state"], seen)


def test_the_loss_of_pairs_is_the_root_mean_square_error_of_each_chunk(forked):
    run = prepared(forked)
    policy = run.state.ema
    randomize(policy)
    made, noise = pairs(
        start_rectification(run.state, 4), run.training.gather(np.arange(8)), torch.Generator().manual_seed(3)
    )
    given = rectification_loss(policy, made, noise, torch.Generator().manual_seed(1))
    timesteps = pair_timesteps(20, 8, torch.Generator().manual_seed(1)).flatten()
    expected = []
    for row, timestep in enumerate(timesteps):
        pair = slice(row // TIMESTEPS_A_PAIR, row // TIMESTEPS_A_PAIR + 1)
        clean = policy.action_normalizer.normalize(made["actions"][pair])
        x_t = policy.schedule.add_noise(clean, noise[pair], timestep[None])
        embedding = policy.embed({"state": made["observations"]["state"][pair]})
        error = (policy.denoiser(x_t, timestep[None], embedding) - clean).square().mean()
        expected.append(((error + SMALL_ERROR**2).sqrt() - SMALL_ERROR).item())
    assert given.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_pairs_are_looked_at_where_few_denoising_steps_look_and_everywhere():
    timesteps = pair_timesteps(100, 20_000, torch.Generator().manual_seed(0))
    first, near, *others = timesteps.T
    assert (first == 99).all()
    assert set(near.tolist()) == set(range(100))
    assert (near >= 75).double().mean().item() == pytest.approx(0.5, abs=0.02)  # u² < 1/4 for half of u in [0, 1)
    for anywhere in others:
        assert torch.bincount(anywhere, minlength=100).min() > 100
    assert set(pair_timesteps(1, 50, torch.Generator().manual_seed(0)).flatten().tolist()) == {0}


def sides(policy, ddim_steps):
    """How far to the side chunks go from 256 noises, in [0, 1]."""
    chunks = policy.sample_actions(rows(256), ddim_steps=ddim_steps, generator=torch.Generator().manual_seed(0))
    return chunks[..., 0].abs().mean().item()


@pytest.mark.slow
def test_one_step_of_a_rectified_policy_chooses_where_a_plain_one_averages(forked):
    settings = dataclasses.replace(
        SETTINGS, steps=250, rectify_steps=250, learning_rate=1e-2, batch_size=64, val_every=500, save_every=250
    )
    kept = {}
    state = go(prepared(forked, settings), settings, lambda state: kept.setdefault(state.step, sides(state.ema, 1)))
    policy = state.ema
    assert kept[250] < 0.5
    assert sides(policy, 1) > 0.8
    assert sides(policy, 8) > 0.8
    left = policy.sample_actions(rows(256), ddim_steps=1, generator=torch.Generator().manual_seed(0))[:, 0, 0] < 0
    assert 0.3 < left.float().mean() < 0.7


@pytest.fixture(scope="module", params=[{}, {"side": (1,)}], ids=["plain", "auxiliary"])
def whole(forked, request):
    """Demonstrations, a configuration, and the state at the end of a run that nothing stopped."""
    told = {key: forked.actions[:, :1] for key in request.param}
    demonstrations = dataclasses.replace(forked, observations={**forked.observations, **told})
    config = dataclasses.replace(CONFIG, auxiliary_shapes=request.param)
    return demonstrations, config, go(prepared(demonstrations, config=config))


@pytest.mark.parametrize("stop_at", [19, 20, 21, 33])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(whole, tmp_path, stop_at):
    demonstrations, config, expected = whole
    settings = dataclasses.replace(SETTINGS, save_every=7)

    def save(state):
        save_checkpoint(tmp_path / "checkpoint", state, env=None, execution_horizon=8, training={})

    run = prepared(demonstrations, config=config)
    go(run, settings, save, should_stop=lambda: run.state.step >= stop_at)
    resumed = prepared(demonstrations, config=config)
    resume_training(tmp_path / "checkpoint", resumed.state, {})
    assert resumed.state.step == stop_at
    assert (resumed.state.teacher is not None) == (stop_at > settings.steps)
    state = go(resumed, settings)
    assert state.history == expected.history
    assert expected.teacher is not None
    assert state.teacher is not None
    for name in ("policy", "ema", "teacher"):
        for one, other in zip(
            getattr(state, name).state_dict().values(), getattr(expected, name).state_dict().values(), strict=True
        ):
            assert torch.equal(one, other)


def test_the_learning_rate_begins_anew(forked):
    plain = dataclasses.replace(SETTINGS, rectify_steps=0)
    rates = [learning_rate(step, SETTINGS) for step in range(40)]
    assert rates[:20] == rates[20:] == [learning_rate(step, plain) for step in range(20)]
    assert learning_rate(20, plain) == 0


def test_the_teacher_does_not_learn(forked):
    states = []
    run = prepared(forked)
    go(
        run,
        save=lambda state: states.append(
            state.teacher and {k: v.clone() for k, v in state.teacher.state_dict().items()}
        ),
    )
    assert states[:20] == [None] * 20
    for later in states[21:]:
        assert all(torch.equal(later[key], value) for key, value in states[20].items())
    assert any(not torch.equal(value, run.state.ema.state_dict()[key]) for key, value in states[20].items())


@pytest.mark.parametrize(("name", "value"), [("rectify_steps", -1), ("rectify_ddim_steps", 0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"train\.{name} must be"):
        TrainSettings(**{name: value})


def test_more_denoising_steps_than_timesteps_are_refused_before_training(forked):
    settings = dataclasses.replace(SETTINGS, rectify_ddim_steps=21)
    with pytest.raises(ValueError, match=r"train\.rectify_ddim_steps must be a whole number within 1\.\.20 .*got 21"):
        prepared(forked, settings)


def test_a_policy_without_noise_has_no_pairs_to_learn_from():
    for objective in ("regression", "mip"):
        with pytest.raises(ValueError, match=f"objective={objective} has no noise: leave train.rectify_steps out"):
            check_rectifiable(objective)
    check_rectifiable("flow")
