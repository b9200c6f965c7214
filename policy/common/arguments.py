"""Checks of arguments that arrive by name: from a command line, or from a checkpoint's JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from policy.common.signatures import Declaration, declaration_of

# A function or class, its declaration, or its `module:name`, which is read from source and not imported.
Target = str | Callable[..., Any] | Declaration
# Types of lists in signatures, words for what they hold, and pydantic's errors for a value that is not a list.
_LISTS = (list, Sequence)
_ITEMS = {Path: "paths", str: "names"}
_NO_LIST = ("list_type", "sequence_str", "is_instance_of")


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> ValueError:
    """Build the error for a misspelt name; it gives the name, the nearest allowed name and all allowed names.

    Args:
        what: kind of thing that the name stands for, such as `denoiser`.
        name: the unknown name.
        allowed: the allowed names.

    Returns:
        The error, to be raised by the caller.
    """
    options = sorted(allowed)
    return ValueError(f"unknown {what} {name!r}{did_you_mean(name, options)}; allowed: {', '.join(options) or 'none'}")


def check_choice(setting: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value of a setting that takes one of a few names or numbers.

    Args:
        setting: the setting, as the user writes it.
        value: its value.
        allowed: those.

    Raises:
        ValueError: it is none of them; the message has the nearest one.
    """
    options = list(allowed)
    if value not in options:
        raise unknown_name(setting, str(value), map(str, options))


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the option that is nearest to a name, or nothing where none is near."""
    nearest = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def check_arguments(
    where: str, target: Target, arguments: Mapping[str, Any], *, prefix: str | None = None
) -> dict[str, Any]:
    """Check keyword arguments against a callable's signature and type hints, before calling it.

    Args:
        where: group that the arguments belong to, for the message (with `sampler` it names `sampler.eta`).
        target: a function or class with keyword arguments and type hints, see `Target`.
        arguments: the keyword arguments to check.
        prefix: text before a setting's name where the user writes it; by default `where` and a dot.

    Returns:
        The arguments, converted to the hinted types where no information is lost ("8" to 8).

    Raises:
        ValueError: an unknown name (with the nearest known one) or a value of the wrong type.
    """
    check_names(where, target, arguments.keys())
    parameters = declaration_of(target).signature.parameters
    prefix = f"{where}." if prefix is None else prefix
    hints = {name: parameter.annotation for name, parameter in parameters.items()}
    return {name: _check_type(f"{prefix}{name}", hints.get(name, Any), value) for name, value in arguments.items()}


def check_names(where: str, target: Target, names: Iterable[str]) -> None:
    """Check that a callable takes keyword arguments of these names.

    Args:
        where: group that the arguments belong to, for the message.
        target: see `check_arguments`.
        names: names of the arguments.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    parameters = declaration_of(target).signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        check_choice(f"setting of {where}", name, parameters)


def _check_type(name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        raise ValueError(f"{name} should be settings of {hint.__name__}; got {value!r}")  # type: ignore[union-attr]
    if typing.get_origin(hint) is typing.Literal:
        check_choice(f"value of {name}", value, typing.get_args(hint))
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        checked = adapter.validate_python(value)
    except ValidationError as error:
        if error.errors()[0]["type"] in _NO_LIST and (items := _items(hint)) and not isinstance(value, (list, tuple)):
            maps = any(typing.get_origin(part) is Mapping for part in typing.get_args(hint))
            quoted = f", or in quotes a mapping, '{name}={{OURS: THEIRS}}'" if maps else ""
            raise ValueError(f"{name} takes a list of {items}, as {name}=[A,B]{quoted}; got {value!r}") from error
        problem = error.errors()[0]["msg"]
        expected = getattr(hint, "__name__", str(hint)).replace("typing.", "").replace("collections.abc.", "")
        raise ValueError(f"{name} should be {expected}; got {value!r} ({problem[0].lower()}{problem[1:]})") from error

    if isinstance(value, bool) and not isinstance(checked, bool):
        raise ValueError(f"{name} should be {getattr(hint, '__name__', hint)}; got {value!r}")
    _check_numbers(name, checked)
    return _all_at_home(name, checked)


def _items(hint: Any) -> str:
    """What a list holds, in words; nothing where the type is not that of a list."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) in _LISTS]
    return _ITEMS.get(typing.get_args(lists[0])[0], "values") if lists else ""


def _all_at_home(name: str, value: Any) -> Any:
    """Replace the `~` of paths by the user's folder, also inside lists."""
    if isinstance(value, Path):
        return at_home(name, value)
    return [_all_at_home(name, part) for part in value] if isinstance(value, list) else value


def at_home(name: str, path: str | Path) -> Path:
    """Replace the `~` or `~user` that a path begins with by that user's folder.

    Args:
        name: the setting that gives the path, for the message.
        path: the path.

    Raises:
        ValueError: there is no such user.
    """
    expanded = Path(os.path.expanduser(path))
    if not str(expanded).startswith("~"):
        return expanded
    if expanded.exists():  # in the current folder, where `./~run` is the same as `~run`
        return expanded.absolute()
    raise ValueError(
        f"{name}={path} begins with the home folder of a user that this machine does not have: give the full path"
    )


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that a user gives them, such as `env.task`.

    >>> dotted({"env": {"name": "planar"}, "seed": 0})
    {'env.name': 'planar', 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= dotted(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _check_numbers(name: str, value: Any) -> None:
    """Reject numbers that are not finite or exceed 64 bits, also inside lists and dicts."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_numbers(name, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a whole number of 64 bits; got {value}")


@contextmanager
def settings_of(where: str, names: Iterable[str]) -> Iterator[None]:
    """Name a setting in errors as its user writes it: `eta must lie ...` becomes `sampler.eta must lie ...`.

    Args:
        where: group that the settings belong to.
        names: names of the settings.

    Raises:
        ValueError: the error raised inside; `where` is put before its message if it begins with one of the names.
    """
    try:
        yield
    except ValueError as error:
        if str(error).split(" ", 1)[0] not in names:
            raise
        raise ValueError(f"{where}.{error}") from error
