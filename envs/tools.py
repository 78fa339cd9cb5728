"""Tools: Python functions and MCP servers that the model calls in the format of its chat template.

TOOLS names a file of functions (tools.py), of servers (servers.json with `mcpServers`), or several, with `:` between
them. A response without calls is the final answer; GRADER=path.py:function judges it, by default against the answer of
the row. Allow several turns (rollout.max_turns).

Errors are observations: of a tool, of a call that cannot be read, of a limit. If a server fails, the trajectory is
unscored, because that is not the model's fault.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from .gsm8k import behind_reasoning
from .gsm8k import number as number_on
from .mcp_servers import McpServer, ToolError, servers_of
from .searchr1 import is_match
from .variables import number, required
from .workers import WorkerError, Workers

FILES = [Path(name) for name in required("TOOLS", "names files of functions or MCP servers").split(os.pathsep)]
GRADER = os.environ.get("GRADER", "")
TIMEOUT_S = number("TOOL_TIMEOUT_S", "10", whole=False)
"""Limit of a call in seconds."""
MAX_CALLS = number("TOOL_MAX_CALLS", "8", least=1)
"""Limit of the calls in a response; further ones are answered by an error."""
MAX_CHARS = number("TOOL_MAX_CHARS", "4000", least=1)
"""Limit of an observation in characters."""
WORKERS = Workers(__file__, "make_caller", limit_s=TIMEOUT_S, wall_s=TIMEOUT_S)
"""Processes of the Python functions; one that takes too long is killed."""


@dataclass(frozen=True)
class Tool:
    """A tool that the model can call."""

    schema: dict[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[str]]
    """Return the result. Raise ToolError with what the model reads."""


async def step(state: str, action: str, extra_info: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    if not calls:
        reward = GRADE(behind_reasoning(action, state).strip(), extra_info)
        reward = float(await reward if inspect.isawaitable(reward) else reward)
        return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
    answers = await asyncio.gather(*(answer(call, place) for place, call in enumerate(calls)))
    messages = [
        {"role": "tool", "name": call["name"], "tool_call_id": f"call{place:05d}", "content": content}
        for place, (call, (content, _)) in enumerate(zip(calls, answers, strict=True))
    ]
    metrics = {"tool_calls": len(calls), "tool_errors": sum(is_error for _, is_error in answers)}
    result = {"next_state": messages, "reward": 0.0, "score": 0.0, "done": False, "extra_info": extra_info}
    return result | {"metrics": metrics}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "answer"} to a chat, and add the tools to any row."""
    schemas = [tool.schema for tool in tools().values()]
    if row.get("messages") is not None or row.get("prompt") is not None:
        return row | {"tools": schemas}
    messages = [{"role": "user", "content": row["question"]}]
    return {"messages": messages, "extra_info": {"answer": row["answer"]}, "tools": schemas}


async def answer(call: dict[str, Any], place: int = 0) -> tuple[str, bool]:
    """Return what the model reads after a call, and whether it is an error."""
    try:
        if call["error"] is not None:
            raise ToolError(f"the call cannot be read: {call['error']}")
        if place >= MAX_CALLS:
            raise ToolError(f"a response can have {MAX_CALLS} calls")
        known = await asyncio.to_thread(tools)
        if call["name"] not in known:
            raise ToolError(f"there is no tool {call['name']!r:.100}; there are {', '.join(known)}")
        return shortened(await known[call["name"]].call(call["arguments"])), False
    except ToolError as error:
        return shortened(f"error: {error}"), True


def shortened(text: str) -> str:
    more = len(text) - MAX_CHARS
    return text if more <= 0 else f"{text[:MAX_CHARS]}... ({more} more characters)"


@cache
def tools() -> dict[str, Tool]:
    """Return all tools by name. Raise ValueError if two have the same name."""
    servers = [server for file in FILES if file.suffix == ".json" for server in servers_of(file)]
    with ThreadPoolExecutor(1) as thread:  # this thread may run an event loop
        listed = thread.submit(asyncio.run, _list_tools(servers)).result()
    found = [Tool(schema, partial(_call_server, server, _name(schema))) for server, schema in listed]
    found += [Tool(schema, partial(_call_function, _name(schema))) for schema in _function_schemas()]
    by_name = {_name(tool.schema): tool for tool in found}
    if len(by_name) < len(found):
        names = [_name(tool.schema) for tool in found]
        raise ValueError(f"two tools are named {next(name for name in names if names.count(name) > 1)!r}")
    if not by_name:
        raise ValueError(f"TOOLS={os.environ['TOOLS']}: there is no tool in it")
    return by_name


async def _list_tools(servers: list[McpServer]) -> list[tuple[McpServer, dict[str, Any]]]:
    return [(server, schema) for server in servers for schema in await server.list_tools()]


async def _call_server(server: McpServer, name: str, arguments: dict[str, Any]) -> str:
    return await server.call(name, arguments, TIMEOUT_S)


async def _call_function(name: str, arguments: dict[str, Any]) -> str:
    try:
        return await WORKERS(name, arguments)
    except WorkerError as error:
        raise ToolError(str(error)) from error


def _name(schema: dict[str, Any]) -> str:
    return schema["function"]["name"]


def _function_schemas() -> list[dict[str, Any]]:
    """Return the schemas of the Python functions, from their type hints and docstrings."""
    from transformers.utils import get_json_schema  # not at the top: workers do without it

    schemas = []
    for name, function in functions().items():
        try:
            schemas.append(get_json_schema(function))
        except Exception as error:
            raise ValueError(f"{function.__code__.co_filename}: {name} is not a tool: {error}") from error
    return schemas


def functions() -> dict[str, Callable[..., Any]]:
    """Return the public functions with a docstring of all Python files, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for file in FILES:
        if file.suffix == ".json":
            continue
        module = load(file)
        found |= {
            name: value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__doc__ and name[0] != "_"
        }
    return found


def make_caller() -> Callable[[str, dict[str, Any]], str]:
    """Return the function that calls one of the functions in a worker process."""
    known = functions()

    def call(name: str, arguments: dict[str, Any]) -> str:
        result = known[name](**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_result(result))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    return call


async def _result(result: Awaitable[Any]) -> Any:
    return await result


def load(file: Path) -> Any:
    """Return the module in a file."""
    spec = importlib.util.spec_from_file_location(f"tools_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_right(answer: str, extra_info: dict[str, Any]) -> bool:
    """Return whether the last line of an answer, or the text after `####`, is the answer of the row.

    Numbers are compared as such, and other texts except for case, punctuation and articles.
    """
    _, mark, after = answer.rpartition("####")
    line = after.strip().partition("\n")[0] if mark else answer.rpartition("\n")[2]
    golds = extra_info["answer"] if isinstance(extra_info["answer"], list) else [extra_info["answer"]]
    for gold in map(str, golds):
        if is_match(line, gold) or (number_on(gold) is not None and number_on(line) == number_on(gold)):
            return True
    return False


def grader() -> Callable[[str, dict[str, Any]], Any]:
    """Return the function that GRADER names, by default `is_right`."""
    if not GRADER:
        return is_right
    path, _, name = GRADER.rpartition(":")
    found = getattr(load(Path(path)), name, None) if path else None
    if not callable(found):
        raise ValueError(f"GRADER={GRADER}: expected path.py:function, with a function of (answer, extra_info)")
    return found


GRADE = grader()
