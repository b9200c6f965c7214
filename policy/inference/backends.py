"""The back ends: one interface for sampling chunks, and the choice of what runs it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.common.arguments import check_choice
from policy.common.observations import Observations, check_observations, is_image
from policy.diffusion.ddim import Generators, randn_like
from policy.diffusion.sampler import Course, Sampler
from policy.inference.onnx_backend import ONNX_PACKAGES, Onnx, OnnxModel
from policy.inference.program import SamplingInputs
from policy.inference.runners import Compiled, CudaGraph, Eager, Fused, Runner
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy, zero_observations

# Chooses a back end by the rule of `choose_backend`; and what it falls back to, which starts at once everywhere.
DEFAULT_BACKEND = "auto"
PLAIN_BACKEND = "fused"
# Parameters of a policy from which `auto` takes ONNX Runtime. Tracing takes some ten seconds of CPU time, which a chunk
# of a policy of this size earns back within a few hundred plans, and one of a smaller policy may not in a whole sweep.
LARGE_POLICY = 5_000_000
# Largest difference to `eager` with which `auto` takes a back end, in half ranges of the demonstrated actions.
AGREEMENT = 1e-4
# The supported types of weights.
DEFAULT_WEIGHTS = "float32"
WEIGHTS = (DEFAULT_WEIGHTS, "int8")


class Backend(Protocol):
    """Builds a runner; the values of `BACKENDS` are of this type."""

    def __call__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course, weights: str) -> Runner:
        """Compile a policy's sampling.

        Args:
            policy: the policy, in evaluation mode; its weights do not change any more.
            sampler: settings of the sampler.
            course: starting point and timesteps of sampling.
            weights: type of the weights, one of `WEIGHTS`.
        """


@dataclass(frozen=True, kw_only=True)
class SamplerProgram:
    """A policy's sampling with its settings fixed.

    Attributes:
        config: the policy's configuration.
        sampler: settings of the sampler, with those that the policy's objective fixes.
        backend: name of the back end.
        run: samples a chunk that begins from noise.
        warm_run: samples a chunk that begins from the previous one; `run` itself without `sampler.warm_start`.
        action_scale: (action_dim,) half the demonstrated range of each action dimension, in the data's units; 1 where
            it is constant. Distances between chunks are measured in it.
    """

    config: PolicyConfig
    sampler: Sampler
    backend: str
    run: Runner
    warm_run: Runner
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
            noise: (B, denoised_horizon, action_dim) standard normal starting point.
            step_noise: (ddim_steps, B, denoised_horizon, action_dim) standard normal, for eta > 0.
            previous: (B, action_horizon, action_dim) the previous chunk in the data's units, shifted so that its first
                action is for the newest observation. `sampler.warm_start` has an effect only with it.
            keep: (B, action_horizon) weight of each previous action: 1 fixes it (the new chunk is inpainted around it),
                0 leaves it free; None keeps nothing.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units, as `DiffusionPolicy.sample_actions` returns.

        Raises:
            ValueError: missing or unknown keys, wrong shapes, an image that is not uint8, step noise that is missing or
                not needed, or `keep` without `previous`.
        """
        start = torch.as_tensor(noise, dtype=torch.float32)
        added = None if step_noise is None else torch.as_tensor(step_noise, dtype=torch.float32)
        seen = {key: torch.as_tensor(value) for key, value in observations.items()}
        if previous is None and keep is not None:
            raise ValueError("keep says how much of the previous chunk to keep: pass previous= too")
        given_out = start[:, self.config.past_actions :]
        before = torch.zeros_like(given_out) if previous is None else torch.as_tensor(previous, dtype=torch.float32)
        kept = torch.zeros(given_out.shape[:2]) if keep is None else torch.as_tensor(keep, dtype=torch.float32)
        self._check(seen, start, added, before, kept)
        device = self.run.device
        images = {key for key, shape in self.config.observation_shapes.items() if is_image(shape)}
        inputs = SamplingInputs(
            observations={
                key: value.to(device, torch.uint8 if key in images else torch.float32) for key, value in seen.items()
            },
            noise=start.to(device),
            step_noise=None if added is None else added.to(device),
            previous=before.to(device),
            keep=kept.to(device),
        )
        with torch.no_grad():
            return (self.run if previous is None else self.warm_run)(inputs)

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
            generator: source of all noise: one generator, or one per row.
            previous: see `__call__`.
            keep: see `__call__`.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units.

        Raises:
            ValueError: see `__call__`, or a sequence of generators whose length is not B.
        """
        rows = len(next(iter(observations.values()), ()))
        on = generator.device if isinstance(generator, torch.Generator) else "cpu"
        like = torch.empty((rows, self.config.denoised_horizon, self.config.action_dim), device=on)
        noise = randn_like(like, generator)
        added = None
        if self.sampler.eta > 0:
            added = torch.stack([randn_like(like, generator) for _ in range(self.sampler.ddim_steps)])
        return self(observations, noise, added, previous=previous, keep=keep)

    def use_threads(self, threads: int) -> None:
        """Run on some CPU threads from now on: PyTorch's, which the process shares, or ONNX Runtime's.

        Args:
            threads: 1 or more. Rollouts run on one, because the rounding of a sum depends on their number.
        """
        torch.set_num_threads(threads)
        for runner in (self.run, self.warm_run):
            if isinstance(runner, Onnx) and isinstance(runner.model, OnnxModel):  # a packed one is for rollouts
                runner.model.use_threads(threads)

    def _check(
        self, observations: Observations, noise: Tensor, step_noise: Tensor | None, previous: Tensor, keep: Tensor
    ) -> None:
        check_observations(observations, self.config.observation_shapes, (len(noise), self.config.obs_horizon))
        for key, value in observations.items():
            if is_image(self.config.observation_shapes[key]) and value.dtype != torch.uint8:
                raise ValueError(f"observation {key!r} is an image and must be uint8; got {value.dtype}")
        rows, width = len(noise), self.config.action_dim
        chunk, denoised = (rows, self.config.action_horizon, width), (rows, self.config.denoised_horizon, width)
        for name, value, shape in (
            ("noise", noise, denoised),
            ("previous", previous, chunk),
            ("keep", keep, chunk[:2]),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
        wanted = (self.sampler.ddim_steps, *denoised) if self.sampler.eta > 0 else None
        got = None if step_noise is None else tuple(step_noise.shape)
        if got != wanted:
            raise ValueError(f"eta={self.sampler.eta} needs step_noise of shape {wanted}; got {got}")


def compile_sampler(
    policy: DiffusionPolicy, sampler: Sampler, *, backend: str = DEFAULT_BACKEND, weights: str = DEFAULT_WEIGHTS
) -> SamplerProgram:
    """Fix a policy's weights and sampler settings, and compile the sampling.

    Args:
        policy: the policy to sample from; it is copied, so later changes to it have no effect.
        sampler: settings of the sampler.
        backend: `eager` takes the same steps as `sample_actions` and is the reference for the others; `fused` computes
            the conditions of all steps at once (see `policy.inference.program`) and is plain PyTorch, too; `compile`
            is `fused` through torch.compile (the first call is slow, and a CPU needs a C++ compiler); `onnx` is one
            graph in ONNX Runtime, on one CPU thread; `cuda_graph` records `fused` as a CUDA graph, once for each batch
            size; `auto` takes the fastest of them by a rule, see `choose_backend`.
        weights: `float32`, or `int8` for the weight matrices and the convolutions over time of `onnx`.

    Returns:
        The program.

    Raises:
        ValueError: an unknown name, a back end that this machine cannot run, `int8` weights for a back end other than
            `onnx`, more denoising steps than the schedule has timesteps, or a setting of the sampler that the policy's
            objective does not have.

    Example:
        >>> import torch
        >>> from policy import DiffusionPolicy, PolicyConfig, Sampler
        >>> policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2)).eval()
        >>> program = compile_sampler(policy, Sampler(ddim_steps=4), backend="eager")
        >>> program({"state": torch.zeros(3, 2, 5)}, noise=torch.zeros(3, 8, 2)).shape
        torch.Size([3, 8, 2])
    """
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    return compile_shared(frozen, sampler, backend=backend, weights=weights)


def compile_shared(
    policy: DiffusionPolicy, sampler: Sampler, *, backend: str = DEFAULT_BACKEND, weights: str = DEFAULT_WEIGHTS
) -> SamplerProgram:
    """Compile as `compile_sampler` does, without a copy: all programs of one policy share its weights.

    Args:
        policy: the policy to sample from, in evaluation mode, whose weights do not change any more.
        sampler: see `compile_sampler`.
        backend: see `compile_sampler`.
        weights: see `compile_sampler`.

    Returns:
        The program.

    Raises:
        ValueError: see `compile_sampler`.
    """
    check_backend(backend, weights)
    sampler = policy.settled(sampler)
    if backend == DEFAULT_BACKEND:
        backend = choose_backend([policy], [sampler], weights)
    build, trained = BACKENDS[backend], (policy.schedule, policy.config.objective)
    run = build(policy, sampler, sampler.cold_course(*trained), weights)
    is_warm = sampler.warm_start is not None
    return SamplerProgram(
        config=policy.config,
        sampler=sampler,
        backend=backend,
        run=run,
        warm_run=build(policy, sampler, sampler.warm_course(*trained), weights) if is_warm else run,
        action_scale=policy.action_normalizer.scale.cpu().numpy(),
    )


def choose_backend(
    policies: Sequence[DiffusionPolicy], samplers: Iterable[Sampler], weights: str = DEFAULT_WEIGHTS
) -> str:
    """Choose the back end that `auto` means, by a rule and not by a timing, so that equal machines choose alike.

    It is `cuda_graph` on a GPU. On a CPU it is `onnx` if one of the policies has `LARGE_POLICY` parameters or more and
    the packages are installed, or if the weights are not float32, which no other has. If its chunks differ from those
    of `eager` by more than `AGREEMENT`, or it cannot run a policy at all, it is `fused`.

    Args:
        policies: the policies that will be compared; they all get the same back end.
        samplers: their samplers, of which one is tried for each clip, each solver, and with and without noise.
        weights: type of the weights.

    Returns:
        The name of a back end.
    """
    if weights != DEFAULT_WEIGHTS:
        return "onnx"
    if policies[0].device.type == "cuda":
        chosen = "cuda_graph"
    elif max(policy.num_parameters for policy in policies) >= LARGE_POLICY and all(map(find_spec, ONNX_PACKAGES)):
        chosen = "onnx"
    else:
        return PLAIN_BACKEND
    kinds = {(sampler.clip, sampler.eta > 0, sampler.solver): sampler for sampler in samplers}.values()
    agree = all(_agrees(policy, sampler, chosen) for policy in policies for sampler in kinds)
    return chosen if agree else PLAIN_BACKEND


def _agrees(policy: DiffusionPolicy, sampler: Sampler, backend: str) -> bool:
    """Whether a back end can sample a policy, and samples the actions of `eager`."""
    try:
        program, eager = (compile_shared(policy, sampler, backend=name) for name in (backend, "eager"))
        seen = zero_observations(policy.config, rows=1)
        actions, expected = (
            p.sample_actions(seen, generator=torch.Generator().manual_seed(0)).cpu() for p in (program, eager)
        )
    except Exception:  # a part of the user's own may be whatever the exporter or the runtime stumbles over
        return False
    return bool((((actions - expected) / torch.from_numpy(eager.action_scale)).abs() <= AGREEMENT).all())


def check_backend(backend: str, weights: str) -> None:
    """Reject an unknown back end, and weights that it does not support.

    Raises:
        ValueError: an unknown name (the message gives the nearest one), or `int8` weights for a back end other than
            `onnx`.
    """
    check_choice("backend", backend, (DEFAULT_BACKEND, *BACKENDS))
    check_weights(weights, backend)


def check_weights(weights: str, backend: str = "onnx") -> None:
    """Reject weights that a back end does not support.

    Raises:
        ValueError: an unknown name, or `int8` weights for a back end other than `onnx`.
    """
    check_choice("weights", weights, WEIGHTS)
    if weights != DEFAULT_WEIGHTS and backend not in ("onnx", DEFAULT_BACKEND):
        raise ValueError(f"weights={weights} needs backend=onnx; got backend={backend}")


BACKENDS: dict[str, Backend] = {
    "eager": Eager,
    "fused": Fused,
    "compile": Compiled,
    "onnx": Onnx.build,
    "cuda_graph": CudaGraph,
}
