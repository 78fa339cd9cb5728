"""Chat templates of real models, as the package trl carries them, and SmolLM2's, each with a small tokenizer."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

FOUND = importlib.util.find_spec("trl")  # not imported: that takes seconds
FOLDER = Path(FOUND.submodule_search_locations[0] if FOUND and FOUND.submodule_search_locations else ".")
FILES = {file.stem: file for file in sorted((FOLDER / "chat_templates").glob("*.jinja"))}
FILES |= {"smollm2": Path(__file__).parent / "templates" / "smollm2.jinja"} if FILES else {}

SPECIAL = re.compile(
    "<[|\uff5c][^<>\\s{}']*?[|\uff5c]>|<(?:start_of_turn|end_of_turn|end_of_utterance|[|][a-z_]+|[a-z_]+[|])>"
)
EOS = {  # where it is not <|im_end|>, by the beginning of the name
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "diffusion_gemma": "<eos>",
    "gemma": "<eos>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama3": "<|end_of_text|>",
    "llava": "</s>",
    "phi3": "<|endoftext|>",
    "smolvlm": "<end_of_utterance>",
}


@cache
def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template `name`: every byte is a token, and so is what looks like a special one."""
    return tokenizer_for(FILES[name].read_text(encoding="utf-8"), eos_of(name))


def eos_of(name: str) -> str:
    """Return the EOS token of the template `name`."""
    return next((token for start, token in EOS.items() if name.startswith(start)), "<|im_end|>")


def tokenizer_for(template: str, eos: str) -> PreTrainedTokenizerFast:
    """Return such a tokenizer for the text of a template."""
    special = sorted({*SPECIAL.findall(template), eos, "<bos>", "<|eot_id|>"})
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token="<bos>")
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    tokenizer.chat_template = template
    return tokenizer
