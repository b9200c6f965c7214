"""Tracking works without an account and without a network, or not at all."""

import json
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from policy.tracking import NoTracker, WandbTracker

ROWS = [{"ddim_steps": 1, "success_rate": 0.25}, {"ddim_steps": 2, "success_rate": 0.5}]


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user who never logged in, in a folder of their own."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.chdir(home)
    return home


def test_an_offline_run_is_kept_in_its_folder(nobody, tmp_path):
    folder = tmp_path / "run"
    config = {"env": {"name": "planar"}, "steps": 3, "shape": (4,)}
    tracker = WandbTracker(folder=folder, config=config)
    tracker.log({"train/loss": 0.5}, 1)
    tracker.log({"train/loss": 0.125}, 2)
    where = tracker.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert Path(where).resolve() == run.resolve()
    (file,) = run.glob("*.wandb")

    deadline = time.monotonic() + 10
    while file.stat().st_size < 100 and time.monotonic() < deadline:
        time.sleep(0.02)  # W&B's own process may write the file a moment after finish() has returned
    kept = file.read_bytes()  # records of protocol buffers: texts and numbers stand in it as they are
    assert kept.count(b"train/loss") >= 2
    for text in (b"0.5", b"0.125", b'{"name":"planar"}', b"ddim-policy"):
        assert text in kept.replace(b": ", b":"), text
    assert not any(nobody.glob("wandb"))  # nothing where the command was started


def test_a_table_and_its_picture_are_kept(nobody, tmp_path):
    picture = tmp_path / "sweep.png"
    Figure(figsize=(1, 1)).savefig(picture)
    tracker = WandbTracker(folder=tmp_path / "run", config={})
    tracker.log_table("sweep", ROWS, picture)
    tracker.finish()
    (table,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/sweep_*.json")
    kept = json.loads(table.read_text())
    assert (kept["columns"], kept["data"]) == (["ddim_steps", "success_rate"], [[1, 0.25], [2, 0.5]])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/sweep_plot_*.png"))


def test_no_tracker_writes_nothing_and_does_not_need_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    tracker = NoTracker(folder=tmp_path / "run", config={})
    tracker.log({"train/loss": 0.5}, 1)
    tracker.log_table("sweep", ROWS)
    assert tracker.finish() == ""
    assert not (tmp_path / "run").exists()
