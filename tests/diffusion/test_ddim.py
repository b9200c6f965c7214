"""The DDIM contract, against diffusers step by step, DDPM's posterior and closed forms for Gaussian data.

Every comparison is made in float64 unless the test is about float32.
"""

import inspect
import math
import warnings
from collections import Counter
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import ddim
from policy.diffusion.ddim import ddim_sample, ddim_step, ddim_timesteps
from policy.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule, make_schedule

SPACINGS = ("trailing", "leading", "linspace")
ETAS = (0.0, 0.3, 1.0)
CLIPS = (None, 1.0)
SHAPE = (2, 3, 2)
# Per schedule, the ddim_steps compared: the first ones divide T, the later ones do not.
STEPS = {
    (20, "linear"): (20, 10, 1, 7, 3),
    (100, "linear"): (100, 50, 1, 30, 8),
    (100, "squaredcos_cap_v2"): (100, 10, 8),
    (1000, "linear"): (50, 8, 1, 30),
}
# Takes as long as all others together.
LONG_CHAIN = 600
OBSERVATIONS = torch.zeros(SHAPE[0], 1)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def arbitrary_network(x, timestep, observations):
    """Not a sensible denoiser: the step's arithmetic has to hold for any output."""
    return 1.5 * torch.sin(3 * x + 0.1 * timestep[:, None, None])


def transitions(timesteps):
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


class Recorder:
    """A predict_fn that notes what it was asked."""

    def __init__(self, predict_fn=arbitrary_network):
        self.predict_fn = predict_fn
        self.inputs, self.timesteps, self.outputs = [], [], []

    def __call__(self, x, timestep, observations):
        self.inputs.append(x)
        self.timesteps.append(timestep)
        self.outputs.append(self.predict_fn(x, timestep, observations))
        return self.outputs[-1]


# --- the seven functions -----------------------------------------------------------------------------------------


def defaults_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (ddim.build, {"action_horizon": 8, "hidden_size": 256, "num_layers": 4, "num_steps": 1000}),
        (
            ddim.make_schedule,
            {
                "num_steps": 1000,
                "beta_start": 1e-4,
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "zero_terminal_snr": False,
            },
        ),
        (
            ddim.ddim_sample,
            {
                "ddim_steps": 50,
                "eta": 0.0,
                "spacing": "trailing",
                "prediction_type": "epsilon",
                "clip": 1.0,
                "generator": None,
                "known": None,
                "keep": 0.0,
            },
        ),
        (
            ddim.ddim_step,
            {"eta": 0.0, "prediction_type": "epsilon", "clip": 1.0, "noise": None, "known": None, "keep": 0.0},
        ),
        (ddim.ddim_timesteps, {"spacing": "trailing"}),
        (ddim.output_size, {"action_dim": 64, "action_horizon": 8}),
    ],
)
def test_the_contracts_functions_have_the_contracts_defaults(function, defaults):
    assert defaults_of(function) == defaults


def test_the_recommended_defaults_run_and_are_the_documents():
    defaults = ddim.recommended_defaults()
    assert defaults == {
        "action_dim": 64,
        "action_horizon": 8,
        "hidden_size": 256,
        "num_layers": 4,
        "num_steps": 1000,
        "ddim_steps": 50,
        "eta": 0.0,
    }
    sizes = {k: v for k, v in defaults.items() if k not in ("ddim_steps", "eta")}
    torch.manual_seed(0)
    network = ddim.build(obs_size=287, **sizes)
    recorder = Recorder(network)
    with torch.no_grad():
        actions = ddim_sample(
            recorder,
            torch.zeros(2, 287),
            randn(2, 8, 64, dtype=torch.float32),
            schedule=make_schedule(num_steps=defaults["num_steps"]),
            ddim_steps=defaults["ddim_steps"],
            eta=defaults["eta"],
        )
    assert actions.shape == (2, 8, 64)
    assert len(recorder.timesteps) == 50
    assert actions.abs().max() <= 1


# --- the grid ----------------------------------------------------------------------------------------------------


def rounded(numerator, denominator):
    """`round(Fraction(numerator, denominator))`, halves to even, ten times as fast."""
    whole, left = divmod(numerator, denominator)
    return whole + (2 * left > denominator or (2 * left == denominator and whole % 2))


