"""The part of the weight sync that runs inside vLLM (0.32), and the token check of its routes.

A `WeightTransferEngine` for safetensors files and for buckets from memory, behind vLLM's own routes for reinforcement
learning. The server's worker imports this module because `--worker-extension-cls` names it. The server's environment
has no RL2, so of RL2 it imports only rl2_wire, through PYTHONPATH.
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
from rl2_delta import apply, checksums
from rl2_wire import Group, address_toward, bytes_of, is_adapter, opened, tensors, with_adapter
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
"""Paths that need no token, because they reveal nothing."""
FAULT = "RL2_FAULT_STALE_HEAD_AFTER"
"""Environment variable for tests: after so many updates a tied head keeps its weights, vLLM's behaviour on CPUs."""


@dataclass
class Init(WeightTransferInitInfo):
    """Settings of the transfer: either or both, at any time between updates."""

    folder: str | None = None
    """The only folder that files are read from."""
    group: dict[str, Any] | None = None
    """Group to join for broadcasts: backend, host, port, first_rank (this server's first worker), size, timeout_s."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """Tensors by their transformers names: `files`, or the `entries` of a bucket, or `abandon`."""

    files: list[str] | None = None
    """Files relative to the folder. All are put in place when the update finishes."""
    follows: str | None = None
    """Label of the weights that the files have changes of, '' if they have all weights; None: not to be kept."""
    label: str = ""
    """Label of the weights that the changes lead to."""
    entries: list[Any] | None = None
    """Weights of a bucket that is put in place at once; it is broadcast unless it is `shared`."""
    shared: dict[str, Any] | None = None
    """Handle of the bucket in the memory of a GPU of this machine."""
    abandon: bool = False
    """Request to end the open update. It ends with an error, which is how vLLM closes an update."""


class WeightTransfer(WeightTransferEngine[Init, Update]):
    """The receiver of weights in vLLM.

    `update_weights` only notes files; `finish_weight_update` puts all in place between two steps of the scheduler.
    Buckets are put in place one by one, so requests must be paused from the first to the end.
    """

    init_info_cls = Init
    update_info_cls = Update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if current_platform.is_cpu():
            draw_only_kept_tokens()
        self.folder: Path | None = None
        self.group: Group | None = None
        self.files: list[Path] = []
        self.is_open = False
        """True if a reload is open: some layers have new weights, others have no memory."""
        self.updates = 0
        self.kept: dict[str, torch.Tensor] = {}
        """Weights in host memory, by their transformers names, that changes apply to."""
        self.kept_label = ""
        """Their label; '' if there are none that are whole."""
        self.puts_kept = False
        """True if the open update puts them in place."""

    def init_transfer_engine(self, init_info: Init) -> None:
        if init_info.folder is not None:
            folder = Path(init_info.folder).resolve()
            if not folder.is_dir():
                raise ValueError(f"{init_info.folder} is not a folder on the server's machine")
            self.folder = folder
        if init_info.group is not None:
            self.leave_group()
            self.group = self.join_group(**init_info.group)

    def join_group(self, backend: str, host: str, port: int, first_rank: int, size: int, timeout_s: float) -> Group:
        """Join the group of trainer and workers."""
        if backend == "nccl" and self.device.type != "cuda":
            raise ValueError(f"the trainer's weights are on a GPU, but the server computes on {self.device}")
        mine = self.parallel_config
        rank = first_rank + mine.data_parallel_index * mine.world_size + mine.rank
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        with unpinned_nccl_env():  # the trainer does not have vLLM's NCCL settings
            return Group(backend, store, rank, size, self.device, address_toward(host, port), timeout_s)

    def leave_group(self) -> None:
        """Leave the group, if there is one."""
        if self.group is not None:
            self.group.leave()
            self.group = None

    def start_weight_update(self) -> None:
        self.files, self.puts_kept = [], False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.leave_group()  # else the other members would wait for this one
            if self.puts_kept:
                self.forget_kept()
            self.close()
            raise

    def receive_weights(self, update_info: Update) -> None:
        if update_info.abandon:
            raise RuntimeError("the update was abandoned on request")
        if update_info.follows is not None:
            self.keep(update_info.files or [], update_info.follows, update_info.label)
        elif update_info.files is not None:
            self.note(update_info.files)
        elif update_info.entries is not None:
            self.put_in_place(self.bucket(update_info.entries, update_info.shared), update_info.entries)
        else:
            raise ValueError("an update without files and entries")

    def note(self, files: list[str]) -> None:
        """Check files and keep their names until the update finishes."""
        if self.folder is None:
            raise RuntimeError("init_weight_transfer_engine with a folder comes first")
        for name in files:
            file = (self.folder / name).resolve()
            if not file.is_relative_to(self.folder) or not file.is_file():
                raise ValueError(f"{name} is not a file in {self.folder}")
            # check the file here: an error in the finish would leave the session open
            with safe_open(file, framework="pt"):
                pass
            self.files.append(file)

    def keep(self, files: list[str], follows: str, label: str) -> None:
        """Apply changes in files to the weights that are kept; they are put in place when the update finishes."""
        if follows and follows != self.kept_label:
            raise ValueError(f"changes of the weights {follows}, but this server has {self.kept_label or 'none'}")
        self.puts_kept, self.kept_label = True, ""
        if not follows:
            self.kept = {}
        self.note(files)
        apply(self.kept, _read(self.files, lambda name: True))
        self.kept_label = label

    def forget_kept(self) -> None:
        """Drop the weights that are kept: the next ones must be whole."""
        self.kept, self.kept_label, self.puts_kept = {}, "", False

    def bucket(self, entries: list[Any], shared: dict[str, Any] | None) -> torch.Tensor:
        """Return the bytes of a bucket in new memory, because layers keep weights until they have all of theirs."""
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
        """Load the weights of a bucket into the model."""
        self.open()
        self.model.load_weights(tensors(flat, entries))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def finish_weight_update(self) -> None:
        files, self.files = self.files, []
        if not files and not self.is_open and not self.puts_kept:
            raise ValueError("an update without weights")
        self.updates += 1
        try:
            if self.puts_kept:
                self.open()
                self.model.load_weights(iter(self.kept.items()))
            elif files:
                self.open()
                self.model.load_weights(_tensors(files))
        except BaseException:
            self.forget_kept()
            raise
        finally:
            self.close()

    def open(self) -> None:
        """Begin vLLM's layerwise reload, unless it is open."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if not self.is_open:
            self.is_open = True
            initialize_layerwise_reload(self.model)

    def close(self) -> None:
        """End the reload, after a failure too: the next step would compute with tensors that have no memory."""
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
    """Yield the weights in `files`, with the adapters in these files added."""
    adapters = dict(_read(files, is_adapter))
    for name, weight in _read(files, lambda name: not is_adapter(name)):
        yield name, with_adapter(name, weight, adapters)


