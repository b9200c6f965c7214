"""Files of torch.save, read as data: nothing that a file names is imported, looked up or called."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from struct import error as StructError
from struct import unpack
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import crc32

import torch

from policy.adapters.inert_pickle import Opaque, check_size, quoted, read_pickle
from policy.adapters.saved_config import config_values, is_config
from policy.checkpoint.files import refusing

# Limits far above real files: a tensor takes some 300 bytes of the pickle and 100 of the list of members.
MOST_PICKLE_BYTES = 8 * 2**20
MOST_DIRECTORY_BYTES = 2 * 2**20
MOST_DIMENSIONS = 16
PIECE = 2**20

_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
    )
}
_STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
    "torch.storage.UntypedStorage": torch.uint8,
}
# Data of torch that is no tensor with numbers of its own, such as a sparse one; it becomes an `Opaque`.
_OTHER_DATA = {
    *("torch.Generator", "torch.Tensor", "torch.device", "torch.serialization._get_layout"),
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_nested_tensor"),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch._tensor._rebuild_from_type_v2"),
}
_ADVICE = "use a copy from a source that you trust"
# The first bytes of what torch.save wrote before version 1.6: a pickled number.
_BEFORE_1_6 = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors, in a file.

    Attributes:
        path: the file.
        identity: what tells the file from another one that takes its place.
        start: where in the file they begin, in bytes.
        checksum: their CRC-32; 0 if it was not noted.
        dtype: their type.
        count: how many there are.
    """

    path: Path
    identity: tuple[int, ...]
    start: int
    checksum: int
    dtype: torch.dtype
    count: int

    def read(self) -> torch.Tensor:
        """Read the numbers.

        Returns:
            shape (count,).

        Raises:
            ValueError: they are damaged, or the file was replaced meanwhile.
        """
        with _reading(self.path), self.path.open("rb") as file:
            if _identity(file) != self.identity:
                raise ValueError("it was replaced while it was read")
            numbers = torch.empty(self.count * self.dtype.itemsize, dtype=torch.uint8)
            _read_into(numbers.numpy().data, file, self.start, self.checksum)
        # A byte that is neither 0 nor 1 would be a third truth value.
        return numbers.ne(0) if self.dtype == torch.bool else numbers.view(self.dtype)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has not been read: a view of a storage, known to lie within it.

    Attributes:
        storage: its numbers.
        offset: the index of its first number.
        shape: its shape.
        strides: its strides, in numbers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: Path) -> Any:
    """Read what a file of torch.save holds, also one saved with dill, without running anything in it.

    A link to a file is followed. No tensor is read here: `plain` reads those that a caller wants, so that an
    optimizer's take no memory. See `read_pickle` for what becomes of names in the file: data of known packages, and
    everything of unknown ones, becomes an inert `Opaque`; a file that names code of the standard library, NumPy, torch
    or dill is refused. Whether what a caller needs is there, and not an `Opaque`, is for the caller to check.

    Args:
        path: the file, in the zip format of torch 1.6 and newer.

    Returns:
        Containers, text, numbers, bytes, `StoredTensor`s and `Opaque`s. A parameter is its tensor.

    Raises:
        ValueError: the file is missing, of another kind, damaged, too large, or would run code elsewhere.
    """
    with _reading(path):
        _check_kind(path)
    with _reading(path), _CarefulFile(path) as file, ZipFile(file) as archive:
        members = _members(archive, file)
        prefix = _prefix(members)
        # Versions of torch that do not note the byte order knew little-endian machines only.
        if (name := f"{prefix}/byteorder") in members and _content(file, members[name], 16) != b"little":
            raise ValueError("its numbers are not stored in little-endian byte order")
        data = _content(file, members[f"{prefix}/data.pkl"], MOST_PICKLE_BYTES)
        storages = _Storages(path, file, members, prefix)
        return read_pickle(data, _REBUILD, _NAMES, storages.find)


def plain(value: Any) -> Any:
    """Turn what `read_torch_file` returned, or a part of it, into what the rest of the program works with.

    Args:
        value: stored tensors are read, and share memory where they do in the file; OmegaConf's containers become dicts,
            lists and values, their interpolations resolved. Other `Opaque`s stay.

    Returns:
        Containers, text, numbers, bytes, tensors, and the `Opaque`s that are none of these.

    Raises:
        ValueError: a tensor is damaged, the file was replaced meanwhile, or a configuration does not fit its format.
    """
    check_size(value)
    return _plain(value, {})


