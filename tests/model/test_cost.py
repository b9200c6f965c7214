"""The cost in multiply-adds, against closed forms."""

import gc
import math

import pytest
import torch
from torch import nn

from policy import DiffusionPolicy, PolicyConfig
from policy.model import cost
from policy.model.cost import MultiplyAdds, multiply_adds
from policy.model.diffusion_policy import zero_observations
from tests.inference.cases import DENOISER_SIZES

HORIZON, ACTION, WIDTH, OBS = 8, 2, 32, 24
ENCODER = 2 * 5 * 64 + 64 * OBS + 2 * 5 * OBS  # two observations of five numbers, one hidden layer, and a skip past it


def make(name, **sizes):
    config = PolicyConfig(
        observation_shapes={"state": (5,)},
        action_dim=ACTION,
        action_horizon=HORIZON,
        obs_size=OBS,
        encoder={"name": "state", "hidden_size": 64},
        denoiser={"name": name, **sizes},
        schedule={"num_steps": 20},
    )
    return DiffusionPolicy(config).eval()


def mlp():
    """The first layer on chunk, timestep and observation, two blocks that widen fourfold, and the last layer."""
    chunk = HORIZON * ACTION
    return OBS * WIDTH + (chunk + 2 * WIDTH) * WIDTH + 2 * 2 * WIDTH * 4 * WIDTH + WIDTH * chunk


def transformer():
    """Two layers: projections, products of queries with keys and of weights with values, and the feed-forward block."""
    timestep, observation = 2 * WIDTH * WIDTH, OBS * WIDTH
    modulations = 4 * WIDTH * 3 * WIDTH
    attention = HORIZON * 4 * WIDTH * WIDTH + 2 * HORIZON * HORIZON * WIDTH
    forward = HORIZON * 2 * WIDTH * 4 * WIDTH
    return timestep + observation + modulations + 2 * (attention + forward) + 2 * HORIZON * ACTION * WIDTH


def unet():
    """A kernel of 5 over 8 actions with 16 channels and over 4 with 32; FiLM and skips in blocks."""

    def block(inputs, outputs, length):
        skip = inputs * outputs * length if inputs != outputs else 0
        return 5 * (inputs + outputs) * outputs * length + (WIDTH + OBS) * 2 * outputs + skip

    timestep = 2 * WIDTH * 4 * WIDTH
    down = block(ACTION, 16, 8) + block(16, 16, 8) + 3 * 16 * 16 * 4 + block(16, 32, 4) + block(32, 32, 4)
    middle = 2 * block(32, 32, 4)
    up = block(64, 16, 4) + block(16, 16, 4) + 4 * 16 * 16 * 4  # the transposed kernel of 4 meets each of 4 inputs
    return timestep + down + middle + up + 5 * 16 * 16 * 8 + 16 * ACTION * 8


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (make("residual_mlp", hidden_size=WIDTH, num_layers=2), mlp()),
        (make("transformer", hidden_size=WIDTH, num_layers=2), transformer()),
        (make("unet", widths=(16, 32), timestep_size=WIDTH), unet()),
    ],
    ids=["mlp", "transformer", "unet"],
)
def test_multiply_adds_are_those_of_the_products(policy, expected):
    assert multiply_adds(policy) == (ENCODER, expected)


def test_a_plan_is_encoded_once_and_denoised_at_each_step_for_every_candidate():
    counted = MultiplyAdds(encoder=100, denoiser=1000)
    assert counted.per_step(ddim_steps=1, candidates=1, steps_per_plan=1) == 1100
    assert counted.per_step(ddim_steps=10, candidates=3, steps_per_plan=8) == 3 * 10_100 / 8


def test_a_policy_is_counted_once_and_forgotten_with_it(monkeypatch):
    policy = make("residual_mlp", hidden_size=WIDTH)
    counted, before = multiply_adds(policy), len(cost._COUNTED)
    monkeypatch.setattr(policy, "embed", None)
    assert multiply_adds(policy) == counted
    monkeypatch.undo()
    del policy
    gc.collect()
    assert len(cost._COUNTED) == before - 1


@pytest.mark.slow  # it imports PyTorch's compiler
@pytest.mark.parametrize("denoiser", DENOISER_SIZES)
@pytest.mark.parametrize("encoder", ["image", "resnet"])
def test_the_count_is_pytorchs(denoiser, encoder):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = PolicyConfig(
        observation_shapes={"camera": (64, 64, 3)},
        action_dim=ACTION,
        obs_size=OBS,
        encoder={"name": encoder},
        denoiser={"name": denoiser, **DENOISER_SIZES[denoiser]},
    )
    policy = DiffusionPolicy(config).eval()
    # PyTorch does not count the products with a vector, nor those of the fused attention on a CPU.
    vectors = {torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix)}
    count = FlopCounterMode(display=False, custom_mapping=vectors)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), count as counter:
        policy.sample_actions(zero_observations(config, rows=1), ddim_steps=3)
    assert multiply_adds(policy).encoder + 3 * multiply_adds(policy).denoiser == counter.get_total_flops() / 2


class Copying(nn.Module):
    """A denoiser without any product."""

    def forward(self, noisy_actions, timestep, obs_embedding):
        return noisy_actions


def test_every_call_costs_something():
    policy = make("residual_mlp", hidden_size=WIDTH)
    policy.denoiser = Copying()
    assert multiply_adds(policy) == (ENCODER, 1)


def test_the_count_draws_no_random_numbers_and_leaves_no_gradients():
    policy, state = make("unet", widths=(16, 32)), torch.get_rng_state()
    multiply_adds(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in policy.parameters())
