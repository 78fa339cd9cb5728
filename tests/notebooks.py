"""How the tests run a notebook: cell by cell, in one namespace, while an event loop is at work, as Jupyter does.

`python tests/notebooks.py FILE` runs FILE and puts what its cells print into it, in place of what was there.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    """Return the output of a cell that the file has."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


async def run(notebook: dict[str, Any], folder: Path) -> None:
    """Run the cells from `folder` and replace their outputs by what they print."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec", dont_inherit=True), namespace)
        text = out.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
        cell["execution_count"] = number


def main(file: Path) -> None:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    asyncio.run(run(notebook, file.parent))
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
