"""The Diffusion Policy zarr replay buffer: arrays `data/<key>` of all episodes, and their ends in `meta/episode_ends`.

zarr decodes the arrays. Two kinds of damage that it does not report are checked before: missing chunks (zarr reads them
as the fill value) and truncated chunks (Blosc decodes the memory behind them). A chunk is zarr's here, a block of an
array that is stored as one file; it has nothing to do with chunks of actions.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise, product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from policy.common.observations import is_image
from policy.data.budget import Budget
from policy.data.episode import Episode, EpisodeReader, Request
from policy.data.formats.chunk_sizes import SIZES, grows_beyond
from policy.data.formats.format import Format

ENDS = "meta/episode_ends"
METADATA_FILES = (".zarray", "zarr.json")  # the metadata of an array, in format 2 and 3
CHUNK_NAME = re.compile(r"(c[./])?\d+([./]\d+)*")
# Packages of the codecs that zarr does not bring along, by a word in their names.
CODECS = {"imagecodecs": "imagecodecs", "zfpy": "zfpy", "pcodec": "pcodec", "msgpack": "msgpack", "crc32c": "crc32c"}
# Rows of chunks are decoded together up to this number of bytes.
BLOCK_BYTES = 16 * 2**20


class ZarrReplayReader:
    """Reads one episode at a time; if they are read in order, each chunk is decoded once."""

    def __init__(
        self,
        arrays: Mapping[str, _Rows],
        bounds: Sequence[tuple[int, int]],
        keys: Mapping[str, str],
        action_key: str,
        opened: ExitStack,
    ) -> None:
        self.names = [str(number) for number in range(len(bounds))]
        self.held_out: list[str] = []
        self.metadata = {"format": "zarr"}
        self._bounds = dict(zip(self.names, bounds, strict=True))
        self._arrays = arrays
        self._keys = keys
        self._action_key = action_key
        self._opened = opened

    def read(self, name: str) -> Episode:
        """See `EpisodeReader`."""
        start, end = self._bounds[name]
        return Episode(
            observations={key: self._arrays[k].read(start, end) for key, k in self._keys.items()},
            actions=self._arrays[self._action_key].read(start, end),
        )

    def close(self) -> None:
        """See `EpisodeReader`."""
        self._opened.close()


def open_zarr_replay(path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    """Open a replay buffer of zarr format 2 or 3, a folder or a `.zarr.zip`; it may be a folder inside either.

    Args:
        path: the folder or zip.
        files: the files in the folder, or the zip.
        request: the user's request. By default `state` is observed, and the actions are `action`. Keys may be nested
            (`obs/image`).

    Returns:
        The buffer's reader.

    Raises:
        ValueError: it is not a replay buffer, a key is not in it, or the ends do not cut the arrays into episodes.
    """
    if request.subset is not None:
        raise ValueError(f"a zarr replay buffer names no subsets; got dataset.subset={request.subset!r}")
    with ExitStack() as stack:
        store = _Store(path, files, stack)
        available = store.arrays("data")
        action_key = request.action(available, "action")
        keys = request.observations(available, ["state"])
        arrays = {key: _Rows(store, f"data/{key}", request.budget) for key in (*keys.values(), action_key)}
        _check_constants([arrays[key] for key in keys.values()], arrays[action_key])
        bounds = _read_bounds(store, arrays.values(), request.budget)
        shapes = {name: arrays[key].array.shape[1:] for name, key in {**keys, "actions": action_key}.items()}
        request.budget.check_episodes([end - start for start, end in bounds], shapes)
        return ZarrReplayReader(arrays, bounds, keys, action_key, stack.pop_all())


FORMAT = Format(
    open=open_zarr_replay,
    looks=lambda names: any(name.startswith(f"{ENDS}/") or name.endswith(".zarr.zip") for name in names),
)


def _check_constants(observed: Sequence[_Rows], actions: _Rows) -> None:
    """Warn of vectors of which no chunk is stored, and refuse actions, pictures or a whole dataset like that.

    zarr 3 does not write a chunk that holds nothing but the fill value, so an array without chunks is a constant, or
    was lost as a whole. A constant vector beside other observations is common (a gripper that never moves); constant
    actions and pictures are not.
    """
    for array in (*observed, actions):
        if not array.is_constant:
            continue
        if array is actions or is_image(array.array.shape[1:]) or all(other.is_constant for other in observed):
            raise array.not_whole()
        array.warn_left_out(f"no chunk of {array.name!r}")


def _read_bounds(store: _Store, arrays: Iterable[_Rows], budget: Budget) -> list[tuple[int, int]]:
    """Read the first row and the exclusive last row of each episode."""
    rows = _Rows(store, ENDS, budget)
    if rows.is_constant:
        raise rows.not_whole()
    if rows.array.ndim != 1 or rows.array.dtype.kind not in "iu":
        raise ValueError(f"{ENDS!r} must hold whole numbers, (episodes,); got {rows.array.dtype} {rows.array.shape}")
    for array in arrays:
        # Every episode has at least one transition, so there cannot be more ends than rows.
        if not 0 < len(rows) <= len(array):
            raise ValueError(f"{ENDS!r} names {len(rows)} episodes, {array.name!r} has {len(array)} rows")
    budget.check_memory(8 * len(rows), f"{ENDS!r}")
    bounds = list(pairwise([0, *rows.read(0, len(rows)).tolist()]))
    for number, (start, end) in enumerate(bounds):
        if end <= start:
            raise ValueError(f"{ENDS!r} ends episode {number} at {end}, which must be more than its start, {start}")
    for array in arrays:
        if len(array) != bounds[-1][1]:
            raise ValueError(
                f"{ENDS!r} ends the last episode at {bounds[-1][1]}, {array.name!r} has {len(array)} rows: the file is"
                " damaged or was written partly"
            )
    return bounds


class _Store:
    """The files of a replay buffer in a folder or a zip, by their names; no other file is opened.

    Attributes:
        path: the folder or zip, for messages.
        root: the buffer's place in it, "" or a name that ends with a slash.
    """

    def __init__(self, path: Path, files: Mapping[str, Path], stack: ExitStack) -> None:
        self.path = path
        if not path.is_file():
            self._files: dict[str, Callable[[], bytes]] = {name: file.read_bytes for name, file in files.items()}
            self._zarr: Any = str(path)
        else:
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
            except Exception as error:  # zipfile raises many different exceptions for damaged directories
                raise ValueError(f"not a folder and not a whole zip ({error}): fetch it again") from error
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if unsafe := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
                raise ValueError(f"the zip names a file outside itself, {unsafe[0]!r}: it was not written by zarr")
            self._files = {name: partial(archive.read, name) for name in names}
            self._zarr = zarr.storage.ZipStore(path, mode="r")
            stack.callback(self._close)
        self.root = self._find_root()

    def _close(self) -> None:
        with suppress(AttributeError):  # zarr 3 cannot close a zip from which no array was read
            self._zarr.close()

    def _find_root(self) -> str:
        suffixes = tuple(f"/{ENDS}/{file}" for file in METADATA_FILES)
        found = {f"/{name}".rsplit(ENDS, 1)[0][1:] for name in self._files if f"/{name}".endswith(suffixes)}
        if not found:
            raise ValueError(f"not a zarr replay buffer: there is no array {ENDS!r}")
        if len(found) > 1:
            raise ValueError(f"it holds {len(found)} replay buffers, take one of them: {', '.join(sorted(found))}")
        return found.pop()

    def arrays(self, group: str) -> list[str]:
        """The names of all arrays in a group and in the groups inside it."""
        start, files = f"{self.root}{group}/", tuple(f"/{file}" for file in METADATA_FILES)
        folders = {name.rpartition("/")[0] for name in self._files if name.endswith(files)}
        nodes = {folder.removeprefix(start) for folder in folders if folder.startswith(start)}
        # Groups of format 3 have a zarr.json too.
        return sorted(nodes - {str(parent) for node in nodes for parent in PurePosixPath(node).parents})

    def array(self, name: str) -> Any:
        """Open an array with zarr, without reading its values."""
        return zarr.open_array(self._zarr, path=self.root + name, mode="r")

    def __contains__(self, name: str) -> bool:
        return self.root + name in self._files

    def count_chunks(self, array: str) -> int:
        """Count the stored chunks of an array."""
        start = f"{self.root}{array}/"
        return sum(name.startswith(start) and bool(CHUNK_NAME.fullmatch(name, len(start))) for name in self._files)

    def has_folder(self, array: str) -> bool:
        """Whether an array's folder holds a folder; a zip has no folders without files."""
        folder = self.path / self.root / array
        return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())

    def read(self, name: str) -> bytes:
        """Read the bytes of a file."""
        return self._files[self.root + name]()


