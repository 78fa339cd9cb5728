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
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from .gsm8k import behind_reasoning
from .mcp_servers import McpServer, servers_of
from .tool_turns import Tool, ToolError, is_right, limits, observe
from .variables import number, required
from .workers import WorkerError, Workers

FILES = [Path(name) for name in required("TOOLS", "names files of functions or MCP servers").split(os.pathsep)]
GRADER = os.environ.get("GRADER", "")
TIMEOUT_S = number("TOOL_TIMEOUT_S", "10", whole=False)
"""Limit of a call in seconds."""
LIMITS = limits()
LOADING = threading.Lock()
WORKERS = Workers(__file__, "make_caller", limit_s=TIMEOUT_S, wall_s=TIMEOUT_S)
"""Processes of the Python functions; one that takes too long is killed."""


async def step(state: str, action: str, extra_info: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    if not calls:
        reward = GRADE(behind_reasoning(action, state).strip(), extra_info)
        reward = float(await reward if inspect.isawaitable(reward) else reward)
        return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
    return await observe(calls, await asyncio.to_thread(tools), LIMITS, extra_info)


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "answer"} to a chat, and add the tools to any row."""
    schemas = [tool.schema for tool in tools().values()]
    if row.get("messages") is not None or row.get("prompt") is not None:
        return row | {"tools": schemas}
    messages = [{"role": "user", "content": row["question"]}]
    return {"messages": messages, "extra_info": {"answer": row["answer"]}, "tools": schemas}


def tools() -> dict[str, Tool]:
    """Return all tools by name. Raise ValueError if two have the same name."""
    with LOADING:  # threads of several episodes may ask for them at once
        return load_tools()


@cache
def load_tools() -> dict[str, Tool]:
    servers = [server for file in FILES if file.suffix == ".json" for server in servers_of(file)]
    with ThreadPoolExecutor(1) as thread:  # this thread may run an event loop
        listed = thread.submit(asyncio.run, _list_tools(servers)).result()
    found = [Tool(schema, partial(_call_server, server, _name(schema))) for server, schema in listed]
    found += [Tool(schema, partial(_call_function, _name(schema))) for schema in _function_schemas()]
    by_name = {tool.name: tool for tool in found}
    if len(by_name) < len(found):
        names = [tool.name for tool in found]
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
