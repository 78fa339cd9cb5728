"""A server of the package openenv in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

GAMES = Path(__file__).with_name("openenv_games.py")


@contextmanager
def served(game: str) -> Iterator[str]:
    """Serve a game and yield the address."""
    server = subprocess.Popen([sys.executable, str(GAMES), game], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for _ in range(1200):
            try:
                httpx.get(f"{url}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()
