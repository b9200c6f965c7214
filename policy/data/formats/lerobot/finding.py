"""Where a LeRobot dataset is: a folder, or a repository of the Hub, downloaded already or now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from policy.common.hub import REPOSITORY, download
from policy.data.formats.lerobot.info import INFO

# What of a repository is read; some hold checkpoints or pages besides.
PATTERNS = ["meta/*", "data/*", "videos/*", "images/*"]
REMEDY = "correct dataset.path or HF_LEROBOT_HOME, connect to the network, or log in with `hf auth login`"


def find_lerobot(path: Path) -> Path:
    """Find the folder of a LeRobot dataset.

    Args:
        path: the folder, or a repository of the Hub such as lerobot/pusht. It is looked up where LeRobot keeps its
            datasets, `$HF_LEROBOT_HOME`, and in the caches of the Hub, and otherwise downloaded into the Hub's cache.

    Returns:
        The folder that holds `meta/`.

    Raises:
        ValueError: the repository is not here and cannot be downloaded.
    """
    repository, folder = path.as_posix(), path.expanduser()
    if folder.exists() or not REPOSITORY.fullmatch(repository):
        return folder
    copies = _downloaded(repository)
    return next(copies, None) or download(repository, remedy=REMEDY, repo_type="dataset", allow_patterns=PATTERNS)


def _downloaded(repository: str) -> Iterator[Path]:
    """The copies of a repository on this machine that hold more than its description."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    home = Path(os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME) / "lerobot").expanduser()
    if (home / repository / INFO).is_file():
        yield home / repository
    for cache in (home / "hub", Path(constants.HF_HUB_CACHE)):
        try:
            found = Path(snapshot_download(repository, repo_type="dataset", cache_dir=cache, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        if (found / INFO).is_file() and (found / "data").is_dir():
            yield found
