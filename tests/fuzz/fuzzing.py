"""What the fuzzers share: how many inputs, what may come of one, and how inputs are made of valid ones.

`RL2_FUZZ=100000 pytest tests/fuzz` spreads so many inputs over the targets; without it a few thousand.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from RL2.errors import UserError

TOTAL = int(os.environ.get("RL2_FUZZ", 4000))
LIMIT_S = 20
"""Of one input. They take milliseconds; what takes this long, on however busy a machine, hangs."""

NASTY = [
    *(b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"'", b",", b":", b"[", b"]", b"{", b"}", b"\\"),
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"null", b"true", b"\\ud800", b"\\u0000", b"%", b"{{"),
    *("\u2028".encode(), "\U0001f600".encode(), b"[" * 20_000, b'{"a":' * 20_000, b"a" * 200_000, b"&a", b"*a"),
]


def inputs(share: float, **changes: Any) -> settings:
    """For a target that gets this share of all inputs; the same ones each time."""
    return settings(
        max_examples=max(1, round(TOTAL * share)),
        derandomize=True,
        database=None,
        deadline=None,  # `clear` has a limit that a busy machine does not touch
        phases=(Phase.explicit, Phase.generate),  # to make a failing input of 200 KB smaller takes minutes
        suppress_health_check=list(HealthCheck),
        **changes,
    )


@contextmanager
def clear() -> Iterator[None]:
    """What is done within ends in time, well or with one line for the user, who may read it: nothing else gets out."""

    def overdue(number: int, frame: object) -> None:
        raise AssertionError(f"not done after {LIMIT_S} s of processor time")

    before = signal.signal(signal.SIGPROF, overdue)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text and text.splitlines() == [text], f"not one line: {text!r}"
        assert len(text) < 2000, f"{len(text)} characters"
        text.encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


texts = st.text(st.characters(exclude_categories=[]), max_size=20) | st.sampled_from(
    ["", " ", "\n", "\u2028", "\ud800", "[", "[" * 20_000, "9" * 5000, "{{ 1 }}", "${a}", "nan", "\x00", "a" * 100_000]
)
"""Half surrogate pairs among them."""
# some libraries, once imported, have the processor flush subnormal numbers to 0, and hypothesis then refuses them
numbers = (
    st.integers()
    | st.floats(allow_subnormal=False)
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, 5e-324])
)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda of: st.lists(of, max_size=3) | st.dictionaries(texts, of, max_size=3), max_leaves=5
)
"""What JSON can say, and a little more."""


@st.composite
def mangled(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of some valid files with up to four changes, or anything at all."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([0, 1, 2, 4, 16, 1 << 30])))
        data = data[:at] + draw(st.sampled_from(NASTY) | st.binary(max_size=4)) + data[end:]
    return data


@st.composite
def shaken(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value of JSON's kinds with up to three parts replaced, removed or doubled."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(value))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                holder[key] = draw(values)
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[draw(texts)] = holder[key]
    return draw(values) if draw(st.integers(0, 30)) == 0 else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield value, key
        yield from _places(part)
