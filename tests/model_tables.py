"""Tables of docs/models.md that tests make: each lies between two lines of the document."""

from __future__ import annotations

import os
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def shown_table(begin: str, end: str, made: str) -> str:
    """Return the table between the lines `begin` and `end`; with RL2_WRITE_DOCS=1, put `made` there first."""
    before, rest = DOCUMENT.read_text().split(begin)
    shown, after = rest.split(end)
    if os.environ.get("RL2_WRITE_DOCS"):
        DOCUMENT.write_text(before + begin + made + end + after)
        return made
    return shown


def listed(group: str) -> list[str]:
    """Return the models of a group in the document, without building any; a test of its own keeps the document."""
    return re.findall(r"`([^`]+)`", DOCUMENT.read_text().partition(group)[2].partition("\n")[0])
