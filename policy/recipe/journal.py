"""What a search has done so far: a file from which it goes on, and which its report is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from policy.common.files import write_text
from policy.recipe.halving import Cost, Plan
from policy.statistics.simultaneous import compare_means_with_best

JOURNAL = "recipe.json"
CONFIDENCE = 0.95
# Where there are rollouts, the error alone drops a recipe only if it is surely more than so many times the least one:
# in the table of docs/experiments/one_cube.md, a recipe with twice the error of another succeeds three times as often.
FAR = 3.0
# A difference of errors, and its interval.
Difference = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a recipe reached on a rung.

    Attributes:
        errors: its error on each held-out episode; none where its training failed.
        success: whether each rollout succeeded, by seed; none without rollouts.
        scores: the score of each rollout.
        failed: why it has no error: its training failed, or is too slow; empty if it has one.
    """

    errors: tuple[float, ...] = ()
    success: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    failed: str = ""


Results = Mapping[str, Measured]


@dataclass(kw_only=True)
class Journal:
    """The state of a search.

    Attributes:
        recipes: the changes of each recipe that is tried, by name.
        costs: what each recipe costs on this machine.
        plan: the plan.
        paired: whether a seed fixes the episode of a rollout, whichever recipe plays it.
        spent: seconds of the budget that were spent.
        episode_seconds: what an episode of a rollout costs; None without an environment that works.
        rungs: what was measured on each rung that was begun.
        chosen: name of the recipe that was chosen; empty before.
        steps: of a whole training, for which the learning rate was planned; 0 in a search of an earlier version.
    """

    recipes: dict[str, dict[str, Any]]
    costs: dict[str, Cost]
    plan: Plan
    paired: bool
    spent: float
    episode_seconds: float | None = None
    rungs: list[dict[str, Measured]] = field(default_factory=lambda: [{}])
    chosen: str = ""
    steps: int = 0

    def save(self, folder: Path) -> None:
        """Write the journal into the folder of the search."""
        write_text(folder / JOURNAL, TypeAdapter(Journal).dump_json(self, indent=1).decode() + "\n")

    @property
    def on_rung(self) -> list[str]:
        """The recipes of the newest rung: the better ones of the rung before."""
        number = len(self.rungs) - 1
        if not number:
            return list(self.recipes)
        best = promising(self.rungs[number - 1])[: self.plan.rungs[number].candidates]
        return [name for name in self.recipes if name in best]

    @property
    def decisive(self) -> int:
        """The index of the rung that decides: the newest one on which every recipe was measured, or else the first."""
        newest = len(self.rungs) - 1
        return newest if newest == 0 or len(self.rungs[newest]) == len(self.on_rung) else newest - 1


def read_journal(folder: Path) -> Journal | None:
    """Read the journal of a search; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / JOURNAL
    if not file.exists():
        return None
    try:
        return TypeAdapter(Journal).validate_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: choose another output_dir=, or remove the file to search anew") from error


def ranked(rung: Results) -> list[str]:
    """The recipes of a rung from the best to the worst: by rollouts if each one has them, or else by the error.

    Equal ones keep their order. One whose error is far from the least comes after all others whatever its rollouts,
    and one whose training failed comes last.
    """
    played, distant = has_rollouts(rung), far(rung)

    def worth(name: str) -> tuple[float, ...]:
        found = rung[name]
        if not found.errors:
            return (0.0,)
        rollouts = (fmean(found.success), fmean(found.scores)) if played else ()
        return (1.0, float(name not in distant), *rollouts, -fmean(found.errors))

    return sorted(rung, key=worth, reverse=True)


def has_rollouts(rung: Results) -> bool:
    """Whether every recipe of a rung that was trained without failure was rolled out."""
    return all(found.success for found in rung.values() if found.errors)


def error_differences(rung: Results) -> dict[str, Difference]:
    """The error of each recipe minus the least error, with intervals for all of them together; none without intervals.

    With a single held-out episode, or a single recipe, there is nothing to compare.
    """
    names = [name for name, found in rung.items() if found.errors]
    errors = [rung[name].errors for name in names]
    if len(names) < 2 or len(errors[0]) < 2:
        return {}
    best = min(range(len(names)), key=lambda number: fmean(errors[number]))
    return dict(zip(names, compare_means_with_best(errors, best, CONFIDENCE), strict=True))


def far(rung: Results) -> set[str]:
    """The recipes whose error is surely more than `FAR` times the least one."""
    least = min((fmean(found.errors) for found in rung.values() if found.errors), default=0.0)
    return {name for name, (_, low, _) in error_differences(rung).items() if low > (FAR - 1) * least}


def promising(rung: Results) -> list[str]:
    """The measured recipes of a rung that may go on, best first; with rollouts, those that are not far."""
    dropped = far(rung) if has_rollouts(rung) else set()
    return [name for name in ranked(rung) if name not in dropped and rung[name].errors]


def are_tied(rung: Results) -> bool:
    """Whether the rollouts of a rung are equally good for all recipes that may go on."""
    found = [rung[name] for name in promising(rung)]
    return has_rollouts(rung) and len({(fmean(each.success), fmean(each.scores)) for each in found}) == 1
