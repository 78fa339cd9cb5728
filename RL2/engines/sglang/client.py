"""HTTP client of one SGLang server, written from the source of 0.5.23. It imports nothing of SGLang."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from RL2.config.rollout import SGLANG_MAX_TOP_K
from RL2.engines.served.client import Answer, Client, Refused, ServerError, checked, understood, versions_of
from RL2.types import Sampling


class SGLangClient(Client):
    """A client of SGLang's native routes."""

    queue_metric = "sglang:queue_time_seconds"

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.folder = Path()
        self.is_paused = self.is_released = False

    @property
    def health_path(self) -> str:
        """Path that a healthy server answers in any state; `/health` samples a token, which a paused server cannot."""
        return "/model_info" if self.is_paused else "/health"

    async def generate(
        self, http: httpx.AsyncClient, token_ids: list[int], sampling: Sampling, timeout_s: float
    ) -> Answer:
        whole = Answer([], [], "length", [])
        while left := sampling.max_new_tokens - len(whole.token_ids):
            body = request(token_ids + whole.token_ids, replace(sampling, max_new_tokens=left))
            got = await self.ask(http, "/generate", body, timeout_s)
            with understood("/generate"):
                answer = checked(_answer(got, body), left)
            whole.token_ids.extend(answer.token_ids)
            whole.logps.extend(answer.logps)
            whole.versions.extend(answer.versions)
            # SGLang also stops at the model's own end tokens. If the request does not name them, ask for the rest:
            # seeds are per position, so the continuation is the one that would have come
            if answer.finish != "unasked":
                return replace(whole, finish=answer.finish)
        return whole

    def logps(self, token_ids: list[int]) -> list[float]:
        sampling = {"max_new_tokens": 1, "temperature": 1.0}
        body = {"input_ids": token_ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = self.call("/generate", body)
        with understood("/generate"):
            scored = answer["meta_info"]["input_token_logprobs"][1:]
            if [token for _, token, _ in scored] != token_ids[1:]:
                raise ServerError("the server scored other tokens than those of the prompt")
            return [math.nan if logp is None else float(logp) for logp, _, _ in scored]

    def use_folder(self, folder: str) -> None:
        self.folder = Path(folder)
        self.is_paused = self.is_released = False

    def pause(self) -> None:
        self._stand_still()
        if not self.is_released:
            self.call("/release_memory_occupation", {})
            self.is_released = True

    def load_weights(self, files: list[str], version: str) -> None:
        self._stand_still()
        try:
            if self.is_released:
                # a server that resumes memory it has not released ends
                self.call("/resume_memory_occupation", {})
                self.is_released = False
            body = {
                "model_path": str((self.folder / files[0]).parent),  # the server loads all files in it
                "load_format": "safetensors",  # the server's own format may be dummy, which loads nothing
                "weight_version": version,
                "flush_cache": True,
            }
            self.call("/update_weights_from_disk", body)
        finally:
            self.call("/continue_generation", {"torch_empty_cache": False})
            self.is_paused = False

    def _stand_still(self) -> None:
        """Send running requests back to the queue. Other modes would end them, or keep an outdated cache."""
        self.call("/pause_generation", {"mode": "retract"})
        self.is_paused = True


def request(token_ids: list[int], sampling: Sampling) -> dict[str, Any]:
    """Return the body of `/generate`. Raises ValueError if SGLang has no log-probabilities for this sampling."""
    if sampling.min_p > 0:
        raise ValueError(f"min_p={sampling.min_p:g} is not supported with SGLang")
    is_cut = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
    if is_cut and not 0 < sampling.top_k <= SGLANG_MAX_TOP_K:
        raise ValueError(
            f"SGLang returns log-probabilities of the sampling distribution only with top_k=1 to {SGLANG_MAX_TOP_K}, "
            f"or without top_k and top_p; got top_k={sampling.top_k} and top_p={sampling.top_p:g}"
        )
    params = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if is_cut else 1.0,
        "top_k": sampling.top_k if is_cut else -1,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        # with ignore_eos SGLang ignores stop_token_ids too
        "ignore_eos": not sampling.stop_token_ids,
        # takes effect only with --enable-deterministic-inference
        "sampling_seed": sampling.seed % 2**63,
    }
    # return_logprob includes the temperature but not top_k and top_p; the mask includes both
    return {"input_ids": token_ids, "sampling_params": params, "return_logprob": True, "return_sampling_mask": is_cut}


def _answer(answer: dict[str, Any], body: dict[str, Any]) -> Answer:
    """Parse a response; `finish` is "unasked" if it ended at a token that the request does not name."""
    token_ids, meta, asked = answer["output_ids"], answer["meta_info"], body["sampling_params"]
    drawn = meta["output_token_logprobs"]
    if [token for _, token, _ in drawn] != token_ids:
        raise ServerError(f"{len(token_ids)} tokens came with {len(drawn)} log-probabilities, not of the same tokens")
    logps = [logp for logp, _, _ in drawn]
    if body["return_sampling_mask"]:
        logps = meta["output_token_sampling_logprobs"]
    if len(logps) != len(token_ids) or None in logps:
        raise ServerError(f"a response of {len(token_ids)} tokens lacks a log-probability of each")
    if "weight_versions" not in meta:
        raise ServerError("the response has no weight_versions: this server is too old; update SGLang")
    finish, ended_by = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
    if finish == "stop" and ended_by not in asked["stop"] + asked["stop_token_ids"]:
        if isinstance(ended_by, str):
            raise ServerError(f"a response ended with {ended_by!r}")
        finish = "unasked"
    if finish == "length" and len(token_ids) < asked["max_new_tokens"]:
        raise Refused(f"it ended after {len(token_ids)} of {asked['max_new_tokens']} tokens: raise --context-length")
    return Answer(token_ids, logps, finish, versions_of(meta["weight_versions"], len(token_ids)))
