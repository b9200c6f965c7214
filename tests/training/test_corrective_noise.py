"""Corrective noise: a robot that was moved ends where the demonstrated one does."""

import dataclasses

import numpy as np
import pytest
import torch

from policy.common.seeding import derive_generator
from policy.common.torchrun import World
from policy.data.corrections import find_corrections
from policy.data.windows import Windows
from policy.model.config import PolicyConfig
from policy.training.corrective_noise import CorrectiveNoise
from policy.training.preparation import prepare_run
from policy.training.settings import TrainSettings
from policy.training.share import DrawnForAll
from tests.data.test_corrections import (
    APART,
    COSINE,
    GAINS,
    HAND,
    JOINTS,
    OBJECT,
    VELOCITIES,
    WIDTH,
    arm,
    armed,
    kinematics,
)

CONFIG = PolicyConfig(
    observation_shapes={"state": (WIDTH,)},
    action_dim=3,
    obs_size=8,
    encoder={"name": "state", "hidden_size": 8},
    denoiser={"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1},
)
SETTINGS = TrainSettings(steps=3, batch_size=64, corrective_noise=0.3)


@pytest.fixture(scope="module")
def demonstrations():
    return arm()


@pytest.fixture(scope="module")
def made(demonstrations):
    """Windows of which the first 64 are gathered, and the same with noise."""
    found = find_corrections(demonstrations, np.arange(30), ["state"], action_horizon=8)
    windows = Windows(
        demonstrations, np.arange(30), obs_horizon=2, action_horizon=8, past_actions=1, mask_padding=True
    ).marking(held=found.held)
    # Wide bounds, so that the arithmetic of the correction can be read off.
    wide = found.__class__(**{**vars(found), "low": found.low - 9, "high": found.high + 9})
    noise = CorrectiveNoise(wide, amount=0.3, past_actions=1)
    batch = windows.gather(np.arange(1, 1500, 20))
    return batch, noise(batch, derive_generator(0)), noise


def moved(batch, noisy):
    return (noisy["observations"]["state"] != batch["observations"]["state"]).any(dim=(1, 2))


def test_most_windows_are_moved_in_which_nothing_moves_but_robot_and_thing(made):
    batch, noisy, _ = made
    where = moved(batch, noisy)
    assert {*batch["held"].tolist()} == {-1, 0, 1}
    assert not where[batch["held"] == -1].any()
    assert 0.7 < where[batch["held"] >= 0].float().mean() < 0.9
    torch.testing.assert_close(noisy["actions"][~where], batch["actions"][~where], rtol=0, atol=0)
    torch.testing.assert_close(noisy["mask"], batch["mask"])


def test_the_moved_robot_ends_where_the_demonstrated_one_does(made):
    """The joints are followed by the arm's own law through the first half of the chunk, the rest is as it was."""
    batch, noisy, _ = made
    where = moved(batch, noisy)
    half = slice(1, 5)
    for place, gain in zip(JOINTS, GAINS, strict=True):
        before = batch["observations"]["state"][where, -1, place] + gain * batch["actions"][where, half, place].sum(
            dim=1
        )
        after = noisy["observations"]["state"][where, -1, place] + gain * noisy["actions"][where, half, place].sum(
            dim=1
        )
        off = (noisy["observations"]["state"] - batch["observations"]["state"])[where, -1, place]
        assert off.std() > 0.02
        assert (after - before).abs().max() < 0.01 * off.abs().max()
    torch.testing.assert_close(noisy["actions"][:, :1], batch["actions"][:, :1])  # the past is as it was
    torch.testing.assert_close(noisy["actions"][:, 5:], batch["actions"][:, 5:])
    torch.testing.assert_close(noisy["actions"][..., 2], batch["actions"][..., 2])  # moves nothing that is observed


def test_the_moved_robot_is_a_possible_one(made):
    """The hand is where the kinematics put it, the object stays or goes with it; velocities are as they were."""
    batch, noisy, _ = made
    state = noisy["observations"]["state"].numpy()[moved(batch, noisy).numpy()]
    place, yaw = kinematics(state[..., JOINTS])
    np.testing.assert_allclose(state[..., HAND], place, atol=0.03)
    np.testing.assert_allclose(state[..., COSINE], np.cos(yaw), atol=1e-3)
    np.testing.assert_allclose(state[..., COSINE + 1], np.sin(yaw), atol=1e-3)
    np.testing.assert_allclose(state[..., APART], state[..., HAND] - state[..., OBJECT], atol=1e-5)
    original = batch["observations"]["state"].numpy()[moved(batch, noisy).numpy()]
    np.testing.assert_array_equal(state[..., [6, 7]], original[..., [6, 7]])
    offset = state - original
    np.testing.assert_allclose(offset[:, 0, JOINTS], offset[:, 1, JOINTS], atol=1e-6)  # one error through the history
    held = batch["held"].numpy()[moved(batch, noisy).numpy()] == 1
    assert 0 < held.sum() < len(held)
    assert not offset[~held][..., OBJECT].any()
    np.testing.assert_allclose(offset[held][..., OBJECT], offset[held][..., HAND], atol=1e-6)


def test_noise_is_small_where_a_window_moves_little(made):
    batch, _, noise = made
    slow = {**batch, "actions": 0.1 * batch["actions"]}
    offsets = [
        (noise(each, derive_generator(0))["observations"]["state"] - each["observations"]["state"])[..., JOINTS]
        for each in (batch, slow)
    ]
    torch.testing.assert_close(offsets[1], 0.1 * offsets[0], rtol=0.01, atol=1e-5)


def test_what_the_robot_is_doing_is_blurred_in_most_windows():
    seen = armed()
    found = find_corrections(seen, np.arange(30), ["state"], action_horizon=8)
    windows = Windows(seen, np.arange(30), obs_horizon=2, action_horizon=8).marking(held=found.held)
    batch = windows.gather(np.arange(0, 1500, 3))
    noise = CorrectiveNoise(found, amount=0.0, past_actions=0)
    noisy = noise(batch, derive_generator(0))
    torch.testing.assert_close(noisy["actions"], batch["actions"])
    off = noisy["observations"]["state"] - batch["observations"]["state"]
    assert noise.blurred == [f"state[{place}]" for place in (*VELOCITIES, WIDTH)]
    blurred = (off[..., VELOCITIES] != 0).all(dim=(1, 2))
    assert 0.7 < blurred.float().mean() < 0.9
    assert off[blurred][..., VELOCITIES].std() > 0.5 * batch["observations"]["state"][..., VELOCITIES].std()
    opening = noisy["observations"]["state"][..., WIDTH]
    assert (opening.min(), opening.max()) == (0, pytest.approx(0.3))
    assert off[blurred][..., WIDTH].std() > 0.1 * 0.3
    off[..., [*VELOCITIES, WIDTH]] = 0
    assert off.abs().max() < 1e-6


def test_the_parts_of_several_processes_are_those_of_one():
    seen = armed()
    found = find_corrections(seen, np.arange(30), ["state"], action_horizon=8)
    windows = Windows(seen, np.arange(30), obs_horizon=2, action_horizon=8, mask_padding=True).marking(held=found.held)
    batch, noise = windows.gather(np.arange(1, 1500, 20)), CorrectiveNoise(found, amount=0.3, past_actions=0)
    rows = 72
    whole = noise(cut(batch, slice(0, rows)), derive_generator(5))
    for rank in range(3):
        part = slice(rank * rows // 3, (rank + 1) * rows // 3)
        with DrawnForAll(World(rank=rank, size=3)):
            one = noise(cut(batch, part), derive_generator(5))
        torch.testing.assert_close(one["observations"]["state"], whole["observations"]["state"][part])
        torch.testing.assert_close(one["actions"], whole["actions"][part])


def cut(batch, rows):
    return {
        "observations": {key: value[rows] for key, value in batch["observations"].items()},
        **{name: batch[name][rows] for name in ("actions", "mask", "held")},
    }


def test_noise_leaves_the_range_of_the_demonstrated_actions_nowhere(demonstrations):
    found = find_corrections(demonstrations, np.arange(30), ["state"], action_horizon=8)
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8).marking(held=found.held)
    noisy = CorrectiveNoise(found, amount=20.0, past_actions=0)(
        windows.gather(np.arange(0, 900, 7)), derive_generator(0)
    )
    assert (noisy["actions"] >= torch.from_numpy(found.low)).all()
    assert (noisy["actions"] <= torch.from_numpy(found.high)).all()


def test_the_numbers_that_are_moved_have_names(demonstrations):
    run = prepare_run(CONFIG, demonstrations, SETTINGS, seed=0, device="cpu")
    assert run.noise.moved == [f"state[{place}]" for place in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)]


