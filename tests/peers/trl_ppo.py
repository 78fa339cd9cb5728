"""PPO with a critic against TRL's PPOTrainer: advantages, losses and weights over steps on one rollout.

Run by test_trl_ppo.py, with a TRL that has one. Its loop trains for real; only the responses are given to it, so that
both see the same tokens.

Where a response ends by itself, TRL gives it one more step. The reward stands at the token after the end, whose value
(what the critic says having read the end token) is part of GAE and of the value loss, not of the policy loss. Here
the reward stands at the end token, after which there is nothing. So for the comparison such a sequence gets one more
token, which is an action for the critic alone. TRL trains both models with one optimizer on the sum of the losses;
Adam does not see the scale of a gradient, and nothing is clipped, so two optimizers do the same.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from RL2.batch.advantages import gae, whitened
from RL2.batch.packing import loss_weights, pack
from RL2.config.load import load
from RL2.config.programs import RLConfig
from RL2.models.value import VALUE
from RL2.objectives.loss import kl_estimate
from RL2.objectives.value import clipped_value
from RL2.parallel.processes import Processes
from RL2.trainer.annotate import annotate
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor, RefActor
from RL2.workers.critic import Critic

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17, 18]]
LENGTH, STEPS, TEMPERATURE, LR = 10, 4, 0.8, 1e-3
GAMMA, LAMDA, CLIP, VALUE_CLIP, KL = 0.98, 0.9, 0.05, 0.02, 0.1
PAD, END = 0, 2
ENDS = (3, LENGTH - 1, 5, None)
"""Where the end token stands in each response that ends by itself; in the last place there is no room for more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=320, intermediate_size=48, head_dim=8, initializer_range=0.2, **shape)
    classifier = Qwen3Config.from_dict(config.to_dict() | {"num_labels": 1, "pad_token_id": PAD})
    for seed, (name, kind) in enumerate(
        {
            "policy": Qwen3ForCausalLM,
            "reference": Qwen3ForCausalLM,
            "value": Qwen3ForSequenceClassification,
            "reward": Qwen3ForSequenceClassification,
        }.items()
    ):
        torch.manual_seed(seed)
        kind(config if kind is Qwen3ForCausalLM else classifier).save_pretrained(folder / name)
    return folder


def responses(end: bool) -> list[list[int]]:
    """Of `LENGTH` tokens each, with an end token somewhere or none."""
    g = torch.Generator().manual_seed(1)
    found = [torch.randint(3, 320, (LENGTH,), generator=g).tolist() for _ in PROMPTS]
    for response, place in zip(found, ENDS, strict=True):
        if end and place is not None:
            response[place] = END
    return found


