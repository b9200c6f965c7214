"""`ddim-train`: train a policy on demonstrations, and save it as a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from policy.checkpoint import (
    Checkpoint,
    best_entry,
    describe_best,
    digest_of,
    is_checkpoint,
    load_checkpoint,
    measured,
    merge_env,
    only_of_the_user,
)
from policy.commands.record import Record, facts_of, newest_in, record_in
from policy.commands.training_rollouts import ROLLOUT_SEED, Rollout, film_episodes, played, rolled_out, tried
from policy.common.control_rate import stated_rate
from policy.common.device import check_device
from policy.common.errors import PeerError
from policy.common.interrupt import stop_on_signal
from policy.common.locks import only_process
from policy.common.next_line import next_line
from policy.common.output import output_folder
from policy.common.progress import say
from policy.common.torchrun import World, joined_world, peers_needed
from policy.control.timeline import EXECUTION_HORIZON, check_execution_horizon
from policy.data.corrections import find_corrections
from policy.data.demonstrations import Augment, Demonstrations
from policy.data.relations import Relations, find_relations
from policy.diffusion.sampler import Sampler
from policy.model.config import PolicyConfig, PolicySettings
from policy.model.diffusion_policy import DiffusionPolicy
from policy.recipe.candidates import Allowed, Candidate, candidates_for
from policy.recipe.search import OpenTrial, Play, Trial, check_data, check_folder, search
from policy.recipe.settings import RecipeSettings
from policy.rollout.episodes import MakeEnv, check_num_envs
from policy.rollout.watch import ENV_PATIENCE, check_patience
from policy.statistics.fit import conclude
from policy.statistics.results import EpisodeResult
from policy.tracking.tracker import MetricsLog, NoTracker, OpenRun, SentToAll
from policy.tracking.training_page import PAGE, VIDEOS, TrainingFacts, training_page
from policy.training.errors import ErrorMeter
from policy.training.loop import train
from policy.training.phases import phases_of
from policy.training.preparation import Run, prepare_run
from policy.training.settings import TrainSettings
from policy.training.share import check_shares
from policy.training.start import config_for, config_from, config_of_student, fitting
from policy.training.state import TrainState


def train_policy(
    make_env: MakeEnv,
    *,
    dataset: Demonstrations,
    env: dict[str, Any] | None = None,
    policy: Mapping[str, Any],
    sampler: Sampler,
    train: TrainSettings,
    tracker: OpenRun,
    init: Path | None = None,
    init_normalizers: Literal["keep", "refit"] = "keep",
    teacher: Path | None = None,
    augment: Augment | None = None,
    recipe: RecipeSettings | None = None,
    auxiliary: Sequence[str] = (),
    find_differences: bool = False,
    execution_horizon: int | None = None,
    seed: int = 0,
    num_envs: int = 8,
    env_patience: float = ENV_PATIENCE,
    videos: int = 1,
    device: str = "cpu",
    output_dir: Path | None = None,
    expected: list[dict[str, float]] | None = None,
) -> None:
    """Train a diffusion policy on demonstrations; the same command with the same output_dir resumes where it stopped.

    Started by torchrun, several processes train one policy; the first of them writes, tracks, rolls out and measures.

    Args:
        make_env: makes an environment from the settings in `env`.
        dataset: the demonstrations.
        env: the environment that they come from; a Minari dataset of `ddim-collect` names its own.
        policy: the settings of the policy that the user gives, see `PolicySettings`.
        sampler: sampling settings of the rollouts during training.
        train: settings of the training.
        tracker: opens the tracked run.
        init: a checkpoint to start from: its averaged weights, its normalisers and the settings of its policy. With
            train.steps=0 train.rectify_steps=N the run makes it fast: it learns few-step sampling from its own chunks.
        init_normalizers: `keep` those of init=, or `refit` them to these demonstrations, in whose units or ranges the
            checkpoint's policy was not trained; its weights are kept.
        teacher: a checkpoint from whose chunks a new policy learns, of another size for example, with train.steps=0
            train.rectify_steps=N.
        augment: a symmetry of the task, as a function of observations and actions; doubles the training episodes.
        recipe: with recipe=auto, several recipes are tried first, within recipe.budget=30min, and the best is trained.
        auxiliary: keys of privileged observations, see `DataShapes.auxiliary_shapes`.
        find_differences: look for like quantities in the demonstrations, and let the policy observe their differences
            too; see `find_relations`.
        execution_horizon: actions executed before the next plan, by default as in the checkpoint of init= or teacher=,
            else 8.
        seed: seed of the split, the weights and every training step.
        num_envs: environments that run at once in the rollouts during training.
        env_patience: seconds that one call of the simulator may take in them.
        videos: first episodes of each of these rollouts to record, for the run's page.
        device: `cpu` or `cuda`; on torchrun, each process of a machine takes a GPU of its own.
        output_dir: receives `checkpoint/`, the page `training.html` and the metrics `history.jsonl`; by default a new
            folder under outputs/train.
        expected: success_rate and score_mean that a preset reaches, for some values of `ddim_steps`; only printed.

    Raises:
        ValueError: settings that do not fit each other, the data or the environment, before training starts; or
            another process is training in this folder.
        FloatingPointError: see `policy.training.loop.train`; the message names the last good checkpoint.
        PeerError: another process of torchrun ended before its time; the message names the last good checkpoint.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    check_start(
        train=train,
        init=init,
        init_normalizers=init_normalizers,
        teacher=teacher,
        output_dir=output_dir,
        recipe=recipe,
    )
    if not 0 <= videos <= train.rollout_episodes:
        raise ValueError(f"videos must be within 0..{train.rollout_episodes} (train.rollout_episodes); got {videos}")
    start = _start(init, teacher, output_dir)
    env = _env_of(dataset, env, start, train)
    if find_differences:
        policy = {**policy, **_found(dataset, policy, auxiliary, start)._asdict()}
    config, dataset = _configured(policy, dataset, auxiliary, start, train)
    if recipe:
        check_data(dataset, train, seed)
    rate = stated_rate(dataset.metadata.get("rate_hz"))
    if execution_horizon is None:
        execution_horizon = start.checkpoint.execution_horizon if start else EXECUTION_HORIZON
    check_execution_horizon(execution_horizon, config.action_horizon)
    check_num_envs(num_envs)
    check_patience(env_patience)
    world = joined_world()
    device = check_device(world.device(device))

    def prepare(config: PolicyConfig, train: TrainSettings, **start: Any) -> Run:
        return prepare_run(config, dataset, train, seed=seed, device=device, augment=augment, **start)

    refit = init_normalizers == "refit" and not (start and start.goes_on)  # a run that goes on has fitted them
    run = prepare(config, train, **(start.policies(train) if start else {}), refit=refit)
    sampler = run.state.policy.settled(sampler)
    tasks = dataset.metadata.get("tasks")
    paired = True
    if env and world.first:
        rolls_out = bool(train.rollout_every or recipe)
        found, paired = tried(make_env, env, env_patience, config, rate, rolls_out=rolls_out)
        tasks = tasks or found

    record_of = partial(
        record_in,
        env=env,
        execution_horizon=execution_horizon,
        facts={
            **({start.role: start.digest} if start else {}),
            **({"init_normalizers": init_normalizers} if init else {}),
            **facts_of(dataset, seed=seed, rate=rate, tasks=tasks, augment=augment),
        },
    )
    play: Callable[..., list[EpisodeResult]] | None = None
    if env:
        play = partial(played, partial(make_env, **env), num_envs, env_patience, sampler, execution_horizon)
    folder = Path(world.tell("output_dir", str(output_folder(output_dir, "train")) if world.first else None))
    if not world.first:
        _follow(run, record_of(folder, train), train, seed, world, rolls_out=env is not None)
        return
    if recipe:

        def open_trial(candidate: Candidate, place: Path) -> Trial:
            config, _ = _configured(candidate.policy, dataset, auxiliary, None, candidate.train)
            trial = prepare(config, candidate.train)
            record = record_of(place, candidate.train)
            record.restore(trial.state)
            return Trial(run=trial, save=record.save)

        allowed = _allowed(dataset, policy, auxiliary, config.action_horizon)
        candidates, fallen = candidates_for(recipe.candidates, recipe.keep, policy, train, allowed)
        best = _best_recipe(recipe, candidates, fallen, folder, sampler, seed, open_trial, play, paired)
        train = best.train
        expected = None if best.changes else expected
        run = prepare(_configured(best.policy, dataset, auxiliary, None, train)[0], train)
    film = partial(film_episodes, run.state, folder / VIDEOS, range(ROLLOUT_SEED, ROLLOUT_SEED + videos))
    rollout = partial(rolled_out, play, train, film) if play else None
    record = record_of(folder, train)
    with only_process(folder):
        record.resume(run.state, train)
        _describe(run, env, start, train, refit=refit)
        tracking = tracker(folder=folder, config={"env": env, **record.training, **vars(run.state.policy.config)})
        facts = _facts(dataset, env, record, train)
        with training_page(folder, facts, run.state.history, partial(_best, record, run)) as page:
            _train(run, train, seed, SentToAll(tracking, page), record, rollout, _measure(run, dataset, sampler), world)
        tracked = tracking.finish()
        stopped = run.state.step < train.all_steps
        if stopped:
            print(f"stopped at step {run.state.step} and saved: the same command with output_dir={folder} goes on")
        else:
            _say_end(run.state, record, train, tracked, expected or [])
        world.wait()  # the end of another process would cut this one off
        if stopped:
            raise KeyboardInterrupt  # so that commands that follow a complete training do not start


