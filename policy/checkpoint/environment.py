"""Which environment a checkpoint acts in, and who may choose it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy.checkpoint.reading import Checkpoint


def check_env(env: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Refuse an environment that a file chose and that would import a module: code is the user's to choose.

    Args:
        env: as the file states it.
        source: the file, for the message.

    Returns:
        `env` as a dictionary.

    Raises:
        ValueError: its id is of the form "module:Id".
    """
    if ":" in str(env.get("id", "")):
        raise ValueError(
            f"{source} asks for the environment {env['id']}, which would import a module of its choice:"
            f" if you trust it, add env=gym env.id={env['id']}"
        )
    return dict(env)


def choose_env(checkpoint: Checkpoint, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """The environment to act in: the checkpoint's own, with some settings changed, or another one.

    Args:
        checkpoint: names its environment.
        override: with a `name` it replaces the checkpoint's; without one it changes single settings.

    Returns:
        `{"name": ..., **settings}`.

    Raises:
        ValueError: the checkpoint names none, or one that only the user may choose.
    """
    if override and "name" in override:
        return dict(override)
    if checkpoint.env is None:
        raise ValueError(f"{checkpoint.path} names no environment: add env=...")
    return check_env({**checkpoint.env, **(override or {})}, checkpoint.path)
