"""The page of a training run, written while it trains: losses, rollouts, learning rate, best checkpoint, videos."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.common.files import write_text
from policy.common.page import page_text
from policy.common.panel import STYLES, Line, Panel, Point, Scale, linear_scale, log_scale, thinned
from policy.common.throttle import Throttle
from policy.statistics.fit import CORRECTED, conclude
from policy.statistics.intervals import wilson_interval

PAGE, VIDEOS = "training.html", "training_videos"
# Of a run's videos, the page shows those of the first and the newest rollouts, this many altogether.
SHOWN_VIDEOS = 4
# How `video_name` names a video.
VIDEO_NAME = re.compile(r"(\d{7,})_(\d+)_(success|failure)\.mp4")

# The errors of chunks that the page shows, and their names.
ERRORS = {
    "val/sampled_chunk_error": "held-out episodes, a sample",
    "val/averaged_chunk_error": "held-out episodes, the average of samples",
    "train/averaged_chunk_error": "training episodes, the average of samples",
    "val/neighbour_chunk_error": "held-out episodes, the most similar training windows",
}

Entry = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the page needs to know of a run besides its history.

    Attributes:
        title: says what is trained.
        all_steps: the number of steps of the whole run.
        phases: the step at which each further phase begins, with the phase's name.
        rollout_episodes: episodes in each rollout.
        settings: listed at the end of the page, by name.
    """

    title: str
    all_steps: int
    phases: Sequence[tuple[int, str]]
    rollout_episodes: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A video and what stands below it."""

    caption: str
    file: Path


class TrainingPage:
    """Writes `training.html` as metrics come; it is one of the places that a run's metrics are sent to.

    The page is drawn from the whole history, so that it is whole after a run was resumed. It is written at once after a
    rollout and at the end, and otherwise as often as it takes a hundredth of the time. A page that cannot be written is
    a warning: training goes on.

    Args:
        folder: the run's folder; videos lie in `training_videos` there, see `video_name`.
        facts: see `TrainingFacts`.
        history: the run's log entries, which grow while it trains.
        best: returns the step of the best checkpoint so far and the checkpoint in words, or None.
    """

    def __init__(
        self,
        folder: Path,
        facts: TrainingFacts,
        history: Sequence[Entry],
        best: Callable[[], tuple[int, str] | None],
    ) -> None:
        self._folder, self._facts, self._history, self._best = folder, facts, history, best
        self._throttle = Throttle()
        self.write("Running", running=True)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the page again, unless it was written a moment ago and nothing but losses came."""
        if self._throttle.due() or any(name.startswith("rollout/") for name in metrics):
            self.write("Running", running=True)

    def write(self, state: str, *, running: bool = False) -> None:
        """Write the page.

        Args:
            state: what the run does, in words.
            running: whether an open page loads itself again from time to time.
        """
        with self._throttle.spent():
            try:
                write_text(self._folder / PAGE, self._text(state, running=running))
            except Exception as error:  # training is worth more than its page
                warnings.warn(f"{self._folder / PAGE} was not written ({error}): training goes on", stacklevel=2)

    def _text(self, state: str, *, running: bool) -> str:
        facts, step = self._facts, int(self._history[-1]["step"]) if self._history else 0
        best = self._best()
        places = [*facts.phases, *([(best[0], "best")] if best else [])]
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        return page_text(
            "tracking/training_page.html",
            title=facts.title,
            answer=f"{state}: step {step:,} of {facts.all_steps:,}, at {at}.",
            facts={
                "best checkpoint": best[1] if best else "none yet",
                **_newest(self._history),
                **self._conclusion(step),
            },
            panels=panels_of(self._history, facts.all_steps, facts.rollout_episodes, places),
            clips=_clips(self._folder / VIDEOS),
            settings=facts.settings,
            running=running,
        )

    def _conclusion(self, step: int) -> dict[str, str]:
        """What the errors mean, once the training is complete."""
        found = conclude(self._history) if step >= self._facts.all_steps else None
        return {"errors": found.sentence} if found else {}


@contextmanager
def training_page(
    folder: Path,
    facts: TrainingFacts,
    history: Sequence[Entry],
    best: Callable[[], tuple[int, str] | None],
) -> Iterator[TrainingPage]:
    """Keep the page of a run up to date, and let it say at the end how the run ended.

    Args:
        folder: see `TrainingPage`.
        facts: see `TrainingPage`.
        history: see `TrainingPage`.
        best: see `TrainingPage`.

    Yields:
        The page, which metrics are sent to.
    """
    page = TrainingPage(folder, facts, history, best)
    try:
        yield page
    except BaseException as error:
        page.write(f"Ended by an error ({error})")
        raise
    done = bool(history) and history[-1]["step"] >= facts.all_steps
    page.write("Trained to its end" if done else "Stopped and saved")


