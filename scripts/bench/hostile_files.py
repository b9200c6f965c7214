"""Files that attack whoever reads a checkpoint, by kind; each writes itself to a path.

Files with code make a folder, `marker`, if their code runs. Files that are too large exceed the reader's limits, or
those divided by `scale`.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

Write = Callable[[Path, Path], None]

NUMBERS = struct.pack("<6f", *range(6))


def text(value: str) -> bytes:
    """The operations of a pickle that push a text."""
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """The operations that push an integer."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def numbers(values: Sequence[int]) -> bytes:
    """The operations that push a tuple of integers."""
    return pickle.MARK + b"".join(number(value) for value in values) + pickle.TUPLE


def name(module: str, qualified: str) -> bytes:
    """The operation that pushes something by its name."""
    return pickle.GLOBAL + f"{module}\n{qualified}\n".encode()


def storage(kind: str = "FloatStorage", key: str = "0", count: bytes = number(6)) -> bytes:
    """The operations that push the numbers of a tensor."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), count)
    return pickle.MARK + b"".join(parts) + pickle.TUPLE + pickle.BINPERSID


def tensor(
    numbers_of: bytes = storage(), offset: int = 0, shape: Sequence[int] = (2, 3), strides: Sequence[int] = (3, 1)
) -> bytes:
    """The operations that push a tensor."""
    hooks = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = (numbers_of, number(offset), numbers(shape), numbers(strides), pickle.NEWFALSE, hooks)
    return name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + b"".join(parts) + pickle.TUPLE + pickle.REDUCE


def pickled(operations: bytes) -> bytes:
    """A pickle of what the operations push."""
    return pickle.PROTO + b"\2" + operations + pickle.STOP


def weights(operations: bytes) -> bytes:
    """The pickle of a checkpoint whose weights hold what the operations push."""
    inner = pickle.EMPTY_DICT + text("model") + pickle.EMPTY_DICT + text("weight") + operations + pickle.SETITEM * 2
    return pickled(pickle.EMPTY_DICT + text("state_dicts") + inner + pickle.SETITEM)


def archive(members: Mapping[str, bytes], method: int = ZIP_STORED, prefix: str = "archive/") -> bytes:
    """A zip file."""
    made = io.BytesIO()
    with ZipFile(made, "w", method) as file:
        for member, data in members.items():
            file.writestr(ZipInfo(f"{prefix}{member}"), data, compress_type=method)
    return made.getvalue()


def checkpoint(data: bytes | None = None, **members: bytes) -> bytes:
    """A file as torch.save writes it, with a tensor of six numbers unless `data` is another pickle."""
    pickle_data = weights(tensor()) if data is None else data
    return archive({"data.pkl": pickle_data, "byteorder": b"little", "data/0": NUMBERS, "version": b"3\n", **members})


def code(marker: Path) -> dict[str, bytes]:
    """Operations that call or set something, by kind."""
    makes, where = name("os", "mkdir"), text(str(marker))
    argument = where + pickle.TUPLE1
    state = pickle.EMPTY_DICT + text("__defaults__") + argument + pickle.SETITEM
    new_class = pickle.EMPTY_DICT + text("__class__") + makes + pickle.SETITEM
    own = name("mine", "Thing") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    dotted = text("pathlib") + text("Path.mkdir") + pickle.STACK_GLOBAL
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return {
        "GLOBAL, REDUCE": makes + argument + pickle.REDUCE,
        "GLOBAL of protocol 2, REDUCE": name("__builtin__", "eval") + text("1") + pickle.TUPLE1 + pickle.REDUCE,
        "STACK_GLOBAL, REDUCE": text("os") + text("mkdir") + pickle.STACK_GLOBAL + argument + pickle.REDUCE,
        "STACK_GLOBAL, a dotted name": dotted + argument + pickle.REDUCE,
        "STACK_GLOBAL, no text": number(1) + number(2) + pickle.STACK_GLOBAL,
        "INST": pickle.MARK + where + pickle.INST + b"os\nmkdir\n",
        "OBJ": pickle.MARK + makes + where + pickle.OBJ,
        "NEWOBJ": name("subprocess", "Popen") + argument + pickle.NEWOBJ,
        "NEWOBJ_EX": name("subprocess", "Popen") + argument + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
        "getattr, REDUCE": name("builtins", "getattr") + makes + text("__call__") + pickle.TUPLE2 + pickle.REDUCE,
        "code of dill": name("dill._dill", "_eval_repr") + argument + pickle.REDUCE,
        "code of torch": name("torch.hub", "load") + argument + pickle.REDUCE,
        "a call of what a call made": own + argument + pickle.REDUCE,
        "a call of a number": number(1) + argument + pickle.REDUCE,
        "a call without a tuple": name("mine", "Thing") + where + pickle.REDUCE,
        "BUILD on a function, __defaults__": rebuild + state + pickle.BUILD,
        "BUILD on a class, slots": name("mine", "Thing") + pickle.NONE + state + pickle.TUPLE2 + pickle.BUILD,
        "BUILD, __class__": own + new_class + pickle.BUILD,
        "BUILD on a tensor": tensor() + state + pickle.BUILD,
        "BUILD on a number": number(1) + state + pickle.BUILD,
        "EXT1": pickle.EXT1 + b"\1",
        "EXT2": pickle.EXT2 + b"\1\0",
        "EXT4": pickle.EXT4 + b"\1\0\0\0",
        "PERSID": pickle.PERSID + b"0\n",
        "NEXT_BUFFER": pickle.NEXT_BUFFER,
        "READONLY_BUFFER": number(1) + pickle.READONLY_BUFFER,
        "an unknown operation": b"\xff",
    }


def _lies() -> dict[str, bytes]:
    """Operations that push tensors which are not what the file holds."""
    return {
        "BINPERSID, a text": text("storage") + pickle.BINPERSID,
        "BINPERSID, a short tuple": text("storage") + pickle.TUPLE1 + pickle.BINPERSID,
        "BINPERSID, code as a type": storage().replace(name("torch", "FloatStorage"), name("os", "mkdir")),
        "BINPERSID, a text as a type": storage().replace(name("torch", "FloatStorage"), text("FloatStorage")),
        "a storage of an unknown type": tensor(storage("QInt8Storage")),
        "a storage of another type": tensor(storage("DoubleStorage")),
        "a storage with more numbers": tensor(storage(count=number(7))),
        "a storage with fewer numbers": tensor(storage(count=number(5))),
        "a storage with 2**61 numbers": tensor(storage(count=number(2**61))),
        "a storage with fewer than no numbers": tensor(storage(count=number(-6))),
        "a storage with no number of numbers": tensor(storage(count=text("6"))),
        "a storage that is not there": tensor(storage(key="1")),
        "a storage outside data/": tensor(storage(key="../version")),
        "a view that ends outside": tensor(shape=(2, 4)),
        "a view that begins outside": tensor(offset=6, shape=(1,), strides=(1,)),
        "a negative stride": tensor(strides=(-3, 1)),
        "a negative offset": tensor(offset=-1),
        "a negative size": tensor(shape=(-2, 3)),
        "a size that overflows": tensor(shape=(2**62, 2**62), strides=(0, 0)),
        "a size that is a gigantic number": tensor(shape=(2**1000,), strides=(1,)),
        "an empty tensor that overflows": tensor(shape=(2**62, 2**62, 0), strides=(1, 1, 1)),
        "a tensor that repeats a number 2**40 times": tensor(shape=(2**40,), strides=(0,)),
        "a tensor with more strides than sizes": tensor(shape=(6,)),
        "a tensor with 100 dimensions": tensor(shape=(1,) * 100, strides=(1,) * 100),
        "a tensor without numbers": tensor(number(0)),
        "a tensor without arguments": name("torch._utils", "_rebuild_tensor_v2") + pickle.EMPTY_TUPLE + pickle.REDUCE,
        "a parameter of a number": name("torch._utils", "_rebuild_parameter") + numbers((1,)) + pickle.REDUCE,
    }


def _bombs(scale: int) -> dict[str, bytes]:
    """Operations that make something too large, too deep, or too much."""
    many = 600_000 // scale
    pushed = text("x" * (2**20 // scale)) + pickle.BINPUT + b"\0" + pickle.POP
    circle = pickle.EMPTY_DICT + pickle.BINPUT + b"\0" + text("x") + pickle.BINGET + b"\0" + pickle.SETITEM
    encoded = name("_codecs", "encode") + pickle.BINGET + b"\0" + text("latin1") + pickle.TUPLE2 + pickle.REDUCE
    long = pickle.MARK + pickle.NONE * (many // 3) + pickle.TUPLE + pickle.BINPUT + b"\0" + pickle.POP
    called = name("mine", "Thing") + pickle.BINGET + b"\0"
    key = name("torch", "FloatStorage") + pickle.BINGET + b"\0" + text("cpu") + number(6)
    persistent = pickle.MARK + text("storage") + key + pickle.TUPLE + pickle.BINPERSID + pickle.POP
    return {
        "a long tuple as arguments, again and again": long + (called + pickle.REDUCE + pickle.POP) * (many // 10),
        "a long name of numbers, again and again": pushed + persistent * (many // 20),
        "nested tuples": pickle.NONE + pickle.TUPLE1 * (many // 2),
        "nested lists": pickle.EMPTY_LIST * (many // 4) + pickle.APPEND * (many // 4 - 1),
        "a list in itself": pickle.EMPTY_LIST + pickle.DUP + pickle.APPEND,
        "a dictionary in itself": circle,
        "a tuple of itself twice, 60 times": pickle.NONE + pickle.TUPLE1 + (pickle.DUP + pickle.TUPLE2) * 60,
        "many values": pickle.MARK + pickle.NONE * many + pickle.LIST,
        "many marks": pickle.MARK * many,
        "many dictionaries": pickle.EMPTY_DICT * many,
        "many memo entries": pickle.NONE + pickle.MEMOIZE * many,
        "the memo entry 2**31": pickle.LONG_BINGET + struct.pack("<I", 2**31),
        "the memo entry -1": pickle.GET + b"-1\n",
        "LONG4, 2**31 bytes": pickle.LONG4 + struct.pack("<i", 2**31 - 1),
        "LONG4, fewer than no bytes": pickle.LONG4 + struct.pack("<i", -1),
        "LONG, 100,000 digits": pickle.LONG + b"9" * 100_000 + b"L\n",
        "BINUNICODE8, 2**62 bytes": pickle.BINUNICODE8 + struct.pack("<Q", 2**62),
        "BINBYTES8, 2**62 bytes": pickle.BINBYTES8 + struct.pack("<Q", 2**62),
        "BYTEARRAY8, 2**64 - 1 bytes": pickle.BYTEARRAY8 + struct.pack("<Q", 2**64 - 1),
        "FRAME, 2**62 bytes": pickle.FRAME + struct.pack("<Q", 2**62) + pickle.NONE,
        "text that is encoded again and again": pushed + (encoded + pickle.POP) * 10_000,
        "a name of 10,000 characters": name("mine", "x" * 10_000),
        "a list as a key": pickle.EMPTY_DICT + pickle.EMPTY_LIST + pickle.NONE + pickle.SETITEM,
        "a key of 80 bytes": pickle.EMPTY_DICT + number(2**639) + pickle.NONE + pickle.SETITEM,
        "POP of nothing": pickle.POP * 100,
        "TUPLE without a mark": pickle.TUPLE,
        "SETITEMS with a key too much": pickle.EMPTY_DICT + pickle.MARK + text("x") + pickle.SETITEMS,
        "APPEND to a number": number(1) + pickle.NONE + pickle.APPEND,
    }


def _node(kind: str, attribute: str, content: bytes) -> bytes:
    """The operations that push a node of OmegaConf."""
    state = pickle.EMPTY_DICT + text(attribute) + content + pickle.SETITEM
    module = "nodes" if kind == "AnyNode" else kind.lower()
    return name(f"omegaconf.{module}", kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def _config(values: Mapping[str, str]) -> bytes:
    """The operations that push a configuration of texts."""
    items = b"".join(
        text(key) + _node("AnyNode", "_val", text(value)) + pickle.SETITEM for key, value in values.items()
    )
    return _node("DictConfig", "_content", pickle.EMPTY_DICT + items)


def _configs(scale: int) -> dict[str, bytes]:
    """Operations that push configurations which are damaged, or grow."""
    many = 20_000 // scale
    doubling = {f"x{i}": f"${{x{i + 1}}}${{x{i + 1}}}" for i in range(60)}
    return {
        "a configuration that refers to itself": _config({"a": "${b}", "b": "${a}"}),
        "a path through what refers to itself": _config({"a": "${b.y}", "b": "${a}"}),
        "a path through a circle": _config({"c": "${a.x}", "a": "${b}", "b": "${a}"}),
        "a configuration that doubles 60 times": _config(doubling | {"x60": "x"}),
        "a configuration of long texts": _config({f"x{i}": "${y}${y}" for i in range(many)} | {"y": "x" * 4000}),
        "a configuration of long paths": _config({f"x{i}": "${y.y.y.y}" for i in range(many)} | {"y": "${y.y}"}),
        "a configuration without content": _node("DictConfig", "_metadata", pickle.NONE),
    }


def _archives(scale: int) -> dict[str, bytes]:
    """Zip files that torch.save does not write."""
    good = checkpoint()
    directory = good.rindex(b"PK\1\2")
    record = good.index(NUMBERS)
    return {
        "a compressed file": archive({"data.pkl": weights(tensor()), "data/0": NUMBERS}, ZIP_DEFLATED),
        "a deflate bomb of 100 MB": archive({"data.pkl": bytes(100 * 2**20 // scale), "data/0": NUMBERS}, ZIP_DEFLATED),
        "a pickle of 9 MB": checkpoint(weights(text("x" * (9 * 2**20 // scale)))),
        "40,000 members": archive(
            {"data.pkl": weights(tensor())} | {f"data/{key}": b"" for key in range(40_000 // scale)}
        ),
        "a member twice": _twice(),
        "an absolute name": archive({"archive/data.pkl": weights(tensor()), "/tmp/x": b""}, prefix=""),
        "a name with ..": archive({"data.pkl": weights(tensor()), "../../x": b""}),
        "a name with a backslash": archive({"data.pkl": weights(tensor()), "..\\x": b""}),
        "a link": _with_link(),
        "members that lie in one another": _overlapping(1000),
        "two folders": archive({"a/data.pkl": weights(tensor()), "b/data.pkl": weights(tensor())}, prefix=""),
        "an encrypted member": good[: directory + 8] + b"\1\0" + good[directory + 10 :],
        "a member of 4 GB": good[: directory + 20] + b"\xfe\xff\xff\xff" * 2 + good[directory + 28 :],
        "a member outside the file": good[: directory + 42] + b"\xff\xff\xff\x7f" + good[directory + 46 :],
        "numbers without a header": good[: record - 44] + b"XXXX" + good[record - 40 :],
        "numbers that were changed": good.replace(NUMBERS, NUMBERS[::-1]),
        "a pickle that was changed": good.replace(b"weight", b"weighs"),
        "cut off after half": good[: len(good) // 2],
        "cut off before the last byte": good[:-1],
        "without data.pkl": archive({"data/0": NUMBERS}),
        "without byte order and numbers": archive({"data.pkl": weights(tensor())}),
        "big-endian": checkpoint(byteorder=b"big"),
        "a byte order of 1 MB": checkpoint(byteorder=b"little" * 2**18),
        "TorchScript": checkpoint(**{"code/__torch__.py": b"", "constants.pkl": pickled(pickle.EMPTY_TUPLE)}),
    }


def _other_files() -> dict[str, bytes]:
    """Files of another kind."""
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "an empty file": b"",
        "text": b"weights\n",
        "a pickle": weights(pickle.NONE),
        "torch before 1.6": pickled(number(0x1950A86A20F9469CFC6C)) + pickled(number(1001)),
        "safetensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "the first bytes of a zip file": b"PK",
        "an empty zip file": b"PK\5\6" + bytes(18),
        "a pickle without an end": checkpoint(pickle.EMPTY_DICT),
        "an empty pickle": checkpoint(b""),
        "a pickle of nothing": checkpoint(pickle.STOP),
        "a pickle of protocol 200": checkpoint(pickle.PROTO + b"\xc8" + pickle.NONE + pickle.STOP),
    }


def _twice() -> bytes:
    made = archive({"data.pkl": weights(tensor()), "data/0": NUMBERS, "data/1": NUMBERS})
    return made.replace(b"archive/data/1", b"archive/data/0")


def _overlapping(count: int) -> bytes:
    """An archive with one large member that its list names many times."""
    names = [f"archive/data/{number:04}" for number in range(count)]
    made = io.BytesIO()
    with ZipFile(made, "w") as file:
        file.writestr(ZipInfo("archive/data.pkl"), weights(tensor()))
        file.writestr(ZipInfo(names[0]), bytes(10_000))
        first = file.getinfo(names[0])
        for again in names[1:]:
            info = copy.copy(first)
            info.filename = again
            file.filelist.append(info)
    return made.getvalue()


def _with_link() -> bytes:
    made = io.BytesIO(archive({"data.pkl": weights(tensor())}))
    with ZipFile(made, "a") as file:
        info = ZipInfo("archive/data/0")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/hostname")
    return made.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _writes(data: bytes) -> Write:
    return lambda path, marker: _write(path, data)


def _code(kind: str) -> Write:
    return lambda path, marker: _write(path, checkpoint(weights(code(marker)[kind])))


def _no_files() -> dict[str, Write]:
    return {
        "nothing": lambda path, marker: None,
        "a folder": lambda path, marker: path.mkdir(),
        "a pipe": lambda path, marker: os.mkfifo(path),
        "a link to a device": lambda path, marker: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path, marker: path.symlink_to(path),
    }


def hostile_files(scale: int = 1) -> dict[str, Write]:
    """How to write each kind of file."""
    inside = _lies() | _bombs(scale) | _configs(scale)
    whole = _archives(scale) | _other_files() | {kind: checkpoint(weights(made)) for kind, made in inside.items()}
    return {
        **{kind: _code(kind) for kind in code(Path())},
        **{kind: _writes(data) for kind, data in whole.items()},
        **_no_files(),
    }
