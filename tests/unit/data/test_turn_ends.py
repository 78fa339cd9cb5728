"""Where a turn ends: training, sampling and exports agree on it, whatever token the template ends turns with."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chatml import CHATML
from episodes import one_episode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from RL2.data.preference import load_pairs
from RL2.data.sft import load_examples
from RL2.data.template import Template
from RL2.engines.scripted import ScriptedEngine
from RL2.models.policy import end_tokens, export, load_model
from RL2.rollout.environment import load_environment
from RL2.trainer.supervised import Rows
from RL2.types import Prompt, Sampling

EOS, START, END = 0, 1, 2
"""<|endoftext|>, <|im_start|> and <|im_end|>."""
HEADER = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
ROW = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "42"}]}


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Of a base model: its texts end with another token than the turns of its chat template."""
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    return other


def rows(folder: Path, *rows: dict[str, Any]) -> str:
    (file := folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def tiny(cls: Any, tokenizer: PreTrainedTokenizerBase, **more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": EOS, "bos_token_id": None, "pad_token_id": EOS}
    return cls(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends, **more))


TEMPLATES = {
    "newline": (CHATML, "42<|im_end|>"),
    "nothing behind": (CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor"), "42<|im_end|>"),
    "end of text": (CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", "42<|im_end|>"),
    "eos alone": (CHATML.replace("<|im_end|>", "{{ eos_token }}"), "42<|endoftext|>"),
    "the next turn": (CHATML.replace("<|im_end|>\n", ""), "42<|im_start|>"),
    "two that belong together": (
        CHATML.replace("<|im_end|>\n", "<|im_end|>{{ eos_token }}"),
        "42<|im_end|><|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2])
def test_a_turn_trains_up_to_the_token_that_ends_it(
    name: str, turns: int, tmp_path: Path, base: PreTrainedTokenizerBase
) -> None:
    base.chat_template, expected = TEMPLATES[name]
    ((trajectory,), _) = load_examples(rows(tmp_path, {"messages": ROW["messages"] * turns}), base, None, 500)
    (sequence,) = trajectory.sequences
    trained = [i for i, mark in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if mark]
    assert base.decode(trained) == expected * turns
    assert trained[-1] in Template(base).end_ids
    assert sequence.action_mask[-1], "nothing comes behind the end"


@pytest.mark.parametrize(
    ("prompt", "response", "trained"),
    [
        ("How many?", "42", "42<|endoftext|>"),
        ("How many?", "42<|endoftext|>", "42<|endoftext|>"),
        (HEADER, "42", "42<|im_end|>"),
        (HEADER, "42<|im_end|>", "42<|im_end|>"),
    ],
)
def test_a_text_ends_once_and_as_its_prompt_wants(
    tmp_path: Path, base: PreTrainedTokenizerBase, prompt: str, response: str, trained: str
) -> None:
    ((trajectory,), _) = load_examples(rows(tmp_path, {"prompt": prompt, "response": response}), base, None, 100)
    (sequence,) = trajectory.sequences
    assert (
        base.decode([i for i, m in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if m])
        == trained
    )


def test_sampling_and_exports_end_there_too(tmp_path: Path, base: PreTrainedTokenizerBase) -> None:
    """A model that always says <|im_end|>: what generates from its export stops at the first one."""
    lm = tiny(LlamaForCausalLM, base)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.fill_(1.0 if "embed" in name or "norm" in name else 0.0)
        lm.lm_head.weight[END] = 1.0
    lm.generation_config.eos_token_id = [5]
    lm.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), torch.float32)
    assert end_tokens(loaded, base) == (EOS, END, 5)
    export(loaded, base, tmp_path / "out", write=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.eos_token_id == [EOS, END, 5]
    for model, length in ((lm, 4), (exported, 1)):
        answer = model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, do_sample=False)
        assert answer[0, 2:].tolist() == [END] * length


def test_one_end_token_is_written_as_before(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = tiny(LlamaForCausalLM, tokenizer)
    lm.generation_config.eos_token_id = END
    lm.save_pretrained(tmp_path / "model")
    export(load_model(str(tmp_path / "model"), torch.float32), tokenizer, tmp_path / "out", write=True)
    file = "generation_config.json"
    assert (tmp_path / "out" / file).read_text() == (tmp_path / "model" / file).read_text()


def test_a_reward_model_reads_its_value_where_training_did(
    tmp_path: Path, base: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(LlamaForSequenceClassification, base, num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    base.save_pretrained(tmp_path / "rm")
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "rm"))
    environment = load_environment(Path(__file__).parents[3] / "envs" / "reward_model.py", 60)
    chat, text = {"messages": ROW["messages"][:1]}, {"prompt": "How many?"}
    for question, state, end in ((chat, HEADER, END), (text, "How many?", EOS)):
        pairs, _ = load_pairs(rows(tmp_path, {**question, "chosen": "42", "rejected": "4"}), base, None, 100)
        chosen = Rows(pairs.ids, pairs.trains, per_row=2, scored=True).draw([0]).sequences([0])
        read = chosen.token_ids_T.tolist()
        assert read[-1] == chosen.labels_T[-1] == end
        with torch.no_grad():
            expected = model.score(model.model(torch.tensor([read])).last_hidden_state[0, -1]).item()
        reward = asyncio.run(environment.step(state, "42", {})).reward
        assert reward == pytest.approx(expected, abs=1e-5)
    environment.close()


@pytest.mark.parametrize("sampled_end", [EOS, END, None])
def test_a_history_has_one_end_behind_a_response(
    tmp_path: Path, base: PreTrainedTokenizerBase, sampled_end: int | None
) -> None:
    """What was sampled stays, and the template's end is written only where none was."""
    (tmp_path / "env.py").write_text(
        "async def step(state, action, extra_info):\n"
        "    again = [{'role': 'user', 'content': 'Sure?'}]\n"
        "    return dict(next_state=again, reward=0, score=0, done=False, extra_info=extra_info)\n"
    )
    environment = load_environment(tmp_path / "env.py", 5)
    reply = base.encode("42") + ([] if sampled_end is None else [sampled_end])
    trajectory = one_episode(
        Prompt(0, HEADER, base.encode(HEADER), {}),
        engine=ScriptedEngine(lambda ids, sampling: list(reply)),
        environment=environment,
        tokenizer=base,
        sampling=Sampling(len(reply), stop_token_ids=(EOS, END)),
        max_turns=2,
    )
    environment.close()
    (sequence,) = trajectory.sequences
    end = "<|im_end|>" if sampled_end is None else base.decode([sampled_end])
    again = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert base.decode(sequence.token_ids.tolist()) == HEADER + "42" + end + again + base.decode(reply)
