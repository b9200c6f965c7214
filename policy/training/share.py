"""The share of a process in every batch of a training on several processes, so that all together they are one.

Each process learns from an equal part of a batch's windows: its rows. Random numbers are drawn for the whole batch from
the generators that one process would draw them from, and the process takes its rows of them. The mean of the parts'
losses, and of their gradients, is that of the whole batch.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from policy.common.observations import Batch
from policy.common.torchrun import World
from policy.data.windows import Windows
from policy.model.diffusion_policy import DiffusionPolicy


def parts(
    training: Windows, numbers: Iterable[NDArray[np.int64]], world: World
) -> Generator[tuple[NDArray[np.int64], Batch], None, None]:
    """Collect this process's part of one batch after the other.

    Args:
        training: the training windows.
        numbers: (B,) window numbers of each whole batch, see `Windows.batches`.
        world: the processes.

    Yields:
        The window numbers of each whole batch, and the part: B / size windows. A part tells how many actions count in a
        part on average, see `Batch`.
    """
    if world.size == 1:
        yield from training.batches(numbers)
        return
    wholes: deque[NDArray[np.int64]] = deque()  # of which parts are on their way

    def own() -> Iterator[NDArray[np.int64]]:
        for whole in numbers:
            wholes.append(whole)
            yield whole.reshape(world.size, -1)[world.rank]

    with closing(training.batches(own())) as batches:
        for _, batch in batches:
            whole = wholes.popleft()
            batch["counted"] = float(training.inside(whole).sum()) / world.size
            yield whole, batch


def draws(world: World) -> AbstractContextManager[Any]:
    """In this block, random numbers are drawn for the whole batch, see `DrawnForAll`."""
    return nullcontext() if world.size == 1 else DrawnForAll(world)


def learner_of(policy: DiffusionPolicy, world: World) -> nn.Module:
    """Return the module that computes a loss, as a `Learner` does; its gradient is the mean over the processes."""
    alone = Learner(policy)
    if world.size == 1:
        return alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases of torch call `broadcast_buffers` otherwise
        # Only a plugin has buffers that change; those of the first process are saved. With a static graph, parameters
        # that no loss depends on are no error.
        return DistributedDataParallel(alone, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True)


class Learner(nn.Module):
    """A policy whose forward pass is the loss of a phase, as `DistributedDataParallel` needs it.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, loss: Callable[..., Tensor], examples: Any, generator: torch.Generator) -> Tensor:
        """Compute the loss () of the policy on examples."""
        return loss(self.policy, examples, generator)


class DrawnForAll(TorchFunctionMode):
    """In this block, random numbers are drawn for the rows of all processes, and this process takes its own.

    This holds for tensors whose first axis are the rows of a batch, or several for each row, one after the other.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; those that draw random numbers for the rows of all processes."""
        kwargs = kwargs or {}
        if function in (torch.rand, torch.randn, torch.randint):
            return self._part(function(*self._enlarged(args), **kwargs))
        if function in (torch.rand_like, torch.randn_like):
            return self._part(function(self._ones(args[0]), *args[1:], **kwargs))
        if function is dropout:
            return self._dropout(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * self._part(dropout(self._ones(x), p)) if training and p > 0 else x

    def _part(self, drawn: Tensor) -> Tensor:
        rows = len(drawn) // self._world.size
        return drawn[self._world.rank * rows : (self._world.rank + 1) * rows]

    def _enlarged(self, args: Sequence[Any]) -> list[Any]:
        """The arguments with the size of all rows: the last one is a size, or else all are, as `randn(2, 3)` takes."""
        *before, last = args
        if isinstance(last, Sequence):
            return [*before, (last[0] * self._world.size, *last[1:])]
        return [args[0] * self._world.size, *args[1:]]

    def _ones(self, x: Tensor) -> Tensor:
        """Ones for all rows in the memory layout of a part, in whose order numbers are drawn."""
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        sizes = (len(x) * self._world.size, *x.shape[1:])
        ones = x.new_ones([sizes[axis] for axis in order])
        return ones.permute([order.index(axis) for axis in range(x.ndim)])


def check_shares(rows: int, world: World) -> None:
    """Refuse a batch of which the processes cannot have equal parts.

    Args:
        rows: windows that a step learns from.
        world: the processes.

    Raises:
        ValueError: the number of processes does not divide them.
    """
    if rows % world.size:
        raise ValueError(
            f"{rows} windows in a step cannot be shared equally by {world.size} processes: choose train.batch_size and"
            " torchrun's --nproc-per-node so that one divides the other"
        )


def check_agreement(world: World, *, step: int, windows: int) -> None:
    """Refuse processes that do not train the same; all of them wait for each other here.

    Args:
        world: the processes.
        step: the step that this process goes on from.
        windows: the number of its training windows.

    Raises:
        ValueError: they differ.
    """
    if not world.same(windows):
        raise ValueError(
            f"the processes read different demonstrations, process {world.rank} {windows} windows: dataset.path= must"
            " hold the same on every machine"
        )
    if not world.same(step):
        raise ValueError(
            f"the processes go on at different steps, process {world.rank} at {step}: output_dir= must be a folder that"
            " all machines share"
        )
