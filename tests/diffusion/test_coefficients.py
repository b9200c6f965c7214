"""The table of coefficients, which is all that sampling computes with, against `ddim_step`, which is DDIM in words.

`ddim_step` is written from the paper and held against diffusers in test_ddim.py; nothing samples with it.
"""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.diffusion.coefficients import SOLVERS, ddim_coefficients, reverse_process, take_step
from policy.diffusion.ddim import SPACINGS, ddim_sample, ddim_step, ddim_timesteps, randn_like
from policy.diffusion.sampler import Sampler
from policy.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule, make_schedule

SHAPE = (3, 4, 2)
OBSERVATIONS = torch.zeros(SHAPE[0], 1)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x, timestep, observations):
    """Not a sensible denoiser: the arithmetic has to hold for any output. Smooth, so that rounding stays small."""
    return 1.2 * torch.sin(x + 0.1 * timestep[:, None, None])


def landings(timesteps):
    return [*timesteps.tolist()[1:], -1]


def apart(one, other):
    """The largest difference, relative to the largest number where that is above 1."""
    assert one.dtype == other.dtype
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def by_ddim_step(predict_fn, noise, schedule, timesteps, *, eta, generator=None, **arguments):
    """The reverse process, one `ddim_step` after the other."""
    x = noise
    for t, landing in zip(timesteps.tolist(), landings(timesteps), strict=True):
        predicted = predict_fn(x, torch.full((len(x),), t), OBSERVATIONS)
        added = randn_like(noise, generator) if eta > 0 else None
        x = ddim_step(x, predicted, t, landing, schedule, eta, noise=added, **arguments)
    return x


# --- one step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_row_of_the_table_is_a_ddim_step_written_as_two_sums(prediction_type, eta, clip):
    schedule = make_schedule(num_steps=50, beta_schedule="linear")
    x, predicted, z = randn(3, *SHAPE)
    for spacing, ddim_steps in itertools.product(SPACINGS, (1, 3, 50)):
        timesteps = ddim_timesteps(50, ddim_steps, spacing)
        table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
        assert table.shape == (ddim_steps, 5)
        assert table.dtype == torch.float64
        for row, t, landing in zip(table, timesteps.tolist(), landings(timesteps), strict=True):
            clean = row[0] * x + row[1] * predicted
            clean = clean if clip is None else clean.clamp(-clip, clip)
            ours = row[2] * x + row[3] * clean + row[4] * z
            theirs = ddim_step(
                x, predicted, t, landing, schedule, eta, prediction_type=prediction_type, clip=clip, noise=z
            )
            assert apart(ours, theirs) < 1e-10


betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=40)


@settings(deadline=None)
@given(
    data=st.data(),
    betas=betas,
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    spacing=st.sampled_from(SPACINGS),
    eta=st.floats(0, 1),
    clip=st.none() | st.floats(0.1, 5),
    inpaint=st.booleans(),
)
def test_any_step_of_any_schedule_is_a_ddim_step(data, betas, prediction_type, spacing, eta, clip, inpaint):
    schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    timesteps = ddim_timesteps(len(betas), data.draw(st.integers(1, len(betas))), spacing)
    table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
    x, predicted, z, known = randn(4, *SHAPE)
    given = {"known": known.tanh(), "keep": torch.tensor([1.0, 0.3, 0.0, 0.0])[:, None]} if inpaint else {}
    for row, t, landing in zip(table, timesteps.tolist(), landings(timesteps), strict=True):
        ours, _ = take_step(x, predicted, row, predicts_clean=prediction_type == "sample", clip=clip, noise=z, **given)
        theirs = ddim_step(
            x, predicted, t, landing, schedule, eta, prediction_type=prediction_type, clip=clip, noise=z, **given
        )
        assert apart(ours, theirs) < 1e-9


