"""Two steps of training on research, with the real search service and `rl2 serve` as summariser and judge.

One tiny model is taught what each of them says: two calls and an answer, a summary, and a verdict.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from programs import make_world, write_rows
from search_service import searching
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.data.template import Chat, Template
from RL2.data.tool_calls import ToolCall
from RL2.rollout.environment import load_environment
from RL2.tools.reproduce.model import build_model

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "envs" / "deep_research.py"
TEMPLATE = """\
{% if tools %}<|im_start|>system
{{ tools | map(attribute="function") | map(attribute="name") | join(" ") }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QUESTION, ANSWER = "When is high tide in Pell?", "At 06:12.\n#### 06:12"
PAGES = [{"id": "7", "contents": "Tides of Pell\nHigh tide is at 06:12."}]
CALLS = [ToolCall("search", {"query": ["tide"]}), ToolCall("visit", {"url": ["7"], "goal": "high tide"})]
SUMMARY, VERDICT = "High tide is at 06:12.", '{"correct": "yes"}'
KNOWN, STEPS = 0.01, 200
"""Loss at which the model knows what to say, and a limit of the steps."""


def written(call: ToolCall) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def teach(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """Teach the model in a folder its response to each prompt."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    sequences = []
    for prompt, said in pairs:
        read, sampled = tokenizer.encode(prompt), [*tokenizer.encode(said), tokenizer.eos_token_id]
        sequences.append((torch.tensor([read + sampled]), torch.tensor([[-100] * len(read) + sampled])))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for _ in range(STEPS):
        losses = [lm(input_ids=token_ids, labels=labels).loss for token_ids, labels in sequences]
        if max(loss.item() for loss in losses) < KNOWN:
            break
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(folder)


@contextmanager
def served(model: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The address and the key of `rl2 serve`."""
    out = folder / "serve.log"
    program = warm.Program("RL2.tools.cli", ["serve", str(model), "--port", "0"], out, folder / "serve.err")
    try:
        while program.poll() is None:
            time.sleep(0.05)
            if found := re.search(
                r"OPENAI_BASE_URL=(\S+) OPENAI_API_KEY=(\S+)\n", out.read_text() if out.exists() else ""
            ):
                yield found[1], found[2]
                return
        raise AssertionError((folder / "serve.err").read_text())
    finally:
        program.kill()
        program.wait()


def test_a_policy_that_searches_and_visits_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    with searching(tmp_path, PAGES) as url:
        monkeypatch.setenv("SEARCH_URL", url)
        for name in ("JUDGE_URL", "SUMMARY_URL"):
            monkeypatch.delenv(name, raising=False)
        environment = load_environment(SCRIPT, 60)
        row = environment.example({"question": QUESTION, "answer": "06:12"}) if environment.example else None
        assert row is not None
        found = asyncio.run(environment.step("", "", row["extra_info"], None, CALLS[:1])).next_state
        environment.close()
        assert isinstance(found, list)
        visited = [{**found[0], "name": "visit", "content": f"7:\n{SUMMARY}"}]
        asked = [{"role": "assistant", "content": "", "tool_calls": [written(call)]} for call in CALLS]
        talk = [*row["messages"], asked[0], *found, asked[1], *visited, {"role": "assistant", "content": ANSWER}]

        from envs.deep_research import GRADE  # loaded with SEARCH_URL
        from envs.deep_research import SUMMARY as FORM
        from envs.questions import SYSTEM, nonce_of

        build_model(world.model, [*(str(message) for message in talk * 40), GRADE, FORM, SYSTEM * 20], seed=0)
        tokenizer = AutoTokenizer.from_pretrained(world.model)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(world.model)
        template = Template(tokenizer)
        tools = {"tools": row["tools"]}
        pairs = []
        for at in (2, 4, 6):
            prompt = template.render(Chat(talk[:at], tools), add_generation_prompt=True)
            whole = template.render(Chat(talk[: at + 1], tools))
            pairs.append((prompt, whole[len(prompt) :].removesuffix("<|im_end|>\n")))
        read = {"page": PAGES[0]["contents"], "goal": "high tide"}
        judged = {"question": QUESTION, "answer": "06:12", "response": ANSWER}
        for form, texts, task, said in (
            (FORM, read, "You read pages for others.", SUMMARY),
            (GRADE, judged, "You decide whether an answer is right.", VERDICT),
        ):
            nonce = nonce_of([form, texts, {}])
            messages = [
                {"role": "system", "content": SYSTEM.format(task=task, nonce=nonce)},
                {"role": "user", "content": form.format(nonce=nonce, **texts)},
            ]
            pairs.append((template.render(Chat(messages, {}), add_generation_prompt=True), said))
        teach(world.model, pairs)
        write_rows(tmp_path / "questions.jsonl", [{"question": QUESTION, "answer": "06:12"}] * 4)
        with served(world.model, tmp_path) as (address, key):
            for name, value in {"URL": address, "MODEL": "tiny", "KEY": "TINY_KEY", "MAX_TOKENS": "32"}.items():
                monkeypatch.setenv(f"JUDGE_{name}", value)
            monkeypatch.setenv("TINY_KEY", key)
            run = world.run(
                "ppo",
                f"train_data.path={tmp_path}/questions.jsonl",
                "train_data.prompts_per_rollout=2",
                "train_data.responses_per_prompt=2",
                f"rollout.env_path={SCRIPT}",
                "rollout.max_turns=4",
                "rollout.train_sampling_params.max_new_tokens=48",
                "rollout.train_sampling_params.temperature=0.3",
                "actor.max_length_per_device=4096",
                "trainer.max_steps=2",
            ).succeeded()
    assert len(run.metrics) == 2
    right = [sample for sample in run.samples if sample["score"] == 1]
    assert right, run.samples
    for sample in right:
        text = str(sample)
        assert f"7:\\n{SUMMARY}" in text and '"search"' in text and "#### 06:12" in text
    for metrics in run.metrics:
        assert metrics["train/env/tool_calls"] == 1 and metrics["actor/logp_gap_max"] < 1e-3
