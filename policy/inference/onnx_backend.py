"""The back end of ONNX Runtime: all samplers of a policy share one graph and one copy of its weights."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Hashable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.diffusion.sampler import Course, Sampler
from policy.inference.mapped import MappedArrays, give_back
from policy.inference.onnx_graph import (
    SMALLEST_WEIGHT,
    WEIGHTS_FILE,
    build_graph,
    complete_model,
    kind_of,
    observation_input,
    require,
    sampler_inputs,
    with_places,
)
from policy.inference.program import Program, SamplingInputs
from policy.model.diffusion_policy import DiffusionPolicy

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROVIDERS = ["CPUExecutionProvider"]
# Files of a model before the runtime has packed its weights, and the file of the graph after that.
MODEL, PACKED = "model.onnx", "packed.onnx"


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
        self._packed: dict[Path, OnnxModel | PackedModel] = {}

    @cached_property
    def session(self) -> Any:
        """The graph in ONNX Runtime. It is loaded where it runs, in each process once."""
        onnxruntime, options = require("onnxruntime"), _options(self.threads)
        arrays = self.weights.arrays()
        options.add_external_initializers(
            list(arrays), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        )
        session = onnxruntime.InferenceSession(self.graph, options, providers=PROVIDERS)
        # The runtime reads the matrices no more: it has packed a copy of each in the order of its products.
        self.weights.forget()
        return session

    def use_threads(self, threads: int) -> None:
        """Run on some CPU threads from the next call on, which loads the session anew if they change."""
        if threads != self.threads:
            self.threads = threads
            self.unload()

    def packed(self, folder: Path) -> OnnxModel | PackedModel:
        """Write the model as the runtime would hold it, once for each folder, and free the session's memory.

        Args:
            folder: an existing folder for the files, which must stay until the processes that load them have ended.

        Returns:
            The written model; this one, with a warning, if it cannot be written.
        """
        self.unload()
        if folder not in self._packed:
            self._packed[folder] = self._pack(folder)
        return self._packed[folder]

    def _pack(self, folder: Path) -> OnnxModel | PackedModel:
        here = Path(tempfile.mkdtemp(dir=folder))
        onnxruntime, options = require("onnxruntime"), _options()
        options.optimized_model_filepath = str(here / PACKED)
        for name, value in {
            "save_external_prepacked_constant_initializers": "1",
            "optimized_model_external_initializers_file_name": "packed_weights",
            "optimized_model_external_initializers_min_size_in_bytes": str(SMALLEST_WEIGHT),
        }.items():
            options.add_session_config_entry(f"session.{name}", value)
        try:
            # From files, because the runtime makes one more copy of weights that it receives in memory.
            self.weights.copy_to(here / WEIGHTS_FILE)
            (here / MODEL).write_bytes(with_places(self.graph, self.weights.places))
            onnxruntime.InferenceSession(str(here / MODEL), options, providers=PROVIDERS)
            for name in (MODEL, WEIGHTS_FILE):
                (here / name).unlink()
            _optimised(here / PACKED, check=True)
        except Exception as error:  # the runtime has no type of its own for a full disk
            shutil.rmtree(here, ignore_errors=True)
            version = onnxruntime.__version__  # before 1.31, it loses the Scan's body
            reason = " ".join(str(error).split())[:100]  # the runtime may quote a whole node
            warnings.warn(
                f"each process holds its own copy of the weights, because ONNX Runtime {version} cannot write them to"
                f" {folder} ({reason}): a folder with room in TMPDIR, or onnxruntime 1.31 or newer, saves that memory",
                stacklevel=2,
            )
            return self
        finally:
            give_back()
        return PackedModel(here / PACKED)

    def unload(self) -> None:
        """Free the session's memory, which the next call takes again."""
        self.__dict__.pop("session", None)

    def __reduce__(self) -> tuple[type[OnnxModel], tuple[bytes, MappedArrays]]:
        return OnnxModel, (self.graph, self.weights)


class PackedModel:
    """A model in files, optimised and with its matrices in the order in which the runtime's products read them.

    Processes that load it map the same file, and each weight is in memory once for all of them. An `OnnxModel` packs
    its own copy in each process. The files fit the machine and the version of the runtime that wrote them.

    Args:
        path: the file of the graph.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def session(self) -> Any:
        """See `OnnxModel.session`."""
        return _loaded(self._path)

    def __reduce__(self) -> tuple[type[PackedModel], tuple[Path]]:
        return PackedModel, (self._path,)


@cache
def _loaded(path: Path) -> Any:
    """A process receives the model with each of its runs, and loads it once."""
    return _optimised(path)


def _optimised(path: Path, check: bool = False) -> Any:
    """Load a packed model; to `check` that it can be loaded, its weights need not be read."""
    onnxruntime, options = require("onnxruntime"), _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been optimised
    options.add_session_config_entry("session.disable_prepacking", str(int(check)))
    return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)


def _options(threads: int = 1) -> Any:
    options = require("onnxruntime").SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


# The graphs of policies that are in use.
_MODELS: WeakKeyDictionary[DiffusionPolicy, dict[Hashable, OnnxModel]] = WeakKeyDictionary()


class Onnx:
    """The fused program in ONNX Runtime. It can be pickled and sent to another process.

    Attributes:
        device: the CPU.
        model: the graph, which all programs of a policy share that are of one kind, see `kind_of`.

    Args:
        model: see above.
        constants: the graph's inputs that depend on the sampler, see `sampler_inputs`.
    """

    device = torch.device("cpu")

    def __init__(self, model: OnnxModel | PackedModel, constants: Mapping[str, NDArray[np.float32]]) -> None:
        self.model, self._constants = model, dict(constants)

    def on(self, model: OnnxModel | PackedModel) -> Onnx:
        """The same program on another form of its model."""
        return Onnx(model, self._constants)

    def file(self) -> bytes:
        """The bytes of an ONNX file that needs neither other files nor the sampler's inputs."""
        assert isinstance(self.model, OnnxModel)  # what rollout processes receive is not exported
        return complete_model(self.model.graph, self.model.weights.arrays(), self._constants)

    @classmethod
    def build(cls, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> Onnx:
        """See `Backend`."""
        check_installed("onnx")
        on_cpu = policy if policy.device.type == "cpu" else copy.deepcopy(policy).cpu()
        program = Program(on_cpu, sampler, course)
        models, kind = _MODELS.setdefault(policy, {}), (*kind_of(program), weights)
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