def test_the_last_row_leaves_neither_x_nor_noise():
    for eta, spacing, ddim_steps in itertools.product((0.0, 0.5, 1.0), SPACINGS, (1, 7, 100)):
        timesteps = ddim_timesteps(100, ddim_steps, spacing)
        last = ddim_coefficients(make_schedule(num_steps=100), timesteps, eta, "epsilon")[-1]
        assert last[2:].tolist() == [0, 1, 0]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_is_added_for_eta_alone(eta):
    table = ddim_coefficients(make_schedule(num_steps=100), ddim_timesteps(100, 8), eta, "sample")
    assert (table[:-1, 4] > 0).all() == (eta > 0)
    assert (table[:, 4] == 0).all() == (eta == 0)


# --- a whole chain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [20, 100])
def test_a_sampled_chain_is_a_chain_of_ddim_steps_for_every_k(num_steps, spacing, prediction_type):
    schedule, noise, clipped = make_schedule(num_steps=num_steps), randn(*SHAPE), 0
    combinations = itertools.cycle(itertools.product((0.0, 0.3, 1.0), (None, 1.0, 0.4), (True, False)))
    counts = range(1, 21) if num_steps == 20 else (1, 2, 3, 8, 30, 50, 99, 100)
    for ddim_steps in (k for k in counts for _ in range(2)):
        eta, clip, inpaint = next(combinations)
        given = {"known": randn(*SHAPE, seed=1).tanh(), "keep": 0.6} if inpaint else {}
        arguments = {"prediction_type": prediction_type, "clip": clip, "eta": eta, **given}
        sampled = ddim_sample(
            network,
            OBSERVATIONS,
            noise,
            schedule=schedule,
            ddim_steps=ddim_steps,
            spacing=spacing,
            generator=torch.Generator().manual_seed(7),
            **arguments,
        )
        timesteps = ddim_timesteps(num_steps, ddim_steps, spacing)
        stepped = by_ddim_step(
            network, noise, schedule, timesteps, generator=torch.Generator().manual_seed(7), **arguments
        )
        assert apart(sampled, stepped) < 1e-9, (ddim_steps, arguments)
        clipped += clip is not None and bool((sampled.abs() == clip).any())
    assert clipped > 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("each_row", [True, False])
def test_in_float32_a_chain_stays_close_to_ddim_steps_in_float64(prediction_type, eta, each_row):
    schedule, noise = make_schedule(num_steps=100), randn(*SHAPE, dtype=torch.float32)

    def generators():
        seeded = [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])]
        return seeded if each_row else seeded[0]

    sampled = ddim_sample(
        network,
        OBSERVATIONS,
        noise,
        schedule=schedule,
        ddim_steps=20,
        eta=eta,
        prediction_type=prediction_type,
        generator=generators(),
    )
    assert sampled.dtype == torch.float32
    x, again, timesteps = noise.double(), generators(), ddim_timesteps(100, 20)
    for t, landing in zip(timesteps.tolist(), landings(timesteps), strict=True):
        z = randn_like(noise, again).double()  # the same draw: in float64 it would be another one
        predicted = network(x, torch.full((len(x),), t), OBSERVATIONS)
        x = ddim_step(x, predicted, t, landing, schedule, eta, prediction_type=prediction_type, noise=z)
    assert apart(sampled.double(), x) < 1e-4


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_schedule_that_ends_without_signal_has_a_table_where_the_network_can_be_asked(prediction_type):
    schedule = make_schedule(num_steps=50, beta_schedule="squaredcos_cap_v2", zero_terminal_snr=True)
    timesteps = ddim_timesteps(50, 5)
    table = ddim_coefficients(schedule, timesteps, 0.0, prediction_type)
    assert table.isfinite().all()
    sampled = ddim_sample(
        network,
        OBSERVATIONS,
        randn(*SHAPE),
        schedule=schedule,
        ddim_steps=5,
        prediction_type=prediction_type,
    )
    stepped = by_ddim_step(
        network, randn(*SHAPE), schedule, timesteps, eta=0.0, prediction_type=prediction_type, clip=1.0
    )
    assert apart(sampled, stepped) < 1e-10
    with pytest.raises(ValueError, match="epsilon"):
        ddim_coefficients(schedule, timesteps, 0.0, "epsilon")


def test_an_unknown_prediction_type_has_no_table():
    with pytest.raises(ValueError, match=r"unknown prediction_type 'x0'.*; allowed: epsilon, sample, v_prediction"):
        ddim_coefficients(make_schedule(num_steps=20), ddim_timesteps(20, 4), 0.0, "x0")


