"""Frozen models that play roles: other models, checkpoints, and earlier versions of the policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from RL2.agents.roles import Opponent
from RL2.agents.session import Policy as Answering
from RL2.config.programs import RLConfig
from RL2.config.values import LATEST, START
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError, naming
from RL2.io.checkpoint import NOTES, load_weights
from RL2.models.dtypes import compute_dtype
from RL2.models.policy import Policy, configured_tokenizer, load_tokenizer, max_length, named_weights, stop_tokens
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment
from RL2.workers.actor import Actor


class Opponents:
    """The frozen models of a run, each loaded once on every process, with an engine of its own."""

    def __init__(self, config: RLConfig, actor: Actor, longest: int) -> None:
        """Load the models that training and tests name. `longest` is the limit of a sequence in tokens."""
        self.config, self.longest, self.device = config, longest, actor.processes.device
        self.dtype = actor.dtype if config.rollout.dtype == "auto" else compute_dtype(config.rollout.dtype, self.device)
        self.by_name: dict[str, Opponent] = {}
        self.latest: EmbeddedEngine | None = None
        """The engine whose weights follow the policy's."""
        self.followed: int | None = None
        """Step of the weights that it has."""
        named = {"rollout.opponents": config.rollout.opponents}
        named |= {f"{each.key}.opponents": each.opponents for each in config.test_sets}
        for key, opponents in named.items():
            for role, name in opponents.items():
                if name not in self.by_name:
                    with naming(f"{key}.{role}"):
                        self.by_name[name] = self._load(name)

    def of(self, named: Mapping[str, str]) -> dict[str, Opponent]:
        """Return the opponents of these roles."""
        return {role: self.by_name[name] for role, name in named.items()}

    def follow(self, actor: Actor, step: int) -> None:
        """Give `latest` the weights of the policy at the steps of checkpoints (collective).

        A run that begins between two of them reads the one before.
        """
        if self.latest is None:
            return
        last = step - step % (self.config.trainer.save_freq or 1)
        if last == self.followed:
            return
        if last == step:
            self.latest.load_weights(actor.weights(), version=step)
        else:
            source = Path(self.config.trainer.save_dir) / f"step_{last:06d}" if last else None
            with naming("rollout.opponents: latest"):
                self.latest.load_weights(self._weights(source), version=last)
        self.followed = last

    def close(self) -> None:
        """Release the engines."""
        for opponent in self.by_name.values():
            opponent.policy.engine.close()

    def _load(self, name: str) -> Opponent:
        """Return the opponent called `name`: a model, a checkpoint of the policy, `start` or `latest`."""
        own = self.config.actor
        is_own = name in (START, LATEST) or (Path(name) / NOTES).is_file()
        model_name = own.model_name if is_own else name
        tokenizer = configured_tokenizer(own, "actor") if is_own else load_tokenizer(name)
        policy = self._policy(model_name, Path(name) if is_own and name not in (START, LATEST) else None)
        policy.to(self.device)
        lm = policy.lm
        for parameter in lm.parameters():  # the rotary frequencies stay float32
            parameter.data = parameter.data.to(self.dtype)
        engine = EmbeddedEngine(
            lm.eval().requires_grad_(False),
            decode=lambda ids: decode(tokenizer, ids),
            max_running_requests=self.config.rollout.max_running_requests,
            memory_share=self.config.rollout.gpu_memory_utilization,
        )
        if name == LATEST:
            self.latest = engine
        template = Template(tokenizer)
        longest = min(self.longest, max_length(model_name))
        answering = Answering(engine, tokenizer, template, ResponseParser(template), longest)
        return Opponent(answering, stop_tokens(lm, tokenizer, template))

    def _policy(self, model_name: str, source: Path | None) -> Policy:
        """Return a model on the CPU in float32, with the weights of the checkpoint `source` if there is one."""
        policy = Policy.load(model_name, dequantize=self.config.actor.dequantize)
        if source is not None and self.config.actor.lora.rank:
            raise ConfigError(
                f"{source} has adapters alone, and opponents are whole models; export it with rl2 export, or resume "
                "from a step that trainer.save_freq divides"
            )
        if source is not None:
            load_weights(source, policy)
        return policy

    def _weights(self, source: Path | None) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            yield from named_weights(self._policy(self.config.actor.model_name, source).lm, self.dtype)


def refuse_other_roles(named: Mapping[str, str], environment: Environment, key: str) -> None:
    """Raise ConfigError for opponents in roles that the environment does not have, or in all that it has."""
    roles: Iterable[str] = environment.roles
    for role, name in named.items():
        if not environment.roles:
            raise ConfigError(f"{key}.{role}={name} has no effect: {environment.path} has no roles")
        if role not in environment.roles:
            raise ConfigError(f"{key}.{role}={name}: {environment.path} has the roles {', '.join(roles)}")
    if environment.roles and named.keys() >= environment.roles.keys():
        raise ConfigError(f"{key} has all roles of {environment.path}; leave one to the policy")
