"""The page of a sweep while it runs: how far it is, and each cell's success so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from policy.common.budget import Budget
from policy.common.serving import serving
from policy.statistics.intervals import wilson_interval
from policy.statistics.results import EpisodeResult
from policy.sweep.grid import Row, SweepCell
from policy.sweep.report import write_report


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
        self._budget = Budget()
        self._ours = False
        if not path.exists():
            self.write("The sweep begins.")

    def refresh(self, rows: Callable[[], list[Row]], total: int) -> None:
        """Write the page again, unless it was written a moment ago.

        Args:
            rows: returns a row for each cell, see `rows_so_far`.
            total: the greatest number of episodes that the sweep may run.
        """
        if not self._budget.due():
            return
        with self._budget.spent():
            self._rows = rows()
            done, at = sum(row["episodes"] for row in self._rows), time.strftime("%H:%M:%S")
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


def rows_so_far(cells: Sequence[SweepCell], results: Sequence[Sequence[EpisodeResult]]) -> list[Row]:
    """A row for each cell that has results: its settings, its number of episodes, and its success with its interval."""
    rows = []
    for cell, found in zip(cells, results, strict=True):
        if found:
            solved, episodes = sum(result.success for result in found), len(found)
            low, high = wilson_interval(solved, episodes)
            success = {"success_rate": solved / episodes, "success_low": low, "success_high": high}
            rows.append({**cell.axes, "episodes": episodes, **success})
    return rows


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
