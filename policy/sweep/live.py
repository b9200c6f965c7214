"""The page of a sweep while it runs: how far it is, and the success so far of each cell or recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.common.serving import serving
from policy.common.throttle import Throttle
from policy.statistics.intervals import wilson_interval
from policy.statistics.recipes import recipe_interval
from policy.statistics.results import EpisodeResult
from policy.sweep.grid import SweepCell
from policy.sweep.recipes import recipe_axes
from policy.sweep.report import write_report
from policy.sweep.rows import Row, uniform


class LivePage:
    """A sweep's report before its end; it recommends nothing, because the episodes do not suffice yet.

    Args:
        path: the HTML file, which the report replaces at the end. One that is there stays until the sweep runs: the
            command may be refused yet, or another process may write it.
        title: says what is swept.
        settings: further facts, by name.
    """

    def __init__(self, path: Path, title: str, settings: dict[str, Any]) -> None:
        self._path, self._title, self._settings = path, title, settings
        self._rows: list[Row] = []
        self._throttle = Throttle()
        self._ours = False
        if not path.exists():
            self.write("The sweep begins.")

    def refresh(
        self,
        groups: Sequence[Sequence[SweepCell]],
        finished: Callable[[], Sequence[Sequence[Sequence[EpisodeResult]]]],
        total: int,
    ) -> None:
        """Write the page again, unless it was written a moment ago.

        Args:
            groups: the cells of each row; a recipe has one for each training seed.
            finished: returns the results of each of these cells.
            total: the greatest number of episodes that the sweep may run.
        """
        if not self._throttle.due():
            return
        with self._throttle.spent():
            results = finished()
            self._rows = rows_so_far(groups, results)
            done, at = sum(len(found) for of_row in results for found in of_row), time.strftime("%H:%M:%S")
            self.write(f"Running: {done:,} of at most {total:,} episodes at {at}. The recommendation comes at the end.")

    def write(self, answer: str) -> None:
        """Write the page with a sentence at its head, and the rows of before."""
        self._ours = True
        write_report(
            self._path,
            self._rows,
            title=self._title,
            answer=answer,
            without_clips="Episodes are recorded at the end.",
            settings=self._settings,
        )

    def stop(self) -> None:
        """Say on the page, if it was written, that the sweep did not come to its end."""
        if self._ours:
            self.write("The sweep stopped before its end: the same command with the same output_dir goes on.")


def rows_so_far(
    groups: Sequence[Sequence[SweepCell]], results: Sequence[Sequence[Sequence[EpisodeResult]]]
) -> list[Row]:
    """A row for each cell or recipe that has results: its settings, number of episodes, and success with its interval.

    The checkpoints of a recipe are compared on the same episodes, so that those which all of them have run count.
    """
    rows = []
    for cells, found in zip(groups, results, strict=True):
        solved = _solved_by_all(found)
        if solved.size:
            count, episodes = solved.shape
            low, high = recipe_interval(solved) if count > 1 else wilson_interval(int(solved.sum()), episodes)
            success = {"success_rate": float(solved.mean()), "success_low": low, "success_high": high}
            objective = cells[0].checkpoint.policy.config.objective
            rows.append(
                {
                    **recipe_axes(cells),
                    "objective": objective,
                    "training_seeds": count,
                    "episodes": solved.size,
                    **success,
                }
            )
    return uniform(rows)


def _solved_by_all(results: Sequence[Sequence[EpisodeResult]]) -> NDArray[np.bool_]:
    """(S, N) bool, the outcomes of S checkpoints on the N episodes that all of them have run."""
    by_seed = [{result.seed: result.success for result in found} for found in results]
    return np.array([[of_one[seed] for seed in by_seed[0] if all(seed in of for of in by_seed)] for of_one in by_seed])


@contextmanager
def live_page(path: Path, title: str, settings: dict[str, Any]) -> Iterator[LivePage]:
    """Serve the page of a sweep until its end, and say where; a sweep that does not come to its end says so there.

    Args:
        path: the HTML file.
        title: says what is swept.
        settings: further facts, by name.

    Yields:
        The page.
    """
    page = LivePage(path, title, settings)
    with serving(path) as address:
        print(f"watch it at {address} (this machine only, until the sweep ends)", flush=True)
        try:
            yield page
        except BaseException:
            page.stop()
            raise
