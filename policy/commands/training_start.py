"""What a training starts from: its policy's settings, a trained policy if there is one, and the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from policy.checkpoint import Checkpoint, digest_of, is_checkpoint, load_checkpoint, merge_env
from policy.commands.record import newest_in
from policy.common.progress import say
from policy.common.torchrun import joined_world
from policy.control.timeline import EXECUTION_HORIZON, check_execution_horizon
from policy.data.demonstrations import Demonstrations
from policy.data.relations import Relations, find_relations, number_names, state_vectors
from policy.diffusion.sampler import Sampler
from policy.model.config import PolicyConfig, PolicySettings
from policy.model.diffusion_policy import DiffusionPolicy
from policy.recipe.search import check_folder
from policy.recipe.settings import RecipeSettings
from policy.training.phases import phases_of
from policy.training.preparation import check_settings
from policy.training.settings import TrainSettings
from policy.training.share import check_shares
from policy.training.start import config_for, config_from, config_of_student, fitting


def check_start(
    *,
    train: TrainSettings,
    policy: Mapping[str, Any] | None = None,
    init: Path | None = None,
    init_normalizers: Literal["keep", "refit"] = "keep",
    teacher: Path | None = None,
    output_dir: Path | None = None,
    recipe: RecipeSettings | None = None,
    sampler: partial[Sampler] | None = None,
    execution_horizon: int | None = None,
) -> None:
    """Check the settings of the policy, the sampler and what a run starts from, before demonstrations are read.

    Args:
        train: settings of the training.
        policy: see `train_policy`.
        init: see `train_policy`.
        init_normalizers: see `train_policy`.
        teacher: see `train_policy`.
        output_dir: the run's folder; a run that goes on does not need the checkpoint that it began from.
        recipe: see `train_policy`.
        sampler: see `train_policy`.
        execution_horizon: see `train_policy`.

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
        check_folder(output_dir)
    _check_ways(train, init, teacher)
    if init_normalizers == "refit":
        _check_refit(train, init)
    path = init or teacher
    if not init:  # a teacher brings the length of its chunks
        _check_new_policy(PolicySettings(**(policy or {})), train, sampler, None if teacher else execution_horizon)
    if path and not (output_dir and is_checkpoint(newest_in(output_dir))):
        try:
            digest_of(path)
        except ValueError as error:
            raise ValueError(f"{'init' if init else 'teacher'}={path}: {error}") from error


def _check_new_policy(
    settings: PolicySettings, train: TrainSettings, sampler: partial[Sampler] | None, execution_horizon: int | None
) -> None:
    """Refuse settings of a new policy that do not fit each other, its training or its rollouts."""
    schedule = check_settings(settings, train)
    if sampler:
        sampler().settled(settings.objective, schedule.num_steps)
    if execution_horizon is not None:
        check_execution_horizon(execution_horizon, settings.action_horizon)


def _check_ways(train: TrainSettings, init: Path | None, teacher: Path | None) -> None:
    """Refuse ways to start that contradict each other, or that begin from nothing."""
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
class Start:
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

    def described(self, predicts: str, train: TrainSettings, *, refit: bool) -> str:
        """Return in one sentence which trained policy this is, and what the run does with it.

        Args:
            predicts: what the policy of the run predicts, see `PolicyConfig`.
            train: settings of the training.
            refit: whether its normalisers were fitted again.
        """
        name, before = f"{self.checkpoint.path} ({self.digest})", self.checkpoint.policy.config.predicts
        steps = f"sampled with {train.rectify_ddim_steps} steps"
        if self.role == "teacher":
            return f"a new policy learns the chunks of {name}, {steps}"
        if train.steps:
            return f"starts from {name}{', with its normalisers fitted again' * refit}"
        changes = f"; it predicted {before} and will predict {predicts}" if predicts != before else ""
        return f"rectifies {name}: it learns its own chunks, {steps}{changes}"


def start_of(init: Path | None, teacher: Path | None, output_dir: Path | None) -> Start | None:
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
        return Start(role=role, checkpoint=loaded, digest=loaded.digest, goes_on=False)
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
    return Start(role=role, checkpoint=own, digest=began, goes_on=True)


def rollouts_of(
    start: Start | None,
    output_dir: Path | None,
    train: TrainSettings,
    execution_horizon: int | None,
    sampler: partial[Sampler],
) -> tuple[int, Sampler]:
    """Choose what the checkpoints record for rollouts: what the user gives, else what a checkpoint records.

    That is the run's own, if it goes on, or that of the trained policy that it starts from. Its sampler is not handed
    on to a policy that only learns from chunks, because this changes what it needs.

    Args:
        start: the trained policy, if there is one.
        output_dir: the run's folder.
        train: settings of the training.
        execution_horizon: the user's, or None.
        sampler: the user's settings.

    Returns:
        The execution horizon and the sampler settings.

    Raises:
        ValueError: see `Checkpoint.sampler_with`.
    """
    newest = output_dir and newest_in(output_dir)
    if start:
        noted: Checkpoint | None = start.checkpoint  # the run's own, if it goes on
    else:
        noted = load_checkpoint(newest) if newest and is_checkpoint(newest) else None
    if execution_horizon is None:
        execution_horizon = noted.execution_horizon if noted else EXECUTION_HORIZON
    hands_on = start is None or start.goes_on or (start.role == "init" and train.steps > 0)
    return execution_horizon, noted.sampler_with(sampler.keywords) if noted and hands_on else sampler()


def env_of(
    dataset: Demonstrations, env: dict[str, Any] | None, start: Start | None, train: TrainSettings
) -> dict[str, Any] | None:
    """Choose the environment: of the demonstrations that a policy learns to act from, or else of the trained policy."""
    stored = [(dataset.metadata.get("env"), dataset.source)]
    if start:
        stored.append((start.checkpoint.env, str(start.checkpoint.path)))
    found, source = next(((e, s) for e, s in (stored if train.steps else reversed(stored)) if e), (None, ""))
    return merge_env(found, env, source or dataset.source) if env or found else None


def found_relations(
    dataset: Demonstrations, given: Mapping[str, Any], auxiliary: Sequence[str], start: Start | None
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
    vectors = state_vectors(dataset, auxiliary)
    relations = find_relations(dataset, vectors)
    places = number_names({key: dataset.observation_shapes[key][0] for key in sorted(vectors)})
    found = [f"{places[i]} - {places[j]}" for i, j in relations.differences]
    found += [f"direction {places[i]} to {places[j]}" for i, j in relations.direction_differences]
    say(f"differences that the policy observes too: {', '.join(found) or 'none, no two quantities are alike'}")
    return relations


def configured(
    given: Mapping[str, Any],
    dataset: Demonstrations,
    auxiliary: Sequence[str],
    start: Start | None,
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
