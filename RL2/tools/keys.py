"""Tables of configuration keys: for a terminal, for the documentation, and as comments of a configuration.

`python -m RL2.tools.keys > docs/keys.md` writes the page of the documentation.
"""

from __future__ import annotations

import ast
import textwrap
import typing
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text

from RL2.config import load as loading
from RL2.config.programs import PROGRAMS
from RL2.config.secrets import masked
from RL2.config.values import Node, build, nodes, unset, value_at
from RL2.errors import ConfigError, printable

TYPES = {int: "integer", float: "number", str: "string", bool: "true or false", Any: "anything"}
WIDTH = 100
"""Columns of the comments in a configuration."""


@dataclass(frozen=True)
class Key:
    """A configuration key as a program has it."""

    name: str
    values: str
    """Type and range, in words."""
    meaning: str
    is_optional: bool
    """True if null is a value."""


def keys_of(program: str) -> dict[Key, Any]:
    """Return the keys of a program with their defaults; None, if null is no value of the key, means required."""
    tree, _ = loading.composed(program, [])
    found = {}
    for node in nodes(PROGRAMS[program], members=True):
        if not node.is_group:
            default = value_at(tree, node.path)
            key = Key(node.key, _values(node.hint), _meaning(node), type(None) in typing.get_args(node.hint))
            found[key] = node.default if default is MISSING else default
    return found


def _values(hint: Any) -> str:
    """Return the type and range of a key in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_values(arguments[0])}, {arguments[1]}"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return f"list: {_values(arguments[0])}"
    if origin is dict:
        return "group of your own names"
    if type(None) in arguments:
        return f"{_values(next(a for a in arguments if a is not type(None)))}; or null"
    return TYPES[hint]


def _meaning(node: Node) -> str:
    candidates = ((base.__name__, node.field.name) for base in node.owner.__mro__)
    return next(_docstrings()[each] for each in candidates if each in _docstrings())


@cache
def _docstrings() -> dict[tuple[str, str], str]:
    """Return the text below each field of the classes in RL2/config, by class and field."""
    found = {}
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(loading.__file__).parent.glob("*.py")]
    for cls in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, below in pairwise(cls.body):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[cls.name, ast.unparse(field.target)] = " ".join(str(text.value).split())
    return found


def shown(key: Key, default: Any) -> str:
    """Return a default as one writes it on the command line; `required` if there is none."""
    if default is None:
        return "null" if key.is_optional else "required"
    return str(default).lower() if isinstance(default, bool) else str(default)


def table(program: str, word: str = "") -> Table:
    """Return a table of the keys of a program whose name or meaning contains `word`.

    Raises ConfigError if there is none.
    """
    columns = Table(title=f"keys of {program}", title_justify="left", show_lines=True)
    columns.add_column("key = default", overflow="fold")
    columns.add_column("values. meaning", ratio=1)
    for key, default in keys_of(program).items():
        if word.lower() in f"{key.name} {key.meaning}".lower():
            text = shown(key, default)
            head = f"{key.name}\n({text})" if text == "required" else f"{key.name}\n= {text}"
            columns.add_row(Text(head), Text(f"{key.values}. {key.meaning}"))
    if not columns.row_count:
        raise ConfigError(f"no key of {program} has {word!r} in its name or meaning")
    return columns


def annotated(program: str, overrides: Sequence[str]) -> str:
    """Return the resolved configuration as YAML, with the meaning and the default of each key as a comment.

    While required keys are missing, these are ???, interpolations stay as they are, and values are not checked. Raises
    ConfigError for any other mistake.
    """
    cls = PROGRAMS[program]
    tree, values = loading.composed(program, overrides)
    missing = unset(cls, tree)
    head = f"# required, and not set (???): {' '.join(missing)}\n" if missing else ""
    about = {key.name: (key, default) for key, default in keys_of(program).items()}
    resolved = tree if missing else asdict(build(cls, values, ""))
    return printable(head + "\n".join(_lines(cls, masked(resolved), about, set(missing))))


def _lines(cls: type, values: dict[str, Any], about: dict[str, tuple[Key, Any]], missing: set[str]) -> Iterator[str]:
    for node in nodes(cls):
        indent, name = "  " * (len(node.path) - 1), node.path[-1]
        if node.is_group:
            yield f"{indent}{name}:"
            continue
        key, default = about[node.key]
        comment = f"{key.meaning} [{key.values}; default: {shown(key, default)}]"
        if shown(key, default) == "required":
            comment = f"{key.meaning} [{key.values}; required]"
        yield textwrap.indent(textwrap.fill(comment, WIDTH - len(indent), break_on_hyphens=False), f"{indent}# ")
        value = "???" if key.name in missing else value_at(values, node.path)
        yield textwrap.indent(OmegaConf.to_yaml(OmegaConf.create({name: value})).rstrip("\n"), indent)


PAGE = """\
# Every key

Every configuration key of every program, with its default, values and meaning. Generated from `RL2/config/` by
`python -m RL2.tools.keys > docs/keys.md`. A key that is *required* has no default, and `${key}` is the value of
another key. [Configuration](configuration.md) describes how to set keys.
"""


def page() -> str:
    """Return the page of all keys in Markdown: a section for each group of keys, a row for each key."""
    programs_of_group: dict[str, list[str]] = defaultdict(list)
    rows: dict[str, dict[Key, dict[str, str]]] = defaultdict(dict)
    for program in PROGRAMS:
        for key, default in keys_of(program).items():
            group = key.name.partition(".")[0]
            if program not in programs_of_group[group]:
                programs_of_group[group].append(program)
            rows[group].setdefault(key, {})[program] = shown(key, default)
    return "\n".join([PAGE, *(_section(group, programs_of_group[group], rows[group]) for group in sorted(rows))])


def _section(group: str, programs: list[str], rows: dict[Key, dict[str, str]]) -> str:
    lines = [f"## `{group}`\n\nIn {_list(programs)}.\n", "| key | default | values and meaning |", "|---|---|---|"]
    for key, default_of_program in rows.items():
        only = "" if len(default_of_program) == len(programs) else f" Only in {_list(list(default_of_program))}."
        cells = f"`{key.name}`", _default(default_of_program), f"*{key.values}*. {key.meaning}{only}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _default(default_of_program: dict[str, str]) -> str:
    """Return one default where programs agree, else each with its programs."""
    programs_of = defaultdict(list)
    for program, default in default_of_program.items():
        programs_of["*required*" if default == "required" else f"`{default}`"].append(program)
    if len(programs_of) == 1:
        return next(iter(programs_of))
    return "; ".join(f"{default} ({', '.join(programs)})" for default, programs in programs_of.items())


def _list(programs: list[str]) -> str:
    return ", ".join(f"`{program}`" for program in programs)


if __name__ == "__main__":
    print(page(), end="")
