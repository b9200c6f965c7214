"""What `data/metadata.json` says of a Minari dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
from minari.serialization import deserialize_space

from policy.data.minari_writer import ENV_KEY

METADATA = "data/metadata.json"


def read_metadata(files: Mapping[str, Path]) -> dict[str, Any]:
    """Read the file, of which the two spaces are there.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if METADATA not in files:
        inner = [name.removesuffix(f"/{METADATA}") for name in files if name.endswith(f"/{METADATA}")]
        meant = f", such as {inner[0]} in it" if inner else ""
        raise ValueError(
            "no Minari dataset is there (it has no data/metadata.json): set dataset.path to the folder that holds data/"
            + meant
        )
    try:
        metadata = json.loads(files[METADATA].read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"data/metadata.json is damaged ({error}): fetch it again") from error
    # If the spaces are missing, Minari would import and build the environment that the file names.
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), str) for key in ("observation_space", "action_space")
    ):
        raise ValueError(
            "data/metadata.json does not state the observation_space and action_space: write it again with Minari 0.5"
        )
    return metadata


def read_space(metadata: Mapping[str, Any], key: str) -> gymnasium.Space[Any]:
    """Make the space that the metadata states under a key, which is `observation_space` or `action_space`.

    Raises:
        ValueError: it is not a space that Minari knows.
    """
    try:
        return deserialize_space(metadata[key])
    except Exception as error:  # Minari does not check its input: each kind of damage raises another exception
        raise ValueError(f"{key} in data/metadata.json is not a space that Minari knows ({error!r})") from error


def read_env_name(metadata: Mapping[str, Any]) -> str | None:
    """The id of the Gymnasium environment that the dataset names, or None; nothing of it is imported.

    An environment of another package than Gymnasium is named with the module that its entry point is in, as `env.id=`
    takes it.
    """
    try:
        spec = json.loads(metadata["env_spec"])
        name, module = spec["id"], str(spec.get("entry_point") or "").partition(":")[0]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):  # training does not need it
        return None
    if not isinstance(name, str):
        return None
    package = module.partition(".")[0]
    return name if package in ("", "gymnasium") or ":" in name else f"{package}:{name}"


def read_environment(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the environment that `ddim-collect` demonstrated in; None for what others wrote.

    Raises:
        ValueError: they are damaged.
    """
    try:
        env = json.loads(metadata.get(ENV_KEY, "null"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{ENV_KEY} in data/metadata.json is damaged ({error}): fetch it again") from error
    if not isinstance(env, dict | None):
        raise ValueError(f"{ENV_KEY} in data/metadata.json must be the settings of an environment; it is {env!r}")
    return env
