"""Serialisation of plain values as JSON, between the process of a solution and that of its tests.

Decoding creates only values of Python's own types, whatever was sent. Objects of other types are sent as numbers that
the sender understands.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

EXACT = 1 << 53
"""Integers beyond this are written in base 16: parsing decimals takes quadratic time."""


def encode(value: Any, encode_object: Callable[[Any], int]) -> Any:
    """Convert `value` to JSON values. Subclasses count as their base type; other objects use `encode_object`."""

    def each(values: Any) -> list[Any]:
        return [encode(item, encode_object) for item in values]

    match value:
        case None | bool() | str():
            return value if value is None or isinstance(value, bool) else str.__str__(value)
        case float():
            return float(value)
        case int():
            value = int(value)
            return value if -EXACT < value < EXACT else {"int": hex(value)}
        case list():
            return each(value)
        case tuple():
            return {"tuple": each(value)}
        case dict():
            return {"dict": [each(item) for item in value.items()]}
        case set():
            return {"set": each(value)}
        case frozenset():
            return {"frozenset": each(value)}
        case bytes() | bytearray():
            return {type(value).__name__: value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case range():
            return {"range": each([value.start, value.stop, value.step])}
        case Decimal():
            return {"Decimal": str(value)}
        case Fraction():
            return {"Fraction": each([value.numerator, value.denominator])}
        case datetime():
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
        case timedelta():
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), encode_object)  # a NumPy scalar
    return {"object": encode_object(value)}


def decode(value: Any, decode_object: Callable[[int], Any]) -> Any:
    """Return the value that was encoded. Raise ValueError or TypeError for text that `encode` cannot produce."""

    def each(values: Any) -> list[Any]:
        return [decode(item, decode_object) for item in values]

    if isinstance(value, list):
        return each(value)
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    match kind:
        case "int":
            return int(inside, 16)
        case "tuple":
            return tuple(each(inside))
        case "dict":
            return dict(map(each, inside))
        case "set":
            return set(each(inside))
        case "frozenset":
            return frozenset(each(inside))
        case "bytes":
            return bytes.fromhex(inside)
        case "bytearray":
            return bytearray.fromhex(inside)
        case "complex":
            return complex(*inside)
        case "range":
            return range(*each(inside))
        case "Decimal":
            return Decimal(inside)
        case "Fraction":
            return Fraction(*each(inside))
        case "datetime":
            return datetime.fromisoformat(inside)
        case "date":
            return date.fromisoformat(inside)
        case "timedelta":
            return timedelta(*inside)
        case "object":
            return decode_object(inside)
    raise ValueError(f"no value is of the kind {kind!r}")
