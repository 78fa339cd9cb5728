"""Divergence from a teacher, forward and backward, with and without materialised logits.

    python benchmarks/teacher_stats.py [--steps 5] [--json FILE] [--device cuda --dtype bfloat16]

The Jensen-Shannon divergence (beta = 1/2) of each of T tokens, from the hidden states and the head of a student and a
teacher of V tokens, with gradients for the student: `teacher_stats` against the dense formula (float32 logits, two
log-softmaxes, the mixture, autograd), against TRL's chunked divergence in TRL's own tile sizes, and against
`teacher_stats` without the loss, which computes all logits again in its backward pass.

Each side is a separate process; sides alternate. Times are medians; on a machine that does other work, processor time
with `--threads 1` is the one to read. Memory is what a step adds at its peak to hidden
states, heads and labels: the gradient of the student's head, which every side needs, and working memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from token_stats import check_alike, synchronize
from torch import Tensor
from turns import Side, Turns, alternate, parser, ratios, table

BETA = 0.5

ROWS = (
    ("forward and backward, s", "step_s", "speedup", "{:.3f}"),
    ("processor time, s", "cpu_s", "cpu_ratio", "{:.3f}"),
    ("memory above the inputs, MiB", "memory_mb", "memory_ratio", "{:.0f}"),
)


def ours(hidden_TD: Tensor, head_VD: Tensor, hidden_TE: Tensor, head_VE: Tensor, one_pass: bool = True) -> Tensor:
    """Return the divergence; with `one_pass` the gradient is taken in the forward pass, as for a token-wise loss."""
    from RL2.ops.one_pass import Expected
    from RL2.ops.teacher_stats import Teacher, teacher_stats

    slope_T = torch.linspace(-1, 1, len(hidden_TD), device=hidden_TD.device)
    expected = Expected(lambda stats, index_C: (stats.jsd * slope_T[index_C]).sum()) if one_pass else None
    labels_T = torch.zeros(len(hidden_TD), dtype=torch.long, device=hidden_TD.device)
    teacher = Teacher(hidden_TE, head_VE)
    return teacher_stats(hidden_TD, head_VD, labels_T, teacher, fields=("jsd",), beta=BETA, expected=expected).jsd


def dense(hidden_TD: Tensor, head_VD: Tensor, hidden_TE: Tensor, head_VE: Tensor) -> Tensor:
    """Return the divergence from the logits, by the shortest formula."""
    logp_TV = (hidden_TD @ head_VD.T).float().log_softmax(-1)
    with torch.no_grad():
        logq_TV = (hidden_TE @ head_VE.T).float().log_softmax(-1)
    logm_TV = torch.logaddexp(logp_TV + math.log(1 - BETA), logq_TV + math.log(BETA))
    kl_p_T = (logp_TV.exp() * (logp_TV - logm_TV)).sum(-1)
    kl_q_T = (logq_TV.exp() * (logq_TV - logm_TV)).sum(-1)
    return BETA * kl_q_T + (1 - BETA) * kl_p_T


def trl(hidden_TD: Tensor, head_VD: Tensor, hidden_TE: Tensor, head_VE: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden_TD, head_VD, None, hidden_TE, head_VE, None, BETA)[0]


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "two_passes": lambda hidden, head, other, other_head: ours(hidden, head, other, other_head, one_pass=False),
    "dense": dense,
    "trl": trl,
}
TABLES = {
    "jsd against dense logits": ("dense", ""),
    "jsd against TRL's chunked one": ("trl", "_trl"),
    "in one pass and in two": ("two_passes", "_two_passes"),
}


def run_side(options: argparse.Namespace) -> None:
    turns, device = Turns(), torch.device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    how = {"device": device, "dtype": getattr(torch, options.dtype)}
    hidden_TD = torch.randn(options.T, options.D, **how).requires_grad_()
    head_VD = (torch.randn(options.V, options.D, **how) * options.D**-0.5).requires_grad_()
    hidden_TE = torch.randn(options.T, options.E, **how)
    head_VE = torch.randn(options.V, options.E, **how) * options.E**-0.5
    divergence = SIDES[options.side]
    divergence(hidden_TD[:8], head_VD[:64], hidden_TE[:8], head_VE[:64])  # loads the libraries
    synchronize(device)
    loaded_mb = torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0
    while turns.wait():
        hidden_TD.grad = head_VD.grad = None
        value_T = divergence(hidden_TD, head_VD, hidden_TE, head_VE)
        value_T.backward(torch.linspace(-1, 1, options.T, device=device))
        synchronize(device)
        assert head_VD.grad is not None
        # the norm of a gradient, so that the parent can check that both sides computed the same
        values = {"norm": float(head_VD.grad.float().norm())}
        if device.type == "cuda":
            values["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 - loaded_mb
        turns.answer(**values)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, size in (("T", 1024), ("V", 151_936), ("D", 512), ("E", 512)):
        arguments.add_argument(f"--{name}", type=int, default=size)
    options = arguments.parse_args()
    if options.side:
        run_side(options)
        return
    names = ("threads", "device", "dtype", "T", "V", "D", "E")
    passed_on = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"T = {options.T}, V = {options.V}, D = {options.D}, E = {options.E}, {options.dtype}, {where}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, (peer, suffix) in TABLES.items():
            if peer == "trl" and importlib.util.find_spec("trl") is None:
                print(f"{title}: TRL is not installed (make setup)")
                continue
            logs = {side: Path(folder) / f"{side}{suffix}.log" for side in ("ours", peer)}
            sides = [Side(__file__, side, passed_on, options.threads, log) for side, log in logs.items()]
            steps = alternate(sides, options.steps)
            check_alike(steps, "ours", peer)
            numbers = ratios(steps, "ours", peer, ROWS, suffix)
            print(table(title, peer, ROWS, numbers, suffix) + "\n", flush=True)
            results |= numbers
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
