"""Settings of a script from environment variables; shared by environments. An empty variable counts as not set."""

from __future__ import annotations

import math
import os
from typing import Any


def number(name: str, default: str = "", least: float = 0.0, whole: bool = True) -> Any:
    """Return an environment variable as a number; None without a value. Raise ValueError if it is invalid."""
    text = os.environ.get(name) or default
    if not text:
        return None
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name}={text!r}: expected a {'whole ' * whole}number of at least {least:g}")
    return value


def chosen(name: str, default: str, *others: str) -> str:
    """Return an environment variable. Raise ValueError if it is not one of the choices."""
    value = os.environ.get(name) or default
    if value not in (default, *others):
        raise ValueError(f"{name}={value!r}: choose {' or '.join((default, *others))}")
    return value


def required(name: str, what: str) -> str:
    """Return an environment variable. Raise ValueError, which says `what` it does, if it is not set."""
    if not os.environ.get(name):
        raise ValueError(f"{name} is not set; it {what}")
    return os.environ[name]
