"""Every back end samples a policy of every objective as its own few lines do."""

import importlib.util

import pytest
import torch

from policy import Sampler
from policy.diffusion.objective import OBJECTIVES
from policy.inference.backends import compile_sampler
from tests.inference.cases import TOLERANCE, continuing, difference, inputs, shared_policy

OTHERS = [name for name in OBJECTIVES if name != "diffusion"]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install 'ddim-policy[export]'",
)


def samplers(objective):
    """Samplers of a policy: from noise and, where its objective has it, from the previous chunk."""
    if objective != "flow":
        return [Sampler(), Sampler(clip=None)]
    return [Sampler(ddim_steps=3), Sampler(ddim_steps=4, warm_start=0.5, start=0.8, noise_scale=0.5, clip=None)]


def check_equals_eager(objective, backend):
    policy = shared_policy(objective=objective)
    for sampler in samplers(objective):
        given, before = inputs(policy, sampler), continuing(policy)
        program, eager = (compile_sampler(policy, sampler, backend=name) for name in (backend, "eager"))
        assert program.sampler == policy.settled(sampler)
        assert difference(policy, program(*given), eager(*given)) < TOLERANCE
        continued = program(*given, **before)
        assert difference(policy, continued, eager(*given, **before)) < TOLERANCE
        assert torch.allclose(continued[:, :3], before["previous"][:, :3], atol=1e-4)


@pytest.mark.parametrize("objective", OTHERS)
def test_the_fused_program_is_the_eager_one(objective):
    check_equals_eager(objective, "fused")


@needs_onnx
@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize("objective", OTHERS)
def test_the_onnx_program_is_the_eager_one(objective):
    check_equals_eager(objective, "onnx")


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("objective", OTHERS)
def test_int8_weights_are_close_to_the_eager_actions(objective):
    policy = shared_policy(objective=objective, hidden_size=192, num_layers=1)
    given = inputs(policy, Sampler(ddim_steps=2))
    int8 = compile_sampler(policy, Sampler(), backend="onnx", weights="int8")(*given)
    assert 0 < difference(policy, int8, compile_sampler(policy, Sampler(), backend="eager")(*given)) < 0.1


@pytest.mark.parametrize("objective", OTHERS)
def test_the_eager_program_is_what_the_policy_samples(objective):
    policy = shared_policy(objective=objective)
    observations, noise, _ = inputs(policy, Sampler())
    program = compile_sampler(policy, Sampler(), backend="eager")
    assert torch.equal(program(observations, noise), policy.sample_actions(observations, noise=noise))


def test_what_a_flow_keeps_is_seen_by_the_network_under_its_own_noise():
    policy, sampler = shared_policy(objective="flow"), Sampler(ddim_steps=5, warm_start=0.5)
    observations, noise, _ = inputs(policy, sampler)
    before, seen = continuing(policy), []
    program = compile_sampler(policy, sampler, backend="eager")
    known = policy.action_normalizer.normalize(before["previous"])
    program.warm_run._policy.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    program(observations, noise, **before)
    assert [timestep[0].item() for _, timestep in seen] == [49, 39, 29, 19, 9]
    for x, timestep in seen:
        t = (timestep[0].item() + 1) / 100
        assert torch.allclose(x[:, :3], ((1 - t) * known + t * noise)[:, :3], atol=1e-5)
