"""The part of the weight sync that runs inside vLLM (0.32), and the door to its routes.

A `WeightTransferEngine` that reads safetensors files, behind vLLM's own routes for reinforcement learning. The server's
worker imports this module because `--worker-extension-cls` names it. Nothing of RL2 is imported: the server lives in an
environment of its own.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

BACKEND = "rl2_files"
OPEN_PATHS = ("/health",)
"""Answered without the token: they say nothing."""
FAULT = "RL2_FAULT_STALE_HEAD_AFTER"
"""For tests: after so many updates a tied head stays as it is, which is what vLLM does by itself on CPUs."""


@dataclass
class Folder(WeightTransferInitInfo):
    folder: str
    """The only one that files are read from."""


@dataclass
class Files(WeightTransferUpdateInfo):
    files: list[str]
    """Relative to the folder; they hold tensors under their transformers names."""


class FileWeightTransfer(WeightTransferEngine[Folder, Files]):
    """`update_weights` only notes which files there are; `finish_weight_update` puts all in place at once.

    One such call runs between two steps of the scheduler, so requests under way never see half of an update, whether
    they were paused or not.
    """

    init_info_cls = Folder
    update_info_cls = Files

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if current_platform.is_cpu():
            draw_only_what_is_kept()
        self.folder: Path | None = None
        self.files: list[Path] = []
        self.updates = 0

    def init_transfer_engine(self, init_info: Folder) -> None:
        folder = Path(init_info.folder).resolve()
        if not folder.is_dir():
            raise ValueError(f"{init_info.folder} is not a folder on the machine of the server")
        self.folder = folder

    def start_weight_update(self) -> None:
        self.files = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Files) -> None:
        if self.folder is None:
            raise RuntimeError("init_weight_transfer_engine comes first")
        for name in update_info.files:
            file = (self.folder / name).resolve()
            if not file.is_relative_to(self.folder) or not file.is_file():
                raise ValueError(f"{name} is not a file in {self.folder}")
            with safe_open(file, framework="pt"):  # a bad one fails here: a failing finish leaves the session open
                pass
            self.files.append(file)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        files, self.files = self.files, []
        if not files:
            raise ValueError("an update without files")
        self.updates += 1
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(_tensors(files))
        finally:  # after a failure too: the next step would compute with tensors that have no memory
            finalize_layerwise_reload(self.model, self.model_config)
            if self.updates <= int(os.environ.get(FAULT, self.updates)):
                pack_again(self.model)

    def shutdown(self) -> None:
        self.folder = None


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def pack_again(model: Any) -> None:
    """Bring the packed copies up to date that layers compute from on CPUs.

    The reload packs each layer again that got tensors. A tied head gets none, because the embedding has them, and would
    go on with the old ones without a word.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.numel():
            module.quant_method.process_weights_after_loading(module)


def draw_only_what_is_kept() -> None:
    """While a prompt is read in pieces, or read again after a pause, the token drawn after each piece is thrown away.

    vLLM then takes back what that drew from the request's own random numbers, in a way that CUDA's generators know and
    those of CPUs end the engine with. Here they are kept out of it before the draw.
    """
    sample_tokens = CPUModelRunner.sample_tokens

    def without_those_thrown_away(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        thrown_away = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        kept_out = {i: batch.generators.pop(i) for i in thrown_away if i in batch.generators}
        try:
            return sample_tokens(self, *args, **kwargs)
        finally:
            batch.generators.update(kept_out)

    CPUModelRunner.sample_tokens = without_those_thrown_away


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)


class WorkerExtension:
    """Nothing but a name for `--worker-extension-cls`, so that the worker imports this module before it needs it."""


Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TokenRequired:
    """ASGI middleware: only who has the token of $VLLM_API_KEY gets in.

    vLLM's own guards what generates, but neither the routes that change weights nor those that pause.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app, self.expected = app, b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Send) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        is_open = scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS
        if is_open or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"a token is needed"})
