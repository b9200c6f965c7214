"""A page that changes, shown by the browser of this machine: a server of one folder's files, and of nothing else."""

from __future__ import annotations

import mimetypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# Only this machine reaches this address.
ADDRESS = "127.0.0.1"
# Seconds between two looks of a page that is open.
INTERVAL = 1.0
# What the page may load: nothing but what stands in it, and itself.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:;"
    " connect-src 'self'"
)
# The page as it is served replaces those of its parts that have changed, so that nothing flickers or scrolls.
SCRIPT = """
<script>
(() => {
  let seen = "SEEN";
  const parts = (page) => [...page.querySelectorAll("[data-part]")];
  const names = (page) => parts(page).map((part) => part.dataset.part).join();
  function replace(part, next) {
    if (part.innerHTML === next.innerHTML) return;
    const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    part.innerHTML = next.innerHTML;
    part.querySelectorAll(".scroll").forEach((box, number) => { box.scrollLeft = scrolled[number] ?? 0; });
  }
  function show(text) {
    const next = new DOMParser().parseFromString(text, "text/html");
    next.querySelectorAll("script").forEach((script) => script.remove());
    document.title = next.title;
    if (names(next) !== names(document)) document.body.replaceChildren(...next.body.childNodes);
    else parts(next).forEach((part, number) => replace(parts(document)[number], part));
  }
  async function look() {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: { "If-None-Match": seen } });
      if (answer.status === 200) { show(await answer.text()); seen = answer.headers.get("ETag"); }
      setTimeout(look, PERIOD);
    } catch { document.body.insertAdjacentHTML("beforeend", "<p class=faint>The command has ended.</p>"); }
  }
  setTimeout(look, PERIOD);
})();
</script>
"""


class _Server(ThreadingHTTPServer):
    """Serves the files of one folder.

    Args:
        page: the page, which is also what `/` leads to.
    """

    daemon_threads = True

    def __init__(self, page: Path) -> None:
        super().__init__((ADDRESS, 0), _Handler)
        self.page = page.parent.resolve() / page.name
        self.asked = 0.0  # when somebody last asked for the page

    @property
    def names(self) -> set[str]:
        """How a browser may call this server; another name may be that of a foreign page that leads here."""
        return {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    def file_of(self, target: str) -> Path | None:
        """The file that a request means; None for everything that is not a plain file within the folder."""
        name = unquote(target.partition("?")[0]).removeprefix("/")
        if not name:
            return self.page
        folder = self.page.parent
        with suppress(OSError, ValueError):
            file = (folder / name).resolve()
            parts = file.relative_to(folder).parts
            if file.is_file() and not any(part.startswith(".") for part in parts):
                return file
        return None


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.names:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        file = self.server.file_of(self.path)
        try:
            if file is None:
                raise FileNotFoundError
            # In this order: a file that is replaced in between is asked for once more.
            status, content = file.stat(), file.read_bytes()
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        if file == self.server.page:
            self._send_page(content, f'"{status.st_mtime_ns}-{status.st_size}"')
        else:
            self._send(content, {"Content-Type": mimetypes.guess_type(file)[0] or "application/octet-stream"})

    def handle(self) -> None:
        """Answer a browser; one that leaves before the end is no error of the command."""
        with suppress(ConnectionError):
            super().handle()

    def _send_page(self, content: bytes, version: str) -> None:
        """Send the page with its script, or only say that the browser has this version."""
        self.server.asked = time.monotonic()
        headers = {"ETag": version, "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": POLICY}
        if self.headers.get("If-None-Match") == version:
            self._send(b"", headers, HTTPStatus.NOT_MODIFIED)
            return
        script = SCRIPT.replace('"SEEN"', repr(version)).replace("PERIOD", str(int(1000 * INTERVAL)))
        self._send(content.replace(b"</body>", f"{script}</body>".encode()), headers)

    def _send(self, content: bytes, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {**headers, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        if status is HTTPStatus.OK:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal belongs to the command."""


@contextmanager
def serving(page: Path) -> Iterator[str]:
    """Serve a page, and the files beside it, to browsers on this machine, in a thread.

    A browser that shows the page replaces what has changed every second. At the end it is left the time to fetch the
    last version.

    Args:
        page: an HTML file; the parts that are replaced have the attribute `data-part`.

    Yields:
        The address of the page.

    Raises:
        ValueError: this machine does not let a server listen.
    """
    try:
        server = _Server(page)
    except OSError as error:
        raise ValueError(f"no server can listen on {ADDRESS} ({error}): leave watch= out") from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="page", daemon=True)
    thread.start()
    try:
        yield f"http://{ADDRESS}:{server.server_port}/"
        if time.monotonic() - server.asked < 2 * INTERVAL:
            time.sleep(1.5 * INTERVAL)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
