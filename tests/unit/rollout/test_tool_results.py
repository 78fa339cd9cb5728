"""Results of tools behind a sampled call: the text of the call stays as it is, and no result is lost."""

from __future__ import annotations

from typing import Any

import pytest
from real_templates import FILES, tokenizer_with

from RL2.data.template import Template
from RL2.rollout.continuation import next_text
from RL2.rollout.step_result import Unscored

pytestmark = pytest.mark.skipif(not FILES, reason="the package trl carries the templates")

RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "abcdef123", "content": "rain"}
QWEN = "<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen2_5", QWEN),
        ("qwen3", QWEN),  # it writes an empty reasoning into a turn that is the last
        ("qwen3_8", f"{QWEN}<think>\n"),
        ("glm4moe", "<|observation|>\n<tool_response>\nrain\n</tool_response><|assistant|>"),
        (
            "llama3_1",  # it leaves out the content of a turn with calls
            "<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"
            '"rain"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
        ),
    ],
)
def test_a_result_follows_the_sampled_call(name: str, written: str) -> None:
    template = Template(tokenizer_with(name))
    end = "<|observation|>" if name == "glm4moe" else template.end
    assert next_text(template, "sampled", [RESULT], end, {}) == f"sampled{written}"


def test_a_result_that_the_template_leaves_out_is_refused() -> None:
    template = Template(tokenizer_with("cohere2"))
    with pytest.raises(Unscored, match="leaves out the content of the tool: 'rain'"):
        next_text(template, "sampled", [RESULT], template.end, {})
