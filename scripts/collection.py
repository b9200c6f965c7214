"""What `scripts/collect.py` does, between `envs`, which plays the expert, and `policy`, which writes the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import envs
from policy.checkpoint import only_of_the_user
from policy.common.next_line import next_line
from policy.common.output import episode_seeds
from policy.data.minari_writer import check_absent, dataset_name, write_minari
from policy.data.recording import recorded_episodes
from policy.rollout.watch import ENV_PATIENCE, check_patience, watched
from scripts.environments import make_env


def collect(
    *,
    env: dict[str, Any],
    episodes: int = 50,
    seed: int = 0,
    noise: float = 0.0,
    env_patience: float = ENV_PATIENCE,
    output_dir: Path = Path("outputs/demonstrations"),
) -> None:
    """Play a scripted expert and write its successful episodes as a Minari dataset; the same command resumes.

    Args:
        env: settings of the environment.
        episodes: number of demonstrations.
        seed: seed of the first attempt; the others count up from it.
        noise: standard deviation of the noise on the executed actions, see `envs.collect_episodes`.
        env_patience: seconds that one call of the simulator may take before it counts as hanging.
        output_dir: receives the dataset's folder.

    Raises:
        ValueError: a setting that does not fit, an environment without an expert, or a dataset that exists already.
        WorkerError: the expert fails too often, or the simulator hangs.
    """
    check_patience(env_patience)
    episode_seeds(seed, episodes)  # raises where a number is out of range
    path, settings = output_dir / dataset_name(env), {"env": env, "seed": seed, "noise": noise}
    check_absent(path)
    expert = partial(envs.make_expert, env["name"])
    with watched(make_env, env_patience) as make, closing(make(**env)) as simulator:
        expert(simulator, 0)  # an environment without an expert raises here, before any work

        def attempts(first: int, missing: int) -> Iterator[envs.Episode]:
            return envs.collect_episodes(simulator, expert, episodes=missing, seed=first, noise=noise)

        with recorded_episodes(path.with_name(f".{path.name}"), settings, episodes, attempts, envs.Episode) as recorded:
            write_minari(recorded, path=path, env=simulator, env_settings=env)
    failed = recorded[-1].seed + 1 - seed - len(recorded)
    left_out = f"\n{failed} attempts failed and are left out" if failed else ""
    print(f"{episodes} demonstrations of {sum(map(len, recorded))} control steps in all: {path}{left_out}")
    print(next_line("ddim-train", **{"dataset.path": path}, env=only_of_the_user(env)))
