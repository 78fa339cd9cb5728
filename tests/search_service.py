"""The local search service as a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "envs" / "local_search_service.py"


@contextmanager
def searching(folder: Path, rows: list[dict[str, str]]) -> Iterator[str]:
    """Serve documents, which are written into a folder, and yield the address of their retrieval."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPT), "--corpus", str(corpus), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"{len(rows)} documents at (http://127\.0\.0\.1:\d+/retrieve)\n", line)
        assert found is not None, line
        try:
            yield found[1]
        finally:
            process.terminate()
