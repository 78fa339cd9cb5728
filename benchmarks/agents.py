"""Cost of the endpoint for agents: the same conversations with an environment script, and through the endpoint.

    python benchmarks/agents.py [--steps 3] [--json FILE]

48 episodes of two responses of 200 tokens each, all at once, sampled by the embedded engine from a random Qwen3 of 3.3
million parameters, float32. Sides are processes that alternate in one run; figures are medians.

    environment   `run_episode` with a script that asks once more
    endpoint      the same conversations through the endpoint; one process with the client `openai` has all of them
    agents        `rollout.agent` with a function that uses the client `openai`: a process for each episode

The cost is the CPU time of the trainer's process beyond that of `environment`, as a share of the whole: HTTP, JSON,
rendering, parsing and recording. For `agents` it has the smaller batches, too, of requests that do not begin at once.
The clients' own CPU time is only in the seconds of a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rl_step import Case, write_model, write_task
from turns import Side, Turns, alternate, parser

EPISODES, TURNS, TOKENS = 48, 2, 200
SIDES = ("environment", "endpoint", "agents")
MORE = {"role": "user", "content": "Once more."}

AGENT = f"""\
import openai

client = openai.OpenAI()


def play(task):
    messages = task["messages"]
    for turn in range({TURNS}):
        answer = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        messages += [answer, {MORE}]
    return 1
"""


def messages_of(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the first messages of each episode."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [[{"role": "user", "content": rows[n % len(rows)]["prompt"]}] for n in range(EPISODES)]


class Trainer:
    """Engine, tokenizer and settings of the trainer's process."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoTokenizer

        from RL2.agents.session import Policy
        from RL2.data.template import Template
        from RL2.data.tool_calls import ResponseParser
        from RL2.engines.embedded.engine import EmbeddedEngine
        from RL2.models.policy import load_model
        from RL2.types import Sampling

        torch.set_num_threads(threads)
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.template = Template(self.tokenizer)
        self.engine = EmbeddedEngine(
            load_model(str(folder), torch.float32), decode=str, max_running_requests=256, memory_share=0.5
        )
        parser = ResponseParser(self.template)
        self.policy = Policy(self.engine, self.tokenizer, self.template, parser, None)
        self.sampling = Sampling(TOKENS, stop_token_ids=self.template.end_ids)

    async def environment(self) -> int:
        """Play all episodes with a script; return the number of sampled tokens."""
        from RL2.data.template import Chat
        from RL2.rollout.continuation import encode_text
        from RL2.rollout.environment import environment_of
        from RL2.rollout.episode import run_episode
        from RL2.types import Prompt

        async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
            number = extra_info["turn"] = extra_info.get("turn", 0) + 1
            last = number == TURNS
            return {
                "next_state": None if last else [MORE],
                "reward": 1.0,
                "score": 1.0,
                "done": last,
                "extra_info": extra_info,
            }

        texts = [self.template.ask(Chat(messages)) for messages in messages_of(self.folder)]
        environment = environment_of(step)
        played = await asyncio.gather(
            *(
                run_episode(
                    Prompt(number, text, encode_text(self.tokenizer, text), {}),
                    engine=self.engine,
                    environment=environment,
                    tokenizer=self.tokenizer,
                    template=self.template,
                    sampling=self.sampling,
                    max_turns=TURNS,
                    max_length=None,
                    group=number,
                    sample=0,
                    seed=0,
                )
                for number, text in enumerate(texts)
            )
        )
        environment.close()
        return sum(sum(sequence.action_mask) for each in played for sequence in each.sequences)

    async def endpoint(self, turns: Turns) -> int:
        """Answer one process that has all conversations; count from when it is ready to begin."""
        from RL2.agents.endpoint import Endpoint
        from RL2.agents.session import Session

        endpoint = Endpoint()
        await endpoint.start()
        sessions = [Session(self.policy, self.sampling, number) for number in range(EPISODES)]
        for number, session in enumerate(sessions):
            endpoint.sessions[f"key-{number}"] = lambda session=session: session  # type: ignore[misc]
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *("--side", "client", "--folder", str(self.folder), "--url", endpoint.url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        await client.stdout.readline()
        turns.restart()
        client.stdin.write(b"go\n")
        if await client.wait():
            sys.exit("the client has failed")
        await endpoint.close()
        sequences = [sequence for session in sessions for sequence in session.record.sequences()]
        assert len(sequences) == EPISODES, "every conversation is continued"
        return sum(sum(sequence.action_mask) for sequence in sequences)

    async def agents(self) -> int:
        """Play all episodes with agents."""
        from RL2.agents.player import AgentPlayer
        from RL2.config.agent import agent_of
        from RL2.rollout.environment import without_script
        from RL2.types import Prompt

        (self.folder / "agent.py").write_text(AGENT)
        agent = agent_of("rollout.agent", f"{self.folder}/agent.py:play")
        player, environment = AgentPlayer(agent, self.policy, 600, EPISODES), without_script({})
        played = await asyncio.gather(
            *(
                player.play(
                    Prompt(number, "", [], {}, messages=messages),
                    environment=environment,
                    sampling=self.sampling,
                    max_turns=TURNS,
                    group=number,
                    sample=0,
                    seed=0,
                )
                for number, messages in enumerate(messages_of(self.folder))
            )
        )
        await player.close()
        assert all(each.unscored is None and len(each.sequences) == 1 for each in played)
        return sum(sum(sequence.action_mask) for each in played for sequence in each.sequences)


async def converse(folder: Path, url: str) -> None:
    """Play all conversations at once with the client of OpenAI."""
    import openai

    shared = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=3600)

    async def play(number: int, messages: list[Any]) -> None:
        client = shared.with_options(api_key=f"key-{number}")
        for _ in range(TURNS):
            got = await client.chat.completions.create(model="policy", messages=messages)
            messages = [*messages, got.choices[0].message, MORE]

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(play(*each) for each in enumerate(messages_of(folder))))


def run_side(options: argparse.Namespace) -> None:
    if options.side == "client":
        asyncio.run(converse(options.folder, options.url))
        return
    turns = Turns()
    trainer = Trainer(options.folder, options.threads)
    while turns.wait():
        side = getattr(trainer, options.side)
        tokens = asyncio.run(side(turns) if options.side == "endpoint" else side())
        assert tokens == EPISODES * TURNS * TOKENS, "a side did not sample what it was told to"
        turns.answer()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--url", help=argparse.SUPPRESS)
    options.set_defaults(steps=3, threads=1)
    arguments = options.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, Case("agents", 0.0, TOKENS), write_model)
        settings = ["--folder", name, "--threads", str(arguments.threads)]
        sides = [Side(__file__, side, settings, arguments.threads, folder / f"{side}.log") for side in SIDES]
        load = os.getloadavg()[0]
        steps = alternate(sides, arguments.steps)
    numbers = {"load_before": load, "load_after": os.getloadavg()[0]}
    print(f"{EPISODES} episodes of {TURNS} responses of {TOKENS} tokens; load {load:.1f}")
    cpu_s = {side: median(step["cpu_s"] for step in of) for side, of in steps.items()}
    for side, of in steps.items():
        step_s, share = median(step["step_s"] for step in of), 1 - cpu_s["environment"] / cpu_s[side]
        print(f"  {side:<12}{step_s:>8.2f} s {cpu_s[side]:>8.2f} s CPU {share:>8.1%}")
        numbers |= {f"{side}_step_s": step_s, f"{side}_cpu_s": cpu_s[side], f"{side}_share": share}
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
