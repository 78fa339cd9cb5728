"""One run at a time in a folder, whoever dies when, on this machine or another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from RL2.errors import ConfigError, UserError
from RL2.io.run_lock import RunLock, refuse_if_running

HOLDS = """
import sys, time
from pathlib import Path
from RL2.errors import ConfigError
from RL2.io.run_lock import RunLock
try:
    RunLock(Path(sys.argv[1])).acquire()
    print("runs", flush=True)
    time.sleep(60)
except ConfigError as error:
    print(error, flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def owner(folder: Path) -> dict[str, Any]:
    return json.loads(max((folder / "lock").glob("*.json")).read_text())


@pytest.mark.slow
def test_of_many_starts_at_once_one_runs_and_a_dead_owner_is_succeeded(tmp_path: Path) -> None:
    for _ in range(3):  # the second and third time there is the lock of a process that was killed
        starts = [start(tmp_path) for _ in range(4)]
        words = [said(process) for process in starts]
        assert Counter(word == "runs" for word in words) == {True: 1, False: 3}, words
        winner = starts[words.index("runs")]
        assert all(f"is in use by the run of process {winner.pid} on " in word for word in words if word != "runs")
        assert owner(tmp_path)["pid"] == winner.pid
        for process in starts:
            end(process)


@pytest.mark.slow
def test_a_process_that_stands_still_is_not_dead(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert said(process) == "runs"
    process.send_signal(signal.SIGSTOP)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"is in use by the run of process {process.pid}"):
        RunLock(tmp_path).acquire()
    with pytest.raises(ConfigError, match="is in use"):
        refuse_if_running(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before, "who is refused writes nothing"
    end(process)
    refuse_if_running(tmp_path)
    RunLock(tmp_path).acquire()


def test_a_lock_that_was_let_go_is_free(tmp_path: Path) -> None:
    for _ in range(3):
        lock = RunLock(tmp_path)
        lock.acquire()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
            RunLock(tmp_path).acquire()
        lock.refuse_if_lost()
        lock.release()
        refuse_if_running(tmp_path)
    assert len(list((tmp_path / "lock").iterdir())) == 1


def test_a_number_that_came_back_is_another_process(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (file,) = (tmp_path / "lock").iterdir()
    file.write_text(json.dumps(owner(tmp_path) | {"started": "1"}))
    other = RunLock(tmp_path)
    other.acquire()
    with pytest.raises(UserError, match="no longer belongs to this run"):
        lock.refuse_if_lost()
    lock.release()
    other.refuse_if_lost()
    other.release()


def elsewhere(folder: Path) -> Path:
    """The lock of a process on another machine."""
    (folder / "lock").mkdir()
    file = folder / "lock" / "000007.json"
    file.write_text(json.dumps({"host": "far", "pid": 1, "machine": "another", "started": "1", "ended": False}))
    return file


def test_another_machine_is_alive_while_it_touches_its_lock(tmp_path: Path) -> None:
    file, done, lines = elsewhere(tmp_path), threading.Event(), list[str]()

    def beat() -> None:
        while not done.wait(0.02):
            os.utime(file)

    beats = threading.Thread(target=beat)
    beats.start()
    with pytest.raises(ConfigError, match="is in use by the run of process 1 on far"):
        RunLock(tmp_path, heartbeat_s=0.1, stale_s=30).acquire(lines.append)
    done.set()
    beats.join()
    with pytest.raises(ConfigError, match="is in use"):
        refuse_if_running(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_another_machine_without_a_sign_of_life_is_succeeded(content: str | None, tmp_path: Path) -> None:
    file, lines = elsewhere(tmp_path), list[str]()
    if content is not None:  # nobody knows whose it is
        file.write_text(content)
    os.utime(file, (time.time() + 1000,) * 2)  # however busy the machine is, it has been touched just now
    lock = RunLock(tmp_path, heartbeat_s=0.1, stale_s=0.3)
    began = time.monotonic()
    lock.acquire(lines.append)
    assert 0.2 < time.monotonic() - began < 10
    (line,) = lines
    assert "waiting for a sign of life" in line
    lock.release()

    os.utime(max((tmp_path / "lock").iterdir()), (1, 1))
    RunLock(tmp_path).acquire()


def test_one_that_has_long_been_still_is_succeeded_at_once(tmp_path: Path) -> None:
    file = elsewhere(tmp_path)
    os.utime(file, (1, 1))
    RunLock(tmp_path).acquire(pytest.fail)


def test_an_owner_gives_signs_of_life(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, heartbeat_s=0.01)
    lock.acquire()
    (file,) = (tmp_path / "lock").iterdir()
    os.utime(file, (1, 1))
    limit = time.monotonic() + 30
    while file.stat().st_mtime == 1:
        assert time.monotonic() < limit
        time.sleep(0.005)
    lock.release()


def test_a_folder_that_was_removed_is_lost(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    for file in (tmp_path / "run" / "lock").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="it was removed, or another run"):
        lock.refuse_if_lost()
    lock.release()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trainer.save_dir=.*/file/run cannot be written: "):
        RunLock(tmp_path / "file" / "run").acquire()
