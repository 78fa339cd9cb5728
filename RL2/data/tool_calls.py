"""Tool calls, reasoning and content of a response, in the format that the chat template writes.

Templates do not declare their format; it is recognised from a rendered call (see RL2/data/template.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from RL2.data.call_formats import ATEM_SIGN, FORMATS, HARMONY_SIGN, ToolCall, Tools, read_atem, read_harmony
from RL2.data.template import MARK, Template

REASONING_MARKS = re.compile(rf"([<\[][^\s<>\[\]]+[>\]](?:thought)?)\s*{MARK}\s*([<\[][^\s<>\[\]]+[>\]])")


@dataclass(frozen=True)
class ParsedResponse:
    """The parts of a response."""

    content: str
    """Text without reasoning and calls."""
    reasoning: str
    """Empty if there is none."""
    calls: list[ToolCall]


class ResponseParser:
    """Parser of responses in the format of one chat template."""

    def __init__(self, template: Template) -> None:
        """Find the format in the call and the reasoning that `template` has rendered."""
        self.is_harmony = HARMONY_SIGN in template.call_text
        self.is_atem = ATEM_SIGN in template.call_text
        self.format = next((each for each in FORMATS if each.sign in template.call_text), None)
        """None if the template writes no calls or an unknown format. Then a response has content, but no calls."""
        marks = REASONING_MARKS.search(template.reasoning_text)
        self.think, self.end_think = marks.groups() if marks else ("<think>", "</think>")
        self.header = template.header.partition(self.think)[0]
        """Text that opens the assistant's turn, without a mark that opens its reasoning."""

    def parse(self, text: str, opened: str = "", tools: Tools = (), *, reads_calls: bool = True) -> ParsedResponse:
        """Return the parts of the response `text`, which has no end token and contains special tokens as text.

        `opened` is the prompt or the end of it; it may have opened the reasoning. `tools` tell the types of arguments
        in formats that do not write them. Without `reads_calls`, calls are part of the content.
        """
        if self.is_harmony or self.is_atem:
            _, start, begun = opened.rpartition("<|start|>")
            whole = (begun if start else "") + text
            found = read_harmony(whole, reads_calls) if self.is_harmony else read_atem(whole, reads_calls, tools)
            return ParsedResponse(*found)
        reasoning, answer = self._split(text, opened)
        content, calls = (answer, []) if self.format is None or not reads_calls else self.format.read(answer, tools)
        return ParsedResponse(content.strip() if reasoning or calls else content, reasoning, calls)

    def _split(self, text: str, opened: str) -> tuple[str, str]:
        """Return the reasoning and the text after it. Reasoning that is never closed is all there is."""
        turn = opened.rpartition(self.header)[2] if self.header else opened
        is_open = turn.rfind(self.think) > turn.rfind(self.end_think)
        start = text.lstrip()
        if start.startswith(self.think):
            is_open, text = True, start.removeprefix(self.think)
        before, mark, after = text.partition(self.end_think)
        # some models close what nothing opened; inside a call the mark is part of an argument
        closes = mark and self.think not in before and (self.format is None or self.format.opening not in before)
        return (before.strip(), after) if is_open or closes else ("", text)
