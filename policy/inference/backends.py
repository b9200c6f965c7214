"""One call that samples chunks, whatever runs it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.common.arguments import unknown_name
from policy.diffusion.coefficients import Course, cold_course, warm_course
from policy.diffusion.ddim import Generators, ddim_step, randn_like
from policy.diffusion.sampler import Sampler
from policy.inference.onnx_graph import build_model, observation_input, require
from policy.inference.program import Program
from policy.model.diffusion_policy import DiffusionPolicy, Observations, PolicyConfig, check_observations, is_image

# (observations, noise, step_noise, previous, keep) to actions.
Run = Callable[[Observations, Tensor, Tensor | None, Tensor, Tensor], Tensor]
WEIGHTS = ("float32", "int8")


@dataclass(frozen=True, kw_only=True)
class SamplerProgram:
    """A policy's sampling with its settings fixed.

    Attributes:
        config: of the policy.
        sampler: the settings.
        backend: what runs it.
        run: (observations, noise, step_noise, previous, keep) to actions, everything on `device` and checked.
        warm_run: the same with a previous chunk to begin from; `run` itself without `sampler.warm_start`.
        device: where it runs.
        action_scale: (action_dim,) half the demonstrated range of each action dimension, in the data's units; 1 where
            it is constant. Distances between chunks are measured in it.
    """

    config: PolicyConfig
    sampler: Sampler
    backend: str
    run: Run
    warm_run: Run
    device: torch.device
    action_scale: NDArray[np.float32]

    def __call__(
        self,
        observations: Mapping[str, Tensor | NDArray[Any]],
        noise: Tensor | NDArray[np.float32],
        step_noise: Tensor | NDArray[np.float32] | None = None,
        *,
        previous: Tensor | NDArray[np.float32] | None = None,
        keep: Tensor | NDArray[np.float32] | None = None,
    ) -> Tensor:
        """Sample one chunk per row.

        Args:
            observations: (B, obs_horizon, *shape) under each key, in the data's units; images uint8.
            noise: (B, action_horizon, action_dim) standard normal starting point.
            step_noise: (ddim_steps, B, action_horizon, action_dim) standard normal, for eta > 0.
            previous: (B, action_horizon, action_dim) in the data's units: the chunk before, shifted so that its first
                action is for the newest observation. With it `sampler.warm_start` has its effect.
            keep: (B, action_horizon) how much of each previous action to keep: 1 fixes it (the new chunk is inpainted
                around it), 0 leaves it free; None keeps nothing.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units, as `DiffusionPolicy.sample_actions` gives.

        Raises:
            ValueError: missing or unknown keys, wrong shapes, an image that is not uint8, step noise that is missing or
                not used, or something to keep without a previous chunk.
        """
        start = torch.as_tensor(noise, dtype=torch.float32)
        added = None if step_noise is None else torch.as_tensor(step_noise, dtype=torch.float32)
        seen = {key: torch.as_tensor(value) for key, value in observations.items()}
        if previous is None and keep is not None:
            raise ValueError("keep says how much of the previous chunk to keep: pass previous= too")
        before = torch.zeros_like(start) if previous is None else torch.as_tensor(previous, dtype=torch.float32)
        kept = torch.zeros(start.shape[:2]) if keep is None else torch.as_tensor(keep, dtype=torch.float32)
        self._check(seen, start, added, before, kept)
        on_device = {
            key: value.to(self.device, torch.uint8 if is_image(self.config.observation_shapes[key]) else torch.float32)
            for key, value in seen.items()
        }
        run = self.run if previous is None else self.warm_run
        with torch.no_grad():
            return run(
                on_device,
                start.to(self.device),
                None if added is None else added.to(self.device),
                before.to(self.device),
                kept.to(self.device),
            )

    def sample_actions(
        self,
        observations: Mapping[str, Tensor | NDArray[Any]],
        *,
        generator: Generators | None = None,
        previous: Tensor | NDArray[np.float32] | None = None,
        keep: Tensor | NDArray[np.float32] | None = None,
    ) -> Tensor:
        """Sample one chunk per row with noise drawn as `DiffusionPolicy.sample_actions` draws it.

        Args:
            observations: see `__call__`.
            generator: source of all noise: one, or one per row.
            previous: see `__call__`.
            keep: see `__call__`.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units.

        Raises:
            ValueError: see `__call__`, or other than B generators.
        """
        rows = len(next(iter(observations.values()), ()))
        on = generator.device if isinstance(generator, torch.Generator) else "cpu"
        like = torch.empty((rows, self.config.action_horizon, self.config.action_dim), device=on)
        noise = randn_like(like, generator)
        added = None
        if self.sampler.eta > 0:
            added = torch.stack([randn_like(like, generator) for _ in range(self.sampler.ddim_steps)])
        return self(observations, noise, added, previous=previous, keep=keep)

    def _check(
        self, observations: Observations, noise: Tensor, step_noise: Tensor | None, previous: Tensor, keep: Tensor
    ) -> None:
        check_observations(self.config, observations, rows=len(noise))
        for key, value in observations.items():
            if is_image(self.config.observation_shapes[key]) and value.dtype != torch.uint8:
                raise ValueError(f"observation {key!r} is an image and must be uint8; got {value.dtype}")
        chunk = (len(noise), self.config.action_horizon, self.config.action_dim)
        for name, value, shape in (("noise", noise, chunk), ("previous", previous, chunk), ("keep", keep, chunk[:2])):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
        wanted = (self.sampler.ddim_steps, *chunk) if self.sampler.eta > 0 else None
        got = None if step_noise is None else tuple(step_noise.shape)
        if got != wanted:
            raise ValueError(f"eta={self.sampler.eta} needs step_noise of shape {wanted}; got {got}")


def compile_sampler(
    policy: DiffusionPolicy, sampler: Sampler, *, backend: str = "eager", weights: str = "float32"
) -> SamplerProgram:
    """Fix a policy's weights and sampler settings, and compile the sampling.

    Args:
        policy: as it should act; it is copied, and later changes to it have no effect.
        sampler: the settings.
        backend: `eager` takes the steps of `sample_actions` and is the reference for the others; `fused` conditions all
            steps at once (see `policy.inference.program`) and is as plain otherwise; `compile` is that through
            torch.compile (slow at the first call, needs a C++ compiler on a CPU); `onnx` is one graph in ONNX
            Runtime, on the CPU, on one thread; `cuda_graph` records all steps, once for each batch size.
        weights: `float32`, or `int8` for the matrices of `onnx`.

    Returns:
        The program.

    Raises:
        ValueError: an unknown name, a backend that this machine cannot run, narrower weights for a backend other than
            `onnx`, or more denoising steps than the schedule has timesteps.

    Example:
        >>> import torch
        >>> from policy import DiffusionPolicy, PolicyConfig, Sampler
        >>> policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2)).eval()
        >>> program = compile_sampler(policy, Sampler(ddim_steps=4), backend="eager")
        >>> program({"state": torch.zeros(3, 2, 5)}, noise=torch.zeros(3, 8, 2)).shape
        torch.Size([3, 8, 2])
    """
    check_backend(backend, weights)
    sampler.check(policy.schedule.num_steps)
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    build, schedule = BACKENDS[backend], policy.schedule
    run, device = build(frozen, sampler, cold_course(schedule, sampler), weights)
    warm = run if sampler.warm_start is None else build(frozen, sampler, warm_course(schedule, sampler), weights)[0]
    return SamplerProgram(
        config=policy.config,
        sampler=sampler,
        backend=backend,
        run=run,
        warm_run=warm,
        device=device,
        action_scale=policy.action_normalizer.scale.cpu().numpy(),
    )


def check_backend(backend: str, weights: str) -> None:
    """Refuse what no backend is called, and weights that it does not have.

    Raises:
        ValueError: naming the nearest one.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    check_weights(weights, backend)


