"""A server of every protocol, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scripted_endpoint import Scripted, serving

from RL2.agents.endpoint import PROTOCOLS


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    """A server whose replies a test chooses."""
    with serving(PROTOCOLS) as scripted:
        yield scripted


@pytest.fixture
def client(server: Scripted) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client
