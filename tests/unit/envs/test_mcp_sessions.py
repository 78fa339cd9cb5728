"""A session with an MCP server that fails ends alone: calls of the next session go on."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from envs.mcp_servers import McpServer


class Failing(McpServer):
    """A server whose first session fails call by call."""

    sessions = 0

    async def _connect(self, stack: AsyncExitStack) -> Any:
        self.sessions += 1
        number = self.sessions

        async def call_tool(tool: str, arguments: dict[str, Any]) -> Any:
            await arguments["may_end"].wait()
            if number == 1:
                raise OSError("the connection is lost")
            return SimpleNamespace(content=[SimpleNamespace(text="right")], is_error=False)

        return SimpleNamespace(call_tool=call_tool)


def test_a_late_failure_of_a_session_does_not_end_the_next_one() -> None:
    async def work() -> int:
        server = Failing("flaky", {"command": sys.executable})
        events = [asyncio.Event() for _ in range(3)]
        calls = []
        for event in events:
            calls.append(asyncio.create_task(server.call("x", {"may_end": event}, 60)))
            await asyncio.sleep(0.01)
            if event is events[1]:
                events[0].set()
                with pytest.raises(RuntimeError, match="connection is lost"):
                    await calls[0]
        events[1].set()
        with pytest.raises(RuntimeError, match="connection is lost"):
            await calls[1]
        await asyncio.sleep(0.01)
        events[2].set()
        assert await calls[2] == await server.call("x", {"may_end": events[2]}, 60) == "right"
        return server.sessions

    assert asyncio.run(work()) == 2
