"""The player of a run's agent; the packages that the endpoint needs are imported only for one."""

from __future__ import annotations

from RL2.config.agent import agent_of
from RL2.data.template import Template
from RL2.engines.base import Engine
from RL2.rollout.episodes import Player


def make_player(
    agent: str | None,
    key: str,
    engine: Engine,
    template: Template,
    max_length: int | None,
    *,
    timeout_s: float,
    max_running: int,
    variables: tuple[str, ...],
) -> Player | None:
    """Return what plays the episodes with `agent`, the value of the setting `key`; None if there is none.

    `max_length` is in tokens; at most `max_running` agents run at a time, each for `timeout_s`. `variables` are names
    of environment variables that they get although they have secrets. Raise ConfigError if the agent is not there.
    """
    if agent is None:
        return None
    from RL2.agents.player import AgentPlayer
    from RL2.agents.session import Policy
    from RL2.data.tool_calls import ResponseParser

    policy = Policy(engine, template.tokenizer, template, ResponseParser(template), max_length)
    return AgentPlayer(agent_of(key, agent), policy, timeout_s, max_running, variables)
