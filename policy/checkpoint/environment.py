"""The environment to act in: what a file names, the changes that the user makes, and what only the user may choose."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from policy.checkpoint.reading import Checkpoint

# A text of this kind may name a file or a module.
NAMES_CODE = re.compile(r"[./\\:]")


def choose_env(checkpoint: Checkpoint, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """Choose the environment to act in: the checkpoint's own, possibly with changed settings, or another one.

    Args:
        checkpoint: the checkpoint.
        override: with the name of another environment, it replaces the checkpoint's; with the same name (and id), or
            without a `name`, it changes single settings.

    Returns:
        `{"name": ..., **settings}`.

    Raises:
        ValueError: the checkpoint names no environment, or one that only the user may choose.
    """
    return merge_env(checkpoint.env, override, checkpoint.path)


def merge_env(stored: Mapping[str, Any] | None, override: Mapping[str, Any] | None, source: object) -> dict[str, Any]:
    """Choose between the environment that a file holds and the user's; a file cannot have code imported.

    Args:
        stored: settings of the environment, from the file, or None.
        override: the user's, as for `choose_env`.
        source: the file, for messages.

    Returns:
        `{"name": ..., **settings}`.

    Raises:
        ValueError: neither names an environment, or the file's would import a module, or read a file, of its choice.
    """
    override = dict(override or {})
    if "name" in override and not (isinstance(stored, Mapping) and _same_env(stored, override)):
        return override
    if not isinstance(stored, Mapping) or not isinstance(stored.get("name"), str):
        raise ValueError(f"{source} names no environment: add env=...")
    kept = {key: value for key, value in stored.items() if key not in override}
    if not isinstance(kept.get("id", ""), str):
        raise ValueError(f"{source} asks for an environment whose id is not a text but {kept['id']!r}: add env=...")
    if ":" in kept.get("id", ""):
        raise ValueError(
            f"{source} asks for the environment {kept['id']}, which would import a module of its choice:"
            f" if you trust it, add env.id={kept['id']}"
        )
    for key, text in _texts("kwargs", kept.get("kwargs")):
        if NAMES_CODE.search(text):
            raise ValueError(
                f"{source} asks for env.{key}={text!r}, which may be a file or a module of its choice: if you trust it,"
                " give all of env.kwargs yourself, as env.kwargs.NAME=VALUE"
            )
    return {**kept, **override}


def _same_env(stored: Mapping[str, Any], override: Mapping[str, Any]) -> bool:
    return all(override.get(key, stored.get(key)) == stored.get(key) for key in ("name", "id"))


def only_of_the_user(env: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of an environment that `merge_env` takes from the user only: for the next command.

    >>> only_of_the_user({"name": "gym", "id": "my_env:Reach-v0", "success": "termination"})
    {'id': 'my_env:Reach-v0'}
    """
    of_code = {
        "id": ":" in str(env.get("id", "")),
        "kwargs": any(NAMES_CODE.search(text) for _, text in _texts("kwargs", env.get("kwargs"))),
    }
    return {key: env[key] for key, needed in of_code.items() if needed}


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(key, part)
