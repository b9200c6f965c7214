"""Tracking works without an account and without a network, or not at all; and no fault of it reaches the caller.

W&B itself runs in these tests. What it kept is read with its own protocol buffers.
"""

import http.server
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.figure import Figure

from policy.tracking import wandb_tracker as tracking
from policy.tracking.tracker import NoTracker
from policy.tracking.wandb_tracker import WandbTracker

ROWS = [{"ddim_steps": 1, "success_rate": 0.25}, {"ddim_steps": 2, "success_rate": 0.5}]
KEY = "0123456789" * 4


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


def records(run: Path):
    """The records in a run's .wandb file: LevelDB's log format (crc32, length, type) behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("*.wandb")
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # a record does not begin in the last bytes of a block
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def history(run: Path) -> list[dict]:
    """What was logged, entry by entry."""
    entries = []
    for record in records(run):
        if record.HasField("history"):
            entry: dict = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                inner = entry
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = json.loads(item.value_json)
            entries.append(entry)
    return entries


def only_run(folder: Path, kind: str = "offline-run") -> Path:
    (run,) = (folder / "wandb").glob(f"{kind}-*")
    return run


def losses(run: Path) -> list[tuple[float, float]]:
    return [(entry["step"], entry["train/loss"]) for entry in history(run)]


def started(tracker: WandbTracker) -> int:
    """The process id of W&B's service, once it runs."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for task in Path(f"/proc/{tracker._process.pid}/task").glob("*/children"):
            for child in task.read_text().split():
                if "wandb-core" in Path(f"/proc/{child}/comm").read_text():
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("W&B's service did not start")


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_offline_run_is_kept_in_its_folder(nobody, tmp_path, capfd):
    folder = tmp_path / "run"
    tracker = WandbTracker(folder=folder, config={"env": {"name": "planar"}, "steps": 3, "shape": (4,)})
    tracker.log({"train/loss": 0.5}, 1)
    tracker.log({"train/loss": np.float32(0.125)}, 2)
    where = tracker.finish()
    run = only_run(folder)
    assert Path(where).resolve() == run.resolve()
    assert losses(run) == [(1, 0.5), (2, 0.125)]
    config = {item.key: json.loads(item.value_json) for r in records(run) for item in r.run.config.update}
    assert (config["env"], config["steps"], config["shape"]) == ({"name": "planar"}, 3, [4])
    assert next(r.run.project for r in records(run) if r.HasField("run")) == "ddim-policy"
    assert [r.exit.exit_code for r in records(run) if r.HasField("exit")] == [0]
    assert not any(nobody.glob("wandb"))  # nothing where the command was started
    assert capfd.readouterr() == ("", "")


def test_steps_that_were_logged_before_are_kept_again(nobody, tmp_path):
    """A resumed run goes back to its last checkpoint; W&B's own steps cannot."""
    tracker = WandbTracker(folder=tmp_path, config={})
    for step in (10, 20, 30, 20, 30, 40):
        tracker.log({"train/loss": 1 / step}, step)
    tracker.finish()
    assert [step for step, _ in losses(only_run(tmp_path))] == [10, 20, 30, 20, 30, 40]


def test_a_run_whose_caller_ends_unfinished_has_failed(nobody, tmp_path):
    tracker = WandbTracker(folder=tmp_path, config={})
    tracker.log({"train/loss": 0.5}, 1)
    until(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    tracker._waiting.put(None)  # as when the caller's process ends
    assert tracker._process.wait(30) == 0
    assert [r.exit.exit_code for r in records(only_run(tmp_path)) if r.HasField("exit")] == [1]
    tracker.finish()


def write_video(file: Path) -> Path:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for shade in (0, 128):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8))
            for packet in stream.encode(frame):
                container.mux(packet)
        container.mux(stream.encode())
    return file


def check_table(run: Path, picture: Path, videos: list[Path], rows: list[list]) -> None:
    """A table, its picture and its videos are in a run, as records and as files of the same bytes."""
    (entry,) = history(run)
    table = json.loads((run / "files" / entry["sweep"]["path"]).read_text())
    assert table["data"] == rows
    assert (run / "files" / entry["sweep_plot"]["path"]).read_bytes() == picture.read_bytes()
    assert entry["sweep"]["_type"] == "table-file"
    assert entry["sweep_plot"]["_type"] == "image-file"
    for video in videos:
        kept = entry[f"sweep_video/{video.stem}"]
        assert kept["_type"] == "video-file"
        assert (run / "files" / kept["path"]).read_bytes() == video.read_bytes()


