"""Where a Minari dataset is: a folder, or an id such as D4RL/door/human-v2."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import minari

from policy.common.errors import reason_of

DATASET_ID = re.compile(r"[\w-]+(/[\w-]+)*-v\d+")
# Seconds to wait for the hub's answer.
REACH_SECONDS = 10


def find_minari(path: Path) -> Path:
    """Find the folder of a Minari dataset.

    Args:
        path: the folder, or an id; an id that is not under Minari's local root is downloaded.

    Returns:
        The folder that holds `data/`.

    Raises:
        ValueError: the id is not under the local root and cannot be downloaded.
    """
    path = path.expanduser()
    dataset_id = path.as_posix()
    if path.exists() or not DATASET_ID.fullmatch(dataset_id):
        return path
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    folder = root / dataset_id
    if not folder.exists():
        _download(dataset_id, root, folder)
    return folder


def _download(dataset_id: str, root: Path, folder: Path) -> None:
    try:
        _check_reachable()
        minari.download_dataset(dataset_id)
        if not folder.exists():
            raise FileNotFoundError(f"the download left nothing at {folder}")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # otherwise half a dataset would be found the next time
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{dataset_id} is not a folder, is not under Minari's local root {root}, and could not be downloaded"
            f" ({reason_of(error)}): correct dataset.path, or connect to the network, or copy the dataset to {folder}"
        ) from error


def _check_reachable() -> None:
    # Without a network, the hub's client would retry for half a minute or more.
    if os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):
        from huggingface_hub import constants, get_session

        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
