"""Every multimodal model of transformers trains its text model exactly, or is refused with the reason.

Exact: sequences get the log-probabilities of the multimodal class itself; an export holds the text as trained and
every other tensor as it was. docs/models.md lists the types; with RL2_WRITE_DOCS=1 its table is written anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from model_tables import listed, shown_table
from tiny_multimodal import TYPES, multimodal_config, multimodal_model
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerBase

from RL2.batch.packing import pack_tokens
from RL2.errors import ConfigError
from RL2.models.multimodal import text_part
from RL2.models.policy import Policy, export
from RL2.types import StatsRequest

BEGIN, END = "<!-- made by tests/unit/models/test_multimodal_families.py -->\n", "<!-- to here too -->\n"
TRAINED = "**Text part trained exactly**"


NOT_TRIED = {
    "fast_vlm": "was not tried: it needs timm",
    "gemma3n": "was not tried: it needs timm",
    "perception_lm": "was not tried: it needs timm",
    "janus": "was not tried: its other parts are large at their smallest",
    "nemo_speechlm": "was not tried: its other parts are large at their smallest",
    "vibevoice_asr": "was not tried: its other parts are large at their smallest",
    "shieldgemma2": "judges images, and transformers saves its model under names that it does not load",
}
"""Types whose structure does not decide."""


def verdicts(folder: Path) -> dict[str, str]:
    """Return type -> why it is refused, '' if it is exact, from the structure alone; only types with a text model."""
    found = {}
    for name in TYPES:
        try:
            usual = CONFIG_MAPPING[name]()
        except (ValueError, TypeError):
            continue
        if text_part(usual) is not usual:
            found[name] = NOT_TRIED.get(name) or judged(name, folder / name)
    return found


def judged(name: str, folder: Path) -> str:
    try:
        config = multimodal_config(name)
    except Exception:  # a configuration that transformers itself refuses at this size
        return "was not tried: it cannot be built at a small size"
    config.save_pretrained(folder)
    try:
        Policy.build(str(folder))
    except ConfigError as refused:
        said = str(refused)
        assert said.startswith(f"{folder}: ") and "\n" not in said
        why = re.sub(rf"^{name} is not .* (does not run text as \w+ does)", r"\1", said.removeprefix(f"{folder}: "))
        why = re.sub(rf"^({name}|{text_part(config).model_type}) ", "", why)
        return re.sub(r"(cannot be built).*", r"\1", why)
    return ""


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return verdicts(tmp_path_factory.mktemp("configurations"))


def table(verdict: dict[str, str]) -> str:
    """Return the document's tables: types that are exact, and the others by reason."""
    exact = [f"`{name}`" for name, why in verdict.items() if not why]
    refused = defaultdict(list)
    for name, why in verdict.items():
        if why:
            refused[why].append(f"`{name}`")
    rows = [
        f"{TRAINED} ({len(exact)}): {', '.join(exact)}.",
        "",
        "| not trained, because it | multimodal models |",
        "|---|---|",
    ]
    rows += [f"| {why} | {', '.join(names)} |" for why, names in sorted(refused.items(), key=lambda x: -len(x[1]))]
    return "\n".join(rows) + "\n"


def test_the_document_has_every_multimodal_model(verdict: dict[str, str]) -> None:
    assert shown_table(BEGIN, END, table(verdict)) == table(verdict)


def test_the_usual_multimodal_models_are_trained(verdict: dict[str, str]) -> None:
    usual = {"qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "mistral3", "internvl", "llava", "lfm2_vl", "smolvlm"}
    assert usual <= {name for name, why in verdict.items() if not why}
    assert verdict["aya_vision"].startswith("does not run text as Cohere2ForCausalLM does: it changes its logits by")


@pytest.mark.parametrize("name", listed(TRAINED))
def test_the_text_part_gives_the_numbers_of_the_multimodal_class(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = multimodal_model(multimodal_config(name))
    whole.save_pretrained(tmp_path / "model")
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path / "model")
    policy = Policy.load(str(tmp_path / "model")).train()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (40, 28, 12)]
    with torch.no_grad():
        ours = policy(pack_tokens(sequences), None, StatsRequest(("logp",)))["logp"]
        theirs = torch.cat([alone(whole, ids) for ids in sequences])
    assert float((ours - theirs).abs().max()) < 1e-4

    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(0.5)
    export(policy.lm, tokenizer, tmp_path / "export", write=True)
    again, loading = type(whole).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(loading.values()), loading
    changes = {key: parameter - whole.get_parameter(key) for key, parameter in again.named_parameters()}
    changed = [key for key, change in changes.items() if change.any()]
    assert len(changed) == len(list(policy.lm.parameters())), "all text, and nothing else"
    assert all(torch.allclose(changes[key], torch.tensor(0.5), atol=1e-6) for key in changed)
    assert all(torch.equal(buffer, whole.get_buffer(key)) for key, buffer in again.named_buffers())


def alone(whole: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first, by the multimodal class on this text alone."""
    logp = whole(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
