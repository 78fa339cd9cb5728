"""Search for the fastest layout of a model on a number of GPUs, by the costs of cost.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from RL2.errors import UserError
from RL2.parallel.cost import (
    Layout,
    Machine,
    Shape,
    Work,
    kv_bytes,
    operations,
    peak,
    sync_traffic,
    teacher_memory,
    traffic,
    training_memory,
)

LAUNCH_S = 1e-3
"""Minimum time of a layer in a decoding step of the embedded engine, in seconds; assumed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and its costs."""

    layout: Layout
    max_length_per_device: int
    microbatches: int
    recompute: bool
    offload: bool
    """True if offload_model and offload_optimizer are on."""
    memory: dict[str, float]
    """Bytes by part in the update; with `offload`, not all are resident at once."""
    peak: float
    """Peak bytes of the update, when the engine sleeps."""
    engine: float
    """Bytes of the engine's weights while sampling."""
    sync: float
    """Peak bytes while the engine receives weights: the model is on the GPU, and one tensor at a time is whole."""
    kv_cache: float
    """Bytes left for keys and values beside the engine."""
    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


def cost(
    shape: Shape, layout: Layout, work: Work, machine: Machine, max_length: int, *, recompute: bool, offload: bool
) -> Plan:
    """Return the cost of `work` in this layout, whether it fits or not."""
    memory = training_memory(shape, layout, max_length, recompute=recompute)
    if work.teacher is not None:
        memory["teacher"] = teacher_memory(work.teacher, layout)
    engine = 2.0 * shape.parameters if work.rollout else 0.0  # the embedded engine is whole on each process
    state = memory["weights"] + memory["optimizer"]
    kv_cache = machine.memory - engine - (0.0 if offload else state) if work.rollout else 0.0
    share = max(work.tokens / layout.data, work.mean_length)  # of a part of the data
    microbatches = math.ceil(share / (max_length * layout.sp))
    return Plan(
        layout=layout,
        max_length_per_device=max_length,
        microbatches=microbatches,
        recompute=recompute,
        offload=offload,
        memory=memory,
        peak=peak(memory, offload=offload),
        engine=engine,
        sync=engine + 2.0 * shape.head + (memory["weights"] if offload else state) if work.rollout else 0.0,
        kv_cache=kv_cache,
        seconds=_seconds(shape, layout, work, machine, share, microbatches, recompute, kv_cache),
    )


def _seconds(
    shape: Shape,
    layout: Layout,
    work: Work,
    machine: Machine,
    share: float,
    microbatches: int,
    recompute: bool,
    kv_cache: float,
) -> dict[str, float]:
    """Return seconds by phase of a step. FSDP's collectives overlap with computation, those within layers do not."""
    forward = operations(shape, share, work.mean_length) / (layout.sp * layout.tp * machine.peak * machine.utilisation)
    sent = traffic(shape, layout, microbatches=microbatches, tokens=share, actions=share, recompute=recompute)
    within = {"tp": layout.tp, "sp": layout.tp * layout.sp, "ep": layout.ep}
    span = within | {"fsdp": layout.tp * layout.shards, "ddp": layout.size}
    wait = {axis: sum(x for (a, _), x in sent.items() if a == axis) / machine.rate(span[axis]) for axis in span}
    update = max(forward * (4 if recompute else 3), wait["fsdp"]) + wait["ddp"] + sum(wait[axis] for axis in within)
    seconds = {"update": update}
    if work.teacher is not None:  # a forward pass, with the all-gathers of one
        sent = traffic(
            work.teacher, layout, microbatches=microbatches, tokens=share, actions=share, recompute=recompute
        )
        gathered = sum(x for (axis, _), x in sent.items() if axis == "fsdp") / machine.rate(span["fsdp"]) / 4
        speed = layout.sp * layout.tp * machine.peak * machine.utilisation
        seconds["teacher"] = max(operations(work.teacher, share, work.mean_length) / speed, gathered)
    if not work.rollout:
        return seconds
    mine = work.sequences / layout.size
    at_once = max(1.0, min(mine, 0.9 * kv_cache / (kv_bytes(shape) * work.length)))
    read = 2 * shape.parameters + at_once * kv_bytes(shape) * work.mean_length / 2
    token_s = max(shape.layers * LAUNCH_S, read / machine.memory_rate)
    return {
        "rollout": math.ceil(mine / at_once) * work.length * token_s,
        # half of the all-gathers of an update, and no gradients
        "statistics": max(forward, wait["fsdp"] / 4),
        **seconds,
        "weight sync": sync_traffic(shape, layout) / machine.rate(layout.tp * layout.shards),
    }


