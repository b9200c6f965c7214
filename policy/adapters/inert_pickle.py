"""Reading a pickle as data: nothing that it names is imported, looked up or called.

A pickle is a program for a stack machine, and most of its operations only put data together. The few that call
something or set state make an `Opaque` here, which only remembers the name and what it was called with.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Limits far above real files: some 8000 tensors with 60 operations each, half of them memo entries.
MOST_OPERATIONS = 500_000
# How deep containers lie in each other, and the values in them, a container counted as often as it is referred to.
MOST_LEVELS = 100
MOST_VALUES = 300_000
MOST_NAME = 200
MOST_ARGUMENTS = 100

Rebuild = Callable[..., Any]

# Integers up to here hash to themselves, so that a file cannot choose keys that all collide.
_LARGEST_KEY = sys.hash_info.modulus

# Packages whose data is known. Any other name of theirs in a pickle is there to be called.
_KNOWN_PACKAGES = sys.stdlib_module_names | {
    *("__builtin__", "copy_reg", "commands", "popen2"),  # modules of Python 2
    *("cloudpickle", "dill", "numpy", "torch"),
}
_DATA_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple"
        " unicode xrange",
        "collections": "Counter OrderedDict defaultdict deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "argparse": "Namespace",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "types": "SimpleNamespace",
        "typing": "Any Dict List Optional Tuple Union",
        "uuid": "UUID",
        "_codecs": "encode",
        "dill._dill": "_create_array _load_type",
        "numpy": "bool_ dtype float16 float32 float64 int16 int32 int64 int8 ndarray uint8",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
    }.items()
    for name in names.split()
)
# What dill's name for a type of Python itself is called with.
_TYPES_OF_DILL = [(name.removeprefix("builtins."),) for name in _DATA_NAMES if name.startswith("builtins.")]
_DATA_MODULES = ("numpy.dtypes", "numpy.random", "torch.nn.modules", "torch.nn.parameter", "torch.optim")
_MODULES_OF_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Opaque:
    """Something in a pickle that is neither a number, text nor a container: its description, and nothing that acts.

    Attributes:
        name: module and name, as the file has them.
        args: what it was called with; None if it was only named.
        state: the state it was given, None without.
        items: what was appended to it, or (key, value) pairs that were set in it.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.name}>"


def read_pickle(
    data: bytes, rebuild: Mapping[str, Rebuild], names: frozenset[str] = frozenset(), persistent: Rebuild | None = None
) -> Any:
    """Read a pickle of protocol 0 to 5.

    Names fall into three kinds, none of which is ever looked up. Those in `rebuild`, and the containers of the standard
    library, are put together by our own code. Data of known packages, and everything of unknown packages, becomes an
    `Opaque`. Other names of the standard library, NumPy, torch and dill belong to no data: such a file would run code
    where it is loaded in the ordinary way, so it is refused, although nothing would run here.

    Args:
        data: the pickle; the caller bounds its size.
        rebuild: functions of our own by the name that the file calls, given its arguments.
        names: further names that are data.
        persistent: turns a persistent id into an object; without it they are refused.

    Returns:
        What it holds: containers, text, numbers, bytes, `Opaque`s, and what `rebuild` and `persistent` return.
        OrderedDict and defaultdict are dicts, sets are lists or tuples, and a tuple as a key of a dict is an `Opaque`.

    Raises:
        ValueError: it is damaged, too large, nested too deep, or names something that is not data. The message is a
            clause, to be completed with the file's name.
    """
    machine = _Machine(len(data), {**_CONTAINERS, **rebuild}, names, persistent)
    content = machine.run(data)
    check_size(content)
    return content


def check_size(content: Any) -> None:
    """Reject containers that lie in each other in a circle, too deep, or so often that nobody can walk through them.

    Raises:
        ValueError: they do.
    """
    left = MOST_VALUES
    todo = [(content, 1)] if isinstance(content, dict | list | tuple) else []
    while todo:
        value, level = todo.pop()
        if level > MOST_LEVELS:
            raise ValueError(f"its containers are nested more than {MOST_LEVELS} deep, or in a circle")
        left -= len(value)
        if left < 0:
            raise ValueError(f"its containers hold more than {MOST_VALUES} values")
        children = value.values() if isinstance(value, dict) else value
        todo += [(child, level + 1) for child in children if isinstance(child, dict | list | tuple)]


