"""One server as a process of this machine: started, watched, ended with all that belongs to it."""

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

from RL2.config.secrets import is_secret
from RL2.engines.served.server_spec import Kind
from RL2.errors import UserError

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
        kind: Kind,
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
        self.kind, self.name, self.log, self.folder = kind, name, log, folder
        self.client = kind.client(f"http://127.0.0.1:{port}", token)
        self.command = [python, str(kind.launcher), "--host", "127.0.0.1", "--port", str(port), *arguments]
        given = {key: str(value) for key, value in environment.items()}
        self.environment = {**kind.environment, **given, kind.token_variable: token}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, in a session of its own, so that one signal reaches all that come of it."""
        self.folder.mkdir(exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith((self.kind.prefix, *_NOT_INHERITED))}
        # secrets of others: of wandb, of clouds; it may have to fetch a model
        inherited = {k: v for k, v in inherited.items() if not is_secret(k) or k.startswith(("HF_", "HUGGING_FACE_"))}
        environment = {
            **self.environment,
            "TMPDIR": str(self.folder),
            "RL2_PARENT": str(os.getpid()),
        }
        if self.kind.plugins is not None:
            environment["PYTHONPATH"] = str(self.kind.plugins)
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
            raise EngineFailed(f"{self.name} cannot be started: {error}; see rollout.{self.kind.key}.python") from error

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
                    f"{self.name} did not come up within rollout.{self.kind.key}.start_timeout_s={timeout_s:g}; "
                    f"{self.last_words}"
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
