"""What a server may answer: a sample of the right form, `ServerError` or `Refused`, and nothing else."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fuzzing import clear, inputs, mangled, shaken
from hypothesis import given
from hypothesis import strategies as st

from RL2.engines.served.client import Answer, Client, Refused, ServerError, gap
from RL2.engines.sglang.client import SGLangClient
from RL2.engines.vllm.client import VLLMClient
from RL2.types import Sampling

PROMPT = [5, 6, 7]
SPANS = [{"version": "default", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
SGLANG = {
    "output_ids": [7, 8],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 2},
        "weight_versions": SPANS,
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
        "output_token_sampling_logprobs": [-0.25, -1.25],
        "input_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]],
    },
}
VLLM = {
    "choices": [
        {
            "token_ids": [7, 8],
            "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -1.5}]},
            "finish_reason": "length",
            "weight_versions": SPANS,
        }
    ],
    "prompt_logprobs": [None, {"6": {"logprob": -1.0}}, {"7": {"logprob": -2.0}}],
}
COMPLETIONS = {
    "choices": [
        {
            "token_ids": [7, 8],
            "logprobs": {"token_logprobs": [-0.5, -1.5]},
            "finish_reason": "stop",
            "prompt_logprobs": VLLM["prompt_logprobs"],
        }
    ],
    "weight_version": "4",
}
KINDS = {"sglang": (SGLangClient, SGLANG), "vllm": (VLLMClient, VLLM), "completions": (VLLMClient, COMPLETIONS)}
METRICS = b'# HELP\nvllm:request_queue_time_seconds_sum{m="x"} 1.5\nvllm:request_queue_time_seconds_count{m="x"} 3.0\n'


def as_bytes(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"["


def client_of(kind: str, monkeypatch: pytest.MonkeyPatch, serve: Any) -> tuple[Client, httpx.MockTransport]:
    """Whose every request `serve` answers."""
    transport = httpx.MockTransport(serve)
    monkeypatch.setattr(httpx, "request", httpx.Client(transport=transport, trust_env=False).request)
    made = KINDS[kind][0]("http://server", "token")
    if isinstance(made, VLLMClient):
        made.has_tokens_route = kind == "vllm"
    return made, transport


@pytest.mark.parametrize("kind", list(KINDS))
def test_answers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reply: list[tuple[int, bytes]] = []

    def serve(request: httpx.Request) -> httpx.Response:
        if kind == "completions" and request.url.path.endswith("/inference/v1/generate"):
            return httpx.Response(404)
        return httpx.Response(reply[0][0], content=reply[0][1])

    client, transport = client_of(kind, monkeypatch, serve)
    request_of = httpx.Client(transport=transport).request
    monkeypatch.setattr(httpx, "request", lambda *args, trust_env, **of: request_of(*args, **of))
    valid = KINDS[kind][1]
    statuses = st.sampled_from([200] * 8 + [204, 400, 401, 500, 503])
    with asyncio.Runner() as runner:
        http = httpx.AsyncClient(transport=transport)

        @inputs(0.05)
        @given(statuses, mangled(as_bytes(valid)) | shaken(valid).map(as_bytes), st.booleans())
        def ask(status: int, content: bytes, is_cut: bool) -> None:
            reply[:] = [(status, content)]
            sampling = Sampling(2, top_k=5 if is_cut else 0)
            with clear(), known():
                check(runner.run(client.generate(http, PROMPT, sampling, 1)))
            with clear(), known():
                logps = client.logps(PROMPT)
                assert len(logps) == 2 and gap(logps, [0.0, 0.0]) >= 0

        ask()
        runner.run(http.aclose())


@contextmanager
def known() -> Iterator[None]:
    """What clients raise by contract, and what catches it: requests are made again, servers started again."""
    try:
        yield
    except (ServerError, Refused) as error:
        text = str(error)
    else:
        return
    assert len(text) < 3000


def check(answer: Answer) -> None:
    assert len(answer.token_ids) == len(answer.logps) == len(answer.versions)
    assert all(type(token) is int and token >= 0 for token in answer.token_ids)
    assert all(isinstance(logp, float | int) and math.isfinite(logp) for logp in answer.logps)
    assert all(type(version) is int for version in answer.versions)
    assert isinstance(answer.finish, str)  # what is not stop or length is made again
    assert answer.token_ids or answer.finish == "abort"


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    reply: list[bytes] = []
    get = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=reply[0]))).get
    monkeypatch.setattr(httpx, "get", lambda *args, trust_env, **of: get(*args, **of))
    client = VLLMClient("http://server", "")

    @inputs(0.01)
    @given(mangled(METRICS))
    def ask(content: bytes) -> None:
        reply[:] = [content]
        with clear(), known():
            seconds, number = client.queue_times()
            assert isinstance(seconds, float | int) and isinstance(number, int)

    ask()
