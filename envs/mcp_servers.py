"""MCP servers, each a process (stdio) or a URL (streamable HTTP), and sessions with them; used by tools.py.

A session opens at the first call in an event loop. It closes when the loop stops, and a process ends with it. On Linux
the kernel also ends the process when the thread that started it does, so that none outlives a run that is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from .tool_turns import ToolError

START_S = 30.0
"""Limit of the start of a server in seconds."""
LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):  # otherwise the parent ended before that
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Program that becomes the server, which ends with its parent."""


class McpServer:
    """An MCP server, and a session with it for the event loop that calls its tools."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        """Take the settings of an entry of `mcpServers`: `command`, `args`, `env`, `cwd`, or `url`, `headers`."""
        self.name = name
        self.settings = settings
        command = settings.get("command")
        if bool(command) == bool(settings.get("url")):
            raise ValueError(f"mcpServers.{name}: expected either 'command' or 'url'")
        if command and shutil.which(command) is None:
            raise ValueError(f"mcpServers.{name}.command={command!r} is not a program")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._client: asyncio.Future[Any] | None = None

    async def list_tools(self) -> list[dict[str, Any]]:
        """Return the schemas of all tools, in the form of chat templates, from a session of its own."""
        async with AsyncExitStack() as stack, asyncio.timeout(START_S):
            client = await self._connect(stack)
            tools: list[dict[str, Any]] = []
            page = None
            while page is None or page.next_cursor:
                page = await client.list_tools(cursor=page.next_cursor if page else None)
                tools += [_schema(tool) for tool in page.tools]
            return tools

    async def call(self, tool: str, arguments: dict[str, Any], limit_s: float) -> str:
        """Return the result of a tool as text.

        Raise ToolError if the tool reports an error or takes longer than `limit_s`, and RuntimeError if the server
        fails.
        """
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED

        client = await self._opened()
        session = self._session
        try:
            async with asyncio.timeout(limit_s):
                result = await client.call_tool(tool, arguments)
        except TimeoutError as error:
            raise ToolError(f"it took longer than {limit_s:g} s") from error
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ToolError(error.message) from error
            raise self._failed(error, session) from error
        except Exception as error:
            raise self._failed(error, session) from error
        text = _text(result)
        if result.is_error:
            raise ToolError(text)
        return text

    async def _opened(self) -> Any:
        """Return the client of this event loop, connected."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._session is None or self._session.done():
            self._loop, self._client = loop, loop.create_future()
            self._session = loop.create_task(self._hold(self._client))
        assert self._client is not None
        return await asyncio.shield(self._client)

    async def _hold(self, client: asyncio.Future[Any]) -> None:
        """Hold a session open until this task is cancelled."""
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(START_S):  # not wait_for: a session closes in the task that opened it
                    connected = await self._connect(stack)
                client.set_result(connected)
                await asyncio.Event().wait()
        except Exception as error:
            if not client.done():
                client.set_exception(self._failed(error, None))
        finally:
            client.cancel()

    async def _connect(self, stack: AsyncExitStack) -> Any:
        try:
            import httpx2
            from mcp.client.client import Client
            from mcp.client.stdio import StdioServerParameters, stdio_client
            from mcp.client.streamable_http import streamable_http_client
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"it needs mcp: pip install 'rl2-spo[tools]' ({error})") from error

        settings = self.settings
        if settings.get("url"):
            headers = settings.get("headers") or {}
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=None))
            transport = streamable_http_client(settings["url"], http_client=http)
        else:
            command = [settings["command"], *settings.get("args", [])]
            if sys.platform == "linux":
                command = [sys.executable, "-c", LAUNCH, str(os.getpid()), *command]
            transport = stdio_client(
                StdioServerParameters(
                    command=command[0], args=command[1:], env=settings.get("env"), cwd=settings.get("cwd")
                )
            )
        return await stack.enter_async_context(Client(transport))

    def _failed(self, error: BaseException, session: asyncio.Task[None] | None) -> RuntimeError:
        """End the session that failed, so that the next call opens one, and return the error to raise."""
        # another call may have opened a new session meanwhile
        if session is not None and self._session is session:
            self._session.cancel()
            self._ending.add(self._session)  # it takes a while to close, and loops hold tasks only weakly
            self._session.add_done_callback(self._ending.discard)
            self._session = None
        while isinstance(error, BaseExceptionGroup):  # of a task group
            error = error.exceptions[0]
        return RuntimeError(f"the MCP server {self.name} failed: {type(error).__name__}: {error}"[:500])


def servers_of(path: Path) -> list[McpServer]:
    """Return the servers in a file `{"mcpServers": {"name": {...}}}`."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["mcpServers"]
        return [McpServer(name, settings) for name, settings in entries.items()]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path}: expected {{"mcpServers": {{"name": {{"command": ...}}}}}}: {error}') from error


def _schema(tool: Any) -> dict[str, Any]:
    """Return the schema of a tool in the form that chat templates read."""
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _text(result: Any) -> str:
    """Return a result as text; other content is named by its type."""
    texts = [getattr(block, "text", None) or f"[{block.type}]" for block in result.content]
    if not texts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(texts)
