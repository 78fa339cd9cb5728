"""A debate about a question: two sides argue, and a judge says which one is right.

Rows are {"prompt": question, "extra_info": {"answer": "yes"}}. The answer is optional: the judge never reads it, but
the metric `right` and the judge's own reward need it. Freeze the judge with rollout.opponents.judge=start, and allow
all turns with rollout.max_turns=5.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

ROUNDS = 2
ROLES = {
    "pro": "You take part in a debate. Argue in a few sentences that the answer is yes, and reply to your opponent.",
    "con": "You take part in a debate. Argue in a few sentences that the answer is no, and reply to your opponent.",
    "judge": "You judge a debate. Weigh the arguments, and end with the right answer to the question: yes or no.",
}


async def play(ask: Callable[..., Awaitable[str]], task: dict[str, Any]) -> dict[str, Any]:
    debate = [f"The question: {task['prompt']}"]
    heard = {"pro": 0, "con": 0}
    for side in ("pro", "con") * ROUNDS:
        argument = await ask(side, "\n\n".join(debate[heard[side] :]))
        debate.append(f"{side.upper()}: {argument}")
        heard[side] = len(debate)

    decided = re.findall(r"\b(?:yes|no)\b", (await ask("judge", "\n\n".join(debate))).lower())
    if not decided:
        raise ValueError("the judge gave no answer")  # so nobody has a reward, which is not a reward of 0
    rewards = {"pro": 1, "con": -1} if decided[-1] == "yes" else {"pro": -1, "con": 1}
    if "answer" not in task["extra_info"]:
        return {"rewards": rewards}
    right = decided[-1] == task["extra_info"]["answer"]
    return {"rewards": rewards | {"judge": right}, "metrics": {"right": right}}
