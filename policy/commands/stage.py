"""What rollout and sweep share: checkpoints and their environment, checked before any work, and their episodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from gymnasium.spaces import Box
from tqdm import tqdm

from policy.checkpoint import Checkpoint, choose_env, load_checkpoint
from policy.common.control_rate import describe_mismatch, stated_rate
from policy.common.device import check_device
from policy.common.errors import WorkerError, reason_of
from policy.common.output import episode_seeds
from policy.common.plugins import loaded_plugins
from policy.common.progress import progress, say
from policy.rollout.cells import Task
from policy.rollout.episodes import Controller, Env, MakeEnv, check_num_envs, check_spaces, describe_clipping
from policy.rollout.ledger import Ledger
from policy.rollout.provenance import Provenance, accept_mixture, provenance, with_packages
from policy.rollout.vector import MakeWorlds, VectorPool
from policy.rollout.video import record_videos
from policy.rollout.watch import check_patience, helpers_ended, watched
from policy.rollout.workers import RolloutPool
from policy.statistics.results import EpisodeResult, describe_broken, too_many_broken
from policy.sweep.grid import SweepCell, ids_of

# Defaults that rollouts and sweeps share. Demonstrations use seeds from 0, rollouts during training those from 50000.
EPISODES = 50
FIRST_SEED = 100_000
NUM_ENVS = 32

# What runs the episodes.
Pool = RolloutPool | VectorPool
# What to do with an episode that broke off.
OnEnvError = Literal["count", "stop"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Checkpoints and the environment in which they act.

    Attributes:
        checkpoints: the loaded checkpoints.
        env: settings of the environment.
        make_env: makes the environment.
        seeds: seeds of the episodes.
        action_space: action space of the environment.
        env_patience: seconds that one call of the simulator may take.
        env_vector: whether one simulator steps all environments in one call.
        warnings: given before the run, for its files.
        made_with: what its episodes are run with.
    """

    checkpoints: list[Checkpoint]
    env: dict[str, Any]
    make_env: MakeEnv
    seeds: range
    action_space: Box
    env_patience: float
    env_vector: bool
    warnings: list[str]
    made_with: Provenance


def set_stage(
    make_env: MakeEnv,
    checkpoints: Sequence[Path],
    *,
    env: dict[str, Any] | None,
    seed: int,
    episodes: int,
    num_envs: int,
    device: str,
    env_patience: float,
    env_vector: bool = False,
    control_rate: float | None = None,
) -> Stage:
    """Load checkpoints and check them against each other and their environment, before any work.

    Args:
        make_env: makes an environment from its settings.
        checkpoints: folders that training wrote.
        env: another environment, or changed settings of the checkpoints'.
        seed: seed of the first episode.
        episodes: number of episodes.
        num_envs: environments that run at once.
        device: `cpu` or `cuda`.
        env_patience: seconds that one call of the simulator may take.
        env_vector: whether one simulator steps all environments in one call.
        control_rate: periods per second of a real-time rollout, or None.

    Returns:
        The stage, ready to run; its warnings are given.

    Raises:
        ValueError: a setting out of range, or parts that do not fit each other.
    """
    check_num_envs(num_envs)
    check_patience(env_patience)
    if env_vector and control_rate is not None:
        raise ValueError("control_rate= runs one environment in real time: leave env_vector= out")
    seeds = episode_seeds(seed, episodes)
    loaded = [load_checkpoint(folder, check_device(device)) for folder in checkpoints]
    chosen = _common_env(loaded, env)
    with _probed(make_env, chosen, loaded[0], env_patience, env_vector=env_vector) as probe:
        for checkpoint in loaded:
            check_spaces(checkpoint.policy.config, probe, family=chosen["name"])
        given = _warnings(loaded, probe, control_rate)
        action_space, made_with = probe.action_space, provenance(probe, device)
    for warning in given:
        warnings.warn(warning, stacklevel=2)
    assert isinstance(action_space, Box)
    return Stage(
        checkpoints=loaded,
        env=chosen,
        make_env=partial(make_env, **chosen),
        seeds=seeds,
        action_space=action_space,
        env_patience=env_patience,
        env_vector=env_vector,
        warnings=given,
        made_with=made_with,
    )


