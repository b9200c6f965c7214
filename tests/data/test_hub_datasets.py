"""LeRobot datasets that are named by a repository of the Hub, against a hub of our own on this machine."""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download

from policy.data.formats.lerobot.finding import find_lerobot
from policy.data.reading import read_demonstrations

HERE = Path(__file__).parent
LEROBOT = HERE / "lerobot_v30"
COMMIT = "c0ffee" + 34 * "0"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository, `somebody/reach`, as the Hub does."""

    folder = LEROBOT
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        head, _, name = path.partition(f"/resolve/{COMMIT}/")
        if path.startswith("/api/datasets/somebody/reach/revision/"):
            self.send(
                json.dumps({"id": "somebody/reach", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]})
            )
        elif path.startswith(f"/api/datasets/somebody/reach/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "oid": digest(self.folder / n), "size": 1} for n in names]
            self.send(json.dumps(tree))
        elif head == "/datasets/somebody/reach" and name in names:
            self.send((self.folder / name).read_bytes(), etag=digest(self.folder / name), body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, content: str | bytes, etag: str | None = None, *, body: bool = True) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that the client library asks, with caches of its own; returns what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(Hub, "asked", [])
    use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield Hub.asked
    server.shutdown()
    server.server_close()


def use(monkeypatch, home: Path, endpoint: str) -> None:
    """Let the client library ask an endpoint, and cache under a folder."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(home / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)


def read(path, tmp_path: Path):
    return read_demonstrations(format="lerobot", path=Path(path), cache_dir=tmp_path / "cache")


def test_a_repository_is_downloaded_once_and_read_like_its_folder(hub, tmp_path):
    found = read("somebody/reach", tmp_path)
    assert hub
    expected = read(LEROBOT, tmp_path)
    np.testing.assert_array_equal(found.actions, expected.actions)
    for key, values in expected.observations.items():
        np.testing.assert_array_equal(found.observations[key], values)
    hub.clear()
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(read("somebody/reach", tmp_path).actions, expected.actions)
    assert not hub


def test_a_copy_of_lerobots_own_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    shutil.copytree(LEROBOT, tmp_path / "lerobot" / "somebody" / "reach")
    assert find_lerobot(Path("somebody/reach")) == tmp_path / "lerobot" / "somebody" / "reach"
    shutil.rmtree(tmp_path / "lerobot" / "somebody")
    cached = snapshot_download("somebody/reach", repo_type="dataset", cache_dir=tmp_path / "lerobot" / "hub")
    hub.clear()
    assert find_lerobot(Path("somebody/reach")) == Path(cached)
    assert not hub


def test_a_copy_of_the_description_alone_is_completed(hub, tmp_path):
    snapshot_download("somebody/reach", repo_type="dataset", allow_patterns="meta/*")
    assert read("somebody/reach", tmp_path).num_episodes == read(LEROBOT, tmp_path).num_episodes


def test_links_of_a_snapshot_lead_into_its_own_repository_and_nowhere_else(hub, tmp_path):
    snapshot = Path(snapshot_download("somebody/reach", repo_type="dataset"))
    linked = snapshot / "meta" / "info.json"
    assert linked.is_symlink()
    elsewhere = tmp_path / "hf" / "hub" / "datasets--another--one" / "blobs" / "secret"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(linked.read_bytes())
    linked.unlink()
    linked.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"meta/info\.json is a link that leaves the folder"):
        read("somebody/reach", tmp_path)


def test_a_folder_that_only_looks_like_a_cache_follows_no_links(tmp_path):
    set_ = tmp_path / "snapshots" / "set"
    shutil.copytree(LEROBOT, set_)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("secret")
    (set_ / "link").symlink_to(tmp_path / "blobs" / "secret")
    with pytest.raises(ValueError, match="link is a link that leaves the folder"):
        read(set_, tmp_path)


@pytest.mark.parametrize(
    ("repository", "reason"), [("somebody/else", "404|not found|Not Found"), ("somebody/reach", "[Cc]onnect|refused")]
)
def test_what_the_hub_does_not_give_is_one_sentence(repository, reason, hub, tmp_path, monkeypatch):
    if repository == "somebody/reach":  # no network
        use(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"^{repository} is not here, and .*({reason}).*correct dataset\.path"):
        read(repository, tmp_path)


def test_a_proxy_that_cannot_be_used_is_one_sentence(hub, tmp_path, monkeypatch):
    """What the library is missing for it is an ImportError, and no error of its own."""

    genuine = huggingface_hub.snapshot_download

    def without_socksio(*arguments, **options):
        if options.get("local_files_only"):
            return genuine(*arguments, **options)
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", without_socksio)
    with pytest.raises(ValueError, match=r"^somebody/reach is not here, and .*SOCKS proxy.*correct dataset\.path"):
        read("somebody/reach", tmp_path)


def test_a_path_that_is_no_repository_is_reported_as_a_path(hub, tmp_path):
    with pytest.raises(ValueError, match="no dataset at"):
        read(tmp_path / "nothing" / "here", tmp_path)
    assert not hub
