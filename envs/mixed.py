"""Several environments in one run: each row names its own in the column `env`, such as gsm8k for gsm8k.py beside this.

What the row says otherwise is for that environment, and goes through its `example` if it has one.
"""

from __future__ import annotations

import importlib
import inspect
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any


async def step(state: str, action: str, extra_info: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    name = extra_info["env"]
    inner = environment(name).step
    told = {"sampling": sampling} if "sampling" in inspect.signature(inner).parameters else {}
    result = await inner(state, action, extra_info, **told)
    return result | {"extra_info": result["extra_info"] | {"env": name}}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """A row {"env": name, ...} as that environment wants it."""
    name = row["env"]
    # a column that other environments use is null here
    row = {key: value for key, value in row.items() if key != "env" and value is not None}
    inner = getattr(environment(name), "example", None)
    made = row if inner is None else inner(row)
    extra_info = made.get("extra_info") or {}
    extra_info = json.loads(extra_info) if isinstance(extra_info, str) else extra_info
    return made | {"extra_info": extra_info | {"env": name}}


@lru_cache
def environment(name: str) -> ModuleType:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "mixed")
    if name not in known:
        raise ValueError(f"there is no environment {name!r} beside {Path(__file__).name}; there are {', '.join(known)}")
    module = importlib.import_module(f".{name}", __package__)
    if not hasattr(module, "step"):
        raise ValueError(f"{name}.py has no `step` and is no environment")
    return module
