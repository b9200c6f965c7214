"""Repositories of the Hugging Face Hub: what names one, and its copy on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Owner and name of a repository, as the Hub allows them.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REMEDY = "check the name, the connection and your access"


def download(repository: str, *, remedy: str = REMEDY, **options: Any) -> Path:
    """Return the folder of a repository in the Hub's cache, downloaded now if it is not there.

    Args:
        repository: its name.
        remedy: what the user can do if that fails, the end of the message.
        **options: arguments of `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: neither the Hub nor the cache has the repository.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, **options))
    except Exception as error:  # the library and what it asks through, a proxy for instance, have errors of all types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{repository} is not here, and neither the Hub nor its local cache gives such a repository ({reason}):"
            f" {remedy}"
        ) from error