def _follow(run: Run, record: Record, settings: TrainSettings, seed: int, world: World, *, rolls_out: bool) -> None:
    """Train with the first process, which alone writes, tracks, rolls out and measures, and wait for its last word.

    Raises:
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM in any process.
    """
    record.restore(run.state)
    with _checkpoint_named(record.folder), stop_on_signal() as should_stop:
        train(
            run,
            settings,
            seed=seed,
            tracker=NoTracker(),
            save=lambda state: None,
            rollout=(lambda policy: {}) if rolls_out else None,
            should_stop=should_stop,
            world=world,
        )
        world.wait()
    if run.state.step < settings.all_steps:
        raise KeyboardInterrupt


def _say_end(
    state: TrainState,
    record: Record,
    settings: TrainSettings,
    tracked: str,
    expected: Sequence[Mapping[str, float]],
) -> None:
    """Say what a complete training made, and what to do with it."""
    print(describe_best(record.folder, state, settings.rollout_episodes))
    if conclusion := conclude(state.history):
        print(conclusion.sentence)
    print(f"checkpoint: {record.folder}" + (f"   tracked: {tracked}" if tracked else ""))
    print(f"page: {record.folder.parent / PAGE}")
    for row in expected:
        print("the preset as committed reaches: " + ", ".join(f"{name}={value:g}" for name, value in row.items()))
    if record.env is None:
        print("no environment is known, so there is nothing to roll out in: env=... of ddim-rollout chooses one")
    command, of_the_user = "ddim-rollout" if record.env else "ddim-export", only_of_the_user(record.env or {})
    print(next_line(command, checkpoint=record.folder, env=of_the_user))


