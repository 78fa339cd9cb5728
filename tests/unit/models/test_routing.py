"""The routing of mixtures of experts: which models' is seen, and that padding is not counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from RL2.batch.packing import pack_tokens
from RL2.config.load import load
from RL2.config.programs import trained
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy
from RL2.models.routing import RoutingSums, find_routers, why_unseen
from RL2.models.value import ValueModel
from RL2.parallel.processes import Processes
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.passes import forward

SOFTMAX = ("aria_text", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba")
MORE_SOFTMAX = ("longcat_flash", "mellum", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next")
SIGMOID = ("afmoe", "axk1", "dots1", "exaone_moe", "glm4_moe", "hy_v3", "kimi_linear", "kolibri1", "laguna", "lfm2_moe")
LENGTHS = (12, 30, 23, 29)
"""The last three form a padded block."""


def model(model_type: str) -> PreTrainedModel:
    """Return a tiny model whose correction bias, if it has one, changes its choices."""
    lm = tiny_model(tiny_config(model_type)).eval()
    for name, tensor in (*lm.named_buffers(), *lm.named_parameters()):
        if "bias" in name and tensor.shape[-1:] == (4,):
            nn.init.uniform_(tensor, -0.3, 0.3)
    return lm


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("model_type", [*SOFTMAX, *MORE_SOFTMAX, *SIGMOID])
def test_probabilities_are_the_scores_by_which_a_router_weighs(model_type: str) -> None:
    lm, seen = model(model_type), list[tuple[Tensor, Tensor, Tensor]]()
    routers = find_routers(lm)
    assert {router.scores for router in routers.all} == {"sigmoid" if model_type in SIGMOID else "softmax"}
    for router in routers.all:
        router.module.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        lm(input_ids=torch.tensor(sequences()[:1]))
    assert len(seen) == len(routers)
    for router, (logits_NE, weight_NK, experts_NK) in zip(routers.all, seen, strict=True):
        p_NK = router.probabilities(logits_NE).gather(1, experts_NK)
        torch.testing.assert_close(weight_NK[:, 0] / weight_NK[:, 1], p_NK[:, 0] / p_NK[:, 1], rtol=1e-3, atol=1e-4)


def test_the_routing_of_some_models_is_not_seen() -> None:
    for model_type, why in (
        ("qwen3", "has no router that transformers names"),
        ("jetmoe", "has no router that transformers names"),
        ("zaya", "its router may skip the experts"),
        ("phimoe", "has a router (PhimoeTopKRouter) whose scores are neither a softmax nor a sigmoid"),
    ):
        lm = tiny_model(tiny_config(model_type))
        assert len(find_routers(lm)) == 0
        assert why_unseen(lm) == why
    assert why_unseen(tiny_model(tiny_config("mixtral"))) is None


def sums(policy: Policy) -> RoutingSums:
    """Return the sums over padded blocks, with recomputation and a backward pass."""
    found = RoutingSums(policy.routers)
    stats = forward(policy.train(), pack_tokens(sequences()), StatsRequest(("logp",)), found)
    stats.logp.sum().backward()
    return found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_padding_is_not_counted_nor_are_tokens_twice(model_type: str) -> None:
    lm = model(model_type)
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    found = sums(Policy(lm))
    load_LE, entropy_L = torch.zeros_like(found.load_LE), torch.zeros_like(found.entropy_L)
    for ids in sequences():
        with torch.no_grad():
            out = lm(input_ids=torch.tensor([ids[:-1]]), output_router_logits=True, use_cache=False)
        for number, logits_NE in enumerate(out.router_logits):
            chosen = logits_NE.topk(2, dim=-1).indices
            load_LE[number] += torch.nn.functional.one_hot(chosen, 4).sum((0, 1))
            entropy_L[number] += torch.distributions.Categorical(logits=logits_NE.float()).entropy().sum()
    assert found.tokens == sum(LENGTHS) - len(LENGTHS)
    assert torch.equal(found.load_LE, load_LE)
    torch.testing.assert_close(found.entropy_L, entropy_L)


def test_hooks_end_with_their_block() -> None:
    lm = model("mixtral")
    with pytest.raises(ZeroDivisionError), find_routers(lm).watched(lambda *_: None):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in lm.modules() if "Router" in type(module).__name__)


def learner(folder: Path, processes: Processes, *overrides: str, kind: type[PackedModel] = Policy) -> Learner:
    given = f"""data.path=x.jsonl data.max_length=99 data.batch_size=1 actor.model_name={folder}
        actor.max_length_per_device=40 trainer.experiment_name=x"""
    _, config = trained(load("sft", [*given.split(), *overrides]))
    return Learner(config, processes, 2, folder, model=kind)


def weighed(batch: TokenBatch) -> TokenBatch:
    return batch.with_(weight_T=batch.action_T / batch.action_T.sum())


def test_metrics_of_an_update(tmp_path: Path, processes: Processes) -> None:
    lm = model("qwen3_moe")
    with torch.no_grad():
        for router in find_routers(lm).all:  # logits of 0: all tokens choose the first two of four experts
            router.module.weight.zero_()
    lm.save_pretrained(tmp_path)
    batch, request = weighed(pack_tokens(sequences())), StatsRequest(("logp",))
    metrics = learner(tmp_path, processes).step(batch, lambda stats, _: (-stats.logp, {}), request)
    assert metrics["moe/load_max"] == 2
    assert metrics["moe/routing_entropy"] == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert metrics["moe/unused_experts"] == 0.5


def test_a_dense_model_has_no_such_metric(tmp_path: Path, processes: Processes) -> None:
    model("lfm2").save_pretrained(tmp_path)
    batch, request = weighed(pack_tokens(sequences())), StatsRequest(("logp",))
    metrics = learner(tmp_path, processes).step(batch, lambda stats, _: (-stats.logp, {}), request)
    assert not any(name.startswith("moe/") for name in metrics)


def test_a_value_model_has_them_too(tmp_path: Path) -> None:
    model("mixtral").save_pretrained(tmp_path)
    assert len(ValueModel.load(str(tmp_path)).routers) == 2
