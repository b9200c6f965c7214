"""The text of `--help`: of a command, or of one setting, group or option, from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import shlex
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy.common.arguments import check_choice, did_you_mean
from policy.common.next_line import hydra_text
from policy.common.signatures import Unread, declaration_of
from scripts.settings import CONF, GROUPS, Task, options_of
from scripts.settings import PLUGINS as PLUGINS_PARAMETER

PLUGINS = "modules that register parts of your own"
# What stands for the value of a setting without a default, in examples.
SAMPLES = {int: 8, float: 0.5, bool: True, str: "NAME", Path: "path/to/it", list: ["NAME"], dict: {"key": 1}}


def help_text(task: Task, example: str, topics: list[str]) -> str:
    """Return the text of `--help`.

    Args:
        task: the command.
        example: a command line.
        topics: settings, groups and options (`GROUP=OPTION`) to describe; none for the whole command.

    Raises:
        ValueError: the command has none of a topic's name; the message gives the nearest.
    """
    if not topics:
        return _command_help(task, example)
    return "\n\n".join(_topic_help(task, topic) for topic in topics)


@dataclass
class _Meaning:
    """What a setting means, in the options of its group that share this meaning."""

    parameter: inspect.Parameter
    text: str
    options: list[str] = field(default_factory=list)


def _command_help(task: Task, example: str) -> str:
    """Describe a command: a summary, an example, all settings with their defaults, and the groups."""
    summary = task.declaration.doc.split("\n\n")[0]
    groups = _groups(task)
    lines = [summary, "", f"Example:\n  {example}", "", "Settings (NAME=VALUE):"]
    lines += [_line(name, p) for name, p in task.parameters.items() if name not in groups]
    lines += [line for group in task.groups for line in _lines_of(group)]
    lines += [f"  {'plugins':<26} {'list[str]':<20} {PLUGINS}"]
    lines += ["", "Groups (GROUP=OPTION, and GROUP.setting=VALUE inside one):"]
    texts = described(task.declaration.doc)
    for group in groups:
        lines += [f"  {group:<26} {' | '.join(_options(group))}", *_wrapped(texts.get(group, ""), 29)]
    return "\n".join(
        [*lines, "", f"ddim-{task.name} --help NAME describes a setting, a group, or an option GROUP=OPTION."]
    )


def _topic_help(task: Task, topic: str) -> str:
    name, _, value = topic.lstrip("+~").partition("=")
    groups = _groups(task)
    if name in groups:
        return _option_help(task, name, value) if value else _group_help(task, name)
    known = dict(every_setting(task))
    if name not in known:
        hint = did_you_mean(name, [*groups, *known])
        raise ValueError(f"{task.name} has no setting or group {name!r}{hint}: ddim-{task.name} --help lists them")
    return "\n\n".join(_setting_help(task, name, meaning) for meaning in known[name])


def _groups(task: Task) -> list[str]:
    """The groups of a command, the presets among them where it has them."""
    return [*task.groups, *(["experiment"] if task.name == "train" else [])]


def _options(group: str) -> list[str]:
    """The names of a group's options, those of plugins included."""
    return GROUPS[group] if group == "experiment" else sorted(options_of(group))


def _lines_of(group: str) -> list[str]:
    """A line for each setting of a group's options, with the defaults that it has in them."""
    found: dict[str, list[inspect.Parameter]] = {}
    for option in options_of(group).values():
        for name, parameter in option.signature.parameters.items():
            found.setdefault(name, []).append(parameter)
    return [_line(f"{group}.{name}", *parameters) for name, parameters in found.items()]


def every_setting(task: Task) -> Iterator[tuple[str, list[_Meaning]]]:
    """Yield every setting with its meanings: the options of a group can have settings of the same name."""
    docs = [task.declaration.doc, *(declaration_of(target).doc for target in task.inline.values())]
    texts = {name: text for doc in docs for name, text in described(doc).items()} | {"plugins": PLUGINS}
    for name, parameter in [*task.parameters.items(), ("plugins", PLUGINS_PARAMETER)]:
        if name not in task.groups:
            yield name, [_Meaning(parameter, texts.get(name, ""))]
    for group in task.groups:
        found: dict[str, list[_Meaning]] = {}
        for option, declaration in options_of(group).items():
            texts = described(declaration.doc)
            for name, parameter in declaration.signature.parameters.items():
                meanings = found.setdefault(name, [])
                known = (m for m in meanings if (m.parameter, m.text) == (parameter, texts.get(name, "")))
                meaning = next(known, None)
                if meaning is None:
                    meanings.append(meaning := _Meaning(parameter, texts.get(name, "")))
                meaning.options.append(f"{group}={option}")
        yield from ((f"{group}.{name}", meanings) for name, meanings in found.items())


