"""HTTP client of one vLLM server. It imports nothing of vLLM."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from itertools import islice
from typing import Any

import httpx

from RL2.engines.served.client import (
    Answer,
    DeltaClient,
    Refused,
    ServerError,
    StreamClient,
    checked,
    understood,
    versions_of,
)
from RL2.engines.served.wire.rl2_delta import differences
from RL2.types import Sampling

TOKENS, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
ROUTE_IS_SHUT = (403, 404)
"""Status of the tokens route without --enable-scale-out."""


class VLLMClient(StreamClient, DeltaClient):
    """A client of vLLM's routes for tokens and for reinforcement learning."""

    can_sleep = False
    """True if the server runs with --enable-sleep-mode, so that others can use its memory while it is paused."""
    queue_metric = "vllm:request_queue_time_seconds"

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.has_tokens_route = True
        self.is_whole = True
        """True if all weights are of one version, so that requests may continue."""
        self.is_asleep = False

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
        """Sample by the completions route, which returns no versions: abort if the version changed meanwhile."""
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
        self.is_whole, self.is_asleep = True, False
        self.call("/init_weight_transfer_engine", {"init_info": {"folder": folder}})

    def pause(self) -> None:
        if not self.can_sleep:
            self.call("/pause?mode=keep", {})
        elif not self.is_asleep:
            self.is_whole, self.is_asleep = False, True
            self.call("/sleep?level=2&mode=keep", {})  # level 2 keeps no weights: new ones follow

    def load_weights(self, files: list[str], version: str) -> None:
        try:
            self.start_update()
            self._update({"files": files})  # noted; `finish_update` puts them in place
            self.finish_update(version)
        except BaseException:
            self.abandon_update()
            raise

    def load_changes(
        self, files: list[str], follows: str, label: str, version: str, checksums: Mapping[str, int]
    ) -> None:
        try:
            self.start_update()
            self._update({"files": files, "follows": follows, "label": label})
            for received in self._receipts():
                if wrong := list(islice(differences(checksums, received), 4)):
                    more = ", ..." if len(wrong) > 3 else ""
                    raise ServerError(f"its weights have other checksums: {', '.join(wrong[:3])}{more}")
            self.finish_update(version)
        except BaseException:
            self.abandon_update()
            raise

    def _receipts(self) -> list[dict[str, int]]:
        """Return the checksums of the weights that each worker has received and will put in place."""
        got = self.call("/collective_rpc", {"method": "rl2_receipt"})
        with understood("/collective_rpc"):
            receipts = [dict(receipt) for receipt in got["results"]]
            if not receipts:
                raise ValueError("no worker answered")
            return receipts

    def num_workers(self) -> int:
        with understood("/get_world_size"):
            return int(self.call("/get_world_size")["world_size"])

    def join(self, group: dict[str, Any]) -> None:
        self.call("/init_weight_transfer_engine", {"init_info": {"group": group}})

    def start_update(self) -> None:
        self.call("/wake_up?tags=weights" if self.is_asleep else "/pause?mode=keep", {})
        try:
            self.call("/start_weight_update", {})
        except ServerError:  # a trainer that died may have left an update open
            self._close_update()
            self.call("/start_weight_update", {})

    def update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.is_whole = False
        self._update(info)

    def finish_update(self, version: str) -> None:
        self.is_whole = False
        self.call("/finish_weight_update", {"weight_version": version})
        self.is_whole = True
        self._go_on()

    def abandon_update(self) -> None:
        with contextlib.suppress(ServerError, Refused):
            self._close_update()
            if self.is_whole:
                self._go_on()

    def _update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.call("/update_weights", {"update_info": info})

    def _close_update(self) -> None:
        with contextlib.suppress(ServerError, Refused):  # vLLM closes an update with an error
            self._update({"abandon": True})

    def _go_on(self) -> None:
        if self.is_asleep:
            self.call("/wake_up?tags=kv_cache", {})
            self.is_asleep = False
        self.call("/resume", {})


class SleepingVLLMClient(VLLMClient):
    """Client of a server with --enable-sleep-mode."""

    can_sleep = True


def _answer(got: Any) -> Answer:
    """Parse a response of the tokens route."""
    (choice,) = got["choices"]
    drawn = (choice["logprobs"] or {}).get("content") or []
    sampled = choice["token_ids"] or []
    if [token["token_id"] for token in drawn] != sampled:
        raise ServerError(f"{len(sampled)} tokens came with {len(drawn)} log-probabilities, not of the same tokens")
    logps = [token["logprob"] for token in drawn]
    versions = versions_of(choice["weight_versions"], len(sampled))
    return Answer(sampled, logps, choice["finish_reason"], versions)


def params(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling parameters under vLLM's names; it ignores unknown ones silently."""
    return {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        # only stop_token_ids end a response, not the model's own end tokens
        "ignore_eos": True,
        "seed": sampling.seed % 2**63,
        "logprobs": 0,  # the sampled token's only
        "detokenize": bool(sampling.stop),
    }
