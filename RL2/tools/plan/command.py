"""What `rl2 plan` is asked, and the table that it answers with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.console import ConsoleRenderable, Group
from rich.table import Table

from RL2.config.load import words
from RL2.errors import ConfigError, UserError, first_line, in_table
from RL2.parallel.cost import PRESETS, Machine, Shape, Work, sync_traffic, traffic
from RL2.tools.plan.search import Plan, best

GIB = 2**30
KINDS = {"str": "a text", "int": "a whole number above 0", "float": "a number above 0", "bool": "true or false"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The settings of the command, which says what they mean."""

    model: str
    gpus: int
    memory_gib: float = 80
    gpus_per_node: int = 8
    length: int = 8192
    mean_length: float = 0
    sequences: int = 512
    rollout: bool = True
    peak_tflops: float = 989
    utilisation: float = 0.27

    @staticmethod
    def of(settings: Sequence[str]) -> PlanRequest:
        """Of `key=value` words. Raises ConfigError for one that is not there or no sensible value."""
        known = {f.name: str(f.type) for f in fields(PlanRequest)}
        given = words([s for s in settings if "=" in s])
        if unclear := [s for s in settings if "=" not in s] + [key for key in given if key not in known]:
            raise ConfigError(f"{unclear[0]!r} is not a setting; they are {', '.join(f'{name}=' for name in known)}")
        if missing := [name for name in ("model", "gpus") if name not in given]:
            raise ConfigError(f"{missing[0]}= is missing")
        for key, value in given.items():
            wanted = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[known[key]]
            is_right = isinstance(value, wanted) and (isinstance(value, bool) == (known[key] == "bool"))
            if not is_right or (known[key] in ("int", "float") and not 0 < value < math.inf):
                raise ConfigError(f"{key}={value} is not {KINDS[known[key]]}")
        question = PlanRequest(**given)
        if not question.mean_length:
            question = PlanRequest(**{"mean_length": question.length / 2} | given)
        if not 0 < question.mean_length <= question.length:
            raise ConfigError(f"mean_length={question.mean_length:g} is not between 0 and length={question.length}")
        return question

    @property
    def shape(self) -> Shape:
        """Of a model that is known, or whose configuration can be read. Raises UserError if it cannot."""
        if self.model in PRESETS:
            return PRESETS[self.model]
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model={self.model}: {first_line(error)} (known without a look: {', '.join(PRESETS)})"
            ) from error
        return Shape.of(config)

    @property
    def work(self) -> Work:
        return Work(sequences=self.sequences, length=self.length, mean_length=self.mean_length, rollout=self.rollout)

    @property
    def machine(self) -> Machine:
        return Machine(
            memory=0.9 * self.memory_gib * GIB,
            peak=self.peak_tflops * 1e12,
            utilisation=self.utilisation,
            node=self.gpus_per_node,
        )


def table(question: PlanRequest) -> tuple[Group, bool]:
    """The answer, and whether the model fits."""
    shape = question.shape
    plan, why = best(shape, question.gpus, question.work, question.machine)
    head = (
        f"[bold]{in_table(question.model)}[/], {shape.parameters / 1e9:.2f} billion parameters, on {question.gpus} x "
        f"{question.memory_gib:g} GiB"
    )
    parts: list[ConsoleRenderable | str] = [_settings(plan), _memory(question, plan)]
    if why:
        why = f"[bold red]does not fit:[/] {in_table(why)}. The layout that comes closest:"
        return Group(head, why, *parts), False
    return Group(head, *parts, _time(question, shape, plan)), True


def _settings(plan: Plan) -> str:
    layout, flag = plan.layout, str(plan.offload).lower()
    words = [
        f"actor.ddp_size={layout.ddp}",
        f"actor.sp_size={layout.sp}",
        f"actor.tp_size={layout.tp}",
        f"actor.max_length_per_device={plan.max_length_per_device}",
        f"actor.gradient_checkpointing={str(plan.recompute).lower()}",
        f"actor.offload_model={flag}",
        f"actor.offload_optimizer={flag}",
    ]
    return f"  {' '.join(words)}\n  ({layout.fsdp} FSDP shards, {plan.microbatches} microbatches a step)"


def _memory(question: PlanRequest, plan: Plan) -> Table:
    result = _columns(f"memory of a GPU, of {0.9 * question.memory_gib:.0f} usable GiB", "GiB")
    for part, size in plan.memory.items():
        result.add_row(part, f"{size / GIB:.1f}")
    result.add_row("[bold]at the peak of the update", f"[bold]{plan.peak / GIB:.1f}")
    if question.rollout:
        result.add_row("engine in the rollout; it sleeps in the update", f"{plan.engine / GIB:.1f}")
        result.add_row("left for keys and values in the rollout", f"{max(0.0, plan.kv_cache) / GIB:.1f}")
    return result


def _time(question: PlanRequest, shape: Shape, plan: Plan) -> Table:
    result = _columns("a step", "s")
    for phase, seconds in plan.seconds.items():
        result.add_row(phase, f"{seconds:.1f}")
    result.add_row("[bold]together", f"[bold]{plan.step_s:.1f}")
    tokens = max(question.work.tokens / plan.layout.data, question.mean_length)
    sent = traffic(
        shape, plan.layout, microbatches=plan.microbatches, tokens=tokens, actions=tokens, recompute=plan.recompute
    )
    for (axis, collective), size in sent.items():
        if size >= 0.05 * GIB:
            result.add_row(f"sent by a GPU: {axis} {collective}", f"{size / GIB:.1f} GiB")
    if question.rollout and question.gpus > 1:
        result.add_row("sent by a GPU: weights for the engine", f"{sync_traffic(shape, plan.layout) / GIB:.1f} GiB")
    return result


def _columns(what: str, unit: str) -> Table:
    result = Table()
    result.add_column(what)
    result.add_column(unit, justify="right")
    return result
