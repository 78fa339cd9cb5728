"""One vLLM server as a process of this machine: started, watched, ended with all that belongs to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from RL2.config import UserError
from RL2.engines.vllm.client import Client

PLUGIN = Path(__file__).parent / "plugin"
POLL_S = 0.2
TERM_S = 10
"""From SIGTERM to SIGKILL."""
SHOWN_BYTES = 3000
"""Of the end of the log, in errors."""


class EngineFailed(UserError, RuntimeError):
    """A server did not start, does not answer any more, or computes with other weights than the trainer."""


class Server:
    """A server with the command line `arguments`, on a loopback port of its own that it keeps when it starts again."""

    def __init__(
        self,
        python: str,
        arguments: list[str],
        environment: Mapping[str, object],
        token: str,
        *,
        name: str,
        log: Path,
        folder: Path,
    ) -> None:
        """`python` is the interpreter of its environment; `token` what its clients need; `name` it has in errors.

        `folder`, which is made, is for its temporary files.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name, self.log, self.folder = name, log, folder
        self.client = Client(f"http://127.0.0.1:{port}", token)
        self.command = [python, str(PLUGIN / "launch.py"), "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.environment = {key: str(value) for key, value in environment.items()} | {"VLLM_API_KEY": token}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, in a session of its own, so that one signal reaches all that come of it."""
        self.folder.mkdir(exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            **self.environment,
            "PYTHONPATH": str(PLUGIN),
            "TMPDIR": str(self.folder),
            "RL2_PARENT": str(os.getpid()),
        }
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command,
                    env=inherited | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineFailed(f"{self.name} cannot be started: {error}; see rollout.vllm.python") from error

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Raises `EngineFailed` if it ends, or takes longer than `timeout_s`."""
        limit = time.monotonic() + timeout_s
        while not self.client.is_healthy(timeout_s=5):
            if not self.is_running:
                raise EngineFailed(f"{self.name} ended while it started; {self.last_words}")
            if time.monotonic() > limit:
                raise EngineFailed(
                    f"{self.name} did not come up within rollout.vllm.start_timeout_s={timeout_s:g}; {self.last_words}"
                )
            time.sleep(POLL_S)

    @property
    def last_words(self) -> str:
        end = self.log.read_bytes()[-SHOWN_BYTES:].decode(errors="replace") if self.log.exists() else ""
        return f"the end of {self.log}:\n{end}"

    def stop(self) -> None:
        """End the whole process group, gently first; may be called at any time, and again."""
        if self.process is not None:
            for end, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
                with contextlib.suppress(ProcessLookupError):  # gone, and all its children
                    os.killpg(self.process.pid, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(wait_s)
        shutil.rmtree(self.folder, ignore_errors=True)


_NOT_INHERITED = (
    "VLLM_",
    "PYTHON",  # the trainer's paths
    "LD_PRELOAD",
    "RANK",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
)
"""What is the trainer's own, or would make the server take itself for one of its processes."""
