"""The processes that `torchrun` starts for one training: which one this is, and what they do together.

torchrun tells each process its number in the environment. Torch is imported only where the processes talk to each
other, so that a command can be refused without it.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from policy.common.errors import PeerError

if TYPE_CHECKING:
    from torch import Tensor

# How long a process waits for the others: one of them may be rolling out. The end of a process is noticed at once.
PATIENCE = timedelta(days=7)
# The word that processes claim to end the run with an error, of which one is enough.
LAST_WORD = "last word"


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: number of the processes on all machines.
        local_rank: number of this process on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, tracks, prints, rolls out and measures."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them wait for each other here."""
        if self.size == 1:
            return flag
        return self._reduced([flag], "MAX")[0] > 0

    def same(self, value: int) -> bool:
        """Whether a number is the same in every process; all of them wait for each other here."""
        if self.size == 1:
            return True
        most, least = self._reduced([value, -value], "MAX")
        return most == -least

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, on its own device."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def tell(self, name: str, text: str | None) -> str:
        """Return the text of the first process in every process; the others wait for it, and give None."""
        if self.size == 1:
            assert text is not None
            return text
        if text is not None:
            _store().set(name, text)
        found: str = _store().get(name).decode()
        return found

    def device(self, device: str) -> str:
        """The device of this process: with `cuda`, each process of a machine has a GPU of its own.

        Raises:
            ValueError: one GPU is named for several processes, or there are fewer GPUs than processes.
        """
        if self.size == 1 or device == "cpu":
            return device
        if device != "cuda":
            raise ValueError(
                f"device={device} names one device for {self.size} processes: give device=cuda, with which each"
                " process of torchrun takes a GPU of its own"
            )
        import torch

        if self.local_rank >= (found := torch.cuda.device_count()):
            raise ValueError(
                f"torchrun started process {self.local_rank + 1} on a machine with {found} GPUs: give"
                f" --nproc-per-node={max(found, 1)}, or device=cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def _reduced(self, values: list[int], operation: str) -> list[int]:
        """All-reduce whole numbers on the CPU, so that no GPU is waited for."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor.tolist()


ALONE = World()


@dataclass
class _Joined:
    """What `process_group` opened: the world, and the store in which its processes leave words for each other."""

    world: World = ALONE
    store: Any = None


_JOINED = _Joined()


def started_world() -> World:
    """The processes that torchrun started together with this one, from the environment."""
    told = os.environ
    if "TORCHELASTIC_RUN_ID" not in told:
        return ALONE
    return World(rank=int(told["RANK"]), size=int(told["WORLD_SIZE"]), local_rank=int(told["LOCAL_RANK"]))


def joined_world() -> World:
    """The processes that this one has joined in `process_group`; outside of it, it is alone."""
    return _JOINED.world


def check_launch(command: str, *, multirun: bool) -> None:
    """Refuse what several processes cannot do together.

    Args:
        command: name of the command.
        multirun: whether it runs several jobs one after the other.

    Raises:
        ValueError: torchrun started several processes of something else than one training.
    """
    size = started_world().size
    if size > 1 and (command != "train" or multirun):
        what = "--multirun" if multirun else f"ddim-{command}"
        raise ValueError(
            f"torchrun started {size} processes, which only one ddim-train shares among them: start {what} without"
            " torchrun"
        )


@contextmanager
def process_group(world: World, init_method: str = "env://") -> Iterator[None]:
    """Connect the processes of a training: gloo between CPUs, NCCL between GPUs. A single process stays alone.

    Args:
        world: the processes.
        init_method: how they find each other, see `torch.distributed.init_process_group`; by default as torchrun says.

    Raises:
        PeerError: another process ended before its time.
    """
    if world.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with peers_needed():
        found, *_ = next(dist.rendezvous(init_method, world.rank, world.size, timeout=PATIENCE))
        found.set_timeout(PATIENCE)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        _JOINED.world, _JOINED.store = world, store
        yield
        # After an error the connections stay open until this process has said why it ends: they are the others' sign.
        _JOINED.world, _JOINED.store = ALONE, None
        dist.destroy_process_group()


def _store() -> Any:
    return _JOINED.store


@contextmanager
def peers_needed() -> Iterator[None]:
    """Turn the errors of a connection that broke off into an error that says so.

    From then on this process ignores the SIGTERM with which torchrun ends the others: it ends by itself.

    Raises:
        PeerError: another process ended before its time.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise PeerError("another process of this training ended before its time") from error


def _is_of_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextmanager
def first_on_machine_goes_ahead() -> Iterator[None]:
    """Let the first process of each machine through this block before the others, which find its work done."""
    world = joined_world()
    ahead = world.local_rank == 0
    if not ahead:
        world.wait()
    yield
    if ahead:
        world.wait()


def has_last_word() -> bool:
    """Whether this process is the one that says why the run ends: of those that fail together, only the first one."""
    if _JOINED.store is None:
        return started_world().first
    try:
        return bool(_JOINED.store.add(LAST_WORD, 1) == 1)
    except RuntimeError:  # the store is gone with the process that kept it
        return True


@contextmanager
def only_first_prints() -> Iterator[None]:
    """In this block, only the first process prints messages and warnings. Errors are for `has_last_word`."""
    with ExitStack() as stack:
        if not started_world().first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings())
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
        yield