def test_a_table_its_picture_and_its_videos_are_kept(nobody, tmp_path):
    picture = tmp_path / "sweep.png"
    Figure(figsize=(1, 1)).savefig(picture)
    videos = [write_video(tmp_path / f"k{k}_100000.mp4") for k in (1, 2)]
    tracker = WandbTracker(folder=tmp_path / "run", config={})
    tracker.log_table("sweep", ROWS, picture, videos)
    tracker.finish()
    check_table(only_run(tmp_path / "run"), picture, videos, [[1, 0.25], [2, 0.5]])


@contextmanager
def server(kind: str):
    """The address of a server that is no W&B."""
    if kind == "closed":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        return
    if kind == "never answers":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{broken.server_port}"
        broken.shutdown()


@pytest.mark.parametrize(
    "kind",
    ["no login", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("closed", "never answers", "answers 500"))],
)
def test_online_without_login_or_server_records_offline_and_says_how_to_upload(
    kind, nobody, tmp_path, monkeypatch, capfd
):
    with server("closed" if kind == "no login" else kind) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        if kind != "no login":
            monkeypatch.setenv("WANDB_API_KEY", KEY)
        begin = time.monotonic()
        tracker = WandbTracker(folder=tmp_path, config={}, mode="online", patience=12 if kind == "closed" else 10)
        for step in range(100):
            tracker.log({"train/loss": 0.5}, step)
        assert time.monotonic() - begin < 0.5  # nobody waits for the server before the end
        run = only_run(tmp_path) if Path(where := tracker.finish()) else None
        assert time.monotonic() - begin < 14
    assert Path(where).resolve() == run.resolve()
    assert len(losses(run)) == 100
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: W&B cannot be reached")
    assert f"`wandb sync {where}`" in line
    assert "checkpoint's history" in line


