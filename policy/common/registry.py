"""Named parts, such as denoisers or solvers: a checkpoint stores the name, never an import path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from policy.common.arguments import check_arguments, settings_of, unknown_name
from policy.common.signatures import declaration_of, load

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Parts of one kind by name; each is imported when it is first asked for.

    Args:
        kind: what the parts are, for messages: `denoiser`, say.
        parts: name to `module:attribute`.

    Example:
        >>> shapes = Registry("shape", {"path": "pathlib:PurePosixPath"})
        >>> str(shapes["path"]("a", "b"))
        'a/b'
        >>> shapes["pth"]
        Traceback (most recent call last):
            ...
        KeyError: 'pth'
    """

    def __init__(self, kind: str, parts: Mapping[str, str]) -> None:
        self.kind = kind
        self._parts: dict[str, str | T] = dict(parts)

    def register(self, name: str, part: T) -> None:
        """Add a part of your own.

        Args:
            name: what checkpoints and settings call it.
            part: what takes the place of a built-in part.

        Raises:
            ValueError: another part has that name.
        """
        if name in self._parts and self[name] is not part:
            raise ValueError(f"there is a {self.kind} {name!r} already: register yours under another name")
        self._parts[name] = part

    def declared(self, name: str) -> str | T:
        """A part, or `module:attribute` while nobody has asked for it: to look at it without importing it.

        Raises:
            ValueError: there is no part of that name.
        """
        if name not in self._parts:
            raise self.unknown(name)
        return self._parts[name]

    def unknown(self, name: str) -> ValueError:
        """The error for a name that no part has."""
        error = unknown_name(self.kind, name, self._parts)
        return ValueError(f"{error}; a {self.kind} of your own comes with plugins=[the module that registers it]")

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
        **derived: arguments that follow from elsewhere and cannot be set in the spec.

    Returns:
        What the registered class or function returns.

    Raises:
        ValueError: no or unknown name, an unknown or derived setting, a value of the wrong type.
    """
    name, settings = check_spec(registry, spec)
    with settings_of(registry.kind, settings):
        return registry[name](**settings, **derived)


def check_spec(registry: Registry[Any], spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check a spec against what the part that it names takes, without importing that part.

    Its parameters without a default follow from the rest of the configuration: a spec cannot set them.

    Args:
        registry: the parts to choose from.
        spec: `{"name": ..., **settings}`.

    Returns:
        The name, and the settings converted to the types that the part declares.

    Raises:
        ValueError: no or unknown name, an unknown or derived setting, a value of the wrong type.
    """
    settings = dict(spec)
    if "name" not in settings:
        raise ValueError(f"{registry.kind}.name is missing: set it to one of {', '.join(sorted(registry))}")
    name = str(settings.pop("name"))
    declaration = declaration_of(registry.declared(name))
    for key, parameter in declaration.signature.parameters.items():
        if key in settings and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ValueError(f"{registry.kind}.{key} follows from the rest of the configuration and cannot be set")
    return name, check_arguments(registry.kind, declaration, settings)
