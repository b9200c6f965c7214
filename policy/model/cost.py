"""The work of a policy's networks in multiply-adds: a cost that does not depend on the machine or its load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from policy.model.diffusion_policy import DiffusionPolicy, zero_observations


class MultiplyAdds(NamedTuple):
    """Multiply-adds for one chunk, of matrix products, convolutions and attention.

    Attributes:
        encoder: of embedding an observation history, once for each chunk.
        denoiser: of one call of the denoiser; 1 or more, so that more calls always cost more.
    """

    encoder: int
    denoiser: int

    def per_step(self, ddim_steps: int, candidates: int, steps_per_plan: int) -> float:
        """Multiply-adds per control step.

        Args:
            ddim_steps: calls of the denoiser for each chunk.
            candidates: chunks sampled for each plan.
            steps_per_plan: control steps from one plan to the next.

        Returns:
            The multiply-adds of a plan, divided by the control steps that it serves.

        Example:
            >>> MultiplyAdds(encoder=100, denoiser=1000).per_step(ddim_steps=8, candidates=2, steps_per_plan=4)
            4050.0
        """
        return candidates * (self.encoder + ddim_steps * self.denoiser) / steps_per_plan


def _product(result: Tensor, left: Tensor, *_: Any) -> int:
    return result.numel() * left.shape[-1]


def _convolution(result: Tensor, _: Tensor, weight: Tensor, *__: Any) -> int:
    return result.numel() * weight[0].numel()  # the weights that one output meets


def _transposed_convolution(_: Tensor, x: Tensor, weight: Tensor, *__: Any) -> int:
    return x.numel() * weight[0].numel()  # the weights that one input meets


def _attention(result: Tensor, query: Tensor, key: Tensor, *_: Any) -> int:
    return (query.numel() + result.numel()) * key.shape[-2]


# Multiply-adds of PyTorch's functions by name, from their result and their arguments.
COUNTS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm"), _product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "scaled_dot_product_attention": _attention,
}


class _Counter(TorchFunctionMode):
    """Counts the multiply-adds of what runs inside it.

    PyTorch's own counter, against which the tests hold this one, imports its compiler: more than a second, and memory.
    """

    total = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := COUNTS.get(getattr(func, "__name__", "")):
            self.total += count(result, *args)
        return result


_COUNTED: WeakKeyDictionary[DiffusionPolicy, MultiplyAdds] = WeakKeyDictionary()


def multiply_adds(policy: DiffusionPolicy) -> MultiplyAdds:
    """Count the multiply-adds of a policy by running its encoder and its denoiser once; each policy is counted once.

    They are counted as `eager` computes them. Other back ends compute the same products, some of them once for all
    steps, and 8-bit weights do not change their number.

    Args:
        policy: the policy, in evaluation mode.

    Returns:
        The counts, which depend on the policy's configuration alone.
    """
    if policy not in _COUNTED:
        config = policy.config
        noise = torch.zeros(1, config.denoised_horizon, config.action_dim, device=policy.device)
        timestep = torch.zeros(1, dtype=torch.int64, device=policy.device)
        with torch.no_grad():
            with _Counter() as encoder:
                embedding = policy.embed(zero_observations(config, rows=1))
            with _Counter() as denoiser:
                policy.denoiser(noise, timestep, embedding)
        _COUNTED[policy] = MultiplyAdds(encoder=encoder.total, denoiser=max(1, denoiser.total))
    return _COUNTED[policy]
