"""Rows of finished trainings, one JSON file each in the repository: a benchmark that takes days reads them as done.

To measure a training again, remove its file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from policy.common.files import json_text, write_text
from scripts.bench.kept_rows import ROOT
from scripts.bench.report import machine
from scripts.bench.trainings import Trained, file_name

# One folder for each benchmark that keeps its rows.
FINISHED = ROOT / "docs/rows"

Row = dict[str, Any]


def kept_folder(
    name: str, given: Mapping[str, str], choices: Collection[str], kept: Collection[Mapping[str, str]]
) -> Path | None:
    """The folder in the repository with the rows of a run; None if they are not kept.

    Args:
        name: name of the benchmark or preset.
        given: the overrides of the run.
        choices: overrides that choose among its trainings, or look at one without changing it.
        kept: the other overrides of the runs whose rows are kept.
    """
    changes = {setting: value for setting, value in given.items() if setting not in choices}
    # In the order of `kept`, whatever that of the command line is: the rows are in one folder.
    return next((FINISHED.joinpath(name, *file_name(own)) for own in kept if own == changes), None)


def finished_rows(folder: Path | None, name: str) -> list[Row]:
    """The rows of a finished training; empty for one that is not finished, or whose rows are not kept.

    Args:
        folder: holds the rows; None if none are kept.
        name: name of the training.
    """
    file = _file(folder, name) if folder is not None else None
    if file is None or not file.exists():
        return []
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def keep_rows(folder: Path | None, trained: Trained, rows: Sequence[Row]) -> None:
    """Write the rows of a finished training, with the machine and the seeds of the episodes that were solved.

    Args:
        folder: receives the rows; None if none are kept.
        trained: the training.
        rows: JSON data.
    """
    solved = {
        str(cell["ddim_steps"]): [result.seed for result in trained.results_of(cell) if result.success]
        for cell in trained.swept["cells"]
    }
    write_rows(folder, trained.unit.name, rows, solved_seeds=solved)


def write_rows(folder: Path | None, name: str, rows: Sequence[Row], **also: Any) -> None:
    """Write the rows of a finished training, with the machine.

    Args:
        folder: receives the rows; None if none are kept.
        name: name of the training.
        rows: JSON data.
        **also: further JSON data.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine("gymnasium"), "rows": list(rows), **also}
    write_text(_file(folder, name), json_text(content) + "\n")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
