"""The search for a recipe: rungs of training runs, one at a time, within a budget, that goes on where it stopped."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from policy.checkpoint import is_checkpoint
from policy.checkpoint.files import CHECKPOINT
from policy.checkpoint.keeping import copy_checkpoint
from policy.common.durations import duration_text, exact_text
from policy.common.errors import reason_of
from policy.common.files import write_text
from policy.common.interrupt import StopRequest
from policy.common.progress import progress, say
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy
from policy.recipe.candidates import CANDIDATES, Candidate
from policy.recipe.error import WINDOWS, held_out_errors
from policy.recipe.halving import Cost, plan_fastest, plan_last_rung
from policy.recipe.journal import JOURNAL, Journal, Measured, are_tied, promising, read_journal
from policy.recipe.report import changes_text, plan_text, report_text, rung_table, shared_text, verdict
from policy.recipe.settings import RecipeSettings
from policy.statistics.results import EpisodeResult, describe_broken
from policy.tracking.tracker import NoTracker
from policy.training.errors import action_deviation
from policy.training.loop import Measure, train
from policy.training.preparation import Run
from policy.training.state import TrainState

RECIPES = "recipes"
REPORT = "recipe.md"
# Before the plan is made, every recipe takes so many steps, the last of which are timed, and measures so many windows.
UNTIMED_STEPS = 3
TIMED_STEPS = 10
TIMED_WINDOWS = 64
# Episodes that are timed, all at once.
TIMED_EPISODES = 4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The training run of one recipe.

    Attributes:
        run: restored from its folder, if it has a checkpoint there.
        save: writes its checkpoint.
        measure: measures the errors of the policy's chunks for its history, or None.
    """

    run: Run
    save: Callable[[TrainState], None]
    measure: Measure | None = None


# Opens the training run of a recipe in a folder.
OpenTrial = Callable[[Candidate, Path], Trial]
# Rolls a policy out for episodes with these seeds.
Play = Callable[[DiffusionPolicy, range], list[EpisodeResult]]


def check_folder(folder: Path) -> None:
    """Refuse a folder whose training began without a search.

    Raises:
        ValueError: there is a checkpoint, and no journal.
    """
    if is_checkpoint(folder / CHECKPOINT) and not (folder / JOURNAL).exists():
        raise ValueError(
            f"{folder / CHECKPOINT} belongs to a run that began without recipe=auto: to go on with it, leave recipe="
            " out; to search, choose another output_dir="
        )


def search(
    candidates: Sequence[Candidate],
    fallen: Mapping[str, str],
    *,
    folder: Path,
    settings: RecipeSettings,
    sampler: Sampler,
    seed: int,
    first_seed: int,
    open_trial: OpenTrial,
    play: Play | None,
    paired: bool,
    stop: StopRequest,
) -> Candidate:
    """Find the best recipe, and put its checkpoint where the training goes on from it.

    Args:
        candidates: the recipes to try; equal ones are decided for the first.
        fallen: why each other one is not tried.
        folder: of the run; receives `recipes/NAME/`, `recipe.json`, `recipe.md` and `checkpoint/`.
        settings: of the search.
        sampler: how chunks are sampled.
        seed: of the training runs.
        first_seed: of the rollouts.
        open_trial: opens the training run of a recipe.
        play: rolls a policy out; None without an environment.
        paired: whether a seed fixes the episode.
        stop: whether the user asked for an end.

    Returns:
        The best recipe.

    Raises:
        ValueError: fewer than two recipes, a budget that is too small, or another search was begun in the folder.
        KeyboardInterrupt: the user asked for an end; the same call goes on.
    """
    journal = _journal_of(candidates, fallen, folder)
    running = _Search(
        by_name={candidate.name: candidate for candidate in candidates},
        folder=folder,
        budget=settings.seconds,
        sampler=sampler,
        seed=seed,
        first_seed=first_seed,
        open_trial=open_trial,
        play=play,
        stop=stop,
        spent_before=journal.spent if journal else 0.0,
    )
    if journal is None:
        journal = running.begin(paired)
        print(plan_text(journal, candidates[0].train))
    if not journal.chosen:
        running.climb(journal)
    if not (folder / REPORT).exists():
        write_text(folder / REPORT, report_text(journal, fallen, first_seed))
        print(f"{verdict(journal)}\nthe search: {folder / REPORT}")
    if not is_checkpoint(folder / CHECKPOINT):
        copy_checkpoint(running.folder_of(journal.chosen) / CHECKPOINT, folder / CHECKPOINT, with_training=True)
    return running.by_name[journal.chosen]


