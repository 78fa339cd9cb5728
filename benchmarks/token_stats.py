"""Token statistics, forward and backward, with and without materialised logits.

    python benchmarks/token_stats.py [--steps 5] [--json FILE] [--device cuda --dtype bfloat16]

Three tables, T tokens of hidden size D and a head of V rows:

    spo     the five statistics of `spo` (logp, log1mp, max_logp, max_log1mp, entropy): `token_stats` against the
            method of the SPO fork: dense float32 logits over the temperature, logsumexp, two masked clones, softmax
            entropy, autograd
    logp    the log-probability alone: `token_stats` against TRL's chunked log-probability, in TRL's own tile sizes
    spo_two_passes
            the five statistics again, against `token_stats` without the loss: its backward pass computes logits again

`token_stats` knows the loss of a token, as in training with an objective that is token-wise, and takes the gradient in
the forward pass.

Each side is a separate process; sides alternate. Times are medians; on a machine that does other work, processor time
is the one to read. Memory is what a step adds at its peak to hidden
states, head and labels: the gradient of the head, which every side needs, and working memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from turns import Side, Steps, Turns, alternate, parser, ratios, table

from RL2.types import TokenStats

TEMPERATURE = 1.0
SPO = ("logp", "log1mp", "max_logp", "max_log1mp", "entropy")


def slopes(fields: tuple[str, ...], num_tokens: int, device: torch.device) -> list[Tensor]:
    """Return the derivative of the loss with respect to each statistic of each token."""
    return [torch.linspace(-1, 1, num_tokens, device=device) / (i + 1) for i in range(len(fields))]


def ours(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, fields: tuple[str, ...], one_pass: bool = True
) -> list[Tensor]:
    from RL2.ops.one_pass import Expected
    from RL2.ops.token_stats import token_stats

    slopes_T = slopes(fields, len(labels_T), labels_T.device)

    def loss(stats: TokenStats, index_C: Tensor) -> Tensor:
        parts = zip(fields, slopes_T, strict=True)
        return torch.stack([(getattr(stats, name) * slope_T[index_C]).sum() for name, slope_T in parts]).sum()

    expected = Expected(loss) if one_pass else None
    stats = token_stats(hidden_TD, head_VD, labels_T, temperature=TEMPERATURE, fields=fields, expected=expected)
    return [getattr(stats, name) for name in fields]


def fork(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> list[Tensor]:
    """Return the statistics from the logits, each by the shortest formula."""
    logits_TV = (hidden_TD @ head_VD.T).float() / TEMPERATURE
    total_T = logits_TV.logsumexp(-1)
    top_T, mode_T = logits_TV.max(-1)

    def log_of_the_others(ids_T: Tensor) -> Tensor:
        others_TV = logits_TV.clone()
        others_TV.scatter_(1, ids_T[:, None], -math.inf)
        return others_TV.logsumexp(-1) - total_T

    logp_T = logits_TV.gather(1, labels_T[:, None])[:, 0] - total_T
    entropy_T = total_T - (logits_TV.softmax(-1) * logits_TV).sum(-1)
    return [logp_T, log_of_the_others(labels_T), top_T - total_T, log_of_the_others(mode_T), entropy_T]


def trl(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> list[Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp_T = ChunkedLogProbFunction.apply(hidden_TD, head_VD, None, labels_T, TEMPERATURE, TRL_CHUNK, None, 1.0, ())[0]
    return [logp_T]


TRL_CHUNK = 32_768
"""Columns per tile in TRL's trainers."""

SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "spo": lambda hidden, head, labels: ours(hidden, head, labels, SPO),
    "spo_two_passes": lambda hidden, head, labels: ours(hidden, head, labels, SPO, one_pass=False),
    "fork": fork,
    "logp": lambda hidden, head, labels: ours(hidden, head, labels, ("logp",)),
    "trl": trl,
}
TABLES = {
    "the five statistics of spo": ("spo", "fork", ""),
    "logp alone": ("logp", "trl", "_logp"),
    "in one pass and in two": ("spo", "spo_two_passes", "_two_passes"),
}


def run_side(options: argparse.Namespace) -> None:
    turns, device = Turns(), torch.device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden_TD = torch.randn(options.T, options.D, device=device, dtype=dtype).requires_grad_()
    head_VD = (torch.randn(options.V, options.D, device=device, dtype=dtype) * options.D**-0.5).requires_grad_()
    labels_T = torch.randint(options.V, (options.T,), device=device)
    stats = SIDES[options.side]
    parts = stats(hidden_TD[:8], head_VD[:64], labels_T[:8] % 64)  # loads the libraries
    torch.autograd.backward(parts, slopes(SPO[: len(parts)], 8, device))
    hidden_TD.grad = head_VD.grad = None
    synchronize(device)
    loaded_mb = torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    while turns.wait():
        hidden_TD.grad = head_VD.grad = None
        parts = stats(hidden_TD, head_VD, labels_T)
        torch.autograd.backward(parts, slopes(SPO[: len(parts)], options.T, device))
        synchronize(device)
        assert head_VD.grad is not None
        # the squared norm of all gradients, so that the parent can check that both sides computed the same
        norm = float(head_VD.grad.float().norm())
        values = {"norm": norm}
        if device.type == "cuda":
            values["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 - loaded_mb
        turns.answer(**values)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


ROWS = (
    ("forward and backward, s", "step_s", "speedup", "{:.3f}"),
    ("processor time, s", "cpu_s", "cpu_ratio", "{:.3f}"),
    ("memory above the inputs, MiB", "memory_mb", "memory_ratio", "{:.0f}"),
)


def check_alike(steps: Steps, mine: str, peer: str) -> None:
    norm, other_norm = steps[mine][0]["norm"], steps[peer][0]["norm"]
    if not math.isclose(norm, other_norm, rel_tol=1e-2):
        sys.exit(f"{mine} and {peer} do not compute the same gradient: its norm is {norm} and {other_norm}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, size in (("T", 1024), ("V", 151_936), ("D", 512)):
        arguments.add_argument(f"--{name}", type=int, default=size)
    options = arguments.parse_args()
    if options.side:
        run_side(options)
        return
    names = ("threads", "device", "dtype", "T", "V", "D")
    passed_on = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"T = {options.T}, V = {options.V}, D = {options.D}, {options.dtype}, {where}\n")
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, (mine, peer, suffix) in TABLES.items():
            if peer == "trl" and importlib.util.find_spec("trl") is None:
                print("logp alone: TRL is not installed (make setup)")
                continue
            sides = [
                Side(__file__, side, passed_on, options.threads, Path(folder) / f"{side}.log") for side in (mine, peer)
            ]
            steps = alternate(sides, options.steps)
            check_alike(steps, mine, peer)
            numbers = ratios(steps, mine, peer, ROWS, suffix)
            print(table(title, peer, ROWS, numbers, suffix) + "\n", flush=True)
            results |= numbers
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
