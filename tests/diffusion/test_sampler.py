"""Settings of sampling: what they refuse, where sampling begins, and what records of them hold."""

import json
from dataclasses import fields, replace

import pytest
import torch

from policy.control.timeline import ControllerSettings
from policy.diffusion.ddim import ddim_timesteps
from policy.diffusion.sampler import LATER_SETTINGS, Course, Sampler
from policy.diffusion.schedule import make_schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ddim_steps": 0}, r"ddim_steps must be .*1.*got 0"),
        ({"eta": 1.5}, "eta must lie within 0"),
        ({"spacing": "karras"}, "unknown spacing 'karras'.*; allowed: leading, linspace, trailing"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"start": 0.0}, "start must be above 0 and at most 1; got 0.0"),
        ({"start": 1.1}, "start must be above 0 and at most 1; got 1.1"),
        ({"start": float("nan")}, "start must be above 0"),
        ({"noise_scale": -0.1}, "noise_scale must be 0 or more, and finite; got -0.1"),
        ({"noise_scale": float("inf")}, "noise_scale must be 0 or more, and finite; got inf"),
        ({"noise_scale": float("nan")}, "noise_scale must be 0 or more"),
        ({"solver": "dpmpp_2m", "eta": 0.5}, r"solver=dpmpp_2m adds no noise, .* got 0.5: .* use sampler.solver=ddim"),
        ({"solver": "dimm"}, r"unknown solver 'dimm' \(did you mean 'ddim'\?\); allowed: .*plugins="),
        ({"solver": "eulr"}, r"'eulr' \(did you mean 'euler'\?\); allowed: ddim, dpmpp_2m, euler, one_call, two_calls"),
    ],
)
def test_a_sampler_refuses_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_a_sampler_is_checked_against_a_schedule_when_there_is_one():
    Sampler(ddim_steps=100).check(100)
    with pytest.raises(ValueError, match=r"within 1\.\.100 .*got 101"):
        Sampler(ddim_steps=101).check(100)
    Sampler(ddim_steps=40, warm_start=0.4).check(100)
    with pytest.raises(ValueError, match=r"warm_start=0\.4 leaves 40 of 100 timesteps, fewer than ddim_steps=41"):
        Sampler(ddim_steps=41, warm_start=0.4).check(100)
    Sampler(ddim_steps=30, start=0.3).check(100)
    with pytest.raises(
        ValueError, match=r"start=0\.3 leaves 30 of 100 timesteps, fewer than ddim_steps=31: raise start"
    ):
        Sampler(ddim_steps=31, start=0.3).check(100)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_a_cold_course_begins_from_noise_alone_and_visits_the_grid(spacing):
    course = Sampler(ddim_steps=7, spacing=spacing).cold_course(make_schedule(num_steps=100), "diffusion")
    assert torch.equal(course.timesteps, ddim_timesteps(100, 7, spacing))
    assert (course.signal, course.noise) == (0.0, 1.0)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("warm_start", [0.01, 0.33, 1.0])
def test_a_warm_course_begins_from_the_previous_chunk_under_the_noise_of_its_first_timestep(spacing, warm_start):
    schedule = make_schedule(num_steps=100)
    steps = 1 if warm_start == 0.01 else 5
    course = Sampler(ddim_steps=steps, spacing=spacing, warm_start=warm_start).warm_course(schedule, "diffusion")
    assert torch.equal(course.timesteps, ddim_timesteps(round(100 * warm_start), steps, spacing))
    previous, noise = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = schedule.add_noise(previous, noise, int(course.timesteps[0]))
    torch.testing.assert_close(course.signal * previous + course.noise * noise, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_a_start_below_the_last_timestep_visits_the_grid_of_what_lies_below_it(spacing):
    schedule = make_schedule(num_steps=100)
    sampler = Sampler(ddim_steps=5, spacing=spacing, start=0.3, warm_start=0.5)
    assert torch.equal(sampler.cold_course(schedule, "diffusion").timesteps, ddim_timesteps(30, 5, spacing))
    assert torch.equal(sampler.warm_course(schedule, "diffusion").timesteps, ddim_timesteps(50, 5, spacing))
    assert Sampler(ddim_steps=1, start=0.001).cold_course(schedule, "diffusion").timesteps.tolist() == [0]


def test_the_noise_of_every_starting_point_is_scaled():
    schedule = make_schedule(num_steps=100)
    plain, scaled = (Sampler(ddim_steps=5, warm_start=0.5, noise_scale=scale) for scale in (1.0, 0.3))
    assert scaled.cold_course(schedule, "diffusion").noise == 0.3
    warm, expected = scaled.warm_course(schedule, "diffusion"), plain.warm_course(schedule, "diffusion")
    assert (warm.signal, warm.noise) == (expected.signal, pytest.approx(0.3 * expected.noise))


def test_a_course_is_what_begins_from_noise_unless_it_says_more():
    course = Course(timesteps=torch.tensor([3, 1]))
    assert (course.signal, course.noise) == (0.0, 1.0)


# --- records -----------------------------------------------------------------------------------------------------


def test_a_record_holds_every_setting_but_later_ones_that_have_the_value_of_before():
    record = Sampler(ddim_steps=3).record()
    assert record == {"ddim_steps": 3, "eta": 0.0, "spacing": "trailing", "clip": 1.0, "warm_start": None}
    assert json.loads(json.dumps(record)) == record
    assert Sampler(**record) == Sampler(ddim_steps=3)


def test_later_settings_are_settings_and_their_values_of_before_are_the_defaults():
    """With another default, a new record without the setting would be read as one of before."""
    defaults = {field.name: field.default for field in (*fields(ControllerSettings), *fields(Sampler))}
    assert LATER_SETTINGS
    assert {name: defaults[name] for name in LATER_SETTINGS} == LATER_SETTINGS


def test_a_later_setting_is_recorded_where_it_differs(monkeypatch):
    monkeypatch.setitem(LATER_SETTINGS, "eta", 0.0)
    plain = Sampler()
    assert "eta" not in plain.record()
    assert replace(plain, eta=0.5).record()["eta"] == 0.5
    assert "solver" not in replace(plain, eta=0.5).record()
