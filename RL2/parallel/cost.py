"""Cost model of a training step: memory, communication and time. docs/scaling.md explains it.

All numbers are bytes, seconds and floating-point operations of one process. D hidden size, L layers, H query and K
key/value heads of size h, I hidden units of the MLP, V tokens of the vocabulary. In a mixture of experts I counts the
hidden units that one token runs through; all others only take memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from RL2.errors import UserError

MASTER = GRADIENT = 4
"""Bytes per weight and per gradient: float32."""
MOMENTS = 8
"""Bytes per weight of AdamW's two moments."""
LOGITS = 512 * 2**20
"""Bytes of logits in memory at a time on a GPU (actor.logits_budget_mib)."""
TALLY = 24
"""Bytes that tensor-parallel processes exchange per token of a distribution: six float32."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a decoder like Llama or Qwen, or of one whose MLPs are mixtures of experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    """Hidden units of a layer's MLP; of its experts, those of one token (a mean over the layers)."""
    vocabulary: int
    tied: bool
    experts: int = 0
    """Number of experts in a layer that has them; 0 for a dense decoder."""
    experts_per_token: int = 0
    expert_mlp: int = 0
    """Hidden units of one expert."""
    expert_layers: int = 0
    """Number of layers with experts."""

    @staticmethod
    def of(config: Any) -> Shape:
        """Return the shape of a transformers configuration. Raise UserError for a model with another structure."""
        if getattr(config, "is_heterogeneous", False):
            raise UserError(f"layers of a model of type {config.model_type} differ in their sizes")
        try:
            shape = Shape(
                layers=config.num_hidden_layers,
                hidden=config.hidden_size,
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
                mlp=config.intermediate_size,
                vocabulary=config.vocab_size,
                tied=config.tie_word_embeddings,
            )
        except AttributeError as error:
            raise UserError(f"a model of type {config.model_type} is not built like Llama or Qwen: {error}") from error
        if getattr(config, "kv_lora_rank", None):
            raise UserError(f"a model of type {config.model_type} has latent attention, which the cost model lacks")
        per_token = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
        return _with_experts(shape, config, per_token) if per_token else shape

    @property
    def head(self) -> int:
        """Number of parameters of the head."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Number of parameters outside the layers."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def layer(self) -> int:
        """Number of parameters of a layer that one token uses."""
        projections = 2 * self.heads + 2 * self.kv_heads
        return self.hidden * (projections * self.head_size + 3 * self.mlp + 2)

    @property
    def expert(self) -> int:
        """Number of parameters of one expert."""
        return 3 * self.hidden * self.expert_mlp

    @property
    def all_experts(self) -> int:
        """Number of parameters of all experts of all layers."""
        return self.expert_layers * self.experts * self.expert

    @property
    def active(self) -> int:
        """Number of parameters that one token uses."""
        return self.layers * self.layer + self.root

    @property
    def parameters(self) -> int:
        return self.active + self.expert_layers * (self.experts - self.experts_per_token) * self.expert

    def stored_layer(self, ep: int) -> float:
        """Return the number of parameters of a layer (a mean) of which a process has one `ep`-th of the experts."""
        return (self.parameters - self.root - self.all_experts * (1 - 1 / ep)) / self.layers

    def adapters(self, rank: int, names: Collection[str]) -> int:
        """Return the number of parameters of LoRA adapters on the linear layers called `names`."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        inside_out = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
        ends = {name: self.hidden + inside_out.get(name, self.mlp) for name in names}
        return self.layers * rank * sum(ends.values())


