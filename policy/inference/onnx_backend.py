"""The back end of ONNX Runtime: all samplers of a policy share one graph and one copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.diffusion.sampler import Course, Sampler
from policy.inference.mapped import MappedArrays
from policy.inference.onnx_graph import (
    build_graph,
    complete_model,
    kind_of,
    observation_input,
    require,
    sampler_inputs,
)
from policy.inference.program import Program, SamplingInputs
from policy.model.diffusion_policy import DiffusionPolicy

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_installed(backend: str) -> None:
    """Reject a back end whose packages are not installed.

    Raises:
        ValueError: a package is missing; the message gives the command that installs it.
    """
    for package in ONNX_PACKAGES if backend == "onnx" else ():
        require(package)


class OnnxModel:
    """A graph with its weights, which all samplers of a policy share. It can be pickled for another process.

    Args:
        graph: the serialised graph, see `OnnxGraph`.
        weights: the weights that it declares.

    Attributes:
        threads: CPU threads of its session. Results are repeatable with one only, which every process starts with.
    """

    threads = 1

    def __init__(self, graph: bytes, weights: MappedArrays) -> None:
        self.graph, self.weights = graph, weights

    @cached_property
    def session(self) -> Any:
        """The graph in ONNX Runtime. It is loaded where it runs, in each process once."""
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        arrays = self.weights.arrays()
        options.add_external_initializers(
            list(arrays), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        )
        session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
        # The runtime reads the matrices no more: it has packed a copy of each in the order of its products.
        self.weights.forget()
        return session

    def use_threads(self, threads: int) -> None:
        """Run on some CPU threads from the next call on, which loads the session anew if they change."""
        if threads != self.threads:
            self.threads = threads
            self.unload()

    def unload(self) -> None:
        """Free the session's memory, which the next call takes again."""
        self.__dict__.pop("session", None)

    def __reduce__(self) -> tuple[type[OnnxModel], tuple[bytes, MappedArrays]]:
        return OnnxModel, (self.graph, self.weights)


# The graphs of policies that are in use.
_MODELS: WeakKeyDictionary[DiffusionPolicy, dict[Hashable, OnnxModel]] = WeakKeyDictionary()


class Onnx:
    """The fused program in ONNX Runtime. It can be pickled and sent to another process.

    Attributes:
        device: the CPU.
        model: the graph, which all programs of a policy share that clip alike and are alike stochastic.

    Args:
        model: see above.
        constants: the graph's inputs that depend on the sampler, see `sampler_inputs`.
    """

    device = torch.device("cpu")

    def __init__(self, model: OnnxModel, constants: Mapping[str, NDArray[np.float32]]) -> None:
        self.model, self._constants = model, dict(constants)

    def file(self) -> bytes:
        """The bytes of an ONNX file that needs neither other files nor the sampler's inputs."""
        return complete_model(self.model.graph, self.model.weights.arrays(), self._constants)

    @classmethod
    def build(cls, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> Onnx:
        """See `Backend`."""
        check_installed("onnx")
        on_cpu = policy if policy.device.type == "cpu" else copy.deepcopy(policy).cpu()
        program = Program(on_cpu, sampler, course)
        models, kind = _MODELS.setdefault(policy, {}), (*kind_of(sampler), weights)
        if kind not in models:
            graph = build_graph(program, weights)
            models[kind] = OnnxModel(graph.model.SerializeToString(), MappedArrays.write(graph.weights))
        return cls(models[kind], sampler_inputs(program))

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """See `Runner`."""
        feeds = {observation_input(key): value.numpy() for key, value in inputs.observations.items()}
        named = {name: value for name, value in inputs._asdict().items() if isinstance(value, Tensor)}
        feeds |= {name: value.numpy() for name, value in named.items()}
        return torch.from_numpy(self.model.session.run(None, {**feeds, **self._constants})[0])