def _remedy(error: Exception) -> str:
    """Say how to get a codec that is not installed."""
    text = str(error).lower()
    if "codec" not in text and "compressor" not in text:
        return ""
    package = next((package for word, package in CODECS.items() if word in text), None)
    install = f"pip install {package}" if package else "install the package that has it"
    return f": the codec is not installed; {install}, or write the array again with Blosc or Zstd"


class _Rows:
    """The rows of an array, read from its start to its end.

    A chunk is one file of the array here, also for a sharded array of format 3. A row of chunks means all chunks that
    hold the same rows, because zarr also cuts wide arrays along their columns.

    Attributes:
        name: the array's name in the store.
        array: zarr's array.
        is_constant: whether no chunk is stored; all values then are the fill value.
    """

    def __init__(self, store: _Store, name: str, budget: Budget) -> None:
        self.name = name
        self._store = store
        try:
            self.array = array = store.array(name)
            self._shape, self._chunk = array.shape, getattr(array, "shards", None) or array.chunks
            # zarr 2 has one compressor, zarr 3 any number of them.
            compressors = array.compressors if hasattr(array, "compressors") else (array.compressor,)
            self._has_filters = bool(array.filters) or len(compressors) > 1
            is_plain = bool(compressors) and self._chunk == array.chunks  # a shard ends in an index, not in such data
            self._codec = type(compressors[-1]).__name__.removesuffix("Codec").lower() if is_plain else ""
            # This codec of older numcodecs unpickles, which can run any code.
            is_pickled = array.dtype.kind == "O" or "pickle" in repr((array.filters, compressors)).lower()
        except Exception as error:  # damaged metadata makes zarr raise many different exceptions
            raise ValueError(f"array {name!r} cannot be opened ({error}){_remedy(error)}") from error
        if is_pickled:
            raise ValueError(f"array {name!r} holds pickled objects or text, which are never opened")
        if array.dtype.kind not in "biuf" or not self._shape or min(self._shape) < 0 or min(self._chunk) < 1:
            raise ValueError(f"array {name!r} must hold rows of numbers; it holds {array.dtype} {self._shape}")
        self._grid = [-(-n // c) for n, c in zip(self._shape, self._chunk, strict=True)]
        self._chunk_bytes = array.dtype.itemsize * math.prod(self._chunk)
        self._check_size(budget)
        self._start = 0
        self._values: NDArray[Any] = np.empty(0)
        self._damaged: dict[int, str] = {}
        # For each column of chunks: the first and the last row of chunks of the newest gap, and whether the writer left
        # the gap out because all its values are the fill value.
        self._gaps: dict[tuple[int, ...], tuple[int, int, bool]] = {}
        self._warned = False

    def _check_size(self, budget: Budget) -> None:
        """Refuse an array that would fill the memory, or whose chunks are mostly missing."""
        row_bytes = self.array.dtype.itemsize * math.prod(self._shape[1:])
        decoded = row_bytes * min(self._chunk[0], self._shape[0])  # a row of chunks
        budget.check_memory(
            max(decoded, self._chunk_bytes),
            f"array {self.name!r} of shape {self._shape}: a row of its chunks of {self._chunk}",
        )
        self._stored = self._store.count_chunks(self.name)
        declared = math.prod(self._grid)
        # A folder in the array's own shows that there were chunks.
        self.is_constant = declared > 0 == self._stored and not self._store.has_folder(self.name)
        # A writer may leave chunks out, see `_check_left_out`, but not nearly all of them.
        if declared > 1000 * self._stored and not self.is_constant:
            raise self.not_whole()
        self._together = max(1, BLOCK_BYTES // max(1, decoded))

    def __len__(self) -> int:
        return int(self._shape[0])

    def not_whole(self) -> ValueError:
        """Build the error for an array of which (nearly) all chunks are missing."""
        return ValueError(
            f"array {self.name!r} is not whole: {self._stored} of its {math.prod(self._grid)} chunks are there; copy"
            f" the dataset again, or, if its values really are {self.array.fill_value}, write the array again with"
            " zarr's write_empty_chunks=True"
        )

    def warn_left_out(self, what: str) -> None:
        """Warn once that values are read as the fill value because their chunks are not stored."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._store.path}: {what} is stored; its values are read as {self.array.fill_value}, as zarr leaves"
                " out chunks that hold nothing else",
                stacklevel=2,
            )

    def read(self, start: int, end: int) -> NDArray[Any]:
        """Read the rows from `start` to `end`, exclusive.

        Raises:
            ValueError: a chunk of these rows is damaged or missing.
        """
        if self.is_constant:
            return np.full((end - start, *self._shape[1:]), self.array.fill_value, self.array.dtype)
        pieces = []
        while start < end:
            if not self._start <= start < self._start + len(self._values):
                self._load(start // self._chunk[0])
            piece = self._values[start - self._start : end - self._start]
            start += len(piece)
            # A copy, so that the decoded rows around it are freed before the next ones are decoded.
            pieces.append(piece if start == end else piece.copy())
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _load(self, first: int) -> None:
        """Decode a row of chunks, and as many after it as `BLOCK_BYTES` allows."""
        if first in self._damaged:
            raise ValueError(self._damaged[first])
        self._values = np.empty(0)  # frees the previous block before the next one is decoded
        self._start = first * self._chunk[0]
        try:
            self._values = self._decode(first, min(first + self._together, self._grid[0]))
        except ValueError as error:
            if self._together == 1:
                self._damaged[first] = str(error)
                raise
            self._together = 1  # decode one by one from here on, so that only the damaged episodes fail
            self._load(first)

    def _decode(self, first: int, last: int) -> NDArray[Any]:
        for chunk in self._chunks(first, last):
            self._check_stored(chunk)
        try:
            return np.asarray(self.array[first * self._chunk[0] : last * self._chunk[0]])
        except Exception as error:  # every codec has its own exceptions; find the damaged chunk
            for chunk in self._chunks(first, last):
                self._decode_alone(chunk)
            raise ValueError(f"array {self.name!r} cannot be decoded ({error})") from error

    def _chunks(self, first: int, last: int) -> Iterator[tuple[int, ...]]:
        return product(range(first, last), *map(range, self._grid[1:]))

    def _decode_alone(self, chunk: tuple[int, ...]) -> None:
        try:
            self.array[self._region(chunk)]
        except Exception as error:
            raise ValueError(f"chunk {self._file(chunk)!r} is damaged ({error})") from error

    def _check_stored(self, chunk: tuple[int, ...]) -> None:
        file = self._file(chunk)
        if file not in self._store:
            self._check_left_out(chunk, file)
        elif self._codec:
            try:
                content = self._store.read(file)
            except Exception as error:  # an error of the zip or of the disk
                raise ValueError(f"chunk {file!r} cannot be read ({error})") from error
            # zarr does not compare the sizes that codecs state with those of the file and of the chunk.
            decoded, size = SIZES.get(self._codec, lambda content: (None, len(content)))(content)
            is_whole = size == len(content) and self._allows(decoded)
            if not is_whole or grows_beyond(self._codec, content, 16 * self._chunk_bytes):
                raise ValueError(f"chunk {file!r} is damaged: it is cut short or was changed")

    def _allows(self, decoded: int | None) -> bool:
        """Whether a chunk may decode to a number of bytes; None is unknown."""
        if decoded is None:
            return True
        # Filters change the size a little; nothing justifies a chunk that fills the memory.
        return decoded <= 16 * self._chunk_bytes if self._has_filters else decoded == self._chunk_bytes

    def _check_left_out(self, chunk: tuple[int, ...], file: str) -> None:
        """Refuse a lost chunk, but accept one that was left out because it holds nothing but the fill value.

        The store does not distinguish them. zarr 3 does not write a chunk that holds nothing but the fill value, and
        the rows next to such a chunk mostly hold the fill value too; the rows next to a lost chunk hold data. If a
        column of several chunks is missing as a whole, it was left out, because an interrupted copy does not lose
        exactly those chunks.
        """
        row, *columns = chunk
        first, last, is_left_out = self._gaps.get(tuple(columns), (-1, -1, False))
        if not first <= row <= last:
            first, last = row, row
            while first > 0 and self._file((first - 1, *columns)) not in self._store:
                first -= 1
            while last < self._grid[0] - 1 and self._file((last + 1, *columns)) not in self._store:
                last += 1
            size = self._chunk[0]
            beside = [row for row in (first * size - 1, (last + 1) * size) if 0 <= row < len(self)]
            is_left_out = all(self._is_fill(row, chunk) for row in beside) if beside else self._grid[0] > 1
            self._gaps[tuple(columns)] = first, last, is_left_out
        if not is_left_out:
            raise ValueError(
                f"chunk {file!r} is missing: copy the dataset again; if its values really are all"
                f" {self.array.fill_value}, write the array again with write_empty_chunks=True"
            )
        self.warn_left_out(f"not every chunk of {self.name!r} (such as {file!r})")

    def _is_fill(self, row: int, chunk: tuple[int, ...]) -> bool:
        """Whether a row holds nothing but the fill value in a chunk's columns."""
        try:
            return bool((self.array[(row, *self._region(chunk)[1:])] == self.array.fill_value).all())
        except Exception:  # the row's own chunk is damaged
            return False

    def _region(self, chunk: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(
            slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(chunk, self._chunk, self._shape, strict=True)
        )

    def _file(self, chunk: tuple[int, ...]) -> str:
        if hasattr(self.array, "metadata"):
            return f"{self.name}/{self.array.metadata.encode_chunk_key(chunk)}"
        return f"{self.name}/{self.array._chunk_key(chunk).rsplit(self.name + '/', 1)[1]}"  # zarr 2
