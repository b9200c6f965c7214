"""The families of environments and their scripted experts by name; each is imported when it is first used."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from envs.errors import choose

if TYPE_CHECKING:
    import gymnasium

    from envs.checked import CheckedEnv
    from envs.collect import Expert, ExpertFactory
    from envs.vector import VectorWorlds

# A family makes an environment from keyword arguments with type hints, ``render_mode`` among them.
Family: TypeAlias = "Callable[..., gymnasium.Env[Any, Any]]"
# It makes many worlds from the same arguments without ``render_mode``, and ``worlds``, their number.
VectorFamily: TypeAlias = "Callable[..., VectorWorlds]"

# Name to ``module:name``, or to the family itself. A command reads the options of a family from the module's source.
FAMILIES: dict[str, str | Family] = {
    "gym": "envs.gym_env:make_gym",
    "metaworld": "envs.metaworld:MetaWorldEnv",
    "metaworld_tasks": "envs.metaworld_tasks:MetaWorldTasksEnv",
    "ocbench": "envs.ocbench:OCBenchEnv",
    "planar": "envs.planar:PlanarEnv",
    "pusht": "envs.pusht:PushTEnv",
}
# The families that have a scripted expert.
EXPERTS: dict[str, str | ExpertFactory] = {
    "gym": "envs.fetch:make_fetch_expert",
    "metaworld": "envs.metaworld:make_metaworld_expert",
    "metaworld_tasks": "envs.metaworld:make_metaworld_expert",
    "ocbench": "envs.ocbench:make_ocbench_expert",
    "planar": "envs.planar:make_planar_expert",
}
# The families that can step many worlds in one call.
VECTOR_FAMILIES: dict[str, str | VectorFamily] = {"gym": "envs.vector:make_gym_vector"}


def register_family(
    name: str, family: Family, expert: ExpertFactory | None = None, vector: VectorFamily | None = None
) -> None:
    """Add a family of your own.

    Args:
        name: Name of the family, as in ``env.name``.
        family: A function or class with type hints that takes ``render_mode`` and the family's options as keyword
            arguments, and returns an environment as described in `envs`.
        expert: Builds the scripted expert of one episode from the environment and the episode's seed.
        vector: Makes many worlds at once, for ``env_vector=true``: it takes ``worlds``, their number, and the family's
            options.

    Raises:
        ValueError: If another family has that name.
    """
    if FAMILIES.get(name, family) != family:
        raise ValueError(f"There is an environment {name!r} already; register yours under another name.")
    FAMILIES[name] = family
    if expert is not None:
        EXPERTS[name] = expert
    if vector is not None:
        VECTOR_FAMILIES[name] = vector


def make_vector(name: str, *, worlds: int, **kwargs: Any) -> VectorWorlds:
    """Make many worlds of an environment that are stepped by one call.

    Args:
        name: As for `make`.
        worlds: Their number.
        **kwargs: As for `make`.

    Raises:
        MissingExtraError: If its simulator is not installed.
        ValueError: If the environment has no such simulator, or a name or an option is unknown.
    """
    if name in FAMILIES and name not in VECTOR_FAMILIES:
        raise ValueError(
            f"{name!r} has no simulator that steps many worlds in one call; those are"
            f" {', '.join(sorted(VECTOR_FAMILIES))}: leave env_vector out, and each core steps worlds of its own."
        )
    family: VectorFamily = _load(VECTOR_FAMILIES[choose("environment", name, VECTOR_FAMILIES)])
    _check_options(name, family, kwargs, filled={"worlds"})
    _check_numbers(kwargs)
    return family(worlds=worlds, **kwargs)


def make(
    name: str, *, render_mode: str | None = None, max_episode_steps: int | None = None, **kwargs: Any
) -> CheckedEnv:
    """Make an environment, whose every value is checked.

    Args:
        name: ``"metaworld"`` (``task=``), ``"metaworld_tasks"`` (``tasks=``), ``"ocbench"`` (``task=``), ``"pusht"``
            (``observation=``), ``"planar"``, ``"gym"`` (``id=``, ``kwargs=``, ``observation_keys=``, ``success=``), or
            a family of `register_family`.
        render_mode: ``None`` or ``"rgb_array"``.
        max_episode_steps: Control steps after which an episode is truncated, by default the environment's own limit;
            only families that have this option themselves, as ``"gym"`` and ``"ocbench"``, take a longer one.
        **kwargs: Options of that family; its class or function describes them.

    Returns:
        The environment. Its ``observation_space`` is a Box, or a Dict of Boxes, each (D,) float32 or (H, W, C) uint8;
        its ``action_space`` is a Box (A,) float32, infinite where the simulator sets no bound.

    Raises:
        MissingExtraError: If its simulator, or a system library, is not installed.
        ValueError: If a name, an option or a task is unknown (the message names the nearest one), or the environment
            has no time limit and none was given, or ends before the one that was given.
    """
    from envs.checked import CheckedEnv

    family = load_family(name)
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"Unknown render_mode {render_mode!r}. Allowed: None, 'rgb_array'.")
    _check_options(name, family, kwargs, filled={"render_mode"}, common={"max_episode_steps"})
    _check_numbers({**kwargs, "max_episode_steps": max_episode_steps})
    if "max_episode_steps" in inspect.signature(family).parameters:  # the simulator's own limit may be longer too
        kwargs["max_episode_steps"] = max_episode_steps
    title = str(kwargs.get("id", name))
    return CheckedEnv(partial(family, render_mode=render_mode, **kwargs), title, max_episode_steps)


def _check_options(
    name: str, family: Callable[..., Any], given: Iterable[str], filled: set[str], common: Iterable[str] = ()
) -> None:
    """Refuse options that a family does not have, and ask for one that it needs.

    Args:
        name: Name of the family.
        family: The family.
        given: Names of the user's options.
        filled: Parameters that are no options, because the caller fills them in.
        common: Options that every family has, whether or not they are parameters.
    """
    parameters = inspect.signature(family).parameters.values()
    named = {one.name: one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    if len(named) == len(parameters):  # else it takes others, too
        for option in given:
            choose(f"option of {name!r}", option, {*named, *common} - filled)
    required = {option for option, one in named.items() if one.default is one.empty}
    if missing := sorted(required - {*given, *filled, *common}):
        raise ValueError(f"The environment {name!r} needs the option {missing[0]!r}.")


def _check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse a time limit that is no whole number, and a limit, a size or a rate that is not above 0."""
    limit = given.get("max_episode_steps")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"max_episode_steps must be a whole number, 1 or more; got {limit!r}.")
    for option in ("image_size", "control_hz"):
        value = given.get(option)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{option} must be above 0; got {value!r}.")


