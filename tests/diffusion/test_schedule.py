"""The noise schedule: float64 levels, almost no signal at the end, and conversions that undo each other."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.diffusion.coefficients import ddim_coefficients
from policy.diffusion.ddim import ddim_sample, ddim_step, ddim_timesteps
from policy.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule, loss_weights, make_schedule

KINDS = ("linear", "squaredcos_cap_v2")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_linear_schedule_at_1000_timesteps_has_exactly_the_documented_endpoints():
    schedule = make_schedule()
    assert schedule.num_steps == 1000
    assert torch.equal(schedule.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    # The figure that DDPM's schedule is known for.
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [20, 100, 1000])
def test_levels_are_float64_products_of_the_betas(kind, num_steps):
    schedule = make_schedule(num_steps=num_steps, beta_schedule=kind)
    betas = schedule.betas.tolist()
    # Sums of logarithms: another route to the same product.
    expected = [math.exp(math.fsum(math.log1p(-b) for b in betas[: t + 1])) for t in range(num_steps)]
    assert schedule.alphas_cumprod.tolist() == pytest.approx(expected, rel=1e-12)
    levels = {
        "alphas": [1 - b for b in betas],
        "sqrt_alphas_cumprod": [math.sqrt(a) for a in expected],
        "sqrt_one_minus_alphas_cumprod": [math.sqrt(1 - a) for a in expected],
    }
    for name, values in levels.items():
        level = getattr(schedule, name)
        assert level.dtype == torch.float64, name
        assert level.tolist() == pytest.approx(values, rel=1e-9), name


def test_betas_given_in_float32_still_give_float64_levels():
    schedule = NoiseSchedule(torch.linspace(1e-4, 0.02, 1000))
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    in_float32 = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0).double()
    in_float64 = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), dim=0)
    assert torch.equal(schedule.alphas_cumprod, in_float64)
    assert not torch.equal(schedule.alphas_cumprod, in_float32)


@pytest.mark.parametrize(("num_steps", "unscaled"), [(100, 0.36), (20, 0.82)])
def test_few_timesteps_still_end_in_almost_pure_noise(num_steps, unscaled):
    # The fault: the endpoints of 1000 timesteps, used as they are.
    fault = NoiseSchedule(torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64))
    assert fault.alphas_cumprod[-1].item() == pytest.approx(unscaled, abs=0.01)
    scaled = make_schedule(num_steps=num_steps)
    assert scaled.alphas_cumprod[-1].item() < 1e-4
    assert scaled.betas[0].item() == pytest.approx(1e-4 * 1000 / num_steps, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_that_is_not_refused_ends_below_one_percent_of_signal(kind):
    for num_steps in [*range(2, 60), 75, 100, 250, 500, 999, 1001, 4000]:
        schedule = make_schedule(num_steps=num_steps, beta_schedule=kind)
        assert schedule.alphas_cumprod[-1].item() <= 0.01, num_steps
        assert bool((schedule.alphas_cumprod.diff() < 0).all()), num_steps


@pytest.mark.parametrize(
    "arguments",
    [{"num_steps": 1}, {"num_steps": 100, "beta_end": 0.002}, {"beta_start": 1e-4, "beta_end": 1e-4}],
)
def test_a_schedule_that_keeps_signal_at_the_end_is_refused(arguments):
    with pytest.raises(ValueError, match=r"ends at ᾱ = 0\.\d+.*0\.01 or less"):
        make_schedule(**arguments)


@pytest.mark.parametrize("num_steps", [1, 2, 20, 100, 1000])
def test_squared_cosine_betas_equal_diffusers(num_steps):
    ours = make_schedule(num_steps=num_steps, beta_schedule="squaredcos_cap_v2").betas
    theirs = betas_for_alpha_bar(num_steps)  # float32
    assert torch.equal(ours.float(), theirs) or torch.allclose(ours.float(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_schedule": "cosine"}, "unknown beta_schedule 'cosine'.*; allowed: linear, squaredcos_cap_v2"),
        ({"num_steps": 0}, "1 or more; got 0"),
        ({"num_steps": -5}, "1 or more; got -5"),
        ({"num_steps": 10.0}, "whole number of 1 or more; got 10.0"),
        ({"num_steps": True}, "whole number of 1 or more; got True"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_start": 0.03}, "got 0.03 and 0.02"),
        ({"beta_end": 1.0}, "got 0.0001 and 1.0"),
        ({"beta_end": math.nan}, "got 0.0001 and nan"),
    ],
)
def test_bad_arguments_are_refused_with_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**arguments)


@pytest.mark.parametrize(
    "betas", [[], [0.0, 0.1], [0.1, 1.1], [1.0, 0.1], [1.0, 1.0], [-0.1], [math.nan, 0.1], [[0.1], [0.2]]]
)
def test_betas_outside_0_and_1_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be"):
        NoiseSchedule(torch.tensor(betas))


def test_the_forward_process_mixes_signal_and_noise_at_the_timesteps_level():
    schedule = make_schedule(num_steps=100)
    x_0, noise = randn(5, 3, 2), randn(5, 3, 2, seed=1)
    for t in (0, 7, 99):
        level = float(np.prod(1 - schedule.betas.numpy()[: t + 1]))
        expected = math.sqrt(level) * x_0 + math.sqrt(1 - level) * noise
        assert torch.allclose(schedule.add_noise(x_0, noise, t), expected, rtol=0, atol=1e-13)


def test_the_forward_process_agrees_with_adding_noise_one_timestep_at_a_time():
    schedule = make_schedule(num_steps=100)
    x = torch.full((200_000,), 0.8, dtype=torch.float64)
    for t in range(30):
        beta = schedule.betas[t].item()
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * randn(200_000, seed=t)
    signal, sigma = (s.item() for s in schedule.signal_and_noise(29, x))
    assert x.mean().item() == pytest.approx(0.8 * signal, abs=5 * sigma / math.sqrt(200_000))
    assert x.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * 200_000))


def test_timestep_minus_1_is_the_clean_end():
    schedule = make_schedule(num_steps=20)
    x_0, noise = randn(3, 2), randn(3, 2, seed=1)
    assert torch.equal(schedule.add_noise(x_0, noise, -1), x_0)
    mixed = schedule.add_noise(x_0, noise, torch.tensor([-1, 0, 19]))
    assert torch.equal(mixed[0], x_0[0])
    assert torch.equal(mixed[1:], schedule.add_noise(x_0[1:], noise[1:], torch.tensor([0, 19])))
    assert not torch.allclose(mixed[2], x_0[2])


def test_one_timestep_per_row_equals_each_row_on_its_own():
    schedule = make_schedule(num_steps=100)
    x_0, noise, t = randn(6, 4, 2), randn(6, 4, 2, seed=1), torch.tensor([0, 99, 3, 50, 50, 98])
    x_t = schedule.add_noise(x_0, noise, t)
    for kind in PREDICTION_TYPES:
        predicted = schedule.target(x_0, noise, t, kind)
        back = schedule.to_sample(predicted, x_t, t, kind)
        for row, timestep in enumerate(t.tolist()):
            one = slice(row, row + 1)
            assert torch.equal(x_t[one], schedule.add_noise(x_0[one], noise[one], timestep))
            assert torch.equal(predicted[one], schedule.target(x_0[one], noise[one], timestep, kind))
            assert torch.equal(back[one], schedule.to_sample(predicted[one], x_t[one], timestep, kind))


@settings(deadline=None)
@given(
    num_steps=st.sampled_from([20, 100, 1000]),
    kind=st.sampled_from(KINDS),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 10),
)
def test_conversions_undo_each_other(num_steps, kind, prediction_type, fraction, seed, scale):
    schedule = make_schedule(num_steps=num_steps, beta_schedule=kind)
    t = round(fraction * (num_steps - 1))
    x_0, noise = scale * randn(2, 3, 2, seed=seed), randn(2, 3, 2, seed=seed + 1)
    x_t = schedule.add_noise(x_0, noise, t)
    target = schedule.target(x_0, noise, t, prediction_type)
    signal = schedule.sqrt_alphas_cumprod[t].item()
    # Dividing by √ᾱ is the one ill-conditioned operation; it is needed for epsilon alone.
    tolerance = 1e-12 * (1 + scale) / (signal if prediction_type == "epsilon" else 1)
    assert torch.allclose(schedule.to_sample(target, x_t, t, prediction_type), x_0, rtol=0, atol=tolerance)
    assert torch.allclose(schedule.to_epsilon(x_0, x_t, t), noise, rtol=0, atol=1e-11 * (1 + scale))


def test_each_prediction_type_has_its_own_target():
    schedule = make_schedule(num_steps=100)
    x_0, noise, t = randn(2, 3, 2), randn(2, 3, 2, seed=1), 60
    assert torch.equal(schedule.target(x_0, noise, t, "epsilon"), noise)
    assert torch.equal(schedule.target(x_0, noise, t, "sample"), x_0)
    # v is the derivative of x_t along the angle between signal and noise (Salimans and Ho 2022, appendix D).
    angle = math.acos(math.sqrt(schedule.alphas_cumprod[t].item()))
    derivative = math.cos(angle) * noise - math.sin(angle) * x_0
    assert torch.allclose(schedule.target(x_0, noise, t, "v_prediction"), derivative, rtol=0, atol=1e-13)


def test_an_unknown_prediction_type_is_refused_by_name():
    schedule, x = make_schedule(num_steps=20), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"unknown prediction_type 'eps'.*; allowed: epsilon, sample, v_prediction"):
        schedule.target(x, x, 0, "eps")
    with pytest.raises(ValueError, match=r"unknown prediction_type 'eps'.*; allowed: epsilon, sample, v_prediction"):
        schedule.to_sample(x, x, 0, "eps")


@pytest.mark.parametrize("timestep", [-2, 20, torch.tensor([0, 20]), torch.tensor([-2, 3])])
def test_timesteps_outside_the_schedule_are_refused(timestep):
    schedule, x = make_schedule(num_steps=20), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"within -1\.\.19"):
        schedule.add_noise(x, x, timestep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_keeps_its_dtype(dtype):
    schedule = make_schedule(num_steps=20)
    x = randn(2, 3, dtype=dtype)
    assert schedule.add_noise(x, x, torch.tensor([3, 4])).dtype == dtype
    assert schedule.to_sample(x, x, 5, "epsilon").dtype == dtype
    assert schedule.to_epsilon(x, x, 5).dtype == dtype
    assert schedule.target(x, x, 5, "v_prediction").dtype == dtype


# --- zero terminal SNR -------------------------------------------------------------------------------------------

WITH_X_0 = pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [2, 20, 100, 1000])
def test_rescaled_betas_are_diffusers_and_leave_nothing_of_the_data(kind, num_steps):
    plain = make_schedule(num_steps=num_steps, beta_schedule=kind)
    schedule = make_schedule(num_steps=num_steps, beta_schedule=kind, zero_terminal_snr=True)
    assert torch.allclose(schedule.betas, rescale_zero_terminal_snr(plain.betas), rtol=1e-11, atol=1e-13)
    assert schedule.betas.dtype == torch.float64
    assert schedule.alphas_cumprod[-1].item() == 0.0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    assert bool((schedule.alphas_cumprod[:-1] > 0).all())
    assert not torch.equal(schedule.betas, plain.betas)
    x_0, noise = randn(5, 3), randn(5, 3, seed=1)
    assert torch.equal(schedule.add_noise(x_0, noise, num_steps - 1), noise)


def test_rescaling_a_schedule_that_keeps_much_signal_makes_it_a_whole_one():
    arguments = {"num_steps": 100, "beta_end": 0.002}
    with pytest.raises(ValueError, match="ends at ᾱ"):
        make_schedule(**arguments)
    assert make_schedule(**arguments, zero_terminal_snr=True).alphas_cumprod[-1] == 0


def test_a_single_timestep_cannot_be_pure_noise():
    with pytest.raises(ValueError, match="zero_terminal_snr needs num_steps of 2 or more"):
        make_schedule(num_steps=1, beta_schedule="squaredcos_cap_v2", zero_terminal_snr=True)


@WITH_X_0
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1.0])
# At eta = 1 the first step keeps nothing of x_t, and their √(1 - ᾱ_prev - σ²) of that 0 can be NaN: see the next test.
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.99])
def test_each_step_from_pure_noise_equals_diffusers(kind, prediction_type, clip, eta):
    schedule = make_schedule(num_steps=100, beta_schedule=kind, zero_terminal_snr=True)
    plain = make_schedule(num_steps=100, beta_schedule=kind)
    theirs = DDIMScheduler(
        num_train_timesteps=100,
        trained_betas=plain.betas.tolist(),
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
        clip_sample=clip is not None,
    )
    # They work in float32; their arithmetic follows the levels' dtype.
    theirs.alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(plain.betas), dim=0)
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    for ddim_steps in (1, 2, 10, 50, 100):
        theirs.set_timesteps(ddim_steps)
        timesteps = ddim_timesteps(100, ddim_steps)
        assert timesteps.tolist() == theirs.timesteps.tolist()
        assert timesteps[0] == 99
        table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
        assert bool(table.isfinite().all())
        x = randn(3, 4, 2)
        for k, t in enumerate(timesteps.tolist()):
            predicted, noise = randn(3, 4, 2, seed=2 * k + 1), randn(3, 4, 2, seed=2 * k + 2)
            expected = theirs.step(
                predicted, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise
            ).prev_sample
            previous = [*timesteps.tolist()[1:], -1][k]
            ours = ddim_step(
                x, predicted, t, previous, schedule, eta, prediction_type=prediction_type, clip=clip, noise=noise
            )
            clean = table[k, 0] * x + table[k, 1] * predicted
            clean = clean if clip is None else clean.clamp(-clip, clip)
            in_sums = table[k, 2] * x + table[k, 3] * clean + table[k, 4] * noise
            assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-10)
            assert torch.allclose(in_sums, expected, rtol=1e-9, atol=1e-9)
            x = expected


@WITH_X_0
@pytest.mark.parametrize("previous", [-1, 0, 50, 98])
def test_at_eta_1_pure_noise_is_replaced_as_in_ddpms_posterior(prediction_type, previous):
    schedule = make_schedule(num_steps=100, zero_terminal_snr=True)
    x_0, x_t, noise = randn(3, 4, 2), randn(3, 4, 2, seed=1), randn(3, 4, 2, seed=2)
    predicted = {"sample": x_0, "v_prediction": -x_0}[prediction_type]
    ours = ddim_step(
        x_t, predicted, 99, previous, schedule, 1.0, prediction_type=prediction_type, clip=None, noise=noise
    )
    assert torch.allclose(ours, schedule.add_noise(x_0, noise, previous), rtol=0, atol=1e-7)


@WITH_X_0
@pytest.mark.parametrize("ddim_steps", [1, 2, 7, 100])
def test_the_exact_network_of_one_chunk_leads_from_pure_noise_to_that_chunk(prediction_type, ddim_steps):
    schedule = make_schedule(num_steps=100, beta_schedule="squaredcos_cap_v2", zero_terminal_snr=True)
    x_0 = 0.5 * randn(2, 4, 2).clamp(-1, 1)

    def exact(x_t, timestep, _):
        return schedule.target(x_0, schedule.to_epsilon(x_0, x_t, timestep), timestep, prediction_type)

    actions = ddim_sample(
        exact,
        torch.zeros(2, 1),
        randn(2, 4, 2, seed=1),
        schedule=schedule,
        ddim_steps=ddim_steps,
        prediction_type=prediction_type,
    )
    assert torch.allclose(actions, x_0, rtol=0, atol=1e-10)


def test_epsilon_cannot_be_sampled_where_there_is_nothing_but_noise():
    schedule, x = make_schedule(num_steps=20, zero_terminal_snr=True), torch.zeros(2, 3, 2)
    message = "prediction_type=epsilon cannot be sampled from a timestep without signal.* use sample or v_prediction"
    with pytest.raises(ValueError, match=message):
        ddim_step(x, x, 19, 10, schedule)
    with pytest.raises(ValueError, match=message):
        ddim_sample(lambda x, t, o: x, torch.zeros(2, 1), x, schedule=schedule, ddim_steps=4)
    with pytest.raises(ValueError, match=message):
        schedule.to_sample(x, x, torch.tensor([3, 19]), "epsilon")
    assert bool(ddim_step(x, x, 18, 10, schedule).isfinite().all())
    assert torch.equal(schedule.to_sample(x, x, -1, "epsilon"), x)


# --- what errors count for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 1e9])
def test_min_snr_weighs_errors_of_the_clean_data_alike_whatever_is_predicted(kind, gamma):
    schedule = make_schedule(num_steps=100, beta_schedule=kind)
    x_0, error = randn(1, 3), randn(1, 3, seed=2)
    for t in range(100):
        level = schedule.alphas_cumprod[t].item()
        x_t = schedule.add_noise(x_0, randn(1, 3, seed=1), t)
        # Two estimates of x_0, as what the network would have to put out for them; their distance is the error.
        for kind_of_output in PREDICTION_TYPES:
            outputs = [
                schedule.target(x, schedule.to_epsilon(x, x_t, t), t, kind_of_output) for x in (x_0, x_0 + error)
            ]
            squared = (outputs[0] - outputs[1]).square().sum()
            weighted = loss_weights(schedule, kind_of_output, "min_snr", gamma)[t] * squared
            expected = min(level / (1 - level), gamma) * error.square().sum()
            assert weighted.item() == pytest.approx(expected.item(), rel=1e-8)


def test_min_snr_has_the_values_of_the_paper():
    # ᾱ = 0.9, 0.72, 0.36 and SNR = 9, 2.571428..., 0.5625, by hand.
    schedule = NoiseSchedule(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    expected = {
        "sample": [5.0, 18 / 7, 0.5625],
        "epsilon": [5 / 9, 1.0, 1.0],
        "v_prediction": [0.5, 0.72, 0.36],
    }
    for prediction_type, values in expected.items():
        weights = loss_weights(schedule, prediction_type, "min_snr", 5.0)
        assert weights.dtype == torch.float64
        assert weights.tolist() == pytest.approx(values, rel=1e-12)
        assert loss_weights(schedule, prediction_type, "none", 5.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(gamma):
    with pytest.raises(ValueError, match=f"min_snr_gamma must be a number above 0; got {gamma}"):
        loss_weights(make_schedule(num_steps=20), "sample", "min_snr", gamma)


def test_unknown_weightings_and_prediction_types_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown loss_weighting .minsnr. .did you mean .min_snr...."):
        loss_weights(make_schedule(num_steps=20), "sample", "minsnr", 5.0)
    with pytest.raises(ValueError, match=r"unknown prediction_type 'eps'.*; allowed: epsilon, sample, v_prediction"):
        loss_weights(make_schedule(num_steps=20), "eps", "none", 5.0)


@WITH_X_0
def test_min_snr_would_leave_the_start_of_sampling_untrained_without_terminal_signal(prediction_type):
    schedule = make_schedule(num_steps=20, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"min_snr gives no weight to the last timestep .* use loss_weighting=none"):
        loss_weights(schedule, prediction_type, "min_snr", 5.0)
    assert loss_weights(schedule, prediction_type, "none", 5.0).tolist() == [1.0] * 20
