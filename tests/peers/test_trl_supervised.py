"""SFT, reward models and DPO against TRL: five optimizer steps on the same model, texts and order, end to end.

Both sides read the same rows of text and their own tokenization of them, which is compared too. TRL pads, and its loss
is a mean over the batch; here pairs are packed, what they share is computed once, and the weights make the mean. The
optimizers are set alike: AdamW, which spares norms from weight decay on both sides, and clipping at the same norm.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from RL2.batch.packing import loss_weights, pack, sequence_weights
from RL2.config.load import load
from RL2.data.preference import load_pairs
from RL2.data.sft import load_examples
from RL2.models.value import VALUE, ValueModel
from RL2.objectives.likelihood import dft
from RL2.objectives.objective import Objective
from RL2.objectives.preference import bradley_terry, dpo, ipo
from RL2.objectives.spo import cross_entropy
from RL2.parallel.processes import Processes
from RL2.trainer.dpo_loop import with_reference
from RL2.trainer.supervised import Rows
from RL2.types import StatsRequest
from RL2.workers.learner import Learner

STEPS, BATCH, BETA = 5, 4, 0.2
RATE, DECAY, NORM = 2e-3, 0.1, 1.0
Answers = list[dict[str, float]]
"""Loss and metrics of each step, before it."""


def words(rng: random.Random, number: int) -> str:
    return "".join(f" {rng.choice(['apples', 'books', 'many', 'are', 'left', 'how', 'Tom'])}" for _ in range(number))


def texts(two: bool) -> list[dict[str, str]]:
    """Ragged rows. Responses begin with a blank, so that no token lies across their beginning: TRL encodes prompt and
    response in one, RL2 apart."""
    rng = random.Random(0)
    responses = ("chosen", "rejected") if two else ("completion",)
    return [
        {"prompt": f"Anna{words(rng, rng.randint(1, 15))}?"}
        | {side: words(rng, rng.randint(1, 25)) + "." for side in responses}
        for _ in range(STEPS * BATCH)
    ]


@dataclass(frozen=True)
class World:
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    processes: Processes

    def rows(self, two: bool) -> str:
        file = self.folder / f"{'pairs' if two else 'sft'}.jsonl"
        # the same rows under the names of RL2
        lines = [{("response" if k == "completion" else k): v for k, v in row.items()} for row in texts(two)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(file)

    def learner(self, program: str, *overrides: str) -> tuple[Any, Learner]:
        group = "critic" if program == "rm" else "actor"
        model = self.folder / ("value" if program == "rm" else "causal")
        given = f"""{group}.model_name={model} {group}.max_length_per_device=512 {group}.lr={RATE}
            {group}.scheduler=constant {group}.weight_decay={DECAY} {group}.max_grad_norm={NORM} data.path=x.jsonl
            data.max_length=128 data.batch_size={BATCH} trainer.experiment_name=x"""
        config = load(program, [*given.split(), *overrides])
        if program == "rm":
            args = config.critic, self.processes, STEPS, self.folder, "critic", ValueModel
            return config, Learner(*args)
        return config, Learner(config.actor, self.processes, STEPS, self.folder)

    @property
    def trl(self) -> dict[str, Any]:
        """Return the settings that all of TRL's trainers get."""
        return {
            "output_dir": str(self.folder / "trl"),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": DECAY,
            "max_grad_norm": NORM,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "max_length": 128,
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Any:
    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=320,
        intermediate_size=48,
        head_dim=8,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "causal")
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "value")
    processes = Processes.start(timeout_s=60)
    yield World(folder, tokenizer, processes)
    processes.stop()


class InOrder:
    """For a trainer of TRL: rows in order, and the answers of its steps unrounded."""

    answers: Answers

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        metrics = {name: values[-1] for name, values in self._metrics["train"].items()}  # type: ignore[attr-defined]
        self.answers.append({"loss": loss.item(), **metrics})
        return loss


class InOrderSFT(InOrder, SFTTrainer):
    pass


class InOrderReward(InOrder, RewardTrainer):
    pass


class InOrderDPO(InOrder, DPOTrainer):
    pass


def theirs(trainer: Any) -> Answers:
    trainer.answers = []
    trainer.train()
    assert len(trainer.answers) == STEPS
    return trainer.answers


def assert_same_weights(learner: Learner, trainer: Any, start: Path) -> None:
    """How far five steps came apart, against how far they went."""
    ours, before = dict(learner.weights()), load_file(start / "model.safetensors")
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        went = (weight - before[name]).norm()
        assert went > 0, name
        assert (ours[name] - weight).norm() <= 1e-2 * went, name


