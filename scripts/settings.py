"""The settings of a command are checked by name and type before anything is imported or opened, and then built."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from envs import families
from policy.common.arguments import Target, check_arguments, check_names, did_you_mean, settings_of
from policy.common.modules import FUNCTIONS
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
# Parameters of a group's options that the command passes itself.
PASSED = {"tracker": ("folder", "config"), "env": ("render_mode",)}
# The setting that every command has.
PLUGINS = inspect.Parameter("plugins", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=list[str])
READ = "policy.data.reading.read_demonstrations"

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The function behind a command.

    Attributes:
        name: name of the command and of its primary file in conf/, which chooses the groups' defaults.
        target: the function, as `module:name`; it is imported once its settings are valid. A function whose first
            parameter is `make_env` is given `make_env`.
        inline: settings classes as `module:name`, by the parameter of the function that takes the settings which the
            user gives, by name; the fields of such a class are settings of the command itself.
        alternatives: settings that make a part superfluous, to that part; it is left out where it is not complete.
        replaced: settings that bring the values of groups with them, to those groups: they have no defaults then, and
            single settings may be given without the name of a part.
        check_first: a function, as `module:name`, that checks settings before the dataset is read.
        notes_given: `GROUP.setting` that receives the names of the settings on the command line, where the group is
            chosen.
        goes_with: settings by a setting that takes no other ones beside it.
        excludes: settings by a setting beside which they must be off, if they are given.
    """

    name: str
    target: str
    inline: Mapping[str, str] = field(default_factory=dict)
    alternatives: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, Sequence[str]] = field(default_factory=dict)
    check_first: str | None = None
    notes_given: str | None = None
    goes_with: Mapping[str, Sequence[str]] = field(default_factory=dict)
    excludes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @functools.cached_property
    def declaration(self) -> Declaration:
        """The function's declaration, read from its source."""
        return declaration_of(self.target)

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The command's settings by name: the function's parameters, with the inlined ones spread out."""
        found: dict[str, inspect.Parameter] = {}
        for name, parameter in self.declaration.signature.parameters.items():
            if name in self.inline:
                found |= declaration_of(self.inline[name]).signature.parameters
            elif name != "make_env":
                found[name] = parameter
        return found

    @property
    def groups(self) -> list[str]:
        """The groups of settings that the command has, besides the presets in `experiment`."""
        return [name for name in GROUPS if name in self.parameters]

    def check(self, settings: Settings) -> None:
        """Check every setting against the source of the part that it belongs to, without importing that part.

        A part that is not complete is taken out of `settings` where its alternative is given.

        Raises:
            ValueError: an unknown name, a value of the wrong type, or a setting that is missing.
        """
        parameters = self.parameters
        replaced = {group for name in self.replaced if settings.get(name) is not None for group in self.replaced[name]}
        for name, value in settings.items():
            if name in parameters and isinstance(value, dict) and not (name in replaced and "name" not in value):
                _check_node(name, value)
        known = inspect.Signature([*parameters.values(), PLUGINS])
        for name in settings.keys() - known.parameters.keys():
            _refuse_without_its_group(self.name, name, settings, self.groups)
        check_arguments(self.name, Declaration(known, ""), settings, prefix="")
        for name, beside in self.goes_with.items():
            others = [other for other in settings if settings[other] is not None and other not in {name, *beside}]
            if settings.get(name) is not None and others:
                raise ValueError(
                    f"{name}= takes only {', '.join(beside)} beside it: leave {', '.join(f'{o}=' for o in others)} out"
                )
        for name, excluded in self.excludes.items():
            others = [other for other in excluded if settings.get(other)]
            if settings.get(name) is not None and others:
                raise ValueError(f"{name}= goes without {', '.join(f'{o}=' for o in others)}: leave them out")
        for given, part in self.alternatives.items():
            if settings.get(given) is not None and _missing(_declared(part, settings[part]), settings[part]):
                del settings[part]
        for name, value in settings.items():
            if not isinstance(value, dict) or "_target_" not in value:
                continue
            if name in TARGETS or not value.get("_partial_", False):  # a command completes the other partials itself
                _require(name, _declared(name, value), value)
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and settings.get(name) is None:
                options = f"; options: {', '.join(GROUPS[name])}" if name in GROUPS else ""
                raise ValueError(f"{name} is missing: add {name}=...{options} (--help shows an example)")

    def note_given(self, settings: Settings, overrides: Sequence[str]) -> None:
        """Add the names of the settings on the command line to the setting that receives them, see `notes_given`."""
        group, _, name = (self.notes_given or "").partition(".")
        chosen = settings.get(group)
        if isinstance(chosen, dict) and isinstance(before := chosen.get(name, []), list):
            chosen[name] = [*before, *(override.partition("=")[0].lstrip("+~") for override in overrides)]

    def run(self, settings: Settings) -> None:
        """Build the parts that the settings describe, the dataset last, and call the function."""
        function = load(self.target)
        built = {name: _build(name, value) for name, value in settings.items() if name != "dataset"}
        for name, target in self.inline.items():
            fields = declaration_of(target).signature.parameters
            given = {key: built.pop(key) for key in fields if key in built}
            built[name] = check_arguments(self.name, target, given, prefix="")
        if self.check_first:
            check = load(self.check_first)
            takes = inspect.signature(check).parameters.keys() & built.keys()
            check(**check_arguments(self.name, check, {name: built[name] for name in takes}, prefix=""))
        if "dataset" in settings:
            built["dataset"] = _build("dataset", settings["dataset"])
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


def options_of(group: str) -> dict[str, Declaration]:
    """Return the options of a group, those of plugins included, each with the settings that a user can choose."""
    files = {name: _read_option(group, name) for name in GROUPS[group]}
    nodes = {**registered_options().get(group, {}), **files}
    return {name: _chosen_by_user(group, node) for name, node in nodes.items()}


def _read_option(group: str, option: str) -> Settings:
    """Read the file of an option."""
    content = OmegaConf.to_object(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def _chosen_by_user(group: str, node: Settings) -> Declaration:
    """Return the declaration of what an option builds, without the parameters that the command passes itself."""
    if group in REGISTRIES:
        declared, passed = declaration_of(REGISTRIES[group].declared(node["name"])), True
    elif group == "env":
        declared, passed = declared_settings(node["name"]), False
    elif group in TARGETS:
        declared, passed = declaration_of(TARGETS[group]), False
    elif "_target_" in node:
        declared, passed = _declared(group, node), bool(node.get("_partial_", False))
    else:
        declared, passed = Declaration(inspect.Signature(), ""), False
    kept = [
        parameter.replace(default=node.get(name, parameter.default))
        for name, parameter in declared.signature.parameters.items()
        if name not in PASSED.get(group, ()) and not (passed and parameter.default is parameter.empty)
    ]
    return Declaration(inspect.Signature(kept), declared.doc)


def parameter_of(task: Task, name: str) -> inspect.Parameter | None:
    """Return the declaration of a setting, such as `train.learning_rate`, or None if there is none of that name."""
    group, dot, setting = name.partition(".")
    if not dot:
        return task.parameters.get(name)
    if group not in task.groups:
        return None
    return next(
        (o.signature.parameters[setting] for o in options_of(group).values() if setting in o.signature.parameters), None
    )


def takes_only_a_path(parameter: inspect.Parameter, text: str) -> bool:
    """Whether a setting takes a path, and this text is not written as a list of paths."""
    hints = [parameter.annotation, *typing.get_args(parameter.annotation)]
    lists = any(hint is list or typing.get_origin(hint) is list for hint in hints)
    return Path in hints and not (lists and text.startswith("[") and text.endswith("]"))


def _check_node(where: str, node: Settings) -> None:
    """Check a group's settings, and those of the nodes inside it."""
    for key, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            _check_node(f"{where}.{key}", value)
    settings = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    if "_target_" in node:
        check_arguments(where, _without(PASSED.get(where, ()), _declared(where, node)), settings)
    elif where in REGISTRIES:
        check_spec(REGISTRIES[where], node)
    elif where == "env" and "name" in node:
        check_arguments(where, _without(PASSED[where], declared_settings(settings.pop("name"))), settings)
    elif where == "schedule":
        check_arguments(where, TARGETS[where], settings)
    elif where in TARGETS:  # names only: in a sweep, each value may be a list
        check_names(where, TARGETS[where], settings)


