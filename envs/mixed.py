"""Several environments in one run: the column `env` of each row names its own, such as gsm8k for gsm8k.py.

The other columns are passed to that environment, through its `example` if it has one.
"""

from __future__ import annotations

import importlib
import inspect
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any


async def step(
    state: str,
    action: str,
    extra_info: dict[str, Any],
    sampling: dict[str, Any],
    calls: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    name = extra_info["env"]
    inner = environment(name).step
    wanted = inspect.signature(inner).parameters
    extra = {key: value for key, value in (("sampling", sampling), ("calls", calls or [])) if key in wanted}
    result = await inner(state, action, extra_info, **extra)
    return result | {"extra_info": result["extra_info"] | {"env": name}}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row {"env": name, ...} with that environment's `example`."""
    name = row["env"]
    # null columns belong to other environments
    row = {key: value for key, value in row.items() if key != "env" and value is not None}
    inner = getattr(environment(name), "example", None)
    converted = row if inner is None else inner(row)
    extra_info = converted.get("extra_info") or {}
    extra_info = json.loads(extra_info) if isinstance(extra_info, str) else extra_info
    return converted | {"extra_info": extra_info | {"env": name}}


@lru_cache
def environment(name: str) -> ModuleType:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "mixed")
    if name not in known:
        raise ValueError(f"there is no environment {name!r} beside {Path(__file__).name}; there are {', '.join(known)}")
    module = importlib.import_module(f".{name}", __package__)
    if not hasattr(module, "step"):
        raise ValueError(f"{name}.py has no `step` and is no environment")
    return module