def _read(files: list[Path], wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in filter(wanted, tensors.keys()):
                yield name, tensors.get_tensor(name)


def pack_again(model: Any) -> None:
    """Update the packed copies of weights that layers compute with on CPUs.

    The reload packs every layer that received tensors, except experts, which vLLM packs only when they are loaded
    first. A tied head receives none, because the embedding does, and would silently keep the old weights.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and module.w13_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(module)
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.numel():
            module.quant_method.process_weights_after_loading(module)


def draw_only_kept_tokens() -> None:
    """Make vLLM on CPUs draw only tokens that it keeps.

    While a prompt is read in pieces, or again after a pause, vLLM discards the token drawn after each piece and rewinds
    the request's random generator. CPU generators cannot be rewound that way, which ends the engine. So the generators
    of discarded tokens are set aside before the draw.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens = CPUModelRunner.sample_tokens

    def without_discarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        discarded = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        set_aside = {i: batch.generators.pop(i) for i in discarded if i in batch.generators}
        try:
            return sample_tokens(self, *args, **kwargs)
        finally:
            batch.generators.update(set_aside)

    CPUModelRunner.sample_tokens = without_discarded


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)


class WorkerExtension:
    """Methods that the worker gets by `--worker-extension-cls`, which also imports this module in time."""

    weight_transfer_engine: WeightTransfer

    def rl2_receipt(self) -> dict[str, int]:
        """Return the checksum of each weight that is kept, computed from its bytes."""
        return checksums(self.weight_transfer_engine.kept)


Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TokenRequired:
    """ASGI middleware that requires the token of $VLLM_API_KEY.

    vLLM's own check covers the routes that generate, but not those that change weights or pause.
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
