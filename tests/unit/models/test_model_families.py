"""Every causal language model of transformers is exact here or refused with the reason; docs/models.md lists them.

Exact: packed sequences, or those of a padded block, get the log-probabilities that each gets alone by transformers' own
forward, in training too; so does the embedded engine of packed models; an export is the same model again. With
RL2_WRITE_DOCS=1 the document is written anew.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from pathlib import Path
from typing import Literal

import pytest
import torch
from model_tables import listed, shown_table
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from RL2.batch.packing import pack_tokens
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError
from RL2.models.inspection import refuse_inexact
from RL2.models.loading import match_weights
from RL2.models.multimodal import text_part
from RL2.models.policy import Policy, empty_model, export, named_weights
from RL2.models.stored import stored_tensors
from RL2.types import Sampling, StatsRequest

BEGIN, END = "<!-- made by tests/unit/models/test_model_families.py -->\n", "<!-- to here -->\n"
MODELS = {name: (name, {}) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | VARIANTS
TOLERANCE = 1e-4
"""Nats, in float32."""
LENGTHS = (40, 23, 61, 12, 30)
PACKED, ROWS = "**Exact, packed**", "**Exact, row by row through their own forward**"


Verdict = tuple[Literal["packed", "rows", "refused"], str]
"""Path of a model, and why it is not packed."""
NOT_THE_SAME = {
    "cpmant": "sees later tokens, which its structure does not tell: the first batch of a run stops it",
    "xlnet": "sees later tokens, which its structure does not tell: the first batch of a run stops it",
    "youtu": "trains, but transformers sets its padding token's embedding to 0 whenever it loads the model",
}
"""Models that the structure accepts and the numbers do not."""


def verdicts() -> dict[str, Verdict]:
    """Return model -> its path, from the structure alone. No weights are made."""
    found: dict[str, Verdict] = {}
    for name, (model_type, settings) in MODELS.items():
        try:
            config = tiny_config(model_type, settings)
        except Exception as error:  # a configuration that transformers itself refuses at this size
            found[name] = "refused", f"cannot be built at a small size: {str(error).splitlines()[-1].strip()}"
            continue
        if text_part(config) is not config:
            continue  # see test_multimodal_families.py
        found[name] = ("refused", NOT_THE_SAME[name]) if name in NOT_THE_SAME else judged(config)
    return found


def judged(config: PretrainedConfig) -> Verdict:
    try:
        why = refuse_inexact(AutoModelForCausalLM, config, "FOLDER")
    except ConfigError as refused:
        said = str(refused)
        assert said.startswith("FOLDER: ") and "\n" not in said
        return "refused", said.removeprefix(f"FOLDER: {config.model_type} ")
    return ("packed", "") if why is None else ("rows", why)


@pytest.fixture(scope="module")
def verdict() -> dict[str, Verdict]:
    return verdicts()


def table(verdict: dict[str, Verdict]) -> str:
    """Return the document's tables: exact models, and the others by reason, without names of their modules."""
    paths: dict[str, list[str]] = defaultdict(list)
    refused = defaultdict(list)
    for name, (path, why) in verdict.items():
        paths[path].append(f"`{name}`")
        if path == "refused":
            why = re.sub(r" in \w+ForCausalLM[\w.]*|^\(\w+\) ", "", why)
            refused[re.sub(r"(cannot be built|does not run).*", r"\1", why)].append(f"`{name}`")
    rows = [
        f"{PACKED} ({len(paths['packed'])}): {', '.join(paths['packed'])}.",
        "",
        f"{ROWS} ({len(paths['rows'])}): {', '.join(paths['rows'])}.",
        "",
        "| refused, because it | models |",
        "|---|---|",
    ]
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        rows.append(f"| {why.replace('|', '/')} | {', '.join(names)} |")
    return "\n".join(rows) + "\n"


def test_the_document_has_every_model(verdict: dict[str, Verdict]) -> None:
    assert shown_table(BEGIN, END, table(verdict)) == table(verdict)


def test_the_usual_families_are_exact(verdict: dict[str, Verdict]) -> None:
    packed = {"llama", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi3", "granite", "starcoder2", "apertus"}
    packed |= {"gemma2", "gemma3_text", "gemma4_text", "mistral", "olmo3", "exaone4", "cohere2"}  # sliding windows
    packed |= {"deepseek_v3, experts", "qwen3_moe", "gpt_oss", "mixtral", "olmoe", "glm4_moe"}  # experts
    assert packed <= {name for name, (path, _) in verdict.items() if path == "packed"}
    hybrid = {"qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1", "bamba", "mamba2"}
    assert hybrid | {"gpt2", "gpt_neox"} <= {name for name, (path, _) in verdict.items() if path == "rows"}


def test_reasons_name_the_structure(verdict: dict[str, Verdict]) -> None:
    for leaking in ("lfm2", "qwen3_5_text", "bamba", "zamba2", "falcon_h1", "granitemoehybrid, mamba", "olmo_hybrid"):
        assert verdict[leaking][1].startswith("mixes tokens outside attention"), leaking
    assert verdict["doge"] == ("rows", "passes its own mask to attention, which packed attention would ignore")
    assert verdict["emu3"][1].endswith("is not a text-only model")  # its export loads nowhere
    assert verdict["bert"] == ("refused", "has attention that is not causal (is_decoder=false)")
    assert verdict["deepseek_v32"][1].startswith("selects the keys of its attention by an indexer")
    assert verdict["xglm"][1].startswith("draws random numbers in its layers (dropout)")


@pytest.mark.parametrize("name", listed(PACKED))
def test_a_packed_model_gives_the_numbers_of_transformers(
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


@pytest.mark.parametrize("name", listed(ROWS))
def test_a_model_run_row_by_row_gives_the_numbers_of_transformers(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = tiny_model(tiny_config(*MODELS[name]))
    policy = Policy.load(str(save(lm, tmp_path / "model", tokenizer))).train()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (40, 28, 12)]
    with torch.no_grad():
        block = policy(pack_tokens(sequences), None, StatsRequest(("logp",)))["logp"]
    wanted = torch.cat([alone(lm, ids) for ids in sequences])
    assert float((block - wanted).abs().max()) < TOLERANCE

    export(policy.lm, tokenizer, tmp_path / "export", write=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).state_dict()
    for key, tensor in lm.state_dict().items():
        assert torch.equal(again[key], tensor), f"{key} of the export"


async def sample(lm: torch.nn.Module, policy: Policy, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log-probabilities of a copy of the policy in the embedded engine."""
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=3, memory_share=0.2, owns_weights=True)
    engine.load_weights(named_weights(policy.lm), version=1)
    limits = (3, 8, 2, 12, 5)  # so that requests leave and enter
    asked = (engine.generate(ids, Sampling(limits[n], seed=n)) for n, ids in enumerate(prompts))
    done = await asyncio.gather(*asked)
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
