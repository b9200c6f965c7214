"""The policy as a whole: a 287-wide embedding, a masked loss, and samples in the data's units."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from policy.model.config import PolicyConfig, config_from_json, config_to_json
from policy.model.denoisers import DENOISERS
from policy.model.diffusion_policy import DiffusionPolicy

LOW, HIGH = torch.tensor([-3.0, 10.0]), torch.tensor([1.0, 30.0])
SHAPES = {"state": (5,), "goal": (3,)}
SMALL_MLP = {"hidden_size": 32, "num_layers": 2}
DENOISER_SIZES = {
    "residual_mlp": SMALL_MLP,
    "modulated_mlp": SMALL_MLP,
    "unet": {"widths": [16, 32], "timestep_size": 32},
    "transformer": {**SMALL_MLP, "num_heads": 2},
    "encoder_decoder": {**SMALL_MLP, "num_heads": 2},
}
SMALL = {"denoiser": {"name": "modulated_mlp", **SMALL_MLP}}


def make_policy(**changes):
    torch.manual_seed(0)
    policy = DiffusionPolicy(PolicyConfig(**{"observation_shapes": SHAPES, "action_dim": 2, **SMALL, **changes}))
    policy.action_normalizer.fit(LOW.numpy(), HIGH.numpy())
    return policy


def randomise(policy):
    """Weights away from the zeros that a fresh denoiser puts out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def observations(rows=4, seed=0):
    g = seeded(seed)
    return {key: torch.randn(rows, 2, *shape, generator=g) for key, shape in SHAPES.items()}


def batch():
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, 5:] = False
    mask[2, 1:] = False
    share = torch.rand(4, 8, 2, generator=seeded(1))
    return {"observations": observations(), "actions": LOW + share * (HIGH - LOW), "mask": mask}


# --- the embedding -----------------------------------------------------------------------------------------------


def test_the_embedding_is_287_wide_and_feeds_the_denoiser():
    policy = make_policy()
    assert policy.embed(observations()).shape == (4, 287)
    assert policy.denoiser.project_observation.in_features == 287
    assert make_policy(obs_size=16).embed(observations()).shape == (4, 16)


def test_every_observation_of_every_key_reaches_the_embedding():
    policy = make_policy()
    plain = policy.embed(observations())
    for key, shape in SHAPES.items():
        for step in (0, 1):
            for i in range(shape[0]):
                changed = observations()
                changed[key][:, step, i] += 1
                assert ((policy.embed(changed) - plain).abs().amax(dim=1) > 1e-4).all()


def test_the_order_of_the_keys_does_not_matter():
    policy, given = make_policy(), observations()
    assert torch.equal(policy.embed(dict(reversed(given.items()))), policy.embed(given))


def test_observations_are_normalised_with_their_own_statistics():
    policy, plain = make_policy(), make_policy()
    policy.observation_normalizers["goal"].fit([10.0] * 3, [30.0] * 3)
    given = observations()
    in_units = {"state": given["state"], "goal": 20 + 10 * given["goal"]}
    assert torch.allclose(policy.embed(in_units), plain.embed(given), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8, torch.int64])
def test_observations_of_any_dtype_are_accepted(dtype):
    policy = make_policy()
    given = {key: (10 * value).to(dtype) for key, value in observations().items()}
    embedding = policy.embed(given)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, policy.embed({key: value.float() for key, value in given.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.pop("goal"), r"must have the keys \['goal', 'state'\]; got \['state'\]"),
        (lambda o: o.update(image=torch.zeros(4, 2, 1)), r"got \['goal', 'image', 'state'\]"),
        (lambda o: o.update(state=torch.zeros(4, 5)), r"'state' must have shape \(B, 2, 5\); got \(4, 5\)"),
        (lambda o: o.update(state=torch.zeros(4, 3, 5)), r"'state' must have shape .* got \(4, 3, 5\)"),
        (lambda o: o.update(goal=torch.zeros(4, 2, 1)), r"'goal' must have shape \(B, 2, 3\); got \(4, 2, 1\)"),
        (lambda o: o.update(goal=torch.zeros(2, 3)), r"'goal' must have shape \(B, 2, 3\); got \(2, 3\)"),
    ],
)
def test_observations_that_do_not_fit_are_refused_by_name(change, message):
    policy, given = make_policy(), observations()
    change(given)
    for use in (policy.embed, policy.sample_actions, lambda o: policy.loss({**batch(), "observations": o})):
        with pytest.raises(ValueError, match=message):
            use(given)


