"""The notebook of examples/: it runs from top to bottom, and prints what the file shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "one_step.ipynb"


def test_the_notebook_prints_what_it_shows(tmp_path: Path) -> None:
    """Numbers and answers of a trained model may differ on another machine, so only their places are compared."""
    copy = tmp_path / NOTEBOOK.name
    shutil.copy(NOTEBOOK, copy)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, notebooks.__file__, copy], check=True, env=environment, capture_output=True)
    shown, new = (notebooks.code_cells(json.loads(file.read_text(encoding="utf-8"))) for file in (NOTEBOOK, copy))
    assert [masked(notebooks.printed(cell)) for cell in shown] == [masked(notebooks.printed(cell)) for cell in new]
    assert notebooks.printed(new[0]) == notebooks.printed(shown[0])

    text = "".join(map(notebooks.printed, new))
    before, after = map(float, re.findall(r"mean logp of .*: (\S+) -> (\S+)", text)[0])
    assert after > before + 0.01
    assert float(re.findall(r"logp_gap +(\S+)", text)[0]) < 1e-3


def masked(text: str) -> str:
    """Return `text` with "_" for quoted answers and numbers, and single blanks."""
    text = re.sub(r"^(\d\.\d) '.*'$", "_ '_'", text, flags=re.MULTILINE)
    return re.sub(r"\s*-?\b\d+(\.\d+)?", " _", text)
