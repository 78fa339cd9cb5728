"""Train the agents of examples/agents, which use public frameworks, on a tiny model: does the score rise?

    python benchmarks/frameworks.py EXAMPLE [--steps 20] [--python PYTHON] [--out FOLDER] [--json FILE]

EXAMPLE is the name of a file in examples/agents. It runs as a function, for which this interpreter must have its
framework, or with --python as a command of an interpreter that has it. The task: one of four kinds of weather in one of
four cities, drawn for each row. A model that calls the tool can know it; one that guesses is right once in four times.

A teacher plays 128 episodes through the endpoint with the agent itself: it calls the tool in 4 of 10 episodes and
guesses in the others. A new model of 245,000 parameters imitates these responses (`sft`) and then learns from the
reward (`ppo`, 8 prompts with 4 samples a step). The mean reward and the calls of each step are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from RL2.agents.player import AgentPlayer
from RL2.agents.session import Policy
from RL2.config.agent import agent_of
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.continuation import decode
from RL2.rollout.environment import without_script
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import write_rows
from RL2.types import Prompt, Sampling

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "agents"
CITIES, WEATHER = ("Rome", "Oslo", "Lima", "Cairo"), ("rain", "sun", "snow", "fog")
EPISODES, ROWS, CALLS = 128, 512, 0.4
MAX_NEW_TOKENS, MAX_LENGTH = 64, 1024

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Tools:
{%- for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}){% endfor %}
<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response>
{%- else %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Chat template with tools, with calls in the format of Qwen and short descriptions of tools."""

SAMPLE = """Answer with one word, by final_answer. Tools: weather(city) final_answer(answer) user system assistant tool
<tool_response>\n</tool_response> How is the weather in {city}? New task:\n Calling tools:\n Observation:\n {weather}
[{{'id': 'call', 'type': 'function', 'function': {{'name': 'weather', 'arguments': {{'city': '{city}'}}}}}}]
"""
"""Text of the conversations, for the tokenizer."""


def call(name: str, **arguments: str) -> str:
    """Return a call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows with a city and the weather of all cities, drawn from `seed`."""
    random, rows = Random(seed), []
    for _ in range(count):
        weather = {city: random.choice(WEATHER) for city in CITIES}
        city = random.choice(CITIES)
        messages = [{"role": "user", "content": f"How is the weather in {city}?"}]
        rows.append({"messages": messages, "extra_info": {"weather": weather, "answer": weather[city]}})
    return rows


def write_model(folder: Path) -> None:
    """Write an untrained model whose tokenizer has the words of the conversations and a template with tools."""
    texts = [SAMPLE.format(city=city, weather=weather) for city in CITIES for weather in WEATHER]
    texts += [call("weather", city=city) for city in CITIES] + [call("final_answer", answer=word) for word in WEATHER]
    build_model(folder, texts * 20, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def teach(tokenizer: PreTrainedTokenizerBase, agent: str) -> list[dict[str, str]]:
    """Let the teacher play episodes with the agent; return its responses with what it read."""
    pairs: list[dict[str, str]] = []
    template = Template(tokenizer)

    def say(token_ids: list[int], sampling: Sampling) -> list[int]:
        asked, random = decode(tokenizer, token_ids), Random(sampling.seed)
        seen = re.findall("|".join(WEATHER), asked)
        word = seen[-1] if seen else random.choice(WEATHER)
        text = call("final_answer", answer=word) if "final_answer" in asked else word
        if not seen and random.random() < CALLS:
            text = call("weather", city=re.findall(r"weather in (\w+)", asked)[-1])
        pairs.append({"prompt": asked, "response": text})
        return [*tokenizer.encode(text), *template.end_ids]

    async def play() -> list[str | None]:
        policy = Policy(ScriptedEngine(say), tokenizer, template, ResponseParser(template), None)
        player, environment = AgentPlayer(agent_of("rollout.agent", agent), policy, 600, 4), without_script({})
        sampling = Sampling(MAX_LENGTH, stop_token_ids=template.end_ids)
        try:
            played = await asyncio.gather(
                *(
                    player.play(
                        Prompt(number, "", [], row["extra_info"], messages=row["messages"]),
                        environment=environment,
                        sampling=sampling,
                        max_turns=8,
                        group=number,
                        sample=0,
                        seed=0,
                    )
                    for number, row in enumerate(make_rows(EPISODES, 1))
                )
            )
        finally:
            await player.close()
        return [each.unscored for each in played]

    if failed := [cause for cause in asyncio.run(play()) if cause]:
        sys.exit(f"{len(failed)} of the teacher's episodes are unscored: {failed[0]}")
    return pairs


def train(program: str, out: Path, *settings: str) -> Path:
    """Run a program of RL2 until it ends; return its folder."""
    folder = out / program
    common = [f"trainer.save_dir={folder}", f"trainer.experiment_name={program}", "actor.warmup_ratio=0"]
    command = [sys.executable, "-m", f"RL2.trainer.{program}", *settings, *common]
    print(" ".join(command[3:]), flush=True)
    with (out / f"{program}.log").open("w") as log:
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            sys.exit((out / f"{program}.log").read_text()[-3000:])
    return folder


def run(example: str, steps: int, python: str | None, out: Path) -> list[dict[str, float]]:
    """Train a model through an example, first on what the teacher says; return reward, calls and time of each step."""
    file = EXAMPLES / f"{example}.py"
    agent = f"{python} {file}" if python else f"{file}:play"
    write_model(out / "model")
    started = time.monotonic()
    write_rows(out / "taught.jsonl", teach(AutoTokenizer.from_pretrained(out / "model"), agent))
    print(f"{EPISODES} episodes of the teacher: {time.monotonic() - started:.0f} s", flush=True)
    write_rows(out / "rows.jsonl", make_rows(ROWS, 2))
    warm = train(
        "sft",
        out,
        f"data.path={out}/taught.jsonl",
        f"data.max_length={MAX_LENGTH}",
        "data.batch_size=32",
        f"actor.model_name={out}/model",
        "actor.max_length_per_device=8192",
        "actor.lr=3e-3",
        "actor.scheduler=linear",
        "trainer.n_epochs=1000",
        "trainer.max_steps=200",
    )
    trained = train(
        "ppo",
        out,
        f"train_data.path={out}/rows.jsonl",
        "train_data.prompts_per_rollout=8",
        "train_data.responses_per_prompt=4",
        f"rollout.agent={agent}",
        "rollout.env_path=null",
        "rollout.max_turns=8",
        "rollout.max_running_agents=4",
        f"rollout.train_sampling_params.max_new_tokens={MAX_NEW_TOKENS}",
        f"actor.model_name={warm}/latest",
        "actor.max_length_per_device=8192",
        "actor.lr=2e-4",
        f"trainer.max_steps={steps}",
    )
    names = {"reward": "train/reward", "calls": "train/env/calls", "unscored": "train/unscored", "s": "time/step_s"}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    return [{short: row.get(name, float("nan")) for short, name in names.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=sorted(file.stem for file in EXAMPLES.glob("*.py")))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--python", help="interpreter that has the framework")
    parser.add_argument("--out", type=Path, help="folder of the runs; a temporary one by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        steps = run(arguments.example, arguments.steps, arguments.python, out.resolve())
    print("step " + " ".join(f"{name:>9}" for name in steps[0]))
    for number, step in enumerate(steps, 1):
        print(f"{number:4} " + " ".join(f"{value:9.2f}" for value in step.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main()
