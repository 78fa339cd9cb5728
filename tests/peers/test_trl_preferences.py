"""Losses of preferences against TRL's classes: loss and gradients over three steps of gradient descent from one start.

TRL's trainers get padded batches; here responses are packed, and what two share is computed once. The reference is the
first policy, moved a little. ORPO's negative log-likelihood differs: TRL's is over prompt and response, here it is over
the response as in the paper. With prompts of one token, which nothing predicts, both are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from RL2.batch.packing import nll_factors, sequence_weights
from RL2.data.table import Ragged
from RL2.models.policy import Policy, load_model
from RL2.objectives.registry import PREFERENCES
from RL2.objectives.unpaired import bco
from RL2.trainer.supervised import Rows
from RL2.trainer.unpaired import Baseline, mismatch
from RL2.types import StatsRequest, TokenBatch, TokenStats

STEPS, BATCH, RATE = 3, 4, 0.05
OLDER_TRL = Path(sys.prefix) / "trl-1.12"
Found = list[tuple[float, dict[str, Tensor]]]
"""Loss and gradients of each step."""


@dataclass(frozen=True)
class Case:
    loss: str
    knobs: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)
    """Attributes of TRL's trainer."""


def dpo_case(loss: str, their: list[str], knobs: dict[str, Any] | None = None, **attributes: Any) -> Case:
    knobs = {"beta": 0.3} | (knobs or {})
    return Case(loss, knobs, {"loss_types": their, "loss_weights": [1.0] * len(their), "beta": 0.3} | attributes)


