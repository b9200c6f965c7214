"""Decoding ahead of a training, in processes that share memory with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from policy.common.errors import WorkerError
from policy.common.machine import leave_children_alone, outside_current_folder
from policy.data.budget import free_memory, readable
from policy.data.frames import Frames
from policy.data.groups import Groups

# Most batches whose groups are decoded before they are taken, and those that there is memory for at least.
MOST_AHEAD, AHEAD = 8, 3

T = TypeVar("T")
# Memory by key, (slots, rows, H, W, 3) uint8.
Memory = Mapping[str, NDArray[np.uint8]]
# Decodes the frames of one key into a slot, from one row number to another.
Submit = Callable[[str, int, int, int], "Future[None]"]


@dataclass
class _Slot:
    """A place in the memory, and what is known of the group in it."""

    number: int
    decoding: list[Future[None]] = field(default_factory=list)  # one for each key
    batches: int = 0  # that were announced and not released yet


class DecodedGroups:
    """The decoded groups of coming batches. Where memory ends, the group goes that was used least recently.

    Args:
        memory: where the frames are decoded to.
        groups: the groups.
        submit: starts decoding.
    """

    def __init__(self, memory: Memory, groups: Groups, submit: Submit) -> None:
        self._memory = memory
        self._groups = groups
        self._submit = submit
        self._free = list(range(min(map(len, memory.values()))))
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    def announce(self, groups: NDArray[np.int64]) -> bool:
        """Start to decode the groups of a batch, unless they are there.

        Args:
            groups: (B,) the group of each window.

        Returns:
            Whether there is memory for them; if not, nothing was done.
        """
        wanted = set(groups.tolist())
        new = np.array(sorted(wanted - self._slots.keys()), np.int64)
        idle = [group for group, slot in self._slots.items() if not slot.batches and group not in wanted]
        missing = len(new) - len(self._free)
        if missing > len(idle):
            return False
        for group in idle[: max(0, missing)]:
            self._free.append(self._slots.pop(group).number)
        for group, first, stop in zip(
            new.tolist(), *(bound.tolist() for bound in self._groups.bounds(new)), strict=True
        ):
            number = self._free.pop()
            self._slots[group] = _Slot(number, [self._submit(key, number, first, stop) for key in self._memory])
        for group in wanted:
            self._slots[group].batches += 1
            self._slots.move_to_end(group)
        return True

    def take(self, key: str, groups: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy frames of a batch that was announced, once they are decoded.

        Args:
            key: the frames' key.
            groups: (B,) the group of each window.
            rows: (B, n) the row numbers of each window's frames.

        Returns:
            The frames, (B, n, H, W, 3).

        Raises:
            ValueError: a frame cannot be decoded; the message names file, episode and frame.
            WorkerError: a process that decodes has ended.
        """
        present, which = np.unique(groups, return_inverse=True)
        slots = [self._slots[group] for group in present.tolist()]
        for slot in slots:
            for decoding in slot.decoding:
                _result(decoding)
        numbers = np.array([slot.number for slot in slots])[which]
        places = (numbers * self._groups.rows - self._groups.bounds(groups)[0])[:, None] + rows
        memory = self._memory[key]
        return memory.reshape(-1, *memory.shape[2:]).take(places, axis=0)

    def ahead(self, batches: Iterable[tuple[T, NDArray[np.int64]]]) -> Iterator[tuple[T, NDArray[np.int64]]]:
        """Announce batches as far ahead as there is memory for, and yield each in turn, to be taken.

        Args:
            batches: any object and the groups of each batch.

        Yields:
            The batches.

        Raises:
            ValueError: a batch has more groups than there is memory for.
        """
        coming, announced = iter(batches), deque[tuple[T, NDArray[np.int64]]]()
        following = next(coming, None)
        while announced or following:
            while following and len(announced) <= MOST_AHEAD and self.announce(following[1]):
                announced.append(following)
                following = next(coming, None)
            if following and not announced:
                raise ValueError(
                    f"the {len(np.unique(following[1]))} groups of frames of a batch do not fit into the memory for"
                    f" {min(map(len, self._memory.values()))} of them, because many episodes are very short: make"
                    " train.batch_size smaller, or decode the videos beforehand with dataset.decode=cache"
                )
            batch = announced.popleft()
            yield batch
            self.release(batch[1])

    def release(self, groups: NDArray[np.int64]) -> None:
        """Take note that a batch that was announced was taken."""
        for group in np.unique(groups).tolist():
            self._slots[group].batches -= 1


