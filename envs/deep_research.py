"""Deep research: the model searches, visits pages of which another model sums up what it asks for, and answers.

    python envs/local_search_service.py --corpus corpus.jsonl --port 8000     documents to search and visit
    SEARCH_URL=http://127.0.0.1:8000/retrieve   SEARCH_TOPK=3  SEARCH_TIMEOUT_S=20   see searchr1.py
    JUDGE_URL=, JUDGE_MODEL= ...                the model that judges answers; without it, they have to match
    SUMMARY_URL=, SUMMARY_MODEL= ...            the model that reads pages; by default the judge's, see docs/judge.md
    PAGE_CHARS=20000                            characters of a page that it reads
    TOOL_MAX_CALLS=8  TOOL_MAX_CHARS=4000       limits of a response and of an observation, see tools.py

A row is {"question", "answer" or "golden_answers"}. A response without a call is the answer. Allow several turns
(rollout.max_turns) and time for the models (rollout.env_timeout_s). If a service, the judge or the summaries fail, the
trajectory is unscored, because that is not the model's fault; see docs/deep_research.md.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any
from urllib.parse import urljoin

from .gsm8k import behind_reasoning
from .questions import json_of, model_of
from .searchr1 import MAX_QUERY, THREADS, ask_service
from .tool_turns import Tool, ToolError, is_right, limits, observe
from .variables import number

SEARCH_URL = os.environ.get("SEARCH_URL") or "http://127.0.0.1:8000/retrieve"
TOPK = number("SEARCH_TOPK", "3", least=1)
TIMEOUT_S = number("SEARCH_TIMEOUT_S", "20", whole=False)
VISIT_URL = urljoin(SEARCH_URL, "documents")
PAGE_CHARS = number("PAGE_CHARS", "20000", least=1)
LIMITS = limits()
MAX_AT_ONCE = 4
"""Limit of the queries or pages of one call."""
MAX_GOAL = 1000
"""Limit of the goal of a visit in characters."""
MAX_ANSWER = 4000
"""Limit of an answer in characters, of which the judge reads the end."""
SNIPPET = 300
"""Length of the passage of a page that a search shows, in characters."""
HAS_JUDGE = bool(os.environ.get("JUDGE_URL"))
HAS_SUMMARIES = HAS_JUDGE or bool(os.environ.get("SUMMARY_URL"))

SYSTEM = """\
You answer a question by research. Search for pages with the tool `search`, read them with the tool `visit`, and go on \
until you are sure. Then answer without a call: explain the answer in a few sentences, and end with a line that has \
`#### ` and the answer in a few words."""
SUMMARY = """\
The page:
<{nonce}>
{page}
</{nonce}>
What the reader wants to know:
<{nonce}>
{goal}
</{nonce}>

Write down what the page says about it: the facts, with its own names and numbers, then what they mean for the reader. \
Say so if it says nothing about it. Add nothing of your own."""
GRADE = """\
The question:
<{nonce}>
{question}
</{nonce}>
The right answer, or several of which one suffices, one a line:
<{nonce}>
{answer}
</{nonce}>
The response to be graded:
<{nonce}>
{response}
</{nonce}>

Is the final answer of the response the right one? Other words for the same thing and rounded numbers are right. An \
answer that is missing, only partly right or one of several is not. Do not solve the question yourself. Reason \
briefly, then end with one line of JSON: {{"correct": "yes"}} or {{"correct": "no"}}"""

judge = model_of("JUDGE", "You decide whether an answer is right.") if HAS_JUDGE else None
reader = None
if HAS_SUMMARIES:
    reader = model_of("SUMMARY", "You read pages for others.", "summariser", default="JUDGE", max_tokens="512")


async def step(state: str, action: str, extra_info: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    if calls:
        return await observe(calls, TOOLS, LIMITS, extra_info)
    answer = behind_reasoning(action, state).strip()[-MAX_ANSWER:]
    reward = float(await is_correct(answer, extra_info))
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "golden_answers" or "answer"} to a chat, and add the tools to any row."""
    schemas = [tool.schema for tool in TOOLS.values()]
    if row.get("messages") is not None:
        return row | {"tools": schemas}
    answer = row["golden_answers"] if "golden_answers" in row else row["answer"]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    return {"messages": messages, "extra_info": {"question": row["question"], "answer": answer}, "tools": schemas}


