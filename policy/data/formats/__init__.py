"""The public formats of demonstrations by name; each has a module, which is imported when the format is first read."""

from __future__ import annotations

from policy.common.registry import Registry
from policy.data.formats.format import Format

FORMATS: Registry[Format] = Registry(
    "format of demonstrations",
    {
        "lerobot": "policy.data.formats.lerobot:FORMAT",
        "minari": "policy.data.formats.minari:FORMAT",
        "robomimic": "policy.data.formats.robomimic:FORMAT",
        "zarr": "policy.data.formats.zarr_replay:FORMAT",
    },
    Format,
)
