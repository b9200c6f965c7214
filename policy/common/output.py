"""Output folders and the result files in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from policy.rollout.episodes import EpisodeResult


def output_folder(output_dir: Path | None, command: str) -> Path:
    """The folder a command writes to, made if need be.

    Args:
        output_dir: what the user chose, or None for a new folder named after the command and the time.
        command: `train`, `rollout`, ...

    Returns:
        The folder.

    Raises:
        ValueError: it cannot be made.
    """
    folder = output_dir or Path("outputs") / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        folder.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make output_dir={folder} ({error}): choose another") from error
    return folder.expanduser()


def write_episodes(results: Sequence[EpisodeResult], folder: Path) -> Path:
    """Write `episodes.json`, one entry an episode.

    Args:
        results: of a rollout.
        folder: where to.

    Returns:
        The file.
    """
    file = folder / "episodes.json"
    file.write_text(json.dumps([result.row() for result in results], indent=1))
    return file


def episode_seeds(seed: int, episodes: int) -> range:
    """Seeds of so many episodes, counting up from `seed`.

    Raises:
        ValueError: fewer than one episode, or a negative seed.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more; got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")
    return range(seed, seed + episodes)
