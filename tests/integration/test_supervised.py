"""sft, rm and dpo from start to end: each learns what it can, resumes, and leaves what plain transformers load."""

from __future__ import annotations

import math
import os
import re
import termios
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from programs import NUM_ROWS, Run, World, answered, taught_to_answer, without_times
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from RL2.config.load import load, show
from RL2.data.preference import load_pairs
from RL2.data.sft import load_examples
from RL2.trainer.supervised import Rows

Runs = dict[str, Future[Run]]
TESTS = ("trainer.test_freq=10", "trainer.save_freq=20")
LEARNING = {
    "sft": ("trainer.max_steps=60", "actor.lr=5e-3", "data.batch_size=24", *TESTS),
    "rm": ("trainer.max_steps=30", "critic.lr=2e-3", "data.test_ratio=0.25", *TESTS),
    "dpo": ("trainer.max_steps=30", "actor.lr=1e-3", "data.test_ratio=0.25", *TESTS),
}


RANK_JSD = ("actor.objective=rank_jsd", "actor.objective_args.ce_coef=0.5", "actor.objective_args.rank_cap=8")


@pytest.fixture(scope="module")
def runs(world: World) -> Iterator[Runs]:
    """All of them, two at a time; each test waits for its own."""
    settings = LEARNING | {"sft": (*LEARNING["sft"], f"data.test_path={world.root}/sft.jsonl")}

    def resume(program: str, whole: Future[Run]) -> Run:
        checkpoint = whole.result().succeeded().save_dir / "step_000020"
        return world.run(program, *settings[program], f"trainer.load_ckpt_from={checkpoint}")

    with ThreadPoolExecutor(2) as pool:
        found = {program: pool.submit(world.run, program, *overrides) for program, overrides in settings.items()}
        found |= {f"{p} resumed": pool.submit(resume, p, found[p]) for p in settings}
        yield found | {
            "ipo": pool.submit(
                world.run, "dpo", *settings["dpo"], "actor.loss=ipo", "actor.beta=0.5", "actor.reference_free=true"
            ),
            "rank jsd": pool.submit(world.run, "sft", *settings["sft"], *RANK_JSD),
            "rm on two": pool.submit(world.run, "rm", nproc=2),
            "dpo on two": pool.submit(world.run, "dpo", nproc=2),
            "rm on one": pool.submit(world.run, "rm"),
            "dpo on one": pool.submit(world.run, "dpo"),
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("program", LEARNING)
def test_a_run_leaves_its_metrics_and_configuration(program: str, runs: Runs) -> None:
    run = runs[program].result().succeeded()
    name = "critic" if program == "rm" else "actor"
    last = len(run.metrics) - 1
    assert [row["step"] for row in run.metrics] == list(range(last + 1))
    assert [row["step"] for row in run.metrics if "test/loss" in row] == list(range(0, last + 1, 10))
    steps = run.metrics[:-1]
    assert all(math.isfinite(row[f"{name}/loss"]) and row[f"{name}/grad_norm"] > 0 for row in steps)
    assert (run.save_dir / "config.yaml").read_text() == show(load(program, run.settings))
    if program != "sft":
        assert all(row[f"{name}/pairs"] == 8 for row in steps)
        assert f"{NUM_ROWS} pairs, 0 left out" in run.output


def test_sft_memorises(runs: Runs, world: World) -> None:
    """Its greedy answers are the responses it was shown, but for a few."""
    run = runs["sft"].result().succeeded()
    assert run.metrics[-1]["test/loss"] < 0.1 < 1 < run.metrics[0]["test/loss"]
    tokenizer = AutoTokenizer.from_pretrained(run.save_dir / "latest")
    lm = AutoModelForCausalLM.from_pretrained(run.save_dir / "latest").eval()
    trajectories, _ = load_examples(f"{world.root}/sft.jsonl", tokenizer, None, 128)
    right = 0
    for trajectory in trajectories:
        (sequence,) = trajectory.sequences
        start = sequence.action_mask.tolist().index(True)
        prompt, response = sequence.token_ids.tolist()[:start], sequence.token_ids.tolist()[start:]
        out = lm.generate(torch.tensor([prompt]), max_new_tokens=len(response), do_sample=False)
        right += out[0, start:].tolist() == response
    assert right >= 0.9 * len(trajectories)


def test_a_base_model_learns_to_end_its_turns(world: World, tmp_path: Path) -> None:
    """By the token that its chat template ends them with: in our engine, and in transformers from the export."""
    learnt = taught_to_answer(world, tmp_path).succeeded()
    folder = learnt.save_dir / "latest"
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": "Name a colour."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt").input_ids
    answer = lm.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    said, end = tokenizer.decode(answer[:-1]), tokenizer.decode(answer[-1:])
    assert said and (end, len(answer) < 40) == ("<|im_end|>", True)
    (sample,) = answered(world, learnt, tmp_path)
    assert (sample["texts"][1], sample["truncated"]) == (said, False)


def test_another_objective_is_compared_by_the_negative_log_likelihood(runs: Runs) -> None:
    """As the pre-training pilot of the thesis, section 4.4: cross-entropy and the rank objective."""
    plain, mixed = (runs[name].result().succeeded().metrics for name in ("sft", "rank jsd"))
    assert plain[-1]["test/nll"] == pytest.approx(plain[-1]["test/loss"], rel=1e-4)
    assert mixed[0]["test/nll"] == pytest.approx(plain[0]["test/nll"], rel=1e-4)
    assert mixed[0]["test/loss"] > 0.5 * mixed[0]["test/nll"]
    assert mixed[-1]["test/nll"] < 0.2 * mixed[0]["test/nll"]
    assert mixed[0]["test/covered"] < mixed[-1]["test/covered"] == pytest.approx(1, abs=0.05)