def misfit(shape: Shape, work: Work, machine: Machine, plan: Plan) -> str:
    """Return why `plan` does not fit; empty if it does."""
    gib = machine.memory / 2**30
    states = sum(plan.memory[name] for name in ("weights", "gradients", "optimizer"))
    if plan.engine > machine.memory:
        return (
            f"the engine has a whole copy of the weights on every GPU, {plan.engine / 2**30:.0f} GiB, and {gib:.0f} "
            "can be used; rollout=false plans training without one"
        )
    if states > machine.memory:
        needed = math.ceil(states * plan.layout.tp * plan.layout.shards / machine.memory)
        return (
            f"weights, gradients and optimizer take {states / 2**30:.0f} GiB a GPU, and {gib:.0f} can be used; they "
            f"need at least {needed} GPUs"
        )
    if plan.peak > machine.memory:
        part = max(("activations", "statistics", "gathered layers"), key=lambda name: plan.memory[name])
        return (
            f"the update takes {plan.peak / 2**30:.0f} GiB of {gib:.0f}, {plan.memory[part] / 2**30:.0f} of them for "
            f"{part}; use more GPUs or a smaller length"
        )
    if plan.sync > machine.memory:
        return (
            f"the engine's copy of the weights, {plan.engine / 2**30:.0f} GiB, and what stays beside it while it "
            f"receives them take {plan.sync / 2**30:.0f} GiB of {gib:.0f}; use more GPUs"
        )
    if work.rollout and plan.kv_cache < kv_bytes(shape) * work.length:
        return (
            f"{max(0.0, plan.kv_cache) / 2**30:.1f} GiB are left for keys and values, and one sequence of "
            f"{work.length} tokens needs {kv_bytes(shape) * work.length / 2**30:.1f}"
        )
    return ""


def layouts(shape: Shape, gpus: int, node: int) -> Iterator[Layout]:
    """Yield all layouts that divide the GPUs, and the heads or the experts, with other axes than FSDP's within a node.

    A mixture of experts has no tensor and sequence parallelism.
    """
    sizes = [n for n in (1, 2, 4, 8) if n <= node]
    if shape.experts:
        for ddp, ep in product((n for n in range(1, gpus + 1) if gpus % n == 0), sizes):
            if gpus // ddp % ep == 0 and shape.experts % ep == 0:
                yield Layout(ddp=ddp, fsdp=gpus // ddp, ep=ep)
        return
    for tp, sp in product(sizes, sizes):
        queries, keys = shape.heads // tp, shape.kv_heads // tp
        if tp * sp > node or gpus % (tp * sp) or shape.kv_heads % tp or shape.mlp % tp or shape.heads % tp:
            continue
        if queries % sp or (keys % sp and sp % keys):
            continue
        rest = gpus // (tp * sp)
        for ddp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield Layout(ddp=ddp, fsdp=rest // ddp, sp=sp, tp=tp)


def best(shape: Shape, gpus: int, work: Work, machine: Machine) -> tuple[Plan, str]:
    """Return the fastest plan that fits, and ""; if none does, the one with the least memory, and why it does not fit.

    Offloading is tried only if nothing fits without it; its time is not part of the model.
    """
    plans: list[Plan] = []
    for offload in (False, True):
        plans = [
            cost(shape, layout, work, machine, length, recompute=recompute, offload=offload)
            for layout in layouts(shape, gpus, machine.node)
            for length in (1024 * 2**i for i in range(7))
            for recompute in (False, True)
            if length * layout.sp >= work.length
        ]
        if fitting := [plan for plan in plans if not misfit(shape, work, machine, plan)]:
            return min(fitting, key=_preference), ""
    if not plans:
        raise UserError(f"no layout of {gpus} GPUs has enough memory for sequences of {work.length} tokens")
    least = min(plans, key=lambda plan: plan.peak)
    return least, misfit(shape, work, machine, least)


def _preference(plan: Plan) -> tuple[float, int, int, int, float, float]:
    """Return the sort key: seconds to two digits (the model is no better), the simpler layout, then less memory.

    The update counts once more by itself, because rounding would hide it beside a long rollout.
    """
    step_s, update_s = (float(f"{seconds:.1e}") for seconds in (plan.step_s, plan.seconds["update"]))
    return step_s, plan.layout.tp, plan.layout.sp, plan.layout.ep, update_s, plan.peak
