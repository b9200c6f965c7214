"""Fixtures shared by the tests."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from policy import PolicyConfig
from policy.data.demonstrations import Demonstrations

# Small networks run no faster on two threads, and tests should not depend on how many there are.
torch.set_num_threads(1)

# Converted demonstrations of the tests are gone with the tests.
_CACHE = tempfile.TemporaryDirectory(prefix="ddim-policy-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

ROOT = Path(__file__).resolve().parents[1]
# A sum's rounding depends on the number of threads: runs that are compared bit for bit use one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def small_config(obs_size: int, hidden_size: int) -> PolicyConfig:
    """A policy that trains and loads in no time: three numbers seen, two to do."""
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
    """Weights as if trained. Gates and outputs start at zero: with those, everything that returns zeros would pass."""
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


@pytest.fixture(scope="session")
def run_script():
    """Run a script the way a user types it; gives the finished process."""

    def run(name: str, *overrides: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / f"{name}.py", *overrides],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
            timeout=300,
        )
        assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def planar_run(run_script, tmp_path_factory) -> Path:
    """Demonstrations and a briefly trained policy of the planar environment, made with the real commands."""
    folder = tmp_path_factory.mktemp("planar")
    run_script("collect", "env=planar", "episodes=40", f"output_dir={folder}")
    run_script(
        "train",
        "experiment=planar",
        f"dataset.path={folder}/planar-v0",
        "train.steps=300",
        "train.warmup_steps=20",
        "train.rollout_every=300",
        "train.rollout_episodes=2",
        f"output_dir={folder}",
    )
    return folder
