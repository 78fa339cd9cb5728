"""Static analysis of a script's function: digest all code that its result depends on, to key cached tables."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from RL2.data.source import Renamed

PURE = re.compile(
    "__future__|ast|base64|binascii|bisect|collections|copy|dataclasses|decimal|enum|fractions|functools|hashlib|heapq|"
    "html|itertools|json|math|numbers|operator|re|statistics|string|textwrap|types|typing|unicodedata|zlib"
)
"""Standard-library modules whose functions depend only on their arguments."""
IMPURE = re.compile("__import__|breakpoint|compile|eval|exec|globals|hash|id|input|locals|open|vars")
"""Builtins that may read state outside the source."""


def digest_of(function: Callable[..., Any]) -> str | None:
    """Return a digest of all code that determines what `function` returns; None if it may depend on anything else.

    The digest covers the function, the names it uses in its own file and in files beside it, and modules of `PURE`.
    """
    if isinstance(function, Renamed):
        inner = "" if function.example is None else digest_of(function.example)
        return None if inner is None else _hash(json.dumps(sorted(function.columns.items(), key=str)).encode(), inner)
    code = getattr(function, "__code__", None)
    if code is None or function.__qualname__ != function.__name__:
        return None  # a method or a closure, which may read other variables
    files: dict[Path, bytes] = {}
    try:
        known = _is_known(Path(code.co_filename), function.__name__, files, set())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    return _hash(*(files[file] for file in sorted(files)), platform.python_version()) if known else None


def _is_known(file: Path, name: str, files: dict[Path, bytes], seen: set[tuple[Path, str]]) -> bool:
    """Return whether everything that a top-level name refers to is in `files`, which grows, or in `PURE`."""
    if (file, name) in seen:
        return True
    seen.add((file, name))
    if file not in files:
        files[file] = file.read_bytes()
    tree = ast.parse(files[file])
    if not all(map(_only_binds, tree.body)) or any(
        isinstance(node, ast.Global) and name in node.names for node in ast.walk(tree)
    ):
        return False  # code that runs at import may change what the name refers to
    bound = [statement for statement in tree.body if name in _binds(statement)]
    if not bound:
        return hasattr(builtins, name) and not IMPURE.fullmatch(name)
    return all(_statement_is_known(statement, name, file, files, seen) for statement in bound)


def _statement_is_known(
    statement: ast.stmt, name: str, file: Path, files: dict[Path, bytes], seen: set[tuple[Path, str]]
) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return _import_is_known(statement, name, file, files, seen)
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
        return False  # defined conditionally or modified
    read, own = set[str](), set[str]()
    for node in ast.walk(statement):
        if isinstance(node, ast.Global | ast.Nonlocal):
            return False
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not all(_import_is_known(node, each, file, files, seen) for each in _binds(node)):
                return False
            own |= _binds(node)
        elif isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node is not statement:
            own.add(str(node.name))
    return all(_is_known(file, each, files, seen) for each in read - own)


def _import_is_known(
    statement: ast.Import | ast.ImportFrom, name: str, file: Path, files: dict[Path, bytes], seen: set[tuple[Path, str]]
) -> bool:
    if isinstance(statement, ast.Import):
        return all(PURE.fullmatch(alias.name.partition(".")[0]) for alias in statement.names)
    module = statement.module or ""
    if statement.level == 0:
        return PURE.fullmatch(module.partition(".")[0]) is not None
    theirs = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
    if statement.level > 1 or not module or theirs == "*":
        return False
    return _is_known(file.parent.joinpath(*module.split(".")).with_suffix(".py"), theirs, files, seen)


def _only_binds(statement: ast.stmt) -> bool:
    """Return whether a top-level statement only binds names at import.

    The value of an assignment is assumed to have no side effect.
    """
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test) == "__name__ == '__main__'" or all(
            map(_only_binds, [*statement.body, *statement.orelse])
        )
    if isinstance(statement, ast.Try):
        inner = [each for handler in statement.handlers for each in handler.body]
        return all(map(_only_binds, [*statement.body, *inner, *statement.orelse, *statement.finalbody]))
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return all(isinstance(node, ast.Name | ast.Tuple | ast.expr_context) for t in targets for node in ast.walk(t))
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(
        statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Raise
    )


def _binds(node: ast.AST) -> set[str]:
    """Return the names that a statement binds in its own scope."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}


def _hash(*parts: bytes | str) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(hashlib.sha256(data).digest())
    return found.hexdigest()
