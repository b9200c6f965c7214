"""Modules by the key of an observation, which may be any text that a data format allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)
# Names that torch's own containers use, such as `type`, `to` and `values`: torch refuses them for a module.
TAKEN = frozenset(dir(nn.ModuleDict()))
DOT = "%2E"


def module_name(key: str) -> str:
    """Return the part of a weight's name that stands for a key."""
    return f"{key}/" if key.rstrip("/") in TAKEN else key.replace(".", DOT)


class ModulesByKey(nn.Module, Generic[M]):
    """A dictionary of modules whose weights are saved under their keys, as those of `nn.ModuleDict` are.

    A key that is the name of an attribute in torch gets a slash at its end in the weights' names (`type/`), and a dot,
    which separates names there, is written as in an address (`%2E`).

    Example:
        >>> from torch import nn
        >>> modules = ModulesByKey({"state": nn.Linear(1, 1, bias=False), "type": nn.Linear(1, 1, bias=False)})
        >>> list(modules), list(modules.state_dict())
        (['state', 'type'], ['state.weight', 'type/.weight'])

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Mapping[str, M]) -> None:
        super().__init__()
        for key, module in modules.items():
            self.add_module(module_name(key), module)

    def __getitem__(self, key: str) -> M:
        return cast(M, self._modules[module_name(key)])

    def __contains__(self, key: str) -> bool:
        return module_name(key) in self._modules

    def __iter__(self) -> Iterator[str]:
        return map(_key, self._modules)

    def keys(self) -> list[str]:
        """The keys, in their first order."""
        return list(self)

    def items(self) -> list[tuple[str, M]]:
        """The keys with their modules."""
        return [(key, self[key]) for key in self]


def _key(name: str) -> str:
    return name[:-1] if name.rstrip("/") in TAKEN else name.replace(DOT, ".")
