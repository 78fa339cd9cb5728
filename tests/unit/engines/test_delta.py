"""Weights that go to servers as changes. A client reads the files as the server's worker does, without a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from RL2.config.rollout import VLLM
from RL2.engines.served.client import DeltaClient, ServerError
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_sync import WeightCheck, WeightSync
from RL2.engines.served.wire.rl2_delta import ESCAPE, apply, change, checksums, differences
from RL2.engines.vllm.server_spec import VLLM_SERVER

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
def test_a_change_loses_nothing(dtype: torch.dtype, share: float) -> None:
    g = torch.Generator().manual_seed(1)
    old = torch.randn(300, 70, generator=g).to(dtype)
    changed = torch.rand(old.shape, generator=g) < share
    new = torch.where(changed, torch.randn(old.shape, generator=g).to(dtype).float(), old.float()).to(dtype)
    sent = change("w", old, new)
    weights = {"w": old.clone()}
    apply(weights, sent.items())
    assert bits(weights["w"]).equal(bits(new))
    assert sum(x.nbytes for x in sent.values()) <= new.nbytes
    if share == 0.02:
        size = old.element_size()
        assert sum(x.nbytes for x in sent.values()) < (1.1 * share * (size + 1) / size) * new.nbytes + 200


@pytest.mark.parametrize("places", [[0], [254], [255], [256], [0, 510, 1020], [7, 8, 9, 9999], [9999]])
def test_distances_of_any_size(places: list[int]) -> None:
    old = torch.zeros(10_000, dtype=torch.bfloat16)
    new = old.index_fill(0, torch.tensor(places), 1.0)
    weights = {"w": old.clone()}
    sent = change("w", old, new)
    apply(weights, sent.items())
    assert weights["w"].equal(new)
    assert len(sent["w.rl2_gaps"]) == len(places) + places[-1] // ESCAPE or len(places) > 1


def test_bits_count_not_values() -> None:
    """A zero that changes its sign, and a NaN with another payload, are changes."""
    old = torch.tensor([0.0, 1.0, float("nan")] + [0.5] * 50)
    new = old.clone()
    new[0] = -0.0
    new.view(torch.int32)[2] += 1
    weights = {"w": old.clone()}
    apply(weights, change("w", old, new).items())
    assert bits(weights["w"]).equal(bits(new))
    assert change("w", new, new.clone()) == {}


def test_a_weight_that_changed_much_goes_whole() -> None:
    old, new = torch.zeros(40, dtype=torch.bfloat16), torch.ones(40, dtype=torch.bfloat16)
    assert list(change("w", old, new)) == ["w"]
    assert list(change("w", torch.tensor(1.0), torch.tensor(2.0))) == ["w"], "a single number too"


def test_checksums_see_bytes_dtype_shape_and_names() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    right = checksums(weights)
    assert not list(differences(right, checksums({name: weight.clone() for name, weight in weights.items()})))
    flipped = {"a": weights["a"].clone(), "b": weights["b"]}
    flipped["a"].view(torch.int32)[1, 2] ^= 1
    for others in (
        flipped,
        weights | {"a": weights["a"].reshape(3, 2)},
        weights | {"a": weights["a"].view(torch.int32)},
        {"b": weights["b"]},
    ):
        assert list(differences(right, checksums(others))) == ["a"]


@pytest.mark.parametrize(
    "received",
    [
        {"w.rl2_gaps": torch.tensor([1], dtype=torch.uint8)},
        {"w.rl2_values": torch.ones(1)},
        {"v.rl2_gaps": torch.tensor([1], dtype=torch.uint8), "v.rl2_values": torch.ones(1)},
        {"w.rl2_gaps": torch.tensor([1], dtype=torch.uint8), "w.rl2_values": torch.ones(2)},
        {"w.rl2_gaps": torch.tensor([9], dtype=torch.uint8), "w.rl2_values": torch.ones(1)},
        {"w.rl2_gaps": torch.tensor([1], dtype=torch.uint8), "w.rl2_values": torch.ones(1).half()},
    ],
    ids=["no values", "no places", "unknown weight", "too many values", "behind the end", "other dtype"],
)
def test_a_change_that_does_not_fit_is_refused(received: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"change"):
        apply({"w": torch.zeros(5)}, received.items())


@dataclass
class Worker(DeltaClient):
    """Does with files what the worker of a server does."""

    url: str = "http://nowhere"
    folder: Path = Path()
    kept: dict[str, Tensor] = field(default_factory=dict)
    label: str = ""
    version: str = ""
    served: dict[str, Tensor] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    damage: Callable[[Path], None] | None = None
    """Function that changes the bytes of the first file on its way to the server."""

    def load_changes(
        self, files: list[str], follows: str, label: str, version: str, checksums_: Mapping[str, int]
    ) -> None:
        self.log.append("changes" if follows else "whole")
        damage, self.damage = self.damage, None
        if damage is not None:
            damage(self.folder / files[0])
        if follows and follows != self.label:
            raise ServerError("changes of other weights")
        self.kept, self.label = self.kept if follows else {}, ""
        try:
            for file in files:
                apply(self.kept, sorted(load_file(self.folder / file).items(), reverse=len(self.log) % 2 == 0))
        except (OSError, SafetensorError) as error:  # HTTP turns all errors into this one
            raise ServerError(str(error)) from error
        if wrong := list(differences(checksums_, checksums(self.kept))):
            raise ServerError(f"other checksums: {wrong}")
        self.label, self.version = label, version
        self.served = {name: weight.clone() for name, weight in self.kept.items()}

    def logps(self, token_ids: list[int]) -> list[float]:
        return [0.0]

    def use_folder(self, folder: str) -> None:
        self.folder, self.kept, self.label = Path(folder), {}, ""

    def is_healthy(self, timeout_s: float) -> bool:
        return True

    def pause(self) -> None: ...

    def load_weights(self, files: list[str], version: str) -> None:
        raise AssertionError("all weights go as changes")

    async def generate(self, *_: Any) -> Any: ...


class Model:
    """Weights in bfloat16 of which few change in a step."""

    def __init__(self, seed: int = 3) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.weights = {f"layer{i}": torch.randn(64, 50 + i, generator=self.g).bfloat16() for i in range(5)}

    def step(self) -> None:
        for weight in self.weights.values():
            weight.mul_(torch.where(torch.rand(weight.shape, generator=self.g) < 0.02, 1.01, 1.0))


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def workers() -> list[Worker]:
    return [Worker(), Worker()]


@pytest.fixture
def sync(tmp_path: Path, workers: list[Worker]) -> WeightSync:
    settings = VLLM(sync_dir=str(tmp_path), bucket_mib=1)
    spec = EngineSpec(VLLM_SERVER, settings, 100, 8, transport="delta")
    made = WeightSync(spec, list(workers), WeightCheck(lambda ids: [0.0], [1], 0.1), torch.device("cpu"))
    made.attach()
    return made


def send(sync: WeightSync, model: Model, version: int) -> dict[int, str]:
    sync.send(iter(model.weights.items()))
    return sync.load(version, [0.0])


def assert_served(workers: list[Worker], model: Model, version: int) -> None:
    for worker in workers:
        assert worker.version == str(version) and worker.served.keys() == model.weights.keys()
        assert all(bits(worker.served[name]).equal(bits(weight)) for name, weight in model.weights.items())


def test_steps_of_changes_are_the_weights(sync: WeightSync, model: Model, workers: list[Worker]) -> None:
    for version in range(6):
        assert send(sync, model, version) == {}
        assert_served(workers, model, version)
        model.step()
    assert workers[0].log == ["whole", *["changes"] * 5]
    assert 0 < sync.metrics()["engine/delta_share"] < 0.05 and sync.metrics()["engine/sent_whole"] == 0
    assert len(list(sync.folder.iterdir())) == 1, "files of weights that are no longer in place are removed"
    model = Model(seed=4)
    assert send(sync, model, 6) == {}, "weights of which all change go as well"
    assert_served(workers, model, 6)
    assert send(sync, model, 7) == {} and sync.metrics()["engine/delta_share"] == 0
    assert_served(workers, model, 7)


def flip(file: Path) -> None:
    """Change a bit of the last byte, which is a value."""
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(b"none"), lambda file: file.unlink()])
def test_damaged_changes_are_refused(
    sync: WeightSync, model: Model, workers: list[Worker], damage: Callable[[Path], None], caplog: Any
) -> None:
    """The server that reads them gets all weights; the other one reads the same files afterwards, or before."""
    send(sync, model, 0)
    model.step()
    (tmp := workers[1]).log.clear()
    workers[0].damage = damage
    sync.states = sync.states[:1]
    assert send(sync, model, 1) == {}
    assert_served(workers[:1], model, 1)
    assert workers[0].log == ["whole", "changes", "whole"] and "all weights" in caplog.text
    assert sync.metrics()["engine/sent_whole"] == 1 and tmp.log == []


def test_damaged_weights_are_refused(sync: WeightSync, model: Model, workers: list[Worker]) -> None:
    """With all weights damaged there is nothing else to send: the server counts as failed, and keeps what it has."""
    workers[0].damage = flip
    sync.states = sync.states[:1]
    problems = send(sync, model, 0)
    assert "other checksums" in problems[0] and workers[0].version == ""


def test_a_server_that_missed_changes_gets_everything(sync: WeightSync, model: Model, workers: list[Worker]) -> None:
    send(sync, model, 0)
    model.step()
    sync.forget(0)  # it has ended, and starts again with nothing
    assert sync.restore(0) == ""
    assert workers[0].log == ["whole", "whole"]
    send(sync, model, 1)
    assert_served(workers, model, 1)
    model.step()
    workers[1].label = "of another trainer"  # what the trainer does not know
    send(sync, model, 2)
    assert_served(workers, model, 2)
    assert workers[0].log[-2:] == ["changes", "changes"] and workers[1].log[-2:] == ["changes", "whole"]


def test_a_server_that_restarts_between_sending_and_loading_waits_for_the_new_weights(
    sync: WeightSync, model: Model, workers: list[Worker]
) -> None:
    send(sync, model, 0)
    model.step()
    sync.send(iter(model.weights.items()))
    sync.forget(0)
    assert sync.restore(0) == "" and workers[0].log == ["whole"]
    assert sync.load(1, [0.0]) == {}
    assert_served(workers, model, 1)


def test_weights_that_were_not_sent_to_the_end_are_sent_whole(
    sync: WeightSync, model: Model, workers: list[Worker]
) -> None:
    def broken() -> Any:
        yield from list(model.weights.items())[:3]
        raise RuntimeError("out of memory")

    send(sync, model, 0)
    model.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        sync.send(broken())
    model.step()
    assert send(sync, model, 1) == {}
    assert_served(workers, model, 1)
    assert workers[0].log == ["whole", "whole"]


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.uint8)
