"""diffusion_policy's policies compute what it computes, and what cannot be imported is refused in one sentence."""

from pathlib import Path

import pytest
import torch
from torch import nn

from policy.adapters.diffusion_policy import POLICIES, read_diffusion_policy
from policy.adapters.imported import build_policy
from policy.adapters.parity import compare, read_reference
from policy.adapters.resnet_keys import PLACES
from policy.adapters.torch_file import plain, read_torch_file
from policy.adapters.transformer_keys import transformer_weights
from policy.model.denoisers.encoder_decoder import EncoderDecoder
from policy.model.denoisers.timestep import sinusoidal_table
from policy.model.encoders.resnet import ResNetEncoder
from tests.adapters.parity import check_parity

INTEROP = Path(__file__).parents[1] / "data" / "interop" / "diffusion_policy-5ba07ac"
ODD, TRANSFORMER, IMAGE = (INTEROP / name for name in ("lowdim_odd", "lowdim_transformer", "image_shared"))


@pytest.mark.parametrize("backend", ["fused", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", [ODD, TRANSFORMER, IMAGE], ids=lambda folder: folder.name)
def test_a_policy_computes_what_diffusion_policy_computes(folder, backend):
    read = read_diffusion_policy(folder / "latest.ckpt")
    check_parity(read, folder, backend)


def test_the_comparison_sees_that_attention_is_causal():
    read = read_diffusion_policy(TRANSFORMER / "latest.ckpt")
    policy = build_policy(read, "transformer")
    assert policy.denoiser.seen.tolist()[0] == [True, True, False]
    policy.denoiser.earlier = None
    reference = read_reference(TRANSFORMER / "reference.npz")
    few = {name: value for name, value in reference.items() if name.startswith(("observation/", "unet/", "noise"))}
    found = compare(policy, few, keys={}, execution_horizon=8, backends=())
    assert [comparison.holds for comparison in found] == [False] * 4


def content(folder):
    """What a checkpoint holds, which torch.save can write without the classes of its configuration."""
    read = read_torch_file(folder / "latest.ckpt")
    return {"cfg": plain(read["cfg"]), "state_dicts": {k: plain(v) for k, v in read["state_dicts"].items()}}


def saved(tmp_path, value):
    torch.save(value, tmp_path / "latest.ckpt")
    return tmp_path / "latest.ckpt"


def test_averaged_weights_are_taken_unless_plain_ones_are_wanted():
    states = content(TRANSFORMER)["state_dicts"]
    for average, name in ((True, "ema_model"), (False, "model")):
        read = read_diffusion_policy(TRANSFORMER / "latest.ckpt", average=average)
        assert torch.equal(read.weights["denoiser.leave.weight"], states[name]["model.head.weight"])
        assert name in read.found["weights"]
    assert read_diffusion_policy(ODD / "latest.ckpt").found["weights"] == "plain (model)"


def test_without_their_convention_the_action_for_the_newest_observation_is_one_later():
    read = read_diffusion_policy(ODD / "latest.ckpt")
    assert (read.config.obs_horizon, read.config.past_actions, read.config.denoised_horizon) == (3, 3, 16)
    assert read.found == {
        "class": "DiffusionUnetLowdimPolicy",
        "weights": "plain (model)",
        "inputs": "obs [5]",
        "scheduler": "DDPMScheduler, 100 timesteps, squaredcos_cap_v2, samples with 100 steps",
        "prediction": "sample",
        "executed": "horizon[3:11] of 16",
        "normalisation": "scale and offset of each dimension",
    }
    assert read.config.action_bound is None
    assert read.execution_horizon == 8
    assert "ddim_steps=100 sampler.spacing=leading sampler.eta=1 here" in read.differences[0]
    assert read.sampler == {"ddim_steps": 100, "spacing": "leading", "eta": 1}
    assert "have no scale" in read.differences[-1]


def test_pictures_come_before_vectors_each_sorted():
    read = read_diffusion_policy(IMAGE / "latest.ckpt")
    assert list(read.config.observation_shapes) == ["front", "wrist", "a_speed", "agent_pos"]
    assert read.config.observation_shapes["front"] == (26, 29, 3)
    # Half of 26 - 21 and 29 - 24 lies between two numbers: both go to the even one.
    assert read.config.encoder["crop_corner"] == (2, 2)
    assert read.config.encoder["shared"]


def test_the_executed_actions_include_those_that_latency_takes(tmp_path):
    changed = content(ODD)
    changed["cfg"]["policy"]["n_action_steps"] = "${eval:'5+2'}"
    read = read_diffusion_policy(saved(tmp_path, changed))
    assert read.execution_horizon == 7
    assert any("drop the first 2 of the executed actions" in sentence for sentence in read.differences)


class TheirTransformer(nn.Module):
    """Parts under diffusion_policy's names, put together with torch's own layers."""

    def __init__(self, width=8, actions=4, observations=3):
        super().__init__()
        settings = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.input_emb, self.cond_obs_emb = nn.Linear(2, width), nn.Linear(5, width)
        self.pos_emb = nn.Parameter(torch.randn(1, actions, width))
        self.cond_pos_emb = nn.Parameter(torch.randn(1, 1 + observations, width))
        encoder = nn.TransformerEncoderLayer(width, 2, 4 * width, **settings)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 2, 4 * width, **settings), 2)
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, noisy, timestep, observations):
        tokens = torch.cat([sinusoidal_table(20, 8, True)[timestep][:, None], self.cond_obs_emb(observations)], dim=1)
        memory = self.encoder(tokens + self.cond_pos_emb)
        return self.head(self.ln_f(self.decoder(self.input_emb(noisy) + self.pos_emb, memory)))


