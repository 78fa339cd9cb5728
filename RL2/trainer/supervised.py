"""The loop of `sft`, `rm` and `dpo`: they differ in what a row is, what is minimised and how it is weighed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import pack_arrays
from RL2.config.data import SupervisedData
from RL2.config.model import times_sp
from RL2.config.programs import DPOConfig, RMConfig, SFTConfig, trained
from RL2.data.bad_rows import BadRows
from RL2.data.cursor import Cursor
from RL2.data.preference import SIDES, load_pairs
from RL2.data.sft import pieces
from RL2.data.source import DataError, Row, with_columns
from RL2.data.table import Ragged
from RL2.data.template import Template
from RL2.errors import ConfigError, naming
from RL2.io.progress import Progress
from RL2.io.report import NUM_SHOWN, Metrics, Report
from RL2.models.policy import refuse_unknown_tokens, rotary_limit
from RL2.objectives.registry import preference
from RL2.rollout.environment import load_example
from RL2.trainer.announce import describe_supervised_plan
from RL2.trainer.inputs import evenly_spaced, of_tensors
from RL2.trainer.run import Run
from RL2.types import StatsRequest, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.metrics import LossFunction


@dataclass(frozen=True)
class Rows:
    """Rows of a data set, which may be in files: each is one sequence, or the two of a pair."""

    ids: Ragged
    """Token ids of all sequences."""
    trains: Ragged
    """Marks of the tokens that are actions."""
    per_row: int
    scored: bool = False
    """True: the only action of a sequence comes after its last token; there a reward model has read all of it."""
    ref_logp: Ragged | None = None
    """Log-probabilities of a reference, at every position of every sequence."""
    chosen: np.ndarray | None = None
    """Numbers of these rows in the data set; None: all."""
    good: np.ndarray | None = None
    """bool: label of each response of the data set, where the rows are no pairs."""
    mismatched: Rows | None = None
    """The same prompts with responses to other ones, which the baseline of KTO is estimated from."""

    def __len__(self) -> int:
        return len(self.ids) // self.per_row if self.chosen is None else len(self.chosen)

    def draw(self, rows: Seq[int]) -> TokenBatch:
        """Return the sequences of `rows` as a batch; a row that comes twice is two groups."""
        numbers = self.sequences(rows)
        ids, actions = [self.ids[n] for n in numbers], [self.trains[n] for n in numbers]
        if self.scored:  # the label of that action is a token that nothing reads
            ids = [np.append(each, each[-1]) for each in ids]
            actions = [np.append(np.zeros(len(each), bool), True) for each in actions]
        rewards = [float(self.is_good(n)) for n in numbers]
        groups = [place // self.per_row for place in range(len(numbers))]
        batch = pack_arrays(ids, actions, rewards, groups)
        if self.ref_logp is None:
            return batch
        return batch.with_(ref_logp_T=torch.from_numpy(np.concatenate([self.ref_logp[n] for n in numbers])))

    def is_good(self, number: int) -> bool:
        """Return whether sequence `number` is the chosen one of a pair, or a good response."""
        return bool(self.per_row == 2 and number % 2 == 0 if self.good is None else self.good[number])

    def subset(self, rows: Seq[int]) -> Rows:
        chosen = np.array(rows) if self.chosen is None else self.chosen[rows]
        others = None if self.mismatched is None else self.mismatched.subset(rows)
        return replace(self, chosen=chosen, mismatched=others)

    @property
    def lengths_B(self) -> torch.Tensor:
        """Return the number of positions of each sequence, int64."""
        lengths = self.ids.lengths if self.chosen is None else self.ids.lengths[self.sequences(range(len(self)))]
        return torch.from_numpy(lengths - 1 + self.scored)

    @property
    def largest_token_id(self) -> int:
        """Return the largest token id of the data set."""
        return int(self.ids.values.max(initial=-1))

    def sequences(self, rows: Seq[int]) -> np.ndarray:
        """Return the numbers of the sequences of `rows`."""
        numbers = np.asarray(rows, np.int64) if self.chosen is None else self.chosen[np.asarray(rows, np.int64)]
        return (self.per_row * numbers[:, None] + np.arange(self.per_row)).reshape(-1)


Complete = Callable[[TokenBatch, Rows, list[int], bool], TokenBatch]


@dataclass(frozen=True)
class SupervisedTask:
    """Everything that `fit` needs: learner, rows, loss and weights."""

    name: str
    """Name of the model, the prefix of its metrics."""
    learner: Learner
    train: Rows
    test: Rows | None
    weights: Callable[[TokenBatch], torch.Tensor]
    """Function that gives weight_T of a global minibatch."""
    loss: LossFunction
    request: StatsRequest
    complete: Complete = lambda batch, rows, drawn, training: batch
    """Function that adds what a loss reads besides, to the minibatch of the rows `drawn`, in training or in a test."""

    def minibatch(self, rows: Rows, drawn: list[int], *, training: bool) -> TokenBatch:
        """Return the rows `drawn` as a global minibatch, with its weights."""
        batch = rows.draw(drawn)
        return self.complete(batch.with_(weight_T=self.weights(batch)), rows, drawn, training)


def fit(task: SupervisedTask, cursor: Cursor, num_steps: int, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Take one optimizer step on every batch of the cursor."""
    trainer, learner = run.config, task.learner
    for rows in filter(None, (task.train, task.test)):
        with naming(f"{task.name}.model_name"):
            refuse_unknown_tokens(learner.lm, [rows.largest_token_id])
    run.know_rows({name: of_rows(rows) for name, rows in (("data", task.train), ("test data", task.test)) if rows})
    report = run.report(num_steps)
    run.closing.callback(report.close)
    report.first_rows(first_rows(task.train, tokenizer))
    first_step = run.resume(learner, cursor, report)
    what = "pairs" if task.train.per_row == 2 else "examples" if task.train.good is None else "responses"
    tokens = float(task.train.lengths_B.sum()) / len(task.train)
    report.say(describe_supervised_plan(cursor.batch_size, what, tokens, trainer, first_step, num_steps))
    report.begin(first_step)

    for step in range(first_step, num_steps):
        start = time.perf_counter()
        metrics = test(task, report, step) if run.due(trainer.test_freq, step) else {}
        batch = task.minibatch(task.train, cursor.next(), training=True)
        with report.progress.phase(f"update of step {step}", batch.num_sequences, "sequences") as phase:
            updated = learner.step(batch, task.loss, task.request, phase.update)
        if task.train.per_row == 2:
            updated["pairs"] = updated.pop("tokens") / 2
        elif task.train.good is not None:
            updated["responses"] = updated.pop("tokens")
        metrics |= {f"{task.name}/{name}": value for name, value in updated.items()}
        seconds = time.perf_counter() - start
        times = {"time/step_s": seconds, "time/tokens_per_s": len(batch.token_ids_T) / seconds}
        report.step(step, metrics | times)
        run.save_if_due(step + 1, learner, cursor, tokenizer)

    if trainer.test_freq is not None:
        report.step(num_steps, test(task, report, num_steps))
    run.export(learner, tokenizer)