PAIRS = {
    "sigmoid": dpo_case("sigmoid", ["sigmoid"]),
    "ipo": dpo_case("ipo", ["ipo"]),
    "sigmoid_norm": dpo_case("sigmoid_norm", ["sigmoid_norm"]),
    "hinge": dpo_case("hinge", ["hinge"]),
    "robust": dpo_case("robust", ["robust"], {"label_smoothing": 0.2}, label_smoothing=0.2),
    "exo_pair": dpo_case("exo_pair", ["exo_pair"], {"label_smoothing": 0.01}, label_smoothing=0.01),
    "nca_pair": dpo_case("nca_pair", ["nca_pair"]),
    "bco_pair": dpo_case("bco_pair", ["bco_pair"]),
    "apo_zero": dpo_case("apo_zero", ["apo_zero"]),
    "apo_down": dpo_case("apo_down", ["apo_down"]),
    "RPO": dpo_case("sigmoid", ["sigmoid", "sft"], {"nll_coef": 0.7}, loss_weights=[1.0, 0.7]),
    "ld_alpha": dpo_case("sigmoid", ["sigmoid"], {"ld_alpha": 0.4}, ld_alpha=0.4),
    "forward KL": dpo_case("sigmoid", ["sigmoid"], {"divergence": "forward_kl"}, f_divergence_type="forward_kl"),
    "Jensen-Shannon": dpo_case("sigmoid", ["sigmoid"], {"divergence": "jsd"}, f_divergence_type="js_divergence"),
    "alpha": dpo_case(
        "sigmoid",
        ["sigmoid"],
        {"divergence": "alpha", "alpha": 0.3},
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.3,
    ),
}
CPO = {
    "cpo": Case("cpo", {"beta": 0.3, "label_smoothing": 0.1}, {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "simpo": Case("simpo", {"beta": 0.3, "gamma": 0.6}, {"loss_type": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0}),
    "CPO-SimPO": Case("simpo", {"beta": 0.3, "gamma": 0.6, "nll_coef": 0.5}, {"loss_type": "simpo", "cpo_alpha": 0.5}),
}
KTO = {
    "kto": Case(
        "kto",
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        {"desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    "apo_zero_unpaired": Case("apo_zero_unpaired", {"beta": 0.3}, {"calculate_KL": False}),
}


@dataclass(frozen=True)
class World:
    folder: Path
    tokenizer: PreTrainedTokenizerBase

    def options(self) -> dict[str, Any]:
        """Return the settings that all of TRL's trainers get."""
        folder = str(self.folder / "trl")
        batch = {"per_device_train_batch_size": BATCH, "beta": 0.3, "max_length": 128}
        return {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], **batch}

    def model(self, name: str = "policy") -> Qwen3ForCausalLM:
        return Qwen3ForCausalLM.from_pretrained(self.folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> World:
    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=320,
        intermediate_size=48,
        head_dim=8,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "reference")
    return World(folder, tokenizer)


def rows(prompt_lengths: tuple[int, int], per_row: int, good: list[bool] | None = None) -> Rows:
    """Ragged responses, of which those of a pair answer the same prompt."""
    g = np.random.default_rng(1)
    ids, trains = [], []
    for n in range(STEPS * BATCH * per_row):
        if n % per_row == 0:
            prompt = g.integers(3, 320, g.integers(prompt_lengths[0], prompt_lengths[1] + 1)).tolist()
        response = g.integers(3, 320, g.integers(1, 12)).tolist()
        ids.append(prompt + response)
        trains.append([False] * len(prompt) + [True] * len(response))
    return Rows(
        Ragged.from_rows(ids, np.int32),
        Ragged.from_rows(trains, np.bool_),
        per_row,
        good=None if good is None else np.array(good),
    )


def logps(policy: Policy, batch: TokenBatch) -> TokenStats:
    return TokenStats(**policy(batch, batch.shared(), StatsRequest(("logp",))))


def log_ratios(policy: Policy, reference: Policy, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        ratio_A = logps(policy, batch).logp - logps(reference, batch).logp
    sequence_A = batch.sequence_T[batch.action_T]
    return torch.zeros(batch.num_sequences).index_add(0, sequence_A, ratio_A)


def ours(case: Case, data: Rows, world: World) -> Found:
    policy = Policy(load_model(str(world.folder / "policy"), torch.float32)).train()
    reference = Policy(load_model(str(world.folder / "reference"), torch.float32)).eval()
    objective = PREFERENCES[case.loss]
    complete = Baseline(objective).completing(lambda batch: log_ratios(policy, reference, batch))
    found: Found = []
    for step in range(STEPS):
        drawn = list(range(step * BATCH, (step + 1) * BATCH))
        batch = data.draw(drawn)
        if objective.reference:
            with torch.no_grad():
                ref_A = logps(reference, batch).logp
            batch = batch.with_(ref_logp_T=torch.zeros_like(batch.reward_T).masked_scatter(batch.action_T, ref_A))
        batch = batch.with_(weight_T=sequence_weights(batch), nll_factor_T=nll_factors(batch))
        if objective.trains_on == "labels":
            batch = complete(batch, data, drawn, True)
        actions = batch.positions(batch.action_T)
        loss_T, _ = objective(logps(policy, batch), actions, **case.knobs)
        found.append(stepped((loss_T * actions.weight_T).sum(), policy.lm))
    return found


def stepped(loss: Tensor, model: torch.nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Take a step of gradient descent; return the loss and the gradients before it."""
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    return loss.item(), gradients


def padded(data: Rows, numbers: list[int], prefix: str = "") -> dict[str, Tensor]:
    """The sequences as TRL pads them, with the masks of the responses."""
    ids = [torch.from_numpy(data.ids[n].astype(np.int64)) for n in numbers]
    masks = [torch.from_numpy(data.trains[n].astype(np.int64)) for n in numbers]
    each = {"input_ids": ids, "attention_mask": [torch.ones_like(x) for x in ids], "completion_mask": masks}
    return {f"{prefix}{name}": pad_sequence(x, batch_first=True) for name, x in each.items()}


def theirs(case: Case, trainer: Any, inputs: Callable[[int], dict[str, Any]], world: World) -> Found:
    for name, value in case.trl.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    trainer.model.load_state_dict(world.model().state_dict())
    trainer.model.train()
    return [stepped(trainer.compute_loss(trainer.model, inputs(step)), trainer.model) for step in range(STEPS)]


def assert_same(mine: Found, peer: Found) -> None:
    for (loss, gradients), (their_loss, expected) in zip(mine, peer, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert gradients.keys() == expected.keys()
        difference = torch.stack([(gradients[name] - expected[name]).norm() for name in gradients]).norm()
        assert difference < 1e-4 * torch.stack([x.norm() for x in expected.values()]).norm()
    assert mine[0][0] != pytest.approx(mine[2][0], rel=1e-3)  # the steps were steps


def texts(**columns: Any) -> Dataset:
    """Rows that a trainer is made with; it is then given other batches."""
    return Dataset.from_dict({name: [value] * BATCH for name, value in columns.items()})


@pytest.fixture(scope="module")
def dpo_trainer(world: World) -> DPOTrainer:
    data = texts(prompt="a", chosen=" b", rejected=" c")
    given = {"args": DPOConfig(**world.options()), "train_dataset": data, "processing_class": world.tokenizer}
    return DPOTrainer(model=world.model(), ref_model=world.model("reference"), **given)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_on_pairs(name: str, world: World, dpo_trainer: DPOTrainer) -> None:
    data = rows((2, 6), per_row=2)
    plain = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0}
    case = Case(PAIRS[name].loss, PAIRS[name].knobs, plain | PAIRS[name].trl)

    def inputs(step: int) -> dict[str, Tensor]:
        first = 2 * step * BATCH
        numbers = range(first, first + 2 * BATCH)
        return padded(data, [*numbers[::2], *numbers[1::2]])

    assert_same(ours(case, data, world), theirs(case, dpo_trainer, inputs, world))


def by_side(data: Rows) -> Callable[[int], dict[str, Tensor]]:
    def inputs(step: int) -> dict[str, Tensor]:
        found = {}
        for place, side in enumerate(("chosen", "rejected")):
            numbers = [2 * n + place for n in range(step * BATCH, (step + 1) * BATCH)]
            each = padded(data, numbers, f"{side}_")
            mask = each.pop(f"{side}_completion_mask")
            found |= each | {f"{side}_labels": each[f"{side}_input_ids"].masked_fill(mask == 0, -100)}
        return found

    return inputs


@pytest.fixture(scope="module")
def cpo_trainer(world: World) -> CPOTrainer:
    data = texts(prompt="a", chosen=" b", rejected=" c")
    args = CPOConfig(**world.options(), loss_type="simpo", cpo_alpha=1.0)
    return CPOTrainer(model=world.model(), args=args, train_dataset=data, processing_class=world.tokenizer)


@pytest.mark.parametrize("name", CPO)
def test_losses_without_a_reference(name: str, world: World, cpo_trainer: CPOTrainer) -> None:
    data = rows((2, 6), per_row=2)
    case = Case(CPO[name].loss, CPO[name].knobs, {"label_smoothing": 0.0, "cpo_alpha": 1.0} | CPO[name].trl)
    assert_same(ours(case, data, world), theirs(case, cpo_trainer, by_side(data), world))


def test_orpo(world: World) -> None:
    data = rows((1, 1), per_row=2)
    args, pairs = ORPOConfig(**world.options()), texts(prompt="a", chosen=" b", rejected=" c")
    trainer = ORPOTrainer(model=world.model(), args=args, train_dataset=pairs, processing_class=world.tokenizer)
    case = Case("orpo", {"beta": 0.3})
    assert_same(ours(case, data, world), theirs(case, trainer, by_side(data), world))


@pytest.mark.parametrize("name", KTO)
def test_losses_on_single_responses(name: str, world: World) -> None:
    good = [True, False, True, True, False, False, False, True, True, True, False, True]
    data = rows((2, 6), per_row=1, good=good)
    data = Rows(data.ids, data.trains, 1, good=data.good, mismatched=mismatch(data, BATCH, "rows"))
    args = KTOConfig(**world.options(), loss_type=name)
    labelled = {"prompt": ["a"] * 4, "completion": [" b", " c"] * 2, "label": [True, False] * 2}
    given = {"args": args, "train_dataset": Dataset.from_dict(labelled), "processing_class": world.tokenizer}
    trainer = KTOTrainer(model=world.model(), ref_model=world.model("reference"), **given)

    def inputs(step: int) -> dict[str, Tensor]:
        numbers = list(range(step * BATCH, (step + 1) * BATCH))
        assert data.mismatched is not None
        others = padded(data.mismatched, numbers, "KL_") if name == "kto" else {}
        return padded(data, numbers) | others | {"label": torch.tensor([good[n] for n in numbers])}

    assert_same(ours(KTO[name], data, world), theirs(KTO[name], trainer, inputs, world))


OLDER = """
import json, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
state = SimpleNamespace(beta=0.3, running=RunningMoments(Accelerator(cpu=True)), match_underlying_distribution=False)
for logp, ref, good in json.loads(sys.argv[1]):
    logp, ref, good = torch.tensor(logp, requires_grad=True), torch.tensor(ref), torch.tensor(good)
    losses = BCOTrainer.bco_loss(state, logp[good], logp[~good], ref[good], ref[~good], None, None)[0]
    losses.nanmean().backward()
    print(json.dumps([losses.nanmean().item(), logp.grad.tolist()]))
"""
"""TRL took BCO out after 1.12, which `make setup` puts into a folder of its own."""


def test_bco() -> None:
    g = torch.Generator().manual_seed(0)
    good_B = torch.tensor([True, False, False, True])
    steps = [(-9 * torch.rand(4, generator=g), -9 * torch.rand(4, generator=g)) for _ in range(STEPS)]
    told = json.dumps([[logp.tolist(), ref.tolist(), good_B.tolist()] for logp, ref in steps])
    path = os.pathsep.join(filter(None, [str(OLDER_TRL), os.environ.get("PYTHONPATH")]))
    command, env = [sys.executable, "-c", OLDER, told], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    one = Ragged.from_rows([[1, 2]] * 4, np.int32), Ragged.from_rows([[False, True]] * 4, np.bool_)
    data, state = Rows(*one, 1, good=good_B.numpy()), {"h": torch.zeros(4)}
    complete = Baseline(bco).completing(lambda batch: state["h"])
    for (logp, ref), (loss, gradient) in zip(steps, expected, strict=True):
        batch, state["h"] = data.draw(range(4)), logp - ref
        batch = complete(batch.with_(weight_T=sequence_weights(batch), ref_logp_T=ref), data, [0, 1, 2, 3], True)
        logp_T = logp.clone().requires_grad_()
        loss_T, _ = bco(TokenStats(logp=logp_T), batch, beta=0.3)
        mine = (loss_T * batch.weight_T).sum()
        mine.backward()
        assert mine.item() == pytest.approx(loss, rel=1e-5)
        assert logp_T.grad is not None
        assert logp_T.grad.tolist() == pytest.approx(gradient, rel=1e-4)
    assert len(expected) == STEPS
