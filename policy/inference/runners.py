"""The runners of PyTorch and of CUDA graphs; that of ONNX Runtime is in `policy.inference.onnx_backend`."""

from __future__ import annotations

import os
import shutil
from typing import Protocol

import torch
from torch import Tensor

from policy.diffusion.sampler import Course, Sampler
from policy.inference.program import Program, SamplingInputs, keep_with_past, with_past
from policy.model.diffusion_policy import DiffusionPolicy


class Runner(Protocol):
    """Samples chunks from inputs that have been checked and moved to its device."""

    @property
    def device(self) -> torch.device:
        """The device that it runs on."""

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """Sample one chunk per row: (B, action_horizon, action_dim) in the data's units."""


class Eager:
    """Calls the network step by step, as `sample_actions` does: the reference for the other back ends."""

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> None:
        self._policy, self._sampler, self._course = policy, sampler, course
        table = sampler.table(policy.schedule, course, policy.config.predicts, policy.config.objective)
        self._table = table.to(policy.device, torch.float32)
        self.device = policy.device

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """See `Runner`."""
        policy, course, step_noise = self._policy, self._course, inputs.step_noise
        past = policy.config.past_actions
        known = policy.action_normalizer.normalize(with_past(inputs.previous, past))
        return policy.denoise(
            policy.embed(inputs.observations),
            course.signal * known + course.noise * inputs.noise,
            course.timesteps.tolist(),
            self._table,
            clip=self._sampler.clip,
            step_noise=None if step_noise is None else step_noise.__getitem__,
            known=known,
            keep=keep_with_past(inputs.keep, past),
        )


class Fused:
    """Computes the conditions of all steps at once; see `policy.inference.program`."""

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> None:
        self._program = Program(policy, sampler, course).eval()
        self.device = policy.device

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """See `Runner`."""
        actions: Tensor = self._program(inputs)
        return actions


class Compiled:
    """The fused program, compiled with torch.compile."""

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> None:
        compilers = (os.environ.get("CXX"), "g++", "clang++")
        if policy.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
            raise ValueError("backend=compile needs a C++ compiler (g++ or clang++): install one, or use backend=onnx")
        self._program = torch.compile(Program(policy, sampler, course).eval())
        self.device = policy.device

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """See `Runner`."""
        try:
            actions: Tensor = self._program(inputs)
        except (OSError, RuntimeError) as error:  # it compiles when it is first called
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, OSError | TorchDynamoException):
                raise
            raise ValueError(
                f"backend=compile cannot compile ({_first_line(error)}): TORCHINDUCTOR_CACHE_DIR chooses the folder"
                " that it writes to, and backend=onnx needs none"
            ) from error
        return actions


def _first_line(error: Exception) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))


class CudaGraph:
    """The fused program recorded as a CUDA graph, once for each batch size."""

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> None:
        if policy.device.type != "cuda":
            raise ValueError(
                f"backend=cuda_graph needs a policy on a GPU; this one is on {policy.device}: use backend=onnx"
            )
        self._program = Program(policy, sampler, course).eval()
        self._recorded: dict[int, tuple[SamplingInputs, torch.cuda.CUDAGraph, Tensor]] = {}
        self.device = policy.device

    def __call__(self, inputs: SamplingInputs) -> Tensor:
        """See `Runner`."""
        rows = len(inputs.noise)
        if rows not in self._recorded:
            self._recorded[rows] = self._record(inputs)
        held, graph, actions = self._recorded[rows]
        for place, value in zip(_tensors(held), _tensors(inputs), strict=True):
            place.copy_(value)
        graph.replay()
        return actions.clone()

    def _record(self, inputs: SamplingInputs) -> tuple[SamplingInputs, torch.cuda.CUDAGraph, Tensor]:
        """Record the program on tensors that later inputs are copied into."""
        held = inputs._replace(
            observations={key: value.clone() for key, value in inputs.observations.items()},
            **{name: value.clone() for name, value in inputs._asdict().items() if isinstance(value, Tensor)},
        )
        # Warm up on a side stream: libraries set up their workspaces in the first calls, which must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._program(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actions = self._program(held)
        return held, graph, actions


def _tensors(inputs: SamplingInputs) -> list[Tensor]:
    """Return all tensors of the inputs, always in the same order."""
    observed = [inputs.observations[key] for key in sorted(inputs.observations)]
    return [*observed, *(value for value in inputs if isinstance(value, Tensor))]
