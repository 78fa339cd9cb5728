"""One vLLM server as its HTTP routes show it. Nothing of vLLM is imported."""

from __future__ import annotations

import secrets
from typing import Any

import httpx

from RL2.engines.served.client import Answer, Client, ServerError, checked, understood, versions_of
from RL2.types import Sampling

TOKENS, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
ROUTE_IS_SHUT = (403, 404)
"""Without --enable-scale-out."""


class VLLMClient(Client):
    queue_metric = "vllm:request_queue_time_seconds"

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.has_tokens_route = True

    async def generate(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        if self.has_tokens_route:
            body = {"request_id": secrets.token_hex(8), "token_ids": token_ids, "sampling_params": params(sampling)}
            try:
                got = await self.ask(http, TOKENS, body, timeout_s)
            except ServerError as error:
                if error.status not in ROUTE_IS_SHUT:
                    raise
                self.has_tokens_route = False
            else:
                with understood(TOKENS):
                    return checked(_answer(got), sampling.max_new_tokens)
        return await self._complete(http, token_ids, sampling, timeout_s)

    async def _complete(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        """By the route that has no versions: those before and after have to be the same, or the answer is an abort."""
        known = {name: value for name, value in params(sampling).items() if name != "detokenize"}
        body = {"prompt": token_ids, "return_token_ids": True, **known}
        before = await self.ask(http, "/weight_info")
        got = await self.ask(http, COMPLETIONS, body, timeout_s)
        after = await self.ask(http, "/weight_info")
        with understood(COMPLETIONS):
            (choice,) = got["choices"]
            sampled, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            span = {"version": before["weight_version"], "start": 0, "end": len(sampled)}
            finish = choice["finish_reason"] if before["weight_version"] == after["weight_version"] else "abort"
            answer = Answer(sampled, logps, finish, versions_of([span], len(sampled)))
            return checked(answer, sampling.max_new_tokens)

    def logps(self, token_ids: list[int]) -> list[float]:
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        try:
            body = {"token_ids": token_ids, "sampling_params": sampling | {"detokenize": False}}
            scored = self.call(TOKENS, body)
        except ServerError as error:
            if error.status not in ROUTE_IS_SHUT:
                raise
            got = self.call(COMPLETIONS, {"prompt": token_ids} | sampling)
            with understood(COMPLETIONS):
                (scored,) = got["choices"]
        with understood(TOKENS):
            pairs = zip(scored["prompt_logprobs"][1:], token_ids[1:], strict=True)
            return [float(at[str(token)]["logprob"]) for at, token in pairs]

    def use_folder(self, folder: str) -> None:
        self.call("/init_weight_transfer_engine", {"init_info": {"folder": folder}})

    def pause(self) -> None:
        self.call("/pause?mode=keep", {})

    def load_weights(self, files: list[str], version: str) -> None:
        self.pause()
        try:
            self.call("/start_weight_update", {})
            self.call("/update_weights", {"update_info": {"files": files}})
            self.call("/finish_weight_update", {"weight_version": version})
        finally:
            self.call("/resume", {})


def _answer(got: Any) -> Answer:
    """Of the route that takes and gives tokens."""
    (choice,) = got["choices"]
    drawn = (choice["logprobs"] or {}).get("content") or []
    sampled = choice["token_ids"] or []
    if [token["token_id"] for token in drawn] != sampled:
        raise ServerError(f"{len(sampled)} tokens came with {len(drawn)} log-probabilities, not of the same tokens")
    logps = [token["logprob"] for token in drawn]
    versions = versions_of(choice["weight_versions"], len(sampled))
    return Answer(sampled, logps, choice["finish_reason"], versions)


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