# --- the loop ----------------------------------------------------------------------------------------------------


def test_the_loop_asks_the_network_and_the_noise_once_a_step_in_order():
    table = ddim_coefficients(make_schedule(num_steps=20), ddim_timesteps(20, 5), 1.0, "sample")
    asked, drawn = [], []

    def predict(step, x):
        asked.append(step)
        return x.tanh()

    def step_noise(step):
        drawn.append(step)
        return randn(*SHAPE, seed=step)

    start = randn(*SHAPE)
    chunk = reverse_process(predict, start, table, predicts_clean=True, clip=None, step_noise=step_noise)
    assert asked == drawn == [0, 1, 2, 3, 4]
    x = start
    for step, row in enumerate(table):
        x = row[2] * x + row[3] * x.tanh() + row[4] * randn(*SHAPE, seed=step)
    assert apart(chunk, x) < 1e-12


def test_the_loop_refuses_a_network_of_another_shape():
    table = ddim_coefficients(make_schedule(num_steps=20), ddim_timesteps(20, 2), 0.0, "sample")
    with pytest.raises(ValueError, match=r"the network returned \(3, 4, 1\) for noisy actions \(3, 4, 2\)"):
        reverse_process(
            lambda step, x: x[..., :1], randn(*SHAPE), table, predicts_clean=True, clip=None, step_noise=None
        )


# --- solvers -----------------------------------------------------------------------------------------------------


def halved(schedule, timesteps, eta, prediction_type):
    """A solver of a plugin: DDIM that lands on half of the clean chunk."""
    table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
    table[-1, 3] = 0.5
    return table


def momentum(schedule, timesteps, eta, prediction_type):
    """A multistep solver of a plugin: DDIM and a share of the clean estimate of the step before."""
    table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
    return torch.cat([table, torch.full((len(table), 1), 0.25, dtype=torch.float64)], dim=1)


def test_a_table_with_a_sixth_column_adds_the_clean_estimate_of_the_step_before():
    """As it was used: clipped, and with the known actions in it. The starting point stands in for it at first."""
    schedule, given = make_schedule(num_steps=20), {"known": randn(*SHAPE, seed=1), "keep": 0.5}
    table = momentum(schedule, ddim_timesteps(20, 4), 1.0, "sample")
    noises = randn(4, *SHAPE, seed=2)
    chunk = reverse_process(
        lambda step, x: 2 * x,
        randn(*SHAPE),
        table,
        predicts_clean=True,
        clip=1.0,
        step_noise=noises.__getitem__,
        **given,
    )
    x = before = randn(*SHAPE)
    for row, noise in zip(table, noises, strict=True):
        clean = 0.5 * given["known"] + 0.5 * (2 * x).clamp(-1, 1)
        x, before = row[2] * x + row[3] * clean + row[4] * noise + 0.25 * before, clean
    assert apart(chunk, x) < 1e-12


def test_ddim_is_a_solver_by_name_and_others_can_be_registered(monkeypatch):
    monkeypatch.setattr(SOLVERS, "_parts", dict(SOLVERS._parts))
    assert SOLVERS["ddim"] is ddim_coefficients
    schedule = make_schedule(num_steps=20)
    with pytest.raises(ValueError, match=r"unknown solver 'halved'.*plugins="):
        Sampler(solver="halved")
    SOLVERS.register("halved", halved)
    plain, half = Sampler(ddim_steps=4), Sampler(ddim_steps=4, solver="halved")
    course = plain.cold_course(schedule, "diffusion")
    assert torch.equal(
        plain.table(schedule, course, "sample", "diffusion"),
        ddim_coefficients(schedule, course.timesteps, 0.0, "sample"),
    )
    run = partial(reverse_process, lambda step, x: x.tanh(), predicts_clean=True, clip=None, step_noise=None)
    chunks = [run(randn(*SHAPE), sampler.table(schedule, course, "sample", "diffusion")) for sampler in (plain, half)]
    assert torch.equal(0.5 * chunks[0], chunks[1])
