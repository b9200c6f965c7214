"""Fixtures shared by the tests."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock

from policy import PolicyConfig
from policy.data.demonstrations import Demonstrations

# Small networks run no faster on two threads, and tests should not depend on how many there are.
torch.set_num_threads(1)

# Demonstrations that tests convert go to a cache of their own, which is removed with the process.
_CACHE = tempfile.TemporaryDirectory(prefix="ddim-policy-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# How many examples a property is tried on: few while developing (`make test`), many in `make test-all`.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None)
hypothesis.settings.register_profile("full", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

ROOT = Path(__file__).resolve().parents[1]
# The rounding of a sum depends on the number of threads: runs that are compared bit for bit use one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# Where pip installs the console commands.
PROGRAMS = Path(sys.executable).parent

# How commands measure latency in this process: for a moment, and not again because the tests keep the machine busy.
BRIEFLY = {"ROUNDS": 3, "WARM_UP": 0.02, "ATTEMPTS": 1}

Done = subprocess.CompletedProcess[str]


def small_config(obs_size: int, hidden_size: int) -> PolicyConfig:
    """A policy that trains and loads in no time, with observations of three numbers and actions of two."""
    return PolicyConfig(
        observation_shapes={"state": (3,)},
        action_dim=2,
        obs_size=obs_size,
        encoder={"name": "state", "hidden_size": hidden_size},
        denoiser={"name": "modulated_mlp", "hidden_size": hidden_size, "num_layers": 1},
        schedule={"num_steps": 20, "beta_schedule": "squaredcos_cap_v2"},
    )


# A policy for the planar environment that acts in no time.
PLANAR_CONFIG = PolicyConfig(
    observation_shapes={"state": (4,)},
    action_dim=2,
    obs_size=16,
    encoder={"name": "state", "hidden_size": 16},
    denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
    schedule={"num_steps": 20, "beta_schedule": "squaredcos_cap_v2"},
)


def randomize(policy: torch.nn.Module) -> None:
    """Give a policy weights as if it were trained.

    Gates and output layers are initialised to zero: with those weights, every code path that returns zeros would pass.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def demonstrations() -> Demonstrations:
    """Five short episodes of a made-up task: the action points from the state to the origin."""
    generator = np.random.default_rng(0)
    ends = np.cumsum([7, 12, 3, 20, 9]).astype(np.int64)
    states = generator.uniform(-1, 1, (ends[-1], 3)).astype(np.float32)
    return Demonstrations(observations={"state": states}, actions=-states[:, :2], episode_ends=ends)


# --- the commands ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_a_process(*argv: str, cores: int = 1) -> Iterator[None]:
    """Let code run in this process as in one of its own, and undo what a command changes of its process.

    A command changes `sys.argv`, `sys.path`, the environment and how warnings are shown. Warnings go to standard error,
    each once, although pytest collects them elsewhere.

    Args:
        *argv: of the process.
        cores: that rollouts find; with one, they start no processes. No result depends on it.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", list(argv))
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("policy.rollout.workers.available_cores", lambda: cores)
        for name, value in BRIEFLY.items():
            patch.setattr(f"policy.rollout.latency.{name}", value)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(warnings, "showwarning", _show_warning)
        warnings.simplefilter("default")
        for ignored in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", ignored)
        yield


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., Done]:
    """Run a command in this process, where that makes no difference: a process each would take minutes.

    The returned function takes the command's name, its settings and the expected exit code (`check`, None for any), and
    gives what the process would have printed.
    """

    def run(name: str, *overrides: object, check: int | None = 0, cores: int = 1) -> Done:
        out, err, code = io.StringIO(), io.StringIO(), 0
        arguments = [f"{name}.py", *map(str, overrides)]
        main = importlib.import_module(f"scripts.{name}").main
        with as_a_process(*arguments, cores=cores), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        done = Done(arguments, code, out.getvalue(), err.getvalue())
        assert check in (None, code), _said(done)
        return done

    return run


@pytest.fixture(scope="session")
def run_script() -> Callable[..., Done]:
    """Run a command in a process of its own, the way a user types it; gives the finished process."""

    def run(name: str, *overrides: object, check: int = 0) -> Done:
        command = [sys.executable, ROOT / "scripts" / f"{name}.py", *map(str, overrides)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)
        assert done.returncode == check, _said(done)
        return done

    return run


@pytest.fixture
def plain_reports(monkeypatch) -> None:
    """Leave the pictures of sweeps out: they take seconds, and `tests/sweep` looks at them."""

    def no_plot(rows: object, files: list[Path], **_: object) -> None:
        for file in files:
            file.touch()

    monkeypatch.setattr("policy.commands.sweep.plot_rows", no_plot)


def _said(done: Done) -> str:
    return f"{done.args}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


# --- made once for all processes of pytest-xdist -----------------------------------------------------------------


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once per test run: `made_once(name, make)` calls `make(folder)` in the first process to ask."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make: Callable[[Path], None]) -> Path:
        folder, finished = shared / f"shared-{name}", shared / f"shared-{name}.finished"
        with FileLock(f"{folder}.lock"):
            if not finished.exists():
                folder.mkdir()  # what failed half-way in another process fails here too, and is not used
                make(folder)
                finished.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def planar_run(made_once) -> Path:
    """Demonstrations and a briefly trained policy of the planar environment, made by the real console commands.

    `collect.txt` and `train.txt` hold what the commands printed. Tests only read this folder.
    """
    return made_once("planar", _make_planar_run)


def _make_planar_run(folder: Path) -> None:
    for name, *overrides in (
        ("collect", "env=planar", "episodes=40"),
        (
            "train",
            "experiment=planar",
            f"dataset.path={folder}/planar-v0",
            "train.steps=300",
            "train.batch_size=64",
            "train.warmup_steps=20",
            "train.rollout_every=300",
            "train.rollout_episodes=2",
        ),
    ):
        command = [PROGRAMS / f"ddim-{name}", *overrides, f"output_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=300)
        assert done.returncode == 0, _said(done)
        (folder / f"{name}.txt").write_text(done.stdout)