def _without(names: Sequence[str], declared: Declaration) -> Declaration:
    """A declaration without these parameters."""
    kept = [parameter for name, parameter in declared.signature.parameters.items() if name not in names]
    return Declaration(declared.signature.replace(parameters=kept), declared.doc)


def _refuse_without_its_group(where: str, name: str, settings: Settings, groups: Iterable[str]) -> None:
    """Reject an unknown setting that one of the command's groups has, such as `ddim_steps` for `sampler.ddim_steps`."""
    declared = {group: declaration_of(TARGETS[group]) for group in groups if group in TARGETS}
    for group, node in settings.items():
        if isinstance(node, dict) and "_target_" in node:
            declared[group] = _declared(group, node)
    for group, declaration in declared.items():
        if name in declaration.signature.parameters:
            raise ValueError(f"unknown setting of {where} {name!r} (did you mean {group}.{name}=...?)")


def _declared(where: str, node: Any) -> Declaration:
    """Return the declaration of what a node builds.

    Raises:
        ValueError: there is nothing of that name, or it is not a function or class.
    """
    target = str(node["_target_"])
    module, _, name = target.rpartition(".")
    try:
        return declaration_of(f"{module}:{name}")
    except Exception as error:  # importing a module of the user can raise anything
        hint = did_you_mean(target, [*_targets(where), *_names_beside(module)])
        raise ValueError(
            f"{where}._target_ should be a function or class as package.module.name; got {target!r}{hint}:"
            f" {type(error).__name__}: {error}"
        ) from error


def _targets(where: str) -> list[str]:
    """Return what the options of a group build, as the files in conf/ name it."""
    options = [_read_option(where, name) for name in GROUPS.get(where, [])]
    return sorted({str(option["_target_"]) for option in options if "_target_" in option})


def _names_beside(module: str) -> list[str]:
    """Return the full names in a module that was imported or can be found beside others."""
    found = sys.modules.get(module)
    names = [name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name))]
    return [f"{module}.{name}" for name in names]


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
        if where in TARGETS:  # what the command leaves open it completes; a value outside its range is refused now
            target(**checked)
        return functools.partial(target, **checked)
    _require(where, target, checked)
    with settings_of(where, checked):
        return target(**checked)


def _require(where: str, target: Target, settings: Settings) -> None:
    for name in _missing(target, settings):
        if where in FUNCTIONS:
            add = f"{where}._partial_=true, so that the function is called with each episode, and not now"
        else:
            add = f"{where}.{name}=..."
        raise ValueError(f"{where}.{name} is missing: add {add}")


def _missing(target: Target, settings: Settings) -> list[str]:
    parameters = declaration_of(target).signature.parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name not in settings]
