"""The networks: the source document's sizes to the last parameter, and gradients that reach all of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from policy import ddim
from policy.denoisers import DENOISERS, ModulatedMLP, ResidualMLP
from policy.denoisers.timestep import sinusoidal_table

SMALL = {"obs_size": 5, "action_dim": 2, "action_horizon": 4, "hidden_size": 8, "num_layers": 2, "num_steps": 20}
BOTH = pytest.mark.parametrize("denoiser", [ResidualMLP, ModulatedMLP])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(rows=6):
    timesteps = torch.arange(rows) * 3 % SMALL["num_steps"]
    return randn(rows, 4, 2), timesteps, randn(rows, 5, seed=1)


def randomised(network, scale=0.5):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def silu(z):
    return z / (1 + torch.exp(-z))


def layer_norm(x):
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)


def waves(timestep, width=SMALL["hidden_size"]):
    angles = timestep[:, None].double() / 10_000 ** (torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_weight_matrices_count_what_the_document_says():
    network = ddim.build(obs_size=287, action_dim=64)
    assert sum(p.numel() for p in network.parameters() if p.ndim == 2) == 2_563_840
    assert count(network) == 2_572_032 == ddim.param_count(obs_size=287, action_dim=64)


@settings(deadline=None, max_examples=40)
@given(
    obs_size=st.integers(1, 40),
    action_dim=st.integers(1, 10),
    action_horizon=st.integers(1, 9),
    half_hidden=st.integers(1, 12),
    num_layers=st.integers(1, 4),
    num_steps=st.sampled_from([1, 20, 100]),
)
def test_param_count_equals_counting_the_built_module(
    obs_size, action_dim, action_horizon, half_hidden, num_layers, num_steps
):
    sizes = {
        "obs_size": obs_size,
        "action_dim": action_dim,
        "action_horizon": action_horizon,
        "hidden_size": 2 * half_hidden,
        "num_layers": num_layers,
    }
    assert ddim.param_count(**sizes) == count(ddim.build(num_steps=num_steps, **sizes))


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 128}, {"num_layers": 6}, {"action_horizon": 16}])
def test_param_count_is_exact_at_real_sizes_too(changes):
    sizes = {"obs_size": 287, "action_dim": 4, **changes}
    assert ddim.param_count(**sizes) == count(ddim.build(**sizes))


def test_output_size_is_the_width_of_the_last_layer():
    assert ddim.output_size() == 512
    assert ddim.output_size(action_dim=7, action_horizon=3) == 21
    last = ddim.build(**{**SMALL, "action_dim": 7, "action_horizon": 3}).leave
    assert last.out_features == 21


def test_build_computes_the_documents_network():
    network = randomised(ddim.build(**SMALL))
    noisy, timestep, observations = batch()
    w = dict(network.named_parameters())
    # Written out from the document: flatten; sinusoidal timestep; linear on the observation; concatenate; linear,
    # SiLU; residual blocks of LayerNorm, linear to 4h, SiLU, linear back; linear to the chunk.
    h, embedded = SMALL["hidden_size"], waves(timestep)
    observed = observations @ w["project_observation.weight"].T + w["project_observation.bias"]
    joined = torch.cat([noisy.reshape(6, 8), embedded, observed], dim=1)
    x = silu(joined @ w["enter.weight"].T + w["enter.bias"])
    for block in ("blocks.0", "blocks.1"):
        normed = layer_norm(x) * w[f"{block}.norm.weight"] + w[f"{block}.norm.bias"]
        inner = silu(normed @ w[f"{block}.expand.weight"].T + w[f"{block}.expand.bias"])
        assert inner.shape == (6, 4 * h)
        x = x + inner @ w[f"{block}.contract.weight"].T + w[f"{block}.contract.bias"]
    expected = (x @ w["leave.weight"].T + w["leave.bias"]).reshape(6, 4, 2)
    assert torch.allclose(network(noisy, timestep, observations), expected, atol=1e-5)


def test_the_modulated_network_is_steered_by_timestep_and_observation_in_every_block():
    network = randomised(ModulatedMLP(**SMALL))
    noisy, timestep, observations = batch()
    w = dict(network.named_parameters())

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    # Peebles and Xie 2023, section 3.2: shift and scale after the norm, a gate before the residual sum.
    embedded = linear("embed_timestep.3", silu(linear("embed_timestep.1", waves(timestep))))
    condition = silu(embedded + linear("project_observation", observations))
    x = linear("enter", noisy.reshape(6, 8))
    for block in ("blocks.0", "blocks.1"):
        scale, shift, gate = linear(f"{block}.modulate", condition).reshape(6, 3, 8).unbind(1)
        inner = silu(linear(f"{block}.expand", layer_norm(x) * (1 + scale) + shift))
        x = x + gate * linear(f"{block}.contract", inner)
    x = layer_norm(x) * w["norm.weight"] + w["norm.bias"]
    expected = linear("leave", x).reshape(6, 4, 2)
    assert torch.allclose(network(noisy, timestep, observations), expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("rows", [1, 3])
def test_a_chunk_goes_in_and_a_chunk_comes_out(denoiser, rows):
    noisy, timestep, observations = batch(rows)
    assert denoiser(**SMALL)(noisy, timestep, observations).shape == noisy.shape


@BOTH
def test_each_input_has_a_say(denoiser):
    network = randomised(denoiser(**SMALL))
    noisy, timestep, observations = batch()
    out = network(noisy, timestep, observations)
    for changed in (
        network(noisy + 1, timestep, observations),
        network(noisy, (timestep + 1) % 20, observations),
        network(noisy, timestep, observations + 1),
    ):
        assert ((changed - out).abs().amax(dim=(1, 2)) > 1e-3).all()


@BOTH
def test_rows_do_not_see_each_other(denoiser):
    network = randomised(denoiser(**SMALL)).double()
    noisy, timestep, observations = batch()
    noisy, observations = noisy.double(), observations.double()
    together = network(noisy, timestep, observations)
    for row in range(6):
        one = slice(row, row + 1)
        alone = network(noisy[one], timestep[one], observations[one])
        assert torch.allclose(alone, together[one], rtol=0, atol=1e-12)


@BOTH
def test_gradients_reach_every_parameter(denoiser):
    torch.manual_seed(0)
    network = denoiser(**SMALL)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    noisy, timestep, observations = batch()
    reached = set()
    # Layers that start at zero let gradients through to the ones before them only once they have moved.
    for _ in range(4):
        optimizer.zero_grad()
        (network(noisy, timestep, observations) - randn(6, 4, 2, seed=2)).square().mean().backward()
        reached |= {name for name, p in network.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step()
    assert reached == {name for name, _ in network.named_parameters()}


@BOTH
def test_training_fits_a_few_chunks(denoiser):
    torch.manual_seed(0)
    network = denoiser(**{**SMALL, "hidden_size": 32})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    noisy, timestep, observations = batch()
    target = randn(6, 4, 2, seed=2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (network(noisy, timestep, observations) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * target.square().mean().item()


def test_the_modulated_blocks_start_as_the_identity_and_the_output_as_zero():
    network = ModulatedMLP(**SMALL)
    x, condition = randn(3, 8), randn(3, 8, seed=1)
    assert all(torch.equal(block(x, *block.modulation(condition)), x) for block in network.blocks)
    assert torch.equal(network(*batch()), torch.zeros(6, 4, 2))


@BOTH
def test_many_timesteps_can_be_conditioned_at_once(denoiser):
    network = randomised(denoiser(**SMALL)).double()
    noisy, _, observations = batch()
    noisy, observations = noisy.double(), observations.double()
    timesteps = torch.tensor([19, 7, 0])
    at_once = network.conditions(network.embed_timestep(timesteps)[:, None], observations)
    outputs = []
    for k, timestep in enumerate(timesteps):
        parts = [condition[k] for condition in at_once]
        assert all(len(part) == len(noisy) for part in parts)
        outputs.append(network.denoise(noisy, parts))
        expected = network(noisy, timestep.expand(len(noisy)), observations)
        assert torch.allclose(outputs[-1], expected, rtol=0, atol=1e-10)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@BOTH
def test_dropout_acts_while_training_only(denoiser):
    network = randomised(denoiser(**SMALL, dropout=0.5))
    torch.manual_seed(0)
    assert not torch.equal(network(*batch()), network(*batch()))
    network.eval()
    assert torch.equal(network(*batch()), network(*batch()))
    plain = denoiser(**SMALL).eval()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(*batch()), network(*batch()))


@BOTH
@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_sizes_that_are_not_whole_numbers_from_1_are_refused_by_name(denoiser, name, size):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more; got {size!r}"):
        denoiser(**{**SMALL, name: size})


@BOTH
def test_an_odd_hidden_size_is_refused(denoiser):
    with pytest.raises(ValueError, match="hidden_size must be even, for sine and cosine pairs; got 7"):
        denoiser(**{**SMALL, "hidden_size": 7})


def test_build_refuses_bad_sizes_too():
    with pytest.raises(ValueError, match="obs_size must be a whole number"):
        ddim.build(obs_size=0, action_dim=2)


@BOTH
@pytest.mark.parametrize("timestep", [20, 1000, -1])
def test_timesteps_outside_the_schedule_are_an_error(denoiser, timestep):
    noisy, timesteps, observations = batch()
    timesteps[2] = timestep
    with pytest.raises((IndexError, ValueError)):
        denoiser(**SMALL)(noisy, timesteps, observations)


def test_the_sinusoidal_table_tells_all_timesteps_apart():
    table = sinusoidal_table(1000, 256)
    assert table.shape == (1000, 256)
    assert table.dtype == torch.float32
    assert (torch.cdist(table, table) + 9 * torch.eye(1000)).min() > 0.1
    for t, i in [(0, 0), (1, 0), (37, 5), (999, 127)]:
        angle = t / 10_000 ** (i / 128)
        assert table[t, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[t, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@BOTH
def test_the_table_is_neither_a_parameter_nor_in_the_checkpoint(denoiser):
    network = denoiser(**SMALL)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert count(denoiser(**{**SMALL, "num_steps": 1000})) == count(network)


def test_denoisers_are_found_by_name():
    assert DENOISERS["residual_mlp"] is ResidualMLP
    assert DENOISERS["modulated_mlp"] is ModulatedMLP
    assert all(issubclass(network, nn.Module) for network in DENOISERS.values())
    assert type(ddim.build(obs_size=3, action_dim=1)) is ResidualMLP
