"""The agent of a run, as `rollout.agent` names it."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from RL2.errors import ConfigError, first_line

FUNCTION = re.compile(r"\S+\.py:\w+")


@dataclass(frozen=True)
class Agent:
    """The agent that `rollout.agent` names: a function of a file, or the words of a command."""

    function: str | None
    words: tuple[str, ...]

    @property
    def file(self) -> Path | None:
        """The file of the function."""
        return None if self.function is None else Path(self.function.rpartition(":")[0])


def agent_of(key: str, text: str) -> Agent:
    """Return the agent that `text`, the value of `key`, names. Raise ConfigError if there is none."""
    if FUNCTION.fullmatch(text):
        path, _, name = text.rpartition(":")
        if not Path(path).is_file():
            raise ConfigError(f"{key}={text}: {path} is not a file")
        if name not in _defined(Path(path), f"{key}={text}"):
            raise ConfigError(f"{key}={text}: {path} has no function {name}")
        return Agent(f"{Path(path).resolve()}:{name}", ())
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text}: not a command: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"{key}={text}: the program {words[0] if words else ''!r} is not found")
    program = Path(shutil.which(words[0]) or words[0]).absolute()  # not resolved: a venv's interpreter is a link
    # an episode runs in a folder of its own
    others = (str(Path(word).resolve()) if Path(word).is_file() else word for word in words[1:])
    return Agent(None, (str(program), *others))


def _defined(file: Path, setting: str) -> set[str]:
    """Return the names at the top of a Python file, which is not run. Raise ConfigError if it cannot be parsed."""
    try:
        nodes = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{setting}: {file} is not Python: {first_line(error)}") from error
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
    return found
