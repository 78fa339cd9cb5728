"""Conversion of rows of public data sets to the library's own format; a format is recognised by its keys.

Each converter takes a row without nulls and returns the converted row, or None if the row has another format.
"""

from __future__ import annotations

import re
from typing import Any

from RL2.data.source import DataError, Row, from_json, shown

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Role names of ShareGPT and its descendants -> the library's."""
SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("question", "query", "problem", "inputs")
RESPONSES = ("response", "output", "completion", "solution", "targets")
ANSWERS = ("answer", "golden_answers", "ground_truth", "label")
HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def canonical(row: Row) -> tuple[Row, str]:
    """Return the row in the library's own format and the name of its format; an empty name is our own."""
    names, present = list[str](), _without_nulls(row)
    for name, convert in FORMATS.items():
        converted = convert(present)
        if converted is not None:
            row, names, present = converted, [*names, name], _without_nulls(converted)
    return with_answer(row), " + ".join(names)


def _without_nulls(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def with_answer(row: Row) -> Row:
    """Return the row with its answer column copied to `extra_info`, where environments look for it."""
    extra_info = from_json(row.get("extra_info")) or {}
    answer = next((row[key] for key in ANSWERS if row.get(key) is not None and not isinstance(row[key], bool)), None)
    asks = row.get("prompt") is not None or row.get("messages") is not None
    if answer is None or not asks or not isinstance(extra_info, dict) or extra_info.get("answer") is not None:
        return row
    return row | {"extra_info": extra_info | {"answer": answer}}


def _openai_preference(row: Row) -> Row | None:
    """Convert OpenAI's preferences: `input` with `messages`, `preferred_output` and `non_preferred_output`."""
    if "preferred_output" not in row or not isinstance(row.get("input"), dict):
        return None
    sides = {"chosen": row["preferred_output"], "rejected": row.get("non_preferred_output")}
    return {**row["input"], **sides}


def _share_gpt(row: Row) -> Row | None:
    """Convert ShareGPT: turns of {"from", "value"} or {"role", "content"}, optionally with a `system` text."""
    key = next((key for key in ("conversations", "conversation", "messages") if key in row), None)
    turns = from_json(row[key]) if key else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    if key == "messages" and "from" not in turns[0]:
        return None
    made = {name: value for name, value in row.items() if name not in (key, *SYSTEMS)}
    for side in ("chosen", "rejected"):
        if isinstance(made.get(side), dict):
            made[side] = [_turn(made[side])]
    return made | {"messages": [*_system(row), *map(_turn, turns)]}


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of ShareGPT as a message."""
    if "from" not in turn:
        return turn
    role, value = turn["from"], turn.get("value")
    more = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
    if role == "function_call":
        call = from_json(value)
        if not isinstance(call, dict):
            raise DataError(f"a turn from 'function_call' must hold a call as JSON, not {shown(value)}")
        return {"role": "assistant", "content": None, "tool_calls": [call], **more}
    if role not in ROLES:
        raise DataError(f"a turn is from {shown(role)}; known are {', '.join(ROLES)}, function_call")
    return {"role": ROLES[role], "content": value, **more}


def _ultra_chat(row: Row) -> Row | None:
    """Convert UltraChat: `data` is a list of texts, user and assistant in turn."""
    texts = row.get("data")
    if "messages" in row or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    made = {key: value for key, value in row.items() if key != "data"}
    return made | {"messages": [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]}


def _hh(row: Row) -> Row | None:
    """Convert HH-RLHF: `chosen` and `rejected` are texts of "Human:" and "Assistant:" in turn."""
    sides = {key: row.get(key) for key in ("chosen", "rejected")}
    if "prompt" in row or "messages" in row or not all(isinstance(s, str) and HUMAN.match(s) for s in sides.values()):
        return None
    made = {}
    for key, text in sides.items():
        _, *parts = HUMAN.split(str(text))
        roles = [{"Human": "user", "Assistant": "assistant"}[who] for who in parts[::2]]
        made[key] = [{"role": r, "content": t.strip()} for r, t in zip(roles, parts[1::2], strict=True)]
    return row | made


def _verl(row: Row) -> Row | None:
    """Convert verl: `reward_model.ground_truth` is the answer, or an object for the environment."""
    reward_model = from_json(row.get("reward_model"))
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    extra_info = from_json(row.get("extra_info")) or {}
    if truth is None or not isinstance(extra_info, dict):
        return None
    if not isinstance(truth, dict):
        return row | {"extra_info": extra_info | {"answer": truth}}
    return row | {"extra_info": extra_info | truth | ({"answer": truth["target"]} if "target" in truth else {})}


def _alpaca(row: Row) -> Row | None:
    """Convert Alpaca: `instruction` with `input` (or Dolly's `context`), `output`, `system` and `history`."""
    if not isinstance(row.get("instruction"), str) or "prompt" in row or "messages" in row:
        return None
    given = next((row[key] for key in ("input", "context") if isinstance(row.get(key), str)), "")
    asked = f"{row['instruction']}\n{given}" if given.strip() else row["instruction"]
    history = from_json(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"'history' must be a list of questions with their answers, not {shown(history)}")
    before = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return _asked(row, [*_system(row), *before, {"role": "user", "content": asked}])


def _question(row: Row) -> Row | None:
    """Convert a question under one of several names that comes with one response, or two."""
    key = next((key for key in QUESTIONS if isinstance(row.get(key), str)), None)
    if key is None or "prompt" in row or "messages" in row or not {*RESPONSES, "chosen"} & row.keys():
        return None
    return _asked(row, [*_system(row), {"role": "user", "content": row[key]}])


def _human_eval(row: Row) -> Row | None:
    """Convert HumanEval: `prompt` is the beginning of a function and `canonical_solution` its rest."""
    if "entry_point" not in row or not isinstance(row.get("canonical_solution"), str) or "response" in row:
        return None
    return row | {"response": row["canonical_solution"]}


def _mbpp(row: Row) -> Row | None:
    """Convert MBPP: `text` (`prompt` in the sanitized version) with `code` and `test_list`."""
    asked = row.get("text", row.get("prompt"))
    if "test_list" not in row or not isinstance(row.get("code"), str) or not isinstance(asked, str):
        return None
    made = {key: value for key, value in row.items() if key != "prompt"}
    return made | {"messages": [{"role": "user", "content": asked}], "response": row["code"]}


def _asked(row: Row, messages: list[dict[str, Any]]) -> Row:
    """Return the row with `messages`, and with its response under the key `response`."""
    response = next((row[key] for key in RESPONSES if key in row), None)
    return row | {"messages": messages} | ({} if response is None else {"response": response})


def _system(row: Row) -> list[dict[str, Any]]:
    text = next((row[key] for key in SYSTEMS if isinstance(row.get(key), str) and row[key].strip()), None)
    return [] if text is None else [{"role": "system", "content": text}]


def _prompt_completion(row: Row) -> Row | None:
    """Convert TRL's prompt and `completion`, a string or a list of messages."""
    completion = from_json(row.get("completion"))
    if completion is None or "response" in row or "prompt" not in row:
        return None
    if not isinstance(completion, list):
        return row | {"response": row["completion"]}
    prompt = from_json(row["prompt"])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    made = {key: value for key, value in row.items() if key != "prompt"}
    return made | {"messages": [*prompt, *completion]} if isinstance(prompt, list) else None


def _prompt_list(row: Row) -> Row | None:
    """Convert `prompt` as a list of messages or its JSON; preference pairs stay unchanged."""
    prompt = from_json(row.get("prompt"))
    is_list = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not is_list or ("chosen" in row and "rejected" in row):
        return None
    made = {key: value for key, value in row.items() if key != "prompt"}
    messages = from_json(row.get("messages"))
    if messages is None:
        return made | {"messages": prompt}
    return made if isinstance(messages, list) and messages[: len(prompt)] == prompt else None


def _prompt_repeated(row: Row) -> Row | None:
    """Remove a `prompt` that repeats the first question of `messages`."""
    prompt, messages = row.get("prompt"), from_json(row.get("messages"))
    if not isinstance(prompt, str) or not isinstance(messages, list):
        return None
    asked = next((m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"), None)
    if not isinstance(asked, str) or asked.strip() != prompt.strip():
        return None
    return {key: value for key, value in row.items() if key != "prompt"}


FORMATS = {
    "OpenAI's preferences (preferred_output)": _openai_preference,
    "ShareGPT (conversations)": _share_gpt,
    "UltraChat (data)": _ultra_chat,
    "HH-RLHF (Human:, Assistant:)": _hh,
    "verl (reward_model.ground_truth)": _verl,
    "Alpaca (instruction)": _alpaca,
    "HumanEval (canonical_solution)": _human_eval,
    "MBPP (test_list)": _mbpp,
    "questions with responses": _question,
    "prompt and completion (TRL)": _prompt_completion,
    "prompt as a list of messages": _prompt_list,
    "messages beside their first question": _prompt_repeated,
}
"""Format name -> converter, in the order in which they are tried; several may apply to one row."""