def check_start(
    *,
    train: TrainSettings,
    init: Path | None = None,
    init_normalizers: Literal["keep", "refit"] = "keep",
    teacher: Path | None = None,
    output_dir: Path | None = None,
    recipe: RecipeSettings | None = None,
) -> None:
    """Check the settings of which policy a run starts from, before demonstrations are read.

    Args:
        train: settings of the training.
        init: see `train_policy`.
        init_normalizers: see `train_policy`.
        teacher: see `train_policy`.
        output_dir: the run's folder; a run that goes on does not need the checkpoint that it began from.
        recipe: see `train_policy`.

    Raises:
        ValueError: settings that do not fit each other, or there is no such checkpoint; the message says what to do.
    """
    world = joined_world()
    for phase in phases_of(train):
        check_shares(phase.rows(train.batch_size), world)
    if recipe and world.size > 1:
        raise ValueError(
            f"recipe=auto tries recipes in one process, and torchrun started {world.size}: leave recipe= out, or search"
            " without torchrun, and train the best one further with it"
        )
    if recipe and (init or teacher):
        raise ValueError(
            f"recipe=auto chooses the settings of a policy that is trained anew, and {'init=' if init else 'teacher='}"
            " brings those of a checkpoint: leave one of them out"
        )
    if recipe and output_dir:
        check_folder(output_dir.expanduser())
    if init and teacher:
        raise ValueError(
            f"init={init} and teacher={teacher} are two ways to start: init= keeps the checkpoint's network, teacher="
            " trains a new one on its chunks; leave one out"
        )
    if not (train.steps or init or teacher):
        raise ValueError("train.steps=0 trains no policy: add init=CHECKPOINT or teacher=CHECKPOINT, or some steps")
    if teacher and train.steps:
        raise ValueError(
            f"teacher= trains on the teacher's chunks alone: add train.steps=0 train.rectify_steps=N; got"
            f" train.steps={train.steps}"
        )
    if init_normalizers == "refit":
        _check_refit(train, init)
    path = init or teacher
    if path and not (output_dir and is_checkpoint(newest_in(output_dir))):
        digest_of(path)