def test_what_is_never_held_is_not_said_to_move(demonstrations):
    found = find_corrections(demonstrations, np.arange(30), ["state"], action_horizon=8)
    empty_handed = dataclasses.replace(found, held=np.minimum(found.held, 0))
    names = {f"state[{place}]" for thing in found.things for place in thing.places}
    assert names
    assert names <= {*CorrectiveNoise(found, 0.3, 0).moved}
    assert not names & {*CorrectiveNoise(empty_handed, 0.3, 0).moved}


def test_a_counterpart_is_left_alone(demonstrations):
    found = find_corrections(demonstrations, np.arange(30), ["state"], action_horizon=8)
    mirrored = Windows(
        demonstrations, np.arange(30), obs_horizon=1, action_horizon=8, augment=lambda seen, actions: (seen, -actions)
    ).marking(held=found.held)
    counterparts = mirrored.gather(np.arange(mirrored.num_transitions, mirrored.num_transitions + 50))
    assert (counterparts["held"] == -1).all()
    assert (mirrored.gather(np.arange(30))["held"] == 0).all()


def test_a_run_has_noise_only_where_it_was_asked_for(demonstrations):
    plain = prepare_run(CONFIG, demonstrations, TrainSettings(steps=3), seed=0, device="cpu")
    assert plain.noise is None
    assert "held" not in plain.training.gather(np.arange(3))
    run = prepare_run(CONFIG, demonstrations, SETTINGS, seed=0, device="cpu")
    assert run.noise is not None
    assert "held" not in run.validation.gather(np.arange(3))


@pytest.mark.parametrize("amount", [-0.1, 1.5, float("inf"), float("nan")])
def test_an_amount_that_is_none_is_refused(amount):
    with pytest.raises(ValueError, match=r"train\.corrective_noise is a share .*, 0 to 1; got"):
        TrainSettings(corrective_noise=amount)
