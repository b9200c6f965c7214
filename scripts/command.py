"""Turn a function with keyword arguments into a Hydra command with clear errors."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policy.common.arguments import unknown_name
from policy.common.errors import ParityError, PeerError, SaveError, WorkerError
from policy.common.locks import check_free
from policy.common.machine import leave_children_alone, outside_current_folder, settle_home
from policy.common.modules import check_functions, named_modules, search_for, with_functions
from policy.common.output import check_writable
from policy.common.plugins import load_plugins
from policy.common.progress import close_bars, on_its_own_line
from policy.common.terminal import printable, printable_output, uncoloured
from policy.common.torchrun import check_launch, has_last_word, only_first_prints, process_group, started_world
from scripts.command_line import hydra_override, read_command_line, without_defaults
from scripts.help_text import help_text
from scripts.settings import CONF, GROUPS, Task, add_registered_options, registered_options


def command(task: Task, example: str) -> functools.partial[None]:
    """Make a console command from a function, whose keyword arguments are the command's settings.

    A setting's default is defined in the function's signature. Overrides follow Hydra's grammar; a setting that the
    configuration files do not mention can be overridden like any other.

    Args:
        task: the function and what its settings need.
        example: a command line for `--help`.

    Returns:
        A `main` that takes no arguments.
    """
    return functools.partial(_main, task, example)


def _main(task: Task, example: str) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was while modules were imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "--version" in sys.argv[1:]:
        _print_to_reader(f"ddim-policy {version('ddim-policy')}, Hydra {hydra.__version__}")
        return
    with only_first_prints(), printable_output():
        _start(task, example)


def _start(task: Task, example: str) -> None:
    warnings.formatwarning = lambda message, *_: on_its_own_line(f"warning: {printable(uncoloured(str(message)))}\n")
    with refusals():
        settle_home()
    Plugins.instance()  # Hydra looks for its own plugins now, before a setting may have the current folder searched
    with refusals():
        given = read_command_line(sys.argv[1:], task)
        _load(_plugins(given.overrides))
        if given.help_wanted:
            _print_to_reader(help_text(task, example, given.topics))
            return
        overrides = given.overrides
        if "--shell-completion" not in given.flags:  # it has words of its own
            multirun = "--multirun" in given.flags
            overrides = [hydra_override(argument, task, multirun=multirun) for argument in overrides]
            overrides = without_defaults(overrides, task)
        add_registered_options()
        if not given.flags and not any("hydra" in argument.partition("=")[0] for argument in overrides):
            # `hydra.main` would compose the configuration twice, to find out that this is a plain run.
            with hydra.initialize_config_dir(str(CONF), job_name=task.name, version_base="1.3"):
                config = hydra.compose(task.name, overrides)
            _run(config, task, overrides)
            return
    sys.argv[1:] = [*given.flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=task.name)
    with refusals(), outside_current_folder():  # launchers start processes
        run(lambda config: _run(config, task, HydraConfig.get().overrides.task, _job_folder()))()


def _print_to_reader(text: str) -> None:
    """Print a text for someone who may have read enough of it, as `head` has: the rest is nobody's loss."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends


def _plugins(arguments: list[str]) -> list[str]:
    """Return the modules that `plugins=` names. They are imported first: other arguments may choose their options."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith("plugins=")]
    return _module_names(OverridesParser.create().parse_override(given[-1]).value()) if given else []


def _load(plugins: list[str]) -> None:
    for name in plugins:
        search_for(name, f"plugins=[{name}]")
    load_plugins(plugins)


def _module_names(value: object) -> list[str]:
    """Check the value of `plugins`.

    Raises:
        ValueError: it is neither the name of a module nor a list of them.
    """
    names: list[str] = []
    for name in value if isinstance(value, list) else [value]:
        if not (isinstance(name, str) and all(part.isidentifier() for part in name.split("."))):
            raise ValueError(f"plugins takes modules as Python imports them, such as plugins=[my_own]; got {value!r}")
        names.append(name)
    return names


def _no_such_option(error: MissingConfigException) -> Exception:
    """Say a choice that a group does not have as other misspelt names are said."""
    group, _, option = (error.missing_cfg_file or "").partition("/")
    if not option and error.missing_cfg_file:
        return unknown_name("--config-name", group, (path.stem for path in CONF.glob("*.yaml")))
    if group not in GROUPS:
        return error
    registered = registered_options()
    hint = "; one of your own comes with plugins=[its module]" if group in registered else ""
    return ValueError(f"{unknown_name(group, option, {*GROUPS[group], *registered.get(group, {})})}{hint}")


def _job_folder() -> str | None:
    """The folder of a job of a multirun: jobs that run side by side must not write into one folder."""
    hydra_config = HydraConfig.get()
    return str(hydra_config.runtime.output_dir) if hydra_config.mode is RunMode.MULTIRUN else None


@contextmanager
def _left_with_content(job_folder: str | None) -> Iterator[None]:
    """Remove the folder that Hydra made for a job where the job ends without having written anything there."""
    try:
        yield
    finally:
        if job_folder:
            with suppress(OSError):  # it is not empty
                Path(job_folder).rmdir()


def _run(config: DictConfig, task: Task, overrides: Sequence[str], job_folder: str | None = None) -> None:
    with _left_with_content(job_folder), refusals():  # inside Hydra, which would otherwise report the error as well
        container = OmegaConf.to_container(config, resolve=True)
        assert isinstance(container, dict)
        settings = {str(key): value for key, value in container.items()}
        leave_children_alone()  # where a launcher started this process
        check_launch(task.name, multirun=job_folder is not None)
        _load(_module_names(settings.pop("plugins", [])))
        settings = with_functions(settings)
        for setting, module in named_modules(settings):
            search_for(module, setting)
        check_functions(settings)
        if job_folder and "output_dir" in task.parameters:
            settings.setdefault("output_dir", job_folder)
        task.check(settings)
        task.note_given(settings, overrides)
        world = started_world()
        if "output_dir" in task.parameters and world.first:  # before demonstrations are read, which may take minutes
            folder = Path(settings.get("output_dir") or "outputs").expanduser()
            check_writable(folder)
            if task.name == "train":
                check_free(folder)
        with process_group(world):
            task.run(settings)


def _remedy(error: OSError) -> str:
    """What helps against an error of the system, and what is left of the work."""
    if "No usable temporary directory" in str(error):
        return "set TMPDIR to a folder that you may write to, and give the same command again"
    # HDF5 gives the system's number in its text only.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or f"errno = {errno.ENOSPC}" in str(error)
    advice = "the disk is full: make room" if full else "mend this"
    return f"{advice} and give the same command again; finished work is on disk"


@contextmanager
def refusals() -> Iterator[None]:
    """Report errors in one sentence without a traceback, and exit with 2 for invalid input or 1 for failed work."""
    try:
        yield
    except MissingConfigException as error:
        _end(str(_no_such_option(error)), 2)
    except (HydraException, OmegaConfBaseException, ValueError, FloatingPointError) as error:
        _end(str(error), 2)
    except (SaveError, ParityError, PeerError) as error:
        _end(str(error), 1)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _end(f"a path is longer than the file system takes: {str(error.filename)[:40]!r}...", 2)
        _end(f"{error}; {_remedy(error)}", 1)
    except WorkerError as error:
        _end(f"{error}; finished work is on disk", 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not _is_interrupt(error):
            raise
        sys.exit(130)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: torch's export to ONNX makes a RuntimeError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _end(reason: str, code: int) -> NoReturn:
    """Say on a line of its own why the command ends, and end it."""
    close_bars()
    if has_last_word():
        bar = "" if started_world().first else "\n"  # the first process may have left one behind
        print(f"{bar}error: {printable(' '.join(reason.split()))}", file=sys.stderr)
    sys.exit(code)
