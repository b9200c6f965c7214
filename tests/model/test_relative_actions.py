"""Actions that are counted from observed numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig, Sampler, TrainSettings
from policy.data.demonstrations import Demonstrations
from policy.data.windows import Windows
from policy.inference.backends import compile_sampler
from policy.model.relative_actions import ActionReference
from policy.training.preparation import prepare_run
from tests.conftest import randomize

SHAPES = {"b": (2,), "picture": (4, 4, 3), "a": (3,)}
# Action 1 is counted from the second number of `b`, the fifth of all.
CONFIG = PolicyConfig(observation_shapes={"b": (2,), "a": (3,)}, action_dim=3, obs_size=16, relative_actions=((1, 4),))


def observed(rows=4):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(rows, 2, *shape, generator=generator) for key, shape in CONFIG.observation_shapes.items()}


def random_policy(config=CONFIG):
    policy = DiffusionPolicy(config)
    randomize(policy)
    policy.action_normalizer.fit([-1, 2, -3], [3, 4, 5])
    return policy.eval()


def test_an_action_is_counted_from_the_number_of_the_newest_observation():
    seen = observed()
    found = ActionReference([(1, 4)], SHAPES, 3)({key: values[:, -1] for key, values in seen.items()})
    expected = torch.zeros(4, 1, 3)
    expected[:, 0, 1] = seen["b"][:, 1, 1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pair", [(3, 0), (-1, 0), (0, 5), (0, -1), (0, 1, 2)])
def test_a_place_that_does_not_exist_is_refused(pair):
    with pytest.raises(ValueError, match=r"a place within 0\.\.2 in the action and of one within 0\.\.4"):
        ActionReference([pair], SHAPES, 3)


def test_a_number_of_the_action_has_one_reference():
    with pytest.raises(ValueError, match="names a number of the action twice"):
        ActionReference([(0, 1), (0, 2)], SHAPES, 3)


@pytest.mark.parametrize("backend", ["sample_actions", "eager", "fused"])
def test_sampled_actions_are_those_of_the_same_weights_moved_by_the_reference(backend):
    policy, seen, noise = random_policy(), observed(), torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(1))
    plain = DiffusionPolicy(replace(CONFIG, relative_actions=()))
    plain.load_state_dict(policy.state_dict())
    plain.eval()
    expected = plain.sample_actions(seen, noise=noise, ddim_steps=4)
    expected[..., 1] += seen["b"][:, -1:, 1]
    if backend == "sample_actions":
        found = policy.sample_actions(seen, noise=noise, ddim_steps=4)
    else:
        found = compile_sampler(policy, Sampler(ddim_steps=4), backend=backend)(seen, noise)
    torch.testing.assert_close(found, expected)


def test_the_loss_is_that_of_the_same_weights_on_actions_less_the_reference():
    policy, seen = random_policy(), observed()
    plain = DiffusionPolicy(replace(CONFIG, relative_actions=()))
    plain.load_state_dict(policy.state_dict())
    plain.eval()
    actions, mask = torch.randn(4, 8, 3), torch.ones(4, 8, dtype=torch.bool)
    moved = actions.clone()
    moved[..., 1] -= seen["b"][:, -1:, 1]
    found, expected = (
        one.loss({"observations": seen, "actions": given, "mask": mask}, torch.Generator().manual_seed(2), 3)
        for one, given in ((policy, actions), (plain, moved))
    )
    torch.testing.assert_close(found, expected)


def test_a_warm_start_begins_at_the_previous_chunk_counted_from_the_newest_observation():
    policy, seen = random_policy(), observed()
    previous = torch.randn(4, 8, 3)
    noise = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(1))
    eager, fused = (
        compile_sampler(policy, Sampler(ddim_steps=4, warm_start=0.5), backend=name) for name in ("eager", "fused")
    )
    found = [one(seen, noise, previous=previous) for one in (eager, fused)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], eager(seen, noise, previous=previous + 1))


def demonstrations():
    """Two episodes; the action is the position two steps later, and there is another number."""
    position = np.array([0, 1, 3, 6, 10, 20, 21, 23, 27], np.float32)
    state = np.stack([np.zeros(9, np.float32), position], axis=1)
    return Demonstrations(observations={"state": state}, actions=position[:, None] + 2, episode_ends=np.array([5, 9]))


def test_the_normaliser_is_fitted_to_relative_actions_within_episodes():
    config = PolicyConfig(
        observation_shapes={"state": (2,)}, action_dim=1, action_horizon=3, obs_size=16, relative_actions=((0, 1),)
    )
    run = prepare_run(config, demonstrations(), TrainSettings(val_fraction=0.0), seed=0, device="cpu")
    normalizer = run.state.policy.action_normalizer
    # From 2, the last action of an episode at its own observation, to 9: 10 + 2 - 3, and not 20 + 2 - 6.
    assert (normalizer.unnormalize(torch.tensor([-1.0])).item(), normalizer.unnormalize(torch.ones(1)).item()) == (2, 9)


def test_the_blocks_of_chunks_are_the_windows_and_their_counterparts():
    def mirrored(observations, actions):
        return {key: -values for key, values in observations.items()}, -actions

    windows = Windows(demonstrations(), np.arange(2), obs_horizon=2, action_horizon=3, past_actions=1, augment=mirrored)
    (observations, actions), (mirrored_observations, mirrored_actions) = windows.chunks()
    batch = windows.gather(np.arange(len(windows)))
    states = np.concatenate([observations["state"], mirrored_observations["state"]])
    np.testing.assert_array_equal(states, batch["observations"]["state"][:, -1].numpy())
    np.testing.assert_array_equal(np.concatenate([actions, mirrored_actions]), batch["actions"].numpy())


def test_weights_by_spread_are_those_of_relative_actions():
    config = PolicyConfig(
        observation_shapes={"state": (2,)}, action_dim=1, action_horizon=3, obs_size=16, relative_actions=((0, 1),)
    )
    steps = np.ones(60, np.float32)
    steps[30] = 40  # far now and then
    state = np.stack([np.zeros(60, np.float32), steps.cumsum()], axis=1)
    data = Demonstrations(observations={"state": state}, actions=state[:, 1:] + 2, episode_ends=np.array([60]))
    settings = TrainSettings(val_fraction=0.0, action_weights="spread")
    policy = prepare_run(config, data, settings, seed=0, device="cpu").state.policy
    batch = Windows(data, np.arange(1), obs_horizon=1, action_horizon=3).gather(np.arange(60))
    apart = batch["actions"] - batch["observations"]["state"][:, :, 1:]
    expected = (0.3 * (apart.max() - apart.min()) / 2 / apart.std(correction=0)).square()
    assert 1 < expected < 20
    torch.testing.assert_close(policy.action_weights, expected[None])
