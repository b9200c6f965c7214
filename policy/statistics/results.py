"""The result of one episode, and the summary of the results of a rollout or a cell."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.statistics.intervals import bootstrap_interval, wilson_interval

# Of the seeds with which episodes broke off, a sentence names so many.
NAMED_SEEDS = 5
# The share of episodes that may break off, and the number of episodes from which it counts.
MOST_BROKEN = 0.05
MANY_EPISODES = 20


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """The result of one episode.

    Attributes:
        seed: determines the initial state, the goal and the noise of the sampler.
        success: whether the task was solved at any step (success ends the episode).
        score: best progress during the episode, in [0, 1], as the environment defines it.
        return_: sum of rewards (`return` in files).
        steps: control steps taken.
        late_steps: control steps without a planned action, see `ControllerSettings`.
        attempts: 1, or more if a process failed and the episode was run again with the same seed.
        broke_off: why the simulator could not go on, which counts as a failure; empty for an episode that came to its
            end.
    """

    seed: int
    success: bool
    score: float
    return_: float
    steps: int
    late_steps: int = 0
    attempts: int = 1
    broke_off: str = ""

    def row(self) -> dict[str, Any]:
        """The result as `episodes.json` stores it; `broke_off` is there only for an episode that did."""
        return {
            "seed": self.seed,
            "success": self.success,
            "score": self.score,
            "return": self.return_,
            "steps": self.steps,
            "late_steps": self.late_steps,
            "attempts": self.attempts,
            **({"broke_off": self.broke_off} if self.broke_off else {}),
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> EpisodeResult:
        """The inverse of `row`; rows written before delays were simulated have no `late_steps`.

        Raises:
            KeyError: a value is missing.
            ValueError: a value has another type, or is out of range.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"an episode must be an object; got {row!r}")
        broke_off = row.get("broke_off", "")
        if not isinstance(broke_off, str):
            raise ValueError(f"broke_off must be a text; got {broke_off!r}")
        # JSON has no infinity, which is what a sum of finite rewards may be.
        returned = math.nan if row["return"] is None else _real("return", row["return"])
        return EpisodeResult(
            seed=_whole("seed", row["seed"], 0),
            success=_truth("success", row["success"]),
            score=_real("score", row["score"], (0, 1)),
            return_=returned,
            # An episode may break off at its reset.
            steps=_whole("steps", row["steps"], 0 if broke_off else 1),
            late_steps=_whole("late_steps", row.get("late_steps", 0), 0),
            attempts=_whole("attempts", row["attempts"], 1),
            broke_off=broke_off,
        )


def _whole(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    return value


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}")
    return value


def _real(name: str, value: Any, bounds: tuple[float, float] | None = None) -> float:
    low, high = bounds or (-sys.float_info.max, sys.float_info.max)
    if type(value) not in (int, float) or not low <= value <= high:
        allowed = "a number within {}..{}".format(*bounds) if bounds else "a finite number"
        raise ValueError(f"{name} must be {allowed}; got {value!r}")
    return float(value)


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success rate with its 95 % Wilson interval, mean score with its 95 % bootstrap interval, and other means.

    Args:
        results: one or more.

    Returns:
        JSON data: `episodes successes success_rate success_low success_high score_mean score_low score_high return_mean
        steps_mean late_steps_mean broke_off`, the last one the number of episodes that broke off.

    Raises:
        ValueError: no results, or a score outside [0, 1].
    """
    successes = sum(result.success for result in results)
    low, high = wilson_interval(successes, len(results))
    scores = [result.score for result in results]
    score_low, score_high = bootstrap_interval(scores, bounds=(0, 1))
    return {
        "episodes": len(results),
        "successes": successes,
        "success_rate": successes / len(results),
        "success_low": low,
        "success_high": high,
        "score_mean": float(np.mean(scores)),
        "score_low": score_low,
        "score_high": score_high,
        "return_mean": float(np.mean([result.return_ for result in results])),
        "steps_mean": float(np.mean([result.steps for result in results])),
        "late_steps_mean": float(np.mean([result.late_steps for result in results])),
        "broke_off": sum(bool(result.broke_off) for result in results),
    }


def describe_broken(results: Sequence[EpisodeResult]) -> list[str]:
    """Say how many episodes broke off, one sentence for each reason, the most frequent first.

    Args:
        results: the results of a rollout, or of all cells of a sweep.

    Returns:
        The sentences; none if every episode came to its end.
    """
    reasons = Counter(result.broke_off for result in results if result.broke_off)
    sentences = []
    for reason, count in reasons.most_common():
        seeds = sorted({result.seed for result in results if result.broke_off == reason})
        named = ", ".join(map(str, seeds[:NAMED_SEEDS])) + (", ..." if len(seeds) > NAMED_SEEDS else "")
        sentences.append(f"{count} of {len(results)} episodes broke off: {reason} (seeds {named})")
    return sentences


def too_many_broken(results: Sequence[EpisodeResult]) -> bool:
    """Whether more than 5 % of 20 or more episodes broke off: such a success rate is one of the simulator."""
    broken = sum(bool(result.broke_off) for result in results)
    return len(results) >= MANY_EPISODES and broken > MOST_BROKEN * len(results)


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary of a rollout in one line, for people."""
    return (
        f"success {summary['success_rate']:.0%} ({summary['successes']} of {summary['episodes']},"
        f" 95 % {summary['success_low']:.0%} to {summary['success_high']:.0%}),"
        f" score {summary['score_mean']:.3f} ({summary['score_low']:.3f} to {summary['score_high']:.3f}),"
        f" return {summary['return_mean']:.1f},"
        f" {summary['steps_mean']:.0f} control steps"
    )
