"""The settings of `recipe=auto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policy.common.arguments import check_choice
from policy.common.durations import seconds_of
from policy.recipe.candidates import CANDIDATES


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Settings of the search for a recipe.

    Attributes:
        budget: time to try recipes in, such as 45s, 30min or 2h; the best one is trained to its end after it.
        candidates: names of the recipes to try, see `policy.recipe.candidates`; none for all.
        keep: settings that every recipe takes as they are, by name; those on the command line are always among them.

    Raises:
        ValueError: a budget that is not a time, or a recipe that does not exist.
    """

    budget: str | float = "30min"
    candidates: Sequence[str] = ()
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        seconds_of("recipe.budget", self.budget)
        for name in self.candidates:
            check_choice("recipe", name, CANDIDATES)

    @property
    def seconds(self) -> float:
        """The budget in seconds."""
        return seconds_of("recipe.budget", self.budget)