def check_weights(weights: str, backend: str = "onnx") -> None:
    """Refuse weights that a backend does not have.

    Raises:
        ValueError: an unknown name, or narrower weights for a backend other than `onnx`.
    """
    if weights not in WEIGHTS:
        raise unknown_name("weights", weights, WEIGHTS)
    if weights != "float32" and backend != "onnx":
        raise ValueError(f"weights={weights} needs backend=onnx; got backend={backend}")


def _eager(policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> tuple[Run, torch.device]:
    timesteps = course.timesteps.tolist()

    def run(
        observations: Observations, noise: Tensor, step_noise: Tensor | None, previous: Tensor, keep: Tensor
    ) -> Tensor:
        embedding = policy.embed(observations)
        known = policy.action_normalizer.normalize(previous)
        x = course.signal * known + course.noise * noise
        for k, (timestep, prev_timestep) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
            x = ddim_step(
                x,
                policy.denoiser(x, torch.full((len(x),), timestep, device=x.device), embedding),
                timestep,
                prev_timestep,
                policy.schedule,
                sampler.eta,
                prediction_type=policy.config.prediction_type,
                clip=sampler.clip,
                noise=None if step_noise is None else step_noise[k],
                known=known,
                keep=keep[..., None],
            )
        return policy.action_normalizer.unnormalize(x)

    return run, policy.device


def _fused(policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> tuple[Run, torch.device]:
    return Program(policy, sampler, course).eval(), policy.device


def _compile(policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> tuple[Run, torch.device]:
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if policy.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise ValueError("backend=compile needs a C++ compiler (g++ or clang++): install one, or use backend=onnx")
    return torch.compile(Program(policy, sampler, course).eval()), policy.device


def _onnx(policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> tuple[Run, torch.device]:
    model = build_model(Program(policy.cpu(), sampler, course), weights)
    return OnnxRun(model), torch.device("cpu")


class OnnxRun:
    """A model in ONNX Runtime, on one thread; it can be sent to another process.

    Args:
        model: the bytes that `build_model` gives.
    """

    def __init__(self, model: bytes) -> None:
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.model = model
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __reduce__(self) -> tuple[type[OnnxRun], tuple[bytes]]:
        return OnnxRun, (self.model,)

    def __call__(
        self, observations: Observations, noise: Tensor, step_noise: Tensor | None, previous: Tensor, keep: Tensor
    ) -> Tensor:
        """Checked inputs on the CPU to (B, action_horizon, action_dim)."""
        feeds = {observation_input(key): value.numpy() for key, value in observations.items()}
        feeds |= {"noise": noise.numpy(), "previous": previous.numpy(), "keep": keep.numpy()}
        if step_noise is not None:
            feeds["step_noise"] = step_noise.numpy()
        return torch.from_numpy(self.session.run(None, feeds)[0])


def _cuda_graph(policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> tuple[Run, torch.device]:
    if policy.device.type != "cuda":
        raise ValueError(
            f"backend=cuda_graph needs a policy on a GPU; this one is on {policy.device}: use backend=onnx"
        )
    program = Program(policy, sampler, course).eval()
    captured: dict[int, tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]] = {}

    def run(
        observations: Observations, noise: Tensor, step_noise: Tensor | None, previous: Tensor, keep: Tensor
    ) -> Tensor:
        keys = sorted(observations)

        def inputs() -> list[Tensor]:
            given = [*(observations[key] for key in keys), noise, previous, keep]
            return given if step_noise is None else [*given, step_noise]

        if len(noise) not in captured:
            held = [value.clone() for value in inputs()]
            captured[len(noise)] = (held, *_captured(program, keys, held))
        held, graph, actions = captured[len(noise)]
        for place, value in zip(held, inputs(), strict=True):
            place.copy_(value)
        graph.replay()
        return actions.clone()

    return run, policy.device


def _captured(program: Program, keys: list[str], held: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    observations, (noise, previous, keep, *rest) = dict(zip(keys, held, strict=False)), held[len(keys) :]
    step_noise = rest[0] if rest else None
    # A side stream: libraries set up their workspaces in the first calls, which must not be recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            program(observations, noise, step_noise, previous, keep)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = program(observations, noise, step_noise, previous, keep)
    return graph, actions


Build = Callable[[DiffusionPolicy, Sampler, Course, str], tuple[Run, torch.device]]
BACKENDS: dict[str, Build] = {
    "eager": _eager,
    "fused": _fused,
    "compile": _compile,
    "onnx": _onnx,
    "cuda_graph": _cuda_graph,
}
