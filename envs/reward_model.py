"""A trained reward model judges the response: REWARD_MODEL=ckpts/rm/latest names its folder or hub name.

It reads the text of the conversation and the token that ends a turn, and its value there is reward and score. So its
tokenizer and chat template are those of the policy; a response that ran into the length limit is judged as if it had
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
    reward = await asyncio.get_running_loop().run_in_executor(thread, value, state + action)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


@torch.inference_mode()
def value(text: str) -> float:
    token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    if len(token_ids) > LONGEST:
        raise ValueError(f"{len(token_ids)} tokens, and the reward model reads {LONGEST}")
    return float(model(torch.tensor([token_ids], device=DEVICE)).logits[0, 0])