def _journal_of(candidates: Sequence[Candidate], fallen: Mapping[str, str], folder: Path) -> Journal | None:
    """Say which recipes are not tried, and return the journal of a search among the others; None before it is begun.

    Raises:
        ValueError: there is nothing to compare, or the journal is of another search.
    """
    for name, reason in fallen.items():
        print(f"recipe {name} is not tried: {reason}")
    if len(candidates) < 2:
        raise ValueError(
            f"recipe=auto has {len(candidates)} recipe to try and nothing to compare it with: name two or more in"
            " recipe.candidates=, keep fewer settings, or leave recipe= out"
        )
    journal = read_journal(folder)
    if journal and journal.recipes != {candidate.name: dict(candidate.changes) for candidate in candidates}:
        gone = [name for name in journal.recipes if name not in CANDIDATES]
        why = f"; {gone[0]} is one of another version of ddim-policy" if gone else ""
        raise ValueError(
            f"{folder / JOURNAL} is a search among other recipes ({', '.join(journal.recipes)}){why}: give the same"
            " settings to go on, or another output_dir="
        )
    steps = candidates[0].train.steps
    if journal and not journal.chosen and journal.steps not in (0, steps):
        raise ValueError(
            f"{folder / JOURNAL} is a search that was begun for train.steps={journal.steps}; got {steps}: give the same"
            " until a recipe is chosen, or another output_dir="
        )
    return journal