@pytest.mark.parametrize(("loss", "objective"), [("nll", cross_entropy), ("dft", dft)], ids=["nll", "dft"])
def test_sft(loss: str, objective: Objective, world: World) -> None:
    examples, _ = load_examples(world.rows(two=False), world.tokenizer, None, 128)
    _, learner = world.learner("sft")
    ours: Answers = []
    for step in range(STEPS):
        batch = pack(examples[step * BATCH : (step + 1) * BATCH])
        weight_T = loss_weights(batch, train_on="all", level="token", average_over="all")
        ours.append(learner.step(batch.with_(weight_T=weight_T), objective, StatsRequest(("logp",))))

    trainer = InOrderSFT(
        model=AutoModelForCausalLM.from_pretrained(world.folder / "causal"),
        args=SFTConfig(completion_only_loss=True, loss_type=loss, **world.trl),
        train_dataset=Dataset.from_list(texts(two=False)),
        processing_class=world.tokenizer,
    )
    assert [row["input_ids"] for row in trainer.train_dataset] == [e.sequences[0].token_ids.tolist() for e in examples]
    for mine, peer in zip(ours, theirs(trainer), strict=True):
        assert mine["loss"] == pytest.approx(peer["loss"], rel=1e-4)
    if loss == "nll":  # -p log p also rises as p leaves 0
        assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]
    assert_same_weights(learner, trainer, world.folder / "causal")


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_rm(center: float, world: World) -> None:
    pairs, _ = load_pairs(world.rows(two=True), world.tokenizer, None, 128)
    config, learner = world.learner("rm", f"critic.center_coef={center}")
    loss = partial(bradley_terry, center_coef=config.critic.center_coef)
    data = Rows(pairs.ids, pairs.trains, per_row=2, scored=True)
    ours: Answers = []
    for step in range(STEPS):
        batch = data.draw(list(range(step * BATCH, (step + 1) * BATCH)))
        ours.append(learner.step(batch.with_(weight_T=sequence_weights(batch)), loss, VALUE))

    trainer = InOrderReward(
        model=AutoModelForSequenceClassification.from_pretrained(world.folder / "value"),
        args=RewardConfig(center_rewards_coefficient=center or None, **world.trl),
        train_dataset=Dataset.from_list(texts(two=True)),
        processing_class=world.tokenizer,
    )
    for row, (chosen, rejected) in zip(trainer.train_dataset, pairs, strict=True):
        assert (row["chosen_ids"], row["rejected_ids"]) == (chosen[0], rejected[0])
    for mine, peer in zip(ours, theirs(trainer), strict=True):
        assert mine["loss"] == pytest.approx(peer["loss"], rel=1e-4)
        assert mine["margin"] == pytest.approx(peer["margin"], rel=1e-4, abs=1e-5)
        assert mine["accuracy"] == peer["accuracy"]
    assert_same_weights(learner, trainer, world.folder / "value")


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo(loss: str, world: World) -> None:
    # TRL has no label smoothing of this kind: its `robust` loss divides by 1 - 2 e besides, which is a scale
    pairs, _ = load_pairs(world.rows(two=True), world.tokenizer, None, 128)
    config, learner = world.learner("dpo", f"actor.loss={loss}", f"actor.beta={BETA}")
    data = with_reference(Rows(pairs.ids, pairs.trains, per_row=2), config, world.processes)
    function = partial(dpo if loss == "sigmoid" else ipo, beta=BETA)
    ours: Answers = []
    for step in range(STEPS):
        batch = data.draw(list(range(step * BATCH, (step + 1) * BATCH)))
        batch = batch.with_(weight_T=sequence_weights(batch))
        ours.append(learner.step(batch, function, StatsRequest(("logp",))))

    trainer = InOrderDPO(
        model=AutoModelForCausalLM.from_pretrained(world.folder / "causal"),
        ref_model=AutoModelForCausalLM.from_pretrained(world.folder / "causal"),
        args=DPOConfig(loss_type=[loss], beta=BETA, **world.trl),
        train_dataset=Dataset.from_list(texts(two=True)),
        processing_class=world.tokenizer,
    )
    for row, (chosen, rejected) in zip(trainer.train_dataset, pairs, strict=True):
        assert (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) == (
            chosen[0],
            rejected[0],
        )
    names = {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
    }
    for step, (mine, peer) in enumerate(zip(ours, theirs(trainer), strict=True)):
        assert mine["loss"] == pytest.approx(peer["loss"], rel=1e-4)
        for name, their_name in names.items():
            # before the first step all rewards are 0 but for rounding, and which is larger is chance
            if step > 0:
                assert mine[name] == pytest.approx(peer[their_name], rel=1e-4, abs=2e-5), (step, name)
            elif name != "accuracy":
                assert mine[name] == pytest.approx(peer[their_name], abs=2e-5), name
    assert abs(ours[-1]["reward_chosen"]) > 0.1
    assert_same_weights(learner, trainer, world.folder / "causal")
