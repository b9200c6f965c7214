"""`ddim-export`: export a policy to a folder for programs that have neither torch nor this package.

export/
  model.onnx           observations and noise in, actions out, all in the data's units
  export.json          the model's inputs and output, its origin and its checksum
  example_input.npz    example values of every input
  example_output.npy   the actions for these inputs
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from policy.checkpoint import Checkpoint, load_checkpoint
from policy.common.arguments import check_choice
from policy.common.control_rate import stated_rate
from policy.common.files import json_text, write_text
from policy.common.next_line import next_line
from policy.common.observations import is_image
from policy.common.output import output_folder
from policy.control.timeline import check_execution_horizon
from policy.diffusion.sampler import Sampler
from policy.inference.backends import DEFAULT_WEIGHTS, SamplerProgram, check_weights, compile_sampler
from policy.inference.onnx_backend import Onnx
from policy.inference.onnx_graph import observation_input

SCHEMA_VERSION = 2
EXPORT_FORMATS = ("onnx",)
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "run_exported_policy.py"
# Largest allowed difference to the actions of the backend `eager`, with float32 weights, in normalised units: the range
# of each dimension is 2 wide.
TOLERANCE = 1e-4
NOTE = (
    "Feed every input of `inputs` to the model; the batch size is free. Observations are histories, oldest first, in"
    " the units of the demonstrations; noise is standard normal, drawn anew for each chunk. The first action is for the"
    " newest observation: execute `execution_horizon` actions, then plan again. To continue a chunk that is being"
    " executed, give it as `previous`, shifted to the newest observation, and set `keep` to 1 for the actions that are"
    " executed anyway; zeros in both plan afresh. docs/examples/run_exported_policy.py"
    " of ddim-policy does so with numpy and onnxruntime alone."
)


def export_policy(
    *,
    checkpoint: Path,
    format: str = "onnx",
    weights: str = DEFAULT_WEIGHTS,
    sampler: partial[Sampler],
    execution_horizon: int | None = None,
    output_dir: Path | None = None,
) -> None:
    """Export a checkpoint, with its sampler settings, for programs that have no torch.

    Args:
        checkpoint: the folder that training wrote.
        format: `onnx`.
        weights: `float32`, or `int8` for the matrices, which is faster but changes the actions.
        sampler: sampling settings, which are fixed in the exported model; those that are left open are as in training.
        execution_horizon: actions that are executed before the next plan, for `export.json`; by default as in training.
        output_dir: receives the files; by default a new folder under outputs/export.

    Raises:
        ValueError: settings that do not fit, a missing package, or a model whose actions differ from the policy's.
    """
    check_choice("format", format, EXPORT_FORMATS)
    check_weights(weights)
    loaded = load_checkpoint(checkpoint)
    if execution_horizon is not None:
        check_execution_horizon(execution_horizon, loaded.policy.config.action_horizon)
        loaded = replace(loaded, execution_horizon=execution_horizon)
    chosen = loaded.sampler_with(sampler.keywords)
    if chosen.warm_start is not None:
        raise ValueError(
            f"an exported model begins from noise; got sampler.warm_start={chosen.warm_start}: set"
            " sampler.warm_start=null, and use `previous` and `keep` of the exported model to continue a chunk"
        )
    program = compile_sampler(loaded.policy, chosen, backend="onnx", weights=weights)
    example = example_input(program)
    actions = run_on(program, example)
    difference = _difference(loaded, program, example, actions)
    if weights == DEFAULT_WEIGHTS and not difference <= TOLERANCE:
        raise ValueError(
            f"the exported model's actions differ from the policy's by {difference:.1e} in normalised units, more than"
            f" {TOLERANCE:.0e}: use sampler.clip=1, or report this checkpoint"
        )
    folder = output_folder(output_dir, "export")
    write_export(folder, loaded, program, weights, example, actions)
    print(f"largest difference to the policy's own actions: {difference:.1e} in normalised units")
    print(f"export: {folder}")
    if EXAMPLE.exists():  # it comes with a checkout, and not with the wheel
        print(next_line("python", EXAMPLE, folder))


def example_input(program: SamplerProgram) -> dict[str, np.ndarray[Any, Any]]:
    """Made-up values for every input of an exported model: one row, from a fixed seed."""
    config, generator = program.config, np.random.default_rng(0)
    chunk, denoised = ((1, horizon, config.action_dim) for horizon in (config.action_horizon, config.denoised_horizon))
    example: dict[str, np.ndarray[Any, Any]] = {}
    for key, shape in config.observation_shapes.items():
        history = (1, config.obs_horizon, *shape)
        image = is_image(shape)
        example[observation_input(key)] = (
            generator.integers(0, 256, history, dtype=np.uint8)
            if image
            else generator.random(history, dtype=np.float32)
        )
    example["noise"] = generator.standard_normal(denoised, dtype=np.float32)
    example["previous"] = np.zeros(chunk, dtype=np.float32)
    example["keep"] = np.zeros(chunk[:2], dtype=np.float32)
    if program.sampler.eta > 0:
        example["step_noise"] = generator.standard_normal((program.sampler.ddim_steps, *denoised), dtype=np.float32)
    return example


def run_on(program: SamplerProgram, example: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Run a program on inputs under an exported model's names; return (B, action_horizon, action_dim) actions."""
    observations = {key: example[observation_input(key)] for key in program.config.observation_shapes}
    chunk = program(
        observations, example["noise"], example.get("step_noise"), previous=example["previous"], keep=example["keep"]
    )
    return chunk.cpu().numpy()


