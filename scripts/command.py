"""What turns a function with keyword arguments into a Hydra command with clear errors."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policy.checkpoint import SaveError
from policy.common.arguments import check_arguments, settings_of
from policy.rollout.workers import WorkerError

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in sorted(CONF.iterdir()) if list(p.glob("*.yaml"))}


def command(config_name: str, example: str) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Make a console command of a function: its keyword arguments are the command's settings.

    A setting's default lives in the function's signature. Overrides follow Hydra's grammar; a setting that the
    configuration files leave to its default can be overridden like any other.

    Args:
        config_name: of the primary file in conf/, which chooses the groups' defaults.
        example: a command line for `--help`.

    Returns:
        A decorator that gives a `main()` without arguments.
    """

    def decorate(task: Callable[..., None]) -> Callable[[], None]:
        def main() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(_help(task, config_name, example))
                return
            with _refusals():
                sys.argv[1:] = [_allow_defaulted(argument) for argument in sys.argv[1:]]
            warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
            sys.path.append(os.getcwd())  # so that env.id=my_env:MyEnv-v0 finds my_env.py where the user is
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed and lost
            run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
            with _refusals():
                run(lambda config: _run(config, task, config_name))()

        return main

    return decorate


def _allow_defaulted(argument: str) -> str:
    if not argument.startswith("-"):
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"cannot read {argument!r} ({reason}): write NAME=VALUE, a list as [1,2]") from error
    # `++` sets a key whether or not a YAML file mentions it: unknown ones are refused against the signatures, later.
    key = argument.split("=", 1)[0]
    plain = "=" in argument and key.split("@")[0] not in GROUPS and key[0] not in "-+~" and not key.startswith("hydra")
    return f"++{argument}" if plain else argument


def _run(config: DictConfig, task: Callable[..., None], config_name: str) -> None:
    with _refusals():  # inside Hydra, which would otherwise report the error in its own words as well
        settings = _settings(config, task, config_name)
        hydra_config = HydraConfig.get()
        if hydra_config.mode is RunMode.MULTIRUN and "output_dir" in inspect.signature(task).parameters:
            # Jobs that run side by side must not write into one folder.
            settings.setdefault("output_dir", Path(hydra_config.runtime.output_dir))
        task(**settings)


@contextmanager
def _refusals() -> Iterator[None]:
    """Bad input ends in one sentence and exit code 2, without a traceback."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SaveError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except WorkerError as error:
        print(f"error: {' '.join(str(error).split())}; what has finished is on disk", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _settings(config: DictConfig, task: Callable[..., None], config_name: str) -> dict[str, Any]:
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    built = {str(key): _build(str(key), value) for key, value in settings.items()}
    for name, parameter in inspect.signature(task).parameters.items():
        if parameter.default is parameter.empty and built.get(name) is None:
            options = f"; options: {', '.join(GROUPS[name])}" if name in GROUPS else ""
            raise ValueError(f"{name} is missing: add {name}=...{options} (--help shows an example)")
    return check_arguments(config_name, task, built, prefix="")


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


def _require(where: str, target: Callable[..., Any], settings: dict[str, Any]) -> None:
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ValueError(f"{where}.{name} is missing: add {where}.{name}=...")


def _help(task: Callable[..., None], config_name: str, example: str) -> str:
    summary = (inspect.getdoc(getattr(task, "func", task)) or "").split("\n\n")[0]
    groups = [name for name in GROUPS if f"- {name}:" in (CONF / f"{config_name}.yaml").read_text()]
    lines = [summary, "", f"Example:\n  {example}", "", "Settings (NAME=VALUE):"]
    lines += [_help_line(name, p) for name, p in inspect.signature(task).parameters.items() if name not in groups]
    lines += [_help_line(f"{group}.{name}", p) for group in groups for name, p in _group_settings(group).items()]
    lines += [
        "",
        "Groups (GROUP=OPTION, and GROUP.setting=VALUE inside one; a wrong setting is refused with the right ones):",
    ]
    return "\n".join(lines + [f"  {group:<26} {' | '.join(GROUPS[group])}" for group in groups])


def _group_settings(group: str) -> dict[str, inspect.Parameter]:
    """The settings of all options of a group that name what they build."""
    options = [OmegaConf.load(CONF / group / f"{option}.yaml") for option in GROUPS[group]]
    paths = [option._target_ for option in options if isinstance(option, DictConfig) and "_target_" in option]
    targets = [hydra.utils.get_object(path) for path in paths]
    return {name: p for target in targets for name, p in inspect.signature(target).parameters.items()}


def _help_line(name: str, parameter: inspect.Parameter) -> str:
    default = "required" if parameter.default is parameter.empty else f"default {parameter.default}"
    return f"  {name:<26} {parameter.annotation!s:<20} {default}"
