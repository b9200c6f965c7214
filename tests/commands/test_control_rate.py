"""The demonstrations' control rate is kept, and a different one of the environment is said once, in every place."""

import json

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import envs
from policy import load_checkpoint
from policy.common.control_rate import describe_mismatch, stated_rate
from policy.sweep.merging import read_swept

FAST = """
import gymnasium, numpy as np

class Fast(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    dt = 0.02
    observation_space = gymnasium.spaces.Box(-9, 9, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(4, np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), 0.0, False, False, {"is_success": False}

gymnasium.register("Fast-v0", entry_point=Fast, max_episode_steps=3)
"""
ENV = ("env=gym", "env.id=fast_env:Fast-v0")
SAID = "demonstrated at 10 Hz, the environment steps at 50 Hz"


def write_lerobot(folder, fps):
    """Two episodes of ten transitions, in LeRobot's format 3.0."""
    rng, length = np.random.default_rng(0), 10
    total = 2 * length
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    columns = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=4 * total)), 4),
        "action": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=2 * total)), 2),
        "timestamp": np.arange(total) / fps,
        "frame_index": np.arange(total) % length,
        "episode_index": np.arange(total) // length,
        "index": np.arange(total),
        "task_index": np.zeros(total, int),
    }
    pq.write_table(pa.table(columns), folder / "data/chunk-000/file-000.parquet")
    episodes = {
        "episode_index": [0, 1],
        "length": [length, length],
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        "dataset_from_index": [0, length],
        "dataset_to_index": [length, total],
    }
    pq.write_table(pa.table(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "total_episodes": 2,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {
            "observation.state": {"dtype": "float64", "shape": [4]},
            "action": {"dtype": "float64", "shape": [2]},
        },
    }
    (folder / "meta/info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_command):
    """A policy trained at 10 Hz beside an environment of 50 Hz, and what the training printed."""
    folder = tmp_path_factory.mktemp("rates")
    (folder / "fast_env.py").write_text(FAST)
    write_lerobot(folder / "d", fps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = ("dataset=lerobot", "dataset.path=d", *ENV, "train.steps=2", "train.batch_size=4", "obs_size=16")
        small = ("denoiser.hidden_size=16", "denoiser.num_layers=1", "tracker=none", "output_dir=run")
        yield folder, run_command("train", *settings, *small)


@pytest.fixture(autouse=True)
def _here(trained, monkeypatch):
    monkeypatch.chdir(trained[0])


def test_training_keeps_the_rate_in_the_checkpoint_and_says_once_that_it_differs(trained):
    folder, done = trained
    assert done.stderr.count(SAID) == 1
    training = load_checkpoint(folder / "run/checkpoint").training
    assert (training["rate_hz"], training["episodes"], training["transitions"]) == (10, 2, 20)


def test_a_rollout_says_it_once_and_in_its_summary(run_command, tmp_path):
    settings = ("checkpoint=run/checkpoint", "episodes=1", "sampler.ddim_steps=1", "tracker=none")
    done = run_command("rollout", *settings, *ENV, f"output_dir={tmp_path}/a")
    assert (done.stdout + done.stderr).count(SAID) == 1
    summary = json.loads((tmp_path / "a/rollout.json").read_text())
    assert [said.startswith(SAID) for said in summary["warnings"]] == [True]
    assert (summary["episodes"], summary["success_rate"]) == (1, 0)
    # The rate that the user states is the environment's: nothing differs any more.
    done = run_command("rollout", *settings, *ENV, "env.control_hz=10", f"output_dir={tmp_path}/b")
    assert "demonstrated" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "b/rollout.json").read_text())["warnings"] == []
    # Against the clock, the controller has a rate of its own.
    done = run_command("rollout", *settings, *ENV, "env.control_hz=10", "control_rate=100", f"output_dir={tmp_path}/c")
    assert "demonstrated at 10 Hz, the controller acts at 100 Hz" in done.stderr


def test_a_sweep_says_it_once_and_in_its_json_and_its_report_and_merging_keeps_it(run_command, plain_reports, tmp_path):
    settings = ("checkpoint=run/checkpoint", *ENV, "ddim_steps=1", "episodes=2", "workers=1", "videos=0")
    done = run_command("sweep", *settings, "tracker=none", f"output_dir={tmp_path}")
    assert (done.stdout + done.stderr).count(SAID) == 1
    (said,) = json.loads((tmp_path / "sweep.json").read_text())["warnings"]
    assert said.startswith(SAID)
    assert SAID in (tmp_path / "report.html").read_text()
    assert read_swept([tmp_path]).warnings == [said]


def test_our_own_demonstrations_state_the_rate_of_their_environment(planar_run):
    assert load_checkpoint(planar_run / "checkpoint").training["rate_hz"] == envs.make("planar").metadata["render_fps"]


@pytest.mark.parametrize("rate", [None, "10", True, 0, -5, float("nan"), float("inf"), 10**400, [10]])
def test_what_is_not_a_rate_is_not_stated(rate):
    assert stated_rate(rate) is None


@pytest.mark.parametrize(
    ("demonstrated", "environment", "control_rate"),
    [(None, 50, 20), (10, None, None), (10, 10, None), (30, 29.97, None), (10, None, 10), (10, 10.1, 9.9)],
)
def test_rates_that_are_not_known_or_not_different_are_not_mentioned(demonstrated, environment, control_rate):
    assert describe_mismatch(demonstrated, environment, control_rate) is None


def test_only_a_rollout_in_real_time_is_told_to_choose_its_control_rate():
    assert "Choose an environment of 10 Hz, or resample" in describe_mismatch(10, 20)
    assert "Choose an environment and a control_rate= of 10 Hz, or resample" in describe_mismatch(10, 20, 10)


@pytest.mark.parametrize(
    ("stated", "rate"),
    [
        ({}, None),
        ({"dt": 0.05}, 20),
        ({"dt": np.float32(0.05)}, 20),
        ({"dt": 0.01, "control_hz": 10}, 10),  # as gym-pusht: dt is the physics'
        ({"control_freq": 20}, 20),
        ({"dt": -1}, None),
        ({"dt": "fast"}, None),
    ],
)
def test_the_rate_of_a_simulator_is_never_guessed(stated, rate, monkeypatch):
    space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    members = {"observation_space": space, "action_space": space, "metadata": {"render_modes": []}, **stated}
    simulator = type("Simulator", (gymnasium.Env,), members)
    monkeypatch.setitem(gymnasium.registry, "Stated-v0", gymnasium.envs.registration.EnvSpec("Stated-v0", simulator))
    found = envs.make("gym", id="Stated-v0", max_episode_steps=5).metadata.get("render_fps")
    assert found == (None if rate is None else pytest.approx(rate))
