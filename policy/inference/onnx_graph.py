"""A sampling program as one ONNX graph: normalise and encode, a Scan over the steps, un-normalise.

The two halves of the program are traced once each and joined here around a Scan, whose body is one step. The size of
the file and the time to build it therefore do not grow with ddim_steps, and each weight is stored once and packed once
by the runtime. Unrolled steps would each pack their own copy, and a call would read K times as much memory.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from policy.inference.int8 import narrow
from policy.inference.program import Program
from policy.model.diffusion_policy import zero_observations

OPSET = 18
IR_VERSION = 9  # the version of ONNX 1.14 (2023), which newer runtimes can read
# Two rows, because the exporter takes a traced size of 1 for a constant.
TRACED_ROWS = 2


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
    """Return the name of the graph's input for the observation under `key`; see `build_model` for all inputs."""
    return f"observations.{key}"


def build_model(program: Program, weights: str) -> bytes:
    """Write a program as an ONNX model.

    Args:
        program: the program, on the CPU.
        weights: `float32`, or `int8` for the weight matrices.

    Returns:
        The model's bytes. Its inputs, with any batch size B, are `observations.<key>` (B, obs_horizon, *shape) float32,
        or uint8 for an image, `noise` (B, denoised_horizon, action_dim), `previous` (B, action_horizon, action_dim),
        `keep` (B, action_horizon) and, for eta > 0, `step_noise` (K, B, denoised_horizon, action_dim). Its output is
        `actions` (B, action_horizon, action_dim). Observations, `previous` and `actions` are in the data's units;
        `SamplerProgram` describes them.

    Raises:
        ValueError: an optional package is not installed.
    """
    onnx = require("onnx")
    require("onnxscript")  # the exporter needs it
    prepare, step = _traced(program)
    model = _joined(onnx, program, prepare, step)
    if weights == "int8":
        narrow(onnx, model)
    return bytes(model.SerializeToString())


def _traced(program: Program) -> tuple[Any, Any]:
    config, sampler = program.policy.config, program.sampler
    observations = zero_observations(config, TRACED_ROWS)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    embedded = program.embedded_timesteps[:1].expand(TRACED_ROWS, -1, -1)
    x = torch.zeros(TRACED_ROWS, config.denoised_horizon, config.action_dim)
    previous = torch.zeros(TRACED_ROWS, config.action_horizon, config.action_dim)
    with torch.no_grad():
        _, _, *conditions = program.prepare(observations, embedded, x, previous)
    names = [f"condition_{i}" for i in range(len(conditions))]
    prepare = _trace(
        program.prepare,
        (observations, embedded, x, previous),
        inputs=[*map(observation_input, observations), "embedded_timesteps", "noise", "previous"],
        outputs=["start", "known", *names],
        dynamic=({key: {0: batch} for key in observations}, {0: steps}, {0: batch}, {0: batch}),
    )
    noisy = sampler.eta > 0
    # The inputs have the order of a Scan's body: the carried state first, then one row of each scanned tensor. `known`
    # and `keep` are the same in all steps, and the body takes them from the graph around it.
    step = _trace(
        program.step,
        (
            x,
            x.clone(),
            previous[..., 0].clone(),
            program.coefficients[0],
            [condition[0] for condition in conditions],
            x.clone() if noisy else None,
        ),
        inputs=["x", "known", "keep", "coefficients", *names, *(["added"] if noisy else [])],
        outputs=["x_next"],
        dynamic=(
            {0: batch},
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
) -> Any:
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
    return traced.model_proto.graph


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


def _joined(onnx: Any, program: Program, prepare: Any, step: Any) -> Any:
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    config, (factor, shift) = program.policy.config, program.policy.action_normalizer.inverse()
    chunk = ["batch", config.action_horizon, config.action_dim]
    denoised = ["batch", config.denoised_horizon, config.action_dim]
    more = [helper.make_tensor_value_info("keep", onnx.TensorProto.FLOAT, chunk[:2])]
    scanned = ["step_coefficients", *(value.name for value in prepare.output if value.name not in ("start", "known"))]
    if program.sampler.eta > 0:
        steps = [program.sampler.ddim_steps, *denoised]
        more.append(helper.make_tensor_value_info("step_noise", onnx.TensorProto.FLOAT, steps))
        scanned.append("step_noise")
    nodes = [
        *prepare.node,
        helper.make_node(
            "Scan",
            ["start", *scanned],
            ["denoised"],
            body=_under("step.", step, outer=("known", "keep")),
            num_scan_inputs=len(scanned),
        ),
        # Past actions are cut off.
        helper.make_node("Slice", ["denoised", "actions.first", "actions.end", "actions.axis"], ["normalized"]),
        helper.make_node("Mul", ["normalized", "actions.factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "actions.shift"], ["actions"]),
    ]
    constants = {
        "embedded_timesteps": program.embedded_timesteps,
        "step_coefficients": program.coefficients,
        "actions.first": torch.tensor([config.past_actions]),
        "actions.end": torch.tensor([config.denoised_horizon]),
        "actions.axis": torch.tensor([1]),
        "actions.factor": factor,
        "actions.shift": shift,
    }
    graph = helper.make_graph(
        nodes,
        "sampler",
        [value for value in prepare.input if value.name != "embedded_timesteps"] + more,
        [helper.make_tensor_value_info("actions", onnx.TensorProto.FLOAT, chunk)],
        [*prepare.initializer, *(numpy_helper.from_array(value.numpy(), name) for name, value in constants.items())],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ddim-policy"
    )


def _under(prefix: str, graph: Any, outer: Collection[str]) -> Any:
    """Prefix the graph's names, because a Scan's body shares them with the graph around it; `outer` ones stay."""
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
