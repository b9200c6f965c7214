"""The networks: the source document's sizes to the last parameter, and gradients that reach all of them."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from policy import ddim
from policy.model.denoisers import DENOISERS
from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.encoder_decoder import EncoderDecoder
from policy.model.denoisers.modulated_mlp import ModulatedMLP
from policy.model.denoisers.residual_mlp import ResidualMLP
from policy.model.denoisers.timestep import sinusoidal_table
from policy.model.denoisers.transformer import Attention, Transformer
from policy.model.denoisers.unet import FiLMBlock, UNet

TASK = {"obs_size": 5, "action_dim": 2, "action_horizon": 4, "num_steps": 20}
SMALL = {**TASK, "hidden_size": 8, "num_layers": 2}
SIZES = {
    ResidualMLP: SMALL,
    ModulatedMLP: SMALL,
    UNet: {**TASK, "groups": 4, "widths": (8, 12), "kernel_size": 3, "timestep_size": 8},
    Transformer: {**SMALL, "num_heads": 2},
    EncoderDecoder: {**SMALL, "num_heads": 2, "obs_tokens": 1},
}
WIDER = {
    ResidualMLP: {"hidden_size": 32},
    ModulatedMLP: {"hidden_size": 32},
    UNet: {},
    Transformer: {"hidden_size": 32},
    EncoderDecoder: {"hidden_size": 32},
}
EACH = pytest.mark.parametrize("denoiser", SIZES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(rows=6):
    timesteps = torch.arange(rows) * 3 % TASK["num_steps"]
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


@settings(deadline=None)
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


@EACH
@pytest.mark.parametrize("rows", [1, 3])
def test_a_chunk_goes_in_and_a_chunk_comes_out(denoiser, rows):
    noisy, timestep, observations = batch(rows)
    assert denoiser(**SIZES[denoiser])(noisy, timestep, observations).shape == noisy.shape


@EACH
def test_each_input_has_a_say(denoiser):
    network = randomised(denoiser(**SIZES[denoiser]))
    noisy, timestep, observations = batch()
    out = network(noisy, timestep, observations)
    for changed in (
        network(noisy + 1, timestep, observations),
        network(noisy, (timestep + 1) % 20, observations),
        network(noisy, timestep, observations + 1),
    ):
        assert ((changed - out).abs().amax(dim=(1, 2)) > 1e-3).all()


@EACH
def test_rows_do_not_see_each_other(denoiser):
    network = randomised(denoiser(**SIZES[denoiser])).double()
    noisy, timestep, observations = batch()
    noisy, observations = noisy.double(), observations.double()
    together = network(noisy, timestep, observations)
    for row in range(6):
        one = slice(row, row + 1)
        alone = network(noisy[one], timestep[one], observations[one])
        assert torch.allclose(alone, together[one], rtol=1e-12, atol=1e-12)


@EACH
def test_gradients_reach_every_parameter(denoiser):
    torch.manual_seed(0)
    network = denoiser(**SIZES[denoiser])
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


@EACH
def test_training_fits_a_few_chunks(denoiser):
    torch.manual_seed(0)
    network = denoiser(**{**SIZES[denoiser], **WIDER[denoiser]})
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    noisy, timestep, observations = batch()
    target = randn(6, 4, 2, seed=2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (network(noisy, timestep, observations) - target).square().mean()
        if loss.item() < 0.01 * target.square().mean().item():
            return
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 300 steps the loss is {loss.item()}")


@pytest.mark.parametrize("denoiser", [ModulatedMLP, Transformer])
def test_the_modulated_blocks_start_as_the_identity_and_the_output_as_zero(denoiser):
    network = denoiser(**SIZES[denoiser])
    x, condition = randn(3, 4, 8), randn(3, 4, 8, seed=1)
    assert all(torch.equal(block(x, *block.modulation(condition)), x) for block in network.blocks)
    assert torch.equal(network(*batch()), torch.zeros(6, 4, 2))


@EACH
@pytest.mark.parametrize("action_horizon", [1, 2, 3, 7, 8, 16])
def test_chunks_of_any_length_do_and_each_action_looks_at_all_others(denoiser, action_horizon):
    settings = {"causal": False} if denoiser is EncoderDecoder else {}
    network = randomised(denoiser(**{**SIZES[denoiser], "action_horizon": action_horizon, **settings}))
    _, timestep, observations = batch(1)
    noisy = randn(1, action_horizon, 2).requires_grad_()
    out = network(noisy, timestep, observations)
    assert out.shape == noisy.shape
    for action in range(action_horizon):
        (looked_at,) = torch.autograd.grad(out[0, action].sum(), noisy, retain_graph=True)
        assert (looked_at[0].abs().amax(dim=1) > 0).all()


# --- the U-Net ---------------------------------------------------------------------------------------------------


def test_the_unet_at_its_published_sizes_has_the_published_number_of_parameters():
    # Chi et al. 2023: Push-T from features, two observations of 20 numbers, 16 actions; 65.8 M parameters.
    network = UNet(
        obs_size=40, action_dim=2, action_horizon=16, widths=(256, 512, 1024), timestep_size=256, num_steps=100
    )
    assert round(count(network) / 1e6, 1) == 65.8


@pytest.mark.parametrize(
    ("action_horizon", "lengths"), [(8, (8, 4, 2)), (16, (16, 8, 4)), (7, (7, 4, 2)), (5, (5, 3, 2)), (1, (1, 1, 1))]
)
def test_the_unet_halves_the_chunk_on_the_way_down_and_doubles_it_on_the_way_up(action_horizon, lengths):
    network = UNet(**{**SIZES[UNet], "action_horizon": action_horizon, "widths": (8, 12, 16)})
    seen = []
    for module in network.modules():
        if isinstance(module, FiLMBlock):
            module.register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape[1:])))
    network(randn(1, action_horizon, 2), torch.tensor([3]), randn(1, 5))
    whole, half, quarter = lengths
    down = [(8, whole)] * 2 + [(12, half)] * 2 + [(16, quarter)] * 2
    up = [(12, quarter)] * 2 + [(8, half)] * 2
    assert seen == [*down, *[(16, quarter)] * 2, *up]


def test_a_film_block_scales_and_shifts_channels_by_one_linear_layer_on_timestep_and_observation():
    block = FiLMBlock(3, 4, timestep_size=6, obs_size=5, kernel_size=3, groups=2, dropout=0.0)
    x, timestep, observation = randn(2, 3, 7), randn(2, 6, seed=1), randn(2, 5, seed=2)
    w = dict(randomised(block).named_parameters())

    def convolve(name, x):
        padded = nn.functional.pad(x, (1, 1))
        windows = torch.stack([padded[..., i : i + x.shape[-1]] for i in range(3)], dim=-1)
        out = torch.einsum("bctk,ock->bot", windows, w[f"{name}.0.weight"]) + w[f"{name}.0.bias"][:, None]
        grouped = out.reshape(2, 2, -1)
        normed = (grouped - grouped.mean(2, keepdim=True)) / (
            grouped.var(2, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        affine = normed.reshape(out.shape) * w[f"{name}.1.weight"][:, None] + w[f"{name}.1.bias"][:, None]
        return affine * torch.tanh(torch.log1p(torch.exp(affine)))

    weight = torch.cat([w["modulate_by_timestep.weight"], w["modulate_by_observation.weight"]], dim=1)
    modulation = torch.cat([timestep, observation], dim=1) @ weight.T + w["modulate_by_timestep.bias"]
    scale, shift = modulation[:, :4, None], modulation[:, 4:, None]
    h = convolve("second", convolve("first", x) * (1 + scale) + shift)
    expected = h + torch.einsum("bct,oc->bot", x, w["skip.weight"][..., 0]) + w["skip.bias"][:, None]
    assert torch.allclose(block(x, *block.modulation(timestep, observation)), expected, atol=1e-5)


@pytest.mark.parametrize("widths", [(), (0,), (8, 10), (4,), (8.0, 12), (True,), ("8",)])
def test_widths_that_do_not_divide_into_groups_are_refused(widths):
    with pytest.raises(
        ValueError, match=r"widths must be whole numbers, each a multiple of groups=4 and larger; got \["
    ):
        UNet(**{**SIZES[UNet], "widths": widths})


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel_size must be odd, .*; got 4"):
        UNet(**{**SIZES[UNet], "kernel_size": 4})


# --- the transformer ---------------------------------------------------------------------------------------------


def test_attention_is_torchs_multi_head_attention():
    ours, theirs = randomised(Attention(8, 2)), nn.MultiheadAttention(8, 2, batch_first=True)
    renamed = {"in_proj_": "project.", "out_proj.": "join."}
    weights = ours.state_dict()
    theirs.load_state_dict(
        {old + kind: weights[new + kind] for old, new in renamed.items() for kind in ("weight", "bias")}
    )
    h = randn(3, 5, 8)
    assert torch.allclose(ours.change(h), theirs(h, h, h, need_weights=False)[0], atol=1e-5)


def test_only_their_positions_tell_the_transformers_actions_apart():
    network = randomised(Transformer(**SIZES[Transformer])).double()
    noisy, timestep, observations = batch()
    noisy, observations, order = noisy.double(), observations.double(), [2, 0, 3, 1]
    shuffled = network(noisy[:, order], timestep, observations)
    assert (shuffled - network(noisy, timestep, observations)[:, order]).abs().max() > 1e-3
    with torch.no_grad():
        network.positions.zero_()
    shuffled = network(noisy[:, order], timestep, observations)
    assert torch.allclose(shuffled, network(noisy, timestep, observations)[:, order], rtol=1e-12, atol=1e-12)


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of num_heads, .*; got 8 for 3 heads"):
        Transformer(**{**SIZES[Transformer], "num_heads": 3})


# --- the encoder-decoder ------------------------------------------------------------------------------------------


def test_the_decoder_is_torchs():
    ours = randomised(EncoderDecoder(**{**SIZES[EncoderDecoder], "causal": False}), 0.3).eval()
    layer = nn.TransformerDecoderLayer(8, 2, 32, activation="gelu", batch_first=True, norm_first=True).eval()
    theirs = nn.TransformerDecoder(layer, 2)
    renamed = {
        "self_attn.in_proj_": "actions.project.",
        "self_attn.out_proj.": "actions.join.",
        "norm1.": "actions.norm.",
        "multihead_attn.out_proj.": "memory.join.",
        "norm2.": "memory.norm.",
        "linear1.": "feed_forward.expand.",
        "linear2.": "feed_forward.contract.",
        "norm3.": "feed_forward.norm.",
    }
    for mine, torchs in zip(ours.layers, theirs.layers, strict=True):
        weights = mine.state_dict()
        state = {old + kind: weights[new + kind] for old, new in renamed.items() for kind in ("weight", "bias")}
        state |= {
            f"multihead_attn.in_proj_{kind}": torch.cat(
                [weights[f"memory.{part}.{kind}"] for part in ("ask", "project")]
            )
            for kind in ("weight", "bias")
        }
        torchs.load_state_dict(state)
    noisy, timestep, observations = batch()
    memory = torch.cat([ours.embed_timestep(timestep)[:, None], ours.enter_observation(observations)[:, None]], dim=1)
    memory = ours.encoder(memory + ours.memory_positions)
    expected = ours.leave(ours.norm(theirs(ours.enter(noisy) + ours.positions, memory)))
    assert torch.allclose(ours(noisy, timestep, observations), expected, atol=1e-5)


def test_the_encoders_layers_are_torchs():
    sizes = {**SIZES[EncoderDecoder], "obs_size": 6, "obs_tokens": 3, "encoder_layers": 1}
    ours = randomised(EncoderDecoder(**sizes), 0.3)
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, activation="gelu", batch_first=True, norm_first=True)
    renamed = {
        "self_attn.in_proj_": "0.project.",
        "self_attn.out_proj.": "0.join.",
        "norm1.": "0.norm.",
        "linear1.": "1.expand.",
        "linear2.": "1.contract.",
        "norm2.": "1.norm.",
    }
    weights = ours.encoder.state_dict()
    theirs.load_state_dict(
        {old + kind: weights[new + kind] for old, new in renamed.items() for kind in ("weight", "bias")}
    )
    assert torch.allclose(ours.encoder(randn(3, 4, 8)), theirs(randn(3, 4, 8)), atol=1e-5)


@pytest.mark.parametrize("encoder_layers", [0, 1])
def test_causal_actions_depend_on_earlier_ones_and_as_many_observations(encoder_layers):
    sizes = {**SIZES[EncoderDecoder], "obs_size": 9, "obs_tokens": 3, "encoder_layers": encoder_layers}
    network = randomised(EncoderDecoder(**sizes)).eval()
    noisy, timestep, _ = batch()
    observations = randn(6, 9, seed=1)
    before = network(noisy, timestep, observations)

    def changed(*given):
        return ((network(*given) - before).abs().amax(dim=(0, 2)) > 1e-5).tolist()

    later = noisy.clone()
    later[:, 2] += 1
    assert changed(later, timestep, observations) == [False, False, True, True]
    assert changed(noisy, timestep + 1, observations) == [True] * 4
    newest = observations.clone()
    newest[:, 6:] += 1
    # Layers of self-attention mix the observations before the actions attend to them.
    assert changed(noisy, timestep, newest) == ([True] * 4 if encoder_layers else [False, False, True, True])
    refused = pytest.raises(ValueError, match=r"past_actions must be 2 or more .*; got 1")
    with nullcontext() if encoder_layers else refused:
        network.check_past_actions(1)
    network.check_past_actions(2)
    network = EncoderDecoder(**sizes, causal=False).eval()
    before = randomised(network)(noisy, timestep, observations)
    assert changed(later, timestep, observations) == changed(noisy, timestep, newest) == [True] * 4
    network.check_past_actions(0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads, .*; got 8 for 3 heads"),
        ({"obs_tokens": 2}, "obs_size must be a multiple of obs_tokens; got 5 for 2 tokens"),
        ({"encoder_layers": -1}, "encoder_layers must be 0 or more; got -1"),
    ],
)
def test_sizes_that_an_encoder_decoder_cannot_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoder(**{**SIZES[EncoderDecoder], **wrong})


# --- all of them -------------------------------------------------------------------------------------------------


@EACH
def test_many_timesteps_can_be_conditioned_at_once(denoiser):
    network = randomised(denoiser(**SIZES[denoiser])).double()
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
        assert torch.allclose(outputs[-1], expected, rtol=1e-10, atol=1e-10)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@EACH
def test_dropout_acts_while_training_only(denoiser):
    network = randomised(denoiser(**SIZES[denoiser], dropout=0.5))
    torch.manual_seed(0)
    assert not torch.equal(network(*batch()), network(*batch()))
    network.eval()
    assert torch.equal(network(*batch()), network(*batch()))
    plain = denoiser(**SIZES[denoiser]).eval()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(*batch()), network(*batch()))


@pytest.mark.parametrize(("denoiser", "name"), [(d, n) for d, sizes in SIZES.items() for n in sizes if n != "widths"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_sizes_that_are_not_whole_numbers_from_1_are_refused_by_name(denoiser, name, size):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more; got {size!r}"):
        denoiser(**{**SIZES[denoiser], name: size})


@EACH
def test_an_odd_width_of_the_timesteps_embedding_is_refused(denoiser):
    name = "timestep_size" if denoiser is UNet else "hidden_size"
    with pytest.raises(ValueError, match=f"{name} must be even, for sine and cosine pairs; got 7"):
        denoiser(**{**SIZES[denoiser], name: 7})


def test_build_refuses_bad_sizes_too():
    with pytest.raises(ValueError, match="obs_size must be a whole number"):
        ddim.build(obs_size=0, action_dim=2)


@EACH
@pytest.mark.parametrize("timestep", [20, 1000, -1])
def test_timesteps_outside_the_schedule_are_an_error(denoiser, timestep):
    noisy, timesteps, observations = batch()
    timesteps[2] = timestep
    with pytest.raises((IndexError, ValueError)):
        denoiser(**SIZES[denoiser])(noisy, timesteps, observations)


def test_the_sinusoidal_table_tells_all_timesteps_apart():
    table = sinusoidal_table(1000, 256)
    assert table.shape == (1000, 256)
    assert table.dtype == torch.float32
    assert (torch.cdist(table, table) + 9 * torch.eye(1000)).min() > 0.1
    for t, i in [(0, 0), (1, 0), (37, 5), (999, 127)]:
        angle = t / 10_000 ** (i / 128)
        assert table[t, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[t, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@EACH
def test_the_table_is_neither_a_parameter_nor_in_the_checkpoint(denoiser):
    network = denoiser(**SIZES[denoiser])
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert count(denoiser(**{**SIZES[denoiser], "num_steps": 1000})) == count(network)


def test_denoisers_are_found_by_name():
    assert {
        "residual_mlp": ResidualMLP,
        "modulated_mlp": ModulatedMLP,
        "unet": UNet,
        "transformer": Transformer,
        "encoder_decoder": EncoderDecoder,
    } == DENOISERS
    assert all(issubclass(network, Denoiser) for network in DENOISERS.values())
    assert set(DENOISERS.values()) == set(SIZES)  # every one is tested
    assert type(ddim.build(obs_size=3, action_dim=1)) is ResidualMLP
