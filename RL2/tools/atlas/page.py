"""Self-contained HTML page of an atlas: cosines, pull against p, rank and entropy, clusters, and two token by token."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.tools.atlas.measure import Atlas
from RL2.tools.view.style import COLOURS
from RL2.trainer.token_log import TokenTexts

NUM_SHOWN = 24
"""Number of sequences whose texts are in the page."""
LONGEST_PROMPT = 60
"""Number of tokens before the first action that are shown of a sequence."""


def write_page(atlas: Atlas, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the page to the file `out`."""
    files = resources.files("RL2.tools.atlas") / "static"
    script, css = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    page = template.render(
        css=css, script=script, digest=digest, data=content(atlas, tokenizer), atlas=atlas, left_out=by_reason(atlas)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def content(atlas: Atlas, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the data of the page; arrays of tokens are float32 in base64."""
    numbers = {title: number for number, cluster in enumerate(atlas.clusters) for title in cluster}
    return {
        "colours": COLOURS,
        "logp": _packed(atlas.logp_N),
        "entropy": _packed(atlas.entropy_N),
        "rank": _packed(atlas.rank_N),
        "cosines": [[None if math.isnan(x) else x for x in row] for row in atlas.cosines_OO.tolist()],
        "objectives": [
            {
                "title": one.title,
                "cluster": numbers[one.title],
                "loss": one.loss,
                "norm": one.norm,
                "tokens": one.tokens,
                "pull": _packed(one.pull_N / max(one.norm, 1e-30)),
                "entropy": _packed(one.entropy_N),
                "prob": _packed(one.prob_N),
            }
            for one in atlas.effects
        ],
        "sequences": list(_sequences(atlas, TokenTexts(tokenizer))),
    }


def by_reason(atlas: Atlas) -> dict[str, str]:
    """Return the reasons for which objectives are left out, with the names of these."""
    found: dict[str, list[str]] = {}
    for title, why in atlas.left_out.items():
        found.setdefault(why, []).append(title)
    return {why: ", ".join(titles) for why, titles in found.items()}


def _packed(values_N: Tensor) -> str:
    return base64.b64encode(values_N.float().numpy().astype(np.float32).tobytes()).decode("ascii")


def _sequences(atlas: Atlas, texts: TokenTexts) -> list[dict[str, Any]]:
    """Return the texts of the first sequences: what follows the first token, and the number of the first action."""
    batch, found, first_action = atlas.batch, [], 0
    starts = batch.cu_seqlens.tolist()
    for start, end in pairwise(starts[: NUM_SHOWN + 1]):
        action = batch.action_T[start:end].tolist()
        skipped = max(0, action.index(True) - LONGEST_PROMPT) if True in action else 0
        found.append(
            {
                "reward": float(batch.reward_T[start:end].sum()),
                "first": first_action,
                "tokens": [texts[token] for token in batch.labels_T[start + skipped : end].tolist()],
                "action": [int(x) for x in action[skipped:]],
            }
        )
        first_action += sum(action)
    return found
