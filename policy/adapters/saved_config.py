"""The values in a saved OmegaConf configuration, from what a pickle says about its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from policy.adapters.inert_pickle import MOST_LEVELS, Opaque

# Far above real configurations; each value of an interpolated part counts wherever it appears.
MOST_VALUES = 100_000
MOST_TEXT = 10_000

# ${a.b}, ${.b} and ${..b}; resolvers have a colon.
_PATH = re.compile(r"\$\{(\.*)([\w\-]+(?:\.[\w\-]+)*)\}")


def is_config(value: Any) -> bool:
    """Whether a value stands for a node of OmegaConf that holds a value or further nodes."""
    return isinstance(value, Opaque) and value.name.startswith(
        ("omegaconf.dictconfig.", "omegaconf.listconfig.", "omegaconf.nodes.")
    )


def config_values(config: Opaque) -> Any:
    """Turn a configuration into dicts, lists and values.

    Interpolations of paths, such as `${task.horizon}`, `${.horizon}` and `${name}_state`, are resolved within the
    configuration. Resolvers such as `${now:%Y}` stay text, and so does a path that leads nowhere, as other parts of the
    configuration do not depend on it.

    Args:
        config: the configuration's root.

    Returns:
        The values.

    Raises:
        ValueError: it is damaged, refers to itself in a circle, or grows too large when it is resolved. The message
            is a clause about it.
    """
    return _Values(config).value(config, ())


class _Values:
    def __init__(self, root: Opaque) -> None:
        self.root = root
        self.left = MOST_VALUES
        self.levels = 0

    def value(self, node: Any, parents: tuple[Any, ...]) -> Any:
        """The value of a node that lies in `parents`, outermost first."""
        self.left -= 1
        with self.one_level_down():
            content = _content(node)
            if isinstance(content, dict):
                return {key: self.value(child, (*parents, node)) for key, child in content.items()}
            if isinstance(content, list | tuple):
                return [self.value(child, (*parents, node)) for child in content]
            if isinstance(content, str) and len(content) <= MOST_TEXT and "${" in content:
                return self.resolved(content, parents)
            return content

    def resolved(self, text: str, parents: tuple[Any, ...]) -> Any:
        if whole := _PATH.fullmatch(text):
            return self.at(whole, parents)
        resolved = ""
        end = 0
        for match in _PATH.finditer(text):
            found = self.at(match, parents)
            resolved += text[end : match.start()]
            resolved += f"{found}" if found is None or isinstance(found, str | int | float) else match[0]
            end = match.end()
            if len(resolved) > MOST_TEXT:
                raise ValueError(f"it has a text of more than {MOST_TEXT} characters")
        self.left -= len(resolved) // 100  # no two of these texts share memory
        return resolved + text[end:]

    def at(self, match: re.Match[str], parents: tuple[Any, ...]) -> Any:
        """The value that an interpolation refers to, or the interpolation itself if there is none."""
        found = self.find(match, parents)
        return self.value(found[-1], found[:-1]) if found else match[0]

    def find(self, match: re.Match[str], parents: tuple[Any, ...]) -> tuple[Any, ...]:
        """The node that an interpolation refers to, after those that it lies in; empty if there is none."""
        dots, path = match.groups()
        keys = path.split(".")
        self.left -= len(keys)
        if len(keys) > MOST_LEVELS or len(dots) > len(parents):
            return ()
        # One dot is the container that the interpolation lies in.
        above = parents[: len(parents) - len(dots) + 1] if dots else (self.root,)
        with self.one_level_down():
            for key in keys:
                above = self.container(above)
                child = _child(above[-1], key) if above else ()
                if not child:
                    return ()
                above = (*above, *child)
            return above

    def container(self, above: tuple[Any, ...]) -> tuple[Any, ...]:
        """The last node, or the one that it refers to if it is an interpolation itself."""
        content = _content(above[-1])
        whole = _PATH.fullmatch(content) if isinstance(content, str) and len(content) <= MOST_TEXT else None
        if not whole:
            return above
        with self.one_level_down():
            found = self.find(whole, above[:-1])
            return self.container(found) if found else ()

    @contextmanager
    def one_level_down(self) -> Iterator[None]:
        if self.levels == MOST_LEVELS or self.left < 0:
            raise ValueError(f"it is nested more than {MOST_LEVELS} deep, refers to itself, or is too large")
        self.levels += 1
        try:
            yield
        finally:
            self.levels -= 1


def _content(node: Any) -> Any:
    if not is_config(node):
        return node
    state = node.state if isinstance(node.state, dict) else {}
    for key in ("_content", "_val"):
        if key in state:
            return state[key]
    raise ValueError("it is damaged (a node without a value)")


def _child(node: Any, key: str) -> tuple[Any, ...]:
    """The child of this name in a tuple, which is empty if there is none."""
    content = _content(node)
    if isinstance(content, dict) and key in content:
        return (content[key],)
    if isinstance(content, list) and key.isdecimal() and len(key) < 10 and int(key) < len(content):
        return (content[int(key)],)
    return ()
