"""How the cells of a sweep are compared: single checkpoints by tests of pairs, recipes by those over training seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policy.statistics.checks import Array
from policy.statistics.paired import PairedDifference, compare_success
from policy.statistics.recipe_recommendation import (
    RecipeRecommendation,
    compare_recipes,
    describe_recipes,
    recommend_recipes,
)
from policy.statistics.recommendation import Recommendation, describe
from policy.statistics.sequential import ERROR
from policy.statistics.simultaneous import compare_with_best
from policy.sweep.looks import LookPlan, advice_on
from policy.sweep.rows import Row, costs_of, has_recipes

Advice = Recommendation | RecipeRecommendation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcomes of all cells.

    Attributes:
        rows: one per cell.
        success: their outcomes on the same episodes, of a recipe checkpoint after checkpoint; a cell that stopped early
            has fewer.
        paired: whether equal seeds are equal episodes.
    """

    rows: Sequence[Row]
    success: Sequence[Sequence[bool]]
    paired: bool

    def differences(self, reference: int) -> tuple[PairedDifference, ...]:
        """Compare every cell with one that was chosen without the outcomes; each interval holds by itself."""
        if has_recipes(self.rows):
            return compare_recipes(self.by_seed, self._recipes, reference)
        return compare_success(self.success, reference, paired=self.paired)

    def with_best(self, best: int) -> tuple[PairedDifference, ...]:
        """Compare every cell with the best one; the intervals of single checkpoints hold for all cells together."""
        if has_recipes(self.rows):
            return self.differences(best)
        return compare_with_best(self.success, best, paired=self.paired)

    def recommend(self, margin: float, plan: LookPlan | None, alpha: float) -> Advice:
        """Recommend a cell, as the plan says; without one, as for cells that are looked at once at level `alpha`."""
        cost = costs_of(self.rows)
        if not has_recipes(self.rows):
            return advice_on(self.success, cost, margin, plan, alpha=alpha, paired=self.paired)
        advice = recommend_recipes(self.by_seed, self._recipes, cost, margin=margin, confidence=1 - alpha)
        return dataclasses.replace(advice, confidence=1 - ERROR)  # of all plans on the ledger together

    @property
    def by_seed(self) -> list[Array]:
        """The (S, N) outcomes of each cell."""
        return [
            np.reshape(solved, (row.get("training_seeds", 1), -1))
            for row, solved in zip(self.rows, self.success, strict=True)
        ]

    @property
    def _recipes(self) -> list[int]:
        names = list(dict.fromkeys(row["checkpoint"] for row in self.rows))
        return [names.index(row["checkpoint"]) for row in self.rows]


def words_of(advice: Advice, names: Sequence[str]) -> str:
    """The recommendation in words in which the cells have these names."""
    return describe_recipes(advice, names) if isinstance(advice, RecipeRecommendation) else describe(advice, names)
