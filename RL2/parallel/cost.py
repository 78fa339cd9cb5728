"""What a step costs in memory, communication and time: a model on paper, explained in docs/scaling.md.

Bytes, seconds and floating-point operations, all of one process. D hidden size, L layers, H query and K key/value heads
of size h, I hidden units of the MLP, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from RL2.errors import UserError

MASTER = GRADIENT = 4
"""Bytes of a weight and of its gradient: float32."""
MOMENTS = 8
"""Bytes of AdamW's two."""
LOGITS = 512 * 2**20
"""Logits in memory at a time on a GPU (actor.logits_budget_mib)."""
TALLY = 24
"""Bytes of what tensor-parallel processes tell each other of a token's distribution: six float32."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder like Llama or Qwen."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied: bool

    @staticmethod
    def of(config: Any) -> Shape:
        """Of a transformers configuration. Raises UserError for a model that is built otherwise."""
        try:
            return Shape(
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

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters that are not in a layer."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def layer(self) -> int:
        projections = 2 * self.heads + 2 * self.kv_heads
        return self.hidden * (projections * self.head_size + 3 * self.mlp + 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def adapters(self, rank: int, names: Collection[str]) -> int:
        """Parameters of LoRA adapters on the linear layers of these names."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        inside_out = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
        ends = {name: self.hidden + inside_out.get(name, self.mlp) for name in names}
        return self.layers * rank * sum(ends.values())


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
    "meta-llama/Llama-3.1-70B": Shape(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_size=128, mlp=28672, vocabulary=128_256, tied=False
    ),
}
"""Known without a look at the hub."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """As `parallel/mesh.py` has it."""

    ddp: int = 1
    fsdp: int = 1
    sp: int = 1
    tp: int = 1

    @property
    def data(self) -> int:
        """Parts of the data."""
        return self.ddp * self.fsdp

    @property
    def shards(self) -> int:
        """Processes that share a parameter, or a tensor-parallel part of it."""
        return self.fsdp * self.sp

    @property
    def size(self) -> int:
        return self.data * self.sp * self.tp


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs, by default H100s: eight in a node, and between nodes 400 Gbit/s for each."""

    memory: float = 0.9 * 80 * 2**30
    """Bytes that may be used: a tenth goes to the allocator's gaps, kernels and NCCL."""
    peak: float = 989e12
    """Dense bfloat16 operations a second."""
    utilisation: float = 0.27
    """Of the peak; measured for 1.7B on one GPU (docs/results.md)."""
    memory_rate: float = 2e12
    """Bytes a second that decoding reads from memory: 60% of the peak; assumed."""
    node: int = 8
    link: float = 200e9
    """Bytes a second that a GPU sends within its node, in collectives; assumed."""
    network: float = 25e9
    """The same to other nodes; assumed."""

    def rate(self, span: int) -> float:
        """Of collectives among `span` neighbours."""
        return self.link if span <= self.node else self.network


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimizer step."""

    sequences: int
    length: int
    """Tokens of the longest."""
    mean_length: float
    rollout: bool = True
    """Sequences are sampled first, by an engine beside the model."""

    @property
    def tokens(self) -> float:
        return self.sequences * self.mean_length


def training_memory(
    shape: Shape, layout: Layout, tokens: int, *, recompute: bool, itemsize: int = 2, adapters: int = 0
) -> dict[str, float]:
    """Bytes by part at the peak of the backward pass on `tokens` positions a process, that is max_length_per_device.

    `itemsize`: of the compute dtype. `adapters`: parameters of LoRA's, which then are all that trains; the base is in
    the compute dtype.
    """
    here = shape.parameters / (layout.tp * layout.shards)
    trained = adapters / layout.shards if adapters else here
    gathered = 0.0
    if layout.size > 1 or itemsize < MASTER:  # what is needed now, the next layer, and a layer's gradient on its way
        gathered = (itemsize * (shape.root + 2 * shape.layer) + GRADIENT * shape.layer) / layout.tp
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


def peak(memory: dict[str, float], *, offload: bool) -> float:
    """Bytes at the worst moment of an update whose parts are `memory`; with `offload`, not all are there at once."""
    if not offload:
        return sum(memory.values())
    # the optimizer comes when the activations are gone
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    return max(sum(memory.values()) - memory["optimizer"], states)


def _kept(shape: Shape, tp: int, itemsize: int) -> float:
    """Bytes of a token in a layer that the backward pass needs; norms keep a float32 copy."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    whole = 2 * shape.hidden * (4 + itemsize) + 2 * shape.hidden * itemsize
    split = (queries + keys) * (4 + itemsize) + (2 * queries + 2 * keys + 4 * shape.mlp) * itemsize
    return whole + split / tp


def kv_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Of keys and values of a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * itemsize


Traffic = dict[tuple[str, str], float]
"""(axis, collective) -> bytes that this process sends: of S bytes put together among n processes S (n - 1) / n."""


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
    """Of the gradients of one optimizer step.

    `tokens` run through the backbone, and of them `actions` through the head with `num_fields` statistics, on the
    processes that share this one's data, together.
    """
    n, d, s, t = layout.shards, layout.ddp, layout.sp, layout.tp
    forwards = 2 if recompute else 1  # in a recomputed layer only the last all-reduce is spared
    layers = shape.layers * shape.layer
    queries = shape.heads * shape.head_size / t
    keys = 2 * max(shape.kv_heads / t, s) * shape.head_size if s > 1 else 0.0  # a head for each process
    rows, heads_rows = tokens / s, actions / s
    reduced = rows * shape.hidden * itemsize * (shape.layers * (3 + forwards) + 1)  # and the embedding
    of_stats = heads_rows * (GRADIENT * shape.hidden + 4)  # the gradient of the hidden state, and the label's logit
    return {
        ("fsdp", "all-gather"): microbatches * itemsize * (shape.root + 2 * layers) / t * _others(n),
        ("fsdp", "reduce-scatter"): microbatches * GRADIENT * shape.parameters / t * _others(n),
        ("ddp", "all-reduce"): 2 * GRADIENT * shape.parameters / (t * n) * _others(d),
        ("tp", "all-reduce"): 2 * (reduced + of_stats) * _others(t),
        ("tp", "all-gather"): t * heads_rows * TALLY * _others(t),
        ("sp", "all-to-all"): rows * (2 * queries + keys) * itemsize * shape.layers * (1 + forwards) * _others(s),
        ("sp", "all-reduce"): 2 * 4 * actions * num_fields * _others(s),
    }


def sync_traffic(shape: Shape, layout: Layout, itemsize: int = 2) -> float:
    """Bytes that this process sends so that an engine on every process has all weights."""
    return itemsize * shape.parameters * _others(layout.shards * layout.tp)


def _others(n: int) -> float:
    return (n - 1) / n


def operations(shape: Shape, tokens: float, mean_length: float) -> float:
    """Of the forward pass: two a parameter, and causal attention."""
    return tokens * (2 * shape.parameters + 2 * shape.layers * shape.heads * shape.head_size * mean_length)