def _plain(value: Any, storages: dict[Storage, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child, storages) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(child, storages) for child in value)
    if isinstance(value, StoredTensor):
        if value.storage not in storages:
            storages[value.storage] = value.storage.read()
        return storages[value.storage].as_strided(value.shape, value.strides, value.offset)
    return _config(value) if is_config(value) else value


def _config(value: Opaque) -> Any:
    try:
        return config_values(value)
    except ValueError as error:
        raise ValueError(f"the configuration in the file cannot be read: {error}; {_ADVICE}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Complete a clause that says what is wrong with a file to a sentence."""
    try:
        with refusing(path):
            yield
    except (ValueError, BadZipFile, NotImplementedError, StructError, EOFError) as error:
        reason = " ".join(str(error).split())
        if reason.startswith(f"{path} "):
            raise
        if not isinstance(error, ValueError):
            reason = f"it is damaged ({reason[:100]})"
        raise ValueError(f"{path} cannot be read as a file of torch.save: {reason}; {_ADVICE}") from error


def _check_kind(path: Path) -> None:
    """Reject what is not a zip file, and say what it is."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of torch.save in it, such as latest.ckpt")
    if not path.is_file():  # such as a pipe or a device, which could block
        raise ValueError(f"{path} does not exist, or is not a file: give the path of a file of torch.save")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise ValueError(f"{path} is empty: {_ADVICE}")
    if start.startswith(_BEFORE_1_6):
        raise ValueError(
            f"{path} was written by torch before version 1.6: if you trust it, load it with torch and save it again"
        )
    if not start.startswith(b"PK"):
        kind = "a pickle" if start.startswith(b"\x80") else "neither a zip file nor a pickle"
        kind = "a safetensors file" if start[8:9] == b"{" else kind
        raise ValueError(f"{path} is not a file of torch.save but {kind}: give the path of a file of torch.save")


class _CarefulFile(io.FileIO):
    """A file that refuses to be read in large pieces, as zipfile would read a list of members of any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        # Some few bytes from the end are read without a size, to find the list of members.
        if size is not None and size > MOST_DIRECTORY_BYTES:
            raise ValueError(f"its list of members has more than {MOST_DIRECTORY_BYTES} bytes")
        return super().read(size) or b""


def _identity(file: io.IOBase) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _members(archive: ZipFile, file: io.FileIO) -> dict[str, ZipInfo]:
    """The members by name, if torch.save could have written them."""
    if any("/code/" in name for name in archive.namelist()):
        raise ValueError("it is a TorchScript program, and not data")
    members: dict[str, ZipInfo] = {}
    size = _identity(file)[2]
    for info in archive.infolist():
        name = info.orig_filename
        said = quoted(name)
        if name in members:
            raise ValueError(f"it holds {said} twice")
        if "\\" in name or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"it holds a file whose name, {said}, leads out of it")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"it holds {said}, which is a link or something else that is not a file")
        if info.compress_type or info.flag_bits & 1:
            raise ValueError(f"it holds {said} compressed or encrypted, which torch.save does not do")
        if info.file_size != info.compress_size or info.header_offset + info.file_size > size:
            raise ValueError(f"it is damaged ({said} lies outside the file)")
        members[name] = info
    # Members that lie in one another could be read again and again.
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("it holds more than its size")
    return members


def _prefix(members: dict[str, ZipInfo]) -> str:
    """The folder in the archive that everything lies in."""
    prefixes = {name.split("/")[0] for name in members}
    (prefix,) = prefixes if len(prefixes) == 1 else ("",)
    if f"{prefix}/data.pkl" not in members:
        raise ValueError("it is a zip file of another kind, without data.pkl in its only folder")
    return prefix


