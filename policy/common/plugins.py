"""Modules of the user's that register parts: `plugins=[my_module]` on any command."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

_LOADED: list[str] = []


def load_plugins(names: Iterable[str]) -> None:
    """Import modules, each once.

    Args:
        names: modules that Python finds, such as a file in the folder the command is run in.

    Raises:
        ValueError: a module that is not there, or that fails.
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
    """The plugins of this process, for the processes that it starts and for what a checkpoint says of itself."""
    return list(_LOADED)
