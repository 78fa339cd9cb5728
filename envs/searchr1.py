"""Questions with search, as in Search-R1: <search>query</search>, then <information>, and finally <answer>.

Let responses stop at '</search>' and '</answer>' (rollout.train_sampling_params.stop) and allow several turns
(rollout.max_turns). A retrieval service must run at SEARCH_URL, such as local_search_service.py beside this file. If
the service fails, the trajectory is unscored, because that is not the model's fault.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import string
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, TypeVar

from .countdown import answer

T = TypeVar("T")
SEARCH_URL = os.environ.get("SEARCH_URL", "http://127.0.0.1:8000/retrieve")
TOPK = int(os.environ.get("SEARCH_TOPK", "3"))
TIMEOUT_S = float(os.environ.get("SEARCH_TIMEOUT_S", "20"))
MAX_QUERY = 500
"""Limit of a query in characters."""
MAX_REPLY = 1 << 24
"""Limit of the service's reply in bytes."""

INSTRUCTION = """\
Answer the question below. Think before each step. Where you lack knowledge, write <search>what to look for</search>: \
the best matches follow between <information> and </information>. You may search several times. \
Give the answer in a few words and without explanation, as in <answer>Beijing</answer>.
Question: """
INVALID = """
That was neither a search nor an answer. I write <search>what to look for</search> or <answer>the answer</answer>.
"""

ARTICLE = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

# a proxy for the internet is not used
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
THREADS = ThreadPoolExecutor(64, thread_name_prefix="search")


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    given = answer(action, state)
    if called := re.search(r"</search>[^\w<]*$", action):  # a stop string may end inside a token such as `>.`
        observation = await search(action[: called.start()].rpartition("<search>"))
    elif not given:
        observation = INVALID
    else:
        golds = extra_info["answer"] if isinstance(extra_info["answer"], list) else [extra_info["answer"]]
        reward = float(any(is_match(given, str(gold)) for gold in golds))
        return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
    next_state = state + action + observation
    return {"next_state": next_state, "reward": 0.0, "score": 0.0, "done": False, "extra_info": extra_info}


def example(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a raw row {"question", "golden_answers" or "answer"} to a chat, or keep its own prompt with "answer".

    A row with `extra_info` stays unchanged.
    """
    if row.get("extra_info") is not None or row.get("reward_model") is not None:
        return row
    extra_info = {"answer": row["golden_answers"] if "golden_answers" in row else row["answer"]}
    if "question" not in row:
        return row | {"extra_info": extra_info}
    return {"messages": [{"role": "user", "content": INSTRUCTION + row["question"]}], "extra_info": extra_info}


async def search(call: tuple[str, str, str]) -> str:
    """Return what the model reads after a call, which is split at its last <search>."""
    _, mark, query = call
    query = query.strip()
    if not mark or not query:
        return INVALID
    if len(query) > MAX_QUERY:
        return f"\n\n<information>A query has at most {MAX_QUERY} characters.</information>\n\n"
    documents = await asyncio.get_running_loop().run_in_executor(THREADS, retrieve, query)
    passages = []
    for number, document in enumerate(documents, 1):
        title, _, text = document.partition("\n")
        passages.append(f"Doc {number}(Title: {title}) {text}")
    return "\n\n<information>" + ("\n".join(passages) or "Nothing was found.") + "</information>\n\n"


def retrieve(query: str) -> list[str]:
    """Return the contents of the best matches. Raise RuntimeError if the service fails."""

    def read(result: list[Any]) -> list[str]:
        (matches,) = result
        return [match["document"]["contents"] for match in matches]

    return ask_service(SEARCH_URL, {"queries": [query], "topk": TOPK, "return_scores": True}, TIMEOUT_S, read)


def ask_service(url: str, body: dict[str, Any], timeout_s: float, read: Callable[[list[Any]], T]) -> T:
    """Return what `read` makes of the result of a search service. Raise RuntimeError if the service fails."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=timeout_s) as reply:
            return read(json.loads(reply.read(MAX_REPLY))["result"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"the search service at {url} (SEARCH_URL) failed: {cause}") from error


def is_match(given: str, gold: str) -> bool:
    """Return whether answers are equal except for case, punctuation and articles, unless nothing else remains."""
    given, gold = given.strip().lower(), gold.strip().lower()
    return given == gold or bool(normalise(gold) and normalise(given) == normalise(gold))


def normalise(text: str) -> str:
    return " ".join(ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split())
