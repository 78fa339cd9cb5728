"""One server as its HTTP routes show it: what is the same for all kinds. Nothing of any server is imported."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from RL2.errors import first_line
from RL2.types import Sampling

CONTROL_TIMEOUT_S = 600
"""Of one call that changes or measures the server: reading a large model's weights takes minutes."""


class ServerError(RuntimeError):
    """The server was not there, broke off, or answered that it could not."""

    def __init__(self, text: str, *, counts: bool = True, status: int | None = None) -> None:
        """`counts`: it was there, so trying again and again would not help; `status`: of the HTTP answer."""
        super().__init__(text)
        self.counts, self.status = counts, status


class Refused(ValueError):
    """The server says that the request is wrong: no other try would do better."""


@dataclass(frozen=True)
class Answer:
    """What a server gives back for one request."""

    token_ids: list[int]
    logps: list[float]
    finish: str
    """stop, length or abort."""
    versions: list[int]
    """Of the weights that sampled each token; below 0 for those that the server started with."""


class Client(ABC):
    """Calls a server at `url` with a bearer `token`; '' for a server that wants none."""

    queue_metric: str
    """Histogram in `/metrics` of the seconds that requests wait."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
        """GET, or POST with a `body`; the JSON of the answer, None if there is none. Raises `ServerError`."""
        with _errors(path):
            answer = httpx.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers=self.headers,
                timeout=timeout_s,
                trust_env=False,  # a proxy has nothing to do with it
            )
        return _json(path, answer)

    async def ask(
        self,
        http: httpx.AsyncClient,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> Any:
        """As `call`, without blocking; the server lets go of the request if this is cancelled or runs out of time."""
        method = "GET" if body is None else "POST"
        with _errors(path):
            answer = await http.request(method, self.url + path, json=body, headers=self.headers, timeout=timeout_s)
        return _json(path, answer)

    @property
    def health_path(self) -> str:
        """What a server that is well answers, whatever it does."""
        return "/health"

    def is_healthy(self, timeout_s: float) -> bool:
        try:
            self.call(self.health_path, timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    @abstractmethod
    async def generate(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        """One sample. The server lets go of the request if this is cancelled or runs out of time.

        Raises `ServerError`, or `Refused` for what another try would not make better.
        """

    @abstractmethod
    def logps(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token but the first after those before it, at temperature 1; nothing is cached."""

    @abstractmethod
    def use_folder(self, folder: str) -> None:
        """The server has just been started or attached to; weights will come in files of this folder."""

    @abstractmethod
    def pause(self) -> None:
        """Requests stand still, and go on with a recomputed cache after the next `load_weights`.

        Until then the server leaves the memory that it can do without to others.
        """

    @abstractmethod
    def load_weights(self, files: list[str], version: str) -> None:
        """Put the tensors of `files`, which have a folder of their own, in place. Requests stand still meanwhile."""

    def queue_times(self) -> tuple[float, int]:
        """Seconds that requests have waited at the server before they were decoded, in all, and how many they were."""
        with _errors("/metrics"):
            text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=30, trust_env=False).text
        found = (re.findall(rf"^{self.queue_metric}_{x}\S* (\S+)$", text, re.M) for x in ("sum", "count"))
        with understood("/metrics"):
            seconds, number = (sum(map(float, values)) for values in found)
            return seconds, int(number)


class StreamClient(Client):
    """A server that takes weights in buckets, each at once; requests stand still from the first to the last."""

    @abstractmethod
    def num_workers(self) -> int:
        """Processes that hold weights: each takes part in a broadcast."""

    @abstractmethod
    def join(self, group: dict[str, Any]) -> None:
        """Its workers come to the group, and return when all are there."""

    @abstractmethod
    def start_update(self) -> None:
        """Requests stand still, and go on only after `finish_update`: until then weights are of both versions."""

    @abstractmethod
    def update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """One bucket, said to all workers or to each; afterwards its memory is not looked at any more."""

    @abstractmethod
    def finish_update(self, version: str) -> None: ...

    @abstractmethod
    def abandon_update(self) -> None:
        """The server is ready for another `start_update`, or for files. Never fails."""


@contextmanager
def understood(path: str) -> Iterator[None]:
    """What is read within, of an answer, may not be there, or be something else: a `ServerError` then."""
    try:
        yield
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ServerError(f"{path}: the answer is not of the form that is known ({what})") from error


def checked(answer: Answer, max_new_tokens: int) -> Answer:
    """`answer`, if it can be trained on: as many numbers of each kind as tokens. Raises `ServerError`."""
    tokens, logps, versions = answer.token_ids, answer.logps, answer.versions
    if not all(type(token) is int and token >= 0 for token in tokens) or not len(tokens) == len(logps) == len(versions):
        raise ServerError(f"{len(tokens)} tokens came with {len(logps)} log-probabilities and {len(versions)} versions")
    if not all(type(logp) in (float, int) and math.isfinite(logp) for logp in logps):
        raise ServerError(f"{len(tokens)} tokens came without a log-probability of each that is a number")
    if not isinstance(answer.finish, str):
        raise ServerError(f"a response ended with {answer.finish!r:.60}")
    if len(tokens) > max_new_tokens or (not tokens and answer.finish != "abort"):
        raise ServerError(f"{len(tokens)} tokens came where at most {max_new_tokens}, and one at least, were asked for")
    return answer


def versions_of(spans: list[dict[str, Any]], num_tokens: int) -> list[int]:
    """The version of each token, from `{"version": label, "start": token, "end": token}` of both kinds of servers."""
    number = sum(len(range(span["start"], span["end"])) for span in spans)
    if number != num_tokens:
        raise ServerError(f"{num_tokens} tokens came with versions of {number}")
    return [
        int(span["version"]) if span["version"].isdecimal() else -1
        for span in spans
        for _ in range(span["start"], span["end"])
    ]


def gap(ours: list[float], theirs: list[float]) -> float:
    """Mean abs difference in nats; infinite if any is not a number."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    return mean if math.isfinite(mean) else math.inf


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerError(f"{path}: no answer in time") from error
    except httpx.HTTPError as error:
        raise ServerError(f"{path}: {str(error) or type(error).__name__}", counts=False) from error


def _json(path: str, answer: httpx.Response) -> Any:
    if answer.status_code in (400, 422):
        raise Refused(f"{path}: {answer.text[:1000]}")
    if not answer.is_success:
        raise ServerError(f"{path}: HTTP {answer.status_code} {answer.text[:1000]}", status=answer.status_code)
    try:
        return answer.json() if answer.content else None
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{path}: the answer is not JSON: {answer.text[:200]}") from error
