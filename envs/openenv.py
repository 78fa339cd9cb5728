"""Environments of OpenEnv over several turns, on a server: OPENENV_URL=http://127.0.0.1:8000.

No prompt file is needed: `reset` starts an episode from the seed that all samples of a prompt share. OPENENV_RESET, a
JSON object, has more arguments of the server's reset. The first message shows the schema of an action, after
OPENENV_PROMPT. A response is an action: a JSON object, or only the value if the schema requires one field. Allow as
many turns as an episode needs (rollout.max_turns); the sum of its rewards is the score.

An episode is one connection to the server, which must allow as many as run at a time (`max_concurrent_envs`); further
episodes wait. If the server fails or answers too late (OPENENV_TIMEOUT_S), the trajectory is unscored.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from typing import Any

import httpx

from .gsm8k import behind_reasoning
from .variables import number

try:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"it needs websockets: pip install 'rl2-spo[openenv]' ({error})") from error

URL = os.environ.get("OPENENV_URL", "http://127.0.0.1:8000").rstrip("/")
RESET = json.loads(os.environ.get("OPENENV_RESET", "{}"))
PROMPT = os.environ.get("OPENENV_PROMPT", "Act in an environment. Each of your replies is one action.")
TIMEOUT_S = number("OPENENV_TIMEOUT_S", "50", least=0.001, whole=False)
MAX_REPLY = 1 << 22
"""Limit of the server's reply in bytes."""
LONGEST = 100_000
"""Number of final characters of a response that are read as an action."""
AGAIN_S = 0.5
"""Time between two attempts to get a place on a full server."""
ANY_ACTION = ("Action", "CallToolAction", "ListToolsAction")
"""Titles of schemas that do not say which tools the environment has."""
CALL = '{"type": "call_tool", "tool_name": "...", "arguments": {...}}'


class ServerError(RuntimeError):
    """An error that the server reports."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.code = str(data.get("code"))
        super().__init__(f"{URL}: {self.code}: {str(data.get('message'))[:1000]}")


class Session:
    """A connection to the server, which is one episode there. It ends with the last reference to it."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.loop = asyncio.get_running_loop()

    async def ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the data of the server's answer. Raise ServerError if it is an error."""
        async with asyncio.timeout(TIMEOUT_S):
            with suppress(ConnectionClosed):  # a full server says so and closes
                await self.socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(await self.socket.recv())
        if answer["type"] == "error":
            raise ServerError(answer["data"])
        return answer["data"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # `rl2 play` keeps a copy of extra_info to show its changes

    def end(self) -> None:
        """Close the connection."""
        self.socket.transport.abort()

    def __del__(self) -> None:
        if not self.loop.is_closed():  # an episode may end at a limit of the trainer, which tells nobody
            self.loop.call_soon_threadsafe(self.socket.transport.abort)


async def reset(extra_info: dict[str, Any]) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        found = (await http.get(f"{URL}/schema")).raise_for_status().json()["action"]
    session, result = await begin({"seed": extra_info["seed"]} | RESET)
    if found.get("title") in ANY_ACTION:
        tools = (await session.ask("step", {"type": "list_tools"}))["observation"]["tools"]
        asked = f"An action is a JSON object, {CALL}. The tools are\n{json.dumps(tools, ensure_ascii=False)}"
        found = {}
    else:
        asked = f"An action is described by the JSON schema\n{json.dumps(shown(found), ensure_ascii=False)}"
        if field := only_field(found):
            asked += f"\nReply with the value of {field!r} alone."
    extra_info |= {"session": session, "schema": found}
    return [{"role": "user", "content": f"{PROMPT}\n{asked}\n\n{observation(result)}"}]


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    session = extra_info["session"]
    try:
        sent = action_of(behind_reasoning(action, state)[-LONGEST:], extra_info["schema"])
        result = await session.ask("step", sent)
    except (ValueError, ServerError) as error:
        if isinstance(error, ServerError) and error.code != "VALIDATION_ERROR":
            raise
        result = {"observation": {"error": f"That is not an action: {error}"}, "done": False, "reward": None}
    if result["done"]:
        session.end()
    reward = float(result["reward"] or 0.0)
    next_state = None if result["done"] else [{"role": "user", "content": observation(result)}]
    done = bool(result["done"])
    return {"next_state": next_state, "reward": reward, "score": reward, "done": done, "extra_info": extra_info}


async def begin(arguments: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    """Return a session and the result of its reset; wait for a place if the server is full."""
    address = re.sub("^http", "ws", URL) + "/ws"
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        # no pings: an episode may wait for an update of the weights
        socket = await connect(address, open_timeout=TIMEOUT_S, max_size=MAX_REPLY, ping_interval=None, proxy=None)
        session = Session(socket)
        try:
            return session, await session.ask("reset", arguments)
        except ServerError as error:
            if error.code != "CAPACITY_REACHED" or time.monotonic() > deadline:
                raise
        del session
        await asyncio.sleep(AGAIN_S)


def action_of(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the action that a response is. Raise ValueError if it is none."""
    text = text.strip()
    if fenced := re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL):
        text = fenced[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, dict):
        return value
    field = only_field(schema)
    if not field:
        raise ValueError("it is no JSON object")
    return {field: text if schema["properties"].get(field, {}).get("type") == "string" else value}


def only_field(schema: dict[str, Any]) -> str:
    """Return the field that actions need if they need only one, else an empty string."""
    required = schema.get("required", [])
    return required[0] if len(required) == 1 else ""


def shown(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without what every action has and no model fills in."""
    properties = {name: value for name, value in schema.get("properties", {}).items() if name != "metadata"}
    return {name: value for name, value in schema.items() if name not in ("title", "additionalProperties")} | {
        "properties": properties
    }


def observation(result: dict[str, Any]) -> str:
    """Return what the model reads of a result: the text if an observation is one, else JSON."""
    fields = {name: value for name, value in result["observation"].items() if name != "metadata"}
    values = list(fields.values())
    return values[0] if len(values) == 1 and isinstance(values[0], str) else json.dumps(fields, ensure_ascii=False)
