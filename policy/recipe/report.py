"""What a search tried and how sure its choice is, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from policy.common.durations import duration_text
from policy.common.markdown import markdown_table
from policy.recipe.journal import (
    CONFIDENCE,
    Difference,
    Journal,
    Results,
    are_tied,
    error_differences,
    has_rollouts,
    promising,
    ranked,
)
from policy.statistics.intervals import wilson_interval
from policy.statistics.simultaneous import compare_with_best
from policy.training.settings import TrainSettings

# A rung of fewer steps than this hardly leaves the weights that a training begins with.
FEW_STEPS = 20


def changes_text(changes: Mapping[str, Any]) -> str:
    """A recipe's settings as they are given on a command line."""
    return " ".join(f"{name}={_value_text(value)}" for name, value in changes.items()) or "your settings, unchanged"


def _value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def plan_text(journal: Journal, train: TrainSettings) -> str:
    """Say what will be done, and how long the training takes after it."""
    rungs = ", then ".join(f"{rung.candidates} to step {rung.steps:,}" for rung in journal.plan.rungs)
    last = journal.plan.rungs[-1]
    episodes = journal.plan.episodes
    by = "by the error on held-out episodes"
    if episodes:
        by = f"by rollouts, as the rungs are: {episodes} episodes for each recipe"
    steps_left = train.all_steps - last.steps
    tried = [cost for name, cost in journal.costs.items() if name not in journal.rungs[0]]
    rest = duration_text(steps_left * max((cost.step for cost in tried), default=0.0))
    after = f", and trained to the end in up to about {rest} more" if steps_left else ""
    short = journal.plan.rungs[0].steps < FEW_STEPS
    little = "; so short a first rung tells little of a recipe: raise train.steps" if short else ""
    return f"the plan: {rungs} of {train.steps:,}; of the last {last.candidates}, one is chosen {by}{after}{little}"


def rung_table(number: int, journal: Journal) -> str:
    """A rung as a table: each recipe with its error, its difference from the best one, and its rollouts."""
    rung, kept = journal.rungs[number], _kept(number, journal)
    differences = error_differences(rung)
    rows = []
    for name in ranked(rung):
        found = rung[name]
        row = [
            name,
            f"{fmean(found.errors):.3f}" if found.errors else found.failed,
            *_difference(differences.get(name)),
        ]
        if has_rollouts(rung):
            row.append(_rollouts(found.success, found.scores))
        rows.append([*row, "yes" if name in kept else ""])
    heads = ["recipe", "error", "from the least", "95 % from", "to"]
    heads += [*(["success"] if has_rollouts(rung) else []), "goes on"]
    return markdown_table(heads, rows, align="l" + "r" * (len(heads) - 1))


def verdict(journal: Journal) -> str:
    """Say which recipe was chosen, against which others it was compared, and whether they are separated."""
    number = journal.decisive
    rung = journal.rungs[number]
    chosen, *others = ranked(rung)
    settings = changes_text(journal.recipes[chosen])
    at = f"after {journal.plan.rungs[number].steps:,} steps"
    sentences = [f"chosen: {chosen} ({settings})."]
    if others and rung[others[0]].errors:
        played = has_rollouts(rung)
        compared = (
            _by_rollouts(chosen, others[0], rung, journal.paired) if played else _by_error(chosen, others[0], rung)
        )
        sentences.append(f"{at[0].upper()}{at[1:]}, {compared}.")
        sentences += _worth_little(journal, rung)
    planned = journal.plan.rungs[number].candidates
    unmeasured = 0 if number else len(journal.recipes) - len(rung)  # the rung holds those that were left out, too
    if unmeasured:
        sentences.append(
            f"The budget ended on the first rung: {planned - unmeasured} of {planned} recipes were measured."
        )
    elif number < len(journal.plan.rungs) - 1:
        sentences.append("The budget ended before the rungs after it.")
    return " ".join(sentences)


