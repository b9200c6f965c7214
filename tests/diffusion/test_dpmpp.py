"""DPM-Solver++(2M), against diffusers step by step, against its order on Gaussian data, and beside DDIM.

The order of each step is a choice: diffusers takes the first and the last one at order 1 where the last one ends
without noise (`final_sigmas_type="zero"`), and so do we, because every chunk ends at ᾱ = 1, where λ is infinite.
"""

import itertools
import math
import warnings

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from policy.diffusion.coefficients import ddim_coefficients, dpmpp_2m_coefficients, reverse_process
from policy.diffusion.ddim import SPACINGS, ddim_timesteps
from policy.diffusion.schedule import PREDICTION_TYPES, make_schedule

SHAPE = (3, 4, 2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(timesteps):
    """Not a sensible denoiser: the arithmetic has to hold for any output."""
    return lambda step, x: 1.5 * torch.sin(3 * x + 0.1 * timesteps[step])


def run(predict, x, table, prediction_type="sample", clip=None, **given):
    predicts_clean = prediction_type == "sample"
    return reverse_process(predict, x, table, predicts_clean=predicts_clean, clip=clip, step_noise=None, **given)


def diffusers_scheduler(schedule, prediction_type, clip, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPMSolverMultistepScheduler(
            num_train_timesteps=schedule.num_steps,
            trained_betas=schedule.betas.tolist(),
            prediction_type=prediction_type,
            final_sigmas_type="zero",
            timestep_spacing="trailing",
            thresholding=clip is not None,  # the largest threshold is also the least one, 1: clipping to -1..1
            sample_max_value=1.0,
            **settings,
        )


def by_diffusers(schedule, timesteps, prediction_type, clip, predict, x):
    """Each x of a chain of their updates in float64, from the starting point on; their own `step` casts to float32."""
    scheduler = diffusers_scheduler(schedule, prediction_type, clip)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    scheduler.sigmas = torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt(), torch.zeros(1)])
    visited, estimates = [x], []
    for step in range(len(timesteps)):
        scheduler._step_index = step
        estimates.append(scheduler.convert_model_output(predict(step, x), sample=x))
        if step in (0, len(timesteps) - 1):
            x = scheduler.dpm_solver_first_order_update(estimates[-1], sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update(estimates[-2:], sample=x)
        visited.append(x)
    return visited


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_each_step_equals_diffusers(prediction_type, clip):
    schedules = [make_schedule(num_steps=100, beta_schedule="squaredcos_cap_v2"), make_schedule(num_steps=50)]
    for schedule, spacing, ddim_steps in itertools.product(schedules, SPACINGS, (1, 2, 3, 7, 16)):
        timesteps = ddim_timesteps(schedule.num_steps, ddim_steps, spacing)
        predict, seen = network(timesteps), []

        def noted(step, x, predict=predict, seen=seen):
            seen.append(x)
            return predict(step, x)

        table = dpmpp_2m_coefficients(schedule, timesteps, 0.0, prediction_type)
        assert (table.shape, table.dtype) == ((ddim_steps, 6), torch.float64)
        chunk = run(noted, randn(*SHAPE), table, prediction_type, clip)
        theirs = by_diffusers(schedule, timesteps, prediction_type, clip, predict, randn(*SHAPE))
        for ours, expected in zip([*seen, chunk], theirs, strict=True):
            error = (ours - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error < 1e-9, (schedule.num_steps, spacing, ddim_steps)
        assert clip is None or bool((chunk.abs() <= clip).all())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("ddim_steps", [5, 20])
def test_a_whole_chain_equals_diffusers_own_loop(ddim_steps, prediction_type):
    """Their grid, and their own choice of each step's order with their default settings, in their float32."""
    schedule = make_schedule(num_steps=100)
    scheduler = diffusers_scheduler(schedule, prediction_type, clip=1.0)
    scheduler.set_timesteps(ddim_steps)
    timesteps = ddim_timesteps(100, ddim_steps)
    assert scheduler.timesteps.tolist() == timesteps.tolist()
    predict, x = network(timesteps / 10), 0.5 * randn(*SHAPE).float()
    table = dpmpp_2m_coefficients(schedule, timesteps, 0.0, prediction_type)
    ours = run(predict, x, table.float(), prediction_type, 1.0)
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(step, x), timestep, x).prev_sample
    assert (ours - x).abs().max() < 2e-4


class Gaussian:
    """Data of one mean and variance: the best estimate of x_0 and the path of a noise are known at every timestep."""

    def __init__(self, schedule, mean=0.3, std=0.5):
        self.levels, self.mean, self.std = schedule.alphas_cumprod, mean, std

    def spread(self, timestep):
        level = self.levels[timestep]
        return (level * self.std**2 + 1 - level).sqrt()

    def path(self, z, timestep):
        return self.levels[timestep].sqrt() * self.mean + self.spread(timestep) * z

    def estimate(self, x, timestep):
        signal = self.levels[timestep].sqrt()
        return self.mean + signal * self.std**2 / self.spread(timestep) ** 2 * (x - signal * self.mean)


def error_of(solver, steps):
    """The error after integrating from one timestep to another in some steps, without the last one to the clean end."""
    schedule, z = make_schedule(num_steps=4000), randn(*SHAPE)
    data, timesteps = Gaussian(schedule), torch.linspace(3400, 200, steps + 1).long()
    table = solver(schedule, timesteps, 0.0, "sample")[:-1]
    reached = run(lambda step, x: data.estimate(x, timesteps[step]), data.path(z, timesteps[0]), table)
    return (reached - data.path(z, timesteps[-1])).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [(ddim_coefficients, 1), (dpmpp_2m_coefficients, 2)])
