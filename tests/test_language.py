"""Docstrings in plain technical English: a function's begins with a verb, and none is a fragment of a sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

DONE: tuple[str, ...] = ("RL2", "benchmarks", "envs", "examples")
"""Folders and files that are checked."""

VERBS = """
Add Allocate Allow Answer Append Apply Ask Become Begin Bind Build Call Cancel Check Clip Close Combine Compare
Compute Continue Convert Copy Count Create Cut Decode Describe Disable Do Draw Drop Encode End Enter Evaluate Exclude
Export Fill Find Flush Forget Form Format Free Give Hand Hold Implement Import Initialise Join Judge Keep Kill Launch
Leave Let List Load Lock Log Look Make Map Mark Measure Merge Move Name Note Open Parse Pickle Plan Play Plot
Post-train Prepare Print Probe Put Raise Read Receive Record Refuse Release Remove Rename Render Repeat Replace Report
Restart Restore Return Round Run Sample Save Say Scale Search Send Serve Set Shard Show Split Start Stop Store Stream
Sum Suspend Swap Take Tell Test Train Transfer Try Turn Undo Update Wait Watch Wrap Write Yield
"""
"""First words of function docstrings, sorted. Add a verb, in the imperative, when a new docstring needs one."""

FRAGMENTS = frozenset({"As", "How", "Of", "That", "What", "When", "Where", "Whether", "Which", "Who", "Whose"})
"""First words with which a docstring is part of a sentence that the reader has to complete."""


def done() -> list[Path]:
    """Return the files that are checked."""
    paths = [ROOT / name for name in DONE]
    return sorted({file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))})


def breaches(source: str, name: str) -> Iterator[str]:
    """Yield `file:line: what is wrong` for each docstring of `source` that breaks the rules."""
    for owner, docstring in sorted(docstrings(ast.parse(source)), key=lambda pair: pair[1].lineno):
        text = docstring.value.value
        word = text.split()[0].rstrip(".,:;") if text.strip() else ""
        where = f"{name}:{docstring.lineno}"
        if word in FRAGMENTS:
            yield f"{where}: a docstring begins with {word!r}: {text.splitlines()[0]}"
        elif is_function(owner) and word not in VERBS.split():
            yield f"{where}: {word!r} is not among VERBS: {text.splitlines()[0]}"


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """Yield the docstrings of modules, classes, functions and attributes, each with its owner.

    The owner of an attribute's docstring is the assignment in front of it.
    """
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            for before, statement in zip([node, *block], block, strict=False):
                is_owner = before is node or isinstance(before, ast.Assign | ast.AnnAssign)
                if is_owner and _is_text(statement):
                    yield before, statement


def is_function(node: ast.AST) -> bool:
    """Return whether `node` defines a function; a property counts as an attribute."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_docstrings_are_plain_english() -> None:
    found = [line for file in done() for line in breaches(file.read_text(), str(file.relative_to(ROOT)))]
    assert not found, "\n".join(["docstrings to rewrite:", *found])


def test_the_verbs_are_sorted_and_all_in_use() -> None:
    words = {
        docstring.value.value.split()[0].rstrip(".,:;")
        for file in done()
        for owner, docstring in docstrings(ast.parse(file.read_text()))
        if is_function(owner)
    }
    verbs = VERBS.split()
    assert verbs == sorted(words & {*verbs})


def test_breaches_are_found_with_their_lines() -> None:
    source = '''"""What a module holds."""
class Table:
    """Of rows."""

    size: int
    """That of the file."""

    def read(self) -> None:
        """The rows."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    async def close(self) -> None:
        """Return nothing."""
'''
    assert [line.split(": ")[0] for line in breaches(source, "a.py")] == ["a.py:1", "a.py:3", "a.py:6", "a.py:9"]
