"""A server with the routes of SGLang 0.5.23 that RL2 uses, and their traps. What samples is the embedded engine.

Its log-probabilities, versions, end tokens and pauses are real; that the real server has these routes is read, not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import socket
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from RL2.engines.embedded import engine as embedded
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Completion, Sampling

SEED_BITS = 64
OPEN = ("/health", "/metrics")


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("model-path", "dtype", "load-format", "log-level", "device", "host", "api-key"):
        parser.add_argument(f"--{name}")
    for name in ("context-length", "max-running-requests", "sampling-mask-max-tokens", "port"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--mem-fraction-static", type=float)
    for name in ("enable-deterministic-inference", "enable-metrics"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def by_position(uniforms: Any) -> Any:
    """As SGLang draws: by seed and position in the sequence. Where a response begins stands above its seed's bits."""

    def draw(seeds: list[int], numbers: list[int]) -> np.ndarray:
        positions = [number + (seed >> SEED_BITS) for seed, number in zip(seeds, numbers, strict=True)]
        return uniforms([seed % 2**SEED_BITS for seed in seeds], positions)

    return draw


class Wrong(ValueError):
    """The request is: HTTP 400."""


@dataclass
class Model:
    options: argparse.Namespace
    label: str = "default"
    may_start: threading.Event = field(default_factory=threading.Event)
    is_released: bool = False
    waits: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.options.model_path)
        dtype = getattr(torch, self.options.dtype)
        # a configuration for each: a model writes its attention into it
        self.ours, self.reference = (
            AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(self.options.model_path), dtype=dtype, attn_implementation=attention
            ).eval()
            for attention in (IMPLEMENTATION, "eager")
        )
        embedded.uniforms = by_position(embedded.uniforms)
        self.engine = embedded.EmbeddedEngine(
            self.ours,
            decode=self.tokenizer.decode,
            max_running_requests=self.options.max_running_requests,
            memory_share=self.options.mem_fraction_static,
        )
        self.engine.version = -1
        self.may_start.set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start(self, ids: list[int], params: dict[str, Any]) -> Future[Completion]:
        context = self.options.context_length
        if len(ids) >= context - 6:
            raise Wrong(f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({context - 6} tokens).")
        seed = params["sampling_seed"] if self.options.enable_deterministic_inference else time.monotonic_ns()
        sampling = Sampling(
            max_new_tokens=min(params["max_new_tokens"], context - 2 - len(ids)),
            temperature=params["temperature"],
            top_p=params["top_p"],
            top_k=max(0, params["top_k"]),
            seed=seed + (len(ids) << SEED_BITS),
            stop=tuple(params["stop"]),
            # it ignores all of them, or none
            stop_token_ids=() if params["ignore_eos"] else (*params["stop_token_ids"], self.tokenizer.eos_token_id),
        )
        self.may_start.wait()
        return asyncio.run_coroutine_threadsafe(self.engine.generate(ids, sampling), self.loop)

    def answer(self, body: dict[str, Any], done: Completion) -> dict[str, Any]:
        params, ids = body["sampling_params"], done.token_ids
        is_masked = body["return_sampling_mask"]
        finish: dict[str, Any] = {"type": "length", "length": len(ids)}
        if done.finish == "stop":
            text = self.tokenizer.decode(ids)
            by_text = next((stop for stop in params["stop"] if stop in text), None)
            by_token = None if params["ignore_eos"] or by_text else ids[-1]
            finish = {"type": "stop", "matched": by_text or by_token}
        # of the temperature alone, whatever else has cut the distribution
        logps = self.logps(body["input_ids"], ids, params["temperature"]) if is_masked else done.logps
        meta: dict[str, Any] = {
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "weight_version": self.label,
            "weight_versions": spans(done.versions),
            "input_token_logprobs": [],
            "output_token_logprobs": [[logp, token, None] for logp, token in zip(logps, ids, strict=True)],
        }
        if is_masked:
            meta["output_token_sampling_logprobs"] = done.logps
        return {"text": self.tokenizer.decode(ids), "output_ids": ids, "meta_info": meta}

    def score(self, ids: list[int]) -> dict[str, Any]:
        logps = [None, *self.logps(ids[:1], ids[1:], 1.0)]
        scored = [[logp, token, None] for logp, token in zip(logps, ids, strict=True)]
        return {"output_ids": [0], "meta_info": {"input_token_logprobs": scored, "output_token_logprobs": []}}

    @torch.no_grad()
    def logps(self, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
        logits_NV = self.reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        logp_NV = (logits_NV / temperature).log_softmax(-1)
        return logp_NV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()

    def control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path:
            case "/pause_generation":
                assert body["mode"] == "retract"
                self.may_start.clear()
                self.engine.sleep()
            case "/continue_generation":
                self.engine.gate.is_closed = False
                self.may_start.set()
            case "/release_memory_occupation":
                if self.may_start.is_set():
                    sys.exit("requests are under way")
                self.is_released = True
                for lm in (self.ours, self.reference):
                    for parameter in lm.parameters():
                        parameter.data.fill_(torch.nan)
            case "/resume_memory_occupation":
                if not self.is_released:
                    os._exit(1)  # the real one ends, with a KeyError
                self.is_released = False
            case "/update_weights_from_disk":
                self.update(body)
            case _:
                raise Wrong(f"there is no {path}")
        return {"success": True}

    def update(self, body: dict[str, Any]) -> None:
        if body["load_format"] != "safetensors":
            raise Wrong("Failed to get model loader: DummyModelLoader.")
        if self.is_released:
            os._exit(1)  # it would write to memory that is not there
        if self.may_start.is_set() and (self.engine.running or self.engine.waiting):
            raise Wrong("Weights were updated, but the cache was not flushed")
        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        if not files:
            raise Wrong(f"Cannot find any model weights with `{body['model_path']}`")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        self.label = body["weight_version"]
        self.engine.load_weights(iter(weights.items()), int(self.label))
        self.engine.gate.is_closed = not self.may_start.is_set()
        self.reference.load_state_dict(weights, strict=False)  # a tied head is not among them


def spans(versions: list[int]) -> list[dict[str, Any]]:
    starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    return [
        {"version": str(versions[start]) if versions[start] >= 0 else "default", "start": start, "end": end}
        for start, end in zip(starts, ends, strict=True)
    ]


class StandIn(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, model: Model) -> None:
        super().__init__((model.options.host, model.options.port), Handler)
        self.model = model

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.reply()

    def do_POST(self) -> None:
        self.reply()

    def reply(self) -> None:
        model = self.server.model
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        if self.path not in OPEN and self.headers["Authorization"] != f"Bearer {model.options.api_key}":
            return self.send(401, {"error": "Unauthorized"})
        if self.path == "/health":
            return self.send(200 if model.may_start.wait(1) else 503, None)  # it samples a token
        if self.path == "/metrics":
            labels = '{model_name="m"}'
            return self.send(
                200, f"sglang:queue_time_seconds_sum{labels} 1.5\nsglang:queue_time_seconds_count{labels} 3.0\n"
            )
        if self.path == "/model_info":
            return self.send(200, {"weight_version": model.label})
        try:
            if self.path != "/generate":
                return self.send(200, model.control(self.path, body))
            if body.get("logprob_start_len") == 0:
                return self.send(200, model.score(body["input_ids"]))
            future = model.start(body["input_ids"], body["sampling_params"])
            while not (future.done() or self.is_gone()):
                time.sleep(0.005)
            if future.done():
                return self.send(200, model.answer(body, future.result()))
            future.cancel()
        except ValueError as error:
            self.send(400, {"error": {"message": str(error)}})

    def is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def send(self, status: int, content: object) -> None:
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(1)
    StandIn(Model(flags())).serve_forever(0.05)
