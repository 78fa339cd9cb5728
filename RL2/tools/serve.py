"""Serving of a model on this machine, through the endpoint that agents train with."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from RL2.agents.endpoint import Endpoint
from RL2.agents.session import Policy, Session
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError, naming
from RL2.models.dtypes import compute_dtype
from RL2.models.policy import load_model, load_tokenizer, max_length, stop_tokens
from RL2.rollout.continuation import decode
from RL2.types import Sampling


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `rl2 serve`, documented in its help."""

    model: str
    port: int = 8000
    key: str | None = None
    """None: a random one."""
    max_new_tokens: int | None = None
    max_running_requests: int = 64
    dequantize: bool = False


def serve(config: ServeConfig, ready: Callable[[str, str], object]) -> None:
    """Serve a model until the process is interrupted; call `ready(address, key)` once it answers.

    Requests choose their own temperature and top_p; a request with a `seed` gets the same response every time. Raise
    UserError before the port is opened if the model cannot be loaded, and ConfigError if the port is taken.
    """
    transformers_logging.disable_progress_bar()
    with naming("model"):
        tokenizer, longest = load_tokenizer(config.model), max_length(config.model)
        template = Template(tokenizer)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lm = load_model(config.model, compute_dtype("auto", device), config.dequantize)
        lm = lm.to(device)  # type: ignore[arg-type]
        sampling = Sampling(config.max_new_tokens or longest, stop_token_ids=stop_tokens(lm, tokenizer, template))
    engine = EmbeddedEngine(
        lm,
        decode=lambda ids: decode(tokenizer, ids),
        max_running_requests=config.max_running_requests,
        memory_share=0.6,
    )
    policy = Policy(engine, tokenizer, template, ResponseParser(template), longest)
    key = config.key or secrets.token_urlsafe(16)

    def session() -> Session:
        """Return a session of its own for each request, so that nothing is kept of it."""
        return Session(policy, sampling, None, follows=True)

    async def run() -> None:
        endpoint = _opened(config.port)
        endpoint.sessions[key] = session
        await endpoint.start()
        try:
            ready(endpoint.url, key)
            await asyncio.Event().wait()
        finally:
            await endpoint.close()

    try:
        asyncio.run(run())
    finally:
        engine.close()


def _opened(port: int) -> Endpoint:
    try:
        return Endpoint(port=port)
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be opened: {error.strerror}; 0 picks a free one") from error
