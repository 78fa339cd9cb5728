"""SmolLM2-135M-Instruct, a pretrained model (`make test-real`): its template, its numbers, and runs of the programs."""

from __future__ import annotations

import json
import math
import os
from itertools import count
from pathlib import Path

import pytest
import torch
from programs import Run, World
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

from RL2.batch.packing import pack
from RL2.data.sft import load_examples, pieces
from RL2.models.policy import Policy
from RL2.tools.cli import app
from RL2.tools.reproduce.smollm2 import smollm2
from RL2.types import StatsRequest

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("VLLM_PYTHON", f"{ROOT}/.venv-vllm/bin/python")
STEPS = 5
COMMON = ("actor.lr=1e-5", f"trainer.max_steps={STEPS}", "actor.max_length_per_device=256")
SAMPLING = ("train_data.prompts_per_rollout=2", "rollout.train_sampling_params.max_new_tokens=12")
RUNS = {
    "sft": ("data.batch_size=4",),
    "dpo": ("data.batch_size=2",),
    "ppo": SAMPLING,
    "spo": (*SAMPLING, "actor.average_over=kept"),
    "ppo with LoRA": (*SAMPLING, "actor.lora.rank=8", "actor.lora.target_modules=[all-linear]"),
}
ENVIRONMENT = """
import re

async def step(state, action, extra_info):
    numbers = re.findall(r"\\d+", action)
    right = float(bool(numbers) and int(numbers[-1]) == extra_info["sum"])
    return dict(next_state=None, reward=right, score=right, done=True, extra_info=extra_info)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The model, and sums within its reach."""
    root = tmp_path_factory.mktemp("real")
    (root / "model").symlink_to(smollm2())
    rows: dict[str, list[object]] = {"sft": [], "rl": [], "pairs": []}
    for a, b in [(a, b) for a in range(2, 6) for b in range(3, 9)]:
        question = {"role": "user", "content": f"What is {a} + {b}?"}
        right, wrong = ({"role": "assistant", "content": f"{a} + {b} = {a + b + c}"} for c in (0, 1))
        rows["sft"].append({"messages": [question, right]})
        rows["rl"].append({"messages": [question], "extra_info": {"sum": a + b}})
        rows["pairs"].append({"prompt": [question], "chosen": [right], "rejected": [wrong]})
    for name, of_file in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    (root / "sums.py").write_text(ENVIRONMENT)
    return World(root, count())


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(world.model)
    return loaded


@pytest.fixture(scope="module")
def policy(world: World) -> Policy:
    return Policy.load(str(world.model))


def start(world: World, name: str, *overrides: str) -> Run:
    program = name.split()[0]
    environment = () if program in ("sft", "dpo") else (f"rollout.env_path={world.root}/sums.py",)
    return world.run(program, *COMMON, *environment, *RUNS[name], *overrides).succeeded()


def test_an_answer_and_its_end_train(world: World, tokenizer: PreTrainedTokenizerBase) -> None:
    examples, _ = load_examples(str(world.root / "sft.jsonl"), tokenizer, None, 128)
    sequence = examples[0].sequences[0]
    asked, answer = pieces(tokenizer, sequence.token_ids.tolist(), sequence.action_mask.tolist())
    assert asked[0].endswith("<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n")
    assert asked[0].count("<|im_start|>system") == 1
    assert answer == ("2 + 3 = 5<|im_end|>", True)
    assert not asked[1]


def test_packed_sequences_are_as_each_alone(world: World, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
    """In log-probabilities, and in the gradients of the first and the last layer."""
    examples, _ = load_examples(str(world.root / "sft.jsonl"), tokenizer, None, 128)
    batch = pack(examples[:3], 0)
    watched = [policy.lm.model.embed_tokens.weight, policy.lm.model.layers[-1].mlp.down_proj.weight]
    logp_A = policy(batch, batch.shared(), StatsRequest(("logp",)))["logp"]
    packed = torch.autograd.grad(logp_A.sum(), watched)
    reference = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    alone, total = [], torch.zeros(())
    for example in examples[:3]:
        ids = torch.tensor(example.sequences[0].token_ids)
        is_action = torch.tensor(example.sequences[0].action_mask)[1:]
        logits_TV = reference(ids[None]).logits[0, :-1]
        logp_T = logits_TV.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        alone.append(logp_T[is_action])
        total = total + alone[-1].sum()
    torch.testing.assert_close(logp_A, torch.cat(alone), rtol=0, atol=1e-4)
    total.backward()
    for mine, weight in zip(
        packed, [reference.model.embed_tokens.weight, reference.model.layers[-1].mlp.down_proj.weight], strict=True
    ):
        assert weight.grad is not None
        assert (mine - weight.grad).norm() <= 1e-3 * weight.grad.norm()


@pytest.mark.parametrize("name", RUNS)
def test_five_steps(name: str, world: World) -> None:
    run = start(world, name)
    steps = run.metrics
    assert [row["step"] for row in steps][:STEPS] == list(range(STEPS))
    losses = [row["actor/loss"] for row in steps if "actor/loss" in row]
    assert losses and all(map(math.isfinite, losses))
    if name == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    if name in ("sft", "dpo"):
        assert losses[-1] < losses[0]
    else:
        assert max(row["actor/logp_gap"] for row in steps if "actor/logp_gap" in row) < 1e-4
    if name == "sft":
        assert says(run.save_dir / "latest") == "2 + 3 = 5"


def says(folder: Path) -> str:
    """Return the greedy answer of an export, from transformers alone."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = lm.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True))


def test_it_does_sums(world: World, tmp_path: Path) -> None:
    """`rl2 eval` of the model as it comes: more than every third sum of one digit is right."""
    settings = (f"model={world.model}", f"data={world.root}/rl.jsonl", f"env={world.root}/sums.py", "max_new_tokens=24")
    done = CliRunner().invoke(app, ["eval", *settings, "samples=0", f"out={tmp_path}/eval"])
    assert done.exit_code == 0, done.output
    (summary,) = (tmp_path / "eval").glob("*/summary.json")
    assert json.loads(summary.read_text())["greedy"]["value"] > 1 / 3


@pytest.mark.vllm
def test_a_server_and_the_trainer_stay_together(world: World) -> None:
    served = ("rollout.engine=vllm", f"rollout.vllm.python={PYTHON}", "rollout.max_running_requests=4")
    run = start(world, "spo", *served, "trainer.max_steps=2")
    assert max(row["engine/probe_gap"] for row in run.metrics) < 1e-3
    assert max(row["actor/logp_gap"] for row in run.metrics if "actor/logp_gap" in row) < 1e-3
