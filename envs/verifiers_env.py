"""Single-turn tasks of a `verifiers` taskset: VERIFIERS_TASKSET=NAME, an installed taskset package.

No prompt file is needed: `reset` picks a task by the seed that all samples of a prompt share. VERIFIERS_CONFIG, a JSON
object, has settings of the taskset. The taskset's own rewards judge the answer, in processes that are killed if they
hang. Tasks with tools, several agents, a container, or rewards that inspect a running program are refused.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

from .gsm8k import behind_reasoning
from .workers import Workers

if importlib.util.find_spec("verifiers") is None:
    raise ModuleNotFoundError("it needs verifiers: pip install 'rl2-spo[verifiers]'")

TASKSET = os.environ.get("VERIFIERS_TASKSET")
CONFIG = json.loads(os.environ.get("VERIFIERS_CONFIG", "{}"))
MOST_TASKS = 100_000
"""Limit of the tasks taken from an endless taskset."""

taskset = Workers(__file__, "make_taskset", limit_s=30)


async def reset(extra_info: dict[str, Any]) -> list[dict[str, Any]]:
    return await taskset(extra_info["seed"], None)


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    is_open = bool(action) and not behind_reasoning(action, state)  # reasoning without an answer
    reward = 0.0 if is_open else await taskset(extra_info["seed"], action)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def make_taskset() -> Callable[[int, str | None], list[dict[str, Any]] | float]:
    """Return the function that runs in the workers: it gives a task's messages, or the reward of a response."""
    import verifiers.v1 as vf
    from verifiers.v1.trace import TraceTask
    from verifiers.v1.types import content_text

    if TASKSET is None:
        raise ValueError("VERIFIERS_TASKSET is not set; it names an installed taskset package")
    config = vf.taskset_config_type(TASKSET).model_validate({"id": TASKSET, **CONFIG})
    tasks = list(itertools.islice(vf.load_taskset(config), MOST_TASKS))
    if not tasks:
        raise ValueError(f"the taskset {TASKSET} holds no task")
    refuse_what_needs_more(vf, TASKSET, config, tasks[0])

    def opening(task: Any) -> list[Any]:
        prompt, system = task.data.prompt, task.data.system_prompt
        messages = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or [])
        return [*([vf.SystemMessage(content=system)] if system else []), *messages]

    async def score(task: Any, action: str) -> float:
        thought, mark, reply = action.rpartition("</think>")
        answer = vf.AssistantMessage(content=reply, reasoning_content=thought.removeprefix("<think>") if mark else None)
        info = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        trace = vf.Trace(task=info, agent=vf.AgentInfo(config=vf.AgentConfig()))
        messages = [*opening(task), answer]
        for i, message in enumerate(messages):
            parent = i - 1 if i else None
            trace.nodes.append(vf.MessageNode(parent=parent, message=message, sampled=message is answer))
        await task.score(trace)
        if missing := [name for name, reward in trace.rewards.items() if reward is None]:
            raise RuntimeError(f"no reward {', '.join(missing)}")
        return trace.reward

    def messages_or_reward(seed: int, action: str | None) -> list[dict[str, Any]] | float:
        task = tasks[seed % len(tasks)]
        if action is not None:
            return asyncio.run(score(task, action))
        return [{"role": message.role, "content": content_text(message.content)} for message in opening(task)]

    return messages_or_reward


def refuse_what_needs_more(vf: Any, name: str, config: Any, task: Any) -> None:
    """Raise ValueError if tasks need more than one response to their prompt."""

    def needs_runtime(function: Callable[..., Any]) -> bool:
        parameter = inspect.signature(function).parameters.get("runtime")
        return parameter is not None and parameter.default is inspect.Parameter.empty

    kind = type(task)
    reasons = {
        "an environment of its own": vf.environment_class(name) is not vf.SingleAgentEnv,
        "tools": bool(vf.load_taskset(config).toolsets(config) or kind.toolsets(task.config)),
        "a container": kind.NEEDS_CONTAINER or task.data.image is not None,
        "preparations": kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize,
        "a running program to judge": any(map(needs_runtime, task.hooks("reward"))),
        "a user who begins": task.data.prompt is None,
        "no reward": not task.hooks("reward") and not task.plugged_judges(),
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError(f"the taskset {name} has {', '.join(found)}; only prompts with one response are supported")
