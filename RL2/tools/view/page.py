"""Self-contained HTML page of runs: curves, rollouts and tokens; a file, or served and updated while runs continue."""

from __future__ import annotations

import base64
import hashlib
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from RL2.tools.view.run_index import RunIndex
from RL2.tools.view.style import COLOURS, DASHES, PLOT_CONFIG, PLOT_LAYOUT

SCRIPTS = ("data.js", "curves.js", "list.js", "calls.js", "credit.js", "reader.js", "rows.js", "start.js")
"""Files of static/ that are concatenated in this order."""
EVERY_S = 2.0
"""Interval in seconds at which files are read again while a page is open."""


def render(index: RunIndex, *, live: bool = False) -> str:
    """Render the page. With `live`, it has no data and requests them from its own address."""
    files = resources.files("RL2.tools.view") / "static"
    script = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    plotly = get_plotlyjs()
    # only these scripts may run, whatever else gets into the page
    hashes = " ".join(f"'sha256-{_digest(code)}'" for code in (script, plotly))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8")).render(
        title=" · ".join(index.methods),
        hashes=hashes,
        live=live,
        css=files.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        plotly=plotly,
        look={"colours": COLOURS, "dashes": DASHES, "layout": PLOT_LAYOUT, "config": PLOT_CONFIG},
        chunks=() if live else index.chunks(),
    )


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")


def write_page(index: RunIndex, out: Path) -> None:
    """Write the page of `index`, with its data, to the file `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(index), encoding="utf-8")


class Server(ThreadingHTTPServer):
    """HTTP server of the page for this machine only; it follows the runs' files."""

    daemon_threads = True

    def __init__(self, index: RunIndex, port: int) -> None:
        """Bind to `port`; 0 picks a free one. Raise OSError if it is in use."""
        self.index, self.lock, self.looked_s = index, threading.Lock(), time.monotonic()
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, path: str) -> tuple[str, str] | None:
        """Return media type and content of a path; None if it does not exist."""
        with self.lock:
            if path == "/":
                return "text/html; charset=utf-8", render(self.index, live=True)
            if path == "/version":
                if time.monotonic() - self.looked_s > EVERY_S:
                    self.index.refresh()
                    self.looked_s = time.monotonic()
                return "text/plain", str(self.index.version)
            chunk = self.index.chunk(path.removeprefix("/chunk/"))
            return None if chunk is None else ("text/plain", chunk)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, unless the browser went away before it had all of the answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handler of the server's requests."""

    server: Server
    timeout = 60
    """Seconds after which a silent connection is closed."""

    def do_GET(self) -> None:
        # refuses pages that reach this machine under another name (DNS rebinding)
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
        """Log nothing: each page sends a request every few seconds."""