def quoted(text: str) -> str:
    """Text from a file, short and on one line."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _full_name(module: Any, name: Any, data_names: frozenset[str]) -> str:
    """The full name of what a file names, if that is data.

    Raises:
        ValueError: it is not a name, or it belongs to no data.
    """
    if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > MOST_NAME:
        raise ValueError("it names something by a name that cannot be one")
    module = _MODULES_OF_PYTHON_2.get(module, module)
    full = f"{module}.{name}"
    is_data = (
        full in data_names
        or module.split(".")[0] not in _KNOWN_PACKAGES
        or ("." not in name and any(f"{module}.".startswith(f"{known}.") for known in _DATA_MODULES))
    )
    if not is_data:
        raise ValueError(
            f"it names {quoted(full)}, which is code and not data, so that it could run programs where it is loaded"
        )
    return full


class _Machine:
    """The stack machine that a pickle is written for."""

    def __init__(
        self, size: int, rebuild: Mapping[str, Rebuild], names: frozenset[str], persistent: Rebuild | None
    ) -> None:
        self.size = size
        # Bytes that calls may make out of text; the text is in the pickle, but can be referred to again and again.
        self.left_to_encode = size
        self.rebuild = rebuild
        self.data_names = _DATA_NAMES | names | rebuild.keys()
        self.persistent = persistent
        self.stack: list[Any] = []
        self.stacks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Opaque] = {}

    def run(self, data: bytes) -> Any:
        for number, (operation, argument, _) in enumerate(_operations(data)):
            if number >= MOST_OPERATIONS:
                raise ValueError(f"its pickle has more than {MOST_OPERATIONS} operations")
            if operation.name in _VALUES:
                self.push(argument)
            elif operation.name in _OPERATIONS:
                _OPERATIONS[operation.name](self, argument)
            else:
                raise ValueError(f"its pickle holds the operation {operation.name}, which torch.save does not write")
        return self.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle is damaged (an operation without an operand)")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.stacks:
            raise ValueError("its pickle is damaged (a mark is missing)")
        values, self.stack = self.stack, self.stacks.pop()
        return values

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def check_frame(self, size: int) -> None:
        if size > self.size:
            raise ValueError("its pickle is damaged (a frame larger than the pickle)")

    def mark(self) -> None:
        self.stacks.append(self.stack)
        self.stack = []

    def take(self, count: int) -> None:
        """Make a tuple of the last `count` values."""
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("its pickle is damaged (it refers to a value that it does not hold)")
        self.push(self.memo[index])

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif _is_made(target):
            target.items.extend(values)
        else:
            raise ValueError("its pickle is damaged (it appends to what is not a list)")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2 or not (isinstance(target, dict) or _is_made(target)):
            raise ValueError("its pickle is damaged (it sets items of what is not a dictionary)")
        pairs = [(_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True)]
        if isinstance(target, dict):
            target.update(pairs)
        else:
            target.items.extend(pairs)

    def make_dict(self) -> None:
        values = self.pop_to_mark()
        self.push({})
        self.set_items(values)

    def name(self, text: str) -> None:
        module, name = text.split(" ", 1)
        self.stack += [module, name]
        self.name_from_stack()

    def name_from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        full = _full_name(module, name, self.data_names)
        self.push(self.names.setdefault(full, Opaque(full)))

    def call(self, args: Any, callee: Any) -> None:
        if not (isinstance(callee, Opaque) and callee.args is None and isinstance(args, tuple)):
            raise ValueError("its pickle is damaged (it calls what is not a name)")
        if len(args) > MOST_ARGUMENTS:  # they are copied, and could be the same long tuple each time
            raise ValueError(f"its pickle calls something with more than {MOST_ARGUMENTS} arguments")
        if callee.name == "_codecs.encode":
            # The way that Python 3 writes bytes for older protocols.
            self.push(self.encode(*args))
        elif callee.name == "copyreg._reconstructor" and args:
            self.call((), args[0])
        elif callee.name == "dill._dill._load_type" and args in _TYPES_OF_DILL:
            self.push(Opaque(f"builtins.{args[0]}"))
        elif callee.name in self.rebuild:
            self.push(self.rebuild[callee.name](*args))
        else:
            self.push(Opaque(callee.name, args))

    def call_marked(self) -> None:
        callee, *args = self.pop_to_mark() or [None]
        self.call(tuple(args), callee)

    def call_named(self, text: str) -> None:
        args = tuple(self.pop_to_mark())
        self.name(text)
        self.call(args, self.pop())

    def call_with_keywords(self) -> None:
        keywords, args, callee = self.pop(), self.pop(), self.pop()
        self.call((args, keywords), callee)

    def encode(self, text: Any = None, encoding: Any = None, *rest: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1" or rest:
            raise ValueError("its pickle holds bytes in an unknown encoding")
        self.left_to_encode -= len(text)
        if self.left_to_encode < 0:
            raise ValueError("its pickle makes more bytes than it holds")
        return text.encode("latin1")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if _is_made(target):
            target.state = state
        elif not isinstance(target, dict | list):  # attributes of an OrderedDict are of no interest
            raise ValueError("its pickle sets the state of what has none")

    def find_persistent(self) -> None:
        if self.persistent is None:
            raise ValueError("its pickle refers to data outside itself")
        self.push(self.persistent(self.pop()))


def _operations(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(data)
    except ValueError as error:
        raise ValueError(f"its pickle is damaged ({str(error).split(';')[0][:100]})") from error


def _is_made(value: Any) -> bool:
    return isinstance(value, Opaque) and value.args is not None


def _key(key: Any) -> Any:
    """A key as a dict takes it here: its hash takes no time, and equal hashes cannot be chosen."""
    if key is None or isinstance(key, str | bytes | float | Opaque):
        return key
    if isinstance(key, int) and abs(key) < _LARGEST_KEY:
        return key
    if isinstance(key, tuple):
        return Opaque("builtins.tuple", key)
    raise ValueError("it holds a dictionary with a key that cannot be one")


# A collection from one other stays the same object: a pickle may make it again and again.
_CONTAINERS: dict[str, Rebuild] = {
    "collections.OrderedDict": lambda *pairs: Opaque("collections.OrderedDict", pairs) if pairs else {},
    "collections.defaultdict": lambda *factory: {},
    "builtins.dict": lambda *pairs: Opaque("builtins.dict", pairs) if pairs else {},
    "builtins.list": lambda *values: values[0] if values else [],
    "builtins.tuple": lambda *values: values[0] if values else (),
    "builtins.set": lambda *values: values[0] if values else [],
    "builtins.frozenset": lambda *values: values[0] if values else (),
    "builtins.bytes": lambda *values: values[0] if values else b"",
    "builtins.bytearray": lambda *values: values[0] if values else b"",
}

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _begin(machine: _Machine, protocol: int) -> None:
    if protocol > 5:
        raise ValueError(f"its pickle has protocol {protocol}, which is not known")


_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": _begin,
    "FRAME": lambda machine, size: machine.check_frame(size),
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop() if machine.stack else machine.pop_to_mark(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "PUT": lambda machine, index: machine.put(index),
    "BINPUT": lambda machine, index: machine.put(index),
    "LONG_BINPUT": lambda machine, index: machine.put(index),
    "MEMOIZE": lambda machine, _: machine.put(None),
    "GET": lambda machine, index: machine.get(index),
    "BINGET": lambda machine, index: machine.get(index),
    "LONG_BINGET": lambda machine, index: machine.get(index),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.take(1),
    "TUPLE2": lambda machine, _: machine.take(2),
    "TUPLE3": lambda machine, _: machine.take(3),
    "FROZENSET": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.make_dict(),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, text: machine.name(text),
    "STACK_GLOBAL": lambda machine, _: machine.name_from_stack(),
    "REDUCE": lambda machine, _: machine.call(machine.pop(), machine.pop()),
    "NEWOBJ": lambda machine, _: machine.call(machine.pop(), machine.pop()),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
    "OBJ": lambda machine, _: machine.call_marked(),
    "INST": lambda machine, text: machine.call_named(text),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.find_persistent(),
}