def report_text(journal: Journal, fallen: Mapping[str, str], first_seed: int) -> str:
    """The whole search as a page of Markdown.

    Args:
        journal: the search, with its choice.
        fallen: why each recipe that was not tried was left out.
        first_seed: of the rollouts.
    """
    recipes = markdown_table(["recipe", "settings"], [[n, changes_text(c)] for n, c in journal.recipes.items()])
    parts = ["# The search for a recipe", verdict(journal), recipes]
    parts += [f"{name} was not tried: {reason}." for name, reason in fallen.items()]
    for number, rung in enumerate(journal.rungs):
        if rung:
            parts += [f"## To step {journal.plan.rungs[number].steps:,}", rung_table(number, journal)]
    parts.append(
        "The error is the energy score of sampled chunks on held-out episodes, in standard deviations of the actions."
        " Its intervals hold for all recipes of a rung together."
    )
    if episodes := journal.plan.episodes:
        parts.append(
            f"The rollouts have the seeds {first_seed} to {first_seed + episodes - 1}; those of ddim-rollout and"
            " ddim-sweep begin at 100000."
        )
    parts.append(f"The search took {duration_text(journal.spent)}.")
    return "\n\n".join(parts) + "\n"


def _worth_little(journal: Journal, rung: Results) -> list[str]:
    """Say how little a choice by the error is worth."""
    if are_tied(rung):
        return [
            "All recipes did equally well in the rollouts, so that the error on held-out episodes decided, which ranks"
            " recipes poorly: the choice is worth little. A larger recipe.budget trains them for longer."
        ]
    if has_rollouts(rung):
        return []
    better = (
        "rollouts decide better: give env=... with a simulator that works"
        if journal.episode_seconds is None
        else "a larger recipe.budget has rollouts"
    )
    return [
        "Success was not measured, and the error on held-out episodes ranks recipes poorly: it rules out recipes that"
        f" are clearly worse, and beyond that the choice is worth little; {better}."
    ]


def shared_text(journal: Journal) -> str:
    """Say that the last rung was planned anew because the rollouts of the one before told nothing."""
    last = journal.plan.rungs[-1]
    return (
        f"the rollouts do not tell these recipes apart: none of the {last.candidates} is dropped, and they share the"
        f" rest of the budget, up to step {last.steps:,}"
    )


def _kept(number: int, journal: Journal) -> list[str]:
    """The recipes of a rung that go on."""
    names = promising(journal.rungs[number])
    last = number + 1 == len(journal.plan.rungs) or (journal.chosen and number >= journal.decisive)
    return names[:1] if last else names[: journal.plan.rungs[number + 1].candidates]


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    return [f"{value:+.3f}" for value in difference] if any(difference) else ["the least", "", ""]


def _rollouts(success: tuple[bool, ...], scores: tuple[float, ...]) -> str:
    if not success:
        return ""
    low, high = wilson_interval(sum(success), len(success))
    return f"{fmean(success):.0%} ({low:.0%} to {high:.0%}), score {fmean(scores):.3f}"


def _by_error(chosen: str, other: str, rung: Results) -> str:
    differences = error_differences(rung)
    if not differences:
        return f"its error is below that of {other}, but one held-out episode tells nothing of how sure that is"
    difference, low, high = differences[other]
    return (
        f"its error on {len(rung[chosen].errors)} held-out episodes is below that of {other} by {difference:.3f} (95 %:"
        f" {low:.3f} to {high:.3f}): {_separated(low > 0)}"
    )


def _by_rollouts(chosen: str, other: str, rung: Results, paired: bool) -> str:
    names = [name for name, found in rung.items() if found.success]
    pairs = compare_with_best([rung[name].success for name in names], names.index(chosen), CONFIDENCE, paired=paired)
    pair = pairs[names.index(other)]
    difference, low, high = (0.0 - end * 100 for end in (pair.difference, pair.high, pair.low))
    return (
        f"it solved {fmean(rung[chosen].success):.0%} of {len(rung[chosen].success)} episodes (mean score"
        f" {fmean(rung[chosen].scores):.3f}) and {other} {fmean(rung[other].success):.0%}"
        f" ({fmean(rung[other].scores):.3f}), a difference of {difference:.1f} points (95 %: {low:.1f} to {high:.1f}):"
        f" {_separated(low > 0)}"
    )


def _separated(is_separated: bool) -> str:
    return "the two are separated" if is_separated else "the two are not separated, and either may be the better one"
