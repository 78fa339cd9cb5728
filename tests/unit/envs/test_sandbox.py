"""Programs of a hostile coder: they do nothing outside their process, and end within the limit."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from sandbox_programs import FORGERIES, HONEST, HOSTILE, HOSTILE_ACTS, PRELUDE, SUBCLASSES, VALUES, WORK

from envs.sandbox import CHILD, Programs, Refused
from envs.workers import WorkerError

pytestmark = pytest.mark.slow

MEMORY = 256 << 20
SECRET = "rl2-secret-b6f1"


@dataclass
class Outside:
    """What programs may not reach."""

    folder: Path
    server: socket.socket
    by_path: socket.socket
    abstract: socket.socket
    sleeper: subprocess.Popen[bytes]
    contacts: list[str] = field(default_factory=list)

    def words(self) -> dict[str, Any]:
        words = {"folder": self.folder, "file": self.folder / "canary", "port": self.server.getsockname()[1]}
        return words | {"pid": os.getpid(), "sleeper": self.sleeper.pid, "half": SECRET[:10]}

    def listen(self, name: str, listener: socket.socket) -> None:
        while True:
            try:
                listener.accept()[0].close() if listener.type == socket.SOCK_STREAM else listener.recv(1)
            except OSError:
                return
            self.contacts.append(name)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "canary").write_text(SECRET)
    (folder / "canary").chmod(0o666)  # rights of files are not what protects it
    folder.chmod(0o777)
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    abstract.bind(f"\0rl2-canary-{os.getpid()}")
    by_path = socket.socket(socket.AF_UNIX)
    by_path.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    by_path.listen()
    found = Outside(
        folder, socket.create_server(("127.0.0.1", 0)), by_path, abstract, subprocess.Popen(["sleep", "600"])
    )
    for name in ("server", "by_path", "abstract"):
        threading.Thread(target=found.listen, args=(name, getattr(found, name)), daemon=True).start()
    yield found
    found.sleeper.kill()
    found.sleeper.wait()
    for listener in (found.server, by_path, abstract):
        listener.close()


MODES = ["namespaces", "landlock", "namespaces of an ordinary user", "landlock of an ordinary user"]


def make(name: str, folder: Path) -> Programs:
    """Return processes of that mode, or skip the test where this machine does not have it."""
    mode, _, ordinary = name.partition(" ")
    programs = Programs(1, MEMORY, mode, number=2)
    if ordinary:
        if os.geteuid() != 0 or not shutil.which("setpriv") or not Path("/usr/bin/python3").exists():
            pytest.skip("the tests do not run as root, who could become another user")
        for path in CHILD.parent.glob("*.py"):
            shutil.copy(path, folder)
        for path in [folder, *folder.parents]:
            if path.stat().st_uid == os.geteuid() and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o755)
        rest = [str(folder / CHILD.name) if word == str(CHILD) else word for word in programs.command[2:]]
        user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
        programs.command = [*user, "/usr/bin/python3", "-S", *rest]
    try:
        programs.check()
    except Refused as error:
        pytest.skip(f"this machine has no {name}: {error}")
    return programs


def is_of_a_program(process: psutil.Process) -> bool:
    try:
        return process.uids().real >= 1_000_000_000
    except psutil.Error:
        return False


@dataclass
class Seen:
    said: dict[str, Any]
    took_s: float


@pytest.fixture(scope="module", params=MODES)
def held(request: pytest.FixtureRequest, outside: Outside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Every hostile program, run two at a time: what was said of each."""
    os.environ[SECRET] = SECRET
    programs = make(request.param, tmp_path_factory.mktemp("envs"))
    seen: dict[str, Seen] = {}

    async def one(name: str, code: str) -> None:
        start = time.monotonic()
        try:
            said = await programs.run(PRELUDE + code.format(**outside.words()), "")
        except WorkerError as error:
            said = {"unscored": str(error)}
        seen[name] = Seen(said, time.monotonic() - start)

    async def all_of_them() -> None:
        chosen = HOSTILE if request.param == MODES[0] else HOSTILE_ACTS
        await asyncio.gather(*(one(name, code) for name, code in chosen.items()))

    before = psutil.Process().memory_info().rss
    asyncio.run(all_of_them())
    grown = psutil.Process().memory_info().rss - before
    left = [child for worker in programs._idle for child in psutil.Process(worker.pid).children(recursive=True)]
    left += [process for process in psutil.process_iter() if is_of_a_program(process)]
    left = psutil.wait_procs(set(left), timeout=30)[1]  # supervisors end just behind their answer
    yield request.param, seen, grown, left
    programs.close()
    del os.environ[SECRET]