def theirs(folder: Path, end: bool, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer after its steps, with raw and white advantages by prompt."""
    args = PPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(PROMPTS),
        num_ppo_epochs=STEPS,
        num_mini_batches=1,
        total_episodes=len(PROMPTS),
        response_length=LENGTH,
        stop_token_id=END if end else None,
        temperature=TEMPERATURE,
        learning_rate=LR,
        gamma=GAMMA,
        lam=LAMDA,
        cliprange=CLIP,
        cliprange_value=VALUE_CLIP,
        vf_coef=1.0,
        kl_coef=KL,
        kl_estimator="k1",
        whiten_rewards=False,
        missing_eos_penalty=None,
        num_sample_generations=0,
        save_strategy="no",
    )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=Qwen3ForCausalLM.from_pretrained(folder / "policy"),
        ref_model=Qwen3ForCausalLM.from_pretrained(folder / "reference"),
        reward_model=Qwen3ForSequenceClassification.from_pretrained(folder / "reward"),
        value_model=Qwen3ForSequenceClassification.from_pretrained(folder / "value"),
        train_dataset=Dataset.from_dict({"input_ids": PROMPTS}),
    )
    given = {tuple(prompt): response for prompt, response in zip(PROMPTS, responses(end), strict=True)}
    seen: dict[str, Any] = {}

    def generation(model: Any, queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        seen["prompts"] = [tuple(t for t in row if t != PAD) for row in queries.tolist()]
        whole = torch.cat([queries, torch.tensor([given[prompt] for prompt in seen["prompts"]])], 1)
        logits = ppo_trainer.forward(model, whole, PAD).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / (TEMPERATURE + 1e-7)

    def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        white = original(values, mask, shift_mean)
        seen.update(raw=values, white=white, mask=mask)
        return white

    original = ppo_trainer.masked_whiten
    monkeypatch.setattr(ppo_trainer, "batch_generation", generation)
    monkeypatch.setattr(ppo_trainer, "masked_whiten", whiten)
    trainer.train()
    order = [seen["prompts"].index(tuple(prompt)) for prompt in PROMPTS]
    for name in ("raw", "white"):
        seen[name] = torch.cat([seen[name][i][seen["mask"][i]] for i in order])
    return trainer, seen


def config(folder: Path) -> RLConfig:
    overrides = f"""actor.model_name={folder}/policy ref_actor.model_name={folder}/reference
        critic.model_name={folder}/value actor.max_length_per_device=1000 actor.dtype=float32 actor.lr={LR}
        actor.weight_decay=0 actor.max_grad_norm=1e9 actor.warmup_ratio=0 actor.clip={CLIP} actor.tis_coef=0
        actor.kl.coef={KL} actor.kl.type=reward actor.kl.estimator=k1 actor.update_per_rollout=2
        critic.lr={LR} critic.weight_decay=0 critic.max_grad_norm=1e9 critic.warmup_ratio=0 critic.clip={VALUE_CLIP}
        adv.estimator=gae adv.gamma={GAMMA} adv.lamda={LAMDA} adv.global_norm=true adv.norm_var=true
        train_data.path=x.jsonl train_data.prompts_per_rollout=4 rollout.env_path=x.py
        rollout.train_sampling_params.max_new_tokens={LENGTH} rollout.train_sampling_params.temperature={TEMPERATURE}
        trainer.experiment_name=x"""
    return load("ppo", overrides.split())


def rollout(folder: Path, end: bool) -> tuple[TokenBatch, Tensor]:
    """What the critic learns from, and which of its actions are the policy's."""
    reward_model = Qwen3ForSequenceClassification.from_pretrained(folder / "reward").eval()
    trajectories, sampled = [], []
    for n, (prompt, response) in enumerate(zip(PROMPTS, responses(end), strict=True)):
        place = ENDS[n] if end else None
        kept = response if place is None else response[: place + 1]
        ids = prompt + kept
        with torch.no_grad():
            hidden = reward_model.model(torch.tensor([ids])).last_hidden_state
            reward = float(reward_model.score(hidden)[0, -1, 0])
        mask, policy = [False] * len(prompt) + [True] * len(kept), [True] * len(kept)
        if len(kept) < LENGTH:  # the step after the end
            ids, mask, policy = [*ids, PAD], [*mask, True], [*policy, False]
        zeros = [0.0] * len(ids)
        trajectories.append(Trajectory(n, n, 0, [Sequence(ids, mask, zeros, [*zeros[1:], reward])]))
        sampled += policy
    batch = pack(trajectories)
    sampled_T = torch.zeros_like(batch.action_T)
    sampled_T[batch.action_T] = torch.tensor(sampled)
    return batch, sampled_T


def weights(batch: TokenBatch) -> TokenBatch:
    return batch.with_(weight_T=loss_weights(batch, train_on="all", level="token", average_over="all"))


@pytest.mark.parametrize("end", [False, True], ids=["of full length", "that end"])
def test_ppo_is_that_of_trl(
    end: bool,
    folder: Path,
    processes: Processes,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(folder)
    actor = Actor(settings.actor, processes, 100, tmp_path)
    critic = Critic(settings.critic, processes, 100, tmp_path)
    ref_actor = RefActor(settings.ref_actor, settings.actor, actor.mesh, processes)
    batch, sampled_T = rollout(folder, end)

    value_T = critic.values(batch)
    policy_batch = batch.with_(action_T=sampled_T)
    old_T, ref_T = actor.add_old_logprobs(policy_batch).old_logp_T, ref_actor.logp(policy_batch)
    assert old_T is not None
    reward_T = batch.reward_T - KL * kl_estimate(old_T, ref_T, "k1")
    raw_T = gae(batch.with_(reward_T=reward_T, value_T=value_T), gamma=GAMMA, lamda=LAMDA)
    white_T = whitened(policy_batch, raw_T, global_norm=True, norm_var=True)
    if not end:  # then this is what the loop does
        judged = annotate(batch, (), config=settings, actor=actor, reference=ref_actor, critic=critic)
        assert judged.advantage_T is not None
        torch.testing.assert_close(judged.advantage_T, white_T)

    trainer, seen = theirs(folder, end, tokenizer, monkeypatch)
    torch.testing.assert_close(raw_T[sampled_T], seen["raw"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(white_T[sampled_T], seen["white"], rtol=1e-4, atol=1e-5)

    learns = weights(batch.with_(value_T=value_T, return_T=raw_T + value_T))
    acts = weights(policy_batch.with_(advantage_T=white_T, old_logp_T=old_T))
    loss = partial(clipped_value, clip=VALUE_CLIP)
    value_steps = [critic.step(learns, loss, VALUE) for _ in range(STEPS)]
    policy_steps = [actor.step(acts, actor.loss, actor.request) for _ in range(STEPS)]
    log = trainer.state.log_history[0]
    for steps, names in (
        (value_steps, {"loss": "loss/value_avg", "clipped": "val/clipfrac_avg"}),
        (policy_steps, {"loss": "loss/policy_avg", "clipped": "policy/clipfrac_avg"}),
    ):
        for ours, name in names.items():
            assert sum(step[ours] for step in steps) / STEPS == pytest.approx(log[name], rel=1e-4), name
        assert steps[-1]["clipped"] > 0  # the bounds are put to the test

    model = trainer.accelerator.unwrap_model(trainer.model)
    for learner, other in ((actor, model.policy), (critic, model.value_model)):
        for name, weight in other.named_parameters():
            assert (learner.lm.get_parameter(name) - weight).norm() < 1e-4 * weight.norm(), name