def exact_grid(num_steps, ddim_steps, spacing):
    """The grid in whole numbers, halves rounded to even."""
    if spacing == "trailing":
        return [rounded(num_steps * (ddim_steps - i), ddim_steps) - 1 for i in range(ddim_steps)]
    if spacing == "leading":
        return [i * (num_steps // ddim_steps) for i in reversed(range(ddim_steps))]
    if ddim_steps == 1:
        return [num_steps - 1]
    return [rounded(i * (num_steps - 1), ddim_steps - 1) for i in reversed(range(ddim_steps))]


def check_grid(num_steps, ddim_steps, spacing):
    timesteps = ddim_timesteps(num_steps, ddim_steps, spacing)
    assert timesteps.dtype == torch.int64
    timesteps = timesteps.tolist()
    assert timesteps == exact_grid(num_steps, ddim_steps, spacing)
    assert len(timesteps) == ddim_steps
    assert all(later < earlier for earlier, later in pairwise(timesteps))
    assert timesteps[0] < num_steps
    assert timesteps[-1] >= 0
    if spacing in ("trailing", "linspace"):
        assert timesteps[0] == num_steps - 1
    if spacing == "leading" or (spacing == "linspace" and ddim_steps > 1):
        assert timesteps[-1] == 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 20, 100, 1000])
def test_every_k_gives_exactly_k_decreasing_timesteps(num_steps, spacing):
    for ddim_steps in range(1, num_steps + 1):
        check_grid(num_steps, ddim_steps, spacing)


@settings(deadline=None)
@given(data=st.data(), num_steps=st.integers(1, 5000), spacing=st.sampled_from(SPACINGS))
def test_any_k_of_any_t_gives_exactly_k_decreasing_timesteps(data, num_steps, spacing):
    check_grid(num_steps, data.draw(st.integers(1, num_steps)), spacing)


def test_trailing_starts_at_full_noise_where_leading_starts_late():
    assert ddim_timesteps(100, 8).tolist() == [99, 87, 74, 61, 49, 37, 24, 11]
    assert ddim_timesteps(100, 8, "leading")[0].item() == 84


