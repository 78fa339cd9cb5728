"""Tools and calls of tools: between their form on the wire and that of chat templates.

Internally the arguments of a call are an object, or the sampled text if that was not one. On the wire they are a text
with JSON (OpenAI) or an object (Anthropic).
"""

from __future__ import annotations

import json
from typing import Any

from RL2.agents.protocol import RequestError
from RL2.data.source import shown

RAW = "INVALID_JSON"
"""Key under which Anthropic's protocol wraps arguments that its JSON cannot hold."""


def call(call_id: str | None, name: Any, arguments: Any, where: str) -> dict[str, Any]:
    """Return a call in the form of chat templates. Raise RequestError if it has no name or no arguments.

    The name is empty if the sampled call could not be read.
    """
    if not isinstance(name, str):
        raise RequestError(f"{where} must have the name of a tool, not {shown(name)}", parameter=where)
    if isinstance(arguments, str):
        arguments = decoded(arguments)
    if not isinstance(arguments, dict | str):
        raise RequestError(f"{where} must have arguments as JSON text, not {shown(arguments)}", parameter=where)
    known = {} if call_id is None else {"id": call_id}
    return {**known, "type": "function", "function": {"name": name, "arguments": arguments}}


def decoded(text: str) -> dict[str, Any] | str:
    """Return the arguments of a call from their JSON; the text itself if it is not an object."""
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):  # not JSON, or not readable by Python
        return text
    return arguments if isinstance(arguments, dict) else text


def written(arguments: dict[str, Any] | str) -> str:
    """Return the arguments of a call as JSON text that any client can encode; a text stays as it is."""
    if isinstance(arguments, str):
        return arguments
    text = json.dumps(arguments, ensure_ascii=False)
    return text if _encodable(text) else json.dumps(arguments)


def wrapped(arguments: dict[str, Any] | str) -> dict[str, Any]:
    """Return the arguments of a call as a JSON object; wrapped as text under RAW if JSON has no such object."""
    if isinstance(arguments, str):
        return {RAW: arguments}
    try:
        exact = _encodable(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:  # not a finite number
        exact = False
    return arguments if exact and arguments.keys() != {RAW} else {RAW: json.dumps(arguments)}


def unwrapped(arguments: dict[str, Any]) -> dict[str, Any] | str:
    """Return the arguments that `wrapped` made an object of."""
    if arguments.keys() == {RAW} and isinstance(arguments[RAW], str):
        return decoded(arguments[RAW])
    return arguments


def _encodable(text: str) -> bool:
    """Return whether UTF-8 can hold the text: arguments may have half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tool(name: Any, description: Any, parameters: Any, where: str) -> dict[str, Any]:
    """Return a tool in the form of chat templates. Raise RequestError if it has no name."""
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where} must have a name, not {shown(name)}", parameter="tools")
    if not isinstance(parameters or {}, dict):
        raise RequestError(f"{where} must have a JSON schema as an object, not {shown(parameters)}", parameter="tools")
    parameters = parameters or {"type": "object", "properties": {}}
    # without keys such as `strict`: templates would write them into the prompt
    function = {"name": name, "description": str(description or ""), "parameters": parameters}
    return {"type": "function", "function": function}


def wants_tools(choice: Any) -> bool:
    """Return whether a `tool_choice` lets the policy see the tools. Raise RequestError if it names one of them.

    Nothing constrains the sampling, so that a choice which requires some call lets the policy decide, too.
    """
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in (None, "auto", "none", "required", "any"):
        raise RequestError(
            f"tool_choice={shown(choice)} is not supported: nothing constrains the sampling to one tool; pass 'auto', "
            "and only the tools that may be called",
            parameter="tool_choice",
        )
    return kind != "none"
