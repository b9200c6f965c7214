"""How the cells of a sweep are compared: single checkpoints by tests of pairs, recipes by those over training seeds."""

from __future__ import annotations

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
from policy.statistics.recommendation import Recommendation, recommend
from policy.sweep.grid import Row

Advice = Recommendation | RecipeRecommendation


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcomes of all cells.

    Attributes:
        rows: one per cell.
        success: their outcomes on the same episodes, of a recipe checkpoint after checkpoint.
        paired: whether equal seeds are equal episodes.
    """

    rows: Sequence[Row]
    success: Sequence[Sequence[bool]]
    paired: bool

    def differences(self, reference: int) -> tuple[PairedDifference, ...]:
        """Compare the success rate of every cell with that of a reference cell."""
        if self._has_recipes:
            return compare_recipes(self._by_seed, self._recipes, reference)
        return compare_success(self.success, reference, paired=self.paired)

    def recommend(self, cost: Sequence[float] | Sequence[Sequence[float]], margin: float) -> Advice:
        """Recommend a cell."""
        if self._has_recipes:
            return recommend_recipes(self._by_seed, self._recipes, cost, margin=margin)
        return recommend(self.success, cost, margin=margin, paired=self.paired)

    @property
    def _has_recipes(self) -> bool:
        return any(row.get("training_seeds", 1) > 1 for row in self.rows)

    @property
    def _by_seed(self) -> list[Array]:
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
    return describe_recipes(advice, names) if isinstance(advice, RecipeRecommendation) else advice.sentence