def _start(file: io.FileIO, info: ZipInfo) -> int:
    """Where a member's content begins."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"it is damaged ({quoted(info.filename)} has no header)")
    name_size, extra_size = unpack("<HH", header[26:])
    start: int = info.header_offset + 30 + name_size + extra_size
    if start + info.file_size > _identity(file)[2]:
        raise ValueError(f"it is damaged ({quoted(info.filename)} lies outside the file)")
    return start


def _content(file: io.FileIO, info: ZipInfo, most: int) -> bytes:
    if info.file_size > most:
        raise ValueError(f"its {quoted(info.filename)} has {info.file_size} bytes, more than {most}")
    content = bytearray(info.file_size)
    _read_into(memoryview(content), file, _start(file, info), info.CRC)
    return bytes(content)


def _read_into(rest: memoryview, file: io.FileIO | io.BufferedReader, start: int, noted: int) -> None:
    file.seek(start)
    checksum = 0
    while rest and (size := file.readinto(rest[:PIECE])):
        checksum, rest = crc32(rest[:size], checksum), rest[size:]
    # torch can save without checksums; it then notes 0.
    if rest or noted not in (0, checksum):
        raise ValueError("it is damaged (a part of it does not fit its checksum)")


class _Storages:
    """The storages of a file that is open."""

    def __init__(self, path: Path, file: io.FileIO, members: dict[str, ZipInfo], prefix: str) -> None:
        self.path = path
        self.file = file
        self.members = members
        self.prefix = prefix
        self.identity = _identity(file)

    def find(self, reference: Any) -> Storage:
        """The storage that a persistent id of torch.save refers to."""
        match reference:
            case ("storage", Opaque(args=None, name=kind), str(key), str(), int(count)) if kind in _STORAGES:
                dtype = _STORAGES[kind]
            case _:
                raise ValueError("it refers to numbers in an unknown way")
        # Keys are short numbers; a long one is not put together, as it could be the same one again and again.
        info = self.members.get(f"{self.prefix}/data/{key}") if len(key) <= 20 else None
        if info is None:
            raise ValueError(f"it is damaged (the numbers {quoted(key)} are missing)")
        if count < 0 or count * dtype.itemsize != info.file_size:
            raise ValueError(f"it is damaged (the numbers {quoted(key)} have another size than they should)")
        return Storage(self.path, self.identity, _start(self.file, info), info.CRC, dtype, count)


def _tensor(*args: Any) -> StoredTensor:
    """What `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2` make."""
    match args:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides)):
            return _view(storage, offset, shape, strides)
        # Gradients and hooks are of no interest. Metadata says that the numbers are to be negated or conjugated.
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *metadata) if not any(metadata):
            return _view(storage, offset, shape, strides)
    raise ValueError("it describes a tensor in an unknown way")


def _tensor_of_dtype(*args: Any) -> StoredTensor:
    """What `torch._utils._rebuild_tensor_v3` makes: the dtype is the tensor's, and the storage has bytes only."""
    match args:
        case (
            Storage(dtype=torch.uint8) as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            _,
            _,
            Opaque(name=name),
        ):
            dtype = _DTYPES.get(name)
            if dtype is not None and storage.count % dtype.itemsize == 0:
                storage = replace(storage, dtype=dtype, count=storage.count // dtype.itemsize)
                return _view(storage, offset, shape, strides)
    raise ValueError("it describes a tensor in an unknown way")


def _parameter(*args: Any) -> StoredTensor:
    """What `torch._utils._rebuild_parameter` makes, with or without attributes."""
    if args and isinstance(args[0], StoredTensor):
        return args[0]
    raise ValueError("it describes a parameter in an unknown way")


def _view(storage: Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> StoredTensor:
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise ValueError("it describes a tensor in an unknown way")
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in (offset, *shape, *strides)):
        raise ValueError("it holds a tensor with a negative or too large size, stride or offset")
    # A stride along which there is one number means nothing, and sizes beside a zero must not be too large either.
    strides = tuple(stride if size > 1 else 1 for size, stride in zip(shape, strides, strict=True))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    count = prod(size for size in shape if size)
    # A tensor that repeats its numbers could be larger than the file by any factor.
    if prod(shape) and not (last < storage.count and count <= storage.count):
        raise ValueError("it holds a tensor that reaches beyond its numbers")
    if not prod(shape):
        if count > 2**31:
            raise ValueError("it holds an empty tensor with too large sizes")
        return StoredTensor(storage, 0, shape, tuple(1 for _ in shape))
    return StoredTensor(storage, offset, shape, strides)


_REBUILD: dict[str, Any] = {
    "torch.Size": lambda *sizes: sizes[0] if sizes else (),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
}
_NAMES = frozenset({*_DTYPES, *_STORAGES, *_OTHER_DATA})
