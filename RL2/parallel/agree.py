"""Stop at the start where processes that are to train together were given different things."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

from RL2.errors import ConfigError
from RL2.parallel.processes import Processes

MOST = 3
"""Differences that an error names."""


def refuse_differences(processes: Processes, facts: Mapping[str, str]) -> None:
    """Raise ConfigError on every process if they do not all have the same `facts` (collective).

    A fact that some of them lack is compared among the others. What most processes have counts as right.
    """
    everywhere = processes.gather([(socket.gethostname(), dict(facts))], "what the others were started with")
    names = dict.fromkeys(name for _, each in everywhere for name in each)
    told = [
        difference for name in names if (difference := _difference(name, [each.get(name) for _, each in everywhere]))
    ]
    if told:
        hosts = {host for host, _ in everywhere}
        where = ", ".join(f"rank {rank} is on {host}" for rank, (host, _) in enumerate(everywhere))
        more = f"; and {len(told) - MOST} more" if len(told) > MOST else ""
        raise ConfigError(
            f"the processes differ: {'; '.join(told[:MOST])}{more}; give all the same settings, files and version"
            + (f" ({where:.300})" if len(hosts) > 1 else "")
        )


def _difference(name: str, values: list[str | None]) -> str:
    """Return which ranks have another value than most, or "" if none has."""
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        return ""
    usual = max(counts, key=lambda value: (counts[value], -values.index(value)))  # of equals that of the first rank
    odd = next(value for value in values if value not in (usual, None))
    ranks = [str(rank) for rank, value in enumerate(values) if value == odd]
    whose = f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{', ...' if len(ranks) > 8 else ''}"
    return f"{name} is {odd:.80} on {whose} and {usual:.80} on rank {values.index(usual)}"