@dataclass(kw_only=True)
class _Search:
    """One call of `search`: its arguments, and its clock."""

    by_name: Mapping[str, Candidate]
    folder: Path
    budget: float
    sampler: Sampler
    seed: int
    first_seed: int
    open_trial: OpenTrial
    play: Play | None
    stop: StopRequest
    spent_before: float
    began: float = field(default_factory=time.monotonic)
    bar: tqdm[Any] | None = None

    @property
    def spent(self) -> float:
        """Seconds of the budget that were spent."""
        return self.spent_before + time.monotonic() - self.began

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.spent >= self.budget

    def folder_of(self, name: str) -> Path:
        """The folder of a recipe's training run."""
        return self.folder / RECIPES / name

    def begin(self, paired: bool) -> Journal:
        """Name the recipes, time each one for a moment, and make the plan."""
        for name, candidate in self.by_name.items():
            print(f"recipe {name}: {changes_text(candidate.changes)}")
        costs: dict[str, Cost] = {}
        episode_seconds = None
        failed: dict[str, Measured] = {}
        for name, candidate in progress(self.by_name.items(), total=len(self.by_name), desc="timing", unit="recipe"):
            trial = self.open_trial(candidate, self.folder_of(name))
            try:
                costs[name] = self.timed(candidate, trial)
            except FloatingPointError as error:
                costs[name], failed[name] = Cost(step=0.0, rung=0.0), self.failed(name, error)
            if episode_seconds is None and self.play:
                episode_seconds = self.time_episodes(trial)
            if self.over and len(costs) < len(self.by_name):
                raise ValueError(
                    f"recipe.budget={exact_text(self.budget)} is too small: {len(costs)} of {len(self.by_name)} recipes"
                    f" have been timed, which took {duration_text(self.spent)}: raise it, or name fewer in"
                    " recipe.candidates="
                )
        train_steps = next(iter(self.by_name.values())).train.steps
        trained = {name: cost for name, cost in costs.items() if name not in failed}
        plan, planned = plan_fastest(trained or costs, self.budget, self.spent, train_steps, episode_seconds)
        for name in [name for name in trained if name not in planned]:
            failed[name] = Measured(failed=f"left out, the budget is too small ({costs[name].step:.2g} s a step)")
            print(f"recipe {name} is {failed[name].failed}")
        recipes = {name: dict(candidate.changes) for name, candidate in self.by_name.items()}
        journal = Journal(
            recipes=recipes,
            costs=costs,
            plan=plan,
            paired=paired,
            spent=self.spent,
            episode_seconds=episode_seconds,
            rungs=[failed],
            steps=train_steps,
        )
        journal.save(self.folder)
        return journal

    def timed(self, candidate: Candidate, trial: Trial) -> Cost:
        """Train and measure for a moment, and say what a recipe costs."""
        first = trial.run.state.step + UNTIMED_STEPS
        began = time.monotonic()
        self.train(candidate, trial, first, self.stop)
        warm, middle = time.monotonic(), trial.run.state.step
        self.train(candidate, trial, first + TIMED_STEPS, self.stop)
        trained = time.monotonic()
        timed = max(1, trial.run.state.step - middle)  # fewer than asked for where the whole training is shorter
        self.errors(trial, TIMED_WINDOWS)
        windows = len(trial.run.validation)
        measuring = (time.monotonic() - trained) * min(WINDOWS, windows) / min(TIMED_WINDOWS, windows)
        return Cost(step=(trained - warm) / timed, rung=warm - began + measuring)

    def failed(self, name: str, error: FloatingPointError) -> Measured:
        """The result of a recipe whose training failed."""
        warnings.warn(f"recipe {name} failed: {error}", stacklevel=2)
        return Measured(failed="its loss is not finite")

    def time_episodes(self, trial: Trial) -> float | None:
        """Seconds that an episode takes, of a policy that has hardly learnt and so uses all its control steps."""
        before = time.monotonic()
        played = self.played(trial, TIMED_EPISODES)
        return (time.monotonic() - before) / TIMED_EPISODES if played else None

    def climb(self, journal: Journal) -> None:
        """Train and measure rung after rung until the budget is spent, and choose."""
        with progress(total=math.ceil(self.budget), initial=int(self.spent), desc="recipes", unit="s") as self.bar:
            while not self.over and self.complete_rung(journal):
                said = self.replan(journal)
                say(rung_table(len(journal.rungs) - 1, journal))
                if said:
                    say(said)
                if self.is_last(journal) or not promising(journal.rungs[-1]):
                    break
                journal.rungs.append({})
        self.choose(journal)

    def replan(self, journal: Journal) -> str:
        """Change the plan where the rollouts of the newest rung leave one recipe, or tell nothing; say the latter."""
        number, rung = len(journal.rungs) - 1, journal.rungs[-1]
        names = promising(rung)
        if not journal.plan.episodes or self.is_last(journal) or not (len(names) < 2 or are_tied(rung)):
            return ""
        costs = [journal.costs[name] for name in names]
        steps = next(iter(self.by_name.values())).train.steps
        left = self.budget - self.spent if len(names) > 1 else 0.0
        journal.plan = plan_last_rung(journal.plan, number + 1, costs, left, steps, journal.episode_seconds or 0.0)
        return "" if self.is_last(journal) else shared_text(journal)

    def show(self) -> bool:
        """Move the bar, which counts the seconds of the budget, and return False."""
        assert self.bar is not None
        self.bar.update(int(self.spent) - self.bar.n)
        return False

    def complete_rung(self, journal: Journal) -> bool:
        """Train and measure the recipes of the newest rung; return False if the budget ended before the last one."""
        number, names = len(journal.rungs) - 1, journal.on_rung
        rung, steps = journal.rungs[number], journal.plan.rungs[number].steps
        tried = [name for name in names if name not in rung or not rung[name].failed]
        for place, name in enumerate(tried):
            if name in rung:
                continue
            say(
                f"rung {number + 1} of {len(journal.plan.rungs)}, recipe {place + 1} of {len(tried)}: {name}, to step"
                f" {steps:,}; {duration_text(self.budget - self.spent)} of the budget are left"
            )
            try:
                if found := self.measured(name, steps, journal.plan.episodes):
                    rung[name] = found
            finally:
                journal.spent = self.spent
                journal.save(self.folder)
            if not found:
                return False
        return True

    def is_last(self, journal: Journal) -> bool:
        """Whether the newest rung is the last one."""
        return len(journal.rungs) == len(journal.plan.rungs)

    def measured(self, name: str, steps: int, episodes: int) -> Measured | None:
        """Train a recipe up to a step and measure it; None if the budget ended before that step."""
        candidate = self.by_name[name]
        trial = self.open_trial(candidate, self.folder_of(name))
        try:
            self.train(candidate, trial, steps, lambda: self.show() or self.over or self.stop())
        except FloatingPointError as error:
            return self.failed(name, error)
        if trial.run.state.step < steps:
            return None
        errors = self.errors(trial, WINDOWS)
        results = self.played(trial, episodes)
        return Measured(
            errors=tuple(errors),
            success=tuple(result.success for result in results),
            scores=tuple(result.score for result in results),
        )

    def train(self, candidate: Candidate, trial: Trial, steps: int, should_stop: Callable[[], bool]) -> None:
        """Train up to a step; the checkpoint is written.

        Raises:
            KeyboardInterrupt: the user asked for an end.
        """
        train(
            trial.run,
            candidate.train,
            seed=self.seed,
            tracker=NoTracker(),
            save=trial.save,
            measure=trial.measure,
            should_stop=should_stop,
            until=steps,
        )
        if self.stop():
            raise KeyboardInterrupt

    def errors(self, trial: Trial, windows: int) -> list[float]:
        """The error of the averaged policy on held-out episodes."""
        run = trial.run
        scale = action_deviation(run.training)
        with self.stop.at_once():
            return held_out_errors(run.state.ema, self.sampler, run.validation, scale, windows)

    def played(self, trial: Trial, episodes: int) -> list[EpisodeResult]:
        """Roll the averaged policy out; no results if the simulator fails, whatever it does."""
        if not (episodes and self.play):
            return []
        try:
            with self.stop.at_once():
                results = self.play(trial.run.state.ema, range(self.first_seed, self.first_seed + episodes))
        except Exception as error:
            warnings.warn(f"a rollout did not finish, and the held-out error decides: {reason_of(error)}", stacklevel=2)
            return []
        for sentence in describe_broken(results):
            warnings.warn(sentence, stacklevel=2)
        return results

    def choose(self, journal: Journal) -> None:
        """Choose the best recipe of the rung that decides.

        Raises:
            ValueError: none was measured, or the training of each one failed.
        """
        best = promising(journal.rungs[journal.decisive])
        if not best and len(journal.rungs[0]) < len(journal.recipes):
            raise ValueError(
                f"the budget ended before a single recipe was measured: the same command with output_dir={self.folder}"
                f" and more than recipe.budget={exact_text(self.budget)} goes on"
            )
        if not best:
            raise ValueError("the loss of every recipe that was tried is not finite: lower train.learning_rate")
        journal.chosen, journal.spent = best[0], self.spent
        journal.save(self.folder)