@pytest.mark.parametrize("num_steps", [20, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_grid_is_diffusers_grid_wherever_k_divides_t_except_linspace_k_1_which_starts_at_0_there(
    num_steps, spacing
):
    theirs = DDIMScheduler(num_train_timesteps=num_steps, timestep_spacing=spacing, steps_offset=0)
    for ddim_steps in (k for k in range(1, num_steps + 1) if num_steps % k == 0):
        theirs.set_timesteps(ddim_steps)
        if spacing == "linspace" and ddim_steps == 1:
            assert theirs.timesteps.tolist() == [0]
        else:
            assert ddim_timesteps(num_steps, ddim_steps, spacing).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [20, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_where_k_does_not_divide_t_the_grid_is_diffusers_grid_up_to_its_rounding_of_halves_and_extra_steps(
    num_steps, spacing
):
    theirs = DDIMScheduler(num_train_timesteps=num_steps, timestep_spacing=spacing, steps_offset=0)
    same = 0
    for ddim_steps in (k for k in range(2, num_steps + 1) if num_steps % k):
        theirs.set_timesteps(ddim_steps)
        ours = ddim_timesteps(num_steps, ddim_steps, spacing).tolist()
        if len(theirs.timesteps) != ddim_steps:
            assert spacing == "trailing"  # theirs can take K + 1 steps, from accumulated rounding
            continue
        same += ours == theirs.timesteps.tolist()
        span, parts = (num_steps - 1, ddim_steps - 1) if spacing == "linspace" else (num_steps, ddim_steps)
        for i, (our, their) in enumerate(zip(ours, theirs.timesteps.tolist(), strict=True)):
            is_half = 2 * i * span % (2 * parts) == parts
            assert our == their or (is_half and abs(our - their) == 1)
    assert same >= 0.75 * sum(num_steps % k > 0 for k in range(2, num_steps + 1))


@settings(deadline=None)
@given(
    data=st.data(),
    num_steps=st.integers(1, 200),
    spacing=st.sampled_from(SPACINGS),
    eta=st.sampled_from(ETAS),
)
def test_sampling_calls_the_network_exactly_k_times_on_the_grid(data, num_steps, spacing, eta):
    ddim_steps = data.draw(st.integers(1, num_steps))
    recorder = Recorder()
    schedule = NoiseSchedule(torch.full((num_steps,), 0.05, dtype=torch.float64))
    ddim_sample(
        recorder,
        OBSERVATIONS,
        randn(*SHAPE),
        schedule=schedule,
        ddim_steps=ddim_steps,
        eta=eta,
        spacing=spacing,
        generator=seeded(0),
    )
    assert len(recorder.timesteps) == ddim_steps
    asked = torch.stack(recorder.timesteps, dim=1)
    assert torch.equal(asked, ddim_timesteps(num_steps, ddim_steps, spacing).expand(SHAPE[0], -1))


@pytest.mark.parametrize(("ddim_steps", "by_stride"), [(30, 31), (600, 1000)])
def test_a_stride_would_mislabel_these_sweeps(ddim_steps, by_stride):
    assert len(range(0, 1000, 1000 // ddim_steps)) >= by_stride  # the fault: T // K
    recorder = Recorder()
    schedule = make_schedule()
    ddim_sample(recorder, OBSERVATIONS, randn(*SHAPE), schedule=schedule, ddim_steps=ddim_steps)
    assert len(recorder.timesteps) == ddim_steps


def test_the_observations_reach_the_network_untouched():
    observations = randn(2, 5)
    seen = []

    def network(x, timestep, given):
        seen.append(given)
        return x

    ddim_sample(network, observations, randn(*SHAPE), schedule=make_schedule(num_steps=20), ddim_steps=3)
    assert len(seen) == 3
    assert all(given is observations for given in seen)


# --- diffusers, step by step -------------------------------------------------------------------------------------

COMPARED = Counter()


def diffusers_scheduler(cls, schedule, prediction_type, clip, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = cls(
            num_train_timesteps=schedule.num_steps,
            trained_betas=schedule.betas.tolist(),
            prediction_type=prediction_type,
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            **kwargs,
        )
    # They compute the levels in float32; the rest of their arithmetic follows the levels' dtype.
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = torch.cumprod(1 - schedule.betas, dim=0)
    return scheduler


class DiffusersDDIM:
    """diffusers' DDIM step between any two timesteps."""

    def __init__(self, schedule, prediction_type, clip):
        self.scheduler = diffusers_scheduler(
            DDIMScheduler, schedule, prediction_type, clip, set_alpha_to_one=True, steps_offset=0
        )
        self.scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        self.num_steps, self.clip = schedule.num_steps, clip

    def step(self, x_t, predicted, timestep, prev_timestep, eta, noise):
        # Theirs finds the previous timestep as t - T // K, which leaves its own grid where K does not divide T. This
        # fraction makes that floor division give the distance to the grid's next timestep.
        self.scheduler.num_inference_steps = Fraction(self.num_steps, timestep - prev_timestep)
        x_prev, x_0 = self.scheduler.step(
            predicted,
            timestep,
            x_t,
            eta=eta,
            use_clipped_model_output=self.clip is not None,
            variance_noise=noise if eta > 0 else None,
            return_dict=False,
        )
        return x_prev, x_0


def difference(ours, theirs):
    assert ours.dtype == theirs.dtype == torch.float64
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def compare_chain(schedule, oracle, *, ddim_steps, eta, spacing, prediction_type, clip):
    """Sample one chain and hold each of its steps against the oracle's; returns (steps compared, clipped steps)."""
    recorder = Recorder()
    noise = randn(*SHAPE, seed=ddim_steps)
    actions = ddim_sample(
        recorder,
        OBSERVATIONS,
        noise,
        schedule=schedule,
        ddim_steps=ddim_steps,
        eta=eta,
        spacing=spacing,
        prediction_type=prediction_type,
        clip=clip,
        generator=seeded(ddim_steps + 1),
    )
    noises = seeded(ddim_steps + 1)
    assert torch.equal(recorder.inputs[0], noise)
    steps = transitions(ddim_timesteps(schedule.num_steps, ddim_steps, spacing).tolist())
    compared = clipped = 0
    for i, (x_prev, (timestep, prev_timestep)) in enumerate(zip([*recorder.inputs[1:], actions], steps, strict=True)):
        z = torch.randn(SHAPE, generator=noises, dtype=torch.float64)
        expected, x_0 = oracle.step(recorder.inputs[i], recorder.outputs[i], timestep, prev_timestep, eta, z)
        error = difference(x_prev, expected)
        assert error < 1e-12, f"{ddim_steps=} {eta=} {clip=} {timestep=} {prev_timestep=}: {error}"
        compared += 1
        clipped += bool((x_0.abs() == clip).any()) if clip else 0
    return compared, clipped


ORACLE_CASES = [(*s, spacing, kind) for s in STEPS for spacing in SPACINGS for kind in PREDICTION_TYPES]


def compare_chains(schedule, spacing, prediction_type, counts):
    """Chains of each count under each clip and each eta; returns the number of steps compared."""
    total = 0
    for clip in CLIPS:
        oracle = DiffusersDDIM(schedule, prediction_type, clip)
        clipped_steps = 0
        for ddim_steps, eta in product(counts, ETAS):
            compared, clipped = compare_chain(
                schedule,
                oracle,
                ddim_steps=ddim_steps,
                eta=eta,
                spacing=spacing,
                prediction_type=prediction_type,
                clip=clip,
            )
            total += compared
            clipped_steps += clipped
        assert (clipped_steps > 0) == (clip is not None)  # the comparison is of clipped steps, where it says so
    return total


@pytest.mark.parametrize(("num_steps", "beta_schedule", "spacing", "prediction_type"), ORACLE_CASES)
def test_each_step_equals_diffusers(num_steps, beta_schedule, spacing, prediction_type):
    schedule = make_schedule(num_steps=num_steps, beta_schedule=beta_schedule)
    counts = STEPS[num_steps, beta_schedule]
    COMPARED[num_steps, beta_schedule, spacing, prediction_type] = compare_chains(
        schedule, spacing, prediction_type, counts
    )


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_step_of_a_long_chain_equals_diffusers(spacing, prediction_type):
    assert compare_chains(make_schedule(), spacing, prediction_type, [LONG_CHAIN]) == 6 * LONG_CHAIN


def test_a_long_chain_equals_diffusers():
    """At one combination of the settings; all of them are slow."""
    schedule, settings = make_schedule(), {"prediction_type": "epsilon", "clip": 1.0}
    oracle = DiffusersDDIM(schedule, *settings.values())
    compared, clipped = compare_chain(schedule, oracle, ddim_steps=LONG_CHAIN, eta=0.3, spacing="trailing", **settings)
    assert compared == LONG_CHAIN
    assert clipped > 0


def test_every_step_of_every_combination_was_compared(capsys):
    if set(COMPARED) != set(ORACLE_CASES):
        pytest.skip("needs the whole of test_each_step_equals_diffusers in the same run")
    total = sum(COMPARED.values())
    with capsys.disabled():
        print(f"\n{total} DDIM steps equal to diffusers' within 1e-12")
    chains = len(SPACINGS) * len(PREDICTION_TYPES) * len(ETAS) * len(CLIPS)
    assert total == chains * sum(sum(steps) for steps in STEPS.values())
    assert total > 20_000


@pytest.mark.parametrize("clip", [0.3, 2.5])
def test_other_clipping_bounds_equal_diffusers_too(clip):
    schedule = make_schedule(num_steps=100)
    oracle = DiffusersDDIM(schedule, "epsilon", clip)
    for eta in ETAS:
        compared, clipped = compare_chain(
            schedule,
            oracle,
            ddim_steps=13,
            eta=eta,
            spacing="trailing",
            prediction_type="epsilon",
            clip=clip,
        )
        assert compared == 13
        assert clipped > 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", ETAS)
def test_a_whole_chain_equals_diffusers_own_loop_where_k_divides_t(prediction_type, eta):
    # Nothing of theirs is bent here: their grid, their previous timestep, their noise from their own generator.
    schedule = make_schedule(num_steps=100)
    scheduler = DiffusersDDIM(schedule, prediction_type, 1.0).scheduler
    scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x, generator = randn(*SHAPE), seeded(1)
    for t in scheduler.timesteps:
        predicted = arbitrary_network(x, t.expand(SHAPE[0]), None)
        x = scheduler.step(
            predicted, int(t), x, eta=eta, use_clipped_model_output=True, generator=generator
        ).prev_sample
    ours = ddim_sample(
        arbitrary_network,
        OBSERVATIONS,
        randn(*SHAPE),
        schedule=schedule,
        ddim_steps=20,
        eta=eta,
        prediction_type=prediction_type,
        generator=seeded(1),
    )
    assert difference(ours, x) < 1e-9


def test_float32_chains_stay_close_to_float64_ones():
    schedule = make_schedule()
    arguments = {"schedule": schedule, "ddim_steps": 50, "prediction_type": "sample"}

    def smooth(x, timestep, observations):
        return torch.tanh(x)

    exact = ddim_sample(smooth, OBSERVATIONS, randn(*SHAPE), **arguments)
    single = ddim_sample(smooth, OBSERVATIONS, randn(*SHAPE).float(), **arguments)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=0, atol=2e-5)


# --- the clean end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("ddim_steps", [1, 2, 7, 20])
def test_a_perfect_x0_predictor_is_returned_exactly(ddim_steps, spacing, eta):
    x_0 = 0.9 * torch.tanh(randn(*SHAPE))
    actions = ddim_sample(
        lambda *_: x_0,
        OBSERVATIONS,
        randn(*SHAPE, seed=1),
        schedule=make_schedule(num_steps=20),
        ddim_steps=ddim_steps,
        eta=eta,
        spacing=spacing,
        prediction_type="sample",
        generator=seeded(2),
    )
    assert torch.equal(actions, x_0)


@pytest.mark.parametrize("eta", ETAS)
def test_the_last_step_returns_the_clipped_x0_and_nothing_else(eta):
    schedule = make_schedule(num_steps=20)
    x_t, predicted = randn(*SHAPE), randn(*SHAPE, seed=1)
    for timestep in range(20):
        x_0 = (x_t - schedule.sqrt_one_minus_alphas_cumprod[timestep] * predicted) / (
            schedule.sqrt_alphas_cumprod[timestep]
        )
        step = ddim_step(x_t, predicted, timestep, -1, schedule, eta, noise=randn(*SHAPE, seed=2))
        assert torch.allclose(step, x_0.clamp(-1, 1), rtol=1e-13, atol=0)


def test_a_perfect_epsilon_predictor_recovers_the_data_from_every_level():
    schedule = make_schedule(num_steps=100)
    x_0, noise = 0.9 * torch.tanh(randn(*SHAPE)), randn(*SHAPE, seed=1)
    for timestep, prev_timestep in [(99, 40), (40, 39), (39, 0), (0, -1), (99, -1)]:
        x_t = schedule.add_noise(x_0, noise, timestep)
        step = ddim_step(x_t, noise, timestep, prev_timestep, schedule, clip=None)
        expected = x_0 if prev_timestep < 0 else schedule.add_noise(x_0, noise, prev_timestep)
        assert torch.allclose(step, expected, rtol=0, atol=1e-12)


# --- clipping ----------------------------------------------------------------------------------------------------


def test_the_direction_uses_the_epsilon_of_the_clipped_x0():
    schedule = make_schedule(num_steps=100)
    timestep, prev_timestep = 60, 30
    level, level_prev = (schedule.alphas_cumprod[t].item() for t in (timestep, prev_timestep))
    x_t = torch.tensor([[[3.0, 0.2]]], dtype=torch.float64)
    network_epsilon = torch.tensor([[[-1.0, 0.1]]], dtype=torch.float64)
    x_0 = (x_t - math.sqrt(1 - level) * network_epsilon) / math.sqrt(level)
    assert x_0[0, 0, 0] > 1 > x_0[0, 0, 1].abs()
    clipped = x_0.clamp(-1, 1)
    rederived = (x_t - math.sqrt(level) * clipped) / math.sqrt(1 - level)
    expected = math.sqrt(level_prev) * clipped + math.sqrt(1 - level_prev) * rederived
    fault = math.sqrt(level_prev) * clipped + math.sqrt(1 - level_prev) * network_epsilon
    step = ddim_step(x_t, network_epsilon, timestep, prev_timestep, schedule)
    assert torch.allclose(step, expected, rtol=1e-12, atol=0)
    assert abs(step - fault)[0, 0, 0] > 0.5
    assert step[0, 0, 1].item() == pytest.approx(fault[0, 0, 1].item(), rel=1e-12)
    unclipped = ddim_step(x_t, network_epsilon, timestep, prev_timestep, schedule, clip=None)
    plain = math.sqrt(level_prev) * x_0 + math.sqrt(1 - level_prev) * network_epsilon
    assert torch.allclose(unclipped, plain, rtol=1e-12, atol=0)
    assert not torch.allclose(unclipped, step, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clipped_actions_stay_in_bounds_and_unclipped_ones_need_not(prediction_type):
    arguments = {"schedule": make_schedule(num_steps=100), "ddim_steps": 8, "prediction_type": prediction_type}

    def large(x, timestep, observations):
        return torch.where(x > 0, -3.0, 3.0).to(x)

    clipped = ddim_sample(large, OBSERVATIONS, randn(*SHAPE), clip=0.5, **arguments)
    assert clipped.abs().max() <= 0.5
    free = ddim_sample(large, OBSERVATIONS, randn(*SHAPE), clip=None, **arguments)
    assert free.abs().max() > 1


# --- noise -------------------------------------------------------------------------------------------------------


def sample_with(generator, eta=1.0, noise=None, predict_fn=arbitrary_network, observations=OBSERVATIONS):
    return ddim_sample(
        predict_fn,
        observations,
        randn(*SHAPE) if noise is None else noise,
        schedule=make_schedule(num_steps=100),
        ddim_steps=8,
        eta=eta,
        clip=None,
        prediction_type="sample",
        generator=generator,
    )


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_generator_decides_the_result(eta):
    assert torch.equal(sample_with(seeded(1), eta), sample_with(seeded(1), eta))
    assert not torch.allclose(sample_with(seeded(1), eta), sample_with(seeded(2), eta), atol=1e-3)


def test_the_global_generator_plays_no_part_when_one_is_passed():
    torch.manual_seed(0)
    first = sample_with(seeded(1))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, sample_with(seeded(1)))
    torch.manual_seed(0)
    sample_with(seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_eta_0_depends_on_the_noise_alone_and_draws_nothing():
    generator = seeded(1)
    before = generator.get_state()
    first = sample_with(generator, eta=0.0)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(first, sample_with(seeded(2), eta=0.0))
    assert torch.equal(first, sample_with(None, eta=0.0))
    assert not torch.equal(first, sample_with(None, eta=0.0, noise=randn(*SHAPE, seed=9)))


def test_the_input_noise_is_not_overwritten():
    noise = randn(*SHAPE)
    sample_with(seeded(1), noise=noise)
    assert torch.equal(noise, randn(*SHAPE))


@pytest.mark.parametrize("eta", [1e-6, 0.3, 1.0])
def test_a_step_with_eta_needs_noise(eta):
    x = randn(*SHAPE)
    with pytest.raises(ValueError, match=r"pass noise of shape \(2, 3, 2\)"):
        ddim_step(x, x, 10, 5, make_schedule(num_steps=20), eta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_generator_per_row_a_row_does_not_depend_on_its_company(dtype):
    rows, observations = 7, randn(7, 1, dtype=dtype)
    noise = randn(rows, 3, 2, dtype=dtype)

    # Sums and products round the same in every row; a matrix product, or a vectorised sine, may not.
    def elementwise(x, timestep, given):
        return 0.7 * x - 0.2 * x * x + given[:, :, None] * 0.01 * timestep[:, None, None]

    together = sample_with([seeded(100 + r) for r in range(rows)], 1.0, noise, elementwise, observations)
    for chosen in ([0], [3], [6], [6, 0], [2, 1, 5]):
        generators = [seeded(100 + r) for r in chosen]
        some = sample_with(generators, 1.0, noise[chosen], elementwise, observations[chosen])
        assert torch.equal(some, together[chosen])
    # The rows of one generator, in contrast, share its stream.
    assert not torch.equal(
        sample_with(seeded(1), 1.0, noise, elementwise, observations)[[6]],
        sample_with(seeded(1), 1.0, noise[[6]], elementwise, observations[[6]]),
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_generators_than_rows_is_refused(count):
    with pytest.raises(ValueError, match=f"got {count} for a batch of 2"):
        sample_with([seeded(i) for i in range(count)])


# --- eta = 1 and K = T: DDPM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [20, 100, 1000])
def test_at_eta_1_each_single_step_is_the_ddpm_posterior(num_steps):
    schedule = make_schedule(num_steps=num_steps)
    betas = schedule.betas.tolist()
    x_t, x_0 = 1.3 * randn(*SHAPE), 0.5 * torch.tanh(randn(*SHAPE, seed=1))
    zeros, ones = torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64)
    level_prev = 1.0
    for t in range(num_steps):
        # Ho et al. 2020, eq. 6 and 7.
        beta, level = betas[t], level_prev * (1 - betas[t])
        mean = (
            math.sqrt(level_prev) * beta / (1 - level) * x_0
            + math.sqrt(1 - beta) * (1 - level_prev) / (1 - level) * x_t
        )
        variance = (1 - level_prev) / (1 - level) * beta
        arguments = {"prediction_type": "sample", "eta": 1.0}
        ours_mean = ddim_step(x_t, x_0, t, t - 1, schedule, noise=zeros, **arguments)
        spread = ddim_step(x_t, x_0, t, t - 1, schedule, noise=ones, **arguments) - ours_mean
        assert torch.allclose(ours_mean, mean, rtol=0, atol=1e-11)
        assert spread.square().flatten().tolist() == pytest.approx([variance] * 12, rel=1e-9, abs=1e-15)
        level_prev = level


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", CLIPS)
def test_at_eta_1_and_k_t_the_chain_is_diffusers_ddpm_chain(prediction_type, clip):
    schedule = make_schedule(num_steps=100)
    scheduler = diffusers_scheduler(DDPMScheduler, schedule, prediction_type, clip, variance_type="fixed_small")
    scheduler.one = torch.ones((), dtype=torch.float64)
    recorder = Recorder()
    actions = ddim_sample(
        recorder,
        OBSERVATIONS,
        randn(*SHAPE),
        schedule=schedule,
        ddim_steps=100,
        eta=1.0,
        prediction_type=prediction_type,
        clip=clip,
        generator=seeded(5),
    )
    generator = seeded(5)
    for i, x_prev in enumerate([*recorder.inputs[1:], actions]):
        theirs = scheduler.step(recorder.outputs[i], 99 - i, recorder.inputs[i], generator=generator)
        assert difference(x_prev, theirs.prev_sample) < 1e-11, 99 - i


# --- Gaussian data: everything is known --------------------------------------------------------------------------


class GaussianData:
    """The optimal network for x_0 ~ N(mean, std²): E[ε | x_t] and its kin, in closed form."""

    def __init__(self, schedule, mean, std, prediction_type="epsilon"):
        self.schedule, self.mean, self.std, self.prediction_type = schedule, mean, std, prediction_type

    def __call__(self, x, timestep, observations):
        level = self.schedule.alphas_cumprod[timestep][:, None, None]
        signal, sigma = level.sqrt(), (1 - level).sqrt()
        variance = level * self.std**2 + 1 - level
        epsilon = sigma * (x - signal * self.mean) / variance
        x_0 = self.mean + signal * self.std**2 * (x - signal * self.mean) / variance
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - sigma * x_0}[self.prediction_type]


def affine_map(levels, mean, std, eta):
    """(offset, factor, variance added) of the whole chain on x_T, from scalars alone.

    Each step maps x_t - √ᾱ mean to x_prev - √ᾱ_prev mean by a factor, and adds variance σ².
    """
    factor, variance = 1.0, 0.0
    for level, level_prev in levels:
        marginal = level * std**2 + 1 - level
        sigma2 = eta**2 * (1 - level_prev) / (1 - level) * (1 - level / level_prev)
        step = (math.sqrt(level_prev * level) * std**2 + math.sqrt((1 - level_prev - sigma2) * (1 - level))) / marginal
        factor, variance = factor * step, variance * step**2 + sigma2
    return mean - factor * math.sqrt(levels[0][0]) * mean, factor, variance


def levels_of(schedule, ddim_steps, spacing):
    level = [*schedule.alphas_cumprod.tolist(), 1.0]  # index -1 is the clean end
    return [(level[t], level[p]) for t, p in transitions(exact_grid(schedule.num_steps, ddim_steps, spacing))]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("num_steps", "ddim_steps"), [(20, 1), (20, 7), (100, 8), (100, 100), (1000, 30)])
def test_on_gaussian_data_ddim_is_the_closed_form_affine_map(num_steps, ddim_steps, spacing, prediction_type):
    schedule, mean, std = make_schedule(num_steps=num_steps), 0.4, 0.25
    noise = randn(*SHAPE)
    actions = ddim_sample(
        GaussianData(schedule, mean, std, prediction_type),
        OBSERVATIONS,
        noise,
        schedule=schedule,
        ddim_steps=ddim_steps,
        spacing=spacing,
        prediction_type=prediction_type,
        clip=None,
    )
    offset, factor, _ = affine_map(levels_of(schedule, ddim_steps, spacing), mean, std, eta=0.0)
    assert torch.allclose(actions, offset + factor * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ddim_steps", [5, 30])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_on_gaussian_data_the_samples_have_the_closed_forms_mean_and_variance(eta, ddim_steps):
    schedule, mean, std, rows = make_schedule(num_steps=100), 0.4, 0.25, 40_000
    noise = randn(rows, 1, 1)
    actions = ddim_sample(
        GaussianData(schedule, mean, std),
        torch.zeros(rows, 1),
        noise,
        schedule=schedule,
        ddim_steps=ddim_steps,
        eta=eta,
        clip=None,
        generator=seeded(3),
    )
    offset, factor, variance = affine_map(levels_of(schedule, ddim_steps, "trailing"), mean, std, eta)
    added = actions - (offset + factor * noise)  # what the steps' noise alone contributed
    assert variance > 1e-3
    assert added.mean().item() == pytest.approx(0, abs=5 * math.sqrt(variance / rows))
    assert added.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / rows))
    correlation = torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(rows)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_all_timesteps_the_samples_are_distributed_as_the_data(eta):
    schedule, mean, std, rows = make_schedule(), 0.4, 0.25, 10_000
    offset, factor, variance = affine_map(levels_of(schedule, 1000, "trailing"), mean, std, eta)
    assert offset == pytest.approx(mean, abs=0.01)
    assert math.sqrt(factor**2 + variance) == pytest.approx(std, rel=0.02)
    actions = ddim_sample(
        GaussianData(schedule, mean, std),
        torch.zeros(rows, 1),
        randn(rows, 1, 1),
        schedule=schedule,
        ddim_steps=1000,
        eta=eta,
        clip=None,
        generator=seeded(3),
    )
    assert actions.mean().item() == pytest.approx(mean, abs=0.01 + 5 * std / math.sqrt(rows))
    assert actions.std().item() == pytest.approx(std, rel=0.02 + 5 / math.sqrt(2 * rows))


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddim_steps", [0, -1, 21, 1000, 8.0, "8", True, None])
def test_ddim_steps_outside_1_to_t_are_refused_with_the_range(ddim_steps):
    with pytest.raises(ValueError, match=r"ddim_steps must be a whole number within 1\.\.20"):
        ddim_timesteps(20, ddim_steps)
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"ddim_steps must be a whole number within 1\.\.20"):
        ddim_sample(
            recorder,
            OBSERVATIONS,
            randn(*SHAPE),
            schedule=make_schedule(num_steps=20),
            ddim_steps=ddim_steps,
        )
    assert recorder.timesteps == []


def step_with(**changes):
    arguments = {"x_t": randn(*SHAPE), "predicted": randn(*SHAPE), "timestep": 10, "prev_timestep": 5}
    return ddim_step(**{**arguments, "schedule": make_schedule(num_steps=20), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": -0.1, "noise": randn(*SHAPE)}, "eta must lie within 0"),
        ({"eta": 1.1, "noise": randn(*SHAPE)}, r"got 1\.1"),
        ({"eta": math.nan, "noise": randn(*SHAPE)}, "got nan"),
        ({"timestep": 20}, "timestep=20"),
        ({"timestep": -1, "prev_timestep": -1}, "timestep=-1"),
        ({"prev_timestep": 10}, "prev_timestep=10"),
        ({"prev_timestep": 11}, "prev_timestep=11"),
        ({"prev_timestep": -2}, "prev_timestep=-2"),
        ({"clip": 0.0}, r"clip must be positive.*got 0\.0"),
        ({"clip": -1.0}, r"clip must be positive.*got -1\.0"),
        ({"clip": math.nan}, r"clip must be positive.*got nan"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'.*; allowed: epsilon, sample, v_prediction"),
        ({"predicted": randn(2, 6)}, r"\(2, 6\).*\(2, 3, 2\)"),
        ({"predicted": randn(1, 3, 2)}, r"\(1, 3, 2\).*\(2, 3, 2\)"),
        ({"eta": 1.0, "noise": randn(3, 2)}, r"noise.*\(3, 2\)"),  # would be shared by all rows
        ({"eta": 1.0, "noise": randn(2, 1, 1)}, r"noise.*\(2, 1, 1\)"),
    ],
)
def test_a_step_refuses_what_it_cannot_mean(changes, message):
    with pytest.raises(ValueError, match=message):
        step_with(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing": "quad"}, "unknown spacing 'quad'.*; allowed: leading, linspace, trailing"),
        ({"eta": 2.0}, "eta must lie within 0"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"prediction_type": "x0"}, "unknown prediction_type 'x0'.*; allowed: epsilon, sample, v_prediction"),
    ],
)
def test_sampling_refuses_unknown_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ddim_sample(
            arbitrary_network,
            OBSERVATIONS,
            randn(*SHAPE),
            schedule=make_schedule(num_steps=20),
            **{"ddim_steps": 4, "generator": seeded(0), **changes},
        )


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the network returned \(2, 3, 1\) for noisy actions \(2, 3, 2\)"):
        ddim_sample(
            lambda x, *_: x[..., :1], OBSERVATIONS, randn(*SHAPE), schedule=make_schedule(num_steps=20), ddim_steps=4
        )
