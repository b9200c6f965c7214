"""Record what a policy observes in its own rollouts, as a Minari dataset from which `ddim-train` rectifies it.

Rectification takes only observations from a dataset. Those of demonstrations are not quite those that the policy comes
to by itself, and there are fewer of them. The same command goes on where it was stopped.

    python -m scripts.bench.visited CHECKPOINT OUTPUT_DIR [--episodes N] [--ddim-steps K] [--seed S]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.checkpoint import load_checkpoint
from policy.control.receding_horizon import RecedingHorizonController
from policy.data.minari_writer import dataset_name, write_minari
from policy.data.recording import recorded_episodes
from policy.diffusion.sampler import Sampler
from policy.inference.backends import compile_sampler
from scripts.environments import make_env


@dataclass
class Visited:
    """One episode: T + 1 observations, and T of everything else."""

    seed: int
    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]

    def __len__(self) -> int:
        """The number of control steps."""
        return len(self.actions)


def main() -> None:
    """Record the episodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--ddim-steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=200_000, help="of the first episode; test episodes start at 100000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint, "cpu")
    settings = {"checkpoint": checkpoint.digest, "ddim_steps": arguments.ddim_steps, "seed": arguments.seed}
    if checkpoint.env is None:
        raise SystemExit(f"{arguments.checkpoint} names no environment: import it with env=...")
    name = dataset_name(checkpoint.env)
    with closing(make_env(**checkpoint.env)) as env:
        assert isinstance(env.action_space, Box)
        sampler = Sampler(ddim_steps=arguments.ddim_steps)
        controller = RecedingHorizonController(
            policy=checkpoint.policy,
            sampler=sampler,
            execution_horizon=checkpoint.execution_horizon,
            program=compile_sampler(checkpoint.policy, sampler, backend="fused"),
            action_space=env.action_space,
        )

        def episodes(first: int, missing: int) -> Iterator[Visited]:
            return (play(controller, env, seed) for seed in range(first, first + missing))

        unfinished = arguments.output_dir / f".{name}"
        with recorded_episodes(unfinished, settings, arguments.episodes, episodes, Visited) as recorded:
            path = write_minari(
                recorded, folder=arguments.output_dir, dataset_id=name, env=env, env_settings=checkpoint.env
            )
    print(f"{len(recorded)} episodes of {sum(map(len, recorded))} control steps in all: {path}")


def play(controller: RecedingHorizonController, env: gymnasium.Env[Any, Any], seed: int) -> Visited:
    """Play one episode to its end."""
    observation, _ = env.reset(seed=seed)
    controller.reset(seed)
    observations, steps, over = [observation], [], False
    while not over:
        action = controller.act(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        steps.append((action, reward, terminated, truncated))
        over = terminated or truncated or bool(info["is_success"])
    actions, rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
    together = {key: np.array([one[key] for one in observations]) for key in observation}
    return Visited(seed, together, actions, rewards, terminations, truncations)


if __name__ == "__main__":
    main()