def _difference(
    loaded: Checkpoint,
    program: SamplerProgram,
    example: dict[str, np.ndarray[Any, Any]],
    actions: np.ndarray[Any, Any],
) -> float:
    expected = run_on(compile_sampler(loaded.policy, program.sampler, backend="eager"), example)
    return float(np.abs((actions - expected) / program.action_scale).max())


def write_export(
    folder: Path,
    loaded: Checkpoint,
    program: SamplerProgram,
    weights: str,
    example: dict[str, np.ndarray[Any, Any]],
    actions: np.ndarray[Any, Any],
) -> None:
    """Write the export folder.

    Args:
        folder: an existing folder.
        loaded: the checkpoint.
        program: its sampling, with the backend `onnx`.
        weights: type of the program's weights.
        example: values of every input.
        actions: the program's output for them.
    """
    assert isinstance(program.run, Onnx)
    model = program.run.file()
    inputs = {
        name: {"shape": _free_batch(name, value.shape), "dtype": str(value.dtype)} for name, value in example.items()
    }
    data = {
        "schema_version": SCHEMA_VERSION,
        "format": "onnx",
        "model": "model.onnx",
        "sha256": hashlib.sha256(model).hexdigest(),
        "inputs": inputs,
        "output": {"name": "actions", "shape": _free_batch("actions", actions.shape), "dtype": str(actions.dtype)},
        "units": "observations and actions as in the demonstrations; normalisation is inside the model",
        "execution_horizon": loaded.execution_horizon,
        "rate_hz": stated_rate(loaded.training.get("rate_hz")),
        "sampler": program.sampler.record(),
        "weights": weights,
        "tolerance": TOLERANCE if weights == DEFAULT_WEIGHTS else None,
        "env": loaded.env,
        "step": loaded.training.get("step"),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("ddim-policy", "torch", "onnx", "onnxruntime", "numpy")},
        },
        "note": NOTE,
    }
    (folder / "export.json").unlink(missing_ok=True)  # of an earlier export
    (folder / "model.onnx").write_bytes(model)
    np.savez(folder / "example_input.npz", **example)  # type: ignore[arg-type]
    np.save(folder / "example_output.npy", actions)
    # Written last: a folder without this file is not a complete export.
    write_text(folder / "export.json", json_text(data, indent=2))


def _free_batch(name: str, shape: tuple[int, ...]) -> list[str | int]:
    batch = 1 if name == "step_noise" else 0
    return ["batch" if axis == batch else size for axis, size in enumerate(shape)]
