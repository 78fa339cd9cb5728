"""Check at the start that all processes of a run have the same settings, files and versions."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

from RL2.errors import ConfigError
from RL2.parallel.processes import Processes

MOST = 3
"""Number of differences that an error names."""


def refuse_differences(processes: Processes, facts: Mapping[str, str]) -> None:
    """Raise ConfigError on every process unless all have the same `facts` (collective).

    A fact that some processes lack is compared among the others. The most frequent value counts as right.
    """
    everywhere = processes.gather([(socket.gethostname(), dict(facts))], "the settings of all processes")
    names = dict.fromkeys(name for _, each in everywhere for name in each)
    differences = [
        difference for name in names if (difference := _difference(name, [each.get(name) for _, each in everywhere]))
    ]
    if differences:
        hosts = {host for host, _ in everywhere}
        where = ", ".join(f"rank {rank} is on {host}" for rank, (host, _) in enumerate(everywhere))
        named = "; ".join(differences[:MOST])
        more = f"; and {len(differences) - MOST} more" if len(differences) > MOST else ""
        raise ConfigError(
            f"the processes differ: {named}{more}; give all the same settings, files and version"
            + (f" ({where:.300})" if len(hosts) > 1 else "")
        )


def _difference(name: str, values: list[str | None]) -> str:
    """Return a phrase that names the ranks with another value than most; "" if there is none."""
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        return ""
    usual = max(counts, key=lambda value: (counts[value], -values.index(value)))  # ties go to the first rank
    odd = next(value for value in values if value not in (usual, None))
    ranks = [str(rank) for rank, value in enumerate(values) if value == odd]
    whose = f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{', ...' if len(ranks) > 8 else ''}"
    return f"{name} is {odd:.80} on {whose} and {usual:.80} on rank {values.index(usual)}"
