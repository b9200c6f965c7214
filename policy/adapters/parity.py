"""Proof that an imported policy computes what the other project's code computes on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.common.device import torch_threads
from policy.diffusion.ddim import ddim_timesteps
from policy.diffusion.sampler import Sampler
from policy.inference.backends import compile_sampler
from policy.inference.onnx_graph import require
from policy.model.diffusion_policy import DiffusionPolicy

# Largest allowed differences: of embeddings and network outputs, and of chunks in half ranges of the actions.
NETWORK_BOUND, SAMPLE_BOUND, DDPM_BOUND = 5e-6, 1e-5, 2e-5
# Steps at which the back ends are compared, and those of the other project's rollouts.
COMPARED_STEPS = ROLLOUT_STEPS = 8

Reference = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity that both projects compute.

    Attributes:
        name: what was compared.
        difference: largest difference.
        bound: largest allowed difference.
    """

    name: str
    difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within its bound."""
        return self.difference <= self.bound


def read_reference(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file of reference outputs, as docs/import.md describes it.

    Raises:
        ValueError: it is missing, damaged or without what the comparison needs.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = {name: _numbers(file[name]) for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise many types
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"verify={path} cannot be read as an .npz file of arrays ({reason})") from error
    needed = {
        "noise": "noise" in reference,
        "observation/KEY": any(key.startswith("observation/") for key in reference),
    }
    if missing := [name for name, is_there in needed.items() if not is_there]:
        raise ValueError(
            f"verify={path} holds no {' and no '.join(missing)}: it needs `noise`, `observation/KEY` and the outputs to"
            " compare, as docs/import.md says"
        )
    if broken := [name for name, values in reference.items() if not np.isfinite(values).all()]:
        raise ValueError(f"verify={path} holds a NaN or an infinity in {broken[0][:80]!r}: write it anew")
    return reference


def _numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Pictures as they are, and everything else in the networks' float32."""
    if values.dtype.kind not in "iuf":
        raise ValueError(f"an array of {values.dtype}, which are not numbers")
    return values if values.dtype == np.uint8 else values.astype(np.float32)


def compare(
    policy: DiffusionPolicy,
    reference: Reference,
    *,
    keys: Mapping[str, str],
    execution_horizon: int,
    backends: Sequence[str] = ("fused", "onnx"),
) -> list[Comparison]:
    """Compare a policy with the outputs of the project that it comes from.

    Args:
        policy: the imported policy.
        reference: inputs and outputs by name: `observation/KEY` (B, obs_horizon, ...), `noise` (B, horizon, A), and any
            of the outputs, see docs/import.md.
        keys: the policy's key of each of the project's keys.
        execution_horizon: actions of a chunk that the project executes.
        backends: back ends to compare with `eager`.

    Returns:
        A comparison for each output that the file holds.

    Raises:
        ValueError: the inputs have other keys or shapes than the policy's, or the file holds no output.
    """
    sides = _Sides(policy, reference, keys, execution_horizon)
    with torch_threads(1), torch.no_grad():
        with _fitting():
            sides.embedding = policy.embed(sides.observations)
            theirs = [
                *sides.network(),
                *sides.rederived(),
                *sides.ddpm(),
                *sides.as_they_sample(),
                *sides.rollout(),
            ]
        if not theirs:
            raise ValueError("the reference holds no output to compare: docs/import.md names those that are known")
        return [*theirs, *sides.back_ends(backends)]


