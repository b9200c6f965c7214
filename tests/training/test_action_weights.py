"""The loss counts a dimension of the action more, the smaller a part of its range its values lie in."""

import dataclasses

import numpy as np
import pytest
import torch

from policy.common.seeding import derive_generator
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.action_weights import spread_matters
from policy.training.preparation import prepare_run
from policy.training.settings import TrainSettings
from tests.data.test_corrections import arm
from tests.training.test_corrective_noise import CONFIG as ARM

CONFIG = dataclasses.replace(ARM, action_dim=4)


@pytest.fixture(scope="module")
def demonstrations():
    """Actions that are spread evenly, zero but for one in fifty, zero but for two, and always the same."""
    made = arm()
    even = np.linspace(-2, 2, len(made.actions))
    rare = np.zeros_like(even)
    rare[::100], rare[50::100] = 1, -1  # a standard deviation of 0.02 ** 0.5 = 0.141 half ranges
    single = np.zeros_like(even)
    single[0], single[1] = 1, -1
    actions = np.column_stack([even, rare, single, np.full_like(even, 3)]).astype(np.float32)
    return made.__class__(**{**vars(made), "actions": actions})


def prepared(demonstrations, weights):
    settings = TrainSettings(steps=3, action_weights=weights, val_fraction=0)
    return prepare_run(CONFIG, demonstrations, settings, seed=0, device="cpu")


def test_weights_are_the_squared_ratio_to_a_usual_spread(demonstrations):
    weights = prepared(demonstrations, "spread").state.policy.action_weights
    np.testing.assert_allclose(weights, [1.0, 0.3**2 / 0.02, 20.0, 1.0], rtol=1e-3)


def test_errors_count_as_much_as_their_dimension_weighs(demonstrations):
    equal, spread = (prepared(demonstrations, name) for name in ("equal", "spread"))
    batch, noise = equal.training.gather(np.arange(0, 800, 50)), torch.randn(16, 8, 4, generator=derive_generator(0))
    timestep = torch.arange(16)
    plain, weighted = (
        run.state.policy.squared_errors(batch, run.state.policy.embed(batch["observations"]), timestep, noise)
        for run in (equal, spread)
    )
    policy = equal.state.policy
    by_dimension = torch.stack([_only(policy, place, batch, timestep, noise) for place in range(4)])
    weights = spread.state.policy.action_weights
    torch.testing.assert_close(plain, by_dimension.sum(dim=0))
    torch.testing.assert_close(weighted, torch.einsum("a,anp->np", weights, by_dimension))


def _only(policy, place, batch, timestep, noise):
    policy.action_weights = torch.eye(4)[place]
    errors = policy.squared_errors(batch, policy.embed(batch["observations"]), timestep, noise)
    policy.action_weights = torch.ones(4)
    return errors


def test_weights_matter_where_a_number_of_the_action_spreads_less_than_usual(demonstrations):
    run = prepared(demonstrations, "equal")
    assert spread_matters(run.training, run.state.policy.action_normalizer)
    even = np.repeat(demonstrations.actions[:, :1], 4, axis=1)
    run = prepared(dataclasses.replace(demonstrations, actions=even), "equal")
    assert not spread_matters(run.training, run.state.policy.action_normalizer)
    narrow = prepare_run(
        dataclasses.replace(CONFIG, action_dim=1),
        dataclasses.replace(demonstrations, actions=even[:, :1]),
        TrainSettings(steps=3, val_fraction=0),
        seed=0,
        device="cpu",
    )
    assert not spread_matters(run.training, narrow.state.policy.action_normalizer)  # of another policy


def test_another_name_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"unknown train\.action_weights 'even'; allowed: equal, spread"):
        TrainSettings(action_weights="even")


def test_actions_of_another_width_weigh_nothing(demonstrations):
    teacher = DiffusionPolicy(CONFIG)
    settings = TrainSettings(steps=0, rectify_steps=3, action_weights="spread")
    for width in (0, 1, 3):  # a run that only rectifies takes any
        narrow = dataclasses.replace(demonstrations, actions=demonstrations.actions[:, :width])
        with pytest.raises(ValueError, match=rf"these have {width} and those of the policy 4: leave it out"):
            prepare_run(CONFIG, narrow, settings, seed=0, device="cpu", teacher=teacher)
