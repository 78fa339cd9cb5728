"""Settings that reinforcement learning cannot do without, for tests that load nothing of what they name."""

from __future__ import annotations

from RL2.config.load import load
from RL2.config.programs import RLConfig

RL = [
    "actor.model_name=m",
    "actor.max_length_per_device=100",
    "train_data.path=x.jsonl",
    "train_data.prompts_per_rollout=1",
    "train_data.responses_per_prompt=2",
    "rollout.env_path=x.py",
    "rollout.train_sampling_params.max_new_tokens=4",
    "trainer.experiment_name=x",
]


def rl_config(*overrides: str, program: str = "ppo") -> RLConfig:
    """Return a configuration of `program`, with the settings of `RL`, over which `overrides` win."""
    config = load(program, [*RL, *overrides])
    assert isinstance(config, RLConfig)
    return config
