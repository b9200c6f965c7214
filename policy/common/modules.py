"""Modules that settings name: the folder in which a command runs is searched for these, and for nothing else."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from policy.common.signatures import load

# The packages of this project. A folder of the user's own may have one of these names.
OWN = ("policy", "envs", "conf", "scripts")
# Settings that take a function of the user's as `module:function`.
FUNCTIONS = ("dataset.transform", "dataset.relabel", "augment")


def search_for(module: str, setting: str) -> None:
    """Let Python find a module that a setting names, in the current folder too, which is then searched last.

    Nothing in that folder is looked at before: it may be a stranger's, who offered a dataset in it.

    Args:
        module: as Python imports it.
        setting: the setting as its user wrote it, for the message.

    Raises:
        ValueError: another package has the name of the module that lies in the current folder.
    """
    here = Path.cwd()
    mine = _spec_in(here, module)
    if mine is None:
        return
    top = module.partition(".")[0]
    found = _place(_spec(top))
    if found is None or found.is_relative_to(here.resolve()):
        if str(here) not in sys.path:
            sys.path.append(str(here))
    elif _spec(module) is None or module in OWN:
        raise ValueError(
            f"{setting}: there are two packages called {top}: Python takes {found}, and not {here / top}: rename yours,"
            f" such as to my_{top}, and write the new name in the setting"
        )


def _spec(module: str) -> ModuleSpec | None:
    """What Python would import under a name, or None."""
    try:
        return find_spec(module)
    except (ImportError, ValueError):
        return None


def _spec_in(folder: Path, module: str) -> ModuleSpec | None:
    """What Python would import under a name if it searched one folder and no other; nothing is imported."""
    spec, places, name = None, [str(folder)], ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, places) if part.isidentifier() else None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
    return spec


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder of a package, or the file of a module."""
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or []), spec.origin]
    return Path(places[0] or "").resolve()


def named_modules(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each setting that names a module, as its user writes it, and the module."""
    env = settings.get("env")
    if isinstance(env, Mapping) and ":" in str(env.get("id", "")):
        yield f"env.id={env['id']}", str(env["id"]).partition(":")[0]
    yield from _targets("", settings)


def check_functions(settings: Mapping[str, Any]) -> None:
    """Import the functions of the user that settings name, so that one that is not there is an error of its own.

    Raises:
        ValueError: a module that cannot be imported, or that has no such function.
    """
    for setting, _ in _targets("", settings):
        target = setting.partition("=")[2]
        try:
            function = load(target)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{setting} cannot be imported ({reason}): name a function as module:function, of a module"
                " that is installed or lies in the folder where you run this"
            ) from error
        if not callable(function):
            raise ValueError(f"{setting} is not a function; it is {function!r:.80}")


@contextmanager
def failures_named(setting: str, hint: str = "") -> Iterator[None]:
    """Turn any failure of a user's function into an error that names the setting.

    Args:
        setting: the setting that takes the function.
        hint: the end of the message.

    Raises:
        ValueError: whatever was raised inside; the message says what, and where.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ValueError(f"{setting} failed with {type(error).__name__}: {error} ({place}){hint}") from error


def _targets(where: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _targets(f"{where}{key}.", value)
        elif key == "_target_":
            module = str(value).rpartition(".")[0]
            if module.partition(".")[0] not in OWN:
                yield f"{where.removesuffix('.')}={module}:{str(value).rpartition('.')[2]}", module


def with_functions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `module:function` by the node that builds it, in the settings that take a function.

    >>> with_functions({"augment": "my_module:mirror"})
    {'augment': {'_target_': 'my_module.mirror', '_partial_': True}}
    """
    changed = dict(settings)
    for label in FUNCTIONS:
        group, _, name = label.rpartition(".")
        node = changed.get(group) if group else changed
        value = node.get(name) if isinstance(node, Mapping) else None
        if not isinstance(value, str):
            continue
        module, colon, function = value.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError(f"{label} takes a function as module:function, such as my_module:{name}; got {value!r}")
        part = {"_target_": f"{module}.{function}", "_partial_": True}
        changed = changed | ({group: {**changed[group], name: part}} if group else {name: part})
    return changed
