"""HTTP client of one server: the part that vLLM and SGLang share. It imports neither of them."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from RL2.errors import first_line
from RL2.types import Sampling

CONTROL_TIMEOUT_S = 600
"""Limit of a call that changes or measures the server: reading the weights of a large model takes minutes."""


class ServerError(RuntimeError):
    """A failed request: the server was unreachable, broke off, or answered with an error."""

    def __init__(self, text: str, *, counts: bool = True, status: int | None = None) -> None:
        """Set `counts` to False if the server was unreachable, so that retries are not limited; `status` is HTTP's."""
        super().__init__(text)
        self.counts, self.status = counts, status


class Refused(ValueError):
    """HTTP 400 or 422: the request is invalid, and a retry would fail too."""


@dataclass(frozen=True)
class Answer:
    """A server's response to one sampling request."""

    token_ids: list[int]
    logps: list[float]
    finish: str
    """Reason of the end: stop, length or abort."""
    versions: list[int]
    """Version of the weights that sampled each token; negative for those that the server started with."""


class Client(ABC):
    """Client of the server at `url`, with a bearer `token` ('' if the server needs none)."""

    queue_metric: str
    """Name of the histogram in `/metrics` of the seconds that requests wait."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
        """Send a GET, or a POST with `body`; return the JSON of the response or None. Raises `ServerError`."""
        with _errors(path):
            answer = httpx.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers=self.headers,
                timeout=timeout_s,
                trust_env=False,  # ignore proxies in the environment
            )
        return _json(path, answer)

    async def ask(
        self,
        http: httpx.AsyncClient,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> Any:
        """Do the same as `call` without blocking. Cancellation or a timeout ends the request at the server too."""
        method = "GET" if body is None else "POST"
        with _errors(path):
            answer = await http.request(method, self.url + path, json=body, headers=self.headers, timeout=timeout_s)
        return _json(path, answer)

    @property
    def health_path(self) -> str:
        """Path that a healthy server answers in any state."""
        return "/health"

    def is_healthy(self, timeout_s: float) -> bool:
        """Return whether the server answers a health check within `timeout_s`."""
        try:
            self.call(self.health_path, timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    @abstractmethod
    async def generate(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        """Return one sample. Cancellation or a timeout ends the request at the server too.

        Raises `ServerError`, or `Refused` if the request is invalid.
        """

    @abstractmethod
    def logps(self, token_ids: list[int]) -> list[float]:
        """Return the log-probability of each token but the first, at temperature 1, without the prefix cache."""

    @abstractmethod
    def use_folder(self, folder: str) -> None:
        """Tell a server, after a start or attach, the folder in which files of weights will be."""

    @abstractmethod
    def pause(self) -> None:
        """Suspend requests until the next `load_weights`, after which they continue with a recomputed cache.

        Meanwhile the server frees the memory that it does not need.
        """

    @abstractmethod
    def load_weights(self, files: list[str], version: str) -> None:
        """Put the tensors of `files`, which are alone in their folder, in place; requests are suspended meanwhile."""

    def queue_times(self) -> tuple[float, int]:
        """Return the total seconds that requests have waited before decoding, and the number of requests."""
        with _errors("/metrics"):
            text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=30, trust_env=False).text
        found = (re.findall(rf"^{self.queue_metric}_{x}\S* (\S+)$", text, re.M) for x in ("sum", "count"))
        with understood("/metrics"):
            seconds, number = (sum(map(float, values)) for values in found)
            return seconds, int(number)


class StreamClient(Client):
    """Client of a server that takes weights bucket by bucket; requests are suspended from the first to the last."""

    @abstractmethod
    def num_workers(self) -> int:
        """Return the number of processes with weights; each takes part in a broadcast."""

    @abstractmethod
    def join(self, group: dict[str, Any]) -> None:
        """Make the server's workers join a process group; returns when the group is complete."""

    @abstractmethod
    def start_update(self) -> None:
        """Suspend requests until `finish_update`, because the weights are mixed until then."""

    @abstractmethod
    def update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Transfer one bucket, described to all workers or to each; its memory is not read afterwards."""

    @abstractmethod
    def finish_update(self, version: str) -> None:
        """Put all buckets in place as `version` and resume requests."""

    @abstractmethod
    def abandon_update(self) -> None:
        """End an update, so that the server can take another one or files. Never fails."""


class DeltaClient(Client):
    """Client of a server that keeps its weights in host memory and applies changes to them."""

    @abstractmethod
    def load_changes(
        self, files: list[str], follows: str, label: str, version: str, checksums: Mapping[str, int]
    ) -> None:
        """Apply the changes in `files` to the weights `follows`, and put the result, `label`, in place as `version`.

        With `follows` '' the files have all weights. The result is put in place only if the server reports exactly
        `checksums` for it; else raise `ServerError`, and the server keeps computing with its weights.
        """


@contextmanager
def understood(path: str) -> Iterator[None]:
    """Turn errors while reading a response into a `ServerError` that says its form is unknown."""
    try:
        yield
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ServerError(f"{path}: unexpected response format ({what})") from error


def checked(answer: Answer, max_new_tokens: int) -> Answer:
    """Return `answer`; raise `ServerError` unless each token has a finite log-probability and a version."""
    tokens, logps, versions = answer.token_ids, answer.logps, answer.versions
    if not all(type(token) is int and token >= 0 for token in tokens) or not len(tokens) == len(logps) == len(versions):
        raise ServerError(f"{len(tokens)} tokens came with {len(logps)} log-probabilities and {len(versions)} versions")
    if not all(type(logp) in (float, int) and math.isfinite(logp) for logp in logps):
        raise ServerError(f"a response of {len(tokens)} tokens lacks a finite log-probability of each")
    if not isinstance(answer.finish, str):
        raise ServerError(f"a response ended with {answer.finish!r:.60}")
    if len(tokens) > max_new_tokens or (not tokens and answer.finish != "abort"):
        raise ServerError(f"a response has {len(tokens)} tokens; expected 1 to {max_new_tokens}")
    return answer


def versions_of(spans: list[dict[str, Any]], num_tokens: int) -> list[int]:
    """Return the version of each token, from spans `{"version": label, "start": token, "end": token}`."""
    number = sum(len(range(span["start"], span["end"])) for span in spans)
    if number != num_tokens:
        raise ServerError(f"{num_tokens} tokens came with versions of {number}")
    return [
        int(span["version"]) if span["version"].isdecimal() else -1
        for span in spans
        for _ in range(span["start"], span["end"])
    ]


def gap(ours: list[float], theirs: list[float]) -> float:
    """Return the mean abs difference in nats; infinite if any value is not finite."""
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
        raise ServerError(f"{path}: the response is not JSON: {answer.text[:200]}") from error