def _with_experts(shape: Shape, config: Any, per_token: Any) -> Shape:
    """Return `shape` with the experts that a model of `config` has, built without memory.

    Raise UserError if its layers are more than attention and experts that transformers keeps in one tensor, or if
    `per_token`, the number of experts of a token, differs between layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from RL2.parallel.experts import find_experts

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    found, total = find_experts(lm), sum(parameter.numel() for parameter in lm.parameters())
    if not found and abs(total - shape.parameters) < 0.02 * total:
        return shape  # every layer is dense
    other_layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if not found or other_layers or not isinstance(per_token, int):
        raise UserError(f"a model of type {config.model_type} is not built like Llama or Qwen with experts")
    here, number = sum(p.numel() for experts in found for p in experts.parameters()), found[0].num_experts
    active = total - here + here * per_token // number
    attention = replace(shape, mlp=0).active
    return replace(
        shape,
        mlp=round((active - attention) / (3 * shape.hidden * shape.layers)),
        experts=number,
        experts_per_token=per_token,
        expert_mlp=round(here / (3 * shape.hidden * len(found) * number)),
        expert_layers=len(found),
    )


def _qwen3(layers: int, hidden: int, heads: int, mlp: int, tied: bool) -> Shape:
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_size=128,
        mlp=mlp,
        vocabulary=151_936,
        tied=tied,
    )


PRESETS = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
    "Qwen/Qwen3-30B-A3B": Shape(
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_size=128,
        mlp=8 * 768,
        vocabulary=151_936,
        tied=False,
        experts=128,
        experts_per_token=8,
        expert_mlp=768,
        expert_layers=48,
    ),
    "meta-llama/Llama-3.1-70B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_size=128, mlp=28672, vocabulary=128_256, tied=False
    ),
}
"""Models known without access to the hub."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes of `parallel/mesh.py`."""

    ddp: int = 1
    fsdp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    """Number of processes among the FSDP shards that split the experts."""

    @property
    def data(self) -> int:
        """Number of parts of the data."""
        return self.ddp * self.fsdp

    @property
    def shards(self) -> int:
        """Number of processes that share a parameter, or a tensor-parallel part of it."""
        return self.fsdp * self.sp

    @property
    def size(self) -> int:
        return self.data * self.sp * self.tp


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and their network. The defaults are H100s: eight per node, 400 Gbit/s per GPU between nodes."""

    memory: float = 0.9 * 80 * 2**30
    """Usable bytes: a tenth is reserved for the allocator's gaps, kernels and NCCL."""
    peak: float = 989e12
    """Dense bfloat16 operations per second."""
    utilisation: float = 0.27
    """Share of the peak that is reached; measured for 1.7B on one GPU (docs/measurements.md)."""
    memory_rate: float = 2e12
    """Bytes per second that decoding reads from memory: 60% of the peak; assumed."""
    node: int = 8
    link: float = 200e9
    """Bytes per second that a GPU sends within its node in collectives; assumed."""
    network: float = 25e9
    """Bytes per second that a GPU sends to other nodes; assumed."""

    def rate(self, span: int) -> float:
        """Return the bytes per second of collectives among `span` neighbouring processes."""
        return self.link if span <= self.node else self.network


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one optimizer step."""

    sequences: int
    length: int
    """Length of the longest sequence in tokens."""
    mean_length: float
    rollout: bool = True
    """True if the sequences are sampled first, by an engine on the same devices."""
    teacher: Shape | None = None
    """The teacher, in the layout of the model; None if there is none."""

    @property
    def tokens(self) -> float:
        return self.sequences * self.mean_length


def training_memory(
    shape: Shape, layout: Layout, tokens: int, *, recompute: bool, itemsize: int = 2, adapters: int = 0
) -> dict[str, float]:
    """Return the bytes by part at the peak of the backward pass.

    `tokens` is the number of positions per process (max_length_per_device), `itemsize` the bytes of the compute dtype.
    `adapters` is the number of LoRA parameters; if positive, only they train, and the base is in the compute dtype.
    """
    here = shape.parameters / (layout.tp * layout.shards)
    trained = adapters / layout.shards if adapters else here
    gathered = 0.0
    if layout.size > 1 or itemsize < MASTER:  # the layer in use, the next layer, and one layer's gradient in transit
        layer = shape.stored_layer(layout.ep)
        gathered = (itemsize * (shape.root + 2 * layer) + GRADIENT * layer) / layout.tp
    kept = tokens * _kept(shape, layout.tp, itemsize)
    boundaries = tokens * shape.layers * shape.hidden * itemsize
    return {
        "weights": MASTER * trained + (itemsize * here if adapters else 0),
        "gradients": GRADIENT * trained,
        "optimizer": MOMENTS * trained,
        "gathered layers": gathered,
        "activations": boundaries + kept * ((1 if recompute else shape.layers) + 1),
        "statistics": 1.5 * LOGITS + (GRADIENT + itemsize) * shape.head / layout.tp,
    }


def teacher_memory(shape: Shape, layout: Layout, itemsize: int = 2) -> float:
    """Return the bytes of a frozen teacher in an update: its float32 shards, and the whole head and embeddings."""
    gathered = itemsize * (shape.root + 2 * shape.stored_layer(layout.ep)) / layout.tp
    whole = gathered if layout.size > 1 or itemsize < MASTER else 0.0
    return MASTER * shape.parameters / (layout.tp * layout.shards) + whole


def peak(memory: dict[str, float], *, offload: bool) -> float:
    """Return the peak bytes of an update whose parts are `memory`; with `offload`, not all are resident."""
    if not offload:
        return sum(memory.values())
    # the optimizer is loaded once the activations are freed
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    return max(sum(memory.values()) - memory["optimizer"], states)


def _kept(shape: Shape, tp: int, itemsize: int) -> float:
    """Return the bytes per token and layer that the backward pass needs; norms keep a float32 copy."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    whole = 2 * shape.hidden * (4 + itemsize) + 2 * shape.hidden * itemsize
    split = (queries + keys) * (4 + itemsize) + (2 * queries + 2 * keys + 4 * shape.mlp) * itemsize
    routed = 4 * shape.experts_per_token * shape.hidden * itemsize  # a token's copies, before and after its experts
    return whole + split / tp + routed