def test_without_wandb_a_run_goes_on_untracked(nobody, tmp_path, monkeypatch, capfd):
    (tmp_path / "path/wandb").mkdir(parents=True)
    (tmp_path / "path/wandb/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    tracker = WandbTracker(folder=tmp_path / "run", config={})
    tracker.log({"train/loss": 0.5}, 1)
    assert tracker.finish() == ""
    (line,) = capfd.readouterr().err.splitlines()
    assert "recorded nothing" in line
    assert "No module named 'wandb'" in line
    assert "checkpoint's history" in line


@pytest.mark.slow
def test_the_death_of_wandbs_service_costs_a_warning_and_what_came_after(nobody, tmp_path, capfd):
    tracker = WandbTracker(folder=tmp_path, config={})
    tracker.log({"train/loss": 0.5}, 1)
    service = started(tracker)
    until(lambda: any(losses(run) for run in tmp_path.glob("wandb/offline-run-*") if any(run.glob("*.wandb"))))
    os.kill(service, signal.SIGKILL)
    begin = time.monotonic()
    for step in range(2, 12):
        tracker.log({"train/loss": 0.5}, step)
        time.sleep(0.05)
    where = tracker.finish()
    assert time.monotonic() - begin < 10
    assert losses(Path(where)) == [(1, 0.5)]
    (line,) = capfd.readouterr().err.splitlines()
    assert "W&B failed and has recorded steps up to" in line
    assert "checkpoint's history" in line


def test_a_call_that_never_returns_holds_nobody_up(nobody, tmp_path, capfd):
    tracker = WandbTracker(folder=tmp_path, config={}, patience=2)
    service = started(tracker)
    os.kill(service, signal.SIGSTOP)
    begin = time.monotonic()
    for step in range(5_000):
        tracker.log({"train/loss": 0.5}, step)
    spent = time.monotonic() - begin
    assert spent < 1, f"5,000 calls took {spent:.2f} s"
    with pytest.warns(UserWarning, match=r"W&B was ended, unfinished after 2 s .* checkpoint's history"):
        tracker.finish()
    assert time.monotonic() - begin < 4
    os.kill(service, signal.SIGKILL)


def test_a_process_that_was_killed_is_reported_once(nobody, tmp_path, capfd):
    tracker = WandbTracker(folder=tmp_path, config={})
    started(tracker)
    tracker._process.kill()
    for step in range(100):
        tracker.log({"train/loss": 0.5}, step)
    with pytest.warns(UserWarning, match=r"W&B was killed \(signal 9\): .*checkpoint's history"):
        tracker.finish()
    assert capfd.readouterr().err == ""


def test_what_does_not_fit_into_the_queue_is_counted(nobody, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "WAITING", 2)
    tracker = WandbTracker(folder=tmp_path, config={})
    os.kill(tracker._process.pid, signal.SIGSTOP)
    for step in range(3_000):
        tracker.log({f"metric/{n}": 0.5 for n in range(20)}, step)
    os.kill(tracker._process.pid, signal.SIGCONT)
    with pytest.warns(UserWarning, match=r"W&B was too slow and lacks \d+ entries") as caught:
        where = tracker.finish()
    lost = int(str(caught[0].message).split("lacks ")[1].split()[0])
    assert lost > 1_000
    assert len(history(Path(where))) == 3_000 - lost


@pytest.mark.parametrize("patience", [0, -1, float("nan"), float("inf")])
def test_patience_is_a_positive_number_of_seconds(patience, tmp_path):
    with pytest.raises(ValueError, match=r"tracker\.patience must be"):
        WandbTracker(folder=tmp_path / "run", config={}, patience=patience)
    assert not (tmp_path / "run").exists()


def test_no_tracker_writes_nothing_and_does_not_need_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    tracker = NoTracker(folder=tmp_path / "run", config={})
    tracker.log({"train/loss": 0.5}, 1)
    tracker.log_table("sweep", ROWS)
    assert tracker.finish() == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_ends_with_its_files_and_its_table_where_no_server_answers(
    planar_run, run_command, tmp_path, monkeypatch, capfd
):
    """The whole command, online by one override, with a login and a server that never answers."""
    sweep = tmp_path / "sweep"
    with server("never answers") as address:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        run_command(
            "sweep",
            f"checkpoint={planar_run}/checkpoint",
            "ddim_steps=[1,2]",
            "episodes=2",
            "num_envs=2",
            "tracker=wandb",
            "tracker.mode=online",
            "tracker.patience=16",
            f"output_dir={sweep}",
        )
    assert capfd.readouterr().err.count("warning: W&B cannot be reached") == 1
    rows = json.loads((sweep / "sweep.json").read_text())["cells"]
    videos = sorted((sweep / "videos").glob("*.mp4"))
    assert (sweep / "report.html").exists()
    assert videos
    check_table(only_run(sweep), sweep / "sweep.png", videos, [[*row.values()] for row in rows])


def test_settings_files_in_the_current_and_in_the_output_folder_are_not_read(nobody, tmp_path):
    """They could send what is recorded, and the key, to another server."""
    for place in (nobody, tmp_path / "out"):
        (place / "wandb").mkdir(parents=True)
        (place / "wandb/settings").write_text("[default]\nentity = stranger\nrun_tags = stranger\n")
    tracker = WandbTracker(folder=tmp_path / "out", config={})
    tracker.log({"loss": 1.0}, step=1)
    assert tracker.finish()
    (run,) = [record.run for record in records(only_run(tmp_path / "out")) if record.HasField("run")]
    assert (run.entity, list(run.tags)) == ("", [])


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a place in which no folder can be made")
def test_a_table_is_kept_without_a_home_folder(nobody, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    tracker = WandbTracker(folder=tmp_path / "run", config={})
    tracker.log_table("sweep", ROWS)
    tracker.finish()
    (entry,) = history(only_run(tmp_path / "run"))
    assert entry["sweep"]["_type"] == "table-file"
    assert capfd.readouterr() == ("", "")


def test_copies_are_kept_beside_the_run_where_the_users_folders_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "readonly"))
    for name in ("XDG_DATA_HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "readonly").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == tmp_path)
    tracking.recorder._settle_folders(tmp_path / "run")
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "run")
    assert "WANDB_CACHE_DIR" not in os.environ
