"""Collect demonstrations from a scripted expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import envs
from policy.common.plugins import plugins_argument
from policy.data.minari_writer import check_absent, dataset_name, write_minari
from policy.data.recording import recorded_episodes
from scripts.command import command
from scripts.environments import make_env


def collect(
    *,
    env: dict[str, Any],
    episodes: int = 50,
    seed: int = 0,
    noise: float = 0.0,
    output_dir: Path = Path("outputs/demonstrations"),
) -> None:
    """Play a scripted expert and write its successful episodes as a Minari dataset; the same command resumes.

    Args:
        env: settings of the environment.
        episodes: number of demonstrations.
        seed: seed of the first attempt; the others count up from it.
        noise: standard deviation of the noise on the executed actions, see `envs.collect_episodes`.
        output_dir: receives the dataset's folder.

    Raises:
        ValueError: a setting that does not fit, an environment without an expert, or a dataset that exists already.
        WorkerError: the expert fails too often.
    """
    simulator, dataset_id = make_env(**env), dataset_name(env)
    check_absent(output_dir / dataset_id)
    expert = partial(envs.make_expert, env["name"])
    expert(simulator, 0)  # an environment without an expert raises here, before any work

    def attempts(first: int, missing: int) -> Iterator[envs.Episode]:
        return envs.collect_episodes(simulator, expert, episodes=missing, seed=first, noise=noise)

    settings = {"env": env, "seed": seed, "noise": noise}
    unfinished = output_dir / f".{dataset_id}"
    with recorded_episodes(unfinished, settings, episodes, attempts, envs.Episode) as recorded:
        path = write_minari(recorded, folder=output_dir, dataset_id=dataset_id, env=simulator, env_settings=env)
    print(f"{episodes} demonstrations of {sum(map(len, recorded))} control steps in all: {path}")
    print(f"next: python scripts/train.py dataset.path={path}{plugins_argument()}")


main = command(
    "collect", "scripts.collect:collect", "python scripts/collect.py env=metaworld env.task=pick-place-v3 episodes=50"
)

if __name__ == "__main__":
    main()