def _check_refit(train: TrainSettings, init: Path | None) -> None:
    """Refuse to fit normalisers again where there are none to fit, or nothing to fit them for."""
    if not init:
        raise ValueError(
            "init_normalizers=refit fits the normalisers of init=CHECKPOINT again; those of a new policy are always"
            " fitted, and with teacher= they are the teacher's: add init=, or leave it out"
        )
    if not train.steps:
        raise ValueError(
            "init_normalizers=refit goes with train.steps=N, which learns from the demonstrations; a run that only"
            " rectifies learns the checkpoint's own chunks, in its ranges: leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The trained policy that a run starts from.

    Attributes:
        role: the setting that names it.
        checkpoint: its checkpoint; the run's own newest one where the run goes on.
        digest: of the checkpoint that the run began from.
        goes_on: whether the run goes on.
    """

    role: Literal["init", "teacher"]
    checkpoint: Checkpoint
    digest: str
    goes_on: bool

    def policies(self, train: TrainSettings) -> dict[str, DiffusionPolicy]:
        """Return the policies for `prepare_run`; a run that goes on has its teacher in its own checkpoint."""
        policy = self.checkpoint.policy
        if self.goes_on:
            return {"init": policy}
        if self.role == "teacher":
            return {"teacher": policy}
        return {"init": policy} if train.steps else {"init": policy, "teacher": policy}


def _start(init: Path | None, teacher: Path | None, output_dir: Path | None) -> _Start | None:
    """Load the trained policy that the run starts from, or that it has become: going on needs no other checkpoint.

    Raises:
        ValueError: the checkpoint cannot be loaded, or the run in this folder began in another way.
    """
    path = init or teacher
    if path is None:
        return None
    role: Literal["init", "teacher"] = "init" if init else "teacher"
    newest = output_dir and newest_in(output_dir)
    if newest is None or not is_checkpoint(newest):
        loaded = load_checkpoint(path)
        return _Start(role=role, checkpoint=loaded, digest=loaded.digest, goes_on=False)
    own = load_checkpoint(newest)
    began = own.training.get(role)
    if began is None:
        raise ValueError(
            f"{newest} belongs to a run without {role}=: to go on with it, leave {role}= out; to start anew, choose"
            " another output_dir="
        )
    if is_checkpoint(path) and (digest := digest_of(path)) != began:
        raise ValueError(
            f"{newest} began from the checkpoint {began}, and {path} is {digest}: to go on, give the same checkpoint or"
            " one that no longer exists; to start anew, choose another output_dir="
        )
    return _Start(role=role, checkpoint=own, digest=began, goes_on=True)


def _env_of(
    dataset: Demonstrations, env: dict[str, Any] | None, start: _Start | None, train: TrainSettings
) -> dict[str, Any] | None:
    """Choose the environment: of the demonstrations that a policy learns to act from, or else of the trained policy."""
    stored = [(dataset.metadata.get("env"), dataset.source)]
    if start:
        stored.append((start.checkpoint.env, str(start.checkpoint.path)))
    found, source = next(((e, s) for e, s in (stored if train.steps else reversed(stored)) if e), (None, ""))
    return merge_env(found, env, source or dataset.source) if env or found else None


def _found(
    dataset: Demonstrations, given: Mapping[str, Any], auxiliary: Sequence[str], start: _Start | None
) -> Relations:
    """Find the pairs of like quantities in the demonstrations, and say which they are.

    Raises:
        ValueError: the policy's differences are given already, or are those of a trained policy.
    """
    if start is not None:
        raise ValueError("find_differences=true is for a new policy; this run keeps a trained one's: leave it out")
    if taken := [name for name in Relations._fields if given.get(name)]:
        raise ValueError(
            f"{taken[0]}= gives the pairs that find_differences=true would look for: leave one of them out"
        )
    relations, vectors = _relations(dataset, auxiliary), _vectors(dataset, auxiliary)
    places = [f"{key}[{place}]" for key in sorted(vectors) for place in range(dataset.observation_shapes[key][0])]
    found = [f"{places[i]} - {places[j]}" for i, j in relations.differences]
    found += [f"direction {places[i]} to {places[j]}" for i, j in relations.direction_differences]
    say(f"differences that the policy observes too: {', '.join(found) or 'none, no two quantities are alike'}")
    return relations


def _vectors(dataset: Demonstrations, auxiliary: Sequence[str]) -> list[str]:
    """The observed state vectors."""
    return [key for key, shape in dataset.observation_shapes.items() if len(shape) == 1 and key not in auxiliary]


def _relations(dataset: Demonstrations, auxiliary: Sequence[str]) -> Relations:
    vectors = _vectors(dataset, auxiliary)
    return find_relations(dataset, vectors) if vectors else Relations((), ())


def _allowed(
    dataset: Demonstrations, given: Mapping[str, Any], auxiliary: Sequence[str], action_horizon: int
) -> Allowed:
    """What the demonstrations allow a recipe to do; a policy with relations of the user's own gets no others."""
    relations: Mapping[str, Any] = {}
    if not any(given.get(name) for name in Relations._fields):
        with suppress(ValueError):  # too many numbers to compare
            found = _relations(dataset, auxiliary)
            relations = found._asdict() if any(found) else {}
    corrections = False
    with suppress(ValueError):  # no action is a displacement, or there are pictures
        vectors = [
            key for key, values in dataset.observations.items() if len(values.shape) == 2 and key not in auxiliary
        ]
        find_corrections(dataset, np.arange(dataset.num_episodes), vectors, action_horizon)
        corrections = True
    return Allowed(relations=relations, corrections=corrections)


def _configured(
    given: Mapping[str, Any],
    dataset: Demonstrations,
    auxiliary: Sequence[str],
    start: _Start | None,
    train: TrainSettings,
) -> tuple[PolicyConfig, Demonstrations]:
    """Combine the user's settings with the demonstrations and the trained policy; return what of the data it needs.

    Raises:
        ValueError: they do not fit each other.
    """
    if start is None:
        return config_for(PolicySettings(**given), dataset, auxiliary), dataset
    trained, source = start.checkpoint.policy.config, start.checkpoint.path
    if start.role == "init" or start.goes_on:
        config = config_from(trained, source, given, auxiliary, rectifies=not train.steps)
    else:
        config = config_of_student(trained, source, given, dataset, auxiliary)
    return config, fitting(dataset, config, source, with_actions=train.steps > 0)


def _best_recipe(
    recipe: RecipeSettings,
    candidates: Sequence[Candidate],
    fallen: Mapping[str, str],
    folder: Path,
    sampler: Sampler,
    seed: int,
    open_trial: OpenTrial,
    play: Play | None,
    paired: bool,
) -> Candidate:
    """Search for the best recipe; its checkpoint is then the run's own, which goes on from it."""
    with only_process(folder), stop_on_signal() as stop:
        try:
            return search(
                candidates,
                fallen,
                folder=folder,
                settings=recipe,
                sampler=sampler,
                seed=seed,
                first_seed=ROLLOUT_SEED,
                open_trial=open_trial,
                play=play,
                paired=paired,
                stop=stop,
            )
        except KeyboardInterrupt:
            print(f"the search stopped and is saved: the same command with output_dir={folder} goes on")
            raise


def _describe(run: Run, env: dict[str, Any] | None, start: _Start | None, train: TrainSettings, *, refit: bool) -> None:
    parameters = sum(p.numel() for p in run.state.policy.parameters())
    print(
        f"{len(run.training)} training windows from {len(run.training.episodes)} episodes"
        f" ({len(run.validation.episodes)} held out), {parameters / 1e6:.2f} M parameters"
    )
    if run.noise:
        print(f"corrective noise moves {', '.join(run.noise.moved)}")
    if start and run.state.step == 0:
        print(_described_start(run, start, train, refit))
    if env is None:
        several = "envs" in run.training.demonstrations.metadata
        reason = "the datasets are of different environments" if several else "no environment is known"
        print(f"{reason}, so there are no rollouts while training: env=... adds them")


def _described_start(run: Run, start: _Start, train: TrainSettings, refit: bool) -> str:
    """The trained policy that a run starts from, and what it does with it, in one sentence."""
    name, before, now = (
        f"{start.checkpoint.path} ({start.digest})",
        start.checkpoint.policy.config.predicts,
        run.state.policy.config.predicts,
    )
    steps = f"sampled with {train.rectify_ddim_steps} steps"
    if start.role == "teacher":
        return f"a new policy learns the chunks of {name}, {steps}"
    if train.steps:
        return f"starts from {name}{', with its normalisers fitted again' * refit}"
    changes = f"; it predicted {before} and will predict {now}" if now != before else ""
    return f"rectifies {name}: it learns its own chunks, {steps}{changes}"


def _measure(run: Run, dataset: Demonstrations, sampler: Sampler) -> Rollout | None:
    """What measures the errors of the policy's chunks; None where the demonstrations' actions are not the policy's."""
    if dataset.actions.shape[1] != run.state.policy.config.action_dim:
        return None
    try:
        return ErrorMeter(run.training, run.validation, sampler).metrics
    except ValueError:  # actions that never change are no reason not to train
        return None


def _train(
    run: Run,
    settings: TrainSettings,
    seed: int,
    tracking: MetricsLog,
    record: Record,
    rollout: Rollout | None,
    measure: Rollout | None,
    world: World,
) -> None:
    """Train until the end or a signal, and print the speed and the skipped steps."""
    first_step, began = run.state.step, time.perf_counter()
    with _checkpoint_named(record.folder), stop_on_signal() as should_stop:

        def interruptible(policy: DiffusionPolicy) -> dict[str, float]:
            assert rollout is not None
            with should_stop.at_once():  # the state was saved before
                return rollout(policy)

        train(
            run,
            settings,
            seed=seed,
            tracker=tracking,
            save=record.save,
            rollout=rollout and interruptible,
            measure=measure,
            should_stop=should_stop,
            world=world,
        )
    seconds, steps = time.perf_counter() - began, run.state.step - first_step
    rate = steps * min(settings.batch_size, len(run.training)) / seconds
    print(f"{steps} steps in {seconds:.1f} s, {rate:.0f} transitions a second")
    if skipped := run.state.skipped:
        print(f"{len(skipped)} of {run.state.step} steps skipped, not finite: {', '.join(map(str, skipped))}")


@contextmanager
def _checkpoint_named(folder: Path) -> Iterator[None]:
    """Add the last good checkpoint to the error that ends a training."""
    try:
        with peers_needed():
            yield
    except (FloatingPointError, PeerError) as error:
        there = is_checkpoint(folder)
        kept = f"the last good checkpoint is {folder}" if there else "nothing was saved yet"
        raise type(error)(f"{error}; {kept}") from error


def _facts(
    dataset: Demonstrations, env: dict[str, Any] | None, record: Record, settings: TrainSettings
) -> TrainingFacts:
    """What the run's page says of it besides its metrics."""
    name = " ".join(map(str, env.values())) if env else dataset.name
    return TrainingFacts(
        title=f"Training: {name}",
        all_steps=settings.all_steps,
        phases=[(settings.steps, "rectification")] if settings.steps and settings.rectify_steps else [],
        rollout_episodes=settings.rollout_episodes,
        settings={"environment": env, **record.training},
    )


def _best(record: Record, run: Run) -> tuple[int, str] | None:
    """The step of the best checkpoint so far, and the checkpoint in words."""
    found = best_entry(record.folder, run.state.history)
    if found is None:
        return None
    step = int(found["step"])
    return step, f"step {step:,}, {measured(found, record.training['rollout_episodes'])}"
