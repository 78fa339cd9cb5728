"""Updates with a teacher: their gradients against dense float64 ones, and which weights the teacher has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_settings import rl_config
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.batch.packing import loss_weights, microbatches, pack, stand_ins
from RL2.config.model import Teacher
from RL2.parallel.processes import Processes
from RL2.trainer.build import reference_as_teacher
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.teacher import FrozenTeacher, PolicyTeacher, make_teacher

V, SHARED = 51, 51
"""Vocabulary of the student, and of the tokens that its teacher has too."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    make = partial(Qwen3Config, intermediate_size=48, initializer_range=0.2, **sizes)
    Qwen3ForCausalLM(make(vocab_size=V, hidden_size=32)).save_pretrained(folder / "student")
    Qwen3ForCausalLM(make(vocab_size=V + 5, hidden_size=24)).save_pretrained(folder / "teacher")
    Qwen3ForCausalLM(make(vocab_size=V, hidden_size=16)).save_pretrained(folder / "other")
    return folder


def make_actor(folder: Path, processes: Processes, objective: str, **changes: Any) -> Actor:
    config = rl_config(f"actor.model_name={folder}/student", "actor.tis_coef=0").actor
    return Actor(replace(config, objective=objective, **changes), processes, 10, folder)


def make_batch() -> TokenBatch:
    """Two groups with a shared prompt each, and an observation in one response."""
    g = torch.Generator().manual_seed(3)
    trajectories = []
    for n in range(6):
        prompt = torch.randint(V, (7,), generator=torch.Generator().manual_seed(n // 3)).tolist()
        response = torch.randint(V, (3 + 2 * n,), generator=g).tolist()
        mask = [False] * 7 + [True] * len(response)
        mask[9] = n != 5
        values = [0.0] * len(mask)
        trajectories.append(Trajectory(n, n // 3, n % 3, [Sequence(prompt + response, mask, values, values)]))
    batch = pack(trajectories)
    return batch.with_(weight_T=loss_weights(batch))


def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
    return (a_TV.exp() * (a_TV - b_TV)).sum(-1)


def jsd(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    m_TV = (0.3 * q_TV.exp() + 0.7 * p_TV.exp()).log()
    return 0.3 * kl(q_TV, m_TV) + 0.7 * kl(p_TV, m_TV)


Dense = Callable[[Tensor, Tensor, TokenBatch], Tensor]
"""(log-probabilities of the student, of the teacher, the sequence) -> loss_T."""

DENSE: dict[str, Dense] = {
    "opd": lambda p_TV, q_TV, _: kl(p_TV, q_TV),
    "forward_kl": lambda p_TV, q_TV, _: kl(q_TV, p_TV),
    "gkd": lambda p_TV, q_TV, _: jsd(p_TV, q_TV),
}


def dense_gradients(
    folder: Path, batch: TokenBatch, loss: Dense, temperature: float
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients in float64 from whole logits, of each sequence alone in transformers' own forward."""
    student = Qwen3ForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    teacher = Qwen3ForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    assert batch.weight_T is not None
    for b in range(batch.num_sequences):
        one = batch.sequences([b])
        with torch.no_grad():
            q_TV = teacher(one.token_ids_T[None]).logits[0, :, :SHARED]
        p_TV = student(one.token_ids_T[None]).logits[0, :, :SHARED]
        loss_T = loss(p_TV.log_softmax(-1), (q_TV / temperature).log_softmax(-1), one)
        assert one.weight_T is not None
        total = total + (loss_T * one.weight_T.double()).sum()
    total.backward()
    return total.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DENSE)
def test_an_update_has_the_gradient_of_whole_logits(folder: Path, processes: Processes, name: str) -> None:
    knobs = {"beta": 0.3} if name == "gkd" else {}
    actor = make_actor(folder, processes, name, objective_args=knobs, max_length_per_device=40)
    actor.teacher = make_teacher(Teacher(model_name=str(folder / "teacher"), temperature=0.8), actor, 1.0)
    batch = make_batch()
    metrics = actor.backward(batch, actor.loss, actor.request)
    loss, exact = dense_gradients(folder, batch, DENSE[name], 0.8)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_gradients(actor, exact)


def assert_gradients(actor: Actor, exact: dict[str, Tensor]) -> None:
    for name, parameter in actor.lm.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - exact[name]).norm() / exact[name].norm() < 1e-5, name


def test_an_exact_kl_beside_a_policy_gradient_is_that_of_whole_logits(folder: Path, processes: Processes) -> None:
    settings = ("actor.kl.coef=0.3", "actor.kl.estimator=exact", f"ref_actor.model_name={folder}/teacher")
    config = rl_config(f"actor.model_name={folder}/student", "actor.tis_coef=0", *settings)
    actor = Actor(config.actor, processes, 10, folder)
    actor.teacher = reference_as_teacher(config, actor)
    batch = make_batch()
    advantage_T = torch.linspace(-1, 2, len(batch.labels_T)) * batch.action_T
    batch = batch.with_(advantage_T=advantage_T)
    divergence = 0.0

    def dense(p_TV: Tensor, q_TV: Tensor, one: TokenBatch) -> Tensor:
        nonlocal divergence
        assert one.advantage_T is not None and one.weight_T is not None
        logp_T, kl_T = p_TV.gather(1, one.labels_T[:, None])[:, 0], kl(p_TV, q_TV)
        divergence += float((kl_T.detach() * one.weight_T).sum())
        ratio_T = (logp_T - logp_T.detach()).exp()  # 1, with the gradient of PPO's on-policy
        return 0.3 * kl_T - ratio_T * one.advantage_T

    metrics = actor.backward(batch, actor.loss, actor.request)
    loss, exact = dense_gradients(folder, batch, dense, 1.0)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["kl"] == pytest.approx(divergence, rel=1e-5)
    assert_gradients(actor, exact)


def test_each_sequence_has_the_teacher_that_it_names(folder: Path, processes: Processes) -> None:
    """The gradient with two teachers is the sum of those with one, of the sequences of each."""
    names = {"large": str(folder / "teacher"), "small": str(folder / "other")}
    teacher_B, batch = torch.tensor([0, 1, 1, 0, 1, 0]), make_batch()
    actor = make_actor(folder, processes, "opd", max_length_per_device=40)
    actor.teacher = make_teacher(Teacher(models=names), actor, 1.0)
    together = actor.backward(batch.with_(teacher_B=teacher_B), actor.loss, actor.request)["loss"]
    grads = {n: p.grad.clone() for n, p in actor.lm.named_parameters() if p.grad is not None}
    actor.optimizer.zero_grad()
    apart = 0.0
    assert batch.weight_T is not None
    for number, name in enumerate(names.values()):
        actor.teacher = make_teacher(Teacher(model_name=name), actor, 1.0)
        mine_T = (teacher_B == number)[batch.sequence_T]
        apart += actor.backward(batch.with_(weight_T=batch.weight_T * mine_T), actor.loss, actor.request)["loss"]
    assert together == pytest.approx(apart, rel=1e-5)
    for name, parameter in actor.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_an_idle_process_runs_the_teacher_of_the_others() -> None:
    batch = make_batch().with_(teacher_B=torch.tensor([0, 1, 1, 0, 1, 0]))
    planned = microbatches(batch, range(6), 100, num_ranks=4)
    assert batch.teacher_B is not None
    for number, idle in enumerate(stand_ins(batch, planned)):
        running = [b for rank in planned for b in rank[number]]
        assert len(set(batch.teacher_B[[*running, idle]].tolist())) == 1
    assert sorted(b for rank in planned for ids in rank for b in ids) == list(range(6))
    assert any(not ids for rank in planned for ids in rank)


def test_the_start_has_no_gradient_at_first_and_stays(folder: Path, processes: Processes) -> None:
    actor = make_actor(folder, processes, "opd", lr=1e-2)
    actor.teacher = make_teacher(Teacher(model_name="start"), actor, 1.0)
    assert isinstance(actor.teacher, FrozenTeacher)
    before = {n: x.clone() for n, x in actor.teacher.weights()}
    metrics = actor.backward(make_batch(), actor.loss, actor.request)
    assert metrics["loss"] == pytest.approx(0, abs=1e-6)
    actor.optimizer.zero_grad()
    assert actor.update(make_batch())["actor/loss"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(before[n], x) for n, x in actor.teacher.weights())


def test_the_start_of_adapters_is_the_policy_without_them(folder: Path, processes: Processes) -> None:
    lora = replace(rl_config().actor.lora, rank=4, target_modules=("q_proj", "down_proj"))
    actor = make_actor(folder, processes, "opd", lora=lora)
    actor.teacher = make_teacher(Teacher(model_name="start"), actor, 1.0)
    assert isinstance(actor.teacher, PolicyTeacher)
    g = torch.Generator().manual_seed(1)
    for name, parameter in actor.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=g)
    own = actor.backward(make_batch(), actor.loss, actor.request)["loss"]
    grads = {n: p.grad.clone() for n, p in actor.lm.named_parameters() if p.grad is not None}
    actor.optimizer.zero_grad()
    actor.teacher = make_teacher(Teacher(model_name=str(folder / "student")), actor, 1.0)
    assert own == pytest.approx(actor.backward(make_batch(), actor.loss, actor.request)["loss"], rel=1e-5)
    assert own > 0.01
    for name, parameter in actor.lm.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_average_follows_each_optimizer_step(folder: Path, processes: Processes, rank: int) -> None:
    lora = replace(rl_config().actor.lora, rank=rank, target_modules=("q_proj",))
    actor = make_actor(folder, processes, "gkd", lr=1e-2, lora=lora)
    actor.teacher = make_teacher(Teacher(model_name="ema", ema_decay=0.75, temperature=0.5), actor, 1.0)
    assert isinstance(actor.teacher, FrozenTeacher)
    average = {n: x.clone().double() for n, x in actor.lm.named_parameters()}
    for _ in range(3):
        actor.update(make_batch())
        for name, parameter in actor.lm.named_parameters():
            average[name] = 0.75 * average[name] + 0.25 * parameter.detach().double()
    ours = dict(actor.teacher.lm.named_parameters())
    moved = [name for name, x in actor.lm.named_parameters() if not torch.equal(x.detach(), ours[name].detach())]
    assert len(moved) == (4 if rank else len(average))  # two adapted layers with two matrices each
    for name, exact in average.items():
        torch.testing.assert_close(ours[name].detach().double(), exact, rtol=1e-6, atol=1e-7)
