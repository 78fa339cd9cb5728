"""The task of an episode, as an agent or a script with roles is told it."""

from __future__ import annotations

import json
from typing import Any

from RL2.rollout.environment import Environment
from RL2.rollout.step_result import Unscored
from RL2.types import Prompt, Sampling


async def task_of(
    prompt: Prompt, environment: Environment, extra_info: dict[str, Any], sampling: Sampling, seed: int
) -> dict[str, Any]:
    """Return what an agent is told of its task: `prompt`, `messages`, `extra_info`, `tools`, `row` and `seed`.

    Without a row, `reset` makes the prompt; without `reset` there is none, and the agent makes a task of the seed.
    """
    messages, text = prompt.messages, prompt.text
    if not text:
        extra_info.setdefault("seed", seed % 2**32)
    if not text and environment.has_reset:
        state = await environment.reset(extra_info, sampling)
        messages = [{"role": "user", "content": state}] if isinstance(state, str) else state
        if not _is_json(messages):
            raise Unscored("reset returned messages with values that are not JSON, which an agent cannot read")
    if messages:
        asked = (m["content"] for m in reversed(messages) if m.get("role") == "user" and m.get("content"))
        text = str(next(asked, text))
    elif text:
        messages = [{"role": "user", "content": text}]
    return {
        "row": prompt.row,
        "seed": extra_info.get("seed", seed % 2**32),
        "prompt": text,
        "messages": messages,
        "tools": prompt.template_arguments.get("tools", []),
        "extra_info": {name: value for name, value in extra_info.items() if _is_json(value)},
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