# --- the loss ----------------------------------------------------------------------------------------------------


class Elementwise(nn.Module):
    """A denoiser that looks at each number on its own, so that padding can only enter through the loss."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, noisy, timestep, embedding):
        self.seen = noisy, timestep, embedding
        return 0.3 * noisy - 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_over_the_actions_that_exist(prediction_type):
    policy = make_policy(prediction_type=prediction_type)
    policy.denoiser = Elementwise()
    given = batch()
    loss = policy.loss(given, generator=seeded(7))
    noisy, timestep, embedding = policy.denoiser.seen
    assert torch.equal(embedding, policy.embed(given["observations"]))
    # Worked out number by number, from what the network was given.
    levels, errors = policy.schedule.alphas_cumprod.tolist(), []
    for b in range(4):
        level = levels[int(timestep[b])]
        for h in range(8):
            for d in range(2 if given["mask"][b, h] else 0):
                low, high = LOW[d].item(), HIGH[d].item()
                x_0 = 2 * (given["actions"][b, h, d].item() - low) / (high - low) - 1
                x_t = noisy[b, h, d].item()
                noise = (x_t - math.sqrt(level) * x_0) / math.sqrt(1 - level)
                velocity = math.sqrt(level) * noise - math.sqrt(1 - level) * x_0
                target = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[prediction_type]
                errors.append((0.3 * x_t - 0.1 - target) ** 2)
    assert len(errors) == 2 * (5 + 8 + 1 + 8)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_values_of_masked_actions_do_not_change_the_loss():
    policy = make_policy()
    policy.denoiser = Elementwise()
    given = batch()
    other = {**given, "actions": torch.where(given["mask"][..., None], given["actions"], 1e4)}
    assert not torch.equal(other["actions"], given["actions"])
    assert policy.loss(other, generator=seeded(1)) == policy.loss(given, generator=seeded(1))
    unmasked = {**other, "mask": torch.ones(4, 8, dtype=torch.bool)}
    assert policy.loss(unmasked, generator=seeded(1)) > 10 * policy.loss(given, generator=seeded(1))


def test_a_batch_without_any_real_action_has_no_loss():
    given = {**batch(), "mask": torch.zeros(4, 8, dtype=torch.bool)}
    assert make_policy().loss(given, generator=seeded(1)).item() == 0


def test_each_chunk_at_three_timesteps_is_a_batch_of_three_copies_whose_observations_are_encoded_once():
    policy, given, seen = randomise(make_policy()), batch(), []
    policy.encoder.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    copies = {key: value.repeat_interleave(3, dim=0) for key, value in given.items() if key != "observations"}
    copies["observations"] = {key: value.repeat_interleave(3, dim=0) for key, value in given["observations"].items()}
    loss = policy.loss(given, seeded(1), timesteps_per_chunk=3)
    torch.testing.assert_close(loss, policy.loss(copies, seeded(1)), rtol=1e-5, atol=0)
    assert seen == [4, 12]


@pytest.mark.parametrize(
    ("timesteps", "noises", "message"),
    [
        (6, 6, "a multiple of the 4 chunks; got 6"),
        (8, 4, r"noise must have shape \(8, 8, 2\); got \(4, 8, 2\)"),
    ],
)
def test_timesteps_and_noise_that_do_not_fit_the_chunks_are_refused(timesteps, noises, message):
    with pytest.raises(ValueError, match=message):
        make_policy().squared_errors(
            batch(), torch.zeros(4, 287), torch.zeros(timesteps, dtype=torch.int64), torch.zeros(noises, 8, 2)
        )


AUXILIARY = {"auxiliary_shapes": {"pose": (3,)}, "auxiliary_weight": 0.5}


def test_auxiliary_observations_are_told_by_the_embedding_and_never_seen():
    plain, policy, given = make_policy(), make_policy(**AUXILIARY), batch()
    extra = [name for name in policy.state_dict() if name.startswith("auxiliary_")]
    assert {k: v for k, v in policy.state_dict().items() if k not in extra}.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, policy.state_dict()[key]) for key, value in plain.state_dict().items())
    randomise(policy)
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if k not in extra})
    policy.auxiliary_normalizers["pose"].fit(
        torch.tensor([0.0, -2.0, 5.0]).numpy(), torch.tensor([4.0, 2.0, 7.0]).numpy()
    )
    pose = torch.randn(4, 2, 3, generator=seeded(4))
    told = policy.auxiliary_heads["pose"](policy.embed(given["observations"]))
    target = (pose[:, -1] - torch.tensor([2.0, 0.0, 6.0])) / torch.tensor([2.0, 2.0, 1.0])
    seen = {**given, "observations": {**given["observations"], "pose": pose}}
    expected = plain.loss(given, seeded(1)) + 0.5 * (told - target).square().mean()
    torch.testing.assert_close(policy.loss(seen, seeded(1)), expected)
    with pytest.raises(ValueError, match=r"must have the keys \['goal', 'state'\]; got \['goal', 'pose', 'state'\]"):
        policy.sample_actions(seen["observations"])


# Names that torch's own modules use.
TORCH_NAMES = ("type", "values", "to", "training", "forward", "keys", "items", "_modules", "T_destination", "half/")


def test_observations_may_have_names_that_torch_uses_itself(tmp_path):
    shapes = {name: (2,) for name in TORCH_NAMES}
    policy = make_policy(observation_shapes=shapes, auxiliary_shapes={"eval": (2,), "pose": (3,)})
    randomise(policy)
    policy.train()
    assert list(copy.deepcopy(policy).observation_normalizers) == list(TORCH_NAMES)
    given = {name: torch.randn(3, 2, 2, generator=seeded(1)) for name in shapes}
    policy.save_pretrained(tmp_path)
    loaded = DiffusionPolicy.from_pretrained(tmp_path)
    assert "eval" in loaded.auxiliary_heads
    assert "pose" in loaded.auxiliary_heads
    noise = torch.zeros(3, 8, policy.config.action_dim)
    expected = policy.eval().sample_actions(given, noise=noise)
    torch.testing.assert_close(loaded.sample_actions(given, noise=noise), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auxiliary_shapes": {"state": (5,)}}, "auxiliary 'state' must be a vector that the policy does not observe"),
        ({"auxiliary_shapes": {"depth": (8, 8, 1)}}, r"auxiliary 'depth' must be a vector .*got shape \(8, 8, 1\)"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight must be 0 or more; got -1.0"),
    ],
)
def test_auxiliary_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**changes)


def test_the_loss_is_decided_by_the_generator():
    policy = randomise(make_policy())
    losses = [policy.loss(batch(), generator=seeded(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    policy.loss(batch(), generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_timesteps_and_noise_cover_their_whole_range():
    policy = make_policy()
    policy.denoiser = Elementwise()
    rows = 4000
    actions = ((LOW + HIGH) / 2).expand(rows, 8, 2)  # normalises to 0, so that x_t is noise alone
    given = {"observations": observations(rows), "actions": actions, "mask": torch.ones(rows, 8, dtype=torch.bool)}
    policy.loss(given, generator=seeded(3))
    noisy, timestep, _ = policy.denoiser.seen
    assert set(timestep.tolist()) == set(range(100))
    sigma = policy.schedule.sqrt_one_minus_alphas_cumprod[timestep].float()[:, None, None]
    noise = noisy / sigma
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.var().item() == pytest.approx(1, rel=5 * math.sqrt(2 / noise.numel()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_each_rows_error_by_its_timestep(prediction_type):
    plain = make_policy(prediction_type=prediction_type)
    weighted = make_policy(prediction_type=prediction_type, loss_weighting="min_snr", min_snr_gamma=2.0)
    given, levels = batch(), plain.schedule.alphas_cumprod.tolist()
    total = 0.0
    plain.denoiser = weighted.denoiser = Elementwise()
    for row in range(4):
        # One row at a time through the unweighted loss, with the noise and the timestep that it has in the batch.
        mask = torch.zeros_like(given["mask"])
        mask[row] = given["mask"][row]
        loss = plain.loss({**given, "mask": mask}, generator=seeded(7)).item()
        level = levels[int(plain.denoiser.seen[1][row])]
        snr = level / (1 - level)
        weight = min(snr, 2.0) / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
        total += weight * loss * mask.sum().item()
    expected = total / given["mask"].sum().item()
    assert weighted.loss(given, generator=seeded(7)).item() == pytest.approx(expected, rel=1e-4)
    assert plain.loss(given, generator=seeded(7)).item() != pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_training_with_min_snr_lowers_the_plain_loss(prediction_type):
    policy = make_policy(prediction_type=prediction_type, loss_weighting="min_snr")
    plain = make_policy(prediction_type=prediction_type)
    optimizer, generator = torch.optim.Adam(policy.parameters(), lr=3e-3), seeded(0)

    def error():
        plain.load_state_dict(policy.state_dict())
        with torch.no_grad():
            return plain.loss(batch(), generator=seeded(0), timesteps_per_chunk=50).item()

    before = error()
    for _ in range(150):
        optimizer.zero_grad()
        policy.loss(batch(), generator=generator).backward()
        optimizer.step()
    assert error() < 0.7 * before


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_policy_with_zero_terminal_snr_trains_and_samples_in_one_step(prediction_type):
    schedule = {"num_steps": 100, "beta_schedule": "squaredcos_cap_v2", "zero_terminal_snr": True}
    policy = make_policy(prediction_type=prediction_type, schedule=schedule)
    optimizer, generator, given = torch.optim.Adam(policy.parameters(), lr=3e-3), seeded(0), batch()
    given["mask"] = torch.ones(4, 8, dtype=torch.bool)

    def error(ddim_steps):
        chunk = policy.sample_actions(given["observations"], ddim_steps=ddim_steps, generator=seeded(5))
        return ((chunk - given["actions"]).abs() / (HIGH - LOW)).mean().item()

    for _ in range(8):
        for _ in range(50):
            optimizer.zero_grad()
            policy.loss(given, generator=generator).backward()
            optimizer.step()
        if max(error(1), error(8)) < 0.15:  # 0.23 or more untrained
            return
    pytest.fail(f"after 400 steps it is off by {error(1)} with one step and by {error(8)} with eight")


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_training_lowers_the_loss_and_reaches_every_parameter(denoiser):
    policy = make_policy(denoiser={"name": denoiser, **DENOISER_SIZES[denoiser]})
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    given, generator, reached = batch(), seeded(0), set()

    def validation():
        with torch.no_grad():
            return policy.loss(given, generator=seeded(0), timesteps_per_chunk=50).item()

    before, names = validation(), {name for name, _ in policy.named_parameters()}
    for _ in range(6):
        for _ in range(25):
            optimizer.zero_grad()
            policy.loss(given, generator=generator).backward()
            if reached != names:
                reached |= {name for name, p in policy.named_parameters() if p.grad.abs().max() > 0}
            optimizer.step()
        if validation() < 0.5 * before:
            break
    assert validation() < 0.5 * before
    assert reached == names


@pytest.mark.parametrize(
    "change",
    [
        {"actions": torch.zeros(4, 8, 1)},  # would broadcast over both action dimensions
        {"actions": torch.zeros(4, 8, 3)},
        {"actions": torch.zeros(4, 7, 2)},
        {"actions": torch.zeros(8, 2)},
        {"mask": torch.ones(4, 1, dtype=torch.bool)},  # would broadcast over the chunk, and change the mean
        {"mask": torch.ones(8, dtype=torch.bool)},
    ],
)
def test_a_batch_of_other_shapes_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        make_policy().loss({**batch(), **change}, generator=seeded(0))


# --- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_samples_are_in_the_datas_units_and_inside_its_limits(eta):
    policy = randomise(make_policy())
    chunk = policy.sample_actions(observations(50), eta=eta, generator=seeded(0))
    assert chunk.shape == (50, 8, 2)
    assert chunk.dtype == torch.float32
    rounding = 1e-5
    assert (chunk >= LOW - rounding).all()
    assert (chunk <= HIGH + rounding).all()
    span = chunk.amax(dim=(0, 1)) - chunk.amin(dim=(0, 1))
    assert (span > 0.5 * (HIGH - LOW)).all()  # in the data's units, not within -1..1
    free = policy.sample_actions(observations(50), eta=eta, clip=None, generator=seeded(0))
    assert ((free < LOW - 1) | (free > HIGH + 1)).any()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_sampling_is_deterministic_given_the_generator(spacing, eta):
    policy = randomise(make_policy())
    chunks = [policy.sample_actions(observations(), eta=eta, spacing=spacing, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(chunks[0], chunks[1])
    assert ((chunks[0] - chunks[2]).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_sampling_is_deterministic_given_the_noise():
    policy = randomise(make_policy())
    noise = torch.randn(4, 8, 2, generator=seeded(0))
    first = policy.sample_actions(observations(), noise=noise)
    assert torch.equal(first, policy.sample_actions(observations(), noise=noise))
    assert torch.equal(first, policy.sample_actions(observations(), generator=seeded(0)))
    arrays = {key: value.numpy() for key, value in observations().items()}
    assert torch.equal(first, policy.sample_actions(arrays, noise=noise))
    assert torch.equal(noise, torch.randn(4, 8, 2, generator=seeded(0)))
    assert not torch.equal(first, policy.sample_actions(observations(), noise=-noise))


def test_sampling_in_evaluation_is_deterministic_whatever_noise_and_dropout_training_uses():
    policy = make_policy(
        encoder={"name": "state", "noise": 0.5, "dropout": 0.5},
        denoiser={**SMALL["denoiser"], "dropout": 0.5},
    )
    randomise(policy)
    torch.manual_seed(0)
    assert not torch.equal(policy.embed(observations()), policy.embed(observations()))
    policy.eval()
    first = policy.sample_actions(observations(), generator=seeded(1))
    assert torch.equal(first, policy.sample_actions(observations(), generator=seeded(1)))


def test_the_global_generator_plays_no_part_when_one_is_passed():
    policy = randomise(make_policy())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    policy.sample_actions(observations(), eta=1.0, generator=seeded(1))
    policy.sample_actions(observations(), eta=1.0, generator=[seeded(i) for i in range(4)])
    assert torch.equal(torch.get_rng_state(), state)


def test_each_row_draws_from_its_own_generator():
    policy = randomise(make_policy())
    policy.denoiser = Elementwise()
    together = policy.sample_actions(observations(), eta=1.0, generator=[seeded(10 + i) for i in range(4)])
    for row in range(4):
        alone = policy.sample_actions(observations(1), eta=1.0, generator=[seeded(10 + row)])
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_sampling_leaves_no_gradient_behind():
    assert not make_policy().sample_actions(observations(), generator=seeded(0)).requires_grad


def test_the_sampler_settings_reach_ddim():
    policy, calls = randomise(make_policy()), []
    policy.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1].tolist()))
    noise = torch.randn(4, 8, 2, generator=seeded(0))
    for ddim_steps in (1, 3, 30, 100):
        calls.clear()
        policy.sample_actions(observations(), ddim_steps=ddim_steps, noise=noise)
        assert len(calls) == ddim_steps
        assert calls[0] == [99] * 4
    calls.clear()
    policy.sample_actions(observations(), ddim_steps=8, spacing="leading", noise=noise)
    assert calls[0] == [84] * 4
    etas = [policy.sample_actions(observations(), eta=eta, noise=noise, generator=seeded(1)) for eta in (0.0, 0.3, 1.0)]
    assert ((etas[0] - etas[1]).abs().amax(dim=(1, 2)) > 1e-3).all()
    assert ((etas[1] - etas[2]).abs().amax(dim=(1, 2)) > 1e-3).all()
    narrow = policy.sample_actions(observations(), clip=0.1, noise=noise)
    centre = (LOW + HIGH) / 2
    assert ((narrow - centre).abs() <= 0.1001 * (HIGH - LOW) / 2).all()


@pytest.mark.parametrize("shape", [(4, 8, 1), (4, 7, 2), (3, 8, 2), (8, 2)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise must have shape \(4, 8, 2\); got "):
        make_policy().sample_actions(observations(), noise=torch.zeros(shape))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_generators_than_rows_is_refused(count):
    generators = [seeded(i) for i in range(count)]
    with pytest.raises(ValueError, match=f"{count}"):
        make_policy().sample_actions(observations(), generator=generators)
    with pytest.raises(ValueError, match=f"got {count} for a batch of 4"):
        make_policy().sample_actions(observations(), generator=generators, noise=torch.zeros(4, 8, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ddim_steps": 0}, r"within 1\.\.100 .*got 0"),
        ({"ddim_steps": 101}, r"within 1\.\.100 .*got 101"),
        ({"eta": 1.5}, "eta must lie"),
        ({"spacing": "x"}, "unknown spacing 'x'.*; allowed: leading, linspace, trailing"),
        ({"clip": -1.0}, "clip must be positive"),
    ],
)
def test_sampler_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_policy().sample_actions(observations(), generator=seeded(0), **settings)


def test_a_policy_trained_on_one_chunk_samples_that_chunk():
    policy = make_policy(observation_shapes={"state": (5,)})
    given = {key: value[1:2] for key, value in batch().items() if key != "observations"}
    given["observations"] = {"state": observations(1)["state"]}
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    generator = seeded(0)
    for _ in range(300):
        optimizer.zero_grad()
        policy.loss(given, generator=generator).backward()
        optimizer.step()
    chunk = policy.sample_actions(given["observations"], generator=seeded(5))
    assert ((chunk - given["actions"]).abs() / (HIGH - LOW)).max() < 0.05


# --- configuration -----------------------------------------------------------------------------------------------

CONFIGS = [
    PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2),
    PolicyConfig(
        observation_shapes={"a": (3,), "b": (7,)},
        action_dim=4,
        obs_horizon=3,
        action_horizon=16,
        obs_size=64,
        prediction_type="epsilon",
        encoder={"name": "state", "hidden_size": 32, "noise": 0.1},
        denoiser={"name": "residual_mlp", "hidden_size": 16, "dropout": 0.1},
        schedule={"num_steps": 50, "beta_schedule": "linear"},
    ),
    PolicyConfig(
        observation_shapes={"state": (5,)},
        action_dim=2,
        prediction_type="v_prediction",
        loss_weighting="min_snr",
        min_snr_gamma=3.0,
        denoiser={"name": "unet", "widths": [16, 32], "timestep_size": 16},
    ),
    PolicyConfig(
        observation_shapes={"state": (5,)},
        action_dim=2,
        denoiser={"name": "transformer", "hidden_size": 16},
        schedule={"num_steps": 50, "zero_terminal_snr": True},
    ),
    PolicyConfig(
        observation_shapes={"state": (5,)},
        action_dim=2,
        sigma_data=0.5,
        denoiser={"name": "modulated_mlp", "hidden_size": 16},
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_survives_json(config):
    back = config_from_json(json.loads(json.dumps(config_to_json(config))))
    assert back == config
    assert all(isinstance(shape, tuple) for shape in back.observation_shapes.values())
    assert [tuple(p.shape) for p in DiffusionPolicy(back).parameters()] == [
        tuple(p.shape) for p in DiffusionPolicy(config).parameters()
    ]


def test_a_configuration_written_before_a_setting_existed_has_its_default():
    data = config_to_json(CONFIGS[0])
    for name in ("loss_weighting", "min_snr_gamma", "sigma_data"):
        del data[name]
    assert config_from_json(data) == CONFIGS[0]


def test_weights_and_statistics_load_into_a_policy_of_the_same_configuration():
    policy = randomise(make_policy())
    other = DiffusionPolicy(config_from_json(json.loads(json.dumps(config_to_json(policy.config)))))
    other.load_state_dict(policy.state_dict())
    chunks = [p.sample_actions(observations(), generator=seeded(0)) for p in (policy, other)]
    assert torch.equal(*chunks)


@pytest.mark.parametrize(
    "key", ["action_normalizer.center", "observation_normalizers.goal.half_range", "denoiser.leave.weight"]
)
def test_weights_without_statistics_do_not_load(key):
    state = make_policy().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        make_policy().load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": {"name": "modulated_mpl"}}, r"denoiser 'modulated_mpl' \(did you mean 'modulated_mlp'\?\)"),
        ({"encoder": {"name": "stat"}}, r"unknown encoder 'stat' \(did you mean 'state'\?\)"),
        ({"denoiser": {"name": "modulated_mlp", "hiden_size": 3}}, r"'hiden_size' \(did you mean 'hidden_size'\?\)"),
        ({"denoiser": {"name": "modulated_mlp", "num_layers": "x"}}, r"denoiser\.num_layers should be int; got 'x'"),
        ({"denoiser": {"name": "modulated_mlp", "action_dim": 3}}, r"denoiser\.action_dim follows from the rest"),
        ({"encoder": {"name": "state", "obs_size": 3}}, r"encoder\.obs_size follows from the rest"),
        ({"schedule": {"num_step": 3}}, r"setting of schedule 'num_step' \(did you mean 'num_steps'\?\)"),
        (
            {"schedule": {"beta_schedule": "cosine"}},
            "unknown beta_schedule 'cosine'.*; allowed: linear, squaredcos_cap_v2",
        ),
        ({"prediction_type": "eps"}, "unknown prediction_type 'eps'.*; allowed: epsilon, sample, v_prediction"),
        ({"loss_weighting": "minsnr"}, "unknown loss_weighting .minsnr. .did you mean .min_snr...."),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be a number above 0; got 0.0"),
        ({"min_snr_gamma": math.nan}, "min_snr_gamma must be a number above 0; got nan"),
        (
            {"prediction_type": "epsilon", "schedule": {"zero_terminal_snr": True}},
            "prediction_type=epsilon cannot be sampled .*zero_terminal_snr",
        ),
        (
            {"loss_weighting": "min_snr", "schedule": {"zero_terminal_snr": True}},
            "loss_weighting=min_snr gives no weight to the last timestep",
        ),
        *(
            ({"sigma_data": wrong}, r"sigma_data must be within 0.01..10.0")
            for wrong in (0.0, -1.0, 1e-9, 1e200, math.nan)
        ),
        ({"sigma_data": 0.5, "prediction_type": "v_prediction"}, "use prediction_type=sample; got .*=v_prediction"),
        ({"sigma_data": 0.5, "objective": "flow"}, "objective=flow has no sigma_data"),
        ({"sigma_data": 0.5, "schedule": {"zero_terminal_snr": True}}, "needs signal at every timestep"),
        ({"schedule": {"zero_terminal_snr": "perhaps"}}, r"schedule\.zero_terminal_snr should be bool; got 'perhaps'"),
        ({"denoiser": {"name": "unet", "widths": [12]}}, r"multiple of groups=8 and larger; got \[12\]"),
        ({"denoiser": {"name": "encoder_decoder", "obs_tokens": 7}}, "past_actions must be 6 or more .*; got 0"),
        ({"denoiser": {"name": "unet", "widths": 12}}, r"denoiser\.widths should be .*; got 12"),
        ({"observation_shapes": {}}, "at least one observation key"),
        ({"observation_shapes": {"image": (3, 8, 8)}}, r"takes vectors; observation 'image' has shape \(3, 8, 8\)"),
        ({"action_dim": 0}, "action_dim must be 1 or more; got 0"),
        ({"obs_horizon": 0}, "obs_horizon must be 1 or more; got 0"),
        ({"action_horizon": -1}, "action_horizon must be 1 or more; got -1"),
        ({"obs_size": 0}, "obs_size must be 1 or more; got 0"),
    ],
)
def test_unknown_parts_and_settings_are_refused_with_the_nearest_name(changes, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_horizn": 3}, r"unknown setting of policy 'obs_horizn' \(did you mean 'obs_horizon'\?\)"),
        ({"obs_horizon": "two"}, r"policy\.obs_horizon should be int; got 'two'"),
        ({"observation_shapes": {"state": "wide"}}, r"policy\.observation_shapes should be"),
        ({"denoiser": "modulated_mlp"}, r"policy\.denoiser should be"),
    ],
)
def test_a_damaged_configuration_is_refused(changes, message):
    data = {**config_to_json(CONFIGS[0]), **changes}
    with pytest.raises(ValueError, match=message):
        config_from_json(data)
