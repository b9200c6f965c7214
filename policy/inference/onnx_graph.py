"""A sampling program as one ONNX graph: normalise and encode, a Scan over the steps, un-normalise.

The two halves of the program are traced once each and joined here around a Scan, whose body is one step. The size of
the file and the time to build it therefore do not grow with ddim_steps, and each weight is stored once and packed once
by the runtime. Unrolled steps would each pack their own copy, and a call would read K times as much memory.

The steps' coefficients, embedded timesteps and number are inputs. All samplers of a policy that clip alike, are alike
stochastic and carry the same state from step to step therefore share one graph, and one copy of the weights.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from policy.inference.int8 import narrow
from policy.inference.mapped import Maker, Place
from policy.inference.program import Program
from policy.inference.rewriting import Part, rewrite
from policy.model.diffusion_policy import zero_observations

OPSET = 18
IR_VERSION = 9  # the version of ONNX 1.14 (2023), which newer runtimes can read
# Two rows, because the exporter takes a traced size of 1 for a constant.
TRACED_ROWS = 2
# Prefix of the names in the body of the Scan.
STEP = "step."
# Numbers in a weight that is kept apart from the graph. Smaller ones stay in it, so that the runtime can fold them.
SMALLEST_WEIGHT = 1024
LARGEST_FILE = 2**31 - 1
# Name of the file that holds the weights which are kept apart.
WEIGHTS_FILE = "weights"


def require(package: str) -> Any:
    """Import an optional package.

    Args:
        package: `onnx`, `onnxscript` or `onnxruntime`.

    Returns:
        The package.

    Raises:
        ValueError: the package is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"backend=onnx needs the package {package}: pip install 'ddim-policy[export]'") from error


def observation_input(key: str) -> str:
    """Return the name of the graph's input for the observation under `key`; see `build_graph` for all inputs."""
    return f"observations.{key}"


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """A sampling program as an ONNX model whose large weights are kept apart, for all samplers of the same kind.

    Attributes:
        model: the model; it declares the weights as external, without a place. `sampler_inputs` names the inputs that
            hold everything that differs between samplers; `build_graph` lists the others.
        weights: how to make each of the weights, by name.
    """

    model: Any
    weights: dict[str, Maker]


def kind_of(program: Program) -> tuple[Any, ...]:
    """What programs of a policy must have in common to use the same graph."""
    return program.sampler.clip, program.sampler.eta > 0, program.is_multistep


def sampler_inputs(program: Program) -> dict[str, NDArray[np.float32]]:
    """The graph's inputs that depend on the sampler alone."""
    return {
        "embedded_timesteps": program.embedded_timesteps.cpu().numpy(),
        "start": program.start.cpu().numpy(),
        "step_coefficients": program.coefficients.cpu().numpy(),
    }


def build_graph(program: Program, weights: str) -> OnnxGraph:
    """Write a program as an ONNX graph.

    Args:
        program: the program, on the CPU.
        weights: `float32`, or `int8` for the weights of matrix products and convolutions over time.

    Returns:
        The graph. Its inputs, with any batch size B, are `observations.<key>` (B, obs_horizon, *shape) float32, or
        uint8 for an image, `noise` (B, denoised_horizon, action_dim), `previous` (B, action_horizon, action_dim),
        `keep` (B, action_horizon), for eta > 0 `step_noise` (K, B, denoised_horizon, action_dim), and those of
        `sampler_inputs`. Its output is `actions` (B, action_horizon, action_dim). Observations, `previous` and
        `actions` are in the data's units;
        `SamplerProgram` describes them.

    Raises:
        ValueError: an optional package is not installed.
    """
    onnx = require("onnx")
    require("onnxscript")  # the exporter needs it
    prepare, step = _traced(program)
    for part in (prepare, step):
        rewrite(onnx, part)
        if weights == "int8":
            narrow(onnx, part)
    model = _joined(onnx, program, prepare, step)
    if weights == "int8":
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return OnnxGraph(model=model, weights=_all_weights(prepare, step))


def complete_model(model: bytes, weights: Mapping[str, NDArray[Any]], constants: Mapping[str, NDArray[Any]]) -> bytes:
    """Write one sampler's model with everything in it.

    Args:
        model: a serialised `OnnxGraph.model`.
        weights: its weights.
        constants: its `sampler_inputs`, which become constants.

    Returns:
        The bytes of a file.

    Raises:
        ValueError: the model is larger than the 2 GB that one file may have.
    """
    onnx = require("onnx")
    size = sum(array.nbytes for array in weights.values())
    if size > LARGEST_FILE - len(model):
        raise ValueError(f"the model has {size / 1e9:.1f} GB, and one ONNX file may have 2 GB: use weights=int8")
    complete = onnx.ModelProto.FromString(model)
    graph = complete.graph
    inputs = [value for value in graph.input if value.name not in constants]
    stored = [value for value in graph.initializer if value.name not in weights]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.initializer.extend(stored)
    for name, array in {**constants, **weights}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return bytes(complete.SerializeToString())


def with_places(model: bytes, places: Mapping[str, Place]) -> bytes:
    """Say where the weights lie in the file `WEIGHTS_FILE` beside the model.

    Args:
        model: a serialised `OnnxGraph.model`.
        places: the place of each of its weights.

    Returns:
        The bytes of a file.
    """
    placed = require("onnx").ModelProto.FromString(model)
    for value in placed.graph.initializer:
        if value.name in places:
            place = places[value.name]
            value.external_data.add(key="offset", value=str(place.offset))
            value.external_data.add(key="length", value=str(place.size))
    return bytes(placed.SerializeToString())


