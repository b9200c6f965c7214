"""`ddim-train`: train a policy on demonstrations, and save it as a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from policy.checkpoint import best_entry, describe_best, is_checkpoint, measured, next_use
from policy.commands.record import Record, facts_of, record_in
from policy.commands.training_recipe import best_recipe
from policy.commands.training_rollouts import ROLLOUT_SEED, film_episodes, played, rolled_out, tried
from policy.commands.training_start import (
    Start,
    configured,
    env_of,
    found_relations,
    rollouts_of,
    start_of,
)
from policy.common.control_rate import stated_rate
from policy.common.device import check_device, has_bfloat16_products
from policy.common.errors import PeerError
from policy.common.interrupt import stop_on_signal
from policy.common.locks import only_process
from policy.common.output import output_folder
from policy.common.torchrun import World, joined_world, peers_needed
from policy.control.timeline import check_execution_horizon
from policy.data.demonstrations import Augment, Demonstrations
from policy.data.symmetry import check_symmetry
from policy.data.windows import split_episodes
from policy.diffusion.objective import DEFAULT_OBJECTIVE
from policy.diffusion.sampler import Sampler
from policy.model.config import PolicyConfig, PolicySettings
from policy.model.diffusion_policy import DiffusionPolicy
from policy.recipe.candidates import Candidate
from policy.recipe.demonstrations import allowed_by, check_data
from policy.recipe.settings import RecipeSettings
from policy.rollout.episodes import MakeEnv, check_num_envs
from policy.rollout.watch import ENV_PATIENCE, check_patience
from policy.statistics.fit import conclude
from policy.statistics.results import EpisodeResult
from policy.tracking.tracker import MetricsLog, NoTracker, OpenRun, SentToAll
from policy.tracking.training_page import PAGE, VIDEOS, TrainingFacts, training_page
from policy.training import loop
from policy.training.action_weights import spread_matters
from policy.training.by_heart import describe_by_heart, known_by_heart
from policy.training.errors import ErrorMeter
from policy.training.exchanged_things import describe_exchanged
from policy.training.preparation import Run, prepare_run
from policy.training.recovery import RecoveryMeter, describe_recoveries
from policy.training.settings import TrainSettings
from policy.training.start import config_for


def train_policy(
    make_env: MakeEnv,
    *,
    dataset: Demonstrations,
    env: dict[str, Any] | None = None,
    policy: Mapping[str, Any],
    sampler: partial[Sampler],
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
        sampler: sampling settings of the rollouts during training, which the checkpoint records for later ones; those
            that are left open are as the run's own checkpoint records, if it goes on, else as that of init=, unless the
            run only rectifies.
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
        execution_horizon: actions executed before the next plan, by default as the run's own checkpoint records, if it
            goes on, else as that of init= or teacher=, else 8.
        seed: seed of the split, the weights and every training step.
        num_envs: environments that run at once in the rollouts during training.
        env_patience: seconds that one call of the simulator may take in them.
        videos: first episodes of each of these rollouts to record, for the run's page.
        device: `cpu` or `cuda`; on torchrun, each process of a machine takes a GPU of its own.
        output_dir: receives `checkpoint/`, the page `training.html` and the metrics `history.jsonl`; by default a new
            folder under outputs/train.
        expected: success_rate and score_mean that a preset reaches, for some values of `ddim_steps`; only printed.

    Raises:
        ValueError: settings that do not fit the data or the environment, before training starts; or another process is
            training in this folder. The command has let `check_start` compare them with each other.
        FloatingPointError: see `policy.training.loop.train`; the message names the last good checkpoint.
        PeerError: another process of torchrun ended before its time; the message names the last good checkpoint.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    if not 0 <= videos <= train.rollout_episodes:
        raise ValueError(f"videos must be within 0..{train.rollout_episodes} (train.rollout_episodes); got {videos}")
    start = start_of(init, teacher, output_dir)
    env = env_of(dataset, env, start, train)
    if find_differences:
        policy = {**policy, **found_relations(dataset, policy, auxiliary, start)._asdict()}
    config, dataset = configured(policy, dataset, auxiliary, start, train)
    if recipe:
        check_data(dataset, train, seed)
    rate = stated_rate(dataset.metadata.get("rate_hz"))
    execution_horizon, chosen = rollouts_of(start, output_dir, train, execution_horizon, sampler)
    check_execution_horizon(execution_horizon, config.action_horizon)
    check_num_envs(num_envs)
    check_patience(env_patience)
    if augment:
        check_symmetry(augment, dataset)
    world = joined_world()
    device = check_device(world.device(device))

    def prepare(config: PolicyConfig, train: TrainSettings, **start: Any) -> Run:
        return prepare_run(config, dataset, train, seed=seed, device=device, augment=augment, **start)

    def prepare_recipe(candidate: Candidate) -> Run:
        return prepare(config_for(PolicySettings(**candidate.policy), dataset, auxiliary), candidate.train)

    refit = init_normalizers == "refit" and not (start and start.goes_on)  # a run that goes on has fitted them
    run = prepare(config, train, **(start.policies(train) if start else {}), refit=refit)
    settled = run.state.policy.settled(chosen)
    tasks = dataset.metadata.get("tasks")
    paired = True
    if env and world.first:
        rolls_out = bool(train.rollout_every or recipe)
        names = dataset.read_with.get("observation_keys")
        names = names if isinstance(names, Mapping) else {}
        found, paired = tried(make_env, env, env_patience, run.state.policy, rate, names, rolls_out=rolls_out)
        tasks = tasks or found

    record_of = partial(
        record_in,
        env=env,
        execution_horizon=execution_horizon,
        sampler=chosen,
        facts={
            **({start.role: start.digest} if start else {}),
            **({"init_normalizers": init_normalizers} if init else {}),
            **facts_of(dataset, seed=seed, rate=rate, tasks=tasks, augment=augment),
        },
    )
    play: Callable[..., list[EpisodeResult]] | None = None
    if env:
        play = partial(played, partial(make_env, **env), num_envs, env_patience, settled, execution_horizon)
    folder = Path(world.tell("output_dir", str(output_folder(output_dir, "train")) if world.first else None))
    if not world.first:
        _follow(run, record_of(folder, train), train, seed, world, rolls_out=env is not None)
        return
    if recipe:
        training, _ = split_episodes(dataset.originals, train.val_fraction, seed, dataset.held_out)
        best = best_recipe(
            recipe,
            policy,
            train,
            allowed_by(dataset, policy, auxiliary, config.action_horizon, training),
            folder=folder,
            sampler=settled,
            seed=seed,
            prepare=prepare_recipe,
            record_of=record_of,
            measure_of=partial(_measure, dataset, settled),
            play=play,
            paired=paired,
        )
        train = best.train
        expected = None if best.changes else expected
        run = prepare_recipe(best)
    film = partial(film_episodes, run.state, folder / VIDEOS, range(ROLLOUT_SEED, ROLLOUT_SEED + videos))
    rollout = partial(rolled_out, play, train, film) if play else None
    record = record_of(folder, train)
    with only_process(folder):
        record.resume(run.state, train)
        _describe(run, env, start, train, refit=refit)
        tracking = tracker(folder=folder, config={"env": env, **record.training, **vars(run.state.policy.config)})
        facts = _facts(dataset, env, record, train)
        with training_page(folder, facts, run.state.history, partial(_best, record, run)) as page:
            _train(run, train, seed, SentToAll(tracking, page), record, rollout, _measure(dataset, settled, run), world)
        tracked = tracking.finish()
        stopped = run.state.step < train.all_steps
        if stopped:
            print(f"stopped at step {run.state.step} and saved: the same command with output_dir={folder} goes on")
        else:
            _say_end(run, settled, record, train, tracked, expected or [])
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
        loop.train(
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
    run: Run,
    sampler: Sampler,
    record: Record,
    settings: TrainSettings,
    tracked: str,
    expected: Sequence[Mapping[str, float]],
) -> None:
    """Say what a complete training made, and what to do with it."""
    print(describe_best(record.folder, run.state, settings.rollout_episodes))
    if conclusion := conclude(run.state.history):
        print(conclusion.sentence)
    recovered = describe_recoveries(
        record.training,
        run.state.history,
        run.state.policy.config.auxiliary_shapes,
        weights_differ=spread_matters(run.training, run.state.policy.action_normalizer),
    )
    if recovered:
        print(recovered)
    if by_heart := known_by_heart(run.state.ema, run.training, run.validation, sampler):
        print(describe_by_heart(by_heart, run.state.ema.config))
    print(f"checkpoint: {record.folder}" + (f"   tracked: {tracked}" if tracked else ""))
    print(f"page: {record.folder.parent / PAGE}")
    # The figures of presets are of diffusion.
    for row in expected if run.state.policy.config.objective == DEFAULT_OBJECTIVE else ():
        print("the preset, as it is, reaches: " + ", ".join(f"{name}={value:g}" for name, value in row.items()))
    if record.env is None:
        print("no environment is chosen, so there is nothing to roll out in: env=... of ddim-rollout chooses one")
    print(next_use(record.folder, record.env, record.sampler))


def _describe(run: Run, env: dict[str, Any] | None, start: Start | None, train: TrainSettings, *, refit: bool) -> None:
    episodes = run.training.episodes
    originals = len(np.unique(run.training.demonstrations.originals[episodes]))
    made = f", made of {originals} by relabelling" if originals < len(episodes) else ""
    print(
        f"{len(run.training)} training windows from {len(episodes)} episodes{made}"
        f" ({len(run.validation.episodes)} held out), {run.state.policy.num_parameters / 1e6:.2f} M parameters"
    )
    if train.steps:
        passes = train.steps * train.batch_size / len(run.training)
        print(f"{train.steps:,} steps are {passes:,.{0 if passes >= 10 else 1}f} passes over these windows")
    on_cpu = run.state.policy.device.type == "cpu"
    if run.state.step == 0 and train.precision == "float32" and on_cpu and has_bfloat16_products():
        print(
            "this processor has instructions for bfloat16: train.precision=bfloat16 is probably faster (docs/scale.md)"
        )
    if run.noise:
        blurred = f", and blurs {', '.join(run.noise.blurred)}" if run.noise.blurred else ""
        print(f"corrective noise moves {', '.join(run.noise.moved)}{blurred}")
    if run.exchanged:
        print(describe_exchanged(run.exchanged.numbers))
    if start and run.state.step == 0:
        print(start.described(run.state.policy.config.predicts, train, refit=refit))
    if env is None:
        metadata = run.training.demonstrations.metadata
        reason = "the datasets are of different environments" if "envs" in metadata else "no environment is chosen"
        named = f"; the dataset names {metadata['env_name']}" if metadata.get("env_name") else ""
        print(f"{reason}, so there are no rollouts while training: env=... adds them{named}")


def _measure(dataset: Demonstrations, sampler: Sampler, run: Run) -> loop.Measure | None:
    """What measures the errors of the policy's chunks and what they correct; None where the actions are not its own."""
    if dataset.actions.shape[1] != run.state.policy.config.action_dim:
        return None
    try:
        errors = ErrorMeter(run.training, run.validation, sampler)
    except ValueError:  # actions that never change are no reason not to train
        return None
    recovery = RecoveryMeter(run.state.policy.config, run.training, sampler)
    return lambda policy: {**errors.metrics(policy), **recovery.metrics(policy)}


def _train(
    run: Run,
    settings: TrainSettings,
    seed: int,
    tracking: MetricsLog,
    record: Record,
    rollout: loop.Measure | None,
    measure: loop.Measure | None,
    world: World,
) -> None:
    """Train until the end or a signal, and print the speed and the skipped steps."""
    first_step, began = run.state.step, time.perf_counter()
    with _checkpoint_named(record.folder), stop_on_signal() as should_stop:

        def interruptible(policy: DiffusionPolicy) -> dict[str, float]:
            assert rollout is not None
            with should_stop.at_once():  # the state was saved before
                return rollout(policy)

        loop.train(
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
    print(f"{steps} steps in {seconds:.1f} s, with what was measured on the way")
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
