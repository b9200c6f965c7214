"""Files of finished sweeps that somebody edited, or that a full disk cut."""

import dataclasses
import json

import pytest

from policy.sweep.conclusion import conclude
from policy.sweep.facts import facts_of
from policy.sweep.merging import read_swept
from policy.sweep.recipes import figures_of
from policy.sweep.table import format_table, write_files
from tests.sweep.test_conclusion import row, swept_of

VALUES = (None, -1, 0.5, "x", [], [1], {}, {"a": 1}, True)


@pytest.fixture
def document(tmp_path):
    swept = swept_of(row(1, 0.5), row(2, 1.0), outcomes=[[True, False] * 4, [True] * 8])
    rows = [{**row, **figures_of([found])} for row, found in zip(swept.rows, swept.results, strict=True)]
    concluded = conclude(dataclasses.replace(swept, rows=rows), 0.05)
    write_files(tmp_path, concluded.rows, concluded.swept.episodes, concluded.summary)
    return json.loads((tmp_path / "sweep.json").read_text())


def places(value, place=()):
    """The place of each value in JSON data, of the first entry of each list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*place, key)
        yield from places(inner, (*place, key))


def refusal_of(folder):
    """Why a sweep cannot be read; empty if it can, and is concluded then."""
    try:
        read = read_swept([folder])
    except ValueError as error:
        return str(error)
    concluded = conclude(read, 0.05)
    assert format_table(concluded.rows)
    assert facts_of(concluded.rows, concluded.advice)
    return ""


def test_whatever_is_edited_or_missing_is_named_with_its_file_or_does_no_harm(document, tmp_path):
    whole = json.dumps(document)
    refused = 0
    for *path, last in places(document):
        for value in (*VALUES, "missing"):
            edited = json.loads(whole)
            inner = edited
            for key in path:
                inner = inner[key]
            if value == "missing":
                del inner[last]
            else:
                inner[last] = value
            (tmp_path / "sweep.json").write_text(json.dumps(edited))
            if said := refusal_of(tmp_path):
                assert str(tmp_path) in said
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_what_is_no_sweep_at_all_is_named(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json is damaged \(.*: give the sweep's command again"):
        read_swept([tmp_path])
