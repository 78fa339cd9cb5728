"""An MCP server for tests: over stdio, or over HTTP at the port that is given."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("harbour", log_level="ERROR")


@server.tool()
async def tide(harbour: str, days: int = 1) -> str:
    """Return the time of high tide."""
    if harbour == "Nowhere":
        raise ValueError("no such harbour")
    return f"{harbour}: 06:12 for {days} days"


@server.tool()
async def wait(seconds: float) -> str:
    """Wait and return the number of this process."""
    await asyncio.sleep(seconds)
    return str(os.getpid())


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
