"""What many tests need: a small tokenizer, and this process as a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from chatml import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from RL2.parallel.processes import Processes

# without a GPU kernels are interpreted; Triton reads this when it is first imported, which other libraries do too
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# models this small gain nothing from threads, and lose much where cores are busy
torch.set_num_threads(1)

LINES = [
    "Tom has 12 apples and buys 30 more. How many apples does Tom have?",
    "Anna starts with 48 books. She gives away 19 of them. How many are left?",
    "12+30=42\n#### 42",
    "48-19=29\n#### 29",
    "user\nassistant\nsystem\n",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text can be encoded, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Shared by all tests; one that changes it takes a copy."""
    return make_tokenizer()


@pytest.fixture(scope="module")  # a process has one group at a time, and other tests want theirs
def processes() -> Iterator[Processes]:
    """This process alone."""
    processes = Processes.start(timeout_s=60)
    yield processes
    processes.stop()
