"""Changes that mkdocs makes to the pages: links to files of the repository become text, and pictures follow the site's
light or dark mode, where GitHub takes the reader's, and long commands and keys break where one would break them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the Markdown of a page of the site; called by mkdocs."""
    return with_short_commands(with_modes(without_links_out(markdown, page.file.src_path)))


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Return the HTML of a page of the site; called by mkdocs."""
    return with_breakable_keys(content)


def without_links_out(markdown: str, page: str) -> str:
    """Return `markdown` with `[text](../file)` as `text`, because the site does not contain the repository's files.

    Raises FileNotFoundError for a link to a file that does not exist.
    """

    def text(match: re.Match[str]) -> str:
        if not (target := ROOT / "docs" / match[2].partition("#")[0]).exists():
            raise FileNotFoundError(f"docs/{page} links to {match[2]}, and there is no {target}")
        return match[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]+)\)", text, markdown)


PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>'
)
"""A picture with a light and a dark variant, as GitHub shows it."""


def with_modes(markdown: str) -> str:
    """Return `markdown` with both variants of each picture, of which the theme shows the one of its mode.

    Raises FileNotFoundError for a variant that does not exist.
    """

    def both(match: re.Match[str]) -> str:
        for name in (match["light"], match["dark"]):
            if not (ROOT / "docs" / name).exists():
                raise FileNotFoundError(f"there is no docs/{name}")
        return "\n".join(f'<img alt="{match["alt"]}" src="{match[mode]}#only-{mode}">' for mode in ("light", "dark"))

    return PICTURE.sub(both, markdown)


WIDTH = 88
"""Number of characters of a line of code that the site shows without scrolling."""
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ARGUMENT = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""")


def with_short_commands(markdown: str) -> str:
    """Return `markdown` with commands broken between arguments into lines of at most `WIDTH` characters."""

    def broken(match: re.Match[str]) -> str:
        lines = match[1].replace("\\\n", " ").splitlines()
        return "```sh\n" + "".join(f"{broken_command(line)}\n" for line in lines) + "```"

    return COMMANDS.sub(broken, markdown)


def broken_command(command: str) -> str:
    """Return a command with continuations in front of the arguments that would pass `WIDTH`."""
    if len(command) <= WIDTH or "#" in command:
        return command
    lines = [""]
    for argument in ARGUMENT.findall(command):
        if lines[-1].strip() and len(f"{lines[-1]} {argument} \\") > WIDTH:
            lines[-1] += " \\"
            lines.append("  ")
        lines[-1] += f" {argument}" if lines[-1].strip() else argument
    return "\n".join(lines)


CODE = re.compile(r"(?<=<td><code>)[^<]+(?=</code>)")
"""A key or a default that begins a cell of a table."""


def with_breakable_keys(content: str) -> str:
    """Return `content` with keys in tables that may break behind their dots, where the page is too narrow for them."""
    return CODE.sub(lambda match: match[0].replace(".", ".<wbr>"), content)