def video_name(step: int, seed: int, *, success: bool) -> str:
    """The name of a video's file, from which the page reads what it shows."""
    return f"{step:07d}_{seed}_{'success' if success else 'failure'}.mp4"


def panels_of(
    history: Sequence[Entry], all_steps: int, rollout_episodes: int, places: Sequence[tuple[int, str]] = ()
) -> list[Panel]:
    """The charts of a run: losses, errors, rollouts and learning rate; one without any value is left out.

    Args:
        history: the log entries.
        all_steps: the number of steps of the whole run.
        rollout_episodes: episodes in each rollout.
        places: steps at which a line goes up, with a name.

    Returns:
        The charts.
    """
    steps = linear_scale(0, all_steps, name="step")
    train, held_out = _points(history, "train/loss"), _points(history, "val/loss")
    losses = [
        Line(name="training, mean since the entry before", points=thinned(train), marked=False),
        _measured("held-out episodes", held_out, style=1),
    ]
    errors = [_measured(name, _points(history, key), style) for style, (key, name) in enumerate(ERRORS.items())]
    solved = [
        Point(x=point.x, y=100 * point.y, low=100 * low, high=100 * high)
        for point in _points(history, "rollout/success_rate")
        for low, high in [wilson_interval(round(rollout_episodes * point.y), rollout_episodes)]
    ]
    scores = [Point(x=point.x, y=100 * point.y) for point in _points(history, "rollout/score_mean")]
    rollouts = [Line(name="success (%)", points=solved), Line(name="mean score x 100", points=scores, style=1)]
    rates = _points(history, "train/learning_rate")
    power = math.floor(math.log10(max((point.y for point in rates), default=0.0) or 1.0))
    scaled = [Point(x=point.x, y=point.y / 10**power) for point in rates]
    rate = [Line(name="learning rate", points=thinned(scaled), marked=False)]
    found = [
        ("Loss", "logarithmic axis", log_scale([point.y for point in [*train, *held_out]]), losses),
        (
            "Error of chunks",
            "in standard deviations of the actions",
            _from_zero([p for e in errors for p in e.points]),
            errors,
        ),
        (
            "What a chunk corrects",
            f"% of an error in where the robot is; up to {STYLES} numbers",
            linear_scale(0, 100),
            _corrected(history),
        ),
        ("Rollouts", f"{rollout_episodes} episodes each, 95 % Wilson intervals", linear_scale(0, 100), rollouts),
        ("Learning rate", f"times 1e{power}", _from_zero(scaled), rate),
    ]
    return [
        Panel(title=title, note=note, x=steps, y=scale, lines=[line for line in lines if line.points], places=places)
        for title, note, scale, lines in found
        if any(line.points for line in lines)
    ]


def _from_zero(points: Sequence[Point]) -> Scale:
    return linear_scale(0, 1.05 * max((point.y for point in points), default=1.0))


def _points(history: Sequence[Entry], name: str) -> list[Point]:
    return [Point(x=entry["step"], y=entry[name]) for entry in history if math.isfinite(entry.get(name, math.nan))]


def _corrected(history: Sequence[Entry]) -> list[Line]:
    """What chunks correct of each number (%); of many, those that are corrected least at last."""
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith(CORRECTED))
    found = {name: [Point(x=p.x, y=100 * p.y) for p in points] for name in names if (points := _points(history, name))}
    least = sorted(found, key=lambda name: found[name][-1].y)[:STYLES]
    shown = [name for name in found if name in least]
    return [_measured(name.removeprefix(CORRECTED), found[name], style) for style, name in enumerate(shown)]


def _measured(name: str, points: Sequence[Point], style: int) -> Line:
    """A line of measurements, which are marked where they are few."""
    return Line(name=name, points=thinned(points), style=style, marked=len(points) < 50)


def _newest(history: Sequence[Entry]) -> dict[str, str]:
    """The newest value of each loss, and how many steps were skipped, in words."""
    names = {"train/loss": "loss", "val/loss": "validation loss", "train/skipped_steps": "skipped steps"}
    found = {name: points[-1] for name in names if (points := _points(history, name))}
    return {names[name]: f"{point.y:.4g} at step {point.x:,}" for name, point in found.items()}


def _clips(folder: Path) -> list[_Clip]:
    """Videos of the first and of the newest rollouts."""
    clips = []
    for file in sorted(folder.glob("*.mp4")):
        if named := VIDEO_NAME.fullmatch(file.name):
            step, seed, outcome = named.groups()
            clips.append(_Clip(caption=f"step {int(step):,}, episode {seed}: {outcome}", file=file))
    half = SHOWN_VIDEOS // 2
    return clips if len(clips) <= SHOWN_VIDEOS else [*clips[:half], *clips[-half:]]
