"""Collect demonstrations from a scripted expert."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import envs
from policy.common.next_line import next_line
from policy.common.progress import progress
from policy.data.minari_writer import check_absent, dataset_name, write_minari
from scripts.command import command


def collect(
    *,
    env: dict[str, Any],
    episodes: int = 50,
    seed: int = 0,
    noise: float = 0.0,
    output_dir: Path = Path("outputs/demonstrations"),
) -> None:
    """Play a scripted expert and write its successful episodes as a Minari dataset (HDF5).

    Args:
        env: settings of the environment.
        episodes: number of demonstrations.
        seed: seed of the first attempt; the others count up from it.
        noise: standard deviation of the noise on the executed actions, see `envs.collect_episodes`.
        output_dir: receives the dataset's folder.

    Raises:
        ValueError: a setting that does not fit, an environment without an expert, or a dataset that exists already.
        RuntimeError: the expert fails too often.
    """
    simulator, dataset_id = envs.make(**env), dataset_name(env)
    check_absent(output_dir / dataset_id)
    expert = partial(envs.make_expert, env["name"])
    expert(simulator, 0)  # an environment without an expert raises here, before any work
    attempts = envs.collect_episodes(simulator, expert, episodes=episodes, seed=seed, noise=noise)
    recorded = list(progress(attempts, total=episodes, desc="collect", unit="episode"))
    path = write_minari(recorded, folder=output_dir, dataset_id=dataset_id, env=simulator, env_settings=env)
    print(f"{episodes} demonstrations of {sum(map(len, recorded))} control steps in all: {path}")
    print(next_line("ddim-train", **{"dataset.path": path}))


main = command(
    "collect", "scripts.collect:collect", "python scripts/collect.py env=metaworld env.task=pick-place-v3 episodes=50"
)

if __name__ == "__main__":
    main()
