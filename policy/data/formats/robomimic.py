"""robomimic's HDF5 files: `data/demo_<i>` with `obs/<key>` and `actions`; `mask/<name>` lists demos."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from policy.common.arguments import check_choice
from policy.data.episode import Episode, EpisodeReader, Request
from policy.data.formats.format import Format
from policy.data.formats.hdf5 import HDF5Error, HDF5File

OBSERVATIONS = "obs/"


class RobomimicReader:
    """Reads one demo at a time from an open file."""

    def __init__(
        self,
        file: HDF5File,
        *,
        names: Sequence[str],
        held_out: Sequence[str],
        observation_keys: Mapping[str, str],
        action_key: str,
    ) -> None:
        self.names = names
        self.held_out = held_out
        self.metadata: Mapping[str, Any] = _metadata(file)
        self._file = file
        self._observation_keys = observation_keys
        self._action_key = action_key

    def read(self, name: str) -> Episode:
        """See `EpisodeReader`."""
        demo = f"data/{name}"
        actions = self._file.numbers(f"{demo}/{self._action_key}")
        stated = self._file.attribute(demo, "num_samples")
        if stated is not None and not np.array_equal(stated, len(actions)):
            raise ValueError(f"'num_samples' says {stated}, but {self._action_key!r} has {len(actions)} rows")
        return Episode(
            observations={
                policy_key: self._file.numbers(f"{demo}/{OBSERVATIONS}{key}")
                for policy_key, key in self._observation_keys.items()
            },
            actions=actions,
        )

    def close(self) -> None:
        """See `EpisodeReader`."""
        self._file.close()


def open_robomimic(path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    """Open a robomimic file.

    Args:
        path: the `.hdf5` file.
        files: the same file.
        request: the user's request. By default everything under `obs` is observed, and the actions are `actions`. A
            subset is one of the file's masks. Without a subset, and if the file has `mask/train` and `mask/valid`, the
            demos of both are read, and those of `valid` are held out.

    Returns:
        The file's reader.

    Raises:
        ValueError: it is not a robomimic file, a mask contradicts the demos, or a requested key or mask is missing.
    """
    if not path.is_file():
        inside = [name for name in files if name.endswith((".hdf5", ".h5"))]
        raise ValueError(f"set dataset.path to a robomimic file, not a folder; in it: {', '.join(inside) or 'none'}")
    file = HDF5File(path, request.budget)
    try:
        demos = _demos(file)
        names, held_out = _subset(file, demos, request.subset)
        listed = _keys(file, names)
        counts = Counter(key for keys in listed for key in keys)
        observed = {key.removeprefix(OBSERVATIONS): n for key, n in counts.items() if key.startswith(OBSERVATIONS)}
        if not observed:
            raise ValueError(
                "no demo has observations under 'obs': extract them with robomimic's dataset_states_to_obs"
            )
        # The keys that most demos have. A demo that lacks one of them is a bad episode.
        usual = sorted(key for key, count in observed.items() if 2 * count >= len(listed))
        keys = request.observations(observed, usual)
        action_key = request.action((key for key in counts if not key.startswith(OBSERVATIONS)), "actions")
        _check_sizes(file, names, [*(f"{OBSERVATIONS}{key}" for key in keys.values()), action_key], request)
        return RobomimicReader(file, names=names, held_out=held_out, observation_keys=keys, action_key=action_key)
    except ValueError:
        file.close()
        raise


def _looks(names: Collection[str]) -> bool:
    """A single HDF5 file, but for the one inside a Minari dataset."""
    return len(names) == 1 and all(name.endswith((".hdf5", ".h5")) and name != "main_data.hdf5" for name in names)


FORMAT = Format(open=open_robomimic, looks=_looks)


def _demos(file: HDF5File) -> list[str]:
    demos = file.names("data")
    if not demos:
        raise ValueError("it holds nothing under 'data': not a robomimic file, or it was written partly")
    if others := [name for name in demos if not re.fullmatch(r"demo_\d+", name)]:
        raise ValueError(
            f"'data' holds {others[0]!r}, which is not a demo_<number>: not a robomimic file, or a damaged one"
        )
    return sorted(demos, key=_number)


def _number(demo: str) -> tuple[int, str]:
    return int(demo.removeprefix("demo_")), demo


def _subset(file: HDF5File, demos: Sequence[str], subset: str | None) -> tuple[list[str], list[str]]:
    masks = file.names("mask")
    if subset is not None:
        check_choice("subset", subset, masks)
        return _mask(file, demos, subset), []
    if not {"train", "valid"} <= set(masks):
        return list(demos), []
    train, valid = _mask(file, demos, "train"), _mask(file, demos, "valid")
    if both := sorted(set(train) & set(valid), key=_number):
        raise ValueError(f"{both[0]} is in 'mask/train' and in 'mask/valid': it cannot be trained on and held out")
    return sorted(train + valid, key=_number), valid


def _mask(file: HDF5File, demos: Sequence[str], name: str) -> list[str]:
    listed = file.strings(f"mask/{name}")
    if missing := sorted(set(listed) - set(demos)):
        raise ValueError(f"'mask/{name}' lists {missing[0]!r}, but there is no such demo")
    if repeated := [demo for demo, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"'mask/{name}' lists {repeated[0]!r} twice")
    return sorted(listed, key=_number)


def _keys(file: HDF5File, demos: Sequence[str]) -> list[list[str]]:
    """List the arrays of each demo, without demos that cannot be listed: reading those raises their errors later."""
    listed = []
    damage: HDF5Error | None = None
    for demo in demos:
        try:
            listed.append([key for key in file.arrays(f"data/{demo}") if not key.startswith("next_obs/")])
        except HDF5Error as error:
            damage = error
    if damage and not listed:
        raise damage
    return listed


def _check_sizes(file: HDF5File, names: Sequence[str], keys: Iterable[str], request: Request) -> None:
    """Compare the sizes in the file's headers with the budget; bad demos are named when they are read."""
    *observed, action_key = keys
    lengths: list[int] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names[: request.budget.max_episodes]:
        with suppress(HDF5Error):
            lengths.append(file.shape(f"data/{name}/{action_key}")[0])
            shapes = shapes or {key: file.shape(f"data/{name}/{key}")[1:] for key in (*observed, action_key)}
    request.budget.check_episodes(lengths, shapes)


def _metadata(file: HDF5File) -> dict[str, Any]:
    said = {**_environment(file), "total": _attribute(file, "total")}
    if isinstance(said["total"], np.integer):
        said["total"] = int(said["total"])
    known = {key: value for key, value in said.items() if isinstance(value, str) or _is_finite(value)}
    return {"format": "robomimic", **known}


def _environment(file: HDF5File) -> dict[str, Any]:
    try:
        settings = json.loads(_attribute(file, "env_args"))
        kwargs = settings.get("env_kwargs") or {}
        return {
            "env_name": settings.get("env_name"),
            "env_type": settings.get("type"),
            "rate_hz": kwargs.get("control_freq"),
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _attribute(file: HDF5File, name: str) -> Any:
    try:
        return file.attribute("data", name)
    except HDF5Error:  # training does not need it
        return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
