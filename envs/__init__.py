"""Environments with one idea of success and of reproducible resets.

Every environment of `make` observes one array or a dict of arrays by key, each a float32 vector or a (height, width,
channels) uint8 image, and acts by a float32 vector. It has ``info["is_success"]`` (bool) and ``info["score"]`` (in
[0, 1]) at reset and at each step, the control rate in Hz in ``metadata["render_fps"]``, and a ``reset(seed=s)`` that
means the same episode whatever happened before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium

from envs.collect import Episode, Expert, collect_episodes, make_expert
from envs.errors import MissingExtraError, RenderingUnavailableError, choose
from envs.gym_env import make_gym
from envs.metaworld import MetaWorldEnv
from envs.metaworld_tasks import MetaWorldTasksEnv
from envs.planar import PlanarEnv
from envs.pusht import PushTEnv, pusht_pictures, pusht_pictures_and_features
from envs.pusht_geometry import (
    pusht_agent_pos,
    pusht_features,
    pusht_hindsight,
    pusht_keypoints,
    pusht_mirror,
    pusht_state_features,
)
from envs.rendering import check_rendering, prefer_headless_gl

__all__ = [
    "Episode",
    "Expert",
    "MissingExtraError",
    "RenderingUnavailableError",
    "check_rendering",
    "collect_episodes",
    "make",
    "make_expert",
    "pusht_agent_pos",
    "pusht_features",
    "pusht_hindsight",
    "pusht_keypoints",
    "pusht_mirror",
    "pusht_pictures",
    "pusht_pictures_and_features",
    "pusht_state_features",
]

# Simulators are imported when an environment is built, so that this module loads without any of them.
FAMILIES: dict[str, Callable[..., gymnasium.Env[Any, Any]]] = {
    "gym": make_gym,
    "metaworld": MetaWorldEnv,
    "metaworld_tasks": MetaWorldTasksEnv,
    "planar": PlanarEnv,
    "pusht": PushTEnv,
}


def make(name: str, *, render_mode: str | None = None, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment.

    Args:
        name: ``"metaworld"`` (``task=``), ``"metaworld_tasks"`` (``tasks=``), ``"pusht"`` (``observation=``),
            ``"planar"`` or ``"gym"`` (``id=``, ``kwargs=``, ``observation_keys=``, ``success=``).
        render_mode: ``None`` or ``"rgb_array"``.
        **kwargs: Options of that environment, see its class.

    Returns:
        The environment. Its ``observation_space`` is a Box, or a Dict of Boxes, each (D,) float32 or (H, W, C) uint8;
        its ``action_space`` is a Box (A,) float32, infinite where the simulator sets no bound.

    Raises:
        MissingExtraError: If its simulator, or a system library, is not installed.
        ValueError: If a name, an option or a task is unknown; the message names the nearest one.
    """
    factory = FAMILIES[choose("environment", name, FAMILIES)]
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"Unknown render_mode {render_mode!r}. Allowed: None, 'rgb_array'.")
    parameters = inspect.signature(factory).parameters
    for option in kwargs:
        choose(f"option of {name!r}", option, set(parameters) - {"render_mode"})
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(required - set(kwargs)):
        raise ValueError(f"The environment {name!r} needs the option {missing[0]!r}.")
    return factory(render_mode=render_mode, **kwargs)


# MuJoCo picks its graphics backend when it is first imported, which may be before the first make().
prefer_headless_gl()

gymnasium.register(id="ddim_policy/MetaWorld-v0", entry_point="envs.metaworld:MetaWorldEnv")
gymnasium.register(id="ddim_policy/MetaWorldTasks-v0", entry_point="envs.metaworld_tasks:MetaWorldTasksEnv")
gymnasium.register(id="ddim_policy/Planar-v0", entry_point="envs.planar:PlanarEnv")
gymnasium.register(id="ddim_policy/PushT-v0", entry_point="envs.pusht:PushTEnv")
