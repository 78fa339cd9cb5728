"""The readers of files under Atheris, which goes after new branches of the code; not part of the tests.

pip install atheris; PYTHONPATH=. python tests/fuzz/guided.py {jsonl,json,csv,metrics,records} [-runs=100000] [CORPUS]
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["RL2.config", "RL2.data", "RL2.io.report", "RL2.tools", "json"]):
    from RL2.data.source import load_rows
    from RL2.errors import UserError
    from RL2.io.report import read_metrics
    from RL2.tools.eval.evaluate import read

TARGETS = {
    **{kind: (f"data.{kind}", lambda file: load_rows(str(file))) for kind in ("jsonl", "json", "csv")},
    "metrics": ("metrics.jsonl", lambda file: read_metrics(file.parent)),
    "records": ("records.jsonl", lambda file: read(file.parent)),
}

if __name__ == "__main__":
    name, use = TARGETS[sys.argv.pop(1)]
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / name

    def one(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(UserError):
            use(file)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
