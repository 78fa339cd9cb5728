"""What mkdocs does to the pages: the table of all knobs, made from the code, and links to files of the repository."""

from __future__ import annotations

import ast
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from RL2.config.programs import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- every knob -->"
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", typing.Any: "anything"}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page."""
    if PLACE in markdown:
        markdown = markdown.replace(PLACE, "\n".join(reference()))
    return without_links_out(markdown, page.file.src_path)


def without_links_out(markdown: str, page: str) -> str:
    """`[text](../file)` as `text`: the site has no files of the repository, and its address may be any.

    Raises FileNotFoundError for a file that is not there.
    """

    def text(match: re.Match[str]) -> str:
        if not (target := ROOT / "docs" / match[2].partition("#")[0]).exists():
            raise FileNotFoundError(f"docs/{page} links to {match[2]}, and there is no {target}")
        return match[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]+)\)", text, markdown)


@dataclass(frozen=True)
class Knob:
    """A key as some programs have it."""

    key: str
    values: str
    meaning: str


def reference() -> Iterator[str]:
    """Markdown: a section for each group of keys, a row for each key, with its default in every program."""
    programs_of_group: dict[str, list[str]] = defaultdict(list)
    defaults: dict[str, dict[Knob, dict[str, Any]]] = defaultdict(dict)
    meanings = texts()
    for program, cls in PROGRAMS.items():
        with initialize_config_module("RL2.trainer.config", version_base="1.3"):
            tree = OmegaConf.to_container(compose(program), resolve=False)
        for knob, default in _knobs(cls, "", tree, meanings):
            group = knob.key.split(".")[0]
            if program not in programs_of_group[group]:
                programs_of_group[group].append(program)
            defaults[group].setdefault(knob, {})[program] = default
    for group, rows in sorted(defaults.items()):
        programs = programs_of_group[group]
        yield f"## `{group}`\n\nOf {_list(programs)}.\n\n| key | default | meaning |\n|---|---|---|"
        for knob, per_program in rows.items():
            only = "" if len(per_program) == len(programs) else f" Only in {_list(list(per_program))}."
            yield _row(f"`{knob.key}`", _default(knob, per_program), f"*{knob.values}*. {knob.meaning}{only}")
        yield ""


def texts() -> dict[tuple[str, str], str]:
    """(class, field) -> what stands below the field in RL2/config."""
    found = {}
    modules = sorted((ROOT / "RL2" / "config").glob("*.py"))
    for node in (node for module in modules for node in ast.parse(module.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = below.value if isinstance(below, ast.Expr) else None
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        found[node.name, field.target.id] = " ".join(text.value.split())
    return found


def _knobs(cls: type, prefix: str, tree: Any, meanings: dict[tuple[str, str], str]) -> Iterator[tuple[Knob, Any]]:
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _knobs(hint, f"{prefix}{name}.", tree[name], meanings)
        elif name in tree:
            (meaning,) = [meanings[base.__name__, name] for base in cls.__mro__ if (base.__name__, name) in meanings][
                :1
            ]
            yield Knob(prefix + name, _values(hint), meaning), tree[name]
            if typing.get_origin(hint) is dict and is_dataclass(member := typing.get_args(hint)[1]):
                assert isinstance(member, type)
                defaults = {f.name: {} if f.default is MISSING else f.default for f in fields(member)}
                yield from _knobs(member, f"{prefix}{name}.NAME.", defaults, meanings)


def _values(hint: Any) -> str:
    """What a knob may be, in words."""
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


def _default(knob: Knob, per_program: dict[str, Any]) -> str:
    """One value where programs agree, else each."""
    programs_of = defaultdict(list)
    for program, value in per_program.items():
        must_be_set = value is None and "null" not in knob.values
        programs_of["*to be set*" if must_be_set else _shown(value)].append(program)
    if len(programs_of) == 1:
        return next(iter(programs_of))
    return "; ".join(f"{value} ({', '.join(programs)})" for value, programs in programs_of.items())


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("${"):
        return f"as `{value[2:-1]}`" if value.count("$") == 1 and value.endswith("}") else f"`{value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}`"


def _list(programs: list[str]) -> str:
    return ", ".join(f"`{program}`" for program in programs)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
