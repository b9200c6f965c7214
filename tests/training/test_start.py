"""Runs that start from a trained policy: which settings and data fit it, rectification of any policy, distillation."""

import dataclasses
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig, TrainSettings
from policy.checkpoint import describe_checkpoint, load_checkpoint, save_checkpoint
from policy.commands import record
from policy.commands.train import train_policy
from policy.commands.training_start import check_start
from policy.data.demonstrations import Demonstrations
from policy.diffusion.sampler import Sampler
from policy.inference.backends import compile_sampler
from policy.training import rectification
from policy.training.loop import train
from policy.training.preparation import prepare_run, start_training
from policy.training.start import config_from, config_of_student, fitting
from tests.conftest import randomize, small_config

CONFIG = dataclasses.replace(small_config(obs_size=16, hidden_size=32), prediction_type="epsilon")
# A run that learns from chunks alone.
SETTINGS = TrainSettings(
    steps=0,
    rectify_steps=12,
    rectify_ddim_steps=4,
    batch_size=32,
    warmup_steps=3,
    log_every=4,
    val_every=6,
    save_every=3,
    val_fraction=0.2,
)
# One that learns from demonstrations alone, and the settings of a small policy.
OWN_SAMPLER = Sampler(eta=0.5, noise_scale=0.5)
CLONING = dataclasses.replace(SETTINGS, steps=1, rectify_steps=0)
SMALL = {"denoiser": {"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1}, "obs_size": 8}


class Silent:
    def __init__(self, folder, config):
        pass

    def log(self, metrics, step):
        pass

    def finish(self):
        return None


@pytest.fixture
def trained(tmp_path):
    """The folder of a checkpoint whose weights and normalisers are like those of a trained policy."""
    policy = DiffusionPolicy(CONFIG)
    randomize(policy)
    policy.action_normalizer.fit([-2.0, -1.0], [4.0, 3.0])
    policy.observation_normalizers["state"].fit([-3.0, -1.0, -2.0], [1.0, 1.0, 5.0])
    return saved(policy, tmp_path / "trained")


def saved(policy, folder):
    state = start_training(policy, SETTINGS)
    save_checkpoint(folder, state, env=None, execution_horizon=5, sampler=OWN_SAMPLER, training={})
    return folder


def go(data, folder, train=SETTINGS, policy=None, sampler=None, **start):
    """Train as the command does, and return the checkpoint."""
    ways = {name: value for name, value in start.items() if name in inspect.signature(check_start).parameters}
    check_start(train=train, policy=policy, output_dir=folder, **ways)
    train_policy(
        lambda: pytest.fail("no environment is known"),
        dataset=data,
        policy=policy or {},
        sampler=partial(Sampler, **(sampler or {})),
        train=train,
        tracker=Silent,
        output_dir=folder,
        **start,
    )
    return load_checkpoint(folder / "checkpoint")


def weights(checkpoint):
    return checkpoint.policy.state_dict()


def same(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_it_starts_from_the_weights_the_normalisers_and_the_settings_of_the_checkpoint(
    trained, demonstrations, tmp_path, capsys
):
    plain = dataclasses.replace(SETTINGS, steps=1, rectify_steps=0, learning_rate=1e-9)
    begun, start = go(demonstrations, tmp_path / "run", plain, init=trained), load_checkpoint(trained)
    assert begun.policy.config == CONFIG
    assert begun.execution_horizon == 5
    assert begun.training["init"] == start.digest
    for key, value in weights(start).items():
        torch.testing.assert_close(weights(begun)[key], value, rtol=0, atol=1e-6)
    assert f"starts from {trained} ({start.digest})" in capsys.readouterr().out


def test_normalisers_are_fitted_again_to_the_training_episodes_and_the_weights_are_kept(
    trained, demonstrations, tmp_path, capsys
):
    data = dataclasses.replace(demonstrations, held_out=(4,))
    plain = dataclasses.replace(CLONING, learning_rate=1e-9)
    refit = {"init": trained, "init_normalizers": "refit"}
    before, now = load_checkpoint(trained).policy, go(data, tmp_path / "run", plain, **refit).policy
    assert f"starts from {trained} " in (said := capsys.readouterr().out)
    assert "with its normalisers fitted again" in said
    training = slice(0, data.episode_ends[3])
    for normalizer, values in (
        (now.action_normalizer, data.actions[training]),
        (now.observation_normalizers["state"], data.observations["state"][training]),
    ):
        low, high = values.min(axis=0), values.max(axis=0)
        np.testing.assert_allclose(normalizer.center.numpy(), (low + high) / 2, rtol=1e-6)
        np.testing.assert_allclose(normalizer.half_range.numpy(), (high - low) / 2, rtol=1e-6)
    for (name, value), kept in zip(now.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(value, kept, rtol=0, atol=1e-6, msg=name)

    longer = dataclasses.replace(plain, steps=2)  # a run that goes on keeps what it has fitted
    again = go(data, tmp_path / "run", longer, **refit)
    assert (again.training["step"], again.training["init_normalizers"]) == (2, "refit")
    assert same(now.action_normalizer.state_dict(), again.policy.action_normalizer.state_dict())
    with pytest.raises(ValueError, match=r'trained with other settings \(training: init_normalizers was "refit"\)'):
        go(data, tmp_path / "run", longer, init=trained)


def test_what_goes_on_acting_is_sampled_as_before_and_what_rectification_changes_is_not(
    trained, demonstrations, tmp_path, capsys
):
    plain = dataclasses.replace(SETTINGS, steps=1, rectify_steps=0)
    assert go(demonstrations, tmp_path / "on", plain, init=trained).sampler == OWN_SAMPLER
    # A default that is given counts, too.
    changed = {"init": trained, "sampler": {"noise_scale": 1.0, "warm_start": 0.5}}
    assert go(demonstrations, tmp_path / "changed", plain, **changed).sampler == Sampler(eta=0.5, warm_start=0.5)
    assert capsys.readouterr().out.endswith(f"checkpoint={tmp_path}/changed/checkpoint sampler.warm_start=null\n")
    only = dataclasses.replace(SETTINGS, steps=0, rectify_steps=1)
    for number, start in enumerate(({"init": trained}, {"teacher": trained})):
        assert go(demonstrations, tmp_path / f"rectified{number}", only, **start).sampler == Sampler()


def test_a_run_that_goes_on_keeps_what_is_left_open_and_records_what_is_given_even_if_it_is_complete(
    demonstrations, tmp_path, capsys
):
    given = {"encoder": CONFIG.encoder, "denoiser": CONFIG.denoiser, "schedule": CONFIG.schedule}

    def trained_to(steps, **settings):
        train = dataclasses.replace(SETTINGS, steps=steps, rectify_steps=0)
        return go(demonstrations, tmp_path / "run", train, given, **settings)

    first = trained_to(1, sampler={"eta": 0.5}, execution_horizon=3)
    assert (first.execution_horizon, first.sampler) == (3, Sampler(eta=0.5))
    longer = trained_to(2)
    assert (longer.execution_horizon, longer.sampler, longer.training["step"]) == (3, Sampler(eta=0.5), 2)
    assert "records other settings" not in capsys.readouterr().out
    changed = trained_to(2, sampler={"eta": 0, "noise_scale": 0.5})
    assert (changed.execution_horizon, changed.sampler) == (3, Sampler(noise_scale=0.5))
    assert changed.digest == longer.digest
    assert "from now on: execution_horizon=3 sampler.noise_scale=0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["sample", "v_prediction", "epsilon", None])
def test_rectification_needs_observations_only_and_no_policy_that_predicts_the_noise(
    trained, demonstrations, tmp_path, capsys, given
):
    other = dataclasses.replace(demonstrations, actions=np.full((len(demonstrations.actions), 7), np.nan, np.float32))
    rectified = go(other, tmp_path / "run", init=trained, policy={"prediction_type": given} if given else {})
    assert rectified.policy.config == dataclasses.replace(CONFIG, prediction_type=given or "sample")
    normalizer = rectified.policy.action_normalizer
    assert (normalizer.center.tolist(), normalizer.half_range.tolist()) == ([1.0, 1.0], [3.0, 2.0])
    assert math.isfinite(rectified.training["measured"]["val/loss"]["value"])
    changes = "it predicted epsilon and will predict" in capsys.readouterr().out
    assert changes == (given != "epsilon")


@pytest.fixture(scope="module")
def forked() -> Demonstrations:
    """Observations of one place from which the teacher goes left or right."""
    return Demonstrations(
        observations={"state": np.zeros((256, 3), np.float32)},
        actions=np.zeros((256, 2), np.float32),
        episode_ends=8 * np.arange(1, 33, dtype=np.int64),
    )


class Forked(torch.nn.Module):
    """The exact noise of a distribution that is 1 or -1 in all numbers of a chunk: a denoiser without weights."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, noisy, timestep, embedding):
        signal, sigma = self.schedule.signal_and_noise(timestep, noisy)
        clean = torch.tanh((signal * noisy / sigma**2).sum((1, 2), keepdim=True)).expand_as(noisy)
        return (noisy - signal * clean) / sigma


def test_one_step_of_a_policy_that_learnt_from_noise_prediction_chooses_a_side(forked, monkeypatch):
    """Pairs do not depend on the network that made them: here, a closed form stands for the teacher's."""
    eager = partial(compile_sampler, backend="eager")
    monkeypatch.setattr(rectification, "compile_sampler", lambda policy, sampler, backend: eager(policy, sampler))
    teacher = DiffusionPolicy(CONFIG)
    settings = dataclasses.replace(
        SETTINGS, rectify_steps=100, rectify_ddim_steps=10, learning_rate=1e-2, val_every=500
    )
    config = dataclasses.replace(CONFIG, prediction_type="sample")
    run = prepare_run(config, forked, settings, seed=0, device="cpu", teacher=teacher)
    run.state.teacher.denoiser = Forked(teacher.schedule)
    train(run, settings, seed=0, tracker=Silent(None, None), save=lambda state: None)
    rows = {"state": torch.zeros(128, CONFIG.obs_horizon, 3)}
    chunks = run.state.ema.sample_actions(rows, ddim_steps=1, generator=torch.Generator().manual_seed(0))
    assert chunks.abs().mean() > 0.8
    assert 0.3 < (chunks[:, 0, 0] < 0).float().mean() < 0.7


def test_a_smaller_policy_learns_the_chunks_of_a_larger_one(trained, demonstrations, tmp_path, capsys):
    student = go(demonstrations, tmp_path / "run", policy=SMALL, teacher=trained)
    config, teacher = student.policy.config, load_checkpoint(trained)
    assert (config.denoiser, config.obs_size, config.prediction_type) == (SMALL["denoiser"], 8, "sample")
    assert config.schedule == PolicyConfig(observation_shapes={"state": (3,)}, action_dim=2).schedule
    assert same(student.policy.action_normalizer.state_dict(), teacher.policy.action_normalizer.state_dict())
    assert student.training["teacher"] == teacher.digest
    assert describe_checkpoint(student)["started from"] == f"the checkpoint {teacher.digest}, whose chunks it learned"
    assert "started from" not in describe_checkpoint(teacher)
    assert f"a new policy learns the chunks of {trained}" in capsys.readouterr().out


@pytest.fixture
def carrying() -> Demonstrations:
    """The second number moves with the first one half of the time."""
    walk = np.random.default_rng(0).normal(size=(10, 40)).cumsum(axis=1)
    states = np.stack([walk, walk[:, np.maximum(np.arange(40), 20)], np.zeros_like(walk)], axis=2).reshape(400, 3)
    return Demonstrations(
        observations={"state": states.astype(np.float32)},
        actions=np.zeros((400, 2), np.float32),
        episode_ends=np.arange(40, 401, 40, dtype=np.int64),
    )


def test_found_differences_are_said_and_stored_and_those_of_a_student_are_its_teachers(carrying, tmp_path, capsys):
    first = go(carrying, tmp_path / "run", CLONING, SMALL, find_differences=True)
    assert "state[0] - state[1]" in capsys.readouterr().out
    assert first.policy.config.differences == ((0, 1),)
    longer = dataclasses.replace(CLONING, steps=2)
    assert go(carrying, tmp_path / "run", longer, SMALL, find_differences=True).training["step"] == 2
    student = go(carrying, tmp_path / "student", policy=SMALL, teacher=tmp_path / "run" / "checkpoint")
    assert torch.equal(student.policy.differences.scale, first.policy.differences.scale)


def test_differences_are_looked_for_in_a_new_policy_without_any(carrying, trained, tmp_path):
    with pytest.raises(ValueError, match="leave one of them out"):
        go(carrying, tmp_path / "run", CLONING, {"differences": ((0, 1),)}, find_differences=True)
    with pytest.raises(ValueError, match="for a new policy"):
        go(carrying, tmp_path / "run", CLONING, init=trained, find_differences=True)


@pytest.mark.parametrize("role", ["init", "teacher"])
def test_past_actions_and_actions_without_a_bound_are_learnt_too(demonstrations, tmp_path, role):
    imported = dataclasses.replace(CONFIG, past_actions=2, normalizer="affine", action_bound=None)
    policy = DiffusionPolicy(imported)
    randomize(policy)
    policy.action_normalizer.gain.fill_(0.5)
    folder = saved(policy, tmp_path / "trained")
    learnt = go(demonstrations, tmp_path / "run", **{role: folder}).policy
    config = learnt.config
    assert (config.past_actions, config.normalizer, config.action_bound) == (2, "affine", None)
    assert same(learnt.action_normalizer.state_dict(), policy.action_normalizer.state_dict())
    state = start_training(policy, SETTINGS)
    state.teacher = state.ema
    windows = prepare_run(imported, demonstrations, SETTINGS, seed=0, device="cpu", init=policy).training
    made, noise = rectification.pairs(
        rectification.start_rectification(state, 4), windows.gather(np.arange(16)), torch.Generator().manual_seed(0)
    )
    assert made["actions"].shape == noise.shape == (16, 10, 2)
    expected = policy.eval().sample_actions(made["observations"], ddim_steps=4, noise=noise)
    torch.testing.assert_close(made["actions"][:, 2:], expected, rtol=1e-5, atol=1e-4)
    assert policy.action_normalizer.normalize(made["actions"]).abs().max() > 1  # not clipped


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("role", "gone"), [("init", False), ("teacher", True)])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been_without_its_first_checkpoint(
    trained, demonstrations, tmp_path, monkeypatch, role, gone
):
    small = {"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1}
    given = {"denoiser": small} if role == "teacher" else {}
    whole = go(demonstrations, tmp_path / "whole", policy=given, **{role: trained})
    genuine = record.save_checkpoint

    def cut_off(folder, state, **written):
        genuine(folder, state, **written)
        if state.step == 6:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(record, "save_checkpoint", cut_off)
        with pytest.raises(Stopped):
            go(demonstrations, tmp_path / "run", policy=given, **{role: trained})
    start = tmp_path / "no_longer" if gone else trained
    resumed = go(demonstrations, tmp_path / "run", policy=given, **{role: start})
    assert resumed.training["step"] == 12
    assert resumed.training[role] == whole.training[role]
    assert same(weights(whole), weights(resumed))


def test_a_run_goes_on_only_from_the_checkpoint_that_it_began_from(trained, demonstrations, tmp_path):
    go(demonstrations, tmp_path / "run", init=trained)
    other = saved(DiffusionPolicy(CONFIG), tmp_path / "other")
    with pytest.raises(ValueError, match=r"began from the checkpoint \w{16}, and .*other is \w{16}"):
        go(demonstrations, tmp_path / "run", init=other)
    with pytest.raises(ValueError, match=r"belongs to a run without teacher=.*another output_dir="):
        go(demonstrations, tmp_path / "run", teacher=trained)


# --- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"obs_horizon": 3}, "obs_horizon=3 differs from the 2 of FOLDER"),
        ({"prediction_type": "sample"}, "prediction_type=sample differs from the epsilon of FOLDER"),
        ({"denoiser": {"hidden_size": 64}}, r"denoiser\.hidden_size=64 differs from the 32 of FOLDER"),
        ({"denoiser": {"name": "unet"}}, r"denoiser\.name=unet differs from the modulated_mlp of FOLDER"),
        ({"denoiser": {"dropout": 0.5}}, r"denoiser\.dropout=0\.5 differs from the 0\.0 of FOLDER"),
        ({"schedule": {"num_steps": 100}}, r"schedule\.num_steps=100 differs from the 20 of FOLDER"),
    ],
)
def test_a_setting_other_than_the_checkpoints_is_refused_with_both_values(given, said):
    with pytest.raises(ValueError, match=f"^{said}, whose settings this run keeps: leave it out$"):
        config_from(CONFIG, "FOLDER", given, (), rectifies=False)


def test_settings_that_are_equal_or_of_the_loss_may_be_given():
    given = {"obs_size": 16, "denoiser": {"hidden_size": 32, "dropout": 0.0}, "loss_weighting": "min_snr"}
    config = config_from(CONFIG, "FOLDER", given, (), rectifies=False)
    assert config == dataclasses.replace(CONFIG, loss_weighting="min_snr")
    unet = dataclasses.replace(CONFIG, denoiser={"name": "unet"})
    assert config_from(unet, "FOLDER", {"denoiser": {"widths": [64, 128]}}, (), rectifies=False) == unet


def test_a_student_has_the_horizons_of_its_teacher(demonstrations):
    teacher = dataclasses.replace(CONFIG, obs_horizon=3, action_horizon=6)
    config = config_of_student(teacher, "FOLDER", {"obs_size": 8}, demonstrations, ())
    assert (config.obs_horizon, config.action_horizon, config.obs_size) == (3, 6, 8)
    with pytest.raises(ValueError, match=r"^action_horizon=8 differs from the 6 of FOLDER, whose chunks the policy"):
        config_of_student(teacher, "FOLDER", {"action_horizon": 8}, demonstrations, ())


def test_data_of_other_shapes_are_refused_with_all_that_differ(demonstrations):
    config = dataclasses.replace(CONFIG, observation_shapes={"state": (5,), "image": (8, 8, 3)}, action_dim=4)
    with pytest.raises(ValueError) as refused:
        fitting(demonstrations, config, "FOLDER", with_actions=True)
    assert str(refused.value) == (
        "memory does not fit FOLDER: observation 'state' is (3,) in the data and (5,) in the checkpoint; observation"
        " 'image' is missing in the data and (8, 8, 3) in the checkpoint; an action is (2,) in the data and (4,) in the"
        " checkpoint. The data have state (3,): dataset.observation_keys= chooses and renames them"
    )


def test_a_dot_in_a_key_of_the_policy_is_a_slash_in_the_data(demonstrations):
    data = dataclasses.replace(demonstrations, observations={"observation/state": demonstrations.observations["state"]})
    config = dataclasses.replace(CONFIG, observation_shapes={"observation.state": (3,)})
    assert [*fitting(data, config, "FOLDER", with_actions=True).observations] == ["observation.state"]


def test_observations_that_the_policy_does_not_know_are_left_out(demonstrations):
    more = dataclasses.replace(
        demonstrations, observations={"more": demonstrations.actions, **demonstrations.observations}
    )
    assert [*fitting(more, CONFIG, "FOLDER", with_actions=True).observations] == ["state"]


def test_ways_to_start_that_contradict_each_other_are_refused_before_anything_is_read(trained, tmp_path):
    plain = dataclasses.replace(SETTINGS, steps=5)
    for refused, start in (
        (r"init=.* and teacher=.* are two ways to start", {"train": SETTINGS, "init": trained, "teacher": trained}),
        (r"train\.steps=0 trains no policy: add init=CHECKPOINT or teacher=", {"train": SETTINGS}),
        (r"add train\.steps=0 train\.rectify_steps=N; got train\.steps=5", {"train": plain, "teacher": trained}),
        (r"no checkpoint at .*empty", {"train": plain, "init": tmp_path / "empty"}),
        (r"init_normalizers=refit .*: add init=, or leave it out", {"train": plain, "init_normalizers": "refit"}),
        (
            r"init_normalizers=refit goes with train\.steps=N.*: leave it out",
            {"train": SETTINGS, "init": trained, "init_normalizers": "refit"},
        ),
    ):
        with pytest.raises(ValueError, match=refused):
            check_start(**start)
    check_start(train=plain, init=trained)
    with pytest.raises(ValueError, match=r"train\.steps=0 and train\.rectify_steps=0 leave nothing to train"):
        TrainSettings(steps=0)
