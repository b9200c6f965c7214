"""Every format trains a policy that acts, as a user types it: `pytest -m slow tests/test_train_formats.py`."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"
PUSHT = SHARED / "pusht_cchi_v7_replay.zarr.zip"
LEROBOT = SHARED / "pusht_lerobot_v3"
ROBOMIMIC = Path(__file__).parents[1] / "data" / "robomimic.hdf5"

pytestmark = pytest.mark.slow


@pytest.fixture
def trained(run_script, tmp_path):
    """Train for a few hundred steps; gives the run's folder once its loss has fallen."""

    def train(*overrides, steps=300):
        run_script(
            "train",
            f"dataset.cache_dir={tmp_path / 'cache'}",
            f"train.steps={steps}",
            "train.rectify_steps=0",  # its loss says nothing of the demonstrations
            "train.warmup_steps=20",
            "train.log_every=20",
            "train.rollout_every=0",
            "tracker=none",
            f"output_dir={tmp_path / 'run'}",
            *overrides,
        )
        history = json.loads((tmp_path / "run" / "checkpoint" / "training.json").read_text())["history"]
        losses = [entry["train/loss"] for entry in history if "train/loss" in entry]
        assert losses[-1] < 0.7 * losses[0], losses
        return tmp_path / "run"

    return train


def roll_out(run_script, run, *overrides):
    run_script(
        "rollout", f"checkpoint={run / 'checkpoint'}", "episodes=2", "num_envs=2", f"output_dir={run}", *overrides
    )
    episodes = json.loads((run / "episodes.json").read_text())
    assert [episode["seed"] for episode in episodes] == [100_000, 100_001]
    assert all(0 <= episode["score"] <= 1 and episode["steps"] >= 1 for episode in episodes)


@pytest.mark.skipif(not PUSHT.exists(), reason="needs the public Push-T demonstrations, see docs/pusht.md")
@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("pusht_state", []),
        ("pusht_keypoints", []),
        pytest.param("pusht_corners", [], marks=pytest.mark.slow),
        ("pusht_image", ["train.batch_size=32", "dataset.max_episodes=20"]),
    ],
)
def test_the_push_t_replay_buffer(trained, run_script, experiment, overrides):
    run = trained(f"experiment={experiment}", f"dataset.path={PUSHT}", *overrides)
    roll_out(run_script, run)


@pytest.mark.skipif(not LEROBOT.exists(), reason="needs the five Push-T episodes as a LeRobot v3 set")
@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("pusht_state", ["dataset.observation_keys=[state]"]),
        (
            "pusht_image",
            [
                "dataset.observation_keys={image:observation.image,state:observation.state}",
                "dataset.relabel=null",
                "dataset.transform._target_=envs.pusht_agent_pos",
                "auxiliary=[]",
            ],
        ),
    ],
)
def test_a_lerobot_set(trained, run_script, experiment, overrides):
    run = trained(
        f"experiment={experiment}",
        "dataset=lerobot",
        f"dataset.path={LEROBOT}",
        "train.batch_size=32",
        *overrides,
    )
    roll_out(run_script, run)


def test_a_minari_set_collected_here(trained, run_script, tmp_path):
    run_script("collect", "env=metaworld", "env.task=reach-v3", "episodes=5", f"output_dir={tmp_path}")
    run = trained(f"dataset.path={tmp_path / 'metaworld-reach-v3-v0'}")
    roll_out(run_script, run)


def test_a_robomimic_file(trained):
    # Its pictures are of 6 x 8 pixels, too small for the image encoder.
    keys = "dataset.observation_keys=[object,robot0_eef_pos]"
    trained("dataset=robomimic", f"dataset.path={ROBOMIMIC}", keys, "train.batch_size=32")
