"""Environments as commands make them: every setting is checked by name and type before the simulator is imported."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, overload

import envs
from envs import families
from policy.common.arguments import check_arguments
from policy.common.signatures import Declaration, declaration_of

if TYPE_CHECKING:
    from envs.checked import CheckedEnv
    from envs.vector import VectorWorlds


def declared_settings(name: str) -> Declaration:
    """Return the declaration of an environment's settings: those of its family, and the one that all have."""
    family = declaration_of(families.declared_family(name))
    every = declaration_of("envs.families:make")
    limit = every.signature.parameters["max_episode_steps"]
    takes = {limit.name: limit, **family.signature.parameters}
    ordered = sorted(takes.values(), key=lambda parameter: parameter.kind)
    return Declaration(inspect.Signature(ordered), f"{family.doc}\n\n{every.doc}")


@overload
def make_env(name: str, *, worlds: None = None, **settings: Any) -> CheckedEnv: ...


@overload
def make_env(name: str, *, worlds: int, **settings: Any) -> VectorWorlds: ...


def make_env(name: str, *, worlds: int | None = None, **settings: Any) -> CheckedEnv | VectorWorlds:
    """Make an environment from the settings that the user gave, or that a checkpoint or a dataset holds.

    Args:
        name: of the family.
        worlds: make so many at once, stepped by one call; see `envs.make_vector`.
        **settings: of the family, and `render_mode`.

    Raises:
        ValueError: an unknown family or setting, with the nearest, or a value of the wrong type.
    """
    checked = check_arguments("env", declared_settings(name), settings)
    with contextlib.chdir("."):  # a simulator may change the current folder: back to that of the user's relative paths
        return envs.make(name, **checked) if worlds is None else envs.make_vector(name, worlds=worlds, **checked)