async def is_correct(answer: str, extra_info: dict[str, Any]) -> bool:
    """Return whether an answer is right. Raise JudgeError if the judge does not say."""
    if not answer:
        return False
    if judge is None:
        return is_right(answer, extra_info)
    golds = extra_info["answer"] if isinstance(extra_info["answer"], list) else [extra_info["answer"]]
    texts = {"question": extra_info["question"], "answer": "\n".join(map(str, golds)), "response": answer}
    return await judge.ask(GRADE, texts, verdict, "verdict (yes or no)")


def verdict(reply: str) -> bool | None:
    """Return whether a judge's reply says that an answer is right; None if it says neither."""
    return {"yes": True, "no": False}.get(str(json_of(behind_reasoning(reply), "correct")))


async def search(arguments: dict[str, Any]) -> str:
    """Return the best matches of each query. Raise ToolError for arguments that are not queries."""
    queries = texts_in(arguments, "query", MAX_QUERY)
    body = {"queries": queries, "topk": TOPK, "return_scores": True}

    def read(result: list[Any]) -> list[str]:
        return [listing(query, matches) for query, matches in zip(queries, result, strict=True)]

    return "\n\n".join(await in_thread(SEARCH_URL, body, read))


def listing(query: str, matches: list[dict[str, Any]]) -> str:
    """Return what the model reads of the pages that match a query."""
    shown = []
    for place, match in enumerate(matches, 1):
        page = match["document"]
        title, _, text = page["contents"].partition("\n")
        shown.append(f"{place}. {title[:SNIPPET]} ({page.get('url', page['id'])})\n{passage(text, query)}")
    return f"Pages for {query!r}:\n" + ("\n".join(shown) or "Nothing was found.")


def passage(text: str, query: str) -> str:
    """Return the part of a text with the most words of a query; of several the first."""
    words = set(re.findall(r"\w+", query.lower()))
    parts = [text[at : at + SNIPPET] for at in range(0, min(len(text), PAGE_CHARS), SNIPPET)] or [""]
    return max(parts, key=lambda part: len(words.intersection(re.findall(r"\w+", part.lower()))))


async def visit(arguments: dict[str, Any]) -> str:
    """Return what each page says about a goal. Raise ToolError for arguments that are not pages and a goal."""
    ids, goals = texts_in(arguments, "url", MAX_QUERY), texts_in(arguments, "goal", MAX_GOAL)

    def read(result: list[Any]) -> list[str | None]:
        return [None if page is None else page["contents"] for page in result]

    pages = await in_thread(VISIT_URL, {"ids": ids}, read)
    said = await asyncio.gather(*(summary(page, goals[0]) for page in pages))
    return "\n\n".join(f"{name}:\n{text}" for name, text in zip(ids, said, strict=True))


async def summary(page: str | None, goal: str) -> str:
    """Return what a page says about a goal; without a model that reads it, its beginning."""
    if page is None:
        return "there is no such page; search shows the addresses in parentheses"
    if reader is None:
        return page
    return await reader.ask(SUMMARY, {"page": page[:PAGE_CHARS], "goal": goal}, stated, "text")


def stated(reply: str) -> str | None:
    """Return the text of a reply without its reasoning; None if there is none."""
    return behind_reasoning(reply).strip() or None


def texts_in(arguments: dict[str, Any], name: str, most: int) -> list[str]:
    """Return an argument, a text or a list of them, each of at most `most` characters. Raise ToolError if it is not."""
    given = arguments.get(name)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(each, str) and each.strip() for each in given):
        raise ToolError(f"{name} must be a text, or a list of texts")
    if len(given) > MAX_AT_ONCE or max(map(len, given)) > most:
        raise ToolError(f"{name} can have {MAX_AT_ONCE} texts of {most} characters")
    return given


async def in_thread(url: str, body: dict[str, Any], read: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(THREADS, ask_service, url, body, TIMEOUT_S, read)


def schema(name: str, description: str, **arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's schema, in the form of chat templates."""
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def list_of_texts(description: str) -> dict[str, Any]:
    """Return the schema of an argument that is a list of texts."""
    return {"type": "array", "items": {"type": "string"}, "description": description}


SEARCH = schema(
    "search", "Search for pages; returns their addresses and a passage of each.", query=list_of_texts("Queries.")
)
VISIT = schema(
    "visit",
    "Read pages; returns what they say about a goal.",
    url=list_of_texts("Addresses of pages, as a search shows them."),
    goal={"type": "string", "description": "What to look for on the pages."},
)
TOOLS = {"search": Tool(SEARCH, search), "visit": Tool(VISIT, visit)}
