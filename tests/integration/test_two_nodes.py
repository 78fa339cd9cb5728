"""Two machines, played by two network namespaces with an address each: a run over both, one cut off, the run resumed.

Needs the right to make namespaces (root) and iproute2; elsewhere it is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import LIMIT_S, Run, World, ranks_of, rows, without_times
from safetensors.torch import load_file

TIMEOUT_S = 8
NAMES = ("rl2-test-0", "rl2-test-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 12
SETTINGS = f"trainer.timeout_s={TIMEOUT_S}", "trainer.save_freq=1", f"trainer.max_steps={STEPS}"
SAID = (
    r"spo \(rank {rank}\): failed while waiting for .+: another of the 2 processes died or did not arrive within "
    rf"trainer.timeout_s={TIMEOUT_S}"
)


Start = Callable[..., list[subprocess.Popen[bytes]]]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, ...]]:
    if shutil.which("ip") is None:
        pytest.skip("no iproute2 on this machine")
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("netns", "add", NAMES[1])
        ip("link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "name", "veth1", "netns", NAMES[1])
        for i, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"veth{i}")
            ip("-n", name, "link", "set", f"veth{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def start(nodes: tuple[str, ...], world: World) -> Iterator[Start]:
    """Starts torchrun on both nodes; whatever it has left is killed in the end."""
    launched: list[subprocess.Popen[bytes]] = []

    def launch(save_dir: Path, *overrides: str, max_restarts: int = 0) -> list[subprocess.Popen[bytes]]:
        launched.extend(new := start_on(nodes, world, save_dir, *overrides, max_restarts=max_restarts))
        return new

    yield launch
    for node in launched:
        for process in (*ranks_of(node.pid), node):
            process.kill()
        node.wait()


def start_on(
    nodes: tuple[str, ...], world: World, save_dir: Path, *overrides: str, max_restarts: int
) -> list[subprocess.Popen[bytes]]:
    launched = []
    for i, name in enumerate(nodes):
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=test"),
            *(
                f"--rdzv-endpoint={ADDRESSES[0]}:29511",
                f"--local-addr={ADDRESSES[i]}",
                f"--max-restarts={max_restarts}",
            ),
            # torchrun would tell the host by its name, which is the same here; and it waits too when the store has gone
            f"--rdzv-conf=is_host={int(i == 0)},read_timeout=5",
            *("-m", "RL2.trainer.spo", *world.rl, f"trainer.save_dir={save_dir}", *overrides),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"veth{i}", "HF_HUB_OFFLINE": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        launched.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=(save_dir.parent / f"node_{i}.err").open("w"),
                env=environment,
                start_new_session=True,
            )
        )
    return launched


def said(folder: Path, rank: int) -> str:
    return (folder / f"node_{rank}.err").read_text()


def wait_until(happened: Callable[[], object], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.05)


def wait_for_steps(metrics: Path, launched: list[subprocess.Popen[bytes]]) -> None:
    """Wait for three steps of a run whose nodes are all alive."""

    def happened() -> bool:
        ended = [rank for rank, node in enumerate(launched) if node.poll() is not None]
        assert ended == [], said(metrics.parents[1], ended[0])
        return metrics.exists() and metrics.read_text().count("\n") > 2

    wait_until(happened, LIMIT_S)


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> Run:
    return world.run("spo", *SETTINGS, nproc=2).succeeded()


def assert_same(save_dir: Path, uninterrupted: Run) -> None:
    assert without_times(rows(save_dir / "metrics.jsonl")) == without_times(uninterrupted.metrics)
    ours, theirs = load_file(save_dir / "latest" / "model.safetensors"), load_file(uninterrupted.weights)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_ranks_of_both_nodes_meet_again_when_one_was_killed(
    victim: int, start: Start, uninterrupted: Run, tmp_path: Path
) -> None:
    launched = start(tmp_path / "run", *SETTINGS, max_restarts=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_steps(metrics, launched)
    (first,), (second,) = (ranks_of(node.pid) for node in launched)
    ranks = [first, second]
    # the other is too slow to fail by itself: its torchrun starts it again, and does not count that as a restart
    ranks[1 - victim].suspend()
    ranks[victim].kill()
    time.sleep(3)
    ranks[1 - victim].resume()
    for i, node in enumerate(launched):
        assert node.wait(LIMIT_S) == 0, said(tmp_path, i)
    assert_same(tmp_path / "run", uninterrupted)


def test_a_node_that_is_cut_off_stops_the_other_and_the_run_resumes(
    nodes: tuple[str, ...], start: Start, uninterrupted: Run, tmp_path: Path
) -> None:
    launched = start(tmp_path / "run", *SETTINGS)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_steps(metrics, launched)
    ip("-n", nodes[1], "link", "set", "veth1", "down")
    began = time.monotonic()
    for rank, node in enumerate(launched):
        # a lost connection shows only when the limit is over; saving the model and the checkpoint may each meet one
        wait_until(lambda rank=rank: re.search(SAID.format(rank=rank), said(tmp_path, rank)), 3 * TIMEOUT_S)
        print(f"rank {rank} stopped {time.monotonic() - began:.1f} s after the cut")
        if rank == 0:
            assert node.wait(TIMEOUT_S) != 0
        node.kill()  # torchrun itself waits up to 300 s for the node that it cannot reach
        node.wait()
    assert len(rows(metrics)) < STEPS

    ip("-n", nodes[1], "link", "set", "veth1", "up")
    patient = "trainer.timeout_s=60"  # nothing is cut off any more, and the machine may be busy
    again = start(tmp_path / "run", *SETTINGS, patient, "trainer.load_ckpt_from=latest")
    for rank, node in enumerate(again):
        assert node.wait(LIMIT_S) == 0, said(tmp_path, rank)
    assert_same(tmp_path / "run", uninterrupted)
