"""Named parts, such as denoisers or solvers: a checkpoint stores the name, never an import path."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from policy.common.arguments import check_arguments, settings_of, unknown_name
from policy.common.signatures import Declaration, declaration_of, load

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Parts of one kind by name; each is imported when it is first used.

    Args:
        kind: kind of the parts, for messages, such as `denoiser`.
        parts: `module:attribute` of each part, by name.
        type: type of the parts; by default they are classes or functions.

    Example:
        >>> shapes = Registry("shape", {"path": "pathlib:PurePosixPath"})
        >>> str(shapes["path"]("a", "b"))
        'a/b'
        >>> shapes["pth"]
        Traceback (most recent call last):
            ...
        KeyError: 'pth'
    """

    def __init__(self, kind: str, parts: Mapping[str, str], type: type[T] | None = None) -> None:
        self.kind, self.type = kind, type
        self._parts: dict[str, str | T] = dict(parts)

    def register(self, name: str, part: T) -> None:
        """Add a part.

        Args:
            name: name of the part in checkpoints and settings, an identifier.
            part: the class, function or object, with the interface of the built-in parts.

        Raises:
            ValueError: another part has that name, or one of the two cannot be used.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the name of a {self.kind} must be an identifier, such as my_own; got {name!r}")
        if not (isinstance(part, self.type) if self.type else callable(part)):
            wanted = f"a {self.type.__name__}" if self.type else "a class or function"
            raise ValueError(f"the {self.kind} {name!r} must be {wanted}; got {part!r}")
        if name in self._parts and self[name] is not part:
            raise ValueError(f"there is a {self.kind} {name!r} already: register yours under another name")
        self._parts[name] = part

    def declared(self, name: str) -> str | T:
        """Return a part, or its `module:attribute` if it has not been imported yet. Nothing is imported.

        Raises:
            ValueError: there is no part of that name.
        """
        if name not in self._parts:
            raise self.unknown(name)
        return self._parts[name]

    def unknown(self, name: str, allowed: Iterable[str] | None = None) -> ValueError:
        """Build the error for a name that no part has.

        Args:
            name: the unknown name.
            allowed: the names that are allowed, those of the registry by default.
        """
        error = unknown_name(self.kind, name, self._parts if allowed is None else allowed)
        return ValueError(f"{error}; to use your own {self.kind}, add plugins=[the module that registers it]")

    def __getitem__(self, name: str) -> T:
        part = self._parts[name]
        if isinstance(part, str):
            loaded: T = load(part)
            self._parts[name] = part = loaded
        return part

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def construct(registry: Registry[Any], spec: Mapping[str, Any], **derived: Any) -> Any:
    """Build the part that a spec names.

    Args:
        registry: the parts to choose from.
        spec: `{"name": ..., **settings}`.
        **derived: arguments that follow from the rest of the configuration and cannot be set in the spec.

    Returns:
        What the registered class or function returns.

    Raises:
        ValueError: a missing or unknown name, an unknown or derived setting, or a value of the wrong type.
    """
    name, settings = check_spec(registry, spec)
    with settings_of(registry.kind, settings):
        return registry[name](**settings, **derived)


def check_spec(registry: Registry[Any], spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check a spec against the parameters of the part that it names, without importing that part.

    The part's parameters without a default follow from the rest of the configuration, so a spec cannot set them.

    Args:
        registry: the parts to choose from.
        spec: `{"name": ..., **settings}`.

    Returns:
        The name, and the settings converted to the types that the part declares.

    Raises:
        ValueError: a missing or unknown name, an unknown or derived setting, or a value of the wrong type.
    """
    settings = dict(spec)
    if "name" not in settings:
        raise ValueError(f"{registry.kind}.name is missing: set it to one of {', '.join(sorted(registry))}")
    name = str(settings.pop("name"))
    parameters = declaration_of(registry.declared(name)).signature.parameters
    derived = {key for key, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if clash := sorted(settings.keys() & derived):
        raise ValueError(f"{registry.kind}.{clash[0]} follows from the rest of the configuration and cannot be set")
    takes = inspect.Signature([parameter for key, parameter in parameters.items() if key not in derived])
    return name, check_arguments(registry.kind, Declaration(takes, ""), settings)
