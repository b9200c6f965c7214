"""Safe reading of foreign HDF5 files: no data from outside the file, and no more memory than the file justifies."""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from policy.data.budget import Budget, BudgetError

# gzip compresses to no less than a thousandth; a file that claims a higher ratio is damaged.
MAX_COMPRESSION = 2048
# The first bytes of a global heap, which stores texts and JPEGs of different lengths.
HEAP = b"GCOL\x01\0\0\0"
HEAP_HEADER = 16
REFERENCE = np.dtype([("size", "<u4"), ("heap", "<u8"), ("index", "<u4")])
# Groups in groups: deeper than any recording. Hard links can be circular, so the search needs a limit.
MAX_DEPTH = 16


class HDF5Error(ValueError):
    """A part of a file cannot be read; the message names its key."""


class HDF5File:
    """One file, opened for reading.

    Keys are whole paths, such as `data/demo_0/actions`. Only hard links are followed, and only data inside the file is
    read: soft links, external links, external storage and virtual datasets can lead to any file of this machine.

    All methods raise `HDF5Error` if a key is missing or unreadable.

    Raises:
        ValueError: the file is not HDF5, or is damaged.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self._size = path.stat().st_size
        self._budget = budget
        try:
            self._file = h5py.File(path, "r")
        except BlockingIOError as error:
            raise ValueError(
                f"{path.name} is open for writing elsewhere: close the program that writes it, or copy the file once"
                " it is written"
            ) from error
        except Exception as error:
            raise ValueError(f"{path.name} is not a readable HDF5 file ({error}): fetch it again") from error
        try:
            self._heaps = _Heaps(path)
            self._heaps.check()
        except ValueError as error:
            self._file.close()
            raise ValueError(f"{path.name} is damaged ({error}): fetch it again") from error

    def close(self) -> None:
        """Close the file."""
        self._heaps.close()
        self._file.close()

    def names(self, key: str) -> list[str]:
        """The names in a group, in the file's order; empty if there is no such group. The root's key is ''."""
        with _naming(key):
            node = self._find(key, missing_ok=True)
            return _members(node) if isinstance(node, h5py.Group) else []

    def arrays(self, key: str) -> list[str]:
        """The keys, relative to a group, of all arrays in it and in the groups inside it.

        Links that are not followed are included; reading one raises an error that says why it is refused.
        """
        found: list[str] = []
        groups = [""]
        with _naming(key):
            while groups:
                prefix = groups.pop()
                group = self._find(f"{key}/{prefix}")
                for name in _members(group):
                    if _is_group(group, name):
                        groups.append(f"{prefix}{name}/")
                    else:
                        found.append(f"{prefix}{name}")
                if prefix.count("/") > MAX_DEPTH:
                    raise HDF5Error(f"{key!r} holds groups in groups without end")
        return sorted(found)

    def attribute(self, key: str, name: str) -> Any:
        """The value of an attribute, or None if there is no such attribute."""
        with _naming(f"{key}@{name}"):
            return self._find(key).attrs.get(name)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array, without reading its values."""
        with _naming(key):
            return tuple(self._dataset(key).shape)

    def numbers(self, key: str) -> NDArray[Any]:
        """Read an array of numbers."""
        with _naming(key):
            dataset = self._dataset(key)
            if dataset.dtype.kind not in "biuf":
                raise HDF5Error(f"{key!r} must hold numbers; it holds {_kind(dataset.dtype)}")
            values = dataset[()]
            assert isinstance(values, np.ndarray)
            return values

    def blobs(self, key: str) -> list[bytes] | None:
        """Read rows of bytes of different lengths; None if the key holds something else."""
        with _naming(key):
            dataset = self._dataset(key)
            if h5py.check_vlen_dtype(dataset.dtype) != np.uint8 or dataset.ndim != 1:
                return None
            return self._rows(dataset)

    def strings(self, key: str) -> list[str]:
        """Read a list of texts."""
        with _naming(key):
            dataset = self._dataset(key)
            if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
                if dataset.size == 0:  # numpy writes an empty list of texts as numbers
                    return []
                raise HDF5Error(f"{key!r} must be a list of texts; it holds {_kind(dataset.dtype)}")
            texts = dataset[()] if dataset.dtype.kind == "S" else self._rows(dataset)
            return [text.decode() for text in texts]

    def _find(self, key: str, missing_ok: bool = False) -> Any:
        node: Any = self._file
        for name in filter(None, key.split("/")):
            link = _link(node, name) if isinstance(node, h5py.Group) else None
            if link is None:
                if missing_ok:
                    return None
                raise HDF5Error(f"there is no {key!r}")
            if link != h5py.h5l.TYPE_HARD:
                raise HDF5Error(f"{key!r} is a link that may leave the file: copy the data into the file")
            node = node[name]
        return node

    def _rows(self, dataset: h5py.Dataset) -> list[bytes]:
        self._budget.check_memory(len(dataset) * REFERENCE.itemsize, f"{dataset.name!r}")
        if dataset.id.get_create_plist().get_nfilters():
            raise HDF5Error(f"{dataset.name!r} holds compressed rows of different lengths: write them uncompressed")
        if dataset.chunks:
            starts = range(0, len(dataset), dataset.chunks[0])
            stored = b"".join(dataset.id.read_direct_chunk((start,))[1] for start in starts)
        else:
            stored = self._heaps.data[dataset.id.get_offset() :][: len(dataset) * REFERENCE.itemsize]
        references = np.frombuffer(stored, REFERENCE, len(dataset))
        self._budget.check_memory(int(references["size"].sum(dtype=np.int64)), f"{dataset.name!r}")
        return self._heaps.rows(references)

    def _dataset(self, key: str) -> h5py.Dataset:
        dataset = self._find(key)
        if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
            raise HDF5Error(f"{key!r} is not an array with rows")
        created = dataset.id.get_create_plist()
        if created.get_layout() == h5py.h5d.VIRTUAL or created.get_external_count():
            raise HDF5Error(f"{key!r} is stored in other files: copy the data into the file")
        # A damaged shape must not allocate memory for data that was never stored.
        stored = min(dataset.id.get_storage_size(), self._size)
        limit = stored * MAX_COMPRESSION if created.get_nfilters() else stored
        declared = math.prod(dataset.shape) * dataset.dtype.itemsize
        if declared > limit:
            raise HDF5Error(f"{key!r} should have {declared} bytes, but {stored} are stored: it was written partly")
        chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
        self._budget.check_memory(max(declared, chunk), f"{key!r}")
        _check_filters(key, created)
        return dataset


