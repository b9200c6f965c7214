"""What the errors of a policy's chunks say about its training: over-fitted, under-trained, precise, or not enough data.

Windows of one episode resemble each other, so episodes are what is counted: the error of an episode is one number, and
intervals are t intervals of the logarithms of these numbers. They hold for few episodes too, and grow as wide as they
have to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Smaller errors than this, in standard deviations of the actions, are rounding.
LEAST_ERROR = 1e-6
CONFIDENCE = 0.95
# Below this many held-out episodes nothing is concluded: their errors could all be unusual in the same way.
FEWEST_EPISODES = 4
# So many are measured, if there are as many, and as many training episodes.
MOST_EPISODES = 16
# An error below this leaves less than 4 % of the variance of the actions unexplained. Where demonstrators choose
# between ways, a policy that always solves its task has a larger one: a larger one alone is never called a fault.
PRECISE = 0.2
# From this ratio of held-out to training error on, at least half of the squared error on new episodes does not occur on
# those that the policy was trained on.
OVER_FITTED = math.sqrt(2)
# A training is too short if the second half of its steps still lowers the held-out error by this factor. The falling
# learning rate alone lowers it by about 1.2: planar, 384 demonstrations, 4,000 steps, 0.227 halfway and 0.186 at last.
STILL_FALLING = 1.4
# The two halves are compared by a measurement at most this share of the run away from its middle.
NEAR_THE_MIDDLE = 0.2

# The errors by which a training is judged, on each kind of episodes.
HELD_OUT, TRAINING = "val/averaged_chunk_error", "train/averaged_chunk_error"
RATE = "train/learning_rate"
# What comes before the name of each number of which a chunk corrects an error, in a run's history.
CORRECTED = "recovery/"

Array = NDArray[np.float64]
Kind = Literal["precise", "over-fitted", "under-trained", "limited", "undecided"]


class Ratio(NamedTuple):
    """How many times as large one error is as another in a typical episode, with its interval.

    Attributes:
        value: the ratio of the geometric means.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2g} times (95 % interval {self.low:.2g} to {self.high:.2g})"


def unpaired_ratio(errors: ArrayLike, others: ArrayLike) -> Ratio | None:
    """Compare the errors of different episodes (Welch's t interval of the logarithms).

    Args:
        errors: (N,) root mean square error of each episode.
        others: (M,) of each of the others.

    Returns:
        The ratio of the first to the second, or None if one of them has fewer than two episodes.

    Example:
        >>> print(unpaired_ratio([0.4, 0.5, 0.45, 0.42], [0.1, 0.12, 0.11, 0.1]))
        4.1 times (95 % interval 3.5 to 4.8)
    """
    logs = [_logarithms(errors), _logarithms(others)]
    if min(map(len, logs)) < 2:
        return None
    parts = [each.var(ddof=1) / len(each) for each in logs]
    freedom = sum(parts) ** 2 / max(sum(p**2 / (len(each) - 1) for p, each in zip(parts, logs, strict=True)), 1e-300)
    return _ratio(float(logs[0].mean() - logs[1].mean()), sum(parts), freedom)


def paired_ratio(errors: ArrayLike, others: ArrayLike) -> Ratio | None:
    """Compare two errors of the same episodes (t interval of the logarithms of their ratios).

    Args:
        errors: (N,) root mean square error of each episode.
        others: (N,) another one of the same episodes.

    Returns:
        The ratio of the first to the second, or None for fewer than two episodes.
    """
    logs = _logarithms(errors) - _logarithms(others)
    if len(logs) < 2:
        return None
    return _ratio(float(logs.mean()), logs.var(ddof=1) / len(logs), len(logs) - 1)


def _logarithms(errors: ArrayLike) -> Array:
    return np.log(np.maximum(np.asarray(errors, dtype=np.float64), LEAST_ERROR))


def _ratio(difference: float, variance: float, freedom: float) -> Ratio:
    # Imported here: it takes a third of a second, and commands import this module before they need it.
    from scipy.special import stdtrit

    margin = float(stdtrit(freedom, 0.5 + 0.5 * CONFIDENCE)) * math.sqrt(variance) if variance else 0.0
    return Ratio(*(math.exp(difference + sign * margin) for sign in (0, -1, 1)))


