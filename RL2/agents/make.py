"""The player of a run whose episodes an agent plays."""

from __future__ import annotations

from RL2.agents.session import Policy
from RL2.config.agent import agent_of
from RL2.rollout.episodes import Player


def make_agent(
    agent: str | None, key: str, policy: Policy, *, timeout_s: float, max_running: int, variables: tuple[str, ...]
) -> Player | None:
    """Return what plays the episodes with `agent`, the value of the setting `key`; None if there is none.

    At most `max_running` agents run at a time, each for `timeout_s`. `variables` are names of environment variables
    that they get although they have secrets. Raise ConfigError if the agent is not there.
    """
    if agent is None:
        return None
    from RL2.agents.player import AgentPlayer  # the endpoint needs packages that other runs do without

    return AgentPlayer(agent_of(key, agent), policy, timeout_s, max_running, variables)
