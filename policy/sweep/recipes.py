"""Recipes: checkpoints that differ in their training seed only, and make one cell of a sweep together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from policy.checkpoint import Checkpoint
from policy.checkpoint.resuming import CHECKSUM
from policy.common.arguments import dotted
from policy.model.defaults import with_defaults
from policy.rollout.ledger import cell_id
from policy.statistics.recipes import recipe_interval
from policy.statistics.results import EpisodeResult, summarize
from policy.sweep.grid import SweepCell, ids_of, row_of
from policy.sweep.rows import Row

# What may differ between the checkpoints of a recipe: the seed, and what follows from it.
FREE = ("seed", "step", "measured", "init", "teacher")


def recipes_of(checkpoint: Path | Sequence[Path | Sequence[Path]]) -> list[list[Path]]:
    """The folders of each recipe that a user names.

    Args:
        checkpoint: a folder, or a list in which a folder is a recipe of one training seed, and an inner list holds the
            training seeds of one recipe.

    Returns:
        One list for each recipe.

    Raises:
        ValueError: an empty list, or a folder that is named twice.
    """
    listed = [checkpoint] if isinstance(checkpoint, Path) else checkpoint
    recipes = [[recipe] if isinstance(recipe, Path) else list(recipe) for recipe in listed]
    if not all([recipes, *recipes]):
        raise ValueError(
            f"checkpoint={_written(recipes)} has an empty list: name one checkpoint or more, and the training seeds of"
            " one recipe in an inner list, as checkpoint=[[a0,a1,a2],[b0,b1,b2]]"
        )
    folders = [*itertools.chain(*recipes)]
    if repeated := [folder for number, folder in enumerate(folders) if folder in folders[:number]]:
        raise ValueError(f"checkpoint must not repeat a checkpoint; got {repeated[0]} twice: name each one once")
    return recipes


def grouped(values: Sequence[Any], recipes: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Group values of all checkpoints, in their order, as the recipes do."""
    left = iter(values)
    return [list(itertools.islice(left, len(recipe))) for recipe in recipes]


def grouped_cells(cells: Sequence[SweepCell], recipes: Sequence[Sequence[Any]]) -> list[list[SweepCell]]:
    """The cells that make each row of a sweep, see `rows_by_recipe`."""
    groups = rows_by_recipe([one.cell.policy for one in cells], recipes)
    return [[cells[number] for number in group] for group in groups]


def rows_by_recipe(checkpoint: Sequence[int], recipes: Sequence[Sequence[Any]]) -> list[list[int]]:
    """The cells that make each row of a sweep: one row for each recipe and combination of its axes.

    Args:
        checkpoint: the number of the checkpoint of each cell; those of a recipe have the same combinations in the same
            order.
        recipes: the checkpoints of each recipe.

    Returns:
        The indices of the cells of each row.
    """
    own: list[list[int]] = [[] for _ in itertools.chain(*recipes)]
    for number, owner in enumerate(checkpoint):
        own[owner].append(number)
    return [list(row) for recipe in grouped(own, recipes) for row in zip(*recipe, strict=True)]


def check_same_recipe(recipe: Sequence[Checkpoint], given: Collection[str] = ()) -> None:
    """Check that checkpoints differ in their training seed only.

    Args:
        recipe: the checkpoints.
        given: settings of the rollouts, such as `sampler.eta`, that hold for all of them, whatever they record.

    Raises:
        ValueError: a setting or an observation differs, two have the same weights, or two the same training seed.
    """
    first, *others = recipe
    for other in others:
        left_out = {*given, *_not_comparable(first.training, other.training)}
        settings, own = _settings(first, left_out), _settings(other, left_out)
        for name in [*settings, *(own.keys() - settings.keys())]:
            if settings.get(name) != own.get(name):
                raise ValueError(
                    f"the checkpoints of one recipe may differ in their training seed only: {name} is"
                    f" {settings.get(name)} in {first.path} and {own.get(name)} in {other.path}; list them as"
                    " recipes of their own"
                )
    for one, other in itertools.combinations(recipe, 2):
        seeds = one.training.get("seed"), other.training.get("seed")
        same = "weights" if one.digest == other.digest else f"training seed {seeds[0]}" if seeds[0] == seeds[1] else ""
        if same and (same == "weights" or seeds[0] is not None):
            raise ValueError(
                f"{one.path} and {other.path} have the same {same}: a recipe takes one checkpoint for each training"
                " seed (ddim-train --multirun seed=0,1,2)"
            )