def make_expert(name: str, env: gymnasium.Env[Any, Any], seed: int) -> Expert:
    """Build the scripted expert of an environment, for one episode.

    Args:
        name: The name given to `make`.
        env: The environment that `make` returned.
        seed: Seed of the expert's own choices, in a stream apart from the environment's.

    Raises:
        ValueError: If the environment has no scripted expert: its demonstrations must come from a dataset.
    """
    if name in FAMILIES and name not in EXPERTS:
        raise ValueError(
            f"{name!r} has no scripted expert; its demonstrations must come from a dataset. Experts:"
            f" {', '.join(sorted(EXPERTS))} (gym: of FetchReach and FetchPickAndPlace)."
        )
    expert: ExpertFactory = _load(EXPERTS[choose("expert", name, EXPERTS)])
    return expert(env, seed)


def declared_family(name: str) -> str | Family:
    """Return a family without importing it: itself, or ``module:name`` for one that is not imported.

    Args:
        name: Name of the family, as in ``env.name``.

    Raises:
        ValueError: If there is no such family.
    """
    hint = " A family of your own comes with plugins=[the module that registers it]."
    return FAMILIES[choose("environment", name, FAMILIES, hint=hint)]


def load_family(name: str) -> Family:
    """Return the function or class of a family, and import its module if necessary.

    Args:
        name: Name of the family, as in ``env.name``.

    Raises:
        ValueError: If there is no such family.
    """
    family: Family = _load(declared_family(name))
    return family


def _load(part: Any) -> Any:
    if not isinstance(part, str):
        return part
    module, _, attribute = part.partition(":")
    return getattr(importlib.import_module(module), attribute)
