"""A served page: what this machine's browser gets, and that nobody gets anything else."""

import http.client
import re
import shutil
import socket
import subprocess
import threading
from urllib.parse import urlsplit

import pytest

from policy.common.serving import _Handler, serving

CHROMIUM = shutil.which("chromium")
PAGE = '<html><head><title>t</title></head><body><section data-part="head"><p>{}</p></section>{}</body></html>'


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "report.html").write_text(PAGE.format("first", ""))
    (folder / "sweep.csv").write_text("a,b\n")
    (folder / ".hidden").write_text("hidden")
    (folder / "videos").mkdir()
    (folder / "videos" / "a b.mp4").write_bytes(b"video")
    (folder / "link").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    return folder / "report.html"


def ask(address, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_a_browser_that_leaves_before_the_end_leaves_no_traceback(page, capfd):
    page.write_text(PAGE.format("x" * 20_000_000, ""))
    with serving(page) as address:
        where = urlsplit(address)
        with socket.create_connection((where.hostname, where.port)) as browser:
            browser.sendall(f"GET / HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
            browser.recv(100)
        page.write_text(PAGE.format("short", ""))
        assert ask(address)[0].status == 200
    assert capfd.readouterr().err == ""


def test_the_page_is_served_with_the_script_that_the_file_does_not_have(page):
    with serving(page) as address:
        assert address.startswith("http://127.0.0.1:")
        answer, content = ask(address)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"first" in content
        assert content.count(b"<script>") == 1
        assert b"<script>" not in page.read_bytes()
        again, nothing = ask(address, **{"If-None-Match": answer.headers["ETag"]})
        assert (again.status, nothing) == (304, b"")
        page.write_text(PAGE.format("second one", ""))
        answer, content = ask(address, **{"If-None-Match": answer.headers["ETag"]})
        assert answer.status == 200
        assert b"second one" in content
        assert ask(address, "/report.html")[1] == content
        assert ask(address, "/sweep.csv")[1] == b"a,b\n"
        assert ask(address, "/videos/a%20b.mp4?x=1")[1] == b"video"


def test_a_page_in_a_linked_folder_has_its_script_under_both_names(page, tmp_path):
    (tmp_path / "linked").symlink_to(page.parent)
    with serving(tmp_path / "linked" / page.name) as address:
        assert ask(address)[1] == ask(address, "/report.html")[1]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/videos/../../secret.txt",
            "//secret.txt",
            "/link",
            "/up/secret.txt",
        ),
        *("/videos", "/videos/", "/.hidden", "/none", "/%00", "/" + 5000 * "a"),
    ],
)
def test_nothing_but_files_of_the_folder_is_served(page, path):
    with serving(page) as address:
        answer, content = ask(address, path)
    assert answer.status == 404
    assert b"secret" not in content


def test_another_host_name_and_another_method_are_refused(page):
    with serving(page) as address:
        assert ask(address, Host="evil.example")[0].status == 403  # a foreign page whose name leads to this machine
        assert ask(address, Host=f"localhost:{urlsplit(address).port}")[0].status == 200
        assert ask(address, method="POST")[0].status == 501


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_server_ends_with_the_work(page, error, monkeypatch):
    monkeypatch.setattr("policy.common.serving.INTERVAL", 0.01)
    try:
        with serving(page) as address:
            ask(address)
            if error:
                raise error
    except KeyboardInterrupt:
        assert error
    with pytest.raises(ConnectionRefusedError):
        ask(address)
    assert "page" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_a_browser_shows_what_changes_and_keeps_what_does_not(page, monkeypatch):
    monkeypatch.setattr("policy.common.serving.INTERVAL", 0.1)
    kept = """<section data-part="kept"><b>kept</b></section><script>
      const find = (tag) => document.querySelector(tag);
      find("b").mine = true;
      setInterval(() => { document.title = `${find("p").textContent}, ${find("b").mine}`; }, 50);
    </script>"""
    page.write_text(PAGE.format("first", kept))
    plain, asked = _Handler._send_page, []

    def send_page(handler, *args):
        asked.append(1)
        if len(asked) == 2:  # it changes before the browser's second look
            page.write_text(PAGE.format("second", kept))
        plain(handler, *args)

    monkeypatch.setattr(_Handler, "_send_page", send_page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    with serving(page) as address:
        done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=120, check=True)
    assert re.search("<title>(.*?)</title>", done.stdout)[1] == "second, true"
