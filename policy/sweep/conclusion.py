"""The conclusion of a sweep: its cells compared with the best one, and its answer in one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policy.rollout.provenance import Provenance, describe_provenance
from policy.statistics.paired import PairedDifference
from policy.statistics.recommendation import in_points
from policy.statistics.results import EpisodeResult, describe_broken
from policy.statistics.sequential import ERROR
from policy.sweep.comparison import Advice, Comparison, words_of
from policy.sweep.controls import against_controls
from policy.sweep.facts import WHAT_TO_TRY, facts_of
from policy.sweep.looks import LookPlan, describe_saving, success_of
from policy.sweep.recipes import scope_of
from policy.sweep.rows import Row, below_margin, costs_of, label_of, shared, uniform
from policy.sweep.table import rate_text


@dataclass(frozen=True, kw_only=True)
class Swept:
    """The cells of a sweep with their results, run here or merged from other sweeps.

    Attributes:
        rows: one per cell, see `row_of`, with the cell's id as `cell`.
        results: the episodes of each cell, the same seeds in the same order, of a recipe checkpoint after checkpoint; a
            cell that stopped early has fewer.
        env: settings of the environment.
        warnings: given before the run.
        paired: whether equal seeds are equal episodes.
        left_out: a sentence about the cells that were too slow to take part, see `within`; empty without any.
        plan: the plan of looks; None for merged sweeps other than the shards of one.
        alpha: the probability of a wrong recommendation that the plan may spend, or that the merged sweeps left.
        made_with: what the episodes were run with, each provenance once.
        members: the checkpoints of each cell, where a cell may be a recipe.
    """

    rows: list[Row]
    results: list[list[EpisodeResult]]
    env: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    paired: bool = True
    left_out: str = ""
    plan: LookPlan | None = None
    alpha: float = ERROR
    made_with: list[Provenance] = field(default_factory=list)
    members: list[list[str]] = field(default_factory=list)

    def at(self, margin: float) -> Swept:
        """The same cells with another margin in their plan, if they have one."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, margin=margin)) if self.plan else self

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
        swept: the cells and their results.
        rows: one per cell, with its difference to the best cell and its verdict.
        margin: see `recommend`.
        advice: the recommendation; it has no cell where none reaches the margin, see `below_margin`.
        answer: the recommendation in a sentence, with its figures.
        found: warnings that the results give, in sentences; those of `swept` were given before the run.
        between: comparisons between checkpoints, see `between_checkpoints` and `against_controls`.
    """

    swept: Swept
    rows: list[Row]
    margin: float
    advice: Advice
    answer: str
    found: list[str]
    between: list[Row]

    @property
    def warnings(self) -> list[str]:
        """What a reader must know besides, in sentences."""
        return [*self.swept.warnings, *self.found]

    @property
    def scope(self) -> str:
        """What the intervals hold, and what they leave out."""
        early = " They are computed as if the number of episodes had been fixed beforehand; the recommendation is not."
        return scope_of(self.rows) + (early if self.swept.plan and self.swept.plan.adaptive else "")

    @property
    def summary(self) -> Row:
        """What `sweep.json` holds beside the cells and the episodes; what does not apply is left out."""
        swept = self.swept
        optional = {
            "plan": dataclasses.asdict(swept.plan) if swept.plan else None,
            "between_checkpoints": self.between,
            "warnings": self.warnings,
            "left_out": swept.left_out,
            "what_to_try": self.what_to_try,
        }
        return {
            "env": swept.env,
            "margin": self.margin,
            "alpha": swept.alpha,
            "answer": self.answer,
            "intervals": self.scope,
            "made_with": swept.made_with,
            **{name: value for name, value in optional.items() if value},
            **({} if swept.paired else {"paired": False}),
        }

    @property
    def facts(self) -> dict[str, str]:
        """How sure the recommendation is and what would change it, in sentences; see `facts_of`."""
        return facts_of(self.rows, self.advice, paired=self.swept.paired)

    @property
    def what_to_try(self) -> str:
        """What may help where more denoising steps solve fewer episodes; empty where that is not shown."""
        return self.facts.get(WHAT_TO_TRY, "")

    @property
    def shown(self) -> list[int]:
        """Indices of the cells to watch side by side: the cheapest, the recommended one and the best."""
        cost, advice = costs_of(self.rows), self.advice
        by_cost = sorted(range(len(cost)), key=cost.__getitem__)
        chosen = advice.best if advice.cell is None else advice.cell
        return sorted({by_cost[0], chosen, advice.best}, key=by_cost.index)

    @property
    def differences(self) -> list[str]:
        """Each cell's difference of success rate to the best cell with its interval, in points, as text."""
        return ["best" if n == self.advice.best else _difference(row) for n, row in enumerate(self.rows)]

    @property
    def settings(self) -> dict[str, Any]:
        """Further facts about the sweep that a reader needs, by name."""
        seeds = [result.seed for found in self.swept.results for result in found]
        return {
            "environment": self.swept.env,
            "checkpoints": ", ".join(dict.fromkeys(row["checkpoint"] for row in self.rows)),
            "back end": ", ".join(dict.fromkeys(row["backend"] for row in self.rows if "backend" in row)),
            "threads of a plan": ", ".join(dict.fromkeys(str(row.get("latency_threads") or 1) for row in self.rows)),
            **({"every cell": together} if (together := shared(self.rows)) else {}),
            "seeds": f"{min(seeds)} to {max(seeds)}",
            "margin": self.margin,
            **({"run with": run_with} if (run_with := describe_provenance(self.swept.made_with)) else {}),
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
    success = success_of(swept.results)
    compared = Comparison(rows=rows, success=success, paired=swept.paired)
    advice = compared.recommend(margin, swept.plan, swept.alpha)
    differences = [
        {"difference": c.difference, "difference_low": c.low, "difference_high": c.high, "p_value": c.adjusted_p_value}
        for c in compared.with_best(advice.best)
    ]
    saving = describe_saving(swept.plan, swept.results, decided=advice.cell is not None) if swept.plan else ""
    if below_margin(rows, margin):  # the plan knows nothing of this: its episodes have decided what was asked
        advice = dataclasses.replace(advice, cell=None)
    return Conclusion(
        swept=swept,
        rows=[
            {**row, **to_best, "not_worse": verdict}
            for row, to_best, verdict in zip(rows, differences, [cell.verdict for cell in advice.cells], strict=True)
        ],
        margin=margin,
        advice=advice,
        answer=" ".join(filter(None, [answer_of(rows, advice), saving, swept.left_out])),
        found=describe_broken([result for found in swept.results for result in found]),
        between=[
            *between_checkpoints(rows, success, paired=swept.paired),
            *against_controls(
                rows,
                compared.by_seed,
                margin,
                paired=swept.paired,
                looks=len(swept.plan.looks) if swept.plan else 1,
            ),
        ],
    )


def between_checkpoints(rows: Sequence[Row], success: Sequence[Sequence[bool]], *, paired: bool) -> list[Row]:
    """Compare the cheapest cell of each further checkpoint or recipe with the most expensive one of the first.

    The cost is that of `costs_of`. Which cells are compared does not depend on their results, so that the intervals
    hold for each comparison.

    Args:
        rows: one per cell; the first checkpoint is that of the first row.
        success: the outcomes of each cell on the same episodes, of a recipe checkpoint after checkpoint; a cell that
            stopped early has fewer.
        paired: see `Swept`.

    Returns:
        For each further checkpoint the two cells' ids, the difference of their success rates with its 95 % interval,
        and all this as a `sentence`; none for a sweep of one checkpoint.
    """
    cells: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        cells.setdefault(row["checkpoint"], []).append(number)
    first, *others = cells.values()
    cost = costs_of(rows)
    reference = max(first, key=cost.__getitem__)
    differences = Comparison(rows=rows, success=success, paired=paired).differences(reference) if others else ()
    episodes = [len(solved) // row.get("training_seeds", 1) for row, solved in zip(rows, success, strict=True)]
    return [
        _compared(rows, number, reference, differences[number], min(episodes[number], episodes[reference]))
        for number in (min(numbers, key=cost.__getitem__) for numbers in others)
    ]


def _compared(rows: Sequence[Row], number: int, reference: int, found: PairedDifference, episodes: int) -> Row:
    row, slow = rows[number], rows[reference]
    figures = {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
    points = "{:+z.1f} points (95 %: {:+z.1f} to {:+z.1f})".format(*(100 * value for value in figures.values()))
    return {
        "cell": row["cell"],
        "reference": slow["cell"],
        **figures,
        "sentence": f"{label_of(rows, row)} differs from {label_of(rows, slow)} by {points} of success, over"
        f" {episodes:,} episodes; a chunk takes {row['latency_ms_median']:.1f} ms instead of"
        f" {slow['latency_ms_median']:.1f}.",
    }


def title_of(env: Mapping[str, Any]) -> str:
    """The environment in words."""
    return " ".join(str(value) for value in env.values())


def answer_of(rows: Sequence[Row], advice: Advice) -> str:
    """The answer in one sentence: the recommended settings, their success and their latency."""
    if below_margin(rows, advice.margin):
        best, points = max(row["success_rate"] for row in rows), in_points(advice.margin)
        solved = f"more than {best:.1%} of its episodes" if best else "an episode"
        return (
            f"No recommendation: no cell solved {solved}, so that with a margin of {points} one that solves none would"
            " be good enough."
        )
    words = words_of(advice, [label_of(rows, row) for row in rows])
    if advice.cell is None:
        return f"No recommendation: {words}."
    row = rows[advice.cell]
    return (
        f"{label_of(rows, row)}: {words}. Success {row['success_rate']:.0%}"
        f" ({row['success_low']:.0%} to {row['success_high']:.0%}), {row['latency_ms_median']:.1f} ms a chunk"
        f"{_rates(row)}."
    )


def _rates(row: Row) -> str:
    """The control rates of a row in words; nothing for one of an older version."""
    waits, ahead = row.get("waiting_rate_hz"), row.get("planning_ahead_rate_hz")
    if waits is None or ahead is None:
        return ""
    measured = " (measured on a busy machine, and so too slow)" if row.get("busy") else ""
    return (
        f"{measured}: a robot keeps pace up to {rate_text(waits)} Hz if it waits,"
        f" up to {rate_text(ahead)} Hz if it plans ahead"
    )


def _difference(row: Row) -> str:
    points = [100 * row[key] for key in ("difference", "difference_low", "difference_high")]
    return "{:+z.1f} ({:+z.1f} to {:+z.1f})".format(*points)


def telling_seeds(results: Sequence[Sequence[EpisodeResult]], count: int) -> list[int]:
    """Choose the seeds of the episodes that are worth watching.

    Args:
        results: results of the cells to watch, the same seeds in the same order; one may have fewer than another.
        count: maximum number of seeds.

    Returns:
        Seeds taken in turns from three kinds of episodes, so that failures are not hidden: those on which cells differ,
        those that all cells solved, and those that all cells failed.
    """
    by_seed = [[result.success for result in same] for same in zip(*results, strict=False)]
    split = [n for n, solved in enumerate(by_seed) if any(solved) and not all(solved)]
    solved_by_all = [n for n, solved in enumerate(by_seed) if all(solved)]
    failed_by_all = [n for n, solved in enumerate(by_seed) if not any(solved)]
    kinds = [kind for kind in (split, solved_by_all, failed_by_all) if kind]
    turns = [kind[turn] for turn in range(max(map(len, kinds))) for kind in kinds if turn < len(kind)]
    return [results[0][n].seed for n in turns[:count]]