def test_nothing_is_touched(held: Any, outside: Outside) -> None:
    _, seen, grown, left = held
    assert {name: said.said for name, said in seen.items() if "unscored" in said.said} == {}
    assert {name: said.said["output"][:200] for name, said in seen.items() if "escaped" in said.said["output"]} == {}
    assert not [name for name, said in seen.items() if SECRET in said.said["output"]]
    assert sorted(path.name for path in outside.folder.iterdir()) == ["canary", "socket"]
    canary = outside.folder / "canary"
    assert (canary.read_text(), canary.stat().st_mode & 0o777) == (SECRET, 0o666)
    assert outside.contacts == []
    assert outside.sleeper.poll() is None
    assert left == []
    assert grown < 64 << 20
    assert len(HOSTILE) >= 50


def test_all_end_within_the_limit(held: Any) -> None:
    """Those that only work on and on are run once: their limits are the same in every mode."""
    mode, seen, _, _ = held
    if mode != MODES[0]:
        return
    said = {name: seen[name].said["why"] for name in WORK}
    assert [name for name, why in said.items() if why is None] == []
    for name in ("spin against signals", "a bad regular expression"):
        assert said[name] == "the program took more than 1 s of processor time"
    for name in ("sleep", "wait for input"):
        assert said[name] == "the program waited for more than 2 s"
    assert said["output without Python"] == "the program printed more than 1 MiB"
    assert said["a crash"] == "the program was ended by SIGSEGV"


TESTS = {"optional": "", "before": "", "setup": "", "names": ["f"], "stop": False}
SQUARES = TESTS | {"tests": ["a, b, c = f(2), f(2), f(2)\nassert a == 4, a", "assert f(3) == 9, f(3)"]}


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    found = Programs(1, MEMORY, number=2)
    try:
        found.check()
    except Refused as error:
        pytest.skip(str(error))
    yield found
    found.close()


def test_no_verdict_is_forged_and_none_avoided(programs: Programs) -> None:
    async def all_of_them() -> list[Any]:
        asked = [programs.test([code], SQUARES) for code in ("def f(x): return x * x", *FORGERIES.values())]
        return await asyncio.gather(*asked, return_exceptions=True)

    right, *said = asyncio.run(all_of_them())
    assert right == {"passed": [True, True], "why": None}
    wrong = dict(zip(FORGERIES, said, strict=True))
    assert {name: str(found) for name, found in wrong.items() if not isinstance(found, dict)} == {}
    assert {name: found for name, found in wrong.items() if sum(found["passed"]) == 2 or not found["why"]} == {}


@pytest.mark.parametrize(("code", "tests"), HONEST)
def test_honest_solutions_pass_as_in_one_process(programs: Programs, code: str, tests: list[str]) -> None:
    for part in tests:
        space: dict[str, Any] = {}
        exec(code, space)  # what the tests mean
        if "Solution" in space:
            space["f"] = space["Solution"]().f
        if "dataclass" not in code:
            exec(part, space)
    assert asyncio.run(programs.test([code], TESTS | {"tests": tests})) == {"passed": [True] * len(tests), "why": None}


def test_plain_values_cross_unchanged(programs: Programs) -> None:
    imports = (
        "from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import date, datetime, timedelta\n"
    )
    tests = [
        f"{imports}v = {values}\nw = f(v)\nassert w == v and list(map(type, w)) == list(map(type, v)) and w is not v"
        for values in VALUES
    ]
    found = asyncio.run(programs.test(["def f(x): return x"], TESTS | {"tests": tests}))
    assert found == {"passed": [True, True], "why": None}


def test_subclasses_arrive_as_what_they_extend(programs: Programs) -> None:
    code, test = SUBCLASSES
    assert asyncio.run(programs.test([code], TESTS | {"tests": [test]}))["passed"] == [True]


