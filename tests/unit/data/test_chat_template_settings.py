"""actor.chat_template and actor.chat_template_kwargs: another template, and defaults of its settings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from RL2.config.load import load
from RL2.data.prompts import load_prompts
from RL2.data.template import change_template
from RL2.errors import ConfigError
from RL2.models.policy import configured_tokenizer

THINKING = """\

{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %} (no)
{% elif style %} ({{ style }}{{ '!' if style is mapping }})
{% endif %}{% endif %}"""
ROWS = [
    {"messages": [{"role": "user", "content": "q"}]},
    {"messages": [{"role": "user", "content": "q"}], "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [{"role": "user", "content": "q"}], "chat_template_kwargs": '{"enable_thinking": false}'},
]


def prompts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    (file := folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return [prompt.text for prompt in load_prompts(str(file), tokenizer, None, 100)]


@pytest.mark.parametrize(
    ("arguments", "endings"),
    [
        ({}, ["", "", " (no)\n"]),
        ({"enable_thinking": False}, [" (no)\n", "", " (no)\n"]),
        ({"enable_thinking": True}, ["", "", " (no)\n"]),
        ({"style": 'it\'s "so"\n'}, [' (it\'s "so"\n)\n', ' (it\'s "so"\n)\n', " (no)\n"]),
        ({"style": {"a": [1, None, 2.5]}}, [" ({'a': [1, None, 2.5]}!)\n"] * 2 + [" (no)\n"]),
    ],
)
def test_settings_are_defaults_that_rows_and_exports_build_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], endings: list[str]
) -> None:
    (file := tmp_path / "template.jinja").write_text(THINKING)
    own = copy.deepcopy(tokenizer)
    change_template(own, str(file), arguments, "actor")
    expected = [f"\nuser: q\nassistant:{ending}" for ending in endings]
    assert prompts(tmp_path, own) == expected
    own.save_pretrained(tmp_path / "export")
    assert prompts(tmp_path, AutoTokenizer.from_pretrained(tmp_path / "export")) == expected


def test_what_has_no_effect_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    with pytest.raises(
        ConfigError, match=r"actor.chat_template_kwargs.enable_thinking has no effect: .* does not read"
    ):
        change_template(own, None, {"enable_thinking": False}, "actor")
    with pytest.raises(ConfigError, match=r"critic.chat_template=.*/no.jinja cannot be read: "):
        change_template(own, f"{tmp_path}/no.jinja", {}, "critic")
    own.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        change_template(own, None, {"style": "short"}, "actor")


@pytest.mark.parametrize(("program", "group"), [("sft", "actor"), ("dpo", "actor"), ("spo", "actor"), ("rm", "critic")])
def test_the_keys(program: str, group: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """From the command line to the tokenizer of every program."""
    (file := tmp_path / "template.jinja").write_text(THINKING)
    given = [f"{group}.chat_template={file}", f"{group}.chat_template_kwargs.enable_thinking=false"]
    data = (
        [f"{key}=1" for key in ("train_data.path", "train_data.prompts_per_rollout", "rollout.env_path")]
        + ["rollout.train_sampling_params.max_new_tokens=1", "actor.max_length_per_device=8"]
        if program == "spo"
        else ["data.path=1", "data.max_length=4", "data.batch_size=1", f"{group}.max_length_per_device=8"]
    )
    config = load(program, [*data, *given, f"{group}.model_name={tmp_path}", "trainer.experiment_name=x"])
    LlamaConfig().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = configured_tokenizer(getattr(config, group), group)
    assert prompts(tmp_path, loaded)[:2] == ["\nuser: q\nassistant: (no)\n", "\nuser: q\nassistant:"]
