"""Losses of routers: their values and gradients are those of transformers, in little memory, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.errors import ConfigError
from RL2.objectives.objective import Loss
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.learner import Learner

REQUEST = StatsRequest(("logp",), budget_mib=0.05)
LENGTHS = (12, 40, 33, 39)
SHARED = 9
"""Number of tokens that the last two sequences have in common."""


@pytest.fixture(params=["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(tiny_config(request.param, {"output_router_logits": False})).save_pretrained(tmp_path)
    return tmp_path


def learner(folder: Path, processes: Processes, *overrides: str) -> Learner:
    given = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={folder}
        actor.max_length_per_device=4096 trainer.experiment_name=x"""
    _, config = trained(load("sft", [*given.split(), *overrides]))
    return Learner(config, processes, 2, folder)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    made[-1][:SHARED] = made[-2][:SHARED]
    return made


def batch() -> TokenBatch:
    made = pack_tokens(sequences())
    made = made.with_(group_B=torch.tensor([0, 1, 2, 2]))  # what the last two share runs once, and counts twice
    assert made.shared() is not None
    return made.with_(weight_T=made.action_T / made.action_T.sum())


def nothing(stats: TokenStats, _: TokenBatch) -> Loss:
    return 0 * stats.logp, {}


def reference(lm: PreTrainedModel, aux_coef: float, z_coef: float) -> tuple[Tensor, Tensor]:
    """Compute the gradients by transformers, on a padded batch with a mask; return both losses."""
    rows = [ids[:-1] + [0] * (max(LENGTHS) - len(ids)) for ids in sequences()]
    mask = torch.tensor([[n < len(ids) - 1 for n in range(max(LENGTHS) - 1)] for ids in sequences()])
    out = lm(input_ids=torch.tensor(rows), attention_mask=mask.long(), output_router_logits=True)
    z_loss = torch.stack([x.float().logsumexp(-1)[mask.flatten()].square().mean() for x in out.router_logits]).mean()
    (aux_coef * out.aux_loss + z_coef * z_loss).backward()
    return out.aux_loss.detach(), z_loss.detach()


def test_values_and_gradients_are_those_of_transformers(folder: Path, processes: Processes) -> None:
    made = learner(folder, processes, "actor.moe.aux_coef=0.5", "actor.moe.z_coef=0.25")
    metrics = made.backward(batch(), nothing, REQUEST)
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    aux_loss, z_loss = reference(lm, 0.5, 0.25)
    assert metrics["moe/balance_loss"] == pytest.approx(float(aux_loss), rel=1e-5)
    assert metrics["moe/z_loss"] == pytest.approx(float(z_loss), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(0.5 * aux_loss + 0.25 * z_loss), rel=1e-5)
    wanted = dict(lm.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    assert largest > 0
    for name, parameter in made.lm.named_parameters():
        other = wanted[name].grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            got, torch.zeros_like(got) if other is None else other, rtol=1e-4, atol=1e-5 * largest
        )


def test_recomputation_changes_nothing(folder: Path, processes: Processes) -> None:
    gradients = []
    for recomputes in ("true", "false"):
        setting = f"actor.gradient_checkpointing={recomputes}"
        made = learner(folder, processes, "actor.moe.aux_coef=0.5", "actor.moe.z_coef=0.25", setting)
        made.backward(batch(), lambda stats, _: (-stats.logp, {}), REQUEST)
        gradients.append([p.grad for p in made.lm.parameters()])
    torch.testing.assert_close(*gradients)


def test_microbatches_count_by_their_tokens(folder: Path, processes: Processes) -> None:
    settings = ("actor.moe.aux_coef=0.5", "actor.moe.z_coef=0.25")
    apart = learner(folder, processes, *settings, "actor.max_length_per_device=40")
    metrics, made, mean = apart.backward(batch(), nothing, REQUEST), batch(), 0.0
    for b, length in enumerate(LENGTHS):
        alone = made.sequences([b])
        share = (length - 1) / (sum(LENGTHS) - len(LENGTHS))
        mean += share * learner(folder, processes, *settings).backward(alone, nothing, REQUEST)["moe/balance_loss"]
    assert metrics["moe/balance_loss"] == pytest.approx(mean, rel=1e-5)


def test_a_model_without_such_routers_is_refused(tmp_path: Path, processes: Processes) -> None:
    for model_type, why in (
        ("qwen3", "Qwen3ForCausalLM has no router that transformers names"),
        ("glm4_moe", "Glm4MoeForCausalLM chooses experts by sigmoids of the router's logits, for which these losses"),
    ):
        tiny_model(tiny_config(model_type)).save_pretrained(tmp_path / model_type)
        with pytest.raises(ConfigError, match=rf"^actor\.moe\.z_coef=0\.1: {why}"):
            learner(tmp_path / model_type, processes, "actor.moe.z_coef=0.1")


class _Largest(TorchDispatchMode):
    """Dispatch mode that keeps the largest number of elements of a tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_an_update_never_makes_the_logits(tmp_path: Path, processes: Processes) -> None:
    tiny_model(tiny_config("qwen3_moe", {"vocab_size": 4000})).save_pretrained(tmp_path)
    made = learner(tmp_path, processes, "actor.moe.aux_coef=0.5", "actor.moe.z_coef=0.25")
    logits, weights = sum(LENGTHS) * 4000, 64 * 4000
    made.backward(batch(), nothing, REQUEST)  # compares packed with alone, by logits
    with _Largest() as largest:
        made.backward(batch(), nothing, REQUEST)
    assert weights <= largest.elements < logits * 0.6
