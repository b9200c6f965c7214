"""Train LeRobot's own diffusion policy on the 206 human Push-T demonstrations, from the T's corners, on one core.

This makes the checkpoint that the worked example of `docs/import.md` imports. It runs with the Python of an environment
that holds `lerobot` (0.4.4), and with LeRobot's own policy, loss, processors and checkpoint format; from this project
it only takes the corners of the T. The same command goes on where it was stopped.

    python -m scripts.bench.lerobot_pusht pusht_cchi_v7_replay.zarr.zip OUTPUT_DIR [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from diffusers.optimization import get_scheduler
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

from envs.pusht_geometry import pusht_corners

STATE, CORNERS, ACTION = "observation.state", "observation.environment_state", "action"
SEED = 0
BATCH_SIZE = 128
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, GRAD_CLIP = 5e-4, 0.05, 500, 10.0
EMA_DECAY = 0.999
SECONDS_BETWEEN_CHECKPOINTS = 600
STEPS_BETWEEN_LINES = 200

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Train, and write the checkpoint every ten minutes and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstrations", type=Path, help="pusht_cchi_v7_replay.zarr.zip")
    parser.add_argument("output_dir", type=Path, help="receives checkpoint/, state.pt and progress.jsonl")
    parser.add_argument("--steps", type=int, default=24_000, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    columns, ends = read(arguments.demonstrations)
    training = Training(columns, arguments.steps)
    training.resume(arguments.output_dir)
    training.run(Windows(training.normalized(columns), ends, training.policy.config), arguments.output_dir)


def read(path: Path) -> tuple[Tensors, np.ndarray]:
    """Read what the policy observes and does in each of the demonstrations' rows, and where each episode ends."""
    group = zarr.open_group(str(path), mode="r")
    state = np.asarray(group["data/state"])
    columns = {STATE: state[:, :2], CORNERS: pusht_corners(state), ACTION: np.asarray(group["data/action"])}
    ends = np.asarray(group["meta/episode_ends"])
    return {key: torch.from_numpy(np.ascontiguousarray(rows, np.float32)) for key, rows in columns.items()}, ends


class Windows:
    """LeRobot's windows: past and future beyond an episode's ends repeat its first and its last row.

    Args:
        columns: normalised rows of all episodes by key.
        ends: the number of the row after each episode.
        config: says which rows of a window are observed and acted on, and how many last rows begin none.
    """

    def __init__(self, columns: Tensors, ends: np.ndarray, config: DiffusionConfig) -> None:
        self._columns = columns
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts
        first, last = np.repeat(starts, lengths), np.repeat(ends - 1, lengths)
        self._rows = np.flatnonzero(np.arange(ends[-1]) <= last - config.drop_n_last_frames)
        self._first, self._last = first, last
        self._offsets = {
            STATE: np.array(config.observation_delta_indices),
            CORNERS: np.array(config.observation_delta_indices),
            ACTION: np.array(config.action_delta_indices),
        }

    def draw(self, size: int) -> Tensors:
        """Draw a batch with torch's global generator, in the form of `DiffusionPolicy.forward`."""
        rows = self._rows[torch.randint(len(self._rows), (size,)).numpy()]
        batch = {}
        for key, offsets in self._offsets.items():
            wanted = rows[:, None] + offsets
            within = np.clip(wanted, self._first[rows, None], self._last[rows, None])
            batch[key] = self._columns[key][torch.from_numpy(within)]
        return {**batch, "action_is_pad": torch.from_numpy(wanted != within)}


class Training:
    """LeRobot's policy with its optimiser, schedule and average of the weights.

    Args:
        columns: rows of all episodes by key, for the statistics.
        steps: training steps.
    """

    def __init__(self, columns: Tensors, steps: int) -> None:
        self.policy = DiffusionPolicy(config())
        self._processors = make_pre_post_processors(self.policy.config, dataset_stats=statistics(columns))
        self._average = torch.optim.swa_utils.AveragedModel(self.policy, avg_fn=_averaged)
        self._optimizer = torch.optim.AdamW(
            self.policy.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self._schedule = get_scheduler(
            "cosine", self._optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=steps
        )
        self._steps, self._step, self._cpu_seconds = steps, 0, 0.0

    def normalized(self, columns: Tensors) -> Tensors:
        """Pass all rows through LeRobot's preprocessor, once instead of in every batch."""
        processed = self._processors[0](dict(columns))
        return {key: processed[key] for key in columns}

    def run(self, windows: Windows, folder: Path) -> None:
        """Train to the end."""
        self.policy.train()
        saved, begun, losses = time.monotonic(), time.process_time() - self._cpu_seconds, []
        while self._step < self._steps:
            losses.append(self._learn(windows.draw(BATCH_SIZE)))
            self._step += 1
            self._cpu_seconds = time.process_time() - begun
            if self._step % STEPS_BETWEEN_LINES == 0:
                line = {"step": self._step, "loss": float(np.mean(losses)), "cpu_seconds": round(self._cpu_seconds)}
                with (folder / "progress.jsonl").open("a") as progress:
                    print(json.dumps(line), file=progress)
                losses.clear()
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS or self._step == self._steps:
                self.save(folder)
                saved = time.monotonic()

    def _learn(self, batch: Tensors) -> float:
        loss, _ = self.policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self._average.update_parameters(self.policy)
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write `checkpoint/`, LeRobot's own format with the averaged weights, and `state.pt` to resume from."""
        new = folder / "checkpoint.new"
        shutil.rmtree(new, ignore_errors=True)
        averaged: Any = self._average.module
        averaged.save_pretrained(new)
        for processor in self._processors:
            processor.save_pretrained(new)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        new.rename(folder / "checkpoint")
        counts = {"step": self._step, "cpu_seconds": self._cpu_seconds, "random": torch.get_rng_state()}
        torch.save(counts | {name: part.state_dict() for name, part in self._parts().items()}, folder / "state.new")
        os.replace(folder / "state.new", folder / "state.pt")

    def resume(self, folder: Path) -> None:
        """Go on from `state.pt`, if there is one."""
        if not (folder / "state.pt").exists():
            return
        state = torch.load(folder / "state.pt", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._step, self._cpu_seconds = state["step"], state["cpu_seconds"]
        torch.set_rng_state(state["random"])

    def _parts(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "average": self._average,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }


def config() -> DiffusionConfig:
    """LeRobot's defaults, except for a U-Net that one core can train and the normalisation of the corners."""
    return DiffusionConfig(
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)),
            CORNERS: PolicyFeature(FeatureType.ENV, (16,)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping={kind: NormalizationMode.MIN_MAX for kind in ("STATE", "ENV", "ACTION")},
        down_dims=(64, 128),
        device="cpu",
        push_to_hub=False,
    )


def statistics(columns: Tensors) -> dict[str, Tensors]:
    """The statistics of each column over all rows, under LeRobot's names."""
    return {
        key: {"min": rows.amin(0), "max": rows.amax(0), "mean": rows.mean(0), "std": rows.std(0)}
        for key, rows in columns.items()
    }


def _averaged(average: torch.Tensor, weights: torch.Tensor, updates: Any) -> torch.Tensor:
    """Move the average towards the weights; its memory grows to 1 / (1 - EMA_DECAY) updates."""
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    return average.lerp(weights, 1 - decay)


if __name__ == "__main__":
    main()