def test_a_transformer_with_encoder_layers_is_renamed():
    torch.manual_seed(0)
    theirs = TheirTransformer()
    ours = EncoderDecoder(
        **{"obs_size": 15, "action_dim": 2, "action_horizon": 4, "num_steps": 20, "hidden_size": 8, "num_heads": 2},
        **{"num_layers": 2, "encoder_layers": 2, "obs_tokens": 3, "causal": False},
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        ours.load_state_dict(transformer_weights(theirs.state_dict(), obs_tokens=3))
        noisy, timestep, observations = torch.randn(6, 4, 2), torch.arange(6), torch.randn(6, 3, 5)
        expected = theirs(noisy, timestep, observations)
        assert torch.allclose(ours(noisy, timestep, observations.flatten(1)), expected, atol=1e-5)


def hybrid(**settings):
    """The small image policy with robomimic's encoder in place of the other, which gives as many features."""
    value = content(IMAGE)
    found, state = value["cfg"]["policy"], value["state_dicts"]["model"]
    del found["obs_encoder"]
    found |= {"_target_": "p.DiffusionUnetHybridImagePolicy", "crop_shape": None, **settings}
    value["state_dicts"]["model"] = {key: v for key, v in state.items() if not key.startswith("obs_encoder.")}
    shapes = {"front": (26, 29, 3), "wrist": (26, 29, 3)}
    sizes = {"width": 2, "keypoints": 8, "norm": "frozen_batch"}
    encoder = ResNetEncoder(shapes=shapes, obs_horizon=1, obs_size=32, **sizes)
    numbers = {name: number for number, name in PLACES.items()}
    for camera, key in zip(encoder.cameras, shapes, strict=True):
        prefix = f"obs_encoder.obs_nets.{key}."
        value["state_dicts"]["model"] |= {
            f"{prefix}pool.nets.weight": camera.pool[0].weight.detach(),
            f"{prefix}pool.nets.bias": camera.pool[0].bias.detach(),
            f"{prefix}pool.temperature": torch.full((1,), 0.5),
            f"{prefix}nets.3.weight": torch.arange(256.0).reshape(16, 16),
            f"{prefix}nets.3.bias": camera.head[0].bias.detach(),
        }
        for name, weight in camera.backbone.state_dict().items():
            place, _, rest = name.partition(".")
            value["state_dicts"]["model"][f"{prefix}backbone.nets.{numbers[place]}.{rest}"] = weight
    return value


def test_robomimics_encoder_takes_observations_in_the_order_of_the_configuration(tmp_path):
    read = read_diffusion_policy(saved(tmp_path, hybrid()))
    policy = build_policy(read, "hybrid")
    assert list(read.config.observation_shapes) == ["agent_pos", "a_speed", "wrist", "front"]
    assert policy.encoder.images == ["wrist", "front"]
    camera = policy.encoder.cameras[0]
    assert camera.pool[1].sharpness.unique().tolist() == [2]
    # Their columns are x and y of each keypoint in turn, ours are all x and then all y.
    assert camera.head[0].weight[0].tolist() == [*range(0, 16, 2), *range(1, 16, 2)]
    crop = {"crop_shape": [21, 24], "eval_fixed_crop": True}
    assert read_diffusion_policy(saved(tmp_path, hybrid(**crop))).config.encoder["crop_corner"] == (2, 2)


def test_a_weight_that_robomimics_encoder_lacks_is_named(tmp_path):
    changed = hybrid()
    del weights(changed)["obs_encoder.obs_nets.front.nets.3.bias"]
    with pytest.raises(ValueError, match=r"lacks the weight 'obs_encoder\.obs_nets\.front\.nets\.3\.bias'"):
        read_diffusion_policy(saved(tmp_path, changed))


def encoder_of(config, **settings):
    config["obs_encoder"] |= settings


def scheduler_of(config, **settings):
    config["noise_scheduler"] |= settings


@pytest.mark.parametrize(
    ("folder", "change", "said"),
    [
        (ODD, {"_target_": "x.DiffusionUnetVideoPolicy"}, f"those that can be imported are {', '.join(POLICIES)}"),
        (ODD, {"_target_": None}, "must hold 'cfg.policy._target_' as str; got None"),
        (ODD, {"obs_as_global_cond": False}, "obs_as_global_cond=False"),
        (ODD, {"obs_as_local_cond": True}, "local conditioning"),
        (ODD, {"pred_action_steps_only": True}, "pred_action_steps_only=True"),
        (ODD, {"n_action_steps": "${eval:'a+b'}"}, "must hold 'cfg.policy.n_action_steps' as int"),
        (ODD, {"n_action_steps": 15}, "execution_horizon must be within 1..13"),
        (ODD, {"n_obs_steps": 0}, "must hold 'cfg.policy.n_obs_steps' as a number from 1 to 10000; got 0"),
        (ODD, {"horizon": 2}, "action_horizon must be 1 or more; got -1"),
        (TRANSFORMER, {"obs_as_cond": False}, "obs_as_cond=False"),
        (TRANSFORMER, {"horizon": 12}, "do not fit"),
        (TRANSFORMER, {"horizon": 10**12}, "must hold 'cfg.policy.horizon' as a number from 1 to 10000"),
        (TRANSFORMER, {"model": {"time_as_cond": False}}, "time_as_cond=False"),
        (TRANSFORMER, {"model": {"n_head": 5}}, "hidden_size must be a multiple of num_heads"),
        (IMAGE, {"shape_meta": {"obs": {"front": {"shape": [3, 26], "type": "rgb"}}}}, "pictures (type rgb) of three"),
        (ODD, lambda c: scheduler_of(c, beta_schedule="linear"), "linear steps, which leave 0.36 of the signal"),
        (ODD, lambda c: scheduler_of(c, beta_schedule="scaled_linear"), "'squaredcos_cap_v2' and 'linear' can be"),
        (ODD, lambda c: scheduler_of(c, num_train_timesteps=10**12), "has 1000000000000 timesteps; 1 to 100000 can"),
        (IMAGE, lambda c: encoder_of(c, resize_shape=[10**9, 9]), "'cfg.policy.obs_encoder.resize_shape' as a height"),
        (ODD, lambda c: scheduler_of(c, prediction_type="flow"), "prediction_type='flow'; epsilon, sample, v_pred"),
        (ODD, lambda c: scheduler_of(c, thresholding=True), "a noise scheduler with thresholding"),
        (IMAGE, lambda c: encoder_of(c, _target_="x.TimmEncoder"), "'TimmEncoder'; MultiImageObsEncoder can be"),
        (IMAGE, lambda c: encoder_of(c, crop_shape=[40, 40]), "must fit into the image of 26 x 29"),
        (IMAGE, lambda c: encoder_of(c, crop_shape={"front": [9, 9], "wrist": [8, 8]}), "several values of crop_shape"),
        (IMAGE, lambda c: encoder_of(c, share_rgb_model=False), "'cameras.0.backbone.conv1.weight'"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_sentence(tmp_path, folder, change, said):
    changed = content(folder)
    if callable(change):
        change(changed["cfg"]["policy"])
    else:
        changed["cfg"]["policy"] |= change
    with pytest.raises(ValueError, match=r".") as refused:
        build_policy(read_diffusion_policy(saved(tmp_path, changed)), "it")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_random_crops_at_evaluation_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval_fixed_crop=False: it acts on random crops"):
        read_diffusion_policy(saved(tmp_path, hybrid(crop_shape=[20, 20])))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("cfg"), "is not a checkpoint of a workspace of diffusion_policy"),
        (lambda c: c.update(cfg=[1]), "must hold its configuration as a mapping; got list"),
        (lambda c: c.update(cfg={}), "must hold 'cfg.policy' as dict; got nothing"),
        (lambda c: c["state_dicts"].pop("model"), "holds no weights; its state_dicts are []"),
        (lambda c: c.update(state_dicts=3), "holds no weights; its state_dicts are int"),
        (lambda c: c["state_dicts"].update(model=[]), "must hold its weights as a mapping; got list"),
        (lambda c: c["state_dicts"].update(model={}), "lacks the weight 'mid_modules.0.cond_encoder.1.weight'"),
        (lambda c: weights(c).pop("normalizer.params_dict.action.scale"), "lacks the normaliser of 'action'"),
        (lambda c: weights(c)["normalizer.params_dict.obs.scale"].zero_(), "none of its scales may be 0"),
        (lambda c: weights(c).pop("model.mid_modules.0.blocks.0.block.0.bias"), "do not fit"),
        (
            lambda c: set_weight(c, "mid_modules.0.cond_encoder.1.bias", torch.tensor(1.0)),
            "holds weights of other shapes",
        ),
        (
            lambda c: set_weight(c, "mid_modules.0.cond_encoder.1.weight", torch.zeros(2)),
            "lacks the weight 'mid_modules",
        ),
        (lambda c: set_weight(c, "up_modules.0.0.cond_encoder.1.weight", torch.zeros(2)), "weights of other shapes"),
        (lambda c: weights(c)["model.final_conv.1.bias"].fill_(float("nan")), "holds a NaN or an infinity in 'model"),
    ],
)
def test_what_a_file_lacks_is_said(tmp_path, change, said):
    changed = content(ODD)
    change(changed)
    with pytest.raises(ValueError, match=r".") as refused:
        build_policy(read_diffusion_policy(saved(tmp_path, changed)), "it")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def set_weight(value, key, tensor):
    weights(value)[f"model.{key}"] = tensor


def weights(value):
    return value["state_dicts"]["model"]


def test_plain_weights_that_are_not_there_are_not_replaced(tmp_path):
    changed = content(ODD)
    changed["state_dicts"] = {"ema_model": changed["state_dicts"]["model"]}
    with pytest.raises(ValueError, match=r"holds no plain weights; its state_dicts are \['ema_model'\]"):
        read_diffusion_policy(saved(tmp_path, changed), average=False)
