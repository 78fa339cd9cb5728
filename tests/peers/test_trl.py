"""The policy-gradient family against TRL: loss and gradient of all parameters, on the same weights and tokens.

TRL pads: prompts on the left, completions on the right. Here sequences are packed, and what they share is computed
once. Where TRL's definitions differ from ours, the case says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from RL2.batch.packing import loss_weights, pack
from RL2.config.load import load
from RL2.models.policy import Policy, load_model
from RL2.objectives.loss import total_loss, with_weights
from RL2.objectives.registry import bind, configured
from RL2.types import Sequence, StatsRequest, TokenBatch, TokenStats, Trajectory

TEMPERATURE, MAX_COMPLETION = 0.8, 16
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12])
LENGTHS = (16, 3, 9, 1, 12, 7)
ADVANTAGES = (1.0, -0.7, 0.4, -1.5, 0.9, -0.3)
"""Three completions of each prompt."""


@dataclass(frozen=True)
class Case:
    objective: str
    knobs: dict[str, Any]
    average: Literal["token", "sequence", "constant"]
    trl: dict[str, Any]


CASES = {
    # TRL's token mean over one microbatch; over a whole step it is called dapo
    "ppo": Case("ppo", {"clip": 0.2}, "token", {"loss_type": "bnpo", "epsilon": 0.2}),
    "GRPO's average": Case("ppo", {"clip": 0.2}, "sequence", {"loss_type": "grpo", "epsilon": 0.2}),
    "Dr. GRPO's average": Case("ppo", {"clip": 0.2}, "constant", {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "DAPO's average and clip-higher": Case(
        "ppo", {"clip": 0.2, "clip_high": 0.28}, "token", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}
    ),
    # TRL's delta bounds the ratio from above before the minimum is taken, which only A < 0 feels
    "dual clip": Case(
        "ppo", {"clip": 0.1, "dual_clip": 1.3}, "sequence", {"loss_type": "grpo", "epsilon": 0.1, "delta": 1.3}
    ),
    "gspo": Case(
        "gspo",
        {"clip_high": 4e-4},
        "sequence",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide": Case(
        "gspo",
        {"clip": 0.05, "clip_high": None},
        "sequence",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    ),
    # TRL's epsilon_high is here the bound itself, and there is no lower one
    "cispo": Case("cispo", {"ratio_max": 1.2}, "token", {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": Case("sapo", {}, "sequence", {"loss_type": "sapo"}),
    "luspo": Case(
        "luspo",
        {"clip": 0.05, "clip_high": 0.08},
        "sequence",
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    ),
    # TRL bounds log W by log(1e-8) and 20, which these tokens do not reach
    "vespo": Case(
        "vespo",
        {"power_pos": 0.5, "decay_pos": 0.4, "power_neg": 0.6, "decay_neg": 0.2},
        "token",
        {
            "loss_type": "vespo",
            "vespo_k_pos": 0.5,
            "vespo_lambda_pos": 0.4,
            "vespo_k_neg": 0.6,
            "vespo_lambda_neg": 0.2,
        },
    ),
    "gmpo": Case("gmpo", {"clip": 0.3, "clip_high": 0.4}, "sequence", {"epsilon": 0.3, "epsilon_high": 0.4}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=320, intermediate_size=48, head_dim=8, initializer_range=0.2, **shape)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def completions() -> list[tuple[list[int], list[bool]]]:
    """Token ids, and which of them were sampled: the longest has an observation in the middle."""
    g = torch.Generator().manual_seed(1)
    found = [(torch.randint(3, 320, (n,), generator=g).tolist(), [True] * n) for n in LENGTHS]
    found[0][1][6:9] = [False] * 3
    return found


def our_batch(old: bool, policy: Policy) -> TokenBatch:
    trajectories = []
    for n, (ids, sampled) in enumerate(completions()):
        prompt = PROMPTS[n // 3]
        whole, mask = prompt + ids, [False] * len(prompt) + sampled
        zeros = [0.0] * len(whole)
        trajectories.append(Trajectory(n // 3, n // 3, n % 3, [Sequence(whole, mask, zeros, zeros)]))
    batch = pack(trajectories)
    batch = batch.with_(advantage_T=torch.tensor(ADVANTAGES)[batch.sequence_T] * batch.action_T)
    if not old:
        return batch
    # what an earlier policy may have said, so that ratios lie on both sides of every bound
    with torch.no_grad():
        logp = policy(batch, batch.shared(), StatsRequest(("logp",), temperature=TEMPERATURE))["logp"]
    noise = 0.4 * torch.randn(len(logp), generator=torch.Generator().manual_seed(2))
    return batch.with_(old_logp_T=torch.zeros_like(batch.reward_T).masked_scatter(batch.action_T, logp + noise))


def our_weights(batch: TokenBatch, average: Literal["token", "sequence", "constant"]) -> Tensor:
    return loss_weights(batch, train_on="all", level=average, average_over="all", length=MAX_COMPLETION)


def ours(case: Case, policy: Policy, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    bound = bind(case.objective, case.knobs)
    request = StatsRequest(bound.fields, bound.top_k, TEMPERATURE)
    batch = batch.with_(weight_T=our_weights(batch, case.average))
    actions = batch.positions(batch.action_T)
    stats = TokenStats(**policy(batch, batch.shared(), request))
    loss_T, metrics = bound.loss(stats, actions)
    return (loss_T * actions.weight_T).sum(), metrics


def padded(rows: list[list[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Ids, and 1 where they are no padding."""
    ids = [torch.tensor(row) for row in rows]
    shape = {"batch_first": True, "padding_side": side}
    return pad_sequence(ids, **shape), pad_sequence([torch.ones_like(row) for row in ids], **shape)


