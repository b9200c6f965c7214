"""The environment that a checkpoint acts in, and the check of an environment that a file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy.checkpoint.reading import Checkpoint


def check_env(env: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Reject an environment that a file names if making it would import a module: only the user may choose code.

    Args:
        env: settings of the environment, from the file.
        source: the file, for the message.

    Returns:
        `env` as a dictionary.

    Raises:
        ValueError: the environment's id has the form "module:Id".
    """
    if ":" in str(env.get("id", "")):
        raise ValueError(
            f"{source} asks for the environment {env['id']}, which would import a module of its choice:"
            f" if you trust it, add env=gym env.id={env['id']}"
        )
    return dict(env)


def choose_env(checkpoint: Checkpoint, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """Choose the environment to act in: the checkpoint's own, possibly with changed settings, or another one.

    Args:
        checkpoint: the checkpoint.
        override: with a `name`, it replaces the checkpoint's environment; without one, it changes single settings.

    Returns:
        `{"name": ..., **settings}`.

    Raises:
        ValueError: the checkpoint names no environment, or one that only the user may choose.
    """
    if override and "name" in override:
        return dict(override)
    if checkpoint.env is None:
        raise ValueError(f"{checkpoint.path} names no environment: add env=...")
    return check_env({**checkpoint.env, **(override or {})}, checkpoint.path)
