"""One self-contained HTML page of runs: curves, rollouts, and their tokens; as a file, or served while they go on."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from RL2.tools.view.run_index import RunIndex
from RL2.tools.view.style import COLOURS, DASHES, PLOT_CONFIG, PLOT_LAYOUT

SCRIPTS = ("data.js", "curves.js", "list.js", "reader.js", "rows.js", "start.js")
"""Files of static/, in this order one script."""
EVERY_S = 2.0
"""Files are looked at again after so long, if somebody asks."""


def render(book: RunIndex, *, live: bool = False) -> str:
    """The page; `live`: without its data, which it then asks for under its own address."""
    files = resources.files("RL2.tools.view") / "static"
    script = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    plotly = get_plotlyjs()
    # only these scripts run, whatever else should ever get into the page
    hashes = " ".join(f"'sha256-{_digest(code)}'" for code in (script, plotly))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8")).render(
        title=" · ".join(book.methods),
        hashes=hashes,
        live=live,
        css=files.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        plotly=plotly,
        look={"colours": COLOURS, "dashes": DASHES, "layout": PLOT_LAYOUT, "config": PLOT_CONFIG},
        chunks=() if live else book.chunks(),
    )


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")


def write_page(book: RunIndex, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(book), encoding="utf-8")


class Server(ThreadingHTTPServer):
    """The page on this machine alone, always as new as the runs' files."""

    daemon_threads = True

    def __init__(self, book: RunIndex, port: int) -> None:
        """`port`: 0 takes a free one. Raises OSError if it is taken."""
        self.book, self.lock, self.looked_s = book, threading.Lock(), time.monotonic()
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, path: str) -> tuple[str, str] | None:
        """(media type, content)."""
        with self.lock:
            if path == "/":
                return "text/html; charset=utf-8", render(self.book, live=True)
            if path == "/version":
                if time.monotonic() - self.looked_s > EVERY_S:
                    self.book.refresh()
                    self.looked_s = time.monotonic()
                return "text/plain", str(self.book.version)
            chunk = self.book.chunk(path.removeprefix("/chunk/"))
            return None if chunk is None else ("text/plain", chunk)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # a page from elsewhere that calls this machine by another name (DNS rebinding) reads nothing
        host = self.headers.get("Host", "").rpartition(":")[0]
        found = self.server.answer(self.path.partition("?")[0]) if host in ("127.0.0.1", "localhost") else None
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = found
        data = content.encode("utf-8")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: every page asks every few seconds."""
