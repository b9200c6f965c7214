"""The line that a command prints last: the next command, which runs when it is pasted into a shell."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policy.common.plugins import loaded_plugins

# Text that Hydra reads as itself. Other text is quoted: it could be a number, a list, or nothing that Hydra can read.
PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
WORDS = {"null", "true", "false", "nan", "inf"}


def next_line(command: str, *words: object, **settings: Any) -> str:
    """Return the line that names the next command.

    Args:
        command: name of the console command, such as `ddim-rollout`, or of another program beside it.
        *words: arguments that are no settings, taken as they stand.
        **settings: its settings; those that are None are left out. A dict of environment settings becomes `env=NAME`
            and `env.setting=VALUE`. Plugins of this process are added.

    Returns:
        `next: ` and the command line, quoted for Hydra and for the shell.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    overrides: dict[str, Any] = {}
    for name, value in given.items():
        overrides |= _of_group(name, value) if isinstance(value, Mapping) else {name: value}
    if overrides and (plugins := loaded_plugins()):
        overrides["plugins"] = plugins
    arguments = [*map(str, words), *(f"{name}={hydra_text(value)}" for name, value in overrides.items())]
    return f"next: {shlex.join([program(command), *arguments])}"


def program(name: str) -> str:
    """Return how a shell finds a program that is installed beside this Python: by its name, or else by its path."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    is_found = found is not None and Path(found).parent.resolve() == beside.parent.resolve()
    return str(beside) if beside.exists() and not is_found else name


def hydra_text(value: Any) -> str:
    """Return a value as Hydra's grammar writes it: `[1,2]`, `{a:true}`, `null`, and text in quotes where it needs them.

    Keys stand as they are, because the grammar knows none in quotes.

    Args:
        value: text, a path, a number, a bool, None, or a list or dict of these.

    Returns:
        The text behind `NAME=`.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if isinstance(value, (int, float)) or (PLAIN.fullmatch(text) and text.lower() not in WORDS):
        return text
    return quoted(text)


def quoted(text: str) -> str:
    """Quote text for Hydra, so that it is taken as it stands: no escapes, no interpolation."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (r"\"" if m[2] else ""), literal) + '"'


def _of_group(group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that give a group these settings: its option first."""
    chosen = {group: settings["name"]} if "name" in settings else {}
    return {**chosen, **{f"{group}.{name}": value for name, value in settings.items() if name != "name"}}
