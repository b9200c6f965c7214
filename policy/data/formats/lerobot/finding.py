"""Where a LeRobot dataset is: a folder, or a repository of the Hub, downloaded already or now."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from policy.data.formats.lerobot.info import INFO

# Owner and name of a repository, as the Hub allows them.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What of a repository is read; some hold checkpoints or pages besides.
PATTERNS = ["meta/*", "data/*", "videos/*", "images/*"]


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
    return next(_downloaded(repository), None) or _download(repository)


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


def _download(repository: str) -> Path:
    """Download a repository into the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=PATTERNS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"there is no folder {repository}, no copy of that dataset under HF_LEROBOT_HOME or in the Hub's cache, and"
            f" the Hub does not give it ({reason}): correct dataset.path, or connect to the network, or log in with"
            " `hf auth login` if it is private"
        ) from error