def kv_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Return the bytes of keys and values per token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * itemsize


Traffic = dict[tuple[str, str], float]
"""(axis, collective) -> bytes sent by this process; combining S bytes over n processes sends S (n - 1) / n."""


def traffic(
    shape: Shape,
    layout: Layout,
    *,
    microbatches: int,
    tokens: float,
    actions: float,
    num_fields: int = 2,
    recompute: bool = True,
    itemsize: int = 2,
) -> Traffic:
    """Return the traffic of the gradients of one optimizer step.

    `tokens` pass through the backbone, and `actions` of them through the head with `num_fields` statistics, summed over
    the processes that share this one's data.
    """
    n, d, s, t = layout.shards, layout.ddp, layout.sp, layout.tp
    forwards = 2 if recompute else 1  # in a recomputed layer only the last all-reduce is saved
    own = shape.all_experts / layout.ep  # experts of this process, which only `of_experts` processes share
    of_experts, rest = n // layout.ep, shape.parameters - shape.all_experts
    queries = shape.heads * shape.head_size / t
    keys = 2 * max(shape.kv_heads / t, s) * shape.head_size if s > 1 else 0.0  # one head per process
    rows, heads_rows = tokens / s, actions / s
    reduced = rows * shape.hidden * itemsize * (shape.layers * (3 + forwards) + 1)  # 1 for the embedding
    routed = rows * shape.experts_per_token * shape.hidden * itemsize * shape.expert_layers
    of_stats = heads_rows * (GRADIENT * shape.hidden + 4)  # the gradient of the hidden state, and the label's logit
    return {
        ("fsdp", "all-gather"): microbatches
        * itemsize
        * ((2 * rest - shape.root) / t * _others(n) + 2 * own * _others(of_experts)),
        ("fsdp", "reduce-scatter"): microbatches * GRADIENT * (rest / t * _others(n) + own * _others(of_experts)),
        ("ddp", "all-reduce"): 2 * GRADIENT * shape.parameters / (t * n) * _others(d),
        ("tp", "all-reduce"): 2 * (reduced + of_stats) * _others(t),
        ("tp", "all-gather"): t * heads_rows * TALLY * _others(t),
        ("sp", "all-to-all"): rows * (2 * queries + keys) * itemsize * shape.layers * (1 + forwards) * _others(s),
        ("ep", "all-to-all"): 2 * routed * (1 + forwards) * _others(layout.ep),
        ("sp", "all-reduce"): 2 * 4 * actions * num_fields * _others(s),
    }


def sync_traffic(shape: Shape, layout: Layout, itemsize: int = 2) -> float:
    """Return the bytes that this process sends so that an engine on every process has all weights."""
    return itemsize * shape.parameters * _others(layout.shards * layout.tp)


def _others(n: int) -> float:
    return (n - 1) / n


def operations(shape: Shape, tokens: float, mean_length: float) -> float:
    """Return the operations of the forward pass: two per active parameter and token, plus causal attention."""
    return tokens * (2 * shape.active + 2 * shape.layers * shape.heads * shape.head_size * mean_length)
