"""A trained reward model judges the response: REWARD_MODEL=ckpts/rm/latest names its folder or hub name.

It reads the text of the conversation and the token that ends a turn, as in training, and its value there is reward and
score. So its tokenizer and chat template are those of the policy; a response that was cut is judged as if it had
ended by itself. Each process holds the model once, on its own device, and asks it in a thread, one response at a time.
Values have no natural scale: normalise advantages, and keep the policy near a reference (actor.kl.coef).
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

if "REWARD_MODEL" not in os.environ:
    raise ValueError("REWARD_MODEL is not set; it names the reward model, for example REWARD_MODEL=ckpts/rm/latest")

NAME = os.environ["REWARD_MODEL"]
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1, dtype=DTYPE).to(DEVICE).eval()
model.config.pad_token_id = None  # one row needs no padding, and the value is then that of its last token
LONGEST = model.config.max_position_embeddings
thread = ThreadPoolExecutor(1, thread_name_prefix="reward model")


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    reward = await asyncio.get_running_loop().run_in_executor(thread, value, state, action)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def find_end() -> tuple[str, int]:
    """Return what the chat template writes before an answer, and the token that it ends one with."""
    if tokenizer.chat_template is None:
        return "", tokenizer.eos_token_id
    asked = [{"role": "user", "content": "."}]
    closed = str(tokenizer.apply_chat_template(asked, tokenize=False))
    opened = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    answered = str(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "zqxmark"}], tokenize=False))
    behind = tokenizer.encode(answered.partition("zqxmark")[2], add_special_tokens=False)
    added = set(tokenizer.get_added_vocab().values())
    return opened.removeprefix(closed), next((token for token in behind if token in added), tokenizer.eos_token_id)


HEADER, END = find_end()
HEAD = tokenizer("").input_ids[:1] if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else []
"""What a text begins with; the chat template writes it itself."""


@torch.inference_mode()
def value(state: str, action: str) -> float:
    is_chat = bool(HEADER) and state.endswith(HEADER)
    end = END if is_chat or str(tokenizer.convert_ids_to_tokens(END)) in state else tokenizer.eos_token_id
    token_ids = [*tokenizer.encode(state + action, add_special_tokens=False), end]
    if not is_chat and token_ids[: len(HEAD)] != HEAD:
        token_ids = HEAD + token_ids
    if len(token_ids) > LONGEST:
        raise ValueError(f"{len(token_ids)} tokens, and the reward model reads {LONGEST}")
    return float(model(torch.tensor([token_ids], device=DEVICE)).logits[0, 0])