def _result(decoding: Future[None]) -> None:
    try:
        decoding.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process that decodes videos has ended: another one may have taken its memory (less is needed with"
            " dataset.image_size), or a video crashed the decoder (dataset.decode_workers=0 shows how), or your script"
            ' starts the training outside of `if __name__ == "__main__":`'
        ) from error


@contextmanager
def decoded_groups(
    frames: Mapping[str, Frames], groups: Groups, batch_size: int, workers: int
) -> Iterator[DecodedGroups]:
    """Decode groups while this context lasts.

    Args:
        frames: the frames by key.
        groups: the groups.
        batch_size: windows in a batch, as `Windows.batch_at` draws them.
        workers: processes that decode, with one thread each; 0 decodes here.

    Yields:
        The groups, none of which is decoded yet.

    Raises:
        ValueError: there is not enough memory for them.
    """
    slots = groups.needed(batch_size, AHEAD)
    needed = slots * groups.rows * sum(values.row_bytes for values in frames.values())
    if needed > free_memory():
        raise ValueError(
            f"decoded frames of the coming batches need {readable(needed)} of memory, and {readable(free_memory())} are"
            " free: make them smaller with dataset.image_size, or train.batch_size smaller"
        )
    shapes = {key: (slots, groups.rows, *values.shape[1:]) for key, values in frames.items()}
    if workers == 0:
        decoder = _Decoder(frames, {key: np.empty(shape, np.uint8) for key, shape in shapes.items()})
        yield DecodedGroups(decoder.memory, groups, decoder.submit)
        return
    context = multiprocessing.get_context("spawn")
    shared = {key: context.RawArray("B", int(np.prod(shape))) for key, shape in shapes.items()}
    pool = ProcessPoolExecutor(workers, context, _begin, (frames, shared, shapes))
    try:
        with outside_current_folder(), _interrupts_blocked():
            for _ in range(workers):
                pool.submit(_nothing)  # starts a process
        yield DecodedGroups(_viewed(shared, shapes), groups, lambda *task: pool.submit(_decode, *task))
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that this thread starts meanwhile do not see Ctrl-C, also before they have begun to ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _viewed(shared: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Memory:
    return {key: np.frombuffer(values, np.uint8).reshape(shapes[key]) for key, values in shared.items()}


class _Decoder:
    """Decodes into memory.

    Args:
        frames: the frames by key.
        memory: receives them.
    """

    def __init__(self, frames: Mapping[str, Frames], memory: Memory) -> None:
        self._frames = frames
        self.memory = memory

    def decode(self, key: str, slot: int, first: int, stop: int) -> None:
        """See `Submit`."""
        self._frames[key].read(first, self.memory[key][slot, : stop - first])

    def submit(self, key: str, slot: int, first: int, stop: int) -> Future[None]:
        """Decode at once."""
        done: Future[None] = Future()
        try:
            self.decode(key, slot, first, stop)
            done.set_result(None)
        except ValueError as error:
            done.set_exception(error)
        return done


# The decoder of this process, if it was started to decode.
_ours: _Decoder


def _begin(frames: Mapping[str, Frames], shared: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Prepare a process that decodes: it ends with its parent, which alone handles Ctrl-C."""
    global _ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leave_children_alone()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _ours = _Decoder(frames, _viewed(shared, shapes))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _nothing() -> None:
    """Do nothing, in a process that is started for it."""


def _decode(key: str, slot: int, first: int, stop: int) -> None:
    _ours.decode(key, slot, first, stop)
