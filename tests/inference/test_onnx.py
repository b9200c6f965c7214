"""Sampling programs in ONNX Runtime: the eager back end's actions, from a file that does not grow with the steps."""

import copy
import errno
import functools
import importlib.util
import itertools
import json
import pickle
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch.onnx._internal.exporter import _registration

from policy import Sampler
from policy.diffusion.ddim import SPACINGS
from policy.diffusion.schedule import PREDICTION_TYPES
from policy.inference import onnx_graph
from policy.inference.backends import compile_sampler, compile_shared
from policy.inference.int8 import quantized
from policy.inference.mapped import MappedArrays
from policy.inference.onnx_graph import kind_of
from policy.inference.rewriting import Part
from policy.model.config import config_to_json
from policy.model.denoisers import DENOISERS
from policy.model.diffusion_policy import DiffusionPolicy
from tests.conftest import randomize
from tests.inference.cases import (
    TOLERANCE,
    check_continuation,
    check_refusals,
    difference,
    inputs,
    make_policy,
    shared_policy,
    shared_program,
)

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install 'ddim-policy[export]'",
)
needs_packing = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or Version(version("onnxruntime")) < Version("1.31"),
    reason="an older ONNX Runtime cannot write packed weights",
)


@pytest.fixture(autouse=True, scope="module")
def _traced_once():
    """Trace equal programs once, however their weights are stored then: tracing takes almost all of the time."""
    traced, known = onnx_graph._traced, {}

    def once(program):
        settings = json.dumps(config_to_json(program.policy.config)), kind_of(program)
        if settings not in known:  # the weights of `make_policy` follow from the configuration
            known[settings] = traced(program)
        return [Part(copy.deepcopy(graph), dict(weights)) for graph, weights in known[settings]]

    registry = _registration.ONNXRegistry  # torch fills a new one for every trace, which takes a third of its time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        patch.setattr(onnx_graph, "_traced", once)
        yield


# Every denoiser, prediction type, kind of observation and kind of step, each in as few programs as that takes.
WIDE = {"hidden_size": 192, "num_layers": 1}
CASES = {
    "stochastic": (("modulated_mlp", "sample"), WIDE, Sampler(ddim_steps=4, eta=0.5)),
    "warm": (("modulated_mlp", "epsilon"), WIDE, Sampler(ddim_steps=4, eta=0.5, spacing="leading", warm_start=0.4)),
    "one step": (("residual_mlp", "v_prediction"), {}, Sampler(ddim_steps=1, clip=None, spacing="linspace")),
    "all steps": (("residual_mlp", "v_prediction"), {}, Sampler(ddim_steps=100, clip=None, spacing="linspace")),
    "images": (("modulated_mlp", "sample", True), {}, Sampler(ddim_steps=2)),
    "multistep": (
        ("unet", "v_prediction"),
        {},
        Sampler(ddim_steps=8, solver="dpmpp_2m", start=0.7, noise_scale=0.5),
    ),
    "transformer": (("transformer", "sample"), WIDE, Sampler(ddim_steps=3, eta=1.0)),
    "encoder-decoder": (("encoder_decoder", "v_prediction"), {}, Sampler(ddim_steps=3, clip=None)),
}


def case(name, **settings):
    """Policy, sampler and ONNX program of a case."""
    kind, sizes, sampler = CASES[name]
    policy = shared_policy(*kind, **sizes)
    return policy, sampler, shared_program(policy, sampler, backend="onnx", **settings)


@needs_onnx
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow]
            if name in ("all steps", "images", "transformer", "encoder-decoder", "one step", "multistep")
            else [],
        )
        for name in CASES
    ],
)
def test_onnx_gives_the_eager_actions_at_any_batch_size(name):
    policy, sampler, program = case(name)
    eager = compile_sampler(policy, sampler, backend="eager")
    for rows in (1, 7):
        observations, noise, step_noise = inputs(policy, sampler, rows)
        expected = eager(observations, noise, step_noise)
        assert difference(policy, program(observations, noise, step_noise), expected) < TOLERANCE
        other, _, _ = inputs(policy, sampler, rows, seed=2)
        assert difference(policy, eager(other, noise, step_noise), expected) > 100 * TOLERANCE


@needs_onnx
@pytest.mark.slow
def test_onnx_gives_the_actions_of_a_policy_that_observes_differences():
    sampler, config = Sampler(ddim_steps=2), shared_policy("modulated_mlp", "sample").config
    policy = DiffusionPolicy(
        replace(config, differences=((0, 3), (1, 2)), direction_differences=((0, 2),), end_differences=(1,))
    )
    randomize(policy)
    given = inputs(policy, sampler)
    expected = compile_sampler(policy, sampler, backend="eager")(*given)
    assert difference(policy, compile_sampler(policy, sampler, backend="onnx")(*given), expected) < TOLERANCE


@needs_onnx
def test_the_programs_of_a_policy_change_their_threads_together_and_back():
    policy, sampler, program = case("stochastic")
    session, given, before = program.run.model.session, inputs(policy, sampler), torch.get_num_threads()
    expected = program(*given)
    program.use_threads(2)
    try:
        assert program.run.model.session is not session
        assert program.run.model.session.get_session_options().intra_op_num_threads == torch.get_num_threads() == 2
        assert difference(policy, program(*given), expected) < TOLERANCE
    finally:
        program.use_threads(1)
        torch.set_num_threads(before)
    assert program.run.model.session.get_session_options().intra_op_num_threads == 1
    assert torch.equal(program(*given), expected)


@needs_onnx
@pytest.mark.parametrize("name", ["stochastic", "warm", pytest.param("one step", marks=pytest.mark.slow)])
def test_an_onnx_program_continues_a_chunk_as_ddim_step_does(name):
    """Each prediction type once, and from noise as well as from the previous chunk."""
    policy, sampler, _ = case(name)
    check_continuation(policy, sampler, "onnx")


