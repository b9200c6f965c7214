"""The settings of a command are checked by name and type before anything is imported or opened, and then built."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from envs import families
from policy.common.arguments import check_arguments, check_names, settings_of
from policy.common.registry import Registry, check_spec
from policy.common.signatures import Declaration, declaration_of, load
from policy.data.formats import FORMATS
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS
from scripts.environments import declared_settings, make_env

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in sorted(CONF.iterdir()) if list(p.glob("*.yaml"))}
# Groups whose options are registered parts, and groups whose settings are the arguments of one function or class.
REGISTRIES: dict[str, Registry[Any]] = {"denoiser": DENOISERS, "encoder": ENCODERS}
TARGETS = {
    "schedule": "policy.diffusion.schedule:make_schedule",
    "sampler": "policy.diffusion.sampler:Sampler",
    "controller": "policy.control.timeline:ControllerSettings",
}
# The setting that every command has.
PLUGINS = inspect.Parameter("plugins", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=list[str])
READ = "policy.data.reading.read_demonstrations"

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The function behind a command.

    Attributes:
        name: name of the command and of its primary file in conf/.
        target: the function, as `module:name`; it is imported once its settings are valid.
        inline: settings classes as `module:name`, by the parameter of the function that takes one; the fields of such a
            class are settings of the command itself.
    """

    name: str
    target: str
    inline: Mapping[str, str] = field(default_factory=dict)

    @property
    def declaration(self) -> Declaration:
        """The function's declaration, read from its source."""
        return declaration_of(self.target)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The command's settings by name: the function's parameters, with the inlined ones spread out."""
        found: dict[str, inspect.Parameter] = {}
        for name, parameter in self.declaration.signature.parameters.items():
            if name in self.inline:
                found |= declaration_of(self.inline[name]).signature.parameters
            elif name != "make_env":
                found[name] = parameter
        return found

    def check(self, settings: Settings) -> None:
        """Check every setting against the source of the part that it belongs to, without importing that part.

        Raises:
            ValueError: an unknown name, a value of the wrong type, or a setting that is missing.
        """
        parameters = self.parameters
        for name, value in settings.items():
            if name in parameters and isinstance(value, dict):
                _check_node(name, value)
        known = inspect.Signature([*parameters.values(), PLUGINS])
        check_arguments(self.name, Declaration(known, ""), settings, prefix="")
        for name, value in settings.items():
            if isinstance(value, dict) and "_target_" in value and not value.get("_partial_", False):
                _require(name, _path(value), value)
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and settings.get(name) is None:
                options = f"; options: {', '.join(GROUPS[name])}" if name in GROUPS else ""
                raise ValueError(f"{name} is missing: add {name}=...{options} (--help shows an example)")

    def run(self, settings: Settings) -> None:
        """Build the parts that the settings describe, the dataset last, and call the function."""
        function = load(self.target)
        built = {name: _build(name, settings[name]) for name in sorted(settings, key=lambda name: name == "dataset")}
        for name, target in self.inline.items():
            fields = declaration_of(target).signature.parameters
            built[name] = load(target)(**{key: built.pop(key) for key in fields if key in built})
        if "make_env" in self.declaration.signature.parameters:
            function = functools.partial(function, make_env)
        function(**check_arguments(self.name, function, built, prefix=""))


def registered_options() -> dict[str, dict[str, Settings]]:
    """The registered parts that GROUP=NAME may choose, each with the settings that choose it."""
    return {
        **{group: {name: {"name": name} for name in registry} for group, registry in REGISTRIES.items()},
        "env": {name: {"name": name} for name in families.FAMILIES},
        "dataset": {name: {"_target_": READ, "format": name} for name in FORMATS},
    }


def add_registered_options() -> None:
    """Let GROUP=NAME choose registered parts that have no file in conf/, such as those of plugins."""
    store = ConfigStore.instance()
    for group, options in registered_options().items():
        for name, node in options.items():
            if not (CONF / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node=node)


def _check_node(where: str, node: Settings) -> None:
    """Check a group's settings, and those of the nodes inside it."""
    for key, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            _check_node(f"{where}.{key}", value)
    settings = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    if "_target_" in node:
        check_arguments(where, _path(node), settings)
    elif where in REGISTRIES:
        check_spec(REGISTRIES[where], node)
    elif where == "env" and "name" in node:
        check_arguments(where, declared_settings(settings.pop("name")), settings)
    elif where == "schedule":
        check_arguments(where, TARGETS[where], settings)
    elif where in TARGETS:  # names only: in a sweep, each value may be a list
        check_names(where, TARGETS[where], settings)


def _path(node: Any) -> str:
    """Return the `module:name` of the object that a node builds."""
    module, _, name = str(node["_target_"]).rpartition(".")
    return f"{module}:{name}"


def _build(where: str, node: Any) -> Any:
    """Build nodes with a `_target_`, from the inside out, each checked against its signature first."""
    if not isinstance(node, dict):
        return node
    settings = {key: _build(f"{where}.{key}", value) for key, value in node.items()}
    if "_target_" not in settings:
        return settings
    target = hydra.utils.get_object(settings.pop("_target_"))
    partial = settings.pop("_partial_", False)
    checked = check_arguments(where, target, settings)
    if partial:
        return functools.partial(target, **checked)
    _require(where, target, checked)
    with settings_of(where, checked):
        return target(**checked)


def _require(where: str, target: str | Callable[..., Any], settings: Settings) -> None:
    for name, parameter in declaration_of(target).signature.parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ValueError(f"{where}.{name} is missing: add {where}.{name}=...")


def help_text(task: Task, example: str) -> str:
    """Return the text of `--help`: a summary, an example, all settings with their defaults, and the groups."""
    groups = [name for name in GROUPS if f"- {name}:" in (CONF / f"{task.name}.yaml").read_text()]
    summary = task.declaration.doc.split("\n\n")[0]
    lines = [summary, "", f"Example:\n  {example}", "", "Settings (NAME=VALUE):"]
    lines += [_help_line(name, p) for name, p in task.parameters.items() if name not in groups]
    lines += [_help_line(f"{group}.{name}", p) for group in groups for name, p in _group_settings(group).items()]
    lines += [f"  {'plugins':<26} {'list[str]':<20} modules that register parts of your own"]
    lines += [
        "",
        "Groups (GROUP=OPTION, and GROUP.setting=VALUE inside one; an unknown one is reported with the valid ones):",
    ]
    return "\n".join(lines + [f"  {group:<26} {' | '.join(GROUPS[group])}" for group in groups])


def _group_settings(group: str) -> dict[str, inspect.Parameter]:
    """Return the settings of all options of a group that have a `_target_`."""
    options = [OmegaConf.load(CONF / group / f"{option}.yaml") for option in GROUPS[group]]
    return {
        name: parameter
        for option in options
        if "_target_" in option
        for name, parameter in declaration_of(_path(option)).signature.parameters.items()
        # The command itself passes the required arguments of a node with `_partial_`.
        if not ("_partial_" in option and parameter.default is parameter.empty)
    }


def _help_line(name: str, parameter: inspect.Parameter) -> str:
    default = "required" if parameter.default is parameter.empty else f"default {parameter.default}"
    hint = re.sub(r"\b(pathlib|typing|collections\.abc)\.", "", inspect.formatannotation(parameter.annotation))
    return f"  {name:<26} {hint:<20} {default}"
