"""A policy's settings with their defaults: two policies may state different ones and be alike."""

from __future__ import annotations

from typing import Any

from policy.common.files import as_json
from policy.common.signatures import declaration_of
from policy.diffusion.schedule import make_schedule
from policy.model.config import PolicyConfig, config_to_json
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS


def with_defaults(config: PolicyConfig) -> dict[str, Any]:
    """Return a policy's configuration as JSON data, with every setting of its encoder, denoiser and schedule.

    Args:
        config: the configuration; it stores what was given.
    """
    stored = config_to_json(config)
    for name, registry in (("encoder", ENCODERS), ("denoiser", DENOISERS)):
        stored[name] = {**_defaults(registry.declared(stored[name]["name"])), **stored[name]}
    stored["schedule"] = {**_defaults(make_schedule), **stored["schedule"]}
    whole: dict[str, Any] = as_json(stored)  # which has no tuples: defaults are such, and users give lists
    return whole


def _defaults(target: Any) -> dict[str, Any]:
    parameters = declaration_of(target).signature.parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}
