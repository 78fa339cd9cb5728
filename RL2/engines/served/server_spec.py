"""What is a kind of server's own, beside its routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from RL2.engines.served.client import Client


@dataclass(frozen=True)
class Kind:
    name: str
    """In errors."""
    key: str
    """rollout.KEY has its settings."""
    client: type[Client]
    launcher: Path
    """Script that the servers' interpreter runs with their command line; it ends with the process $RL2_PARENT."""
    token_variable: str
    """Environment variable with the token that every request needs."""
    prefix: str
    """Of its environment variables: a launched server gets none of the trainer's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of a launched server unless the settings say otherwise."""
    plugins: Path | None = None
    """Folder that a launched server imports from."""