def _setting_help(task: Task, name: str, meaning: _Meaning) -> str:
    """Describe a setting: meaning, type or choices, default and an example."""
    parameter = meaning.parameter
    optional = type(None) in typing.get_args(parameter.annotation)
    lines = [f"{name}  ({', '.join(meaning.options)})" if meaning.options else name]
    lines += _wrapped(meaning.text, 2)
    lines += [f"  values:  {_values(parameter)}{' (null)' if optional else ''}", f"  default: {_default(parameter)}"]
    return "\n".join([*lines, f"  example: ddim-{task.name} {_example(name, parameter)}"])


def _group_help(task: Task, group: str) -> str:
    """Describe a group: its options and all their settings."""
    options = [
        f"  {group}={option:<{24 - len(group)}} {_comment(group, option)}".rstrip() for option in _options(group)
    ]
    lines = [f"{group}: choose one of its options, GROUP=OPTION", *options]
    if group != "experiment":
        lines += ["Settings (NAME=VALUE):", *_lines_of(group)]
    return "\n".join([*lines, f"  example: ddim-{task.name} {group}={_options(group)[0]}"])


def _option_help(task: Task, group: str, option: str) -> str:
    """Describe an option of a group: its comment, what its file sets, and its settings."""
    check_choice(f"option of {group}", option, _options(group))
    file = CONF / group / f"{option}.yaml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("#")] if file.exists() else []
    lines = [f"{group}={option}", f"  {_comment(group, option)}", *(f"    {line}" for line in kept if line.strip())]
    if group != "experiment":
        parameters = options_of(group)[option].signature.parameters
        lines += ["Settings (NAME=VALUE):", *(_line(f"{group}.{name}", p) for name, p in parameters.items())]
    return "\n".join([*(line for line in lines if line.strip()), f"  example: ddim-{task.name} {group}={option}"])


def _wrapped(text: str, indent: int) -> list[str]:
    """The lines of a text, indented."""
    return textwrap.wrap(text, 110, initial_indent=indent * " ", subsequent_indent=indent * " ")


def _comment(group: str, option: str) -> str:
    """The first comment in an option's file, or the summary of what it builds."""
    file = CONF / group / f"{option}.yaml"
    comments = re.findall(r"^# (?!@)(.*)", file.read_text(), re.MULTILINE) if file.exists() else []
    return " ".join(comments) if comments or group == "experiment" else options_of(group)[option].doc.split("\n\n")[0]


def described(doc: str) -> dict[str, str]:
    """Return the text of each argument or attribute that a docstring of Google's style describes."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:(?: +.*)?(?:\n|$))+)", doc, re.MULTILINE)
    entries = [re.split(r"^ {4}(?! )", section, flags=re.MULTILINE)[1:] for section in sections]
    pairs = [entry.partition(":") for section in entries for entry in section]
    return {name.lstrip("*"): " ".join(text.split()) for name, _, text in pairs}


def _line(name: str, *parameters: inspect.Parameter) -> str:
    """A setting with its type and its default, or with those of several options that have it."""
    types = dict.fromkeys(_type(one.annotation) for one in parameters)
    defaults = dict.fromkeys(map(_default, parameters))
    said = "" if all(map(_is_required, parameters)) else "default "
    return f"  {name:<26} {' or '.join(types):<20} {said}{' or '.join(defaults)}"


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _default(parameter: inspect.Parameter) -> str:
    return "required" if _is_required(parameter) else str(parameter.default)


def _type(annotation: Any) -> str:
    return re.sub(r"\b(pathlib|typing|collections\.abc)\.", "", inspect.formatannotation(annotation))


def _values(parameter: inspect.Parameter) -> str:
    """The choices of a setting, or its type."""
    if typing.get_origin(parameter.annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(parameter.annotation)))
    return _type(parameter.annotation)


def _example(name: str, parameter: inspect.Parameter) -> str:
    """An override for an example, for the shell: with the default, or a value of the type where there is none."""
    value = parameter.default
    if value in (parameter.empty, None, (), []) or isinstance(value, Unread):
        hints = [parameter.annotation, *typing.get_args(parameter.annotation)]
        plain = [typing.get_origin(hint) or hint for hint in hints]
        value = next((SAMPLES[hint] for hint in plain if hint in SAMPLES), "VALUE")
    return shlex.quote(f"{name}={hydra_text(value)}")
