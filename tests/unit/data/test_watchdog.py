"""A time limit for code: one thread for all that is watched, and none when nothing is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data.prompts import load_prompts
from RL2.data.template import Template
from RL2.data.watchdog import Watchdog


def threads_beside(earlier: list[threading.Thread]) -> list[threading.Thread]:
    """Return the threads that run now and did not before: those of other tests may end at any time."""
    return [thread for thread in threading.enumerate() if thread not in earlier]


def loop_for(watchdog: Watchdog, seconds: float) -> str:
    end = time.monotonic() + seconds
    try:
        with watchdog.watching():
            while time.monotonic() < end:
                pass
    except TimeoutError as error:
        return str(error)
    return "done"


def test_any_number_of_pieces_has_one_thread_which_ends() -> None:
    watchdog, most, earlier = Watchdog(0.2, ""), 0, threading.enumerate()
    for _ in range(2000):
        with watchdog.watching():
            most = max(most, len(threads_beside(earlier)))
    assert most == 1
    end = time.monotonic() + 10
    while threads_beside(earlier) and time.monotonic() < end:
        time.sleep(0.01)
    assert threads_beside(earlier) == []
    assert loop_for(watchdog, 30) == "it takes longer than 0.2 s", "it begins again when it is needed"


def test_what_takes_too_long_is_interrupted_in_its_own_thread() -> None:
    watchdog = Watchdog(0.3, "")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seconds: loop_for(watchdog, seconds), [30, 0, 30, 0.01]))
    assert found == ["it takes longer than 0.3 s", "done"] * 2


def test_an_error_of_the_code_is_its_own() -> None:
    watchdog = Watchdog(10, "")
    with pytest.raises(KeyError), watchdog.watching():
        raise KeyError
    assert loop_for(watchdog, 0) == "done"


UNSTOPPABLE = """
import sys, time
from RL2.data.watchdog import Watchdog
watchdog = Watchdog(0.3, "these words")
for _ in range(3):
    with watchdog.watching():
        time.sleep(0.2)
print("begins", flush=True)
with watchdog.watching():
    {code}
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", ["pow(7, 10**9)", "'a' * (6 << 30)"])
def test_what_cannot_be_interrupted_ends_with_the_process(code: str) -> None:
    """C code that holds the interpreter, for long or for much memory; the last words are all that is printed."""
    command = [sys.executable, "-c", UNSTOPPABLE.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "begins\n", "these words\n")


def watchers() -> set[str]:
    """Return the processes that watch this one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and b"last_resort.py" in (process / "cmdline").read_bytes():
                found.add(process.name)
    return found


def test_one_process_watches_all_that_uses_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "one"}\n')
    earlier, seen = watchers(), set[str]()

    def example(row: dict[str, str]) -> dict[str, object]:
        seen.update(watchers() - earlier)
        return {"messages": [{"role": "user", "content": row["q"]}]}

    template = Template(tokenizer)
    for _ in range(2):
        load_prompts(str(tmp_path / "rows.jsonl"), tokenizer, example, 100, template=template)
    assert len(seen) == 1
