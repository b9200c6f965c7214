"""The encoders of other projects as parts of ours: residual networks and plain concatenation."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from policy.data.demonstrations import Demonstrations
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.encoders.concatenate import ConcatenateEncoder
from policy.model.encoders.resnet import FrozenBatchNorm, Resize, ResNet, ResNetEncoder
from policy.training.preparation import prepare_run
from policy.training.settings import TrainSettings

SHAPES = {"front": (40, 48, 3), "state": (2,), "wrist": (40, 48, 3)}
SMALL = {"width": 16, "keypoints": 4, "crop": (32, 33)}


def make(shapes=SHAPES, **settings):
    torch.manual_seed(0)
    return ResNetEncoder(shapes=shapes, obs_horizon=2, obs_size=2 * 18, **{**SMALL, **settings})


def observations(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(rows, 2, *shape, generator=generator) for key, shape in SHAPES.items()}


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032)])
def test_the_networks_have_as_many_parameters_as_torchvisions_without_their_last_layer(depth, parameters):
    with torch.device("meta"):
        network = ResNet(3, depth=depth, width=64, norm="frozen_batch")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    names = network.state_dict().keys()
    assert {"conv1.weight", "bn1.running_var", "layer4.1.bn2.bias", "layer2.0.downsample.1.weight"} <= names


def test_stored_batch_norm_is_batch_norm_in_evaluation():
    ours, reference = FrozenBatchNorm(5), nn.BatchNorm2d(5).eval()
    for value in reference.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    ours.load_state_dict({key: v for key, v in reference.state_dict().items() if key != "num_batches_tracked"})
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(ours.train()(x), reference(x))


# torch itself is wrong where one of the sizes is 1: it repeats the first pixel.
@hypothesis.given(*[st.integers(2, 30)] * 4)
@hypothesis.settings(max_examples=20, deadline=None)
def test_resizing_is_bilinear_with_antialiasing(height, width, to_height, to_width):
    x = torch.rand(2, 3, height, width)
    expected = nn.functional.interpolate(x, (to_height, to_width), mode="bilinear", antialias=True)
    torch.testing.assert_close(Resize((height, width), (to_height, to_width))(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"shared": True}, {"pooling": "average", "norm": "frozen_batch"}, {"resize": (34, 36)}]
)
def test_a_rows_embedding_does_not_depend_on_the_other_rows(settings):
    encoder = make(**settings).eval()
    given = observations()
    with torch.no_grad():
        whole = encoder(given)
        alone = encoder({key: value[1:2] for key, value in given.items()})
    assert whole.shape == (3, 36)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_step_is_the_features_and_vectors_in_order_without_a_layer_where_the_width_fits():
    encoder = make(order=("state", "wrist", "front")).eval()
    assert isinstance(encoder.resize, nn.Identity)
    given = observations()
    with torch.no_grad():
        steps = encoder(given).unflatten(1, (2, 18))
        front = encoder.cameras[1](given["front"])
    torch.testing.assert_close(steps[..., :2], given["state"])
    torch.testing.assert_close(steps[..., 10:], front)
    assert isinstance(ConcatenateEncoder(shapes={"a": (2,)}, obs_horizon=3, obs_size=7).resize, nn.Linear)


def test_concatenation_keeps_the_order_within_each_step():
    encoder = ConcatenateEncoder(shapes={"a": (1,), "b": (2,)}, obs_horizon=2, obs_size=6, order=("b", "a"))
    a, b = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    assert encoder({"a": a, "b": b}).tolist() == [[3, 4, 1, 5, 6, 2]]


def test_training_crops_at_random_and_acting_in_the_middle_or_at_the_corner():
    camera = make(crop_corner=(1, 2)).cameras[0]
    images = torch.arange(40.0)[:, None] + torch.arange(48.0) / 100
    images = images.expand(4, 2, 3, 40, 48)
    assert camera.eval()._cropped(images)[0, 0, 0, 0, 0] == 1.02
    assert make().cameras[0].eval()._cropped(images)[0, 0, 0, 0, 0] == pytest.approx(4.07)
    torch.manual_seed(3)
    cropped = camera.train()._cropped(images)
    assert cropped.shape == (4, 2, 3, 32, 33)
    assert torch.equal(cropped[:, 0], cropped[:, 1])
    assert len(cropped[:, 0, 0, 0, 0].unique()) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depth": 20}, "encoder.depth"),
        ({"norm": "batch"}, "encoder.norm"),
        ({"pooling": "max"}, "encoder.pooling"),
        ({"width": 20}, "multiple of 16"),
        ({"keypoints": 0}, "encoder.keypoints must be 1 or more"),
        ({"crop": (41, 20)}, "must fit into the image of 40 x 48 pixels; got 41 x 20"),
        ({"order": ("front", "wrist")}, "must name each observation once"),
        ({"shapes": {"state": (2,)}}, "needs an image"),
        ({"shapes": {"a": (40, 48, 3), "b": (40, 40, 3)}, "shared": True}, "images of one shape"),
    ],
)
def test_what_the_encoder_cannot_take_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def demonstrations():
    generator = np.random.default_rng(0)
    return Demonstrations(
        observations={"front": generator.integers(0, 256, (12, 40, 48, 3), dtype=np.uint8)},
        actions=generator.random((12, 2), dtype=np.float32),
        episode_ends=np.array([5, 12]),
    )


def config(**encoder):
    return PolicyConfig(
        observation_shapes={"front": (40, 48, 3)},
        action_dim=2,
        past_actions=1,
        normalizer="affine",
        encoder={"name": "resnet", **SMALL, **encoder},
        denoiser={"name": "unet", "widths": [16, 32], "timestep_size": 32},
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_training_starts_from_pretrained_weights_in_a_file(tmp_path, suffix):
    file = tmp_path / f"weights.{suffix}"
    weights = {**ResNet(3, depth=18, width=16, norm="frozen_batch").state_dict(), "fc.weight": torch.zeros(3, 128)}
    torch.save(weights, file) if suffix == "pth" else save_file(weights, file)
    made = config(norm="frozen_batch", pretrained=str(file))
    run = prepare_run(made, demonstrations(), TrainSettings(val_fraction=0), seed=0, device="cpu")
    backbone = run.state.policy.encoder.cameras[0].backbone
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
    loss = run.state.policy.loss(run.training.gather(np.arange(4)), torch.Generator().manual_seed(0))
    loss.backward()
    assert backbone.conv1.weight.grad.abs().sum() > 0
    # A checkpoint is built without the file.
    file.unlink()
    assert DiffusionPolicy(made).sample_actions({"front": torch.zeros(1, 2, 40, 48, 3, dtype=torch.uint8)}).shape == (
        1,
        8,
        2,
    )


def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path):
    for name, content in (("empty.pth", b""), ("text.safetensors", b"no tensors")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            started(tmp_path / name)
    torch.save(ResNet(3, depth=34, width=64, norm="group").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not fit the encoder: conv1.weight should have shape"):
        started(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        started(tmp_path / "list.pth")


def started(file):
    return prepare_run(config(pretrained=str(file)), demonstrations(), TrainSettings(), seed=0, device="cpu")