def _traced(program: Program) -> tuple[Part, Part]:
    config, sampler = program.policy.config, program.sampler
    observations = zero_observations(config, TRACED_ROWS)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    embedded = program.embedded_timesteps[:1].expand(TRACED_ROWS, -1, -1)
    x = torch.zeros(TRACED_ROWS, config.denoised_horizon, config.action_dim)
    previous = torch.zeros(TRACED_ROWS, config.action_horizon, config.action_dim)
    with torch.no_grad():
        _, _, *conditions = program.prepare(observations, embedded, program.start, x, previous)
    names = [f"condition_{i}" for i in range(len(conditions))]
    prepare = _trace(
        program.prepare,
        (observations, embedded, program.start, x, previous),
        inputs=[*map(observation_input, observations), "embedded_timesteps", "start", "noise", "previous"],
        outputs=["first", "known", *names],
        dynamic=({key: {0: batch} for key in observations}, {0: steps}, None, {0: batch}, {0: batch}),
    )
    noisy, multistep = sampler.eta > 0, program.is_multistep
    # The inputs have the order of a Scan's body: the carried state first, then one row of each scanned tensor. `known`
    # and `keep` are the same in all steps, and the body takes them from the graph around it.
    state = ["x", *(["clean_before"] if multistep else [])]
    step = _trace(
        program.step,
        (
            x,
            x.clone() if multistep else None,
            x.clone(),
            previous[..., 0].clone(),
            program.coefficients[0],
            [condition[0] for condition in conditions],
            x.clone() if noisy else None,
        ),
        inputs=[*state, "known", "keep", "coefficients", *names, *(["added"] if noisy else [])],
        outputs=[f"{name}_next" for name in state],
        dynamic=(
            {0: batch},
            {0: batch} if multistep else None,
            {0: batch},
            {0: batch},
            None,
            [{0: batch} for _ in names],
            {0: batch} if noisy else None,
        ),
    )
    return prepare, step


def _trace(
    module: nn.Module, arguments: tuple[Any, ...], *, inputs: list[str], outputs: list[str], dynamic: tuple[Any, ...]
) -> Part:
    with _quiet():
        traced = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert traced is not None
    # The weights are taken out before the graph is serialised, so that they are not copied.
    initializers, weights = traced.model.graph.initializers, dict[str, Maker]()
    for name, value in list(initializers.items()):
        if value.const_value is not None and value.const_value.size >= SMALLEST_WEIGHT:
            weights[name] = value.const_value.numpy
            del initializers[name]
    return Part(traced.model_proto.graph, weights)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of packages that are not needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _joined(onnx: Any, program: Program, prepare: Part, step: Part) -> Any:
    helper, numpy_helper, floats = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    config, (factor, shift) = program.policy.config, program.policy.action_normalizer.inverse()
    chunk = ["batch", config.action_horizon, config.action_dim]
    denoised = ["batch", config.denoised_horizon, config.action_dim]
    coefficients = ["steps", program.coefficients.shape[1]]
    more = [
        helper.make_tensor_value_info("keep", floats, chunk[:2]),
        helper.make_tensor_value_info("step_coefficients", floats, coefficients),
    ]
    scanned = ["step_coefficients", *(v.name for v in prepare.graph.output if v.name not in ("first", "known"))]
    if program.sampler.eta > 0:
        more.append(helper.make_tensor_value_info("step_noise", floats, ["steps", *denoised]))
        scanned.append("step_noise")
    # The starting point stands in for the clean estimate before the first one, as in `reverse_process`.
    carried, ended = (["first"] * 2, ["denoised", "last_clean"]) if program.is_multistep else (["first"], ["denoised"])
    body = _under(STEP, step.graph, outer=("known", "keep"))
    nodes = [
        *prepare.graph.node,
        helper.make_node("Scan", [*carried, *scanned], ended, body=body, num_scan_inputs=len(scanned)),
        # Past actions are cut off.
        helper.make_node("Slice", ["denoised", "actions.first", "actions.end", "actions.axis"], ["normalized"]),
        helper.make_node("Mul", ["normalized", "actions.factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "actions.shift"], ["actions"]),
    ]
    constants = {
        "actions.first": torch.tensor([config.past_actions]),
        "actions.end": torch.tensor([config.denoised_horizon]),
        "actions.axis": torch.tensor([1]),
        "actions.factor": factor,
        "actions.shift": shift,
    }
    graph = helper.make_graph(
        nodes,
        "sampler",
        [*prepare.graph.input, *more],
        [helper.make_tensor_value_info("actions", floats, chunk)],
        [
            *prepare.graph.initializer,
            *(numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()),
            *(_declared(onnx, name, make()) for name, make in _all_weights(prepare, step).items()),
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ddim-policy"
    )


def _all_weights(prepare: Part, step: Part) -> dict[str, Maker]:
    """The weights of both parts by their names in the joined graph; the exporter numbers the constants of each anew."""
    return {**prepare.weights, **{f"{STEP}{name}": make for name, make in step.weights.items()}}


def _declared(onnx: Any, name: str, array: NDArray[Any]) -> Any:
    """The declaration of a weight that the runtime is given apart from the model."""
    value = onnx.TensorProto(
        name=name,
        dims=array.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    value.external_data.add(key="location", value=WEIGHTS_FILE)
    return value


def _under(prefix: str, graph: Any, outer: Collection[str]) -> Any:
    """Prefix the graph's names, because a Scan's body shares them with the graph around it; `outer` ones stay.

    The weights are those of the graph around it, under their prefixed names: a runtime takes weights that are apart
    from the model for the outermost graph alone.
    """
    inputs = [value for value in graph.input if value.name not in outer]
    del graph.input[:]
    graph.input.extend(inputs)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name if name in outer else name and prefix + name for name in names]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = prefix + value.name
    del graph.value_info[:]
    graph.name = "step"
    return graph
