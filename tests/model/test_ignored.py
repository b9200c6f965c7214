"""Numbers of the state vectors that a policy does not see."""

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig
from policy.data.demonstrations import Demonstrations
from policy.data.windows import Windows
from policy.model.normalizer import NORMALIZERS
from policy.training.preparation import fit_normalizers

SHAPES = {"block": (2,), "hand": (3,), "image": (8, 8, 3)}
VECTORS = {"block": (2,), "hand": (3,)}


@pytest.mark.parametrize("normalizer", list(NORMALIZERS))
@pytest.mark.parametrize("place", range(5))
def test_an_ignored_number_changes_nothing(normalizer, place):
    policy = _fitted(PolicyConfig(observation_shapes=VECTORS, action_dim=1, ignored=(place,), normalizer=normalizer))
    assert [number for number in range(5) if not _sees(policy, number)] == [place]


def test_a_difference_shows_what_is_ignored_otherwise():
    policy = _fitted(
        PolicyConfig(observation_shapes=VECTORS, action_dim=1, ignored=(0, 2), differences=((0, 2),), obs_horizon=1)
    )
    assert _sees(policy, 0)
    state = {"block": torch.zeros(1, 1, 2), "hand": torch.zeros(1, 1, 3)}
    both = {"block": torch.tensor([[[0.3, 0.0]]]), "hand": torch.tensor([[[0.3, 0.0, 0.0]]])}
    torch.testing.assert_close(policy.embed(state), policy.embed(both))


@pytest.mark.parametrize("place", [5, -1])
def test_a_number_that_does_not_exist_is_refused(place):
    match = rf"ignored must be places within 0\.\.4, counted through .* \['block', 'hand'\]; got {place}$"
    with pytest.raises(ValueError, match=match):
        PolicyConfig(observation_shapes=SHAPES, action_dim=1, ignored=(1, place))


def test_pictures_have_no_numbers_to_ignore():
    with pytest.raises(ValueError, match="ignored must be empty without state vectors; got 0"):
        PolicyConfig(observation_shapes={"image": (8, 8, 3)}, action_dim=1, ignored=(0,))


def test_something_is_left_to_see():
    with pytest.raises(ValueError, match="leaves nothing that the policy sees"):
        PolicyConfig(observation_shapes=VECTORS, action_dim=1, ignored=(0, 1, 2, 3, 4, 4))
    PolicyConfig(observation_shapes=SHAPES, action_dim=1, ignored=(0, 1, 2, 3, 4))
    PolicyConfig(observation_shapes=VECTORS, action_dim=1, ignored=(0, 1, 2, 3, 4), differences=((0, 2),))


def _fitted(config: PolicyConfig) -> DiffusionPolicy:
    """A policy whose normalisers are fitted to random data."""
    random = np.random.default_rng(0)
    data = Demonstrations(
        observations={key: random.normal(size=(20, *shape)).astype(np.float32) for key, shape in VECTORS.items()},
        actions=random.normal(size=(20, 1)).astype(np.float32),
        episode_ends=np.array([20]),
    )
    torch.manual_seed(0)
    policy = DiffusionPolicy(config).eval()
    windows = Windows(
        data, np.array([0]), obs_horizon=config.obs_horizon, action_horizon=config.action_horizon, past_actions=0
    )
    fit_normalizers(policy, windows)
    return policy


def _sees(policy: DiffusionPolicy, place: int) -> bool:
    """Whether the embeddings of two histories differ that differ in one number."""
    numbers = torch.zeros(2, policy.config.obs_horizon, 5)
    numbers[1, ..., place] = 0.5
    one, other = policy.embed({"block": numbers[..., :2], "hand": numbers[..., 2:]})
    return not torch.allclose(one, other, atol=1e-6)
