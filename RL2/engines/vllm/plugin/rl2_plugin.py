"""The part of the weight sync that runs inside vLLM (0.32), and the door to its routes.

A `WeightTransferEngine` for safetensors files and for buckets that come from memory to memory, behind vLLM's own routes
for reinforcement learning. The server's worker imports this module because `--worker-extension-cls` names it. Of RL2,
rl2_transfer beside it is imported and nothing else: the server lives in an environment of its own.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rl2_transfer import Group, address_toward, bytes_of, opened, tensors
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform
from vllm.utils.nccl import unpinned_nccl_env

BACKEND = "rl2"
OPEN_PATHS = ("/health",)
"""Answered without the token: they say nothing."""
FAULT = "RL2_FAULT_STALE_HEAD_AFTER"
"""For tests: after so many updates a tied head stays as it is, which is what vLLM does by itself on CPUs."""


@dataclass
class Init(WeightTransferInitInfo):
    """Either or both, and again at any time between updates."""

    folder: str | None = None
    """The only one that files are read from."""
    group: dict[str, Any] | None = None
    """To join for broadcasts: backend, host, port, first_rank (of this server's workers), size, timeout_s."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Tensors under their transformers names: `files`, or a bucket's `entries`, or `abandon`."""

    files: list[str] | None = None
    """Relative to the folder. All are put in place when the update finishes."""
    entries: list[Any] | None = None
    """Of a bucket that is put in place at once; it is broadcast unless it is `shared`."""
    shared: dict[str, Any] | None = None
    """Where the bucket is, in memory of a GPU of this machine."""
    abandon: bool = False
    """No more will come of what has begun. It ends with an error, which is how vLLM closes an update."""


class WeightTransfer(WeightTransferEngine[Init, Update]):
    """Files are only noted by `update_weights`; `finish_weight_update` puts all in place between two steps of the
    scheduler. Buckets are put in place one by one, so requests have to be paused from the first to the end."""

    init_info_cls = Init
    update_info_cls = Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if current_platform.is_cpu():
            draw_only_what_is_kept()
        self.folder: Path | None = None
        self.group: Group | None = None
        self.files: list[Path] = []
        self.is_open = False
        """Some layers have new weights, others no memory."""
        self.updates = 0

    def init_transfer_engine(self, init_info: Init) -> None:
        if init_info.folder is not None:
            folder = Path(init_info.folder).resolve()
            if not folder.is_dir():
                raise ValueError(f"{init_info.folder} is not a folder on the machine of the server")
            self.folder = folder
        if init_info.group is not None:
            self.leave_group()
            self.group = self.joined(**init_info.group)

    def joined(self, backend: str, host: str, port: int, first_rank: int, size: int, timeout_s: float) -> Group:
        if backend == "nccl" and self.device.type != "cuda":
            raise ValueError(f"the trainer's weights lie on a GPU, and the server computes on {self.device}")
        mine = self.parallel_config
        rank = first_rank + mine.data_parallel_index * mine.world_size + mine.rank
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        with unpinned_nccl_env():  # the trainer has none of vLLM's settings
            return Group(backend, store, rank, size, self.device, address_toward(host, port), timeout_s)

    def leave_group(self) -> None:
        if self.group is not None:
            self.group.leave()
            self.group = None

    def start_weight_update(self) -> None:
        self.files = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.leave_group()  # or the others would wait for us
            self.close()
            raise

    def receive_weights(self, update_info: Update) -> None:
        if update_info.abandon:
            raise RuntimeError("the update was abandoned, as it was asked to be")
        if update_info.files is not None:
            self.note(update_info.files)
        elif update_info.entries is not None:
            self.put_in_place(self.bucket(update_info.entries, update_info.shared), update_info.entries)
        else:
            raise ValueError("an update without files and entries")

    def note(self, files: list[str]) -> None:
        if self.folder is None:
            raise RuntimeError("init_weight_transfer_engine with a folder comes first")
        for name in files:
            file = (self.folder / name).resolve()
            if not file.is_relative_to(self.folder) or not file.is_file():
                raise ValueError(f"{name} is not a file in {self.folder}")
            with safe_open(file, framework="pt"):  # a bad one fails here: a failing finish leaves the session open
                pass
            self.files.append(file)

    def bucket(self, entries: list[Any], shared: dict[str, Any] | None) -> torch.Tensor:
        """In memory of its own: layers hold what they have got until they have all that is theirs."""
        size = bytes_of(entries)
        if shared is not None:
            theirs = opened(shared)
            ours = theirs[:size].to(self.device, copy=True)
            torch.cuda.synchronize(theirs.device)
            del theirs
            torch.cuda.ipc_collect()
            return ours
        if self.group is None:
            raise RuntimeError("init_weight_transfer_engine with a group comes first")
        flat = torch.empty(size, dtype=torch.uint8, device=self.device if self.group.is_nccl else "cpu")
        self.group.broadcast(flat)
        return flat

    def put_in_place(self, flat: torch.Tensor, entries: list[Any]) -> None:
        self.open()
        self.model.load_weights(tensors(flat, entries))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def finish_weight_update(self) -> None:
        files, self.files = self.files, []
        if not files and not self.is_open:
            raise ValueError("an update without weights")
        self.updates += 1
        try:
            if files:
                self.open()
                self.model.load_weights(_tensors(files))
        finally:
            self.close()

    def open(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if not self.is_open:
            self.is_open = True
            initialize_layerwise_reload(self.model)

    def close(self) -> None:
        """After a failure too: the next step would compute with tensors that have no memory."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self.is_open:
            self.is_open = False
            finalize_layerwise_reload(self.model, self.model_config)
            if self.updates <= int(os.environ.get(FAULT, self.updates)):
                pack_again(self.model)

    def shutdown(self) -> None:
        self.leave_group()
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
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

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
    WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)


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
