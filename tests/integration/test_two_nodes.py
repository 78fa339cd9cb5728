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
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import LIMIT_S, World, rows, without_times
from safetensors.torch import load_file

TIMEOUT_S = 8
NAMES = ("rl2-test-0", "rl2-test-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 12


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


def start(nodes: tuple[str, ...], world: World, save_dir: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """torchrun on both nodes."""
    launched = []
    for i, name in enumerate(nodes):
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=test"),
            *(f"--rdzv-endpoint={ADDRESSES[0]}:29511", f"--local-addr={ADDRESSES[i]}", "--max-restarts=0"),
            *("-m", "RL2.trainer.spo", *world.rl, f"trainer.save_dir={save_dir}", *overrides),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"veth{i}", "HF_HUB_OFFLINE": "1"}
        launched.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return launched


def errors_of(node: subprocess.Popen[str], timeout_s: float) -> str:
    try:
        return node.communicate(timeout=timeout_s)[1]
    except subprocess.TimeoutExpired:
        node.kill()
        raise AssertionError(f"still running after {timeout_s} s: {node.communicate()[1]}") from None


def test_a_node_that_is_cut_off_stops_the_other_and_the_run_resumes(
    nodes: tuple[str, ...], world: World, tmp_path: Path
) -> None:
    settings = f"trainer.timeout_s={TIMEOUT_S}", "trainer.save_freq=1", f"trainer.max_steps={STEPS}"
    uninterrupted = world.run("spo", *settings, nproc=2).succeeded()

    launched = start(nodes, world, tmp_path / "run", *settings)
    metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < limit and all(node.poll() is None for node in launched)
        time.sleep(0.05)
    ip("-n", nodes[1], "link", "set", "veth1", "down")
    began, said = time.monotonic(), []
    for i, node in enumerate(launched):
        # a lost connection is only seen when its limit is over; torchrun then has its own meeting point to give up
        said.append(errors_of(node, TIMEOUT_S + 90))
        assert node.returncode != 0
        print(f"node {i} stopped {time.monotonic() - began:.1f} s after the cut")
    for rank, errors in enumerate(said):
        assert re.search(
            rf"spo \(rank {rank}\): waited for .+, and another of the 2 processes has died or was not there within "
            rf"trainer.timeout_s={TIMEOUT_S}",
            errors,
        ), errors
    assert len(rows(metrics)) < STEPS

    ip("-n", nodes[1], "link", "set", "veth1", "up")
    again = start(nodes, world, tmp_path / "run", *settings, "trainer.load_ckpt_from=latest")
    for node in again:
        errors = errors_of(node, LIMIT_S)
        assert node.returncode == 0, errors
    assert without_times(rows(metrics)) == without_times(uninterrupted.metrics)
    ours, theirs = load_file(tmp_path / "run" / "latest" / "model.safetensors"), load_file(uninterrupted.weights)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
