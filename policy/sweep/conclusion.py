"""The conclusion of a sweep: its cells compared with the best one, and its answer in one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy.statistics.paired import PairedDifference
from policy.statistics.results import EpisodeResult, describe_broken
from policy.sweep.comparison import Advice, Comparison, words_of
from policy.sweep.grid import Row, uniform, varying
from policy.sweep.recipes import scope_of


@dataclass(frozen=True, kw_only=True)
class Swept:
    """The cells of a sweep with their results, run here or merged from other sweeps.

    Attributes:
        rows: one per cell, see `row_of`, with the cell's id as `cell`.
        results: the episodes of each cell, the same seeds in the same order; of a recipe, checkpoint after checkpoint.
        env: settings of the environment.
        warnings: given before the run.
        paired: whether equal seeds are equal episodes.
        members: the checkpoints of each cell, where a cell may be a recipe.
    """

    rows: list[Row]
    results: list[list[EpisodeResult]]
    env: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    paired: bool = True
    members: list[list[str]] = field(default_factory=list)

    @property
    def episodes(self) -> list[Row]:
        """One row per episode, of all cells; that of a recipe says by which checkpoint."""
        rows = []
        for number, (row, found) in enumerate(zip(self.rows, self.results, strict=True)):
            members = self.members[number] if self.members else []
            for episode, result in enumerate(found):
                by = {"checkpoint": members[episode * len(members) // len(found)]} if len(members) > 1 else {}
                rows.append({"cell": row["cell"], **by, **result.row()})
        return uniform(rows, later={"broke_off": "", "checkpoint": ""})


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The results of a sweep, as they are written and shown.

    Attributes:
        title: the environment, in words.
        rows: one per cell, with its difference to the best cell and its verdict.
        episodes: one row per episode, of all cells.
        env: settings of the environment.
        margin: see `recommend`.
        advice: the recommendation.
        answer: the recommendation in a sentence, with its figures.
        given: warnings that were given before the run, in sentences.
        found: those that its results give.
        paired: see `Swept`.
        between: comparisons between checkpoints, see `between_checkpoints`.
    """

    title: str
    rows: list[Row]
    episodes: list[Row]
    env: dict[str, Any]
    margin: float
    advice: Advice
    answer: str
    given: list[str]
    found: list[str]
    paired: bool
    between: list[Row]

    @property
    def warnings(self) -> list[str]:
        """What a reader must know besides, in sentences."""
        return [*self.given, *self.found]

    @property
    def scope(self) -> str:
        """What the intervals hold, and what they leave out."""
        return scope_of(self.rows)

    @property
    def shown(self) -> list[int]:
        """Indices of the cells to watch side by side: the cheapest, the recommended one and the best."""
        rows, advice = self.rows, self.advice
        cheapest = min(range(len(rows)), key=lambda number: (rows[number]["ddim_steps"], number))
        chosen = advice.best if advice.cell is None else advice.cell
        return sorted({cheapest, chosen, advice.best}, key=lambda number: (rows[number]["ddim_steps"], number))

    @property
    def differences(self) -> list[str]:
        """Each cell's difference of success rate to the best cell with its interval, in points, as text."""
        return ["best" if n == self.advice.best else _difference(row) for n, row in enumerate(self.rows)]

    @property
    def settings(self) -> dict[str, Any]:
        """Further facts about the sweep that a reader needs, by name."""
        seeds = [row["seed"] for row in self.episodes if row["cell"] == self.rows[0]["cell"]]
        return {
            "environment": self.env,
            "checkpoints": ", ".join(dict.fromkeys(row["checkpoint"] for row in self.rows)),
            "back end": ", ".join(dict.fromkeys(row["backend"] for row in self.rows if "backend" in row)),
            "seeds": f"{min(seeds)} to {max(seeds)}",
            "margin": self.margin,
        }


def conclude(swept: Swept, margin: float) -> Conclusion:
    """Compare the cells and recommend one; nothing is read, written or printed.

    Args:
        swept: the cells and their results.
        margin: the difference of success rates from which a cell counts as worse, in (0, 1).

    Returns:
        The conclusion.

    Raises:
        ValueError: see `recommend`.
    """
    rows = uniform(swept.rows)
    success = [[result.success for result in found] for found in swept.results]
    compared = Comparison(rows=rows, success=success, paired=swept.paired)
    cost = [(row["ddim_steps"], row["latency_ms_median"]) for row in rows]
    advice = compared.recommend(cost, margin)
    differences = [
        {"difference": c.difference, "difference_low": c.low, "difference_high": c.high, "p_value": c.adjusted_p_value}
        for c in compared.differences(advice.best)
    ]
    return Conclusion(
        title=" ".join(str(value) for value in swept.env.values()),
        rows=[
            {**row, **to_best, "not_worse": verdict}
            for row, to_best, verdict in zip(rows, differences, [cell.verdict for cell in advice.cells], strict=True)
        ],
        episodes=swept.episodes,
        env=swept.env,
        margin=margin,
        advice=advice,
        answer=answer_of(rows, advice),
        given=swept.warnings,
        found=describe_broken([result for found in swept.results for result in found]),
        paired=swept.paired,
        between=between_checkpoints(rows, success, paired=swept.paired),
    )


