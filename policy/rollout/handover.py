"""What a rollout process receives as it starts: the policies in an open file, a folder, and its standard error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch

from policy.common.descriptors import Descriptor
from policy.common.errors import WorkerError
from policy.model.diffusion_policy import DiffusionPolicy

PREFIX = "ddim-policy-rollout-"
# Bytes; torch aligns what it allocates, and what it writes into files, to this.
ALIGNMENT = 64


@contextmanager
def standard_error_into(log: IO[bytes]) -> Iterator[Descriptor]:
    """Let a process that is started inside begin with another standard error; it takes the real one when it can.

    What Python prints when a process cannot even start would otherwise be pages of tracebacks, once per process.
    """
    sys.stderr.flush()
    real = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield Descriptor(real)
    finally:
        os.dup2(real, 2)
        os.close(real)


class Parcel(NamedTuple):
    """What all processes share.

    Attributes:
        policies: an open file that holds the policies.
        folder: for files that hold compiled programs.
    """

    policies: Descriptor
    folder: Path


@contextmanager
def parcel(policies: Sequence[DiffusionPolicy]) -> Iterator[Parcel]:
    """Write policies to a file that processes map into memory, so that their weights are there once.

    Shared memory is too small for that in a container: Docker allows 64 MB. The file has no name, and ends with the
    processes. The folder is removed at the end.

    Raises:
        WorkerError: there is no room for it.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            torch.save(list(policies), file)
            file.flush()
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True))
        except (OSError, RuntimeError) as error:
            raise WorkerError(
                f"the policies cannot be written for the rollout processes ({error}): name a folder with room in"
                " TMPDIR, or use num_envs=1"
            ) from error
        yield Parcel(Descriptor(file.fileno()), Path(folder))


def unpacked(parcel: Parcel) -> list[DiffusionPolicy]:
    """Map the policies of a `parcel` into memory, in the process that received it."""
    number = parcel.policies.take()
    try:
        # The parent has just written it: nothing that a user loads comes this way.
        policies: list[DiffusionPolicy] = torch.load(f"/dev/fd/{number}", mmap=True, weights_only=False)
    finally:
        os.close(number)
    return policies


def align(policies: Sequence[DiffusionPolicy]) -> None:
    """Let weights in this process begin where those of the processes do, at multiples of `ALIGNMENT` bytes.

    A matrix product may round differently at other places: the weights of a checkpoint, which are mapped from its file,
    begin anywhere. The policies stay the same objects, so that what is compiled for them stays theirs.
    """
    for policy in policies:
        for weight in (*policy.parameters(), *policy.buffers()):
            if weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()
