"""One server process of this machine."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from RL2.config.secrets import is_secret
from RL2.engines.served.server_spec import ServerSpec
from RL2.errors import UserError

POLL_S = 0.2
TERM_S = 10
"""Seconds from SIGTERM to SIGKILL."""
SHOWN_BYTES = 3000
"""Bytes of the end of a log that error messages show."""


class EngineFailed(UserError, RuntimeError):
    """A server that does not start, does not answer, or computes with other weights than the trainer."""


def free_port(taken: Container[int] = ()) -> int:
    """Return a free loopback port below those that systems give to outgoing connections, and none of `taken`.

    A server takes seconds until it listens, and until then one of those ports could be given away.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        if port in taken:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineFailed("no port between 10000 and 32000 is free for a server")


class Server:
    """A server process on a loopback port, which it keeps when it restarts."""

    def __init__(
        self,
        spec: ServerSpec,
        python: str,
        arguments: Sequence[str],
        environment: Mapping[str, object],
        token: str,
        *,
        name: str,
        log: Path,
        folder: Path,
        port: int,
    ) -> None:
        """Prepare the command line; `start` runs it.

        `python` is the interpreter of the server's environment, `token` the one that clients have to send, `name` is
        for error messages. `folder` is for temporary files; it is created.
        """
        self.spec, self.name, self.log, self.folder = spec, name, log, folder
        self.client = spec.client(f"http://127.0.0.1:{port}", token)
        self.command = [python, str(spec.launcher), "--host", "127.0.0.1", "--port", str(port), *arguments]
        given = {key: str(value) for key, value in environment.items()}
        self.environment = {**spec.environment, **given, spec.token_variable: token}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process in a session of its own, so that one signal reaches all its children."""
        self.folder.mkdir(exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith((self.spec.prefix, *NOT_INHERITED))}
        # no secrets of other services; those of the hub stay, because the server may have to download a model
        inherited = {k: v for k, v in inherited.items() if not is_secret(k) or k.startswith(("HF_", "HUGGING_FACE_"))}
        environment = {
            **self.environment,
            "TMPDIR": str(self.folder),
            "RL2_PARENT": str(os.getpid()),
        }
        if self.spec.import_path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, self.spec.import_path))
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
            raise EngineFailed(f"{self.name} cannot be started: {error}; see rollout.{self.spec.key}.python") from error

    @property
    def is_running(self) -> bool:
        """True if the process has started and not ended."""
        return self.process is not None and self.process.poll() is None

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Raise `EngineFailed` if the server ends, or is not healthy within `timeout_s`."""
        limit = time.monotonic() + timeout_s
        while not self.client.is_healthy(timeout_s=5):
            if not self.is_running:
                raise EngineFailed(f"{self.name} ended while it started; {self.last_words}")
            if time.monotonic() > limit:
                raise EngineFailed(
                    f"{self.name} did not start within rollout.{self.spec.key}.start_timeout_s={timeout_s:g}; "
                    f"{self.last_words}"
                )
            time.sleep(POLL_S)

    @property
    def last_words(self) -> str:
        """The end of the log, for error messages."""
        end = self.log.read_bytes()[-SHOWN_BYTES:].decode(errors="replace") if self.log.exists() else ""
        return f"the end of {self.log}:\n{end}"

    def stop(self) -> None:
        """End the whole process group, with SIGTERM first; may be called at any time, and again."""
        if self.process is not None:
            for end, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
                with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                    os.killpg(self.process.pid, end)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(wait_s)
        shutil.rmtree(self.folder, ignore_errors=True)


NOT_INHERITED = (
    "PYTHON",  # the trainer's import path
    "LD_PRELOAD",
    "RANK",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
)
"""Prefixes of environment variables that would make the server take itself for a rank of the trainer."""
