"""Imports point one way: each module imports from its own layer and those below, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("errors", "types"),
    ("config",),
    ("ops", "parallel"),
    ("batch",),
    ("objectives",),
    ("io",),
    ("models", "data"),
    ("engines",),
    ("rollout",),
    ("credit",),
    ("agents",),
    ("workers",),
    ("api",),
    ("trainer",),
    ("tools",),
)
"""From the bottom to the top; so nothing of the core imports `tools`, which has `tools/reproduce`."""
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}


def breaches(root: Path) -> list[str]:
    """What is wrong with the tree of a repository, a line each."""
    modules = {_name(file, root): file for file in sorted((root / "RL2").rglob("*.py"))}
    imports = {name: _imports(file, name) for name, file in modules.items()}
    found = [f"RL2.{part} has no layer" for part in sorted({_part(name) for name in modules} - LAYER.keys() - {""})]
    for name, targets in imports.items():
        above = {part for part in map(_part, targets) if LAYER.get(part, 0) > LAYER.get(_part(name), 0)}
        found += [f"{name} imports RL2.{part}, which is above it" for part in sorted(above)]
    try:
        TopologicalSorter({name: targets & modules.keys() for name, targets in imports.items()}).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    for file in modules.values():
        if file.name == "__init__.py" and file.parent.parent != root and file.read_text().strip():
            found.append(f"{file.relative_to(root)} is not empty")
        if "utils" in file.relative_to(root).with_suffix("").parts:
            found.append(f"{file.relative_to(root)}: nothing is called utils")
    # the flat loop shows the library itself
    examples = (file for file in (root / "examples").rglob("*.py") if file.name != "rl_loop.py")
    scripts = sorted([*(root / "envs").rglob("*.py"), *examples])
    return found + [f"{file.relative_to(root)} imports RL2" for file in scripts if _imports(file, file.stem)]


def _name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    """The part of the library that a module belongs to: `config` of RL2.config, `ops` of RL2.ops.attention."""
    return module.split(".")[1] if "." in module else ""


def _imports(file: Path, name: str) -> set[str]:
    """Everything of RL2 that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {module for module in found if module.split(".")[0] == "RL2"} - {name, "RL2"}


def test_the_library_keeps_to_its_layers() -> None:
    assert breaches(ROOT) == []


def test_unit_tests_mirror_the_package() -> None:
    tested = {folder.name for folder in (ROOT / "tests" / "unit").iterdir() if any(folder.glob("*.py"))}
    assert tested <= LAYER.keys() | {"envs"}
    assert not list((ROOT / "tests" / "unit").glob("*.py"))


def test_test_files_have_names_of_their_own() -> None:
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports one module of a name"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


GOOD = {
    "RL2/__init__.py": "'''The package.'''",
    "RL2/types.py": "import torch",
    "RL2/ops/__init__.py": "",
    "RL2/ops/sums.py": "from RL2.types import Prompt\nimport RL2",
    "RL2/workers/actor.py": "from RL2.ops import sums\nfrom RL2.types import Prompt",
    "RL2/tools/view/page.py": "import RL2.trainer.rl",
    "RL2/tools/reproduce/demo.py": "from RL2.tools.view.page import Page",
    "RL2/trainer/rl.py": "from RL2.workers.actor import Actor",
    "envs/task.py": "import re",
}


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        ("RL2/types.py", "import RL2.ops.sums", "RL2.types imports RL2.ops, which is above it"),
        ("RL2/ops/sums.py", "def f(): import RL2.workers", "RL2.ops.sums imports RL2.workers, which is above it"),
        ("RL2/ops/sums.py", "from ..trainer import rl", "RL2.ops.sums imports RL2.trainer, which is above it"),
        ("RL2/trainer/rl.py", "from RL2.tools import page", "RL2.trainer.rl imports RL2.tools, which is above it"),
        ("RL2/types.py", "from . import config", "RL2.types -> RL2.config"),
        ("RL2/ops/__init__.py", "x = 1", "RL2/ops/__init__.py is not empty"),
        ("RL2/ops/utils.py", "", "RL2/ops/utils.py: nothing is called utils"),
        ("RL2/utils/text.py", "", "RL2/utils/text.py: nothing is called utils"),
        ("RL2/misc.py", "", "RL2.misc has no layer"),
        ("envs/task.py", "from RL2.types import Prompt", "envs/task.py imports RL2"),
    ],
)
def test_a_breach_is_found(file: str, text: str, breach: str, tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"RL2/config.py": "from RL2.types import Prompt"})
    assert breaches(tmp_path) == []
    write(tmp_path, {file: text})
    assert breach in "\n".join(breaches(tmp_path))
