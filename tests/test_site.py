"""The changes that the site makes to the pages: formulas, pictures in two modes, long commands and keys."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


formulas, hooks = module("formulas"), module("hooks")


def formulas_of(page: Path) -> list[str]:
    """Return what a page has in `$...$` and in blocks of `math`."""
    text = page.read_text()
    shown = re.findall(r"^```math\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return shown + re.findall(r"\$([^$\n]+)\$", re.sub(r"`[^`\n]*`", "", text))


def test_every_formula_is_one_that_the_site_can_draw() -> None:
    found = [(page.name, formula) for page in PAGES for formula in formulas_of(page)]
    assert len(found) > 100
    for page, formula in found:
        try:
            formulas.svg(formula)
        except ValueError as error:
            pytest.fail(f"{page}: ${formula}$: {error}")


def test_a_formula_is_drawn_in_its_place() -> None:
    content = (
        r'<p>With <span class="arithmatex">\(p_a &lt; 1\)</span>.</p><div class="arithmatex">\[\frac{1}{2}\]</div>'
    )
    drawn = formulas.on_page_content(content, None, None, None)
    assert re.sub(r'style="[^"]*" viewBox="[^"]*"><path d="[-MLQCZ0-9. ]*"/>', "...", drawn) == (
        '<p>With <span class="formula"><svg role="img" aria-label="p_a &lt; 1" ...</svg></span>.</p>'
        r'<div class="formula"><svg role="img" aria-label="\dfrac{1}{2}" ...</svg></div>'
    )


def test_a_formula_that_cannot_be_drawn_fails_the_build() -> None:
    with pytest.raises(ValueError, match="unknown"):
        formulas.svg(r"\unknown{x}")


PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="images/how-dark.svg">
  <img alt="One step" src="images/how-light.svg">
</picture>"""


def test_a_picture_follows_the_mode_of_the_site() -> None:
    assert hooks.with_modes(f"Before.\n\n{PICTURE}\n\nAfter.") == (
        'Before.\n\n<img alt="One step" src="images/how-light.svg#only-light">\n'
        '<img alt="One step" src="images/how-dark.svg#only-dark">\n\nAfter.'
    )
    with pytest.raises(FileNotFoundError, match=r"there is no docs/images/nowhere\.svg"):
        hooks.with_modes(PICTURE.replace("images/how-dark.svg", "images/nowhere.svg"))


def commands(text: str) -> list[list[str]]:
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    return [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_break_between_arguments(page: Path) -> None:
    text = page.read_text()
    broken = hooks.with_short_commands(text)
    assert commands(broken) == commands(text)
    for block in re.findall(r"^```sh\n(.*?)^```$", broken, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            assert len(line) <= hooks.WIDTH or "#" in line or len(shlex.split(line.rstrip("\\"))) == 1


def test_keys_in_tables_may_break_behind_their_dots() -> None:
    row = "<td><code>{}</code></td><td>see <code>actor.lr</code></td>"
    assert hooks.with_breakable_keys(row.format("actor.kl.coef")) == row.format("actor.<wbr>kl.<wbr>coef")