def between_checkpoints(rows: Sequence[Row], success: Sequence[Sequence[bool]], *, paired: bool) -> list[Row]:
    """Compare each further checkpoint or recipe at its fewest denoising steps with the first one at its most.

    Which cells are compared does not depend on their results, so that the intervals hold for each comparison.

    Args:
        rows: one per cell; the first checkpoint is that of the first row.
        success: outcomes of the cells on the same episodes, of a recipe checkpoint after checkpoint.
        paired: see `Swept`.

    Returns:
        For each further checkpoint the two cells' ids, the difference of their success rates with its 95 % interval,
        and all this as a `sentence`; none for a sweep of one checkpoint.
    """
    cells: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        cells.setdefault(row["checkpoint"], []).append(number)
    first, *others = cells.values()
    cost = [(row["ddim_steps"], row["latency_ms_median"]) for row in rows]
    reference = max(first, key=cost.__getitem__)
    differences = Comparison(rows=rows, success=success, paired=paired).differences(reference) if others else ()
    return [
        _compared(rows, number, reference, differences[number], len(success[0]) // rows[0].get("training_seeds", 1))
        for number in (min(numbers, key=cost.__getitem__) for numbers in others)
    ]


def _compared(rows: Sequence[Row], number: int, reference: int, found: PairedDifference, episodes: int) -> Row:
    row, slow = rows[number], rows[reference]
    figures = {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
    points = "{:+.1f} points (95 %: {:+.1f} to {:+.1f})".format(*(100 * value for value in figures.values()))
    return {
        "cell": row["cell"],
        "reference": slow["cell"],
        **figures,
        "sentence": f"{label_of(rows, row)} differs from {label_of(rows, slow)} by {points} of success, over"
        f" {episodes:,} episodes; a chunk takes {row['latency_ms_median']:.1f} ms instead of"
        f" {slow['latency_ms_median']:.1f}.",
    }


def answer_of(rows: Sequence[Row], advice: Advice) -> str:
    """The answer in one sentence: the recommended settings, their success and their latency."""
    words = words_of(advice, [label_of(rows, row) for row in rows])
    if advice.cell is None:
        return f"No recommendation yet: {words}."
    row = rows[advice.cell]
    return (
        f"{label_of(rows, row)}: {words}. Success {row['success_rate']:.0%}"
        f" ({row['success_low']:.0%} to {row['success_high']:.0%}), {row['latency_ms_median']:.1f} ms a chunk: planning"
        f" keeps pace up to {row['control_rate_hz']:.0f} Hz."
    )


def label_of(rows: Sequence[Row], row: Row) -> str:
    """The settings that distinguish a row from the others, in words."""
    return ", ".join(f"{axis} {row[axis]}" for axis in ("ddim_steps", *varying(rows)))


def _difference(row: Row) -> str:
    points = [100 * row[key] for key in ("difference", "difference_low", "difference_high")]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


def telling_seeds(results: Sequence[Sequence[EpisodeResult]], count: int) -> list[int]:
    """Choose the seeds of the episodes that are worth watching.

    Args:
        results: results of the cells to watch, the same seeds in the same order.
        count: maximum number of seeds.

    Returns:
        Seeds taken in turns from three kinds of episodes, so that failures are not hidden: those on which cells differ,
        those that all cells solved, and those that all cells failed.
    """
    by_seed = [[found[n].success for found in results] for n in range(len(results[0]))]
    split = [n for n, solved in enumerate(by_seed) if any(solved) and not all(solved)]
    solved_by_all = [n for n, solved in enumerate(by_seed) if all(solved)]
    failed_by_all = [n for n, solved in enumerate(by_seed) if not any(solved)]
    kinds = [kind for kind in (split, solved_by_all, failed_by_all) if kind]
    turns = [kind[turn] for turn in range(max(map(len, kinds))) for kind in kinds if turn < len(kind)]
    return [results[0][n].seed for n in turns[:count]]


def read_swept(folders: Sequence[Path]) -> Swept:
    """Read the cells of several finished sweeps.

    Args:
        folders: each with a `sweep.json`.

    Returns:
        The cells, in the order of the folders.

    Raises:
        ValueError: a folder without a finished sweep, different environments or episodes, or a cell that occurs twice.
    """
    rows: list[Row] = []
    results: list[list[EpisodeResult]] = []
    members: list[list[str]] = []
    first: dict[str, Any] = {}
    paired, warnings = True, list[str]()
    for folder in folders:
        try:
            document = json.loads((folder / "sweep.json").read_text())
            found = {row["cell"]: row for row in document["cells"]}
            episodes = {
                cell: [EpisodeResult.from_row(row) for row in document["episodes"] if row["cell"] == cell]
                for cell in found
            }
            named = [
                list(dict.fromkeys(row["checkpoint"] for row in document["episodes"] if row["cell"] == cell))
                if found[cell].get("training_seeds", 1) > 1
                else [found[cell]["checkpoint"]]
                for cell in found
            ]
            seen = {
                "env": document["env"],
                "seeds": sorted({result.seed for listed in episodes.values() for result in listed}),
            }
            found_in_results = describe_broken([result for listed in episodes.values() for result in listed])
            given = [str(said) for said in document.get("warnings", []) if said not in found_in_results]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no finished sweep ({error!r}): run it to its end first") from error
        first = first or seen
        if differs := [name for name in seen if seen[name] != first[name]]:
            raise ValueError(f"{differs[0]} of {folder} and of {folders[0]} differ: only equal ones can be compared")
        if repeated := found.keys() & {row["cell"] for row in rows}:
            raise ValueError(f"{folder} repeats the cell {min(repeated)}: leave one of them out")
        paired = paired and document.get("paired", True) is True
        rows += found.values()
        results += episodes.values()
        members += named
        warnings += [said for said in given if said not in warnings]
    ran = [first["seeds"] * row.get("training_seeds", 1) for row in rows]
    if not rows or [[result.seed for result in listed] for listed in results] != ran:
        raise ValueError(f"the cells of {', '.join(map(str, folders))} have not all run the same episodes")
    return Swept(rows=rows, results=results, env=first["env"], warnings=warnings, paired=paired, members=members)
