"""Benchmarks keep each row as soon as it is measured, and measure none twice."""

import json

import pytest

from scripts.bench import kept_rows
from scripts.bench.kept_rows import KeptRows, code_digest
from scripts.bench.rollout import door_row


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_rows, "FOLDER", tmp_path)
    monkeypatch.setattr("scripts.bench.report.FOLDER", tmp_path)
    monkeypatch.setattr(kept_rows, "ROOT", tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/part.py").write_text("x = 1")
    return tmp_path / "timed.jsonl"


def bench(stop_at=None, sizes=(1, 2, 3)):
    """Measure a row for each size; gives the sizes that were measured anew, and all rows."""
    measured = []

    def work(size):
        if size == stop_at:
            raise KeyboardInterrupt
        measured.append(size)
        yield {"size": size, "ms": 1.5 * size}

    with KeptRows("timed", measurements=len(sizes)) as rows:
        for size in sizes:
            rows.measure({"size": size}, lambda size=size: work(size))
    return measured, json.loads(rows.report().read_text())


def test_a_stopped_benchmark_goes_on_and_ends_like_an_undisturbed_one(file, capsys):
    with pytest.raises(SystemExit, match="the same command goes on"):
        bench(stop_at=3)
    assert "size 1, ms 1.5\nsize 2, ms 3\n" in capsys.readouterr().out
    assert len(file.read_text().split()) > 0
    measured, rows = bench()
    assert measured == [3]
    assert rows == [{"size": size, "ms": 1.5 * size} for size in (1, 2, 3)]
    out = capsys.readouterr().out
    assert "size 2, ms 3 (kept)" in out
    assert "| size | ms" in out


def test_a_line_that_was_being_written_is_measured_again(file):
    bench()
    file.write_text(file.read_text()[:-20])
    assert bench()[0] == [3]
    assert bench()[0] == []


def test_other_code_and_other_settings_are_measured_anew(file, tmp_path):
    bench()
    assert bench(sizes=(2, 4))[0] == [4]
    before = code_digest(tmp_path)
    (tmp_path / "policy/part.py").write_text("x = 2")
    assert code_digest(tmp_path) != before
    assert bench()[0] == [1, 2, 3]


def test_the_doors_cost_is_that_of_the_same_steps_with_and_without_it(monkeypatch):
    monkeypatch.setattr("scripts.bench.rollout.TURNS", 4)
    row = door_row({"name": "planar"})
    assert row["steps_per_s"] > 0
    assert row["raw_steps_per_s"] > 0
    assert row["overhead_low"] <= row["overhead_percent"] <= row["overhead_high"]
