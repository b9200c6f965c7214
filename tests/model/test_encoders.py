"""Encoders: what they take and refuse, what reaches the embedding, and that the image encoder sees where things are."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.encoders import ENCODERS
from policy.model.encoders.image import ImageEncoder, SpatialSoftmax, random_shift
from policy.model.encoders.state import StateEncoder

SHAPES = {"front": (32, 40, 3), "wrist": (16, 16, 1), "state": (5,), "goal": (3,)}
SMALL = {"channels": (16, 32), "features": 8, "hidden_size": 32}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(name="image", shapes=SHAPES, **changes):
    torch.manual_seed(0)
    sizes = {"shapes": shapes, "obs_horizon": 2, "obs_size": 287}
    return ENCODERS[name](**{**sizes, **(SMALL if name == "image" else {}), **changes})


def observations(rows=4, shapes=SHAPES, horizon=2, seed=0):
    g = seeded(seed)
    return {key: 2 * torch.rand(rows, horizon, *shape, generator=g) - 1 for key, shape in shapes.items()}


# --- both --------------------------------------------------------------------------------------------------------

CASES = [("state", {"state": (5,), "goal": (3,)}), ("image", SHAPES), ("image", {"image": (16, 24, 4)})]


@pytest.mark.parametrize(("name", "shapes"), CASES)
@pytest.mark.parametrize("horizon", [1, 3])
def test_a_history_becomes_one_embedding_of_the_size_asked_for(name, shapes, horizon):
    given = observations(shapes=shapes, horizon=horizon)
    assert make(name, shapes, obs_horizon=horizon)(given).shape == (4, 287)
    assert make(name, shapes, obs_horizon=horizon, obs_size=16)(given).shape == (4, 16)


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_every_observation_of_every_key_reaches_the_embedding(name, shapes):
    encoder, plain = make(name, shapes).eval(), observations(shapes=shapes)
    for key in shapes:
        for step in (0, 1):
            changed = {k: v.clone() for k, v in plain.items()}
            changed[key][:, step] = observations(shapes=shapes, seed=1)[key][:, step]
            difference = (encoder(changed) - encoder(plain)).abs().amax(dim=1)
            assert (difference > 1e-5).all(), (key, step)


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_the_order_of_the_keys_does_not_matter(name, shapes):
    turned = dict(reversed(shapes.items()))
    given = observations(shapes=shapes)
    assert torch.equal(make(name, shapes).eval()(given), make(name, turned).eval()({key: given[key] for key in turned}))


@pytest.mark.parametrize(("name", "shapes"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_a_rows_embedding_does_not_depend_on_the_other_rows(name, shapes, training):
    encoder = make(name, shapes, **({"shift": 0} if name == "image" else {})).train(training)
    given = observations(shapes=shapes)
    together = encoder(given)
    for row in range(4):
        alone = encoder({key: value[row : row + 1] for key, value in given.items()})
        assert torch.allclose(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_evaluation_draws_nothing_and_training_draws_from_the_global_generator(name, shapes):
    encoder = make(name, shapes, noise=0.1, dropout=0.2)
    given = observations(shapes=shapes)

    def seeded_globally(seed):
        torch.manual_seed(seed)
        return encoder(given)

    assert torch.equal(seeded_globally(1), seeded_globally(1))
    assert not torch.equal(seeded_globally(1), seeded_globally(2))
    encoder.eval()
    state = torch.get_rng_state()
    assert torch.equal(encoder(given), encoder(given))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "shapes"), CASES)
def test_a_gradient_reaches_every_parameter(name, shapes):
    encoder = make(name, shapes)
    encoder(observations(shapes=shapes)).square().sum().backward()
    assert {n for n, p in encoder.named_parameters() if not p.grad.abs().max() > 0} == set()


@pytest.mark.parametrize(("name", "shapes"), CASES[:2])
def test_noise_of_training_moves_the_vectors_by_its_standard_deviation(name, shapes):
    vectors = {key: shape for key, shape in shapes.items() if len(shape) == 1}
    encoder, given, seen = make(name, shapes, noise=0.5), observations(shapes=shapes), []
    encoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for _ in range(300):
            encoder(given)
    width = 2 * sum(shape[0] for shape in vectors.values())
    drawn = torch.stack(seen)[:, :, -width:]
    clean = torch.cat([given[key].flatten(1) for key in sorted(vectors)], dim=1)
    assert (drawn - clean).std().item() == pytest.approx(0.5, rel=0.05)


# --- state -------------------------------------------------------------------------------------------------------


def test_the_state_encoder_is_the_one_that_older_checkpoints_hold():
    """Names of the weights, the draws that make them and the draws of training: worked out from torch alone."""
    encoder = make("state", {"b": (3,), "a": (5,)}, noise=0.1, dropout=0.3, skip=False)
    torch.manual_seed(0)
    enter, leave = nn.Linear(16, 256), nn.Linear(256, 287)
    expected = {f"layers.{i}.{n}": p for i, part in ((0, enter), (3, leave)) for n, p in part.named_parameters()}
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())
    given = observations(shapes={"a": (5,), "b": (3,)})
    torch.manual_seed(1)
    embedding = encoder(given)
    torch.manual_seed(1)
    x = torch.cat([given["a"].flatten(1), given["b"].flatten(1)], dim=1)
    x = x + 0.1 * torch.randn(4, 16)
    assert torch.equal(embedding, leave(functional.dropout(functional.silu(enter(x)), 0.3)))


def test_the_skip_connection_adds_a_linear_map_of_what_the_network_sees():
    given = observations(shapes={"a": (5,), "b": (3,)})
    encoder = make("state", {"b": (3,), "a": (5,)}, noise=0.1, dropout=0.3)
    assert encoder.skip.weight.shape == (287, 16)
    torch.manual_seed(1)
    embedding = encoder(given)
    torch.manual_seed(1)
    x = torch.cat([given["a"].flatten(1), given["b"].flatten(1)], dim=1)
    x = x + 0.1 * torch.randn(4, 16)
    expected = encoder.layers(x) + functional.linear(x, encoder.skip.weight, encoder.skip.bias)
    assert torch.equal(embedding, expected)


@pytest.mark.parametrize("shape", [(96, 96, 3), (4, 4), ()])
def test_the_state_encoder_names_the_way_out_for_an_image(shape):
    with pytest.raises(
        ValueError, match=r"'camera' has shape .*encoder=image, or .*dataset\.observation_keys=\[\.\.\.\]"
    ):
        StateEncoder(shapes={"state": (2,), "camera": shape}, obs_horizon=2, obs_size=287)


# --- images ------------------------------------------------------------------------------------------------------

CAMERAS = st.tuples(st.integers(16, 50), st.integers(16, 50), st.sampled_from([1, 3, 4]))


@hypothesis.settings(deadline=None)
@hypothesis.given(
    cameras=st.lists(CAMERAS, min_size=1, max_size=3),
    vectors=st.lists(st.integers(1, 9), max_size=2),
    horizon=st.integers(1, 3),
    rows=st.integers(1, 3),
)
def test_images_of_any_size_and_any_number_of_cameras_and_vectors_are_taken(cameras, vectors, horizon, rows):
    shapes = {f"camera.{i}": shape for i, shape in enumerate(cameras)}
    shapes |= {f"vector.{i}": (width,) for i, width in enumerate(vectors)}
    embedding = make(shapes=shapes, obs_horizon=horizon, obs_size=7)(observations(rows, shapes, horizon))
    assert embedding.shape == (rows, 7)
    assert embedding.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # conv 8x8 and 3x3 without biases, norms, sharpness, 128 positions to 64, (2 * 64 + 2 * 2) to 256 to 287
        ({"image": (96, 96, 3), "state": (2,)}, 6144 + 18432 + 36864 + 320 + 64 + 8256 + 133 * 256 + 257 * 287),
        ({"image": (32, 48, 1)}, 2048 + 18432 + 36864 + 320 + 64 + 8256 + 129 * 256 + 257 * 287),
    ],
)
def test_the_number_of_parameters_is_the_one_worked_out_by_hand(shapes, expected):
    encoder = ImageEncoder(shapes=shapes, obs_horizon=2, obs_size=287)
    assert sum(p.numel() for p in encoder.parameters()) == expected


@pytest.mark.parametrize(("height", "width", "grid"), [(96, 96, (12, 12)), (16, 16, (2, 2)), (33, 50, (4, 6))])
def test_an_image_shrinks_to_an_eighth_before_its_features_are_located(height, width, grid):
    """Strides are not in a checkpoint: other ones would load, and see something else."""
    encoder, seen = make(shapes={"image": (height, width, 3)}), []
    encoder.cameras[0][-2].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    encoder(observations(4, {"image": (height, width, 3)}))
    assert seen == [(8, 32, *grid)]


def test_every_camera_has_its_own_network_and_every_step_of_the_history_the_same():
    shapes = {"a": (16, 16, 3), "b": (16, 16, 3)}
    encoder, seen = make(shapes=shapes).eval(), []
    encoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unflatten(1, (2, 2, 8))))
    image = observations(1, {"a": (16, 16, 3)}, horizon=1)["a"].expand(1, 2, 16, 16, 3)
    encoder({"a": image, "b": image})
    (a_then, a_now), (b_then, b_now) = seen[0][0]
    assert torch.allclose(a_then, a_now, atol=1e-6)
    assert torch.allclose(b_then, b_now, atol=1e-6)
    assert (a_now - b_now).abs().max() > 1e-2


def test_the_spatial_softmax_is_the_expected_position():
    maps, sharpness = torch.randn(2, 3, 4, 5, generator=seeded(0)), torch.tensor([0.5, 1.0, 5.0])
    spatial_softmax = SpatialSoftmax(3)
    spatial_softmax.sharpness.data = sharpness[:, None]
    found, scores = spatial_softmax(maps), maps * sharpness[:, None, None]
    assert found.shape == (2, 6)
    for n in range(2):
        for c in range(3):
            weights = scores[n, c].double().exp() / scores[n, c].double().exp().sum()
            across = sum(weights[i, j] * (2 * j / 4 - 1) for i in range(4) for j in range(5))
            down = sum(weights[i, j] * (2 * i / 3 - 1) for i in range(4) for j in range(5))
            assert found[n, c].item() == pytest.approx(across.item(), abs=1e-5)
            assert found[n, 3 + c].item() == pytest.approx(down.item(), abs=1e-5)
    peak = torch.zeros(1, 1, 4, 5)
    peak[0, 0, 3, 0] = 50.0
    assert SpatialSoftmax(1)(peak)[0].tolist() == pytest.approx([-1, 1])


# --- the random shift --------------------------------------------------------------------------------------------


def shifts_of(moved, images, pixels):
    """Which window of the padded images each row shows, by comparing with all of them: (down, across) per row."""
    batch, horizon, height, width, channels = images.shape
    frames = images.permute(0, 1, 4, 2, 3).reshape(batch, horizon * channels, height, width)
    padded = functional.pad(frames, (pixels,) * 4, mode="replicate").unflatten(1, (horizon, channels))
    found = []
    for row in range(batch):
        windows = {
            (down, across): padded[row, :, :, down : down + height, across : across + width].permute(0, 2, 3, 1)
            for down in range(2 * pixels + 1)
            for across in range(2 * pixels + 1)
        }
        found.append([at for at, window in windows.items() if torch.equal(window, moved[row])])
    assert all(len(at) == 1 for at in found), found
    return [at[0] for at in found]


def test_a_random_shift_is_a_window_of_the_padded_images_for_a_rows_whole_history():
    images = torch.rand(60, 3, 9, 12, 2, generator=seeded(0))
    torch.manual_seed(0)
    shifts = shifts_of(random_shift(images, 2), images, 2)  # one window explains all three frames
    assert {down for down, _ in shifts} == {across for _, across in shifts} == set(range(5))
    assert len(set(shifts)) > 15


def test_training_shifts_rows_and_cameras_apart_and_evaluation_shifts_nothing():
    shapes = {"a": (16, 16, 3), "b": (16, 16, 3)}
    encoder, seen = make(shapes=shapes, shift=3), []
    for camera in encoder.cameras:
        camera.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].permute(0, 2, 3, 1).unflatten(0, (8, 2)))
        )
    images = observations(8, {"a": (16, 16, 3)})["a"]
    torch.manual_seed(0)
    encoder({"a": images, "b": images})
    first, second = (shifts_of(moved, images, 3) for moved in seen)
    assert len(set(first)) > 4
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 4
    seen.clear()
    encoder.eval()({"a": images, "b": images})
    assert all(torch.equal(moved, images) for moved in seen)


def test_without_shift_noise_and_dropout_training_draws_nothing():
    encoder, given = make(shift=0), observations()
    state = torch.get_rng_state()
    encoder(given)
    assert torch.equal(torch.get_rng_state(), state)


# --- learning ----------------------------------------------------------------------------------------------------


def blobs(rows, generator):
    """Images of one bright spot on noise, (rows, 1, 32, 32, 3) within -1..1, and where it is, (rows, 2)."""
    position = 1.6 * torch.rand(rows, 2, generator=generator) - 0.8
    grid = torch.linspace(-1, 1, 32)
    across = torch.exp(-(((grid - position[:, :1]) / 0.12) ** 2))
    down = torch.exp(-(((grid - position[:, 1:]) / 0.12) ** 2))
    spot = 1.5 * down[:, None, :, None, None] * across[:, None, None, :, None]
    return {"image": -0.75 + spot + 0.1 * torch.rand(rows, 1, 32, 32, 3, generator=generator)}, position


def test_the_image_encoder_learns_where_a_spot_is():
    torch.manual_seed(0)
    encoder = ImageEncoder(shapes={"image": (32, 32, 3)}, obs_horizon=1, obs_size=32, shift=0)
    model = nn.Sequential(encoder, nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = seeded(0)
    unseen, where = blobs(500, seeded(1))
    mean = where.std().item()  # what predicting the mean comes to: 0.46
    pixel = 2 / 31
    for _ in range(6):
        for _ in range(50):
            images, position = blobs(32, generator)
            optimizer.zero_grad()
            (model(images) - position).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            error = (model(unseen) - where).square().mean().sqrt().item()
        if error < min(pixel / 2, mean / 15):
            return
    pytest.fail(f"after 300 steps it is off by {error}")


# --- as a part of the policy -------------------------------------------------------------------------------------


def test_a_policy_sees_bytes_and_vectors_and_acts():
    torch.manual_seed(0)
    config = PolicyConfig(
        observation_shapes={"image": (32, 32, 3), "state": (5,)},
        action_dim=2,
        encoder={"name": "image", "channels": [16, 32]},
        denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
    )
    policy = DiffusionPolicy(config)
    g = seeded(0)
    seen = {
        "image": torch.randint(256, (4, 2, 32, 32, 3), dtype=torch.uint8, generator=g),
        "state": torch.randn(4, 2, 5, generator=g),
    }
    batch = {"observations": seen, "actions": torch.randn(4, 8, 2, generator=g), "mask": torch.ones(4, 8).bool()}
    assert policy.loss(batch, generator=seeded(1)).isfinite()
    policy.eval()
    scaled = {"image": seen["image"].float() / 127.5 - 1, "state": seen["state"]}
    assert torch.allclose(policy.embed(seen), policy.encoder(scaled), atol=1e-6)
    assert policy.sample_actions(seen, generator=seeded(2)).shape == (4, 8, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": {"state": (5,)}}, r"needs an image; \['state'\] are vectors: choose encoder=state"),
        ({"shapes": {"image": (3, 96, 96)}}, r"\(height, width, channels\).*'image' has shape \(3, 96, 96\)"),
        ({"shapes": {"image": (96, 96, 2)}}, r"1, 3 or 4 channels; observation 'image' has shape \(96, 96, 2\)"),
        ({"shapes": {"image": (15, 96, 3)}}, r"16 pixels or more .* \(15, 96, 3\)"),
        ({"shapes": {"image": (96, 96)}}, r"'image' has shape \(96, 96\)"),
        ({"channels": ()}, r"channels must be one or more multiples of 16; got \(\)"),
        ({"channels": (16, 40)}, r"multiples of 16; got \(16, 40\)"),
        ({"channels": (0,)}, r"multiples of 16; got \(0,\)"),
        ({"features": 0}, "features must be 1 or more; got 0"),
        ({"hidden_size": 0}, "hidden_size must be 1 or more; got 0"),
        ({"shift": -1}, "shift must be 0 or more; got -1"),
        ({"noise": -0.1}, r"encoder\.noise must be 0 or more; got -0.1"),
    ],
)
def test_what_the_image_encoder_cannot_take_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("hidden_size", [0, -1])
def test_a_state_encoder_without_a_hidden_layer_is_refused(hidden_size):
    with pytest.raises(ValueError, match=rf"encoder\.hidden_size must be 1 or more; got {hidden_size}"):
        make("state", {"state": (3,)}, hidden_size=hidden_size)


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_a_state_encoder_with_negative_noise_is_refused(noise):
    with pytest.raises(ValueError, match=rf"encoder\.noise must be 0 or more; got {noise}"):
        make("state", {"state": (3,)}, noise=noise)
