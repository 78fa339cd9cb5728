"""Client for chat completions of an OpenAI-compatible server: retries, a cache of replies on disk, and a budget.

    client = Client("http://127.0.0.1:8000/v1", "NAME", folder=Path("judged"), budget=Budget(requests=1000))
    text = await client.ask(messages, {"temperature": 0, "max_tokens": 512})

Requests run in threads, at most `concurrency` at once, so that any event loop may call it. It raises JudgeError if
there is no reply, and its subclass BudgetError if the budget allows no more requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MOST_REPLY = 4 << 20
"""Limit of a reply in bytes."""
LONGEST_WAIT_S = 60.0
"""Longest wait between two attempts, whatever the server asks for."""
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Status codes that are retried."""
LOCAL = ("localhost", "127.0.0.1", "::1")


class JudgeError(RuntimeError):
    """The judge gave no usable reply."""


class BudgetError(JudgeError):
    """The budget allows no more requests."""


@dataclass(frozen=True)
class Budget:
    """Limits of what all processes with the same folder spend, in this run and earlier ones; None is no limit."""

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    price_in: float = 0.0
    """Price of a million input tokens."""
    price_out: float = 0.0
    """Price of a million output tokens."""


class Client:
    """Client of one model on a server, with an account of its requests."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        folder: Path | None = None,
        budget: Budget | None = None,
        timeout_s: float = 60.0,
        attempts: int = 6,
        concurrency: int = 32,
    ) -> None:
        self.url, self.model, self.folder, self.attempts = url.rstrip("/"), model, folder, attempts
        self.timeout_s, self._key = timeout_s, key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # a proxy for the internet is not used for this machine
        outside = httpx.URL(self.url).host not in LOCAL
        limits = httpx.Limits(max_connections=concurrency)
        self._http = httpx.Client(headers=headers, timeout=timeout_s, trust_env=outside, limits=limits)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self._account = None if folder is None else Account(folder, budget or Budget())

    async def ask(self, messages: list[dict[str, str]], sampling: dict[str, Any], key: Any) -> str:
        """Return the reply's text. Raise JudgeError if there is none.

        `key` identifies the request in the cache, together with the model and `sampling`.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, messages, sampling, key)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def _ask(self, messages: list[dict[str, str]], sampling: dict[str, Any], key: Any) -> str:
        path = None
        if self.folder is not None:
            name = hashlib.sha256(json.dumps([self.model, sampling, key], sort_keys=True).encode()).hexdigest()
            path = self.folder / "replies" / name[:2] / f"{name}.json"
            if (kept := read(path)) is not None:
                return kept
        body = {"model": self.model, "messages": messages} | sampling
        reply = self._post(body)
        try:
            text = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise JudgeError("the judge's reply has no choices[0].message.content") from None
        if not isinstance(text, str):
            raise JudgeError("the judge's reply has no text")
        if path is not None:
            write(path, text)
        return text

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply. Raise JudgeError, with the cause, after the last attempt."""
        cause = ""
        for attempt in range(self.attempts):
            if self._account is not None:
                self._account.begin()
            wait_s = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                status, headers, text = self._send(body)
            except httpx.HTTPError as error:
                cause = f"{type(error).__name__} at {self.url}"
            else:
                if status == 200:
                    return self._counted(body, text)
                cause = f"HTTP {status} from {self.url}"
                if status not in AGAIN:
                    detail = "" if status in (401, 403) else f": {self._without_key(text)[:200]}"
                    raise JudgeError(f"{cause}{detail}")
                asked = headers.get("retry-after", "")
                if asked.isdecimal():
                    wait_s = min(LONGEST_WAIT_S, float(asked)) + random.uniform(0, 0.1)
            if attempt + 1 < self.attempts:
                time.sleep(wait_s)
        raise JudgeError(f"{cause}, {self.attempts} times")

    def _send(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, str]:
        text, start = b"", time.monotonic()
        with self._http.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
            for piece in reply.iter_bytes():
                text += piece
                if time.monotonic() - start > self.timeout_s:
                    raise httpx.ReadTimeout("the reply trickles in")
                if len(text) > MOST_REPLY:
                    raise JudgeError(f"the judge's reply is longer than {MOST_REPLY >> 20} MiB")
            return reply.status_code, reply.headers, text.decode("utf-8", "replace")

    def _counted(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        try:
            reply = json.loads(text)
        except ValueError:
            raise JudgeError(f"the judge's reply is no JSON: {self._without_key(text)[:100]!r}") from None
        usage = reply.get("usage") if isinstance(reply, dict) else None
        if self._account is not None:
            found = [
                usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
            ]
            # without a count, use the upper bound: a token has at least one byte
            most = (len(json.dumps(body["messages"], ensure_ascii=False).encode()), len(text.encode()))
            tokens = [n if isinstance(n, int) and n >= 0 else m for n, m in zip(found, most, strict=True)]
            self._account.add(*tokens)
        return reply

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class Account:
    """Record of what was spent, in a file that all processes share."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.budget = folder / "spent.json", budget

    def begin(self) -> None:
        """Count a request. Raise BudgetError if requests, tokens or cost are used up."""
        self._change(1, 0, 0)

    def add(self, tokens_in: int, tokens_out: int) -> None:
        self._change(0, tokens_in, tokens_out)

    def _change(self, requests: int, tokens_in: int, tokens_out: int) -> None:
        with open(self.path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, even by a crash
            file.seek(0)
            spent = json.loads(file.read() or "{}")
            if requests:
                self._refuse_beyond(spent)
            for name, number in {"requests": requests, "tokens_in": tokens_in, "tokens_out": tokens_out}.items():
                spent[name] = spent.get(name, 0) + number
            file.seek(0)
            file.truncate()
            file.write(json.dumps(spent))

    def _refuse_beyond(self, spent: dict[str, int]) -> None:
        limit, tokens_in, tokens_out = self.budget, spent.get("tokens_in", 0), spent.get("tokens_out", 0)
        cost = (tokens_in * limit.price_in + tokens_out * limit.price_out) / 1e6
        for name, most, used in (
            ("requests", limit.requests, spent.get("requests", 0)),
            ("tokens", limit.tokens, tokens_in + tokens_out),
            ("cost", limit.cost, cost),
        ):
            if most is not None and used >= most:
                raise BudgetError(f"the judge's budget of {most:g} {name} is used up ({self.path})")


def read(path: Path) -> str | None:
    """Return the text stored in this file; None if it is missing or incomplete."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return text if isinstance(text, str) else None


def write(path: Path, text: str) -> None:
    """Store a text atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):x}")
    new.write_text(json.dumps(text), encoding="utf-8")
    os.replace(new, path)
