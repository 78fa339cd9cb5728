"""Reward model environment: REWARD_MODEL=ckpts/rm/latest names the folder or hub name of a trained model.

A model with one value per text reads the conversation and the end-of-turn token, as in training; its value there is
reward and score. Its tokenizer and chat template must therefore be those of the policy. A truncated response is judged
as if it had ended by itself. A response that never closes its reasoning has no answer to judge and is unscored: values
have no natural scale, so 0 may be better than what others earn. For the same reason normalise advantages, and keep the
policy near a reference (actor.kl.coef).

A process reward model, which classifies tokens (as TRL's PRMTrainer trains them), judges every step of the response.
REWARD_STEP separates steps; the default is a blank line. The value at the separator after a step (with two labels, the
probability of the second) is the reward of that step's span. REWARD_STEPS selects the rewards: `mean`, each value
divided by the number of steps; `gain`, the increase of the value with the step, so that the total is the last value;
`sum`, the values themselves, which rewards more steps. The score is the mean of the values.

Each process holds the model once, on its own device, and runs it in a thread, one response at a time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .gsm8k import is_unclosed
from .variables import required

NAME = required("REWARD_MODEL", "names the reward model, for example REWARD_MODEL=ckpts/rm/latest")
STEP = os.environ.get("REWARD_STEP", "\n\n").replace("\\n", "\n")
STEPS = os.environ.get("REWARD_STEPS", "mean")
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

tokenizer = AutoTokenizer.from_pretrained(NAME)
config = AutoConfig.from_pretrained(NAME)
JUDGES_STEPS = any(name.endswith("ForTokenClassification") for name in config.architectures or ())
if JUDGES_STEPS and config.num_labels not in (1, 2):
    raise ValueError(f"REWARD_MODEL={NAME} has {config.num_labels} labels; a process reward model has one or two")
if STEPS not in ("mean", "gain", "sum"):
    raise ValueError(f"REWARD_STEPS={STEPS}; choose mean, gain or sum")
if not STEP:
    raise ValueError("REWARD_STEP is empty; it is what separates steps, such as \\n")

if JUDGES_STEPS:
    model = AutoModelForTokenClassification.from_pretrained(NAME, dtype=DTYPE).to(DEVICE).eval()
else:
    model = AutoModelForSequenceClassification.from_pretrained(NAME, num_labels=1, dtype=DTYPE).to(DEVICE).eval()
    model.config.pad_token_id = None  # a single row needs no padding; its value is then that of its last token
LONGEST = model.config.max_position_embeddings
thread = ThreadPoolExecutor(1, thread_name_prefix="reward model")


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    judged = in_steps if JUDGES_STEPS else as_a_whole
    result = await asyncio.get_running_loop().run_in_executor(thread, judged, state, action)
    return {"next_state": None, "done": True, "extra_info": extra_info, **result}


def as_a_whole(state: str, action: str) -> dict[str, Any]:
    """Return reward and score of a response from its last token."""
    refuse_unclosed(state, action)
    reward = value(state, action)
    return {"reward": reward, "score": reward}


def in_steps(state: str, action: str) -> dict[str, Any]:
    """Return reward, score and spans of a response; without a step it earns nothing."""
    if config.num_labels == 2 and is_unclosed(action, state):  # 0 is the smallest probability
        return {"reward": 0.0, "score": 0.0}
    refuse_unclosed(state, action)
    places = list(steps(action))
    values = step_values(state, [action[start:end] for start, end in places])
    mean = sum(values) / max(1, len(values))
    rewards = {
        "mean": [each / len(values) for each in values],
        "gain": [each - before for before, each in zip([0.0, *values], values, strict=False)],
        "sum": values,
    }[STEPS]
    spans = [{"span": place, "reward": reward} for place, reward in zip(places, rewards, strict=True)]
    return {"reward": 0.0, "score": mean, "spans": spans}


def refuse_unclosed(state: str, action: str) -> None:
    if is_unclosed(action, state):
        raise ValueError("the response never closes its reasoning: there is no answer to judge")


def steps(action: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each step of a response, without surrounding white space; blank steps are skipped."""
    start = 0
    for piece in action.split(STEP):
        if text := piece.strip():
            first = start + piece.index(text)
            yield first, first + len(text)
        start += len(piece) + len(STEP)


def find_end() -> tuple[str, int]:
    """Return the text that the chat template writes before an answer, and the token that ends the answer."""
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
"""Token at the start of a text; the chat template writes it itself."""


def value(state: str, action: str) -> float:
    """Return the value of a response at the token that ends it."""
    is_chat = bool(HEADER) and state.endswith(HEADER)
    end = END if is_chat or str(tokenizer.convert_ids_to_tokens(END)) in state else tokenizer.eos_token_id
    return float(outputs(state, [*encode(state + action), end])[0])


def step_values(state: str, texts: list[str]) -> list[float]:
    """Return the value of each step at the last token of the separator after it."""
    token_ids, ends = encode(state), []
    for text in texts:
        token_ids += encode(text) + encode(STEP)
        ends.append(len(token_ids))
    logits = outputs(state, token_ids) if texts else torch.zeros(0, config.num_labels)
    read = logits[
        [end - 1 - len(token_ids) for end in ends]
    ]  # counted from the end: `outputs` may add a token at the start
    return (read.softmax(-1)[:, 1] if config.num_labels == 2 else read[:, 0]).tolist()


def encode(text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@torch.inference_mode()
def outputs(state: str, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of a text, float32: one row per token, or one value."""
    is_chat = bool(HEADER) and state.endswith(HEADER)
    if not is_chat and token_ids[: len(HEAD)] != HEAD:
        token_ids = HEAD + token_ids
    if len(token_ids) > LONGEST:
        raise ValueError(f"{len(token_ids)} tokens, but the reward model reads at most {LONGEST}")
    return model(torch.tensor([token_ids], device=DEVICE)).logits[0].float().cpu()