def first_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the texts of the first `NUM_SHOWN` rows, with what trains marked."""
    found = []
    for place, n in enumerate(rows.sequences(range(min(NUM_SHOWN, len(rows))))):
        token_ids = rows.ids[n].tolist()
        # a score is taken at the last token
        trains = [False] * (len(token_ids) - 1) + [True] if rows.scored else rows.trains[n].tolist()
        side = f", {SIDES[place % 2]}" if rows.per_row == 2 else ""
        if rows.good is not None:
            side = f", {'good' if rows.good[n] else 'bad'}"
        name = f"row {place // rows.per_row + 1} of those that train{side}"
        found.append({"name": name, "pieces": pieces(tokenizer, token_ids, trains)})
    return found


def of_rows(rows: Rows) -> str:
    """Return the number of rows and a digest of a part of them."""
    batch = rows.draw(evenly_spaced(len(rows)))
    return of_tensors(len(rows), {"token_ids": batch.token_ids_T, "action": batch.action_T, "cut": batch.cu_seqlens})


def test(task: SupervisedTask, report: Report, step: int) -> Metrics:
    """Return loss and metrics of the current weights on the whole test set."""
    assert task.test is not None
    batch = task.minibatch(task.test, list(range(len(task.test))), training=False)
    with report.progress.phase(f"test before step {step}", batch.num_sequences, "sequences") as phase:
        found = task.learner.measure(batch, task.loss, task.request, phase.update)
    return {f"test/{name}": value for name, value in found.items()}


def bad_rows(data: SupervisedData, path: str) -> BadRows:
    return BadRows(path, skip=data.on_bad_row == "skip", key="data.on_bad_row")


def converter(data: SupervisedData) -> Callable[[Row], Row | None] | None:
    """Return the function that turns raw rows into a known format, by `columns` and the script's `example`; or None."""
    return with_columns(data.columns, load_example(data.env_path) if data.env_path else None)


