"""One vLLM server as its HTTP routes show it. Nothing of vLLM is imported."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from RL2.types import Sampling

CONTROL_TIMEOUT_S = 600
"""Of one call that changes or measures the server: reading a large model's weights takes minutes."""


class ServerError(RuntimeError):
    """The server was not there, broke off, or answered that it could not."""

    def __init__(self, text: str, *, counts: bool = True) -> None:
        """`counts`: it was there, so trying again and again would not help."""
        super().__init__(text)
        self.counts = counts


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


class Client:
    """Calls a server at `url` with a bearer `token`; '' for a server that wants none."""

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

    def is_healthy(self, timeout_s: float) -> bool:
        try:
            self.call("/health", timeout_s=timeout_s)
        except ServerError:
            return False
        return True

    async def generate(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        """One sample. The server lets go of the request if this is cancelled or runs out of time.

        Raises `ServerError`, or `Refused` for what another try would not make better.
        """
        body = {"request_id": secrets.token_hex(8), "token_ids": token_ids, "sampling_params": params(sampling)}
        with _errors("/inference/v1/generate"):
            answer = await http.post(
                f"{self.url}/inference/v1/generate", json=body, headers=self.headers, timeout=timeout_s
            )
        (choice,) = _json("/inference/v1/generate", answer)["choices"]
        drawn = (choice["logprobs"] or {}).get("content") or []
        sampled = choice["token_ids"] or []
        if [token["token_id"] for token in drawn] != sampled:
            raise ServerError(f"{len(sampled)} tokens came with {len(drawn)} log-probabilities, not of the same tokens")
        return Answer(
            sampled,
            [token["logprob"] for token in drawn],
            choice["finish_reason"],
            [
                int(span["version"]) if span["version"].isdecimal() else -1
                for span in choice["weight_versions"]
                for _ in range(span["start"], span["end"])
            ],
        )

    def logps(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token but the first after those before it, at temperature 1; nothing is cached."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        answer = self.call("/inference/v1/generate", {"token_ids": token_ids, "sampling_params": sampling})
        scored = answer["prompt_logprobs"][1:]
        return [at[str(token)]["logprob"] for at, token in zip(scored, token_ids[1:], strict=True)]

    def use_folder(self, folder: str) -> None:
        """Weights will come in files of this folder."""
        self.call("/init_weight_transfer_engine", {"init_info": {"folder": folder}})

    def pause(self) -> None:
        """Requests stand still, and go on with a recomputed cache after the next `load_weights`."""
        self.call("/pause?mode=keep", {})

    def load_weights(self, files: list[str], version: str) -> None:
        """Put the tensors of `files` in place. Requests under way stand still meanwhile."""
        self.pause()
        try:
            self.call("/start_weight_update", {})
            self.call("/update_weights", {"update_info": {"files": files}})
            self.call("/finish_weight_update", {"weight_version": version})
        finally:
            self.call("/resume", {})

    def queue_times(self) -> tuple[float, int]:
        """Seconds that requests have waited at the server before they were decoded, in all, and how many they were."""
        with _errors("/metrics"):
            text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=30, trust_env=False).text
        found = (re.findall(rf"^vllm:request_queue_time_seconds_{x}\S* (\S+)$", text, re.M) for x in ("sum", "count"))
        seconds, number = (sum(map(float, values)) for values in found)
        return seconds, int(number)


def params(sampling: Sampling) -> dict[str, Any]:
    """Exactly what vLLM reads: it ignores names that it does not know."""
    return {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        # the run's own end tokens are in stop_token_ids; the model's stand for nothing unless they are among them
        "ignore_eos": True,
        "seed": sampling.seed % 2**63,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": bool(sampling.stop),
    }


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
        raise ServerError(f"{path}: HTTP {answer.status_code} {answer.text[:1000]}")
    try:
        return answer.json() if answer.content else None
    except ValueError as error:
        raise ServerError(f"{path}: the answer is not JSON: {answer.text[:200]}") from error
