"""Every causal language model of transformers is exact here or refused with the reason; docs/models.md lists them.

Exact: packed sequences get the log-probabilities that each gets alone by transformers' own forward, in training too,
and so does the embedded engine; an export is the same model again. With RL2_WRITE_DOCS=1 the document is written anew.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from RL2.batch.packing import pack_tokens
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError
from RL2.models.inspection import refuse_inexact
from RL2.models.loading import match_weights, stored_tensors
from RL2.models.policy import Policy, empty_model, export, named_weights
from RL2.types import Sampling, StatsRequest

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/unit/models/test_model_families.py -->\n", "<!-- to here -->\n"
MODELS = {name: (name, {}) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | VARIANTS
TOLERANCE = 1e-4
"""Nats, in float32."""
LENGTHS = (40, 23, 61, 12, 30)


def verdicts() -> dict[str, str]:
    """Return model -> why it is refused, or "" if it is to be exact. No weights are made."""
    found = {}
    for name, (model_type, settings) in MODELS.items():
        try:
            config = tiny_config(model_type, settings)
        except Exception as error:  # a configuration that transformers itself refuses at this size
            found[name] = f"cannot be built at a small size: {str(error).splitlines()[-1].strip()}"
            continue
        found[name] = reason(config)
    return found


def reason(config: PretrainedConfig) -> str:
    try:
        refuse_inexact(AutoModelForCausalLM, config, "FOLDER")
    except ConfigError as refused:
        said = str(refused)
        assert said.startswith("FOLDER: ") and "\n" not in said
        return said.removeprefix(f"FOLDER: {config.model_type} ")
    return ""


@pytest.fixture(scope="module")
def verdict() -> dict[str, str]:
    return verdicts()


def table(verdict: dict[str, str]) -> str:
    """Return the document's tables: exact models, and the others by reason, without names of their modules."""
    exact = [name for name, why in verdict.items() if not why]
    refused = defaultdict(list)
    for name, why in verdict.items():
        if why:
            why = re.sub(r" in \w+ForCausalLM[\w.]*| \([\w.]*layers\.[\w.]*\)|^\(\w+\) ", "", why)
            why = re.sub(
                r"(cannot be built|does not run with packed attention alone|is of an unknown structure).*", r"\1", why
            )
            refused[re.sub(r"keys of size \d+ and values of size \d+", "keys and values of two sizes", why)].append(
                name
            )
    rows = [
        f"**Exact** ({len(exact)}): {', '.join(f'`{name}`' for name in exact)}.",
        "",
        "| refused, because it | models |",
        "|---|---|",
    ]
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        rows.append(f"| {why.replace('|', '/')} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(rows) + "\n"


def test_the_document_has_every_model(verdict: dict[str, str]) -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    shown, after = rest.split(END)
    if os.environ.get("RL2_WRITE_DOCS"):
        DOCUMENT.write_text(before + BEGIN + table(verdict) + END + after)
        shown = table(verdict)
    assert shown == table(verdict)


def test_nothing_ends_in_a_traceback_and_the_usual_families_are_exact(verdict: dict[str, str]) -> None:
    exact = {name for name, why in verdict.items() if not why}
    assert {"llama", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi3", "granite", "starcoder2", "apertus"} <= exact
    for leaking in ("lfm2", "qwen3_5_text", "bamba", "zamba2", "falcon_h1", "granitemoehybrid, mamba", "olmo_hybrid"):
        assert verdict[leaking].startswith("mixes tokens outside attention"), leaking
    assert verdict["emu3"].endswith("is not a text-only model")  # its export loads nowhere
    assert verdict["doge"] == "passes its own mask to attention, which packed attention would ignore"


def exact_models() -> list[str]:
    """Return the models that docs/models.md calls exact, without building any; another test keeps the document."""
    listed = DOCUMENT.read_text().split("**Exact**")[1].split("\n")[0]
    return re.findall(r"`([^`]+)`", listed)


@pytest.mark.parametrize("name", exact_models())
def test_an_exact_model_gives_the_numbers_of_transformers(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = tiny_model(tiny_config(*MODELS[name]))
    folder = save(lm, tmp_path / "model", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    wanted = torch.cat([alone(plain, ids) for ids in sequences])

    match_weights(Policy.build(str(folder)), stored_tensors(folder, "F"), "F")  # the dry run
    policy = Policy.load(str(folder))
    for mode in (True, False):
        with torch.no_grad():
            packed = policy.train(mode)(pack_tokens(sequences), None, StatsRequest(("logp",)))["logp"]
        assert float((packed - wanted).abs().max()) < TOLERANCE, f"packed, training={mode}"

    engine_lm = empty_model(policy.lm, torch.float32, torch.device("cpu"))
    sampled = asyncio.run(sample(engine_lm, policy, sequences))
    for prompt, (tokens, logps) in zip(sequences, sampled, strict=True):
        theirs = alone(plain, prompt + tokens)[-len(tokens) :]
        assert float((torch.tensor(logps) - theirs).abs().max()) < TOLERANCE, "engine"

    export(policy.lm, tokenizer, tmp_path / "export", write=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    for key, tensor in lm.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), f"{key} of the export"


async def sample(lm: torch.nn.Module, policy: Policy, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log-probabilities of a copy of the policy in the embedded engine."""
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=8, memory_share=0.2, owns_weights=True)
    engine.load_weights(named_weights(policy.lm), version=1)
    done = await asyncio.gather(*(engine.generate(ids, Sampling(3, seed=n)) for n, ids in enumerate(prompts)))
    engine.close()
    return [(each.token_ids, each.logps) for each in done]


def alone(lm: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first, by transformers' forward of this sequence alone."""
    with torch.no_grad():
        logp = lm(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def save(lm: torch.nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    lm.save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
