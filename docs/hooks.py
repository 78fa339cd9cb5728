"""Changes that mkdocs makes to the pages: links to files of the repository become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the Markdown of a page of the site; called by mkdocs."""
    return without_links_out(markdown, page.file.src_path)


def without_links_out(markdown: str, page: str) -> str:
    """Return `markdown` with `[text](../file)` as `text`, because the site does not contain the repository's files.

    Raises FileNotFoundError for a link to a file that does not exist.
    """

    def text(match: re.Match[str]) -> str:
        if not (target := ROOT / "docs" / match[2].partition("#")[0]).exists():
            raise FileNotFoundError(f"docs/{page} links to {match[2]}, and there is no {target}")
        return match[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]+)\)", text, markdown)
