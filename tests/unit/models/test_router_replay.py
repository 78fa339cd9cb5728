"""Router replay: a router's own choice replayed changes nothing, and another one reaches recomputation too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn

from RL2.batch.packing import pack_tokens
from RL2.models.policy import Policy
from RL2.models.routing import RoutingRecord, RoutingSums
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.passes import forward

FAMILIES = (
    *("afmoe", "aria_text", "axk1", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite"),
    *("gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3"),
    *("jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "longcat_flash", "mellum", "mimo_v2_flash", "minimax"),
    *("minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
    "solar_open",
)
REQUEST = StatsRequest(("logp",))
LENGTHS = (12, 40, 33, 39)
"""The last three form a padded block."""
UNPADDED = (12, 40, 40)
"""Padding has no gradient, but it may go to other experts, and then sums over tokens are rounded otherwise."""


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {"first_k_dense_replace": 1, "num_experts_per_tok": 2}),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {
            **{"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek_v3, groups": ("deepseek_v3", {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "glm4_moe, groups": ("glm4_moe", {"n_group": 2, "topk_group": 1}),
}
"""Types that need settings to have experts, or to choose groups of experts first."""


def make(name: str, recomputes: bool = False) -> Policy:
    model_type, settings = SETTINGS.get(name, (name, {}))
    lm = tiny_model(tiny_config(model_type, settings))
    for name, tensor in (*lm.named_buffers(), *lm.named_parameters()):
        if "bias" in name and tensor.shape[-1:] == (4,):
            nn.init.uniform_(tensor, -0.3, 0.3)
    policy = Policy(lm).train()
    if recomputes and lm.supports_gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": policy.routers.contexts})
    return policy


def batch(lengths: tuple[int, ...] = LENGTHS) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return pack_tokens([torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths])


def run(policy: Policy, given: TokenBatch, routing: RoutingSums) -> list[Tensor]:
    """Return log-probabilities and all gradients of their sum of squares."""
    policy.zero_grad()
    logp_A = forward(policy, given, REQUEST, routing).logp
    logp_A.square().sum().backward()
    return [logp_A.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("model_type", [*FAMILIES, *SETTINGS])
def test_its_own_choice_changes_nothing_bit_for_bit(model_type: str) -> None:
    policy, made = make(model_type, recomputes=True), batch(UNPADDED)
    own = RoutingSums(policy.routers, records=True)
    wanted = run(policy, made, own)
    assert own.experts_T is not None
    assert own.experts_T.shape[:2] == (len(made.labels_T), len(policy.routers))
    replayed = RoutingSums(policy.routers, follows=True)
    found = run(policy, made.with_(experts_T=own.experts_T), replayed)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(replayed.load_LE, own.load_LE)
    assert replayed.changed_L is not None
    assert not replayed.changed_L.any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "lfm2_moe", "deepseek_v3, groups"])
def test_other_experts_are_taken_in_recomputation_too(model_type: str) -> None:
    policy, made = make(model_type), batch()
    own = RoutingSums(policy.routers, records=True)
    chosen = run(policy, made, own)
    assert own.experts_T is not None
    other = made.with_(experts_T=(own.experts_T + 1) % 4)
    routing = RoutingSums(policy.routers, follows=True, records=True)
    found = run(policy, other, routing)
    assert routing.experts_T is not None
    assert torch.equal(routing.experts_T, other.experts_T)
    assert not torch.allclose(found[0], chosen[0], atol=1e-3)
    again = make(model_type, recomputes=True)
    recomputed = run(again, other, RoutingSums(again.routers, follows=True))
    assert all(map(torch.equal, recomputed, found))


def test_weights_of_given_experts_have_the_routers_gradient() -> None:
    """With experts 2 and 3 for all tokens, the router's weights are as if its softmax had only these."""
    policy, made = make("mixtral"), batch()
    given = torch.tensor([3, 2], dtype=torch.int16).expand(len(made.labels_T), len(policy.routers), 2)
    routing = RoutingSums(policy.routers, follows=True)
    found = run(policy, made.with_(experts_T=given), routing)
    for router in policy.routers.all:
        router.module.register_forward_hook(_only_two)
    wanted = run(policy, made, RoutingSums(policy.routers))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    assert routing.load_LE[:, 2:].eq(sum(LENGTHS) - len(LENGTHS)).all()


def _only_two(_: nn.Module, __: object, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    p_NK, index_NK = out[0][:, 2:].softmax(-1).topk(2)
    return out[0], p_NK, index_NK + 2


def test_what_a_model_would_have_chosen_is_compared() -> None:
    policy, made = make("qwen3_moe"), batch()
    own = RoutingSums(policy.routers, records=True)
    wanted = run(policy, made, own)
    assert own.experts_T is not None
    half = own.experts_T.clone()
    half[..., 0] = (set(range(4)) - {*half[0, 0].tolist()}).pop()  # some have it, others do not
    is_own = (half[..., None] == own.experts_T[..., None, :]).any(-1)
    compared = RoutingSums(policy.routers)
    found = run(policy, made.with_(experts_T=half), compared)
    assert all(map(torch.equal, found, wanted)), "it is only compared"
    assert compared.changed_L is not None
    torch.testing.assert_close(compared.changed_L, (~is_own).float().mean(-1).sum(0))


def test_a_record_is_in_the_order_of_the_calls() -> None:
    policy = make("olmoe")
    record, ids = RoutingRecord(policy.routers), batch().token_ids_T
    with torch.no_grad(), record.recording():
        policy.lm(input_ids=ids[None, :5])
        policy.lm(input_ids=ids[None, 5:9])
    assert record.experts_NLK().shape == (9, 2, 2)