SETTINGS = [
    Sampler(ddim_steps=k, eta=eta, clip=clip, spacing=spacing)
    for k, eta, clip, spacing in itertools.product((1, 2, 3, 8, 16), (0.0, 0.5, 1.0), (None, 1.0, 0.5), SPACINGS)
]


@pytest.mark.slow  # minutes of tracing
@needs_onnx
@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_onnx_gives_the_eager_actions_under_many_settings(denoiser, prediction_type):
    policy = shared_policy(denoiser, prediction_type)
    for sampler in SETTINGS[:: 7 if denoiser == "modulated_mlp" else 11]:
        given = inputs(policy, sampler)
        expected = compile_sampler(policy, sampler, backend="eager")(*given)
        program = compile_sampler(policy, sampler, backend="onnx")
        assert difference(policy, program(*given), expected) < TOLERANCE, sampler


@pytest.mark.slow  # minutes of tracing
@needs_onnx
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("warm_start", [None, 0.4])
def test_an_onnx_program_continues_a_chunk_whatever_is_predicted(prediction_type, warm_start):
    sampler = Sampler(ddim_steps=4, eta=0.5, warm_start=warm_start)
    check_continuation(shared_policy(prediction_type=prediction_type), sampler, "onnx")


@needs_onnx
@pytest.mark.slow  # all samplers share one graph, see above
def test_the_size_of_an_onnx_program_does_not_grow_with_its_steps():
    small, large = (case(name)[2].run.file() for name in ("one step", "all steps"))
    assert len(large) - len(small) < 99 * 4 * (32 + 5 + 2)  # a timestep's embedding and coefficients for each step


@needs_onnx
def test_samplers_of_a_policy_share_one_model():
    policy, sampler, _ = case("stochastic")
    programs = [compile_shared(policy, replace(sampler, ddim_steps=steps), backend="onnx") for steps in (1, 3)]
    assert programs[0].run.model is programs[1].run.model
    observations, noise, step_noise = inputs(policy, replace(sampler, ddim_steps=3))
    one, three = (program(observations, noise, step_noise[: program.sampler.ddim_steps]) for program in programs)
    assert not torch.equal(one, three)


@needs_onnx
@pytest.mark.slow  # one more trace
def test_solvers_that_carry_the_same_state_share_one_model():
    policy, sampler, _ = case("multistep")
    models = {
        solver: compile_shared(policy, replace(sampler, solver=solver, ddim_steps=2), backend="onnx").run.model
        for solver in ("ddim", "dpmpp_2m")
    }
    again = compile_shared(policy, replace(sampler, start=1.0), backend="onnx").run.model
    assert again is models["dpmpp_2m"]
    assert models["ddim"] is not models["dpmpp_2m"]


@needs_onnx
def test_an_onnx_program_can_be_sent_to_another_process():
    policy, sampler, program = case("stochastic")
    again = pickle.loads(pickle.dumps(program))
    given = inputs(policy, sampler)
    assert torch.equal(again(*given), program(*given))


@needs_onnx
@needs_packing
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("stochastic", {}),
        ("stochastic", {"weights": "int8"}),
        ("multistep", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("images", "encoder-decoder")),
        pytest.param("multistep", {"weights": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_packed_weights_give_the_same_bits_in_another_process(name, settings, tmp_path):
    policy, sampler, program = case(name, **settings)
    packed = program.run.model.packed(tmp_path)
    assert program.run.model.packed(tmp_path) is packed, "it is written once"
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"packed.onnx", "packed_weights"}
    again = pickle.loads(pickle.dumps(replace(program, run=program.run.on(packed))))
    for rows in (1, 7):
        given = inputs(policy, sampler, rows)
        assert torch.equal(again(*given), program(*given))


@needs_onnx
def test_weights_that_cannot_be_packed_stay_as_they_are(tmp_path, monkeypatch):
    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", "a node " * 100)

    monkeypatch.setattr(MappedArrays, "copy_to", full)
    model = case("stochastic")[2].run.model
    with pytest.warns(UserWarning, match=r"its own copy of the weights, .*No space left.*: a folder with room") as said:
        assert model.packed(tmp_path) is model
    assert len(str(said[0].message)) < 400 + len(str(tmp_path))
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize(
    "name", ["stochastic", pytest.param("transformer", marks=pytest.mark.slow)]
)  # of matrices alone
def test_int8_weights_are_smaller_and_come_close(name):
    policy, sampler, exact = case(name)
    _, _, narrow = case(name, weights="int8")
    assert len(narrow.run.file()) < 0.35 * len(exact.run.file())
    given = inputs(policy, sampler)
    off = difference(policy, narrow(*given), exact(*given))
    assert 1e-6 < off < 0.1


@pytest.mark.parametrize("block_size", [32, 64])
def test_quantized_weights_are_off_by_half_a_step_at_most(block_size):
    weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    weight[2] = 0
    values, scales = quantized(weight, block_size)
    assert values.shape == (6, 128 // block_size, block_size)
    restored = (values.astype(np.float32) - 128) * scales[..., None]
    assert (np.abs(restored.reshape(6, 128) - weight) <= 0.5001 * scales.repeat(block_size, axis=1)).all()
    assert values.min() == 1 or values.max() == 255


@needs_onnx
@pytest.mark.slow  # a trace for a check that all back ends share; test_inference.py looks at it
def test_inputs_that_do_not_fit_are_refused_in_a_sentence():
    check_refusals("onnx")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(onnx_graph.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package onnx: pip install 'ddim-policy\[export\]'"):
        compile_sampler(make_policy(), Sampler(), backend="onnx")