def trl_inputs(batch: TokenBatch) -> dict[str, Tensor]:
    parts = completions()
    prompt_ids, prompt_mask = padded([PROMPTS[n // 3] for n in range(len(parts))], "left")
    completion_ids, completion_mask = padded([ids for ids, _ in parts], "right")
    tool_mask, _ = padded([[int(x) for x in sampled] for _, sampled in parts], "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": tool_mask.sum(),
    }
    if batch.old_logp_T is not None:
        sampled = (completion_mask * tool_mask).bool()
        old = torch.zeros(completion_ids.shape).masked_scatter(sampled, batch.old_logp_T[batch.action_T])
        inputs["old_per_token_logps"] = old
    return inputs


def trl(case: Case, model: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> GRPOTrainer:
    kinds = (GMPOConfig, GMPOTrainer) if case.objective == "gmpo" else (GRPOConfig, GRPOTrainer)
    config = kinds[0](
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(LENGTHS),
        num_generations=3,
        max_completion_length=MAX_COMPLETION,
        temperature=TEMPERATURE,
        beta=0.0,
        **case.trl,
    )
    trainer = kinds[1](
        model=Qwen3ForCausalLM.from_pretrained(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(LENGTHS)}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # which its training loop would set
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("old", [True, False], ids=["later update", "first update"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(
    name: str, old: bool, model: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = Policy(load_model(model, torch.float32)).train()
    batch = our_batch(old, policy)
    our_loss, metrics = ours(CASES[name], policy, batch)
    our_loss.backward()
    if "clipped" in metrics:  # the bounds are put to the test
        assert 0 < metrics["clipped"].mean() < 1 if old else not metrics["clipped"].any()

    trainer = trl(CASES[name], model, tokenizer, tmp_path)
    their_loss = trainer._compute_loss(trainer.model, trl_inputs(batch))
    their_loss.backward()

    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    mine = {name: p.grad for name, p in policy.lm.named_parameters()}
    assert mine.keys() == theirs.keys()
    difference = torch.stack([(mine[name] - theirs[name]).norm() for name in mine]).norm()
    assert difference < 1e-4 * torch.stack([x.norm() for x in theirs.values()]).norm()


STEPS, RATE = 3, 0.1


@pytest.mark.parametrize("name", ["luspo", "vespo", "gmpo"])
def test_three_steps_end_where_those_of_trl_end(
    name: str, model: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Gradient descent on one rollout, with the log-probabilities of the policy that sampled it."""
    policy = Policy(load_model(model, torch.float32)).train()
    batch = our_batch(True, policy)
    trainer = trl(CASES[name], model, tokenizer, tmp_path)
    for _ in range(STEPS):
        our_loss, _ = ours(CASES[name], policy, batch)
        their_loss = trainer._compute_loss(trainer.model, trl_inputs(batch))
        assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-4)
        for lm, loss in ((policy.lm, our_loss), (trainer.model, their_loss)):
            for parameter, gradient in zip(lm.parameters(), torch.autograd.grad(loss, [*lm.parameters()]), strict=True):
                parameter.data -= RATE * gradient
    start = dict(load_model(model, torch.float32).named_parameters())
    theirs = dict(trainer.model.named_parameters())
    moved = torch.stack([(p - start[name]).norm() for name, p in theirs.items()]).norm()
    apart = torch.stack([(p - theirs[name]).norm() for name, p in policy.lm.named_parameters()]).norm()
    assert moved > 1e-3
    assert apart < 1e-4 * moved


def of_rollout(policy: Policy, spread: float, seed: int) -> Tensor:
    """The policy's log-probabilities, moved a little, at actions; 0 elsewhere."""
    batch = our_batch(True, policy)
    assert batch.old_logp_T is not None
    noise = spread * torch.randn(len(batch.labels_T), generator=torch.Generator().manual_seed(seed))
    return (batch.old_logp_T + noise) * batch.action_T


REQUIRED = f"""actor.model_name=m actor.max_length_per_device=64 train_data.path=x train_data.prompts_per_rollout=2
    train_data.responses_per_prompt=3 rollout.env_path=x trainer.experiment_name=x actor.tis_coef=0 actor.clip=0.2
    actor.kl.coef=0.3 actor.kl.estimator=k3 actor.update_per_rollout=2 actor.avg_level=sequence
    rollout.train_sampling_params.max_new_tokens={MAX_COMPLETION}
    rollout.train_sampling_params.temperature={TEMPERATURE}"""


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ((), {}),
        (("actor.kl.importance_weight=false",), {"use_bias_correction_kl": False}),
        (
            ("actor.select.entropy_quantile=0.5", "actor.regularize_on=all"),
            {"top_entropy_quantile": 0.5},
        ),
    ],
    ids=["corrected", "not corrected", "on all tokens"],
)
def test_the_kl_term_is_that_of_trl(
    settings: tuple[str, ...],
    theirs: dict[str, Any],
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    policy = Policy(load_model(model, torch.float32)).train()
    config = load("ppo", [*REQUIRED.split(), *settings]).actor
    request = StatsRequest(("logp", "entropy"), 0, TEMPERATURE)
    batch = our_batch(True, policy).with_(ref_logp_T=of_rollout(policy, 0.5, seed=3))
    stats = TokenStats(**policy(batch, batch.shared(), request))
    old_entropy_T = torch.zeros_like(batch.reward_T).masked_scatter(batch.action_T, stats.entropy.detach())
    batch = with_weights(batch.with_(old_entropy_T=old_entropy_T), config)
    actions = batch.positions(batch.action_T)
    our_loss = (total_loss(stats, actions, config, configured(config))[0] * actions.weight_T).sum()
    our_loss.backward()

    case = Case("ppo", {}, "sequence", {"loss_type": "grpo", "epsilon": 0.2, **theirs})
    trainer = trl(case, model, tokenizer, tmp_path)
    trainer.beta = 0.3  # given as a setting it would load a reference, of which only these numbers matter
    inputs = trl_inputs(batch)
    sampled = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    inputs["ref_per_token_logps"] = torch.zeros(sampled.shape).masked_scatter(sampled, batch.ref_logp_T[batch.action_T])
    their_loss = trainer._compute_loss(trainer.model, inputs)
    their_loss.backward()

    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    difference = torch.stack([(p.grad - expected[name]).norm() for name, p in policy.lm.named_parameters()]).norm()
    assert difference < 1e-4 * torch.stack([x.norm() for x in expected.values()]).norm()
