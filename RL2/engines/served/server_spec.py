"""Descriptions of servers: what is particular to vLLM or SGLang, and what a run wants of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from RL2.config.rollout import Servers, Transport
from RL2.engines.served.client import Client


@dataclass(frozen=True)
class ServerSpec:
    """A server program: how it is launched and called."""

    name: str
    """Name in error messages."""
    key: str
    """Configuration group: `rollout.KEY` has the settings."""
    client: type[Client]
    launcher: Path
    """Script that the servers' interpreter runs with their command line; it ends with the process $RL2_PARENT."""
    token_variable: str
    """Environment variable with the bearer token that every request needs."""
    prefix: str
    """Prefix of its environment variables. A launched server inherits none of them from the trainer."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Default environment variables of a launched server; the settings override them."""
    import_path: tuple[Path, ...] = ()
    """Directories in the PYTHONPATH of a launched server, whose environment has no RL2 installed."""


@dataclass(frozen=True)
class EngineSpec:
    """The servers of one run."""

    server: ServerSpec
    settings: Servers
    max_length: int
    """Maximum length of a sequence, in tokens."""
    max_running_requests: int
    """Requests that one server decodes together."""
    arguments: Sequence[str] = ()
    """Command line of launched servers, without the address."""
    transport: Transport = "files"
    """Way of weights to the servers."""
    router_url: str | None = None
    """A router that takes the sampling requests in place of the servers."""