def compared_episodes(held_out: ArrayLike, training: ArrayLike, neighbours: ArrayLike | None) -> dict[str, float]:
    """Compare the errors of a policy's averaged chunks from episode to episode, as entries of a run's history.

    Args:
        held_out: (N,) of held-out episodes.
        training: (M,) of training episodes.
        neighbours: (N,) errors that the average chunk of the nearest training windows has on the held-out episodes,
            where such windows can be found.

    Returns:
        `fit/episodes`, the number N; `fit/error_high`, an upper bound of the held-out error of a typical episode;
        `fit/ratio` of held-out to training error and `fit/neighbour_ratio` of the policy's held-out error to that of
        the neighbours, with `_low` and `_high`. Those that need more episodes are left out.
    """
    ratios = {
        "fit/error": paired_ratio(held_out, np.ones_like(held_out)),
        "fit/ratio": unpaired_ratio(held_out, training),
        "fit/neighbour_ratio": None if neighbours is None else paired_ratio(held_out, neighbours),
    }
    entries = {"fit/episodes": float(np.size(held_out))}
    for name, ratio in ratios.items():
        if ratio:
            entries |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return entries


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What a run's newest errors mean.

    Attributes:
        kind: the conclusion in a word.
        sentence: the conclusion, the figures that it rests on, and what to do.
    """

    kind: Kind
    sentence: str


def conclude(history: Sequence[Mapping[str, float]]) -> Conclusion | None:
    """Conclude from the errors in a run's history how its training went.

    Args:
        history: the log entries; those with errors of training episodes are measurements.

    Returns:
        The conclusion, or None if nothing was measured.
    """
    measured = [entry for entry in history if TRAINING in entry]
    if not measured:
        return None
    newest = measured[-1]
    off, episodes = _off(newest), int(newest.get("fit/episodes", 0))
    error, ratio = _of(newest, "fit/error"), _of(newest, "fit/ratio")
    if error is None or ratio is None or HELD_OUT not in newest or episodes < FEWEST_EPISODES:
        return _undecided(off, episodes)
    if error.high <= PRECISE:
        return Conclusion(
            kind="precise",
            sentence=f"precise: {off}; if its rollouts fail, they meet states that no demonstration shows, or the"
            " task asks for smaller errors",
        )
    if ratio.low > 1 and ratio.value >= OVER_FITTED:
        return Conclusion(
            kind="over-fitted",
            sentence=f"over-fitted: {off}, {ratio}: record more demonstrations; where denoiser.dropout is"
            " 0, a new training with 0.1 may help",
        )
    if too_short := _too_short(measured):
        return Conclusion(
            kind="under-trained",
            sentence=f"under-trained: {off}, {too_short}: train longer (train.steps, or"
            " train.rectify_steps where a run has no others)",
        )
    if ratio.low <= 1 and ratio.high >= OVER_FITTED:
        return _undecided(f"{off}, {ratio}", episodes)
    if _halfway(measured) is None:
        return Conclusion(
            kind="undecided",
            sentence=f"not over-fitted, but perhaps under-trained: {off}; a run of 2000 steps or more can tell",
        )
    return Conclusion(
        kind="limited",
        sentence=f"neither over-fitted nor under-trained: {off}; the rest is chance in the demonstrations, or follows"
        " from what the policy does not observe",
    )


def _off(entry: Mapping[str, float]) -> str:
    """The errors of a measurement in words."""
    training = f"{entry[TRAINING]:.2g}"
    if HELD_OUT not in entry:
        return f"the averaged chunk is {training} standard deviations off on training episodes"
    held_out = f"{entry[HELD_OUT]:.2g}"
    return (
        f"the averaged chunk is {held_out} standard deviations off on held-out episodes and {training} on training"
        " episodes"
    )


def _undecided(figures: str, episodes: int) -> Conclusion:
    if episodes >= MOST_EPISODES:
        return Conclusion(
            kind="undecided",
            sentence=f"the {episodes} held-out episodes that are measured differ too much to tell over-fitting:"
            f" {figures}",
        )
    return Conclusion(
        kind="undecided",
        sentence=f"too few held-out episodes ({episodes}) to tell over-fitting: {figures}; a new training with a"
        f" larger train.val_fraction, for {FEWEST_EPISODES if episodes < FEWEST_EPISODES else MOST_EPISODES} of them,"
        " can, where the file of the dataset sets none aside",
    )


def _too_short(measured: Sequence[Mapping[str, float]]) -> str:
    """Why more steps would help, in words; empty if nothing says so."""
    newest = measured[-1]
    neighbours = _of(newest, "fit/neighbour_ratio")
    if neighbours and neighbours.low > 1:
        return f"{neighbours} what copying the most similar training windows gives"
    halfway, at_last = _halfway(measured), max(newest[HELD_OUT], LEAST_ERROR)
    if halfway is not None and halfway >= STILL_FALLING * at_last:
        return f"and on held-out episodes it was {halfway / at_last:.2g} times as much halfway"
    return ""


def _halfway(measured: Sequence[Mapping[str, float]]) -> float | None:
    """The held-out error about halfway through the run; None where it was not measured.

    Where a learning rate has come down to 0, as at the end of a run that then went on, the error is that of an end.
    """
    end = measured[-1]["step"]
    known = [entry for entry in measured if HELD_OUT in entry and (entry["step"] == end or entry.get(RATE, 1) > 0)]
    middle = min(known, key=lambda entry: abs(entry["step"] - end / 2))
    return middle[HELD_OUT] if abs(middle["step"] - end / 2) <= NEAR_THE_MIDDLE * end else None


def _of(entry: Mapping[str, float], name: str) -> Ratio | None:
    names = [f"{name}{end}" for end in ("", "_low", "_high")]
    return Ratio(*(entry[name] for name in names)) if entry.keys() >= {*names} else None
