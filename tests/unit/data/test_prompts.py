from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from RL2.data.prompts import given_away, load_prompts, make_prompt
from RL2.data.source import DataError
from RL2.data.template import Template
from RL2.types import Prompt

USER = [{"role": "user", "content": "How many apples?"}]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_prompts_and_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": "12+30=", "extra_info": {"answer": "42"}},
            {"messages": USER, "prompt": None, "extra_info": '{"answer": 1}'},
            {"prompt": "48-19="},
        ],
    )
    chat = "<|im_start|>user\nHow many apples?<|im_end|>\n<|im_start|>assistant\n"

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert list(load_prompts(path, tokenizer, None, 100)) == [
        Prompt(0, "12+30=", ids("12+30="), {"answer": "42"}),
        Prompt(1, chat, ids(chat), {"answer": 1}),
        Prompt(2, "48-19=", ids("48-19="), {}),
    ]
    assert ids(chat)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_single_row_makes_the_same_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with_bos: Any = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    rows = [{"prompt": "12+30=", "extra_info": {"answer": "42"}}, {"messages": USER, "chat_template_kwargs": {"a": 1}}]
    prompts = load_prompts(jsonl(tmp_path / "a.jsonl", rows), with_bos, None, 100)
    assert list(prompts) == [make_prompt(row, Template(with_bos), number) for number, row in enumerate(rows)]


def test_only_raw_prompts_get_the_tokenizers_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with_bos: Any = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "12"}, {"messages": USER}])
    raw, chat = load_prompts(path, with_bos, None, 100)
    assert raw.token_ids[0] == 0
    assert 0 not in chat.token_ids


def test_example_converts_raw_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": "12", "a": "3"}])
    prompts = load_prompts(
        path, tokenizer, lambda row: {"prompt": row["q"] + "?", "extra_info": {"answer": row["a"]}}, 10
    )
    assert (prompts[0].text, prompts[0].extra_info) == ("12?", {"answer": "3"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, r"keys are question, answer; example\(row\) in .* \(rollout.env_path"),
        ({"prompt": "q", "messages": USER}, "both 'prompt' and 'messages'"),
        ({"prompt": " \n"}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be text, not 3"),
        ({"prompt": [3]}, r"'prompt' must be text, not \[3\]; chat messages go under 'messages'"),
        ({"prompt": "q", "extra_info": [1]}, r"'extra_info' must be an object, not \[1\]"),
        ({"prompt": "q", "extra_info": "{1"}, "'extra_info' must be an object"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [*USER, {"content": "x"}]}, r"messages\[1\] has no 'role'"),
        ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\].role must be text, not 1"),
        ({"messages": [{"role": "user", "content": " "}]}, r"messages\[0\] is empty"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "3"}]},
            "so the prompt would contain the answer; remove that turn",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\].content must be text"),
        ({"prompt": "q" * 33}, r"has 33 tokens, the limit is 32; raise actor.max_length_per_device"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Any, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "12"}, row])
    with pytest.raises(DataError, match=f"a.jsonl, row 2: .*{message}"):
        load_prompts(path, tokenizer, None, 32)


def test_templates_that_are_missing_or_refuse(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": USER}])
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 1: the chat template refuses the messages: roles must alternate"):
        load_prompts(path, other, None, 32)
    other.chat_template = None
    with pytest.raises(DataError, match=r"row 1: .* no chat template; pass rows with 'prompt' or a tokenizer with"):
        load_prompts(path, other, None, 32)


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("3 + 4 = ? #### 7", "7", "#### 7"),
        ("3 + 4 = ? #### 7", 7, "#### 7"),
        ("It is \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}"),
        ("<answer> Rome </answer>", ["Paris", "Rome"], "<answer> Rome </answer>"),
        ("The answer is 7.", "7", "answer is 7"),
        ("Is it 7 or 8?", "7", None),
        ("3 + 4 = ? #### 71", "7", None),
        ("The answer is 70, or 7.5.", "7", None),
        ("Put the answer in \\boxed{}.", "7", None),
        ("Write <answer></answer>.", "", None),
        ("The answer is True.", None, None),
    ],
)
def test_an_answer_in_the_prompt_is_seen(prompt: str, answer: Any, found: str | None) -> None:
    assert given_away(prompt, answer) == found


def test_tools_and_calls_reach_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As a list, as JSON text, or as a list of JSON texts; arguments are encoded once, however a row has them."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "tide", "parameters": {}}}
    prompts = set()
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        for arguments in ({"of": "Pell"}, json.dumps({"of": "Pell"})):
            for call in (
                {"function": {"name": "tide", "arguments": arguments}},
                {"name": "tide", "arguments": arguments},
            ):
                messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
                messages += [
                    {"role": "tool", "content": [{"type": "text", "text": "06"}, {"type": "text", "text": ":12"}]}
                ]
                path = jsonl(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}])
                prompts |= {prompt.text for prompt in load_prompts(path, own, None, 1000)}
    assert prompts == {
        json.dumps(tool)
        + 'user:How many apples?<|im_end|>assistant:tide{"of": "Pell"}<|im_end|>tool:06:12<|im_end|>assistant:'
    }
