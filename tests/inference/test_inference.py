"""Compiled sampling: the eager back end's actions from every other one, and errors that say what cannot run."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch

from policy import Sampler
from policy.diffusion.coefficients import reverse_process
from policy.diffusion.ddim import SPACINGS, ddim_sample, ddim_timesteps
from policy.diffusion.schedule import PREDICTION_TYPES
from policy.inference.backends import BACKENDS, PLAIN_BACKEND, compile_sampler
from policy.inference.runners import Compiled
from policy.model.denoisers import DENOISERS
from tests.inference.cases import (
    TOLERANCE,
    check_continuation,
    check_refusals,
    continuing,
    difference,
    inputs,
    make_policy,
    shared_policy,
    shared_program,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("each_row", [True, False])
def test_the_eager_program_is_sample_actions_bit_for_bit(eta, each_row):
    policy, sampler = shared_policy(), Sampler(ddim_steps=3, eta=eta, spacing="leading")
    observations, *_ = inputs(policy, sampler)

    def generator():
        seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return seeded if each_row else seeded[0]

    settings = {name: getattr(sampler, name) for name in ("ddim_steps", "eta", "spacing", "clip")}
    assert dataclasses.replace(Sampler(), **settings) == sampler  # nothing else is set
    expected = policy.sample_actions(observations, generator=generator(), **settings)
    program = compile_sampler(policy, sampler, backend="eager")
    assert program.backend == "eager"
    assert torch.equal(program.sample_actions(observations, generator=generator()), expected)


def test_programs_are_fused_where_nothing_else_is_chosen():
    assert compile_sampler(shared_policy(), Sampler()).backend == PLAIN_BACKEND == "fused"


SETTINGS = [
    Sampler(ddim_steps=k, eta=eta, clip=clip, spacing=spacing)
    for k, eta, clip, spacing in itertools.product((1, 2, 3, 8, 16), (0.0, 0.5, 1.0), (None, 1.0, 0.5), SPACINGS)
]
MULTISTEP = [
    Sampler(ddim_steps=k, clip=clip, spacing=spacing, solver="dpmpp_2m", start=start, noise_scale=scale)
    for k, clip, spacing, start, scale in itertools.product((3, 8), (None, 1.0), SPACINGS, (0.6, 1.0), (0.5, 1.0))
]


def check_fused(denoiser, prediction_type, settings):
    policy, moved = shared_policy(denoiser, prediction_type), 0
    for sampler in settings:
        given = inputs(policy, sampler)
        expected = compile_sampler(policy, sampler, backend="eager")(*given)
        actions = compile_sampler(policy, sampler, backend="fused")(*given)
        assert difference(policy, actions, expected) < TOLERANCE, sampler
        moved += difference(policy, actions, policy.action_normalizer.unnormalize(given[1])) > 0.1
    assert moved > 0.9 * len(settings)  # almost everywhere: noise that the clipping leaves as it is is possible


# Each denoiser and each prediction type once; all pairs are in the slow test below.
@pytest.mark.parametrize(("denoiser", "prediction_type"), zip(DENOISERS, itertools.cycle(PREDICTION_TYPES)))
def test_conditioning_all_steps_at_once_changes_nothing(denoiser, prediction_type):
    """Every seventh of the settings: among those, each value still meets each value of every other setting."""
    first = PREDICTION_TYPES.index(prediction_type)
    check_fused(denoiser, prediction_type, [*SETTINGS[first::7], *MULTISTEP[first::7]])


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conditioning_all_steps_at_once_changes_nothing_at_any_setting(denoiser, prediction_type):
    check_fused(denoiser, prediction_type, SETTINGS + MULTISTEP)


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("warm_start", [None, 0.4])
def test_a_program_continues_a_chunk_as_ddim_step_does(backend, prediction_type, warm_start):
    sampler = Sampler(ddim_steps=4, eta=0.5, warm_start=warm_start)
    check_continuation(shared_policy(prediction_type=prediction_type), sampler, backend)


# The settings of the starting point, which `ddim_step` knows nothing of.
@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("warm_start", [None, 0.4])
def test_a_program_begins_where_its_sampler_says(backend, warm_start):
    sampler = Sampler(ddim_steps=4, warm_start=warm_start, start=0.6, noise_scale=0.5)
    check_continuation(shared_policy(prediction_type="v_prediction"), sampler, backend)


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(ddim_steps=4, eta=0.5),
        Sampler(ddim_steps=4, eta=0.5, warm_start=0.4),
        Sampler(ddim_steps=4, start=0.6, noise_scale=0.5, clip=None),
    ],
)
def test_a_network_that_sees_an_estimate_of_the_chunk_samples_as_ddim_step_does(backend, sampler):
    policy = shared_policy(sigma_data=0.5)
    check_continuation(policy, sampler, backend)
    given = inputs(policy, sampler)
    actions, plain = (shared_program(one, sampler, backend=backend)(*given) for one in (policy, shared_policy()))
    assert difference(policy, actions, plain) > 0.05


def test_the_public_sampler_shows_the_estimate_to_the_network_of_such_a_schedule():
    policy = shared_policy(sigma_data=0.5)
    observations, noise, _ = inputs(policy, Sampler())
    embedding = policy.embed(observations)
    given = {"schedule": policy.schedule, "ddim_steps": 4, "prediction_type": "sample"}
    chunk = ddim_sample(policy.denoiser, embedding, noise, **given)
    expected = policy.sample_actions(observations, ddim_steps=4, noise=noise)
    assert difference(policy, policy.action_normalizer.unnormalize(chunk), expected) < TOLERANCE


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_the_estimate_of_normal_data_leads_from_noise_to_such_data(solver):
    """For chunks of zero mean and known deviation the estimate is the answer: a network that returns it is perfect."""
    policy = shared_policy(sigma_data=0.3)
    sampler = Sampler(ddim_steps=100, solver=solver, clip=None)
    course = sampler.cold_course(policy.schedule, "diffusion")
    noise = torch.tensor([-2.0, 0.1, 1.0], dtype=torch.float64)
    table = sampler.table(policy.schedule, course, "sample", "diffusion")
    chunks = reverse_process(
        lambda step, x: x, course.noise * noise, table, predicts_clean=True, clip=None, step_noise=None
    )
    torch.testing.assert_close(chunks, 0.3 * noise, rtol=0.03, atol=0)  # up to the error of 100 steps


def test_without_noise_every_draw_is_the_same_chunk():
    policy = shared_policy()
    observations, noise, _ = inputs(policy, Sampler())
    for backend in ("eager", "fused"):
        program = compile_sampler(policy, Sampler(ddim_steps=2, start=0.5, noise_scale=0.0), backend=backend)
        assert torch.equal(program(observations, noise), program(observations, -noise))


def test_what_is_kept_is_seen_by_the_network_as_data_under_its_own_noise():
    policy, sampler = make_policy(), Sampler(ddim_steps=5, warm_start=0.5)
    observations, noise, _ = inputs(policy, sampler)
    before, seen = continuing(policy), []
    program = compile_sampler(policy, sampler, backend="eager")
    known = policy.action_normalizer.normalize(before["previous"])
    denoiser = program.warm_run._policy.denoiser
    denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    program(observations, noise, **before)
    assert [timestep[0].item() for _, timestep in seen] == ddim_timesteps(50, 5).tolist()
    for x, timestep in seen:
        assert torch.allclose(x[:, :3], policy.schedule.add_noise(known, noise, timestep)[:, :3], atol=1e-5)


def test_a_previous_chunk_that_cannot_be_used_is_refused():
    policy, sampler = shared_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program, before = compile_sampler(policy, sampler), continuing(policy)
    with pytest.raises(ValueError, match=r"previous must have shape \(3, 8, 2\); got \(3, 7, 2\)"):
        program(observations, noise, previous=before["previous"][:, 1:])
    with pytest.raises(ValueError, match=r"keep must have shape \(3, 8\); got \(3, 8, 2\)"):
        program(observations, noise, previous=before["previous"], keep=torch.zeros(3, 8, 2))
    with pytest.raises(ValueError, match=r"keep says .* pass previous="):
        program(observations, noise, keep=before["keep"])
    with pytest.raises(ValueError, match=r"warm_start=0.05 leaves 5 of 100 timesteps, fewer than ddim_steps=8"):
        compile_sampler(policy, Sampler(warm_start=0.05))
    for wrong in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="warm_start must be above 0"):
            Sampler(warm_start=wrong)


@pytest.mark.slow  # compiles for minutes
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("sampler", [Sampler(ddim_steps=2), Sampler(ddim_steps=3, eta=1.0, clip=None)])
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_torch_compile_gives_the_eager_actions(denoiser, sampler):
    policy = shared_policy(denoiser)
    program = compile_sampler(policy, sampler, backend="compile")
    eager = compile_sampler(policy, sampler, backend="eager")
    for rows in (1, 7):
        given = inputs(policy, sampler, rows)
        assert difference(policy, program(*given), eager(*given)) < TOLERANCE


@needs_cuda
@pytest.mark.parametrize("sampler", [Sampler(ddim_steps=4), Sampler(ddim_steps=3, eta=1.0)])
def test_cuda_graphs_give_the_eager_actions_again_and_again(sampler):
    policy = make_policy().to("cuda")
    program, eager = (compile_sampler(policy, sampler, backend=backend) for backend in ("cuda_graph", "eager"))
    for rows, seed in ((1, 1), (7, 1), (1, 2)):
        given = inputs(policy, sampler, rows, seed)
        assert difference(policy, program(*given), eager(*given)) < 10 * TOLERANCE


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_program_keeps_the_weights_it_was_made_with(backend):
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program = compile_sampler(policy, sampler, backend=backend)
    before = program(observations, noise)
    with torch.no_grad():
        policy.denoiser.leave.bias += 1
    assert torch.equal(program(observations, noise), before)
    assert not torch.equal(compile_sampler(policy, sampler, backend=backend)(observations, noise), before)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_policy_in_training_mode_is_sampled_without_dropout(backend):
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    expected = compile_sampler(policy, sampler, backend=backend)(observations, noise)
    again = compile_sampler(policy.train(), sampler, backend=backend)
    assert torch.equal(again(observations, noise), expected)
    assert policy.training


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_arrays_of_any_float_type_do(backend):
    policy, sampler = shared_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program = compile_sampler(policy, sampler, backend=backend)
    arrays = {key: value.numpy().astype(np.float64) for key, value in observations.items()}
    assert torch.equal(program(arrays, noise.numpy()), program(observations, noise))


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_inputs_that_do_not_fit_are_refused_in_a_sentence(backend):
    check_refusals(backend)


def test_missing_step_noise_is_refused():
    policy, sampler = shared_policy(), Sampler(ddim_steps=2, eta=1.0)
    observations, noise, _ = inputs(policy, sampler)
    with pytest.raises(ValueError, match=r"eta=1.0 needs step_noise of shape \(2, 3, 8, 2\); got None"):
        compile_sampler(policy, sampler)(observations, noise)


def test_what_cannot_run_is_refused_before_it_does(monkeypatch):
    policy, sampler = shared_policy(), Sampler()
    with pytest.raises(
        ValueError, match=r"unknown backend 'onxx' \(did you mean 'onnx'\?\); allowed: auto, compile, cuda"
    ):
        compile_sampler(policy, sampler, backend="onxx")
    with pytest.raises(ValueError, match="needs a policy on a GPU; this one is on cpu: use backend=onnx"):
        compile_sampler(policy, sampler, backend="cuda_graph")
    with pytest.raises(ValueError, match=r"unknown weights 'int9' \(did you mean 'int8'\?\)"):
        compile_sampler(policy, sampler, backend="onnx", weights="int9")
    with pytest.raises(ValueError, match="weights=int8 needs backend=onnx; got backend=eager"):
        compile_sampler(policy, sampler, backend="eager", weights="int8")
    with pytest.raises(ValueError, match=r"ddim_steps must be a whole number within 1..100"):
        compile_sampler(policy, Sampler(ddim_steps=101))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .*: install one, or use backend=onnx"):
        compile_sampler(policy, sampler, backend="compile")
    assert set(BACKENDS) == {"eager", "fused", "compile", "onnx", "cuda_graph"}


def test_a_folder_that_the_compiler_cannot_write_to_is_one_sentence(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def refuse(module):
        def call(inputs):
            raise TorchDynamoException("PermissionError: '/cache'\nSet TORCH_LOGS")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    compiled = Compiled.__new__(Compiled)
    compiled._program = torch.compile(None)
    with pytest.raises(ValueError, match=r"^backend=compile cannot compile \(.*'/cache'\): TORCHINDUCTOR_CACHE_DIR"):
        compiled(None)
