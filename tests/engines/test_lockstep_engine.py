"""The embedded engine as the trainer makes it, with a model that runs its own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from served import save_own_forward, serve
from transformers import PreTrainedTokenizerBase

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.types import Sampling


def test_it_samples_from_the_tensors_that_train(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    model = save_own_forward(tmp_path / "model", tokenizer, "lfm2")
    served = serve("embedded", model, tmp_path, tokenizer, processes, "rollout.max_staleness=0")
    served.sync()
    assert isinstance(served.engine, EmbeddedEngine) and served.engine.lm is served.actor.lm
    prompts = [[5, 6, 7, 8]] * 3 + [[9, 10]]
    for seed in (1, 2):
        for prompt, completion in zip(prompts, served.generate(prompts, Sampling(12)), strict=True):
            expected = torch.tensor(served.actor.logps(prompt + completion.token_ids))[len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)
        served.change_weights(seed)
        served.sync()


def test_a_setting_without_effect_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    model = save_own_forward(tmp_path / "model", tokenizer, "lfm2")
    with pytest.raises(ConfigError, match=r"lfm2 samples through its own forward; leave rollout\.compile out"):
        serve("embedded", model, tmp_path, tokenizer, processes, "rollout.compile=true")


def test_drafts_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    """A recurrent state cannot go back to where a draft went wrong."""
    model = save_own_forward(tmp_path / "model", tokenizer, "lfm2")
    with pytest.raises(ConfigError, match=r"lfm2 samples through its own forward; leave rollout\.speculation out"):
        serve("embedded", model, tmp_path, tokenizer, processes, "rollout.speculation=auto")
