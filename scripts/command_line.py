"""Command lines: Hydra's flags and overrides, read as they are meant before Hydra reads them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from policy.common.arguments import did_you_mean, unknown_name
from policy.common.next_line import hydra_text, quoted
from scripts.settings import GROUPS, Task, parameter_of, takes_only_a_path

HELP = re.compile(r"(-h|--help)(=(?P<topic>.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A command line, read.

    Attributes:
        topics: settings, groups and options that help is asked for, if `help_wanted`.
        help_wanted: whether help is printed instead of running the command.
        flags: Hydra's flags in their long form, each in one argument.
        overrides: the other arguments.
    """

    help_wanted: bool
    topics: list[str]
    flags: list[str]
    overrides: list[str]


def read_command_line(arguments: list[str], task: Task) -> CommandLine:
    """Separate Hydra's flags, which may stand anywhere, from the overrides.

    Args:
        arguments: `sys.argv` without the program.
        task: the command.

    Raises:
        ValueError: an unknown flag, or one that lacks its value.
    """
    asked = [found for argument in arguments if (found := HELP.fullmatch(argument))]
    if asked:
        others = [argument for argument in arguments if not argument.startswith("-")]
        topics = [found["topic"] for found in asked if found["topic"]]
        topics += [argument for argument in others if not argument.lstrip("+").startswith("plugins=")]
        return CommandLine(help_wanted=True, topics=topics, flags=[], overrides=others)
    parser = get_args_parser()
    known = [word for action in parser._actions for word in action.option_strings]
    parser.error = _refuse  # type: ignore[method-assign]
    read, unknown = parser.parse_known_intermixed_args(_whole_info(arguments))
    if unknown:
        name = unknown[0].split("=", 1)[0]
        setting = name.lstrip("-").replace("-", "_")
        is_setting = setting in task.groups or parameter_of(task, setting) is not None
        hint = f" (did you mean {setting}=...?)" if is_setting else did_you_mean(name, known)
        raise ValueError(f"unknown option {name!r}{hint}: a setting is written NAME=VALUE, without dashes in front")
    if read.experimental_rerun:
        raise ValueError(
            "--experimental-rerun would load a pickle, which can run code: repeat the command line instead"
        )
    overrides = read.overrides
    flags = {name.replace("_", "-"): value for name, value in vars(read).items() if value and name != "overrides"}
    written = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return CommandLine(help_wanted=False, topics=[], flags=written, overrides=overrides)


def _whole_info(arguments: list[str]) -> list[str]:
    """Write `--info` as `--info=all` before an override, which would otherwise be taken for its value."""
    following = [*arguments, ""][1:]
    return [
        "--info=all" if argument in ("--info", "-i") and "=" in after else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}: --hydra-help describes the options, --help the settings")


def hydra_override(argument: str, task: Task, *, multirun: bool = False) -> str:
    """Return an override as Hydra is to read it.

    A path that Hydra's grammar cannot read, or does not read as text, is quoted. Keys that no YAML file mentions may be
    set like any other; unknown keys are rejected later, against the signatures.

    Args:
        argument: the override as the user wrote it.
        task: the command.
        multirun: whether commas separate values to run one after the other, for paths too.

    Raises:
        ValueError: the grammar cannot read it, or a group is given something else than names of options.
    """
    key, _, value = argument.partition("=")
    if not key.lstrip("+~"):
        raise ValueError(f"cannot read {argument!r}: write NAME=VALUE, a list as [1,2]")
    parameter = parameter_of(task, key.lstrip("+"))
    is_path = parameter is not None and takes_only_a_path(parameter, value)
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if not is_path:
            raise ValueError(_unreadable(argument, error)) from error
        argument = f"{key}={quoted(value)}"
    else:
        if is_path and not _is_text(override, multirun):
            argument = f"{key}={quoted(value)}"
        _check_option(override)
    plain = "=" in argument and key.split("@")[0] not in GROUPS and key[0] not in "+~" and not key.startswith("hydra")
    return f"++{argument}" if plain else argument


def without_defaults(overrides: list[str], task: Task) -> list[str]:
    """Leave out the default of each group whose settings come from elsewhere, unless the user chooses an option.

    Args:
        overrides: as `hydra_override` returns them.
        task: the command; see `Task.replaced`.

    Returns:
        The overrides, with those that delete defaults.
    """
    values = {argument.partition("=")[0].lstrip("+"): argument.partition("=")[2] for argument in overrides}
    groups = [
        group
        for setting, replaced in task.replaced.items()
        if values.get(setting, "null") not in ("", "null")
        for group in replaced
        if group not in values
    ]
    return [*overrides, *(f"~{group}" for group in groups)]


def _is_text(override: Override, multirun: bool) -> bool:
    """Whether Hydra reads a value as text, as null, or as values to run one after the other."""
    value: Any = override.value()
    return value is None or isinstance(value, str) or (multirun and override.is_sweep_override())


def _unreadable(argument: str, error: HydraException) -> str:
    key, equals, value = argument.partition("=")
    reason = str(error).splitlines()[0]
    if not (key and equals and value):
        return f"cannot read {argument!r} ({reason}): write NAME=VALUE, a list as [1,2]"
    example = shlex.quote(f"{key}={hydra_text(['a b', 'c=d']) if value.startswith('[') else quoted(value)}")
    return f"cannot read {argument!r} ({reason}): write a list as [1,2], and text with other signs in quotes: {example}"


def _check_option(override: Override) -> None:
    """Check that a group is given the name of an option, or several.

    Raises:
        ValueError: it is given something else.
    """
    group = override.key_or_group
    if group not in GROUPS or override.is_delete() or override.is_sweep_override():
        return
    value: Any = override.value()
    if not all(isinstance(name, str) for name in (value if isinstance(value, list) else [value])):
        raise unknown_name(f"option of {group}", hydra_text(value), GROUPS[group])