def _common_env(loaded: Sequence[Checkpoint], env: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of the environment in which all of the checkpoints act."""
    chosen = [choose_env(checkpoint, env) for checkpoint in loaded]
    if other := next((number for number, settings in enumerate(chosen) if settings != chosen[0]), None):
        first, second = chosen[0], chosen[other]
        differing = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        raise ValueError(
            f"{loaded[0].path} acts in {first}, {loaded[other].path} in {second}: a sweep compares policies in one"
            f" environment, so give {' '.join(f'env.{key}=...' for key in differing if key != 'name') or 'env=...'}"
        )
    return chosen[0]


def _warnings(loaded: Sequence[Checkpoint], env: Env, control_rate: float | None) -> list[str]:
    """What of the environment is not as it was in the demonstrations, each sentence once."""
    rate, found = stated_rate(env.metadata.get("render_fps")), []
    for checkpoint in loaded:
        demonstrated = stated_rate(checkpoint.training.get("rate_hz"))
        found += [describe_mismatch(demonstrated, rate, control_rate), describe_clipping(checkpoint.policy, env)]
    return list(dict.fromkeys(filter(None, found)))


@contextmanager
def _probed(
    make_env: MakeEnv, settings: dict[str, Any], checkpoint: Checkpoint, env_patience: float, *, env_vector: bool
) -> Iterator[Any]:
    """The environment, or one world of a simulator that may know no other way to be made."""
    if env_vector:
        with closing(_probe(partial(make_env, worlds=1), settings, checkpoint)) as worlds:
            yield worlds
    else:
        with (
            helpers_ended(),
            watched(make_env, env_patience) as make,
            closing(_probe(make, settings, checkpoint)) as probe,
        ):
            yield probe


def _probe(make_env: MakeEnv, settings: dict[str, Any], checkpoint: Checkpoint) -> Env:
    """Make the environment, and name the plugins that were loaded in training where it cannot be made without them."""
    try:
        return make_env(**settings)
    except ValueError as error:
        missing = [plugin for plugin in checkpoint.plugins if plugin not in loaded_plugins()]
        if not missing:
            raise
        raise ValueError(
            f"{error} {checkpoint.path} was trained with a plugin: if you trust it, add plugins=[{','.join(missing)}]"
        ) from error


def settle_provenance(
    stage: Stage, cells: Sequence[SweepCell], ledger: Ledger, *, missing: bool, mix: bool
) -> list[str]:
    """Before a run goes on: check that its missing episodes are run like the finished ones, and write down with what.

    Args:
        stage: the checkpoints, the environment and the seeds.
        cells: the cells to run.
        ledger: holds the finished episodes.
        missing: whether episodes are missing.
        mix: whether the missing ones may be run with something else.

    Returns:
        Warnings in sentences, which are given.

    Raises:
        ValueError: something differs, and `mix` is False.
    """
    now = stage.made_with
    if any(cell.cell.backend == "onnx" for cell in cells):
        now = with_packages(now, ["onnxruntime"])
    instead = "Use what the finished ones were run with, or another output_dir="
    found = [*ledger.made_with(ids_of(cells), stage.seeds), *([now] if missing else [])]
    said = accept_mixture(found, mix, where=str(ledger.path), instead=instead)
    if missing:
        ledger.note_provenance(now)
    for warning in said:
        warnings.warn(warning, stacklevel=2)
    return said


def say_on_disk(finished: int, total: int) -> None:
    """Print how many episodes need not run again, if there are any."""
    if finished:
        print(f"{finished} of {total} episodes are on disk already")


def warn_unpaired(ledger: Ledger) -> None:
    """Warn if equal seeds are not equal episodes, as far as the ledger knows."""
    if ledger.unpaired:
        warnings.warn(ledger.unpaired, stacklevel=3)


@contextmanager
def rollout_pool(stage: Stage, ledger: Ledger, num_envs: int, *, workers: int | None) -> Iterator[Pool]:
    """Start the processes, and find out whether a seed fixes the episode; if it does not, the ledger notes that.

    Args:
        stage: the checkpoints, the environment and the seeds.
        ledger: of the run.
        num_envs: environments that run at once.
        workers: number of processes; by default one per core.
    """
    policies = [checkpoint.policy for checkpoint in stage.checkpoints]
    opened: Pool
    if stage.env_vector:
        opened = VectorPool(policies, cast(MakeWorlds, stage.make_env), num_envs)
    else:
        opened = RolloutPool(policies, stage.make_env, num_envs, workers=workers, patience=stage.env_patience)
    with opened as pool:
        if not ledger.unpaired and (unpaired := pool.probe(stage.seeds[0])):
            ledger.note_unpaired(unpaired)
        warn_unpaired(ledger)
        yield pool


def run_tasks(
    pool: Pool,
    cells: Sequence[SweepCell],
    ids: Sequence[str],
    tasks: Sequence[Task],
    ledger: Ledger,
    on_env_error: OnEnvError,
    bar: tqdm[Any],
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Run episodes, and add each to the ledger as soon as it ends.

    Args:
        pool: runs them.
        cells: the cells that the tasks refer to.
        ids: their ids in the ledger.
        tasks: episodes that the ledger does not hold.
        ledger: receives the results.
        on_env_error: what to do with an episode that broke off.
        bar: shows the progress.
        after_each: called after each episode.

    Raises:
        WorkerError: an episode broke off and `on_env_error` is `stop`, or the processes failed.
    """
    outcomes: dict[int, list[bool]] = {number: [] for number in range(len(cells))}
    for (number, _), result in pool.run([cell.cell for cell in cells], tasks):
        ledger.add(ids[number], result)
        stop_if_broken(result, on_env_error)
        outcomes[number].append(result.success)
        success = sum(outcomes[number]) / len(outcomes[number])
        bar.set_postfix(cell=f"{number + 1}/{len(cells)}", success=f"{success:.0%}", refresh=False)
        bar.update()
        after_each()


def run_missing(
    stage: Stage,
    cells: Sequence[SweepCell],
    ledger: Ledger,
    num_envs: int,
    on_env_error: OnEnvError,
    *,
    title: str,
    workers: int | None = None,
) -> list[list[EpisodeResult]]:
    """Run the episodes that the ledger lacks, each cell with all seeds.

    Args:
        stage: the checkpoints, the environment and the seeds.
        cells: the cells to run.
        ledger: receives the cells' settings and the results.
        num_envs: environments that run at once.
        on_env_error: what to do with an episode that broke off.
        title: title of the progress bar.
        workers: number of processes; by default one per core.

    Returns:
        All results of each cell, in the order of the seeds.

    Raises:
        WorkerError: see `run_tasks`.
    """
    ids = [ledger.introduce(cell.settings) for cell in cells]
    tasks = [(number, seed) for number, cell in enumerate(ids) for seed in ledger.missing(cell, stage.seeds)]
    total = len(ids) * len(stage.seeds)
    say_on_disk(total - len(tasks), total)
    if tasks:
        with (
            rollout_pool(stage, ledger, min(num_envs, len(tasks)), workers=workers) as pool,
            progress(total=total, initial=total - len(tasks), desc=title, unit="episode") as bar,
        ):
            run_tasks(pool, cells, ids, tasks, ledger, on_env_error, bar)
    else:
        warn_unpaired(ledger)
    return [ledger.results(cell, stage.seeds) for cell in ids]


def filmed(
    stage: Stage, takes: Sequence[tuple[Controller, int]], file_of: Callable[[int, EpisodeResult], Path]
) -> Iterator[tuple[EpisodeResult, Path]]:
    """Repeat episodes and record them; where nothing can be drawn, say so in a line.

    Args:
        stage: of the command.
        takes: see `record_videos`.
        file_of: see `record_videos`.

    Yields:
        The result and the video file of each episode that was drawn.
    """
    try:
        with helpers_ended(), watched(stage.make_env, stage.env_patience) as make_env:
            yield from record_videos(make_env, takes, file_of)
    except Exception as error:  # an environment need not know how to draw, and the results are there
        say(f"no video: {reason_of(error)}")


def stop_if_broken(result: EpisodeResult, on_env_error: OnEnvError) -> None:
    """End a run at the first episode that broke off, if the user asked for that.

    Raises:
        WorkerError: the episode broke off, and `on_env_error` is `stop`.
    """
    if result.broke_off and on_env_error == "stop":
        raise WorkerError(f"the episode with seed {result.seed} broke off: {result.broke_off} (on_env_error=stop)")


def check_broken(results: Sequence[EpisodeResult]) -> None:
    """Refuse, after all work, a success rate that too many broken episodes have decided.

    Raises:
        WorkerError: more than 5 % of 20 or more episodes broke off.
    """
    if too_many_broken(results):
        raise WorkerError(f"the simulator cannot be relied on: {'; '.join(describe_broken(results))}")