def _check_filters(key: str, created: h5py.h5p.PropDCID) -> None:
    """Refuse data that was compressed with a filter which is not installed.

    Raises:
        HDF5Error: the message names the filter, and the package that has the common ones.
    """
    for place in range(created.get_nfilters()):
        number, _, _, name = created.get_filter(place)
        if h5py.h5z.filter_avail(number):
            continue
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(number):
            raise HDF5Error(
                f"{key!r} is compressed with the HDF5 filter {number} ({name.decode(errors='replace')}), which is not"
                " installed: pip install hdf5plugin, or write the file again with gzip (h5repack -f GZIP=4)"
            )


class _Heaps:
    """The global heaps of a file, which store rows of different lengths (HDF5 File Format Specification, III.E).

    They are parsed here because HDF5 2.0 crashes on a reference to a missing object, and loops forever on free space of
    size 0, which appears when a part of a heap is overwritten with zeros.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        self.data.close()

    def check(self) -> None:
        """Walk through the objects of every heap.

        Raises:
            ValueError: a heap is damaged.
        """
        start = self.data.find(HEAP)
        while start != -1:
            self._objects(start)
            start = self.data.find(HEAP, start + 1)

    def rows(self, references: NDArray[Any]) -> list[bytes]:
        """Read the objects that references point to.

        Raises:
            ValueError: an object is missing, or is shorter than its reference says.
        """
        objects = {heap: self._objects(heap) for heap in set(references["heap"][references["size"] > 0].tolist())}
        rows = []
        for size, heap, index in references.tolist():
            start, stored = objects[heap].get(index, (0, -1)) if size else (0, 0)
            if size > stored:
                raise ValueError("a row is missing")
            rows.append(self.data[start : start + size])
        return rows

    def _objects(self, heap: int) -> dict[int, tuple[int, int]]:
        """Map the number of each object to its start and its length."""
        if self.data[heap : heap + len(HEAP)] != HEAP:
            raise ValueError("a heap is missing")
        end = min(heap + self._number(heap + 8, 8), len(self.data))
        position = heap + HEAP_HEADER
        objects = {}
        while position + HEAP_HEADER <= end:
            index, size = self._number(position, 2), self._number(position + 8, 8)
            position += HEAP_HEADER
            if index == 0:  # the size of free space includes its header
                if size < HEAP_HEADER:
                    raise ValueError("a part of it was overwritten")
                position += size - HEAP_HEADER
            else:
                objects[index] = (position, min(size, end - position))
                position += -(-size // 8) * 8
        return objects

    def _number(self, start: int, width: int) -> int:
        return int.from_bytes(self.data[start : start + width], "little")


def _members(group: h5py.Group) -> list[str]:
    names: list[Any] = list(group)
    if broken := [name for name in names if not isinstance(name, str)]:  # h5py returns invalid UTF-8 as bytes
        raise HDF5Error(f"{group.name!r} holds {broken[0]!r}, which is not a name: fetch the file again")
    return names


def _link(group: h5py.Group, name: str) -> int | None:
    encoded = name.encode()
    # h5py's own `in` and `get` would follow the link.
    return group.id.links.get_info(encoded).type if group.id.links.exists(encoded) else None


def _is_group(group: h5py.Group, name: str) -> bool:
    if _link(group, name) != h5py.h5l.TYPE_HARD:
        return False
    return bool(h5py.h5o.get_info(group.id, name.encode()).type == h5py.h5o.TYPE_GROUP)


def _kind(dtype: np.dtype[Any]) -> str:
    return "text" if h5py.check_string_dtype(dtype) else str(dtype)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except (HDF5Error, BudgetError):
        raise
    except Exception as error:  # h5py raises many different exceptions for failures of the HDF5 library
        raise HDF5Error(f"{key!r} cannot be read ({error})") from error
