"""What a benchmark is given on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def given_settings(arguments: Sequence[str], usage: str) -> dict[str, str]:
    """Read settings of the form NAME=VALUE; one of another form ends the program.

    Args:
        arguments: the settings.
        usage: see `refuse`.

    Returns:
        The values by name.
    """
    if not all("=" in argument for argument in arguments):
        refuse(arguments, usage)
    return dict(argument.split("=", 1) for argument in arguments)


def refuse(arguments: Sequence[str], usage: str) -> NoReturn:
    """End the program with its usage.

    Args:
        arguments: what it was given.
        usage: name of the benchmark, and what comes before the settings.
    """
    sys.exit(f"usage: python -m scripts.bench.{usage} [NAME=VALUE ...]; got {list(arguments)}")


def listed(text: str) -> list[str]:
    """The items of a list written as `[a,b]`."""
    return [part.strip() for part in text.strip("[]").split(",")]
