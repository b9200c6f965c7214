"""The held-out error."""

import math

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, Sampler
from policy.data.windows import Windows
from policy.recipe.error import energy_scores, held_out_errors
from tests.conftest import small_config


def score(samples, target):
    """The mean energy score of samples (S, B) of single numbers."""
    shaped = [torch.tensor(sample, dtype=torch.float32)[:, None, None] for sample in samples]
    target = torch.tensor(target, dtype=torch.float32)[:, None, None]
    mask = torch.ones(len(target), 1, dtype=torch.bool)
    return energy_scores(torch.stack(shaped), target, mask, torch.ones(1)).mean().item()


def test_the_demonstrated_distribution_has_a_smaller_error_than_its_mean_and_than_one_of_its_modes():
    draw = np.random.default_rng(0)
    target = draw.choice([-1.0, 1.0], 4000)
    modes = draw.choice([-1.0, 1.0], (4, 4000))
    assert score(modes, target) == pytest.approx(0.5, abs=0.03)  # E|X - y| = 1, E|X - X'| / 2 = 1 / 2
    assert score(np.zeros((4, 4000)), target) == pytest.approx(1.0)
    assert score(np.ones((4, 4000)), target) == pytest.approx(1.0, abs=0.05)


def test_it_equals_the_definition_and_leaves_masked_actions_out():
    draw = np.random.default_rng(1)
    samples, target = draw.normal(size=(3, 1, 4, 2)), draw.normal(size=(1, 4, 2))
    scale = np.array([0.5, 2.0])

    def distance(a, b):
        return np.sqrt((((a - b)[0, :3] / scale) ** 2).mean())

    expected = np.mean([distance(s, target) for s in samples])
    expected -= np.mean([distance(samples[i], samples[j]) for i, j in [(0, 1), (0, 2), (1, 2)]]) / 2
    mask = torch.tensor([[True, True, True, False]])
    found = energy_scores(torch.tensor(samples), torch.tensor(target), mask, torch.tensor(scale))
    assert found.item() == pytest.approx(expected)
    constant = [torch.cat([torch.as_tensor(x), torch.rand(*x.shape[:-1], 1)], dim=-1) for x in (samples, target)]
    unit = torch.tensor([*scale, math.nan])
    assert energy_scores(*constant, torch.as_tensor(mask), unit).item() == pytest.approx(expected)


def test_errors_are_of_each_held_out_episode_and_the_same_in_every_call(demonstrations):
    validation = Windows(demonstrations, np.array([1, 3]), obs_horizon=2, action_horizon=8)
    policy = DiffusionPolicy(small_config(8, 8)).eval()
    scale = demonstrations.actions.std(axis=0)
    errors = held_out_errors(policy, Sampler(ddim_steps=2), validation, scale)
    assert len(errors) == 2
    assert errors == held_out_errors(policy, Sampler(ddim_steps=2), validation, scale)
    assert errors != held_out_errors(policy, Sampler(ddim_steps=2), validation, 2 * scale)
