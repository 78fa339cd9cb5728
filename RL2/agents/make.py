"""The player of a run whose episodes an agent plays."""

from __future__ import annotations

from typing import Protocol

from RL2.agents.session import Policy
from RL2.config.agent import agent_of
from RL2.rollout.episodes import Player


class AgentSettings(Protocol):
    """Settings of an agent, as `config.rollout.Rollout` and `rl2 eval` have them."""

    @property
    def agent(self) -> str | None: ...
    @property
    def agent_timeout_s(self) -> float: ...
    @property
    def agent_env(self) -> tuple[str, ...]: ...
    @property
    def max_running_agents(self) -> int: ...


def make_agent(settings: AgentSettings, key: str, policy: Policy) -> Player | None:
    """Return what plays the episodes with the agent of `settings`, the value of `key`; None if there is none.

    Raise ConfigError if the agent is not there.
    """
    if settings.agent is None:
        return None
    from RL2.agents.player import AgentPlayer  # the endpoint needs packages that other runs do without

    agent = agent_of(key, settings.agent)
    return AgentPlayer(agent, policy, settings.agent_timeout_s, settings.max_running_agents, settings.agent_env)
