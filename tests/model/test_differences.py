"""Differences of like quantities, as a part of the policy's observation."""

import numpy as np
import pytest
import torch

from policy.data.demonstrations import Demonstrations
from policy.model.config import PolicyConfig
from policy.model.differences import Differences
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.preparation import prepare_run
from policy.training.settings import TrainSettings

SHAPES = {"b": (3,), "a": (2,), "camera": (16, 16, 3)}


def test_values_are_those_of_numpy():
    differences = Differences([(0, 4), (1, 2)], [], SHAPES)
    differences.fit(np.array([-2.0, 0.0]), np.array([1.0, 8.0]))
    a, b = torch.randn(5, 2, 2), torch.randn(5, 2, 3)
    joined = np.concatenate([a.numpy(), b.numpy()], axis=2)
    scaled = (joined[..., [0, 1]] - joined[..., [4, 2]]) / [2.0, 8.0]
    expected = np.concatenate([np.tanh(scaled), np.tanh(4 * scaled), np.tanh(16 * scaled)], axis=2)
    torch.testing.assert_close(differences({"a": a, "b": b}), torch.from_numpy(expected).float())


def test_numbers_are_seen_from_where_the_demonstrations_end():
    differences = Differences([(0, 4)], [], SHAPES, [4, 1])
    last = {"a": torch.tensor([[0.0, 1.0], [0.0, 3.0]]), "b": torch.tensor([[9.0, 9.0, 5.0], [9.0, 9.0, 7.0]])}
    differences.fit_ends(last)
    assert differences.ends.tolist() == [6.0, 2.0]
    differences.fit(np.array([-2.0, 0.0, -4.0]), np.array([1.0, 8.0, 4.0]))
    a, b = torch.randn(5, 2, 2), torch.randn(5, 2, 3)
    joined = np.concatenate([a.numpy(), b.numpy()], axis=2)
    apart = [joined[..., 4] - 6, joined[..., 1] - 2, joined[..., 0] - joined[..., 4]]
    scaled = (np.stack(apart, axis=2) / [2.0, 8.0, 4.0]).clip(-2, 2)
    expected = np.concatenate([np.tanh(scaled), np.tanh(4 * scaled), np.tanh(16 * scaled)], axis=2)
    assert expected.shape[2:] == differences.shape
    torch.testing.assert_close(differences({"a": a, "b": b}), torch.from_numpy(expected).float())


@pytest.mark.parametrize("place", [5, -1])
def test_a_number_that_does_not_exist_does_not_end(place):
    with pytest.raises(ValueError, match=rf"end_differences must be places within 0\.\.4, .* got {place}$"):
        Differences([], [], SHAPES, [place])


@pytest.mark.parametrize("pair", [(0, 5), (-1, 2), (1, 2, 3)])
def test_a_place_that_does_not_exist_is_refused(pair):
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        Differences([pair], [], SHAPES)


@pytest.mark.parametrize("pair", [(0, 4), (-1, 2)])
def test_a_direction_that_does_not_exist_is_refused(pair):
    with pytest.raises(ValueError, match=r"direction_differences must be pairs of places within 0\.\.3"):
        Differences([], [pair], SHAPES)


@pytest.mark.parametrize("pairs", [[], [(0, 1)]])
def test_directions_differ_by_an_angle_its_double_and_its_fourfold(pairs):
    differences = Differences(pairs, [(0, 2)], {"state": (4,)})
    angles = torch.randn(6, 1, 2, dtype=torch.float64) * 3
    state = torch.stack([angles.cos(), angles.sin()], dim=3).flatten(2)
    apart = angles[..., 0] - angles[..., 1]
    expected = [turn for by in (1, 2, 4) for turn in (torch.cos(by * apart), torch.sin(by * apart))]
    seen = differences({"state": state})
    assert seen.shape[2:] == differences.shape
    torch.testing.assert_close(seen[..., 3 * len(pairs) :], torch.stack(expected, dim=2))


def test_the_key_of_the_differences_is_taken():
    with pytest.raises(ValueError, match="another name"):
        DiffusionPolicy(PolicyConfig(observation_shapes={"differences": (2,)}, action_dim=1, differences=((0, 1),)))


def test_their_scale_is_fitted_and_saved_with_the_weights():
    states = np.array([[0, 1], [2, 5], [3, 3], [4, 2]], np.float32)
    data = Demonstrations(
        observations={"state": states}, actions=np.zeros((4, 2), np.float32), episode_ends=np.array([2, 4])
    )
    config = PolicyConfig(observation_shapes={"state": (2,)}, action_dim=2, obs_size=16, differences=((0, 1),))
    run = prepare_run(config, data, TrainSettings(val_fraction=0.0), seed=0, device="cpu")
    assert run.state.ema.state_dict()["differences.scale"].tolist() == [3.0]


def test_where_the_training_episodes_end_is_saved_with_the_weights():
    states = np.array([[0, 1], [2, 5], [3, 3], [4, 2]], np.float32)
    data = Demonstrations(
        observations={"state": states}, actions=np.zeros((4, 2), np.float32), episode_ends=np.array([2, 4])
    )
    config = PolicyConfig(observation_shapes={"state": (2,)}, action_dim=2, obs_size=16, end_differences=(1,))
    weights = prepare_run(config, data, TrainSettings(val_fraction=0.0), seed=0, device="cpu").state.ema.state_dict()
    assert (weights["differences.ends"].tolist(), weights["differences.scale"].tolist()) == ([3.5], [2.5])


def test_their_scale_is_fitted_to_read_only_demonstrations_without_a_word(recwarn):
    states = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    states.flags.writeable = False  # as those of the cache, which are mapped
    demonstrations = Demonstrations(
        observations={"state": states}, actions=states[:, :1], episode_ends=np.array([20, 40])
    )
    config = PolicyConfig(observation_shapes={"state": (2,)}, action_dim=1, differences=((0, 1),))
    torch.set_warn_always(True)
    try:
        prepare_run(config, demonstrations, TrainSettings(steps=1), seed=0, device="cpu")
    finally:
        torch.set_warn_always(False)
    assert not [str(one.message) for one in recwarn if "not writable" in str(one.message)]


def test_a_far_observation_gives_a_finite_embedding():
    pairs = {"differences": ((0, 1),), "direction_differences": ((0, 2),)}
    policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, **pairs))
    far = {"state": torch.tensor([torch.inf, 1e30, -torch.inf, 0.0]).expand(1, 2, 4)}
    assert policy.embed(far).isfinite().all()
