"""Programs as processes of their own that need not import torch and transformers first: that takes six seconds each.

They are forked from a server which has imported what programs import, and has done nothing else. What a program does
is the same but for the seed of Python's hashes, which is the server's.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from RL2.engines.served.server import free_port

IMPORTED = [
    *("RL2.tools.cli", "RL2.trainer.run", "RL2.trainer.dry_run", "RL2.trainer.rl", "RL2.trainer.unused_settings"),
    *(
        "RL2.trainer.sft_loop",
        "RL2.trainer.rm_loop",
        "RL2.trainer.dpo_loop",
        "transformers.models.qwen3.modeling_qwen3",
    ),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
"""Variables that libraries read when they are imported; programs have them too."""


def start_server() -> ForkServerContext:
    """Return what starts processes from the server, which takes its environment from this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Program:
    """`python -m module arguments`, as far as tests need what a `subprocess.Popen` can do."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        out: Path,
        err: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`out`, `err`: files for what it prints. `env`: instead of the environment of the tests."""
        context = start_server()
        whole = dict(os.environ if env is None else env) | ENVIRONMENT
        self.process = context.Process(target=_run, args=(module, arguments, str(out), str(err), cwd, whole))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Ranks:
    """The ranks of `torchrun --nproc_per_node=N -m module arguments`, without torchrun; if one fails, all end."""

    def __init__(self, nproc: int, module: str, arguments: list[str], out: Path, err: Path) -> None:
        common = {
            **{"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "GROUP_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        self.ranks = [
            Program(module, arguments, out, err, None, {**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(nproc)
        ]

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        """1 if a rank has failed, as of torchrun."""
        codes = [rank.returncode for rank in self.ranks]
        return None if None in codes else int(any(codes))

    def poll(self) -> int | None:
        if any(rank.returncode for rank in self.ranks):
            with suppress(subprocess.TimeoutExpired):
                self._end(30)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        limit = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.ranks[0].process.name, timeout)
            time.sleep(0.05)
        return code

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, patience_s: float) -> None:
        """End what is left as torchrun does: SIGTERM, and SIGKILL for whoever does not go."""
        self.terminate()
        try:
            for rank in self.ranks:
                rank.wait(patience_s)
        finally:
            self.kill()


def run(
    module: str,
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Return what `python -m module arguments` came to. Raise TimeoutExpired after `timeout_s` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        program = Program(module, list(arguments), out, err, cwd, env)
        try:
            code = program.wait(timeout_s)
        finally:
            program.kill()
        texts = (file.read_text(encoding="utf-8") for file in (out, err))
        return subprocess.CompletedProcess([module, *arguments], code, *texts)


def _run(module: str, arguments: list[str], out: str, err: str, cwd: Path | None, env: dict[str, str]) -> None:
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