@contextmanager
def _fitting() -> Iterator[None]:
    """Say in one sentence that an array is missing, or has another shape than the others."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"the reference lacks {error}, which its other arrays need: see docs/import.md") from error
    except (LookupError, RuntimeError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the shapes in the reference do not fit the policy ({reason}): see docs/import.md") from error


class _Sides:
    """Both sides of each comparison."""

    embedding: Tensor

    def __init__(
        self, policy: DiffusionPolicy, reference: Reference, keys: Mapping[str, str], execution_horizon: int
    ) -> None:
        self.policy, self.reference, self.keys, self.execution_horizon = policy, reference, keys, execution_horizon
        self.past, self.scale = policy.config.past_actions, policy.action_normalizer.scale
        self.observations = self._observations("observation/")
        self.noise = torch.from_numpy(reference["noise"])
        rows = next(iter(self.observations.values())).shape[:1]
        wanted = (*rows, policy.config.denoised_horizon, policy.config.action_dim)
        if self.noise.shape != wanted or 0 in wanted:
            raise ValueError(
                f"noise in the reference must have the shape (B, {wanted[-2]}, {wanted[-1]}) with the rows of the"
                f" observations, 1 or more; got {tuple(self.noise.shape)} and {tuple(rows)}"
            )

    def _observations(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.reference if name.startswith(prefix)]
        return {
            self.keys.get(key := name.removeprefix(prefix), key): torch.from_numpy(self.reference[name])
            for name in names
        }

    def network(self) -> Iterator[Comparison]:
        """The condition and the network's outputs."""
        if "global_cond" in self.reference:
            yield _compared("condition", self.embedding, self.reference["global_cond"], NETWORK_BOUND)
        for name in self._named("unet/t"):
            number, last = name.removeprefix("unet/t"), self.policy.schedule.num_steps - 1
            if not number.isdecimal() or int(number) > last:
                raise ValueError(f"the reference holds {name[:80]!r}; the timesteps are unet/t0 to unet/t{last}")
            timestep = torch.full((len(self.noise),), int(number))
            predicted = self.policy.denoiser(self.noise, timestep, self.embedding)
            yield _compared(f"network at t = {timestep[0]}", predicted, self.reference[name], NETWORK_BOUND)

    def rederived(self) -> Iterator[Comparison]:
        """DDIM with the noise derived again after clipping, as we sample."""
        num_steps = self.policy.schedule.num_steps
        for spacing, prefix in (("leading", "rederived"), ("trailing", "rederived_trailing")):
            for steps in self._steps(prefix):
                # For other numbers of steps, trailing timesteps are other ones in diffusers.
                if spacing == "leading" or num_steps % steps == 0:
                    sampler = Sampler(ddim_steps=steps, spacing=spacing)
                    expected = self._in_units(f"{prefix}{steps}")
                    yield self._chunks(f"DDIM {steps}, {spacing}", self._sampled(sampler), expected, SAMPLE_BOUND)

    def ddpm(self) -> Iterator[Comparison]:
        """DDPM with the other project's own noise."""
        # Rounding errors grow with the range of the samples.
        bound = DDPM_BOUND * max(self.policy.config.action_bound or 1, 1)
        for steps in self._steps("ddpm"):
            sampler = Sampler(ddim_steps=steps, spacing="leading", eta=1.0)
            added = torch.from_numpy(self.reference[f"ddpm{steps}/step_noise"])
            actions = self._sampled(sampler, step_noise=added)
            yield self._chunks(f"DDPM {steps}", actions, self._in_units(f"ddpm{steps}"), bound)
            yield from self._executed(f"ddpm{steps}", f"DDPM {steps}, executed", actions, bound)

    def as_they_sample(self) -> Iterator[Comparison]:
        """DDIM as diffusers takes its steps: the noise is not derived again."""
        for steps in self._steps("ddim"):
            actions = self._as_they_sample(self.embedding, self.noise, steps)
            yield self._chunks(f"their DDIM {steps}", actions, self._in_units(f"ddim{steps}"), SAMPLE_BOUND)
            yield from self._executed(f"ddim{steps}", f"their DDIM {steps}, executed", actions, SAMPLE_BOUND)

    def back_ends(self, names: Sequence[str]) -> Iterator[Comparison]:
        """The back ends against `eager`."""
        sampler = Sampler(ddim_steps=min(COMPARED_STEPS, self.policy.schedule.num_steps))
        eager = self._sampled(sampler)
        for backend in names:
            if backend != "onnx" or _onnx_is_installed():
                sampled = self._sampled(sampler, backend=backend)
                yield self._chunks(f"{backend} and eager", sampled, eager, SAMPLE_BOUND)

    def rollout(self) -> Iterator[Comparison]:
        """Control steps one at a time, with DDIM as they sample, through our history and executed slice."""
        if "rollout/actions" not in self.reference:
            return
        observations = self._observations("rollout/observation/")
        expected = torch.from_numpy(self.reference["rollout/actions"])
        horizon, given = self.policy.config.obs_horizon, []
        if len(expected) < 1 or any(len(values) != len(expected) for values in observations.values()):
            raise ValueError("rollout/actions and rollout/observation/KEY in the reference must have the same steps")
        for number, step in enumerate(range(0, len(expected), self.execution_horizon)):
            places = torch.arange(step + 1 - horizon, step + 1).clamp(min=0)
            history = {key: values[places][None] for key, values in observations.items()}
            noise = torch.from_numpy(self.reference["rollout/noise"][number])
            chunk = self._as_they_sample(self.policy.embed(history), noise, ROLLOUT_STEPS)
            given.append(chunk[0, : self.execution_horizon])
        actions = torch.cat(given)[: len(expected)]
        yield self._chunks(f"{len(expected)} control steps", actions, expected, SAMPLE_BOUND)

    def _as_they_sample(self, embedding: Tensor, noise: Tensor, steps: int) -> Tensor:
        policy, schedule = self.policy, self.policy.schedule
        config, stride = policy.config, schedule.num_steps // steps
        x, bound = noise, config.action_bound
        for timestep in ddim_timesteps(schedule.num_steps, steps, "leading").tolist():
            predicted = policy.denoiser(x, torch.full((len(x),), timestep), embedding)
            x_0 = schedule.to_sample(predicted, x, timestep, config.prediction_type)
            epsilon = predicted if config.prediction_type == "epsilon" else schedule.to_epsilon(x_0, x, timestep)
            clipped = x_0 if bound is None else x_0.clamp(-bound, bound)
            signal, sigma = schedule.signal_and_noise(max(timestep - stride, -1), x)
            x = signal * clipped + sigma * epsilon
        return policy.action_normalizer.unnormalize(x[:, self.past :])

    def _sampled(self, sampler: Sampler, backend: str = "eager", step_noise: Tensor | None = None) -> Tensor:
        return compile_sampler(self.policy, sampler, backend=backend)(self.observations, self.noise, step_noise)

    def _in_units(self, name: str) -> Tensor:
        """The reference's chunk in the data's units, without past actions."""
        normalized = torch.from_numpy(self.reference[f"{name}/normalized"])
        return self.policy.action_normalizer.unnormalize(normalized[:, self.past :])

    def _executed(self, name: str, title: str, actions: Tensor, bound: float) -> Iterator[Comparison]:
        if f"{name}/executed" in self.reference:
            expected = torch.from_numpy(self.reference[f"{name}/executed"])
            yield self._chunks(title, actions[:, : self.execution_horizon], expected, bound)

    def _chunks(self, name: str, ours: Tensor, theirs: Tensor, bound: float) -> Comparison:
        return _compared(name, ours / self.scale, theirs / self.scale, bound)

    def _steps(self, prefix: str) -> list[int]:
        """The numbers of steps for which the reference has samples under a prefix."""
        names = (name.removesuffix("/normalized").removeprefix(prefix) for name in self._named(prefix, "/normalized"))
        found, most = sorted(int(rest) for rest in names if rest.isdecimal()), self.policy.schedule.num_steps
        if found and not 1 <= found[0] <= found[-1] <= most:
            raise ValueError(f"the reference holds {prefix}K for K = {found}; K is 1 to {most}")
        return found

    def _named(self, prefix: str, suffix: str = "") -> list[str]:
        return [name for name in self.reference if name.startswith(prefix) and name.endswith(suffix)]


def _compared(name: str, ours: Tensor, theirs: Tensor | NDArray[Any], bound: float) -> Comparison:
    expected = torch.as_tensor(theirs)
    if ours.shape != expected.shape:
        raise ValueError(
            f"{name}: the reference has the shape {tuple(expected.shape)}, the policy's is {tuple(ours.shape)}"
        )
    return Comparison(name=name, difference=float((ours - expected).abs().max()), bound=bound)


def _onnx_is_installed() -> bool:
    try:
        return all(map(require, ("onnx", "onnxscript", "onnxruntime")))
    except ValueError:
        return False
