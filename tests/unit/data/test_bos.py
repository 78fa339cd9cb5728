"""The token that begins a text (BOS) is there exactly once, wherever the text comes from."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from episodes import one_episode
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from RL2.data.preference import load_pairs
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import load_environment
from RL2.trainer.supervised import Rows
from RL2.types import Prompt, Sampling

BOS = "<|endoftext|>"
USER = [{"role": "user", "content": "hi"}]
SCRIPT = """
async def reset(extra_info):
    return FIRST
async def step(state, action, extra_info):
    return dict(next_state=REWRITTEN, reward=0, score=0, done=False, extra_info=extra_info)
"""


@pytest.fixture(params=["$A", f"{BOS} $A", f"{BOS} $A <|im_end|>", "$A <|im_end|>"])
def own(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Tokenizers that put BOS before a text, the end token behind it, both or nothing."""
    other: Any = copy.deepcopy(tokenizer)
    other.bos_token = BOS
    special = [(token, other.convert_tokens_to_ids(token)) for token in (BOS, "<|im_end|>")]
    other.backend_tokenizer.post_processor = TemplateProcessing(request.param, None, special)
    other.number = int(request.param.startswith(BOS))
    return other


def rows(folder: Path, row: Any) -> str:
    (file := folder / "rows.jsonl").write_text(json.dumps(row))
    return str(file)


@pytest.mark.parametrize("with_bos", [True, False])
def test_rows(tmp_path: Path, own: Any, with_bos: bool) -> None:
    """A text with its BOS written out has no second one; a chat has what its template writes."""
    if with_bos:
        own.chat_template = "{{ bos_token }}" + own.chat_template
    rendered = own.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    bos, end = own.bos_token_id, own.eos_token_id
    for row, number in (
        ({"prompt": "hi"}, own.number),
        ({"prompt": f"{BOS}hi"}, 1),
        ({"messages": USER}, with_bos),
        ({"prompt": rendered}, max(with_bos, own.number)),
    ):
        (prompt,) = load_prompts(rows(tmp_path, row), own, None, 100)
        assert prompt.token_ids.count(bos) == number
        assert prompt.token_ids[-1] != end, "a prompt is not over"
        ((example,), _) = load_examples(rows(tmp_path, row | {"response": "yes"}), own, None, 100)
        assert example.sequences[0].token_ids.tolist()[: len(prompt.token_ids)] == prompt.token_ids
        assert example.sequences[0].token_ids[-1] == end


@pytest.mark.parametrize("first", ["hi", f"{BOS}hi", USER])
@pytest.mark.parametrize("rewritten", ["anew", f"{BOS}anew"])
def test_episodes(tmp_path: Path, own: Any, first: Any, rewritten: str) -> None:
    """What `reset` says is as the same in a row, and a rewritten history begins as the first one did."""
    (tmp_path / "env.py").write_text(SCRIPT.replace("FIRST", repr(first)).replace("REWRITTEN", repr(rewritten)))
    environment = load_environment(tmp_path / "env.py", 5)
    trajectory = one_episode(
        Prompt(0, "", [], {}),
        engine=ScriptedEngine(lambda ids, sampling: [70]),
        environment=environment,
        tokenizer=own,
        sampling=Sampling(4),
        max_turns=2,
    )
    environment.close()
    row = {"prompt": first} if isinstance(first, str) else {"messages": first}
    (prompt,) = load_prompts(rows(tmp_path, row), own, None, 100)
    begun, anew = (sequence.token_ids.tolist() for sequence in trajectory.sequences)
    assert begun[:-1] == prompt.token_ids
    had_one = begun[0] == own.bos_token_id
    assert anew.count(own.bos_token_id) == max(rewritten.startswith(BOS), had_one and own.number)


def test_a_reward_model_reads_what_it_was_trained_on(tmp_path: Path, own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": 0}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(own), num_labels=1, **shape, **ends))
    model.save_pretrained(tmp_path / "rm")
    own.save_pretrained(tmp_path / "rm")
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "rm"))
    environment = load_environment(Path(__file__).parents[3] / "envs" / "reward_model.py", 60)
    for question in ({"prompt": "hi"}, {"prompt": f"{BOS}hi"}, {"messages": USER}):
        path = rows(tmp_path, {**question, "chosen": "yes", "rejected": "no"})
        pairs, _ = load_pairs(path, own, None, 100)
        read = Rows(pairs.ids, pairs.trains, per_row=2, scored=True).draw([0]).sequences([0]).token_ids_T.tolist()
        (prompt,) = load_prompts(path, own, None, 100)
        with torch.no_grad():
            expected = model.score(model.model(torch.tensor([read])).last_hidden_state[0, -1]).item()
        assert asyncio.run(environment.step(prompt.text, "yes", {})).reward == pytest.approx(expected, abs=1e-5)
    environment.close()
