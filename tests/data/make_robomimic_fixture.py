"""Writes robomimic.hdf5 beside itself with robomimic's own commands: dataset_states_to_obs, then split_train_val.

    pip install --no-deps robomimic==0.3.0 termcolor tensorboardX imageio
    python tests/data/make_robomimic_fixture.py

The demonstrations are of a made-up environment; what the file holds where, and in which types, is robomimic's doing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

# robomimic also imports its networks and displays, which are not needed to write a file.
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.models", "six"):
    sys.modules[name] = mock.MagicMock()

from robomimic.envs.env_base import EnvBase, EnvType  # noqa: E402
from robomimic.scripts import dataset_states_to_obs, split_train_val  # noqa: E402

SETTINGS = {"env_name": "Lift", "type": EnvType.GYM_TYPE, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}


class Env(EnvBase):
    """An environment whose state (x, y) is observed, and whose actions are added to the state."""

    def __init__(self):
        self.state = np.zeros(2)

    def reset(self):
        return self.observe()

    def reset_to(self, state):
        self.state = np.asarray(state["states"])
        return self.observe()

    def step(self, action):
        self.state = self.state + action
        return self.observe(), 0.0, False, {}

    def observe(self):
        return {
            "robot0_eef_pos": self.state.copy(),
            "object": np.array([self.state.sum()]),
            "agentview_image": np.full((6, 8, 3), int(self.state[0]), np.uint8),
        }

    def get_reward(self):
        return 0.0

    def is_success(self):
        return {"task": False}

    def serialize(self):
        return SETTINGS


Env.__abstractmethods__ = frozenset()


def write(path: Path) -> None:
    """Twelve demos of 2 to 5 transitions; the action of transition t is (t, demo)."""
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder, "states.hdf5")
        with h5py.File(states, "w") as file:
            file.create_group("data").attrs["env_args"] = json.dumps(SETTINGS)
            for demo in range(12):
                steps = np.arange(2.0 + demo % 4)
                actions = np.stack([steps, np.full(len(steps), demo)], axis=1)
                file[f"data/demo_{demo}/states"] = np.cumsum(actions, axis=0) - actions
                file[f"data/demo_{demo}/actions"] = actions
        arguments = argparse.Namespace(
            dataset=str(states),
            output_name="robomimic.hdf5",
            n=None,
            shaped=False,
            camera_names=[],
            camera_height=6,
            camera_width=8,
            done_mode=2,
            copy_rewards=False,
            copy_dones=False,
            exclude_next_obs=False,
            compress=False,
        )
        with (
            mock.patch.object(dataset_states_to_obs.EnvUtils, "create_env_for_data_processing", return_value=Env()),
            mock.patch.object(dataset_states_to_obs.EnvUtils, "is_robosuite_env", return_value=False),
        ):
            dataset_states_to_obs.dataset_states_to_obs(arguments)
        written = Path(folder, "robomimic.hdf5")
        np.random.seed(0)  # noqa: NPY002 (robomimic draws from it)
        split_train_val.split_train_val_from_hdf5(str(written), val_ratio=0.25)
        path.write_bytes(written.read_bytes())


if __name__ == "__main__":
    write(Path(__file__).with_name("robomimic.hdf5"))
