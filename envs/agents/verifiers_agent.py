"""Environments of `verifiers` 0.4 as an agent: several turns, tools, several roles, and the parts of its rewards.

    rollout.agent=envs/agents/verifiers_agent.py:play   VERIFIERS_TASKSET=NAME, an installed taskset package

No prompt file is needed: the seed that all samples of a prompt share picks a task. VERIFIERS_ENV names an environment
other than the taskset's own, such as `user-sim`. VERIFIERS_CONFIG and VERIFIERS_ENV_CONFIG, JSON objects, have the
settings of the taskset and of the environment; a role with a `client` of its own is not played by the policy.

The package runs everything itself. Only the chat loop is in this process: a program for each turn, as the package's
harness `null` starts one with `uv`, would take longer than the turn.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from contextlib import AsyncExitStack
from typing import Any

import verifiers.v1 as vf
from openai import APIStatusError, AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.compaction import bound_tool_message, is_context_overflow
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

MOST_TASKS = 1000
"""Number of tasks that an endless taskset is read for."""


async def play(task: dict[str, Any]) -> dict[str, Any]:
    """Return the rewards, part by part and weighted, and the metrics of one episode."""
    random.seed(task["seed"])
    config = env_config(task["max_turns"])
    env = vf.load_environment(config)
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    context = vf.ModelContext(model=os.environ["OPENAI_MODEL"], client=client, sampling=vf.SamplingConfig())
    async with env.serving():
        episode = await env.run_episode(pick(env.taskset, task["seed"]), context)
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors))
    played = [trace for trace in episode.traces if trace.agent.config.client == client]
    if frozen := sorted({trace.agent.name for trace in played if not trace.agent.trainable}):
        raise ValueError(
            f"the policy may not play {', '.join(frozen)}, which the environment does not train; "
            'pass VERIFIERS_ENV_CONFIG=\'{"ROLE": {"model": ..., "client": {"type": "eval", "base_url": ...}}}\''
        )
    return {"reward": mean(played, rewards), "metrics": mean(played, lambda trace: trace.metrics)}


def env_config(max_turns: int) -> Any:
    """Return the configuration of the environment; a role has at most `max_turns` turns, unless it says otherwise."""
    taskset, env = os.environ.get("VERIFIERS_TASKSET"), os.environ.get("VERIFIERS_ENV", "")
    if not taskset:
        raise ValueError("VERIFIERS_TASKSET is not set; it names an installed taskset package")
    config = json.loads(os.environ.get("VERIFIERS_ENV_CONFIG", "{}"))
    config |= {"id": env, "taskset": {"id": taskset, **json.loads(os.environ.get("VERIFIERS_CONFIG", "{}"))}}
    ships_harness = vf.default_harness_id(taskset) == taskset
    for role, field in vf.env_config_type(taskset, env).model_fields.items():
        if isinstance(declared := field.default, vf.AgentConfig):
            own: dict[str, Any] = {"runtime": {"type": "subprocess"}}  # this machine; the package would rent one
            if declared.max_turns is None:
                own["max_turns"] = max_turns
            if declared.harness.id == "null" if declared.harness else not ships_harness:
                own["harness"] = {"id": __name__}
            config[role] = own | config.get(role, {})
    return vf.resolve_env_config(config)


def pick(taskset: Any, seed: int) -> Any:
    """Return the task that a seed picks."""
    tasks = list(taskset if taskset.bounded else itertools.islice(taskset, MOST_TASKS))
    if not tasks:
        raise ValueError(f"the taskset {taskset.config.id} holds no task")
    return tasks[seed % len(tasks)]


def rewards(trace: Any) -> dict[str, float]:
    """Return the weighted rewards of a trace."""
    if missing := [name for name, reward in trace.rewards.items() if reward is None]:
        raise RuntimeError(f"no reward {', '.join(missing)}")
    return {name: reward.value for name, reward in trace.rewards.items()}


def mean(traces: list[Any], values: Any) -> dict[str, float]:
    """Return the mean of each value over the traces that have it."""
    found = [values(trace) for trace in traces]
    return {
        name: sum(known) / len(known)
        for name in dict.fromkeys(name for each in found for name in each)
        if (known := [each[name] for each in found if each.get(name) is not None])
    }


class ChatHarnessConfig(vf.HarnessConfig):
    """Settings of the harness."""


class ChatHarness(vf.Harness[ChatHarnessConfig]):
    """A chat loop with the tools of the task and no others, which code on this machine never executes."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> vf.ProgramResult:
        """Run the chat until a response calls no tool."""
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += map(message_to_wire, prompt or [])
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            client = AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None, max_retries=0)
            await stack.enter_async_context(client)
            tools, places, connections = await connect_mcp({"mcpServers": servers}, stack)
            offered = {"tools": tools} if tools else {}
            while True:
                try:
                    answer = await client.chat.completions.create(model=ctx.model, messages=messages, **offered)
                except APIStatusError as error:
                    # a full context ends the chat; the package knows whether it has refused the request itself
                    return vf.ProgramResult(0 if is_context_overflow(error) else 1, "", str(error))
                message = answer.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    return vf.ProgramResult(0, "", "")
                for call in message.tool_calls:
                    told = {"role": "tool", "tool_call_id": call.id, "content": await result(call, places, connections)}
                    messages.append(bound_tool_message(told))


async def result(call: Any, places: Any, connections: Any) -> Any:
    """Return what a tool answers to a call, or the error that the model reads."""
    name = call.function.name
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except json.JSONDecodeError as error:
        return f"error: invalid JSON in tool arguments ({error})"
    if not isinstance(arguments, dict):
        return "error: tool arguments must be a JSON object"
    if name not in places:
        return f"error: unknown tool {name!r}"
    return await call_mcp(connections, places, name, arguments)


__all__ = ["ChatHarness"]