def pairs_reader(
    config: RMConfig | DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
    listing: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[str], Rows]:
    """Return a function that reads the pairs of a path, and notes on them; it lists skipped rows in `listing`."""
    data, example, template = config.data, converter(config.data), Template(tokenizer)

    def read(path: str) -> Rows:
        said, bad = list[str](), bad_rows(data, path)
        pairs, num_left_out = load_pairs(path, tokenizer, example, data.max_length, said, bad, progress, template)
        left_out = f"{num_left_out} left out (data.max_length={data.max_length} tokens)"
        notes.extend([f"{path}: {len(pairs)} pairs, {left_out}", *said, *bad.notes(listing)])
        rows = Rows(pairs.ids, pairs.trains, per_row=2, scored=isinstance(config, RMConfig))
        refuse_long(config, rows, path)
        return rows

    return read


def reads_reference(config: DPOConfig) -> bool:
    """Return whether the loss compares the policy with a reference, which is loaded only then."""
    return preference(config.actor).objective.reference and not config.actor.reference_free


def refuse_long(config: SFTConfig | RMConfig | DPOConfig, rows: Rows, path: str) -> None:
    """Raise DataError if a row of `path` does not fit into a microbatch: a row is never cut in two, nor a pair.

    Nor may it be so long that it would change the rotary frequencies of the rows beside it.
    """
    group, model = trained(config)
    length_B = rows.lengths_B
    with naming(f"{group}.model_name"):
        limit = rotary_limit(model.model_name)
    if limit is not None and int(length_B.max()) > limit:
        raise DataError(
            f"{path}: a row has {int(length_B.max()) + 1} tokens, and beyond {limit} {group}.model_name="
            f"{model.model_name} chooses its rotary frequencies by the longest row of a batch, which is not supported; "
            f"lower data.max_length={config.data.max_length} to {limit}"
        )
    limits = [(f"{group}.max_length_per_device", model.max_length_per_device, length_B.view(-1, rows.per_row).sum(1))]
    if isinstance(config, DPOConfig) and reads_reference(config):
        key = "ref_actor.max_inference_length_per_device"
        limits.append((key, config.ref_actor.max_inference_length_per_device, length_B))
    for key, tokens, lengths in limits:
        if (longest := int(lengths.max())) > tokens * model.sp_size:
            what = "a pair of" if len(lengths) < len(length_B) else "a sequence of"
            raise DataError(
                f"{path}: {what} {longest} tokens does not fit into {key}={times_sp(tokens, group, model.sp_size)}; "
                f"raise that to {math.ceil(longest / model.sp_size)}, or lower data.max_length={config.data.max_length}"
            )


def train_and_test(data: SupervisedData, read: Callable[[str], Rows]) -> tuple[Rows, Rows | None]:
    """Return the rows of `data.path` and those of the test set: another file, a share of these rows, or None."""
    rows = read(data.path)
    if data.test_path is not None:
        return rows, read(data.test_path)
    number = round(data.test_ratio * len(rows))
    if data.test_ratio == 0:
        return rows, None
    if not 0 < number < len(rows):
        raise ConfigError(f"data.test_ratio={data.test_ratio} of {len(rows)} rows leaves none to test or to train on")
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    return rows.subset(sorted(order[number:])), rows.subset(sorted(order[:number]))
