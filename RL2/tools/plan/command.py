"""Settings of `rl2 plan`, and the table that it prints."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import ConsoleRenderable, Group
from rich.table import Table

from RL2.config.values import Count, PositiveFloat
from RL2.errors import ConfigError, UserError, first_line, in_table
from RL2.parallel.cost import PRESETS, Machine, Shape, Work, sync_traffic, traffic
from RL2.tools.plan.search import Plan, best

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Settings of `rl2 plan`, documented in its help."""

    model: str
    gpus: Count
    memory_gib: PositiveFloat = 80
    gpus_per_node: Count = 8
    length: Count = 8192
    mean_length: PositiveFloat | None = None
    sequences: Count = 512
    rollout: bool = True
    teacher: str | None = None
    peak_tflops: PositiveFloat = 989
    utilisation: PositiveFloat = 0.27

    def __post_init__(self) -> None:
        if self.mean > self.length:
            raise ConfigError(f"mean_length={self.mean:g} is above length={self.length}")

    @property
    def mean(self) -> float:
        """Mean length of a sequence in tokens; half of the longest one unless `mean_length` is set."""
        return self.length / 2 if self.mean_length is None else self.mean_length

    @property
    def shape(self) -> Shape:
        """Shape of the model. Raise UserError if it cannot be read."""
        return shape_of("model", self.model)

    @property
    def work(self) -> Work:
        teacher = None if self.teacher is None else shape_of("teacher", self.teacher)
        return Work(
            sequences=self.sequences,
            length=self.length,
            mean_length=self.mean,
            rollout=self.rollout,
            teacher=teacher,
        )

    @property
    def machine(self) -> Machine:
        return Machine(
            memory=0.9 * self.memory_gib * GIB,
            peak=self.peak_tflops * 1e12,
            utilisation=self.utilisation,
            node=self.gpus_per_node,
        )


def shape_of(key: str, model: str) -> Shape:
    """Return the shape of a known model, or of one whose configuration can be read, the value of `key`.

    Raise UserError if it cannot.
    """
    if model in PRESETS:
        return PRESETS[model]
    from transformers import AutoConfig

    from RL2.models.multimodal import text_part

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={model}: {first_line(error)} (known offline: {', '.join(PRESETS)})") from error
    return Shape.of(text_part(config))


def table(request: PlanRequest) -> tuple[Group, bool]:
    """Return the answer, and whether the model fits."""
    shape = request.shape
    plan, why = best(shape, request.gpus, request.work, request.machine)
    active = f" ({shape.active / 1e9:.2f} active)" if shape.experts else ""
    head = (
        f"[bold]{in_table(request.model)}[/], {shape.parameters / 1e9:.2f} billion parameters{active}, on "
        f"{request.gpus} x {request.memory_gib:g} GiB"
    )
    parts: list[ConsoleRenderable | str] = [_settings(plan), _memory(request, plan)]
    if why:
        why = f"[bold red]does not fit:[/] {in_table(why)}. The layout that comes closest:"
        return Group(head, why, *parts), False
    return Group(head, *parts, _time(request, shape, plan)), True


def _settings(plan: Plan) -> str:
    layout, flag = plan.layout, str(plan.offload).lower()
    ep = [f"actor.ep_size={layout.ep}"] if layout.ep > 1 else []
    words = [
        f"actor.ddp_size={layout.ddp}",
        f"actor.sp_size={layout.sp}",
        f"actor.tp_size={layout.tp}",
        *ep,
        f"actor.max_length_per_device={plan.max_length_per_device}",
        f"actor.gradient_checkpointing={str(plan.recompute).lower()}",
        f"actor.offload_model={flag}",
        f"actor.offload_optimizer={flag}",
    ]
    return f"  {' '.join(words)}\n  ({layout.fsdp} FSDP shards, {plan.microbatches} microbatches a step)"


def _memory(request: PlanRequest, plan: Plan) -> Table:
    result = _columns(f"memory of a GPU, of {0.9 * request.memory_gib:.0f} usable GiB", "GiB")
    for part, size in plan.memory.items():
        result.add_row(part, f"{size / GIB:.1f}")
    result.add_row("[bold]at the peak of the update", f"[bold]{plan.peak / GIB:.1f}")
    if request.rollout:
        result.add_row("engine in the rollout; it sleeps in the update", f"{plan.engine / GIB:.1f}")
        result.add_row("left for keys and values in the rollout", f"{max(0.0, plan.kv_cache) / GIB:.1f}")
    return result


def _time(request: PlanRequest, shape: Shape, plan: Plan) -> Table:
    result = _columns("a step", "s")
    for phase, seconds in plan.seconds.items():
        result.add_row(phase, f"{seconds:.1f}")
    result.add_row("[bold]together", f"[bold]{plan.step_s:.1f}")
    tokens = max(request.work.tokens / plan.layout.data, request.mean)
    sent = traffic(
        shape, plan.layout, microbatches=plan.microbatches, tokens=tokens, actions=tokens, recompute=plan.recompute
    )
    for (axis, collective), size in sent.items():
        if size >= 0.05 * GIB:
            result.add_row(f"sent by a GPU: {axis} {collective}", f"{size / GIB:.1f} GiB")
    if request.rollout and request.gpus > 1:
        result.add_row("sent by a GPU: weights for the engine", f"{sync_traffic(shape, plan.layout) / GIB:.1f} GiB")
    return result


def _columns(what: str, unit: str) -> Table:
    result = Table()
    result.add_column(what)
    result.add_column(unit, justify="right")
    return result
