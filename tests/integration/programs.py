"""How the tests start the library's programs as a user does, and look at what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import psutil
import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems

LIMIT_S = 600
"""No run may take longer, on a machine with much else to do either; one that does hangs."""

NUM_ROWS = 24
"""Rows of each data file."""

ENVIRONMENT = """
async def step(state, action, extra_info):
    reward = float({rule})
    next_state = state + action + "\\nOnce more:"
    return dict(next_state=next_state, reward=reward, score=reward, done=reward > 0, extra_info=extra_info)
"""


@dataclass(frozen=True)
class Run:
    """A program at work, or done."""

    process: subprocess.Popen[bytes] | warm.Program | warm.Ranks
    settings: list[str]
    save_dir: Path
    log: Path

    def wait(self) -> Run:
        """Until it ends; a hanging one is ended and fails the test."""
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun then ends its processes, which have sessions of their own
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(40)  # it gives them 30 s
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {LIMIT_S} s:\n{self.output}\n{self.errors}") from None
        return self

    def kill(self) -> None:
        """SIGKILL; of a run on one process."""
        self.process.kill()
        self.process.wait()

    def succeeded(self) -> Run:
        assert self.process.returncode == 0, self.errors
        return self

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text(encoding="utf-8")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return rows(self.save_dir / "metrics.jsonl")

    @property
    def samples(self) -> list[dict[str, Any]]:
        return rows(self.save_dir / "samples.jsonl")

    @property
    def weights(self) -> Path:
        return self.save_dir / "latest" / "model.safetensors"


@dataclass(frozen=True)
class World:
    """A folder with a random model and a few rows; runs go into it too."""

    root: Path
    numbers: count[int]

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    def start(
        self,
        program: str,
        *overrides: str,
        nproc: int = 1,
        save_dir: Path | None = None,
        max_restarts: int = 0,
        preexec: Callable[[], None] | None = None,
        cold: bool = False,
    ) -> Run:
        """`save_dir`: a new folder if None. `preexec` is called in the new process before the program.

        `cold`: begin with a new interpreter, which has hashes of its own; under torchrun if there are several.
        """
        name = f"{next(self.numbers):02d}_{program}"
        save_dir, log = save_dir or self.root / name, self.root / f"{name}.log"
        settings = [*self.settings(program), f"trainer.save_dir={save_dir}", *overrides]
        if not max_restarts and preexec is None and not cold:
            what = f"RL2.trainer.{program}", settings, log, log.with_suffix(".err")
            return Run(warm.Program(*what) if nproc == 1 else warm.Ranks(nproc, *what), settings, save_dir, log)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
        launcher += [f"--max-restarts={max_restarts}"] if max_restarts else []
        environment = os.environ | warm.ENVIRONMENT
        with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", f"RL2.trainer.{program}", *settings],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                preexec_fn=preexec,
            )
        return Run(process, settings, save_dir, log)

    def run(self, program: str, *overrides: str, **how: Any) -> Run:
        return self.start(program, *overrides, **how).wait()

    def settings(self, program: str) -> list[str]:
        """What a short run of `program` needs."""
        if program == "rm":
            return [override.replace("actor.", "critic.") for override in self.pairs]
        return {"sft": self.sft, "dpo": self.pairs}.get(program, self.rl)

    @property
    def pairs(self) -> list[str]:
        return [f"data.path={self.root}/pairs.jsonl", "data.max_length=128", "data.batch_size=8", *self._common]

    @property
    def sft(self) -> list[str]:
        return [f"data.path={self.root}/sft.jsonl", "data.max_length=128", "data.batch_size=8", *self._common]

    @property
    def rl(self) -> list[str]:
        return [
            f"train_data.path={self.root}/rl.jsonl",
            "train_data.prompts_per_rollout=4",
            "train_data.responses_per_prompt=4",
            "rollout.train_sampling_params.max_new_tokens=12",
            self.reward("any(character.isdigit() for character in action)"),
            *self._common,
        ]

    @property
    def _common(self) -> list[str]:
        return [
            f"actor.model_name={self.model}",
            "actor.max_length_per_device=256",
            "actor.lr=1e-3",
            "actor.warmup_ratio=0",
            "trainer.experiment_name=test",
            "trainer.max_steps=3",
        ]

    def reward(self, rule: str) -> str:
        """The override for an environment that pays 1 where `rule` holds and then ends the episode."""
        script = self.root / f"environment_{crc32(rule.encode()):08x}.py"
        script.write_text(ENVIRONMENT.format(rule=rule))
        return f"rollout.env_path={script}"


def make_world(root: Path, num_rows: int = NUM_ROWS) -> World:
    """Fill the folder `root` with a random model and a few rows of each kind of data."""
    rng = Random(0)
    pairs = [(p.question, Demonstrator().solve(p, rng)) for p in draw_problems(rng, num_rows, held_out=False)]
    build_model(root / "model", [text for pair in pairs for text in pair], seed=0)
    write_rows(root / "sft.jsonl", [{"prompt": question, "response": solution} for question, solution in pairs])
    prompts = [{"prompt": question, "extra_info": {"row": i}} for i, (question, _) in enumerate(pairs)]
    write_rows(root / "rl.jsonl", prompts)
    # separable: what was rejected is written backwards
    write_rows(
        root / "pairs.jsonl",
        [{"prompt": p, "chosen": text, "rejected": " ".join(text.split()[::-1])} for p, text in pairs],
    )
    return World(root, count())


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def taught_to_answer(world: World, folder: Path) -> Run:
    """Return six steps of `sft` on a base model: its eos ends texts, its chat template ends turns with another token.

    `folder` gets the base model and the row, `Name a colour.` and `Green.`
    """
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.eos_token = "<|endoftext|>"
    lm = AutoModelForCausalLM.from_pretrained(world.model)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    asked = {"role": "user", "content": "Name a colour."}
    row = {"messages": [asked, {"role": "assistant", "content": "Green."}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "asked.jsonl").write_text(json.dumps({"messages": [asked]}) + "\n")
    settings = (f"data.path={folder}/rows.jsonl", "data.batch_size=1", "trainer.max_steps=6", "trainer.n_epochs=6")
    return world.run("sft", f"actor.model_name={folder}/base", "actor.lr=1e-2", "actor.scheduler=constant", *settings)


def answered(world: World, learnt: Run, folder: Path, *settings: str) -> list[dict[str, Any]]:
    """Return the greedy answers of what `learnt` left to what `folder` asks, from the engine of `settings`."""
    asked = (f"train_data.path={folder}/asked.jsonl", f"test_data.path={folder}/asked.jsonl", "trainer.eval_only=true")
    greedy = ("rollout.test_sampling_params.temperature=0", "rollout.test_sampling_params.max_new_tokens=40")
    model = f"actor.model_name={learnt.save_dir}/latest"
    return world.run("ppo", model, *asked, *greedy, *settings).succeeded().samples


def ranks_of(launcher: int) -> list[psutil.Process]:
    """Return the processes of a run that a torchrun with this process id has started; none if it is gone."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if any(word.startswith("RL2.trainer.") for word in _command(child)[:4])]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended since, or nobody has asked for its exit status yet
        return []


def rows(file: Path) -> list[dict[str, Any]]:
    """A .jsonl file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in metrics]


def wait_for_line(file: Path, run: Run) -> str:
    """The first whole line of a file that `run` is going to write."""
    while run.process.poll() is None:
        if file.exists() and "\n" in (text := file.read_text(encoding="utf-8")):
            return text.partition("\n")[0]
        time.sleep(0.01)
    raise AssertionError(f"it ended without writing {file.name}:\n{run.errors}")
