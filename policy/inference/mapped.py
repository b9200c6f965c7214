"""Arrays in a file that processes map into memory, so that large weights are there once."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.common.descriptors import Descriptor

# How to make an array: large ones are made one after the other, as they are written.
Maker = Callable[[], NDArray[Any]]
# Distance between the beginnings of arrays is a multiple of this, so that vector instructions read whole cache lines.
ALIGNMENT = 64


# Linux's advice to write memory back and drop it; unlike MADV_DONTNEED it loses nothing, whatever the memory is.
MADV_PAGEOUT = 21


class Place(NamedTuple):
    """Where an array lies in the file.

    Attributes:
        offset: the first byte.
        shape: its shape.
        dtype: name of its type.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class MappedArrays:
    """Arrays in a file without a name, which ends with the last process that has it open.

    Shared memory is too small for that in a container: Docker allows 64 MB. Pickled while this process runs, the
    arrays arrive in another process as the same memory.

    Attributes:
        places: where each array lies.

    Args:
        file: number of the open file; it is closed with this object.
        places: see above.
    """

    def __init__(self, file: int, places: Mapping[str, Place]) -> None:
        self._file, self.places = file, dict(places)
        self._memory = mmap.mmap(file, 0, access=mmap.ACCESS_READ)

    @classmethod
    def write(cls, arrays: Mapping[str, Maker]) -> MappedArrays:
        """Write arrays to a new file.

        Raises:
            ValueError: there is no room for it.
        """
        places: dict[str, Place] = {}
        try:
            with tempfile.TemporaryFile() as file:
                for name, make in arrays.items():
                    array = np.ascontiguousarray(make())
                    places[name] = Place(file.tell(), array.shape, array.dtype.str)
                    file.write(array.data)
                    file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(bytes(ALIGNMENT))  # an empty file cannot be mapped
                file.flush()
                return cls(os.dup(file.fileno()), places)
        except OSError as error:
            raise ValueError(
                f"the weights cannot be written for ONNX Runtime ({error}): name a folder with room in TMPDIR, or use"
                " backend=fused"
            ) from error

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays, which cannot be written to."""
        return {
            name: np.frombuffer(self._memory, place.dtype, int(np.prod(place.shape)), place.offset).reshape(place.shape)
            for name, place in self.places.items()
        }

    def copy_to(self, path: Path) -> None:
        """Write a copy of the file."""
        os.lseek(self._file, 0, os.SEEK_SET)
        shutil.copyfile(f"/dev/fd/{self._file}", path)

    def forget(self) -> None:
        """Let the system drop what it has read of the file; it is read again where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (Descriptor(self._file), self.places)


def _received(descriptor: Any, places: Mapping[str, Place]) -> MappedArrays:
    return MappedArrays(descriptor.take(), places)


def page_out(arrays: Iterable[NDArray[Any]]) -> None:
    """Let Linux drop the memory of arrays that are mapped from a file and not needed soon; reading brings it back."""
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for array in arrays:
        begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if size > 0:
            madvise(begin, size, MADV_PAGEOUT)  # a refusal costs memory, and nothing else


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what it expects to need again."""
    if sys.platform.startswith("linux") and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
