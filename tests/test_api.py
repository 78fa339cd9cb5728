"""The Python API: what the programs do, from Python, on one process."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from RL2 import api
from RL2.config.load import load
from RL2.errors import UserError
from RL2.objectives.policy_gradient import reinforce
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems
from RL2.types import Sequence
from RL2.workers.actor import Actor

QUESTION = [{"role": "user", "content": "Tom has 12 apples. He buys 7 more. How many apples are there now?"}]
TEXTS = ["12+7=19\n#### 19", "Tom has 12 apples.", "A friend takes 5. Count the apples now."]

OBJECTIVE = """
from RL2.api import needs

@needs("logp")
def mine(stats, batch, *, scale: float = 1.0):
    return -scale * batch.advantage_T * stats.logp, {}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("model"), Random(0)
    texts = [Demonstrator().solve(problem, rng) for problem in draw_problems(rng, 20, held_out=False)]
    build_model(folder, texts, seed=0)
    return folder


@pytest.fixture
def loaded(folder: Path) -> tuple[api.Policy, PreTrainedTokenizerBase]:
    return api.load(folder, device="cpu")


async def long_answer(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    reward = float(len(action) > extra_info["at_least"])
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def rollout(loaded: tuple[api.Policy, PreTrainedTokenizerBase], **options: Any) -> api.TokenBatch:
    """Return a batch of 3 groups of 4 responses with some rewards, advantages and weights."""
    rows = [{"messages": QUESTION, "extra_info": {"at_least": size}} for size in (8, 10, 12)]
    trajectories = api.sample(*loaded, rows, num_samples=4, max_new_tokens=12, environment=long_answer)
    assert 0 < sum(trajectory.reward for trajectory in trajectories) < 12
    batch = api.pack(trajectories)
    return batch.with_(advantage_T=api.advantages(batch), weight_T=api.loss_weights(batch, **options))


@pytest.mark.parametrize(
    ("program", "knobs", "weighed"),
    [("ppo", {"clip": 0.1}, {}), ("spo", {}, {"train_on": "correct", "average_over": "kept"})],
)
def test_an_update_is_that_of_the_programs(
    program: str,
    knobs: dict[str, Any],
    weighed: dict[str, Any],
    folder: Path,
    loaded: tuple[api.Policy, PreTrainedTokenizerBase],
    processes: Processes,
) -> None:
    batch, (policy, _) = rollout(loaded, **weighed), loaded
    longest = int(batch.lengths_B.max())
    settings = [f"actor.{name}={value}" for name, value in (knobs | weighed).items()]
    config: Any = load(
        program,
        [
            *(f"actor.model_name={folder}", f"actor.max_length_per_device={2 * longest}", "train_data.path=x"),
            *("train_data.prompts_per_rollout=3", "rollout.env_path=x", f"trainer.save_dir={folder}"),
            *("rollout.train_sampling_params.max_new_tokens=12", "trainer.experiment_name=x", "actor.lr=1e-3"),
            *("actor.tis_coef=0", *settings),
        ],
    )
    actor = Actor(config.actor, processes, 9, folder)
    theirs = actor.update(batch)

    optimizer = api.adamw(policy.parameters(), lr=1e-3)
    ours = api.forward_backward(policy, batch, program, max_tokens=2 * longest, **knobs)
    grad_norm = api.optimizer_step(policy, optimizer)
    assert theirs["actor/changed_share"] > 0.9
    assert grad_norm == theirs["actor/grad_norm"]
    assert ours == {name: theirs[f"actor/{name}"] for name in ours}
    assert {"loss", "tokens", "entropy", "logp_gap"} <= ours.keys()
    for mine, trained in zip(policy.parameters(), actor.policy.parameters(), strict=True):
        assert torch.equal(mine, trained)


def test_statistics_of_texts_are_those_of_transformers_in_float64(
    folder: Path, loaded: tuple[api.Policy, PreTrainedTokenizerBase]
) -> None:
    policy, tokenizer = loaded
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    fields = ("logp", "max_logp", "entropy", "rank", "top_id")
    for text, table in zip(
        TEXTS, api.stats_of_texts(policy, tokenizer, TEXTS, fields, top_k=3, temperature=0.7), strict=True
    ):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logp_TV = (lm(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        logp_T = logp_TV.gather(1, ids[0, 1:, None])[:, 0]
        expected = {
            "logp": logp_T,
            "max_logp": logp_TV.amax(-1),
            "entropy": -(logp_TV.exp() * logp_TV).sum(-1),
            "rank": (logp_TV > logp_T[:, None]).sum(-1) + 1,
            "top_id": logp_TV.topk(3).indices,
        }
        assert table["token"] == [tokenizer.decode([token]) for token in ids[0, 1:].tolist()]
        for name, value in expected.items():
            found = torch.tensor(table[name], dtype=torch.float64)
            torch.testing.assert_close(found, value.double(), rtol=0, atol=1e-5)


def test_a_policy_survives_a_folder(loaded: tuple[api.Policy, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    policy, tokenizer = loaded
    api.save(policy, tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, ours), theirs in zip(policy.lm.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert api.load(tmp_path / "saved")[1].encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_prompts_may_be_texts_chats_and_rows(
    loaded: tuple[api.Policy, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    script = tmp_path / "env.py"
    script.write_text(
        "async def step(state, action, extra_info):\n"
        "    reward = extra_info['pays']\n"
        "    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)\n\n\n"
        "def example(row):\n"
        "    return dict(messages=[dict(role='user', content=row['question'])], extra_info=dict(pays=row['pays']))\n"
    )
    raw = api.sample(*loaded, [TEXTS[0], QUESTION], num_samples=2, max_new_tokens=4)
    assert [(t.row, t.group, t.sample, t.reward) for t in raw] == [(r, r, s, 0.0) for r in (0, 1) for s in (0, 1)]
    assert {t.unscored for t in raw} == {"no environment judged it"}
    assert raw[0].texts[0] == TEXTS[0]
    assert raw[2].texts[0].startswith("<|im_start|>user\nTom")

    rows = [{"question": QUESTION[0]["content"], "pays": 0.5}]
    (judged,) = api.sample(*loaded, rows, num_samples=1, max_new_tokens=4, environment=script)
    assert (judged.reward, judged.unscored) == (0.5, None)
    assert judged.texts[0] == raw[2].texts[0]


def test_a_judge_that_fails_gives_no_reward_and_its_line(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    async def fails(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        return {"reward": 1 / len(extra_info)}

    (judged,) = api.sample(*loaded, [QUESTION], num_samples=1, max_new_tokens=2, environment=fails)
    assert judged.unscored is not None
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(.*test_api.py:\d+\)", judged.unscored)


def test_a_seed_decides_also_in_a_notebook(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    def answers(seed: int) -> list[Sequence]:
        sampled = api.sample(*loaded, [QUESTION], num_samples=3, max_new_tokens=6, seed=seed)
        return [sequence for trajectory in sampled for sequence in trajectory.sequences]

    async def cell() -> list[Sequence]:
        return answers(0)

    assert answers(0) == asyncio.run(cell()) != answers(1)


def test_an_interrupt_ends_the_sampling_of_a_notebook(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    async def interrupts(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return await asyncio.sleep(600, {})

    async def cell() -> None:
        api.sample(*loaded, [QUESTION], num_samples=2, max_new_tokens=2, environment=interrupts)

    loop = asyncio.new_event_loop()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    loop.close()


def test_an_objective_is_a_function_its_file_or_a_name(
    loaded: tuple[api.Policy, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OBJECTIVE)
    batch, (policy, _) = rollout(loaded), loaded
    namespace: dict[str, Any] = {"__name__": "cell"}
    exec(OBJECTIVE, namespace)

    def gradients(objective: Any, **knobs: Any) -> list[torch.Tensor]:
        policy.zero_grad()
        api.forward_backward(policy, batch, objective, **knobs)
        return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]

    expected = gradients("reinforce")
    assert max(float(gradient.abs().max()) for gradient in expected) > 0
    for objective in (reinforce, namespace["mine"], f"{file}:mine"):
        assert all(map(torch.equal, gradients(objective), expected))
    for doubled, single in zip(gradients(namespace["mine"], scale=2.0), expected, strict=True):
        torch.testing.assert_close(doubled, 2 * single)


def test_gradients_add_up_until_a_step(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    batch, (policy, _) = rollout(loaded), loaded
    optimizer = api.adamw(policy.parameters())
    api.forward_backward(policy, batch, "ppo")
    once = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    api.forward_backward(policy, batch, "ppo", max_tokens=int(batch.lengths_B.max()))
    for parameter, gradient in zip(policy.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-6)
    api.optimizer_step(policy, optimizer)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_gap_tells_of_another_temperature(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    policy, tokenizer = loaded
    batch = api.pack(api.sample(policy, tokenizer, [QUESTION], max_new_tokens=8, temperature=0.5))
    batch = batch.with_(weight_T=api.loss_weights(batch))
    assert api.forward_backward(policy, batch, "sft", temperature=0.5)["logp_gap"] < 1e-5
    assert api.forward_backward(policy, batch, "sft")["logp_gap"] > 0.1
    texts = api.pack_texts(tokenizer, TEXTS)
    metrics = api.forward_backward(policy, texts.with_(weight_T=api.loss_weights(texts)), "sft")
    assert "logp_gap" not in metrics
    logp = api.stats_of_batch(policy, texts, ["logp"]).logp[texts.action_T]
    assert metrics["loss"] == pytest.approx(-float(logp.double().mean()), rel=1e-6)


def test_estimators_take_their_inputs_and_knobs(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    batch = rollout(loaded)
    weight_P = torch.ones(1, dtype=torch.float64)
    part_NP = torch.arange(12, dtype=torch.float64)[:, None]
    assert not torch.equal(api.advantages(batch, "gdpo", part_NP=part_NP, weight_P=weight_P), api.advantages(batch))
    assert not torch.equal(api.advantages(batch, norm_var=True), api.advantages(batch))

    @api.reads("rewards")
    def twice(batch: api.TokenBatch, *, factor: float = 2.0) -> torch.Tensor:
        return factor * api.advantages(batch, "spo")

    assert torch.equal(api.advantages(batch, twice, factor=3.0), 3 * api.advantages(batch, "spo"))


def test_mistakes_are_said_in_one_line(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    batch, (policy, tokenizer) = rollout(loaded), loaded
    bare = api.pack_texts(tokenizer, TEXTS)
    mistakes = {
        r"nobody/nothing": lambda: api.load("nobody/nothing"),
        r"prompts is one text; pass a list": lambda: api.sample(policy, tokenizer, "12"),
        r"prompts\[1\]: neither 'prompt' nor 'messages'": lambda: api.sample(policy, tokenizer, ["12", QUESTION[0]]),
        r"environment: step must be `async def step": lambda: api.sample(policy, tokenizer, ["1"], environment=print),
        r"texts\[1\]='1' has 1 token": lambda: api.pack_texts(tokenizer, [TEXTS[0], "1"]),
        r"there is no statistic p; choose from logp": lambda: api.stats_of_batch(policy, batch, ["p"]),
        r"top_k=0: the fields top_logp and top_id need": lambda: api.stats_of_batch(policy, batch, ["top_id"]),
        r"batch.weight_T is None; set it": lambda: api.forward_backward(policy, bare, "sft"),
        r"objective=nothing; choose one of sft": lambda: api.forward_backward(policy, batch, "nothing"),
        r"objective=rollout: say what it reads": lambda: api.forward_backward(policy, batch, rollout),  # type: ignore[arg-type]
        r"clip_hi has no effect: objective=ppo": lambda: api.forward_backward(policy, batch, "ppo", clip_hi=1),
        r"max_tokens=3 must be at least": lambda: api.forward_backward(policy, batch, "ppo", max_tokens=3),
        r"estimator=nothing; choose one of reinforce": lambda: api.advantages(batch, "nothing"),
        r"norm has no effect: estimator=rloo": lambda: api.advantages(batch, "rloo", norm=True),
        r"estimator=gae reads batch.value_T, and it is None": lambda: api.advantages(batch, "gae"),
    }
    for said, mistake in mistakes.items():
        with pytest.raises(UserError, match=said) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def test_what_is_not_finite_stops_before_the_step(loaded: tuple[api.Policy, PreTrainedTokenizerBase]) -> None:
    @api.needs("logp")
    def infinite(stats: api.TokenStats, batch: api.TokenBatch) -> api.Loss:
        return stats.logp * math.inf, {}

    batch, (policy, _) = rollout(loaded), loaded
    optimizer = api.adamw(policy.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with pytest.raises(api.InvariantError, match=r"^the loss is -?(inf|nan); take no step"):
        api.forward_backward(policy, batch, infinite)
    with pytest.raises(api.InvariantError, match=r"^the norm of the gradients is nan; the step was not taken"):
        api.optimizer_step(policy, optimizer)
    assert all(map(torch.equal, policy.parameters(), before))

    policy.zero_grad()
    torch.nn.init.constant_(policy.lm.model.norm.weight, math.nan)
    with pytest.raises(api.InvariantError, match=r"^-inf < logp <= 0 does not hold: nan at action 0 \(token"):
        api.forward_backward(policy, batch, "ppo")


def test_public_names_are_sorted_and_described() -> None:
    assert sorted(api.__all__) == api.__all__
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text()
    for name in api.__all__:
        assert name == "Loss" or getattr(api, name).__doc__, name
        assert f"\n| `{name}" in page, f"docs/python.md has no row for {name}"


def test_the_package_alone_imports_nothing() -> None:
    code = "import sys, RL2; assert not {'torch', 'transformers', 'RL2.api'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