def test_an_interpreter_of_ones_own_brings_its_packages(programs: Programs) -> None:
    mine = Programs(5, 1 << 30, programs.mode, sys.executable, number=1)
    code = "import numpy\ndef f(x): return numpy.int64(x), numpy.float32(x), numpy.bool_(x), numpy.ones(2)"
    test = "import numpy\na, b, c, d = f(1)\nassert (a, b, c) == (1, 1.0, True) and type(a) is int and d != [1, 1]"
    try:
        assert asyncio.run(mine.test([code], TESTS | {"tests": [test]})) == {"passed": [True], "why": None}
        assert asyncio.run(programs.test([code], TESTS | {"tests": [test]}))["why"].startswith("ModuleNotFoundError")
    finally:
        mine.close()


def test_packages_in_tmp_are_there_too(programs: Programs) -> None:
    """The private /tmp hides what the machine has there, but not the interpreter's own libraries."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        [packages] = Path(folder).glob("lib/python*/site-packages")
        (packages / "only_here.py").write_text("number = 7")
        mine = Programs(5, 1 << 30, programs.mode, f"{folder}/bin/python", number=1)
        code = "import only_here\ndef f(x): return only_here.number"
        try:
            found = asyncio.run(mine.test([code], TESTS | {"tests": ["assert f(1) == 7"]}))
        finally:
            mine.close()
    assert found == {"passed": [True], "why": None}


@pytest.mark.parametrize(
    ("tests", "cause"),
    [
        ({"tests": ["assert f("]}, "the tests cannot be run: SyntaxError"),
        (
            {"tests": ["1"], "before": "import no_such_library"},
            "the tests cannot be run: ModuleNotFoundError: No module",
        ),
        ({"tests": ["f(lambda: 1)"]}, "the tests cannot be run: a function cannot be handed to the solution"),
    ],
)
def test_tests_that_cannot_be_run_leave_the_program_unscored(
    programs: Programs, tests: dict[str, Any], cause: str
) -> None:
    with pytest.raises(WorkerError, match=cause):
        asyncio.run(programs.test(["def f(x): return x"], TESTS | tests))


def is_locked_down(process: psutil.Process) -> bool:
    try:
        return "\nSeccomp:\t2\n" in Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False


def test_a_program_that_something_else_kills_is_unscored(programs: Programs) -> None:
    async def killed() -> Any:
        asked = asyncio.ensure_future(programs.run("import time\ntime.sleep(9)", ""))
        while not (found := [p for p in psutil.Process().children(recursive=True) if is_locked_down(p)]):
            await asyncio.sleep(0.01)
        found[0].kill()
        return await asked

    with pytest.raises(WorkerError, match="the program was ended by SIGKILL"):
        asyncio.run(killed())


def test_a_program_that_gets_no_processor_is_unscored_and_not_wrong(tmp_path: Path) -> None:
    """A wall-clock limit below that of processor time is to the program what a busy machine is."""
    for path in CHILD.parent.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text().replace("\nWALL = 20\n", "\nWALL = 0.3\n"))
    busy = Programs(1, MEMORY, number=1)
    busy.command = [str(tmp_path / CHILD.name) if word == str(CHILD) else word for word in busy.command]
    try:
        with pytest.raises(WorkerError, match=r"the program had no processor for most of 0\.3 s"):
            asyncio.run(busy.run("while True: pass", ""))
    finally:
        busy.close()


def test_without_namespaces_programs_are_held_by_landlock() -> None:
    """A user namespace that allows no further one stands for a container."""
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("this machine has no util-linux")
    inside = Programs(1, MEMORY, number=1)
    shut = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    inside.command = ["unshare", "-Ur", "sh", "-c", shut, "sh", *inside.command]
    try:
        assert inside.check() == "landlock"
    except ValueError as error:
        if "a program here" in str(error):  # it can do what it must not
            raise
        pytest.skip(f"this machine has no Landlock, or no user namespaces: {error}")
    finally:
        inside.close()


def test_processes_end_with_their_parent() -> None:
    script = (
        "import asyncio, sys\nfrom envs.sandbox import Programs\nprograms = Programs(5, 1 << 28, number=1)\n"
        "programs.check()\nprint(programs._idle[0].pid, flush=True)\n"
        "asyncio.run(programs.run('import time; time.sleep(5)', ''))"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHILD.parents[1]) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        while len(inside := server.children(recursive=True)) < 2:
            time.sleep(0.01)
        parent.kill()
        server.kill()
    assert psutil.wait_procs([server, *inside], timeout=30)[1] == []
