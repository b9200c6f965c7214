"""Plugins: modules of the user that register parts, named by `plugins=[my_module]` on any command."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

_LOADED: list[str] = []


def load_plugins(names: Iterable[str]) -> None:
    """Import modules, each once.

    Args:
        names: modules that Python finds, such as a file in the folder in which the command is run.

    Raises:
        ValueError: a module that does not exist, or whose import fails.
    """
    for name in names:
        try:
            import_module(name)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"plugins={name} cannot be imported ({reason}): name a module that Python finds, such as my_module for"
                " my_module.py in the folder where you run this"
            ) from error
        if name not in _LOADED:
            _LOADED.append(name)


def loaded_plugins() -> list[str]:
    """Return the plugins of this process, for the processes that it starts and for the record in a checkpoint."""
    return list(_LOADED)