def test_rm_tells_chosen_from_rejected_on_pairs_that_it_has_not_seen(runs: Runs) -> None:
    first, *_, last = runs["rm"].result().succeeded().metrics
    assert first["test/loss"] == pytest.approx(math.log(2), abs=0.5)
    assert last["test/accuracy"] >= 0.95
    assert last["test/margin"] > 1 > abs(first["test/margin"])


def test_dpo_grows_the_margin(runs: Runs) -> None:
    run = runs["dpo"].result().succeeded()
    first, *_, last = run.metrics
    # before the first step the policy is the reference
    assert first["test/loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert first["test/margin"] == pytest.approx(0, abs=1e-4)
    assert last["test/accuracy"] >= 0.95
    assert last["test/margin"] > 1
    for row in run.metrics[:-1]:
        margin = row["actor/reward_chosen"] - row["actor/reward_rejected"]
        assert row["actor/margin"] == pytest.approx(margin, abs=1e-5)


def test_ipo_without_a_reference_moves_towards_its_margin(runs: Runs) -> None:
    first, *_, last = runs["ipo"].result().succeeded().metrics
    assert first["test/reward_chosen"] < 0  # a log-probability as it is
    assert last["test/loss"] < 0.5 * first["test/loss"]


def test_a_terminal_shows_how_far_the_reference_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # every update is drawn, however soon it comes
    monkeypatch.setenv("TQDM_MINITERS", "1")
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))  # a bar takes the width there is, and a new terminal has none

    def show_errors_there() -> None:
        os.dup2(terminal, 2)

    run = world.start("dpo", "trainer.max_steps=1", preexec=show_errors_there)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # raised at the end
        while more := os.read(ours, 4096):
            shown += more
    os.close(ours)
    assert run.wait().process.returncode == 0, shown.decode()
    (last,) = re.findall(rf"reference: 100%\|.*?\| (\d+)/{2 * NUM_ROWS} ", shown.decode())
    assert int(last) == 2 * NUM_ROWS


@pytest.mark.parametrize("program", LEARNING)
def test_a_resumed_run_ends_as_the_whole_one(program: str, runs: Runs) -> None:
    whole, again = runs[program].result().succeeded(), runs[f"{program} resumed"].result().succeeded()
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert without_times(again.metrics) == without_times(whole.metrics)[20:]


@pytest.mark.parametrize("program", ["rm", "dpo"])
def test_two_processes_train_as_one_does(program: str, runs: Runs) -> None:
    one, two = (runs[f"{program} on {number}"].result().succeeded() for number in ("one", "two"))
    for row, other in zip(without_times(one.metrics), without_times(two.metrics), strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    weights, others = load_file(one.weights), load_file(two.weights)
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=1e-5)


def test_a_reward_model_loads_in_transformers_with_equal_outputs(runs: Runs, world: World) -> None:
    """Padded rows in plain transformers give the accuracy and the margin that the run reported at its end."""
    run = runs["rm"].result().succeeded()
    folder = run.save_dir / "latest"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rm = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert rm.config.num_labels == 1
    pairs, _ = load_pairs(f"{world.root}/pairs.jsonl", tokenizer, None, 128)
    order = torch.tensor(held_out(len(pairs)))
    rows = [{"input_ids": pairs[i][side][0]} for i in order.tolist() for side in (0, 1)]
    padded = tokenizer.pad(rows, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        rewards = rm(**padded).logits[:, 0].view(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    assert margin.mean().item() == pytest.approx(run.metrics[-1]["test/margin"], rel=1e-4)
    assert (margin > 0).float().mean().item() == pytest.approx(run.metrics[-1]["test/accuracy"])


def test_a_policy_loads_in_transformers_with_equal_outputs(runs: Runs, world: World) -> None:
    """One sequence at a time in plain transformers, against the start, gives the rewards that the run reported."""
    run = runs["dpo"].result().succeeded()
    tokenizer = AutoTokenizer.from_pretrained(run.save_dir / "latest")
    policy = AutoModelForCausalLM.from_pretrained(run.save_dir / "latest").eval()
    reference = AutoModelForCausalLM.from_pretrained(world.model).eval()
    pairs, _ = load_pairs(f"{world.root}/pairs.jsonl", tokenizer, None, 128)
    batch = Rows(pairs.ids, pairs.trains, per_row=2).draw(held_out(len(pairs)))
    rewards = []
    for b in range(batch.num_sequences):
        own = batch.sequences([b])
        with torch.no_grad():
            logps = [lm(own.token_ids_T[None]).logits[0].log_softmax(-1) for lm in (policy, reference)]
        now, then = (x.gather(1, own.labels_T[:, None])[own.action_T].sum().item() for x in logps)
        rewards.append(0.1 * (now - then))
    chosen, rejected = rewards[::2], rewards[1::2]
    assert sum(chosen) / len(chosen) == pytest.approx(run.metrics[-1]["test/reward_chosen"], rel=1e-4)
    assert sum(rejected) / len(rejected) == pytest.approx(run.metrics[-1]["test/reward_rejected"], rel=1e-4)


def held_out(number: int) -> list[int]:
    """The rows of data.test_ratio=0.25: drawn once, for every run alike."""
    import numpy as np

    return sorted(np.random.default_rng(0).permutation(number).tolist()[: number // 4])