def test_the_order_of_convergence_is_2_where_that_of_ddim_is_1(solver, order):
    errors = [error_of(solver, steps) for steps in (50, 100, 200, 400)]
    observed = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert observed[-1] == pytest.approx(order, abs=0.1), observed
    assert errors[0] < 0.1


def test_at_eight_steps_it_is_nearer_to_the_path_than_ddim():
    assert error_of(dpmpp_2m_coefficients, 8) < 0.3 * error_of(ddim_coefficients, 8)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_first_and_the_last_step_are_those_of_ddim_so_that_one_and_two_steps_are_ddim(prediction_type):
    schedule = make_schedule(num_steps=100)
    for spacing, ddim_steps in itertools.product(SPACINGS, (1, 2, 3, 9)):
        given = (schedule, ddim_timesteps(100, ddim_steps, spacing), 0.0, prediction_type)
        ddim, multistep = ddim_coefficients(*given), dpmpp_2m_coefficients(*given)
        for step in (0, -1):
            assert torch.equal(multistep[step, :5], ddim[step])
            assert multistep[step, 5] == 0
        assert (multistep[1:-1, 5] != 0).all()
        assert torch.allclose(multistep[:, 3] + multistep[:, 5], ddim[:, 3], rtol=1e-12, atol=0)  # of a constant x̂_0


@pytest.mark.parametrize("clip", [None, 1.0])
def test_what_is_kept_stays_known_data_under_the_noise_of_ddim(clip):
    """The estimate of a kept action is the same in all steps, and its extrapolation is that estimate again."""
    schedule, timesteps, seen = make_schedule(num_steps=100), ddim_timesteps(100, 7), ([], [])
    known, keep = randn(*SHAPE, seed=1).tanh(), torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    for solver, xs in zip((ddim_coefficients, dpmpp_2m_coefficients), seen, strict=True):

        def predict(step, x, xs=xs):
            xs.append(x)
            return network(timesteps)(step, x)

        table = solver(schedule, timesteps, 0.0, "epsilon")
        chunk = run(predict, randn(*SHAPE), table, "epsilon", clip, known=known, keep=keep)
        assert torch.allclose(chunk[:, :2], known[:, :2], rtol=0, atol=1e-10)
    for ddim, multistep in zip(*seen, strict=True):
        assert torch.allclose(ddim[:, :2], multistep[:, :2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_schedule_that_ends_without_signal_begins_at_order_1(prediction_type):
    schedule = make_schedule(num_steps=50, beta_schedule="squaredcos_cap_v2", zero_terminal_snr=True)
    table = dpmpp_2m_coefficients(schedule, ddim_timesteps(50, 5), 0.0, prediction_type)
    assert table.isfinite().all()
    assert table[:2, 5].tolist() == [0, 0]  # a step of infinite length has no slope
    with pytest.raises(ValueError, match="epsilon"):
        dpmpp_2m_coefficients(schedule, ddim_timesteps(50, 5), 0.0, "epsilon")


def test_noise_is_refused():
    with pytest.raises(ValueError, match=r"solver=dpmpp_2m adds no noise, so sampler.eta must be 0; got 0.5"):
        dpmpp_2m_coefficients(make_schedule(num_steps=20), ddim_timesteps(20, 4), 0.5, "sample")