def _not_comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """What a version before noted of its demonstrations and another did not; and where they were, if they are alike."""
    unknown = {name for name in one.keys() ^ other.keys() if name.startswith("dataset.")}
    return unknown | ({"dataset"} if CHECKSUM in one and one[CHECKSUM] == other.get(CHECKSUM) else set())


def recipe_axes(cells: Sequence[SweepCell]) -> Row:
    """The settings of a recipe at one point of the axes, with one name for its checkpoints."""
    folders = [cell.checkpoint.path for cell in cells]
    return {**cells[0].axes, **({"checkpoint": name_of(folders)} if len(folders) > 1 else {})}


def recipe_row(cells: Sequence[SweepCell], results: Sequence[Sequence[EpisodeResult]], latency: Row) -> Row:
    """The row of a recipe at one point of the axes; of a single checkpoint, that of its cell.

    Its figures are means over the checkpoints, its intervals are those of the recipe, and its latency is that of the
    first checkpoint, whose network is that of the others but for the weights.

    Args:
        cells: one for each checkpoint.
        results: the episodes of each.
        latency: the measured columns of the first cell, see `latencies_of`.

    Returns:
        The row, with its id as `cell` and, for several checkpoints, their number as `training_seeds`.
    """
    row = {"cell": row_id(ids_of(cells)), **row_of(cells[0], figures_of(results), latency), **recipe_axes(cells)}
    return {**row, "training_seeds": len(cells)} if len(cells) > 1 else row


def row_id(cells: Sequence[str]) -> str:
    """The id of the row that these cells make: of a single checkpoint, that of its cell."""
    return cells[0] if len(cells) == 1 else cell_id({"recipe": [*cells]})


def figures_of(results: Sequence[Sequence[EpisodeResult]]) -> Row:
    """The figures of a row, see `summarize`; those of a recipe have its intervals.

    Args:
        results: the episodes of each of its checkpoints.
    """
    figures = summarize([*itertools.chain(*results)])
    if len(results) == 1:
        return figures
    success_low, success_high = recipe_interval([[result.success for result in found] for found in results])
    score_low, score_high = recipe_interval([[result.score for result in found] for found in results])
    return {
        **figures,
        "success_low": success_low,
        "success_high": success_high,
        "score_low": score_low,
        "score_high": score_high,
    }


def name_of(folders: Sequence[PurePath]) -> str:
    """One name for the folders of a recipe, as a shell writes it.

    >>> name_of([PurePath("runs/a/0/checkpoint"), PurePath("runs/a/1/checkpoint")])
    'runs/a/{0,1}/checkpoint'
    """
    parts = [folder.parts for folder in folders]
    shortest = min(map(len, parts))
    same = [len({part[number] for part in parts}) == 1 for number in range(shortest)]
    same_from_end = [len({part[-1 - number] for part in parts}) == 1 for number in range(shortest)]
    start = len(list(itertools.takewhile(bool, same)))
    end = min(len(list(itertools.takewhile(bool, same_from_end))), shortest - start)
    middles = ",".join("/".join(part[start : len(part) - end]) for part in parts)
    return str(PurePath(*parts[0][:start], f"{{{middles}}}", *parts[0][len(parts[0]) - end :]))


def scope_of(rows: Sequence[Row]) -> str:
    """What the intervals of success hold, in a sentence: recipes, or single checkpoints."""
    counts = sorted({row.get("training_seeds", 1) for row in rows})
    many = " or ".join(str(count) for count in counts if count > 1)
    if counts == [1]:
        return (
            "The intervals are those of these checkpoints alone: what another training seed would change is left out"
            " (checkpoint=[[a0,a1,a2]] takes in three)."
        )
    over = f"The intervals and verdicts of recipes are over {many} training seeds and the episodes"
    if counts[0] == 1:
        return f"{over}; those of single checkpoints leave out what another training seed would change."
    return f"{over}: they hold for another training seed too."


def _settings(checkpoint: Checkpoint, left_out: Collection[str]) -> dict[str, Any]:
    """The settings with which a checkpoint was made, nested ones by their dotted name, without some of them."""
    trained = {name: value for name, value in checkpoint.training.items() if name not in {*FREE, *left_out}}
    policy = with_defaults(checkpoint.policy.config)
    rollouts = {"execution_horizon": checkpoint.execution_horizon, "sampler": dataclasses.asdict(checkpoint.sampler)}
    settings = dotted({**policy, **trained, **rollouts})
    return {name: value for name, value in settings.items() if name not in left_out}


def _written(recipes: Sequence[Sequence[Path]]) -> str:
    return "[" + ",".join(f"[{','.join(map(str, recipe))}]" for recipe in recipes) + "]"
