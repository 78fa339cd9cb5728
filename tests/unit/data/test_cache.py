"""Tables of data on the disk: equal to what is read anew, made once, and made again when they are damaged."""

from __future__ import annotations

import copy
import datetime
import fcntl
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data import cache
from RL2.data.bad_rows import PIECE, BadRows
from RL2.data.preference import load_pairs
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import with_columns
from RL2.data.table import Writer
from RL2.io.progress import Phase, Progress
from RL2.rollout.environment import load_example

PAD = "x" * 36_000
"""Of a column that nothing reads, so that a few rows are many bytes."""
NUMBER = 120
Loader = Callable[..., tuple[list[Any], list[str], dict[str, Any]]]


def rows(seed: int = 0) -> list[Any]:
    """Rows of every kind: raw and chat, with what JSON can hold beside them, and two that cannot be used."""
    draw = random.Random(seed)
    made: list[Any] = []
    for n in range(NUMBER):
        question, answer = f"{draw.randrange(99)}+{draw.randrange(99)}=", f"{draw.randrange(99)} é"
        row: dict[str, Any] = {"extra_info": {"answer": n, "x": [0.1, None, {"é": "\ud800"}]}, "pad": PAD}
        if n % 2:
            row |= {"prompt": question, "response": answer, "chosen": answer, "rejected": "no"}
        else:
            row |= {"messages": [{"role": "user", "content": question}], "chosen": answer, "rejected": "no"}
            row |= {"response": answer}
        made.append(row)
    return [*made[:50], {"pad": PAD}, *made[50:], {"prompt": " ", "pad": PAD}]


def write(folder: Path, made: list[Any]) -> str:
    (file := folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    assert file.stat().st_size > cache.FROM_BYTES
    return str(file)


def prompts(path: str, tokenizer: PreTrainedTokenizerBase, example: Any = None, progress: Any = None) -> Any:
    bad = BadRows(path, skip=True)
    return list(load_prompts(path, tokenizer, example, 100, bad, progress)), bad.notes(None), bad.state()


def examples(path: str, tokenizer: PreTrainedTokenizerBase, example: Any = None, progress: Any = None) -> Any:
    bad, notes = BadRows(path, skip=True), list[str]()
    found, left_out = load_examples(path, tokenizer, example, 20, "all", notes, bad, progress)
    return [list(found), left_out], [*notes, *bad.notes(None)], bad.state()


def pairs(path: str, tokenizer: PreTrainedTokenizerBase, example: Any = None, progress: Any = None) -> Any:
    bad, notes = BadRows(path, skip=True), list[str]()
    found, left_out = load_pairs(path, tokenizer, example, 20, notes, bad, progress)
    return [list(found), left_out], [*notes, *bad.notes(None)], bad.state()


LOADERS: dict[str, Loader] = {"prompts": prompts, "examples": examples, "pairs": pairs}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Heard(Progress):
    """Keeps what is said, and what is done."""

    def __init__(self) -> None:
        super().__init__(speaks=False)
        self.said: list[str] = []
        self.done: list[str] = []

    def say(self, *lines: str) -> None:
        self.said += lines

    @contextmanager
    def phase(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Phase]:
        self.done.append(what.split()[0])
        with super().phase(what, total, unit) as phase:
            yield phase


def tables(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir())


@pytest.mark.parametrize("kind", LOADERS)
def test_a_table_says_what_the_rows_say(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    path, load, (first, again) = write(tmp_path, rows()), LOADERS[kind], (Heard(), Heard())
    made = load(path, tokenizer, progress=first)
    assert load(path, tokenizer, progress=again) == made
    assert "reading" in first.done
    assert again.done == ["checking"], "nothing is tokenised again"
    assert len(tables(folder)) == 1
    Path(path).write_text("".join(json.dumps({**row, "pad": ""}) + "\n" for row in rows()))
    assert load(path, tokenizer) == made, "in memory, as the data are small"
    assert len(tables(folder)) == 1
    assert made[2]["total"] == NUMBER + 2
    assert len(made[2]["found"]) == 2


SCRIPT = """
import json
import re

from .helper import PREFIX


def prefixed(text):
    return PREFIX + re.sub("a", "b", text)


def example(row):
    if row.get("prompt") is not None:
        return {**row, "prompt": prefixed(row["prompt"])}
    return row


async def step(state, action, extra_info):
    return json.loads(open("other").read())
"""


def test_whatever_the_rows_depend_on_gives_another_table(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    path = write(tmp_path, rows())
    (helper := tmp_path / "helper.py").write_text("PREFIX = 'q'\n")
    (script := tmp_path / "script.py").write_text(SCRIPT)
    other = copy.deepcopy(tokenizer)
    other.chat_template = str(tokenizer.chat_template).replace("assistant", "helper")
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["+"])

    def longer() -> None:
        load_prompts(path, tokenizer, None, 99, BadRows(path, skip=True))

    def rewritten() -> None:
        helper.write_text("PREFIX = 'r'\n")
        prompts(path, tokenizer, load_example(script))

    def data() -> None:
        write(tmp_path, rows(seed=1))
        prompts(path, tokenizer)

    changes: list[Callable[[], Any]] = [
        lambda: prompts(path, tokenizer),
        lambda: examples(path, tokenizer),
        longer,
        lambda: prompts(path, other),
        lambda: prompts(path, added),
        lambda: prompts(path, tokenizer, load_example(script)),
        rewritten,
        lambda: prompts(path, tokenizer, with_columns({"prompt": "response"}, None)),
        lambda: prompts(path, tokenizer, with_columns({"messages": None}, None)),
        data,
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert len(tables(folder)) == number


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the time zone of the process."""

    def zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield zone
    monkeypatch.undo()
    time.tzset()


def test_a_template_that_writes_the_date_writes_the_present_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, zone: Callable[[str], None]
) -> None:
    """In the two time zones it is never the same day."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + str(tokenizer.chat_template)
    path = write(tmp_path, rows())
    for number, name in enumerate(("EAST-14", "WEST+12"), 1):
        zone(name)
        for _ in range(2):
            chat = prompts(path, dated)[0][0]
            assert chat.text.startswith(datetime.date.today().isoformat())
        assert len(tables(folder)) == number


@pytest.mark.parametrize(
    "body",
    [
        "import random\ndef example(row):\n    return {**row, 'x': random.random()}",
        "import os\ndef example(row):\n    return os.environ and row",
        "def example(row):\n    return open(__file__) and row",
        "from pathlib import Path\nGIVEN = Path('x').exists()\ndef example(row):\n    return GIVEN or row",
        "def inner(row):\n    import time\n    return time.time() and row\ndef example(row):\n    return inner(row)",
        "SEEN = 0\ndef example(row):\n    global SEEN\n    SEEN += 1\n    return row",
        "try:\n    import math as m\nexcept ImportError:\n    m = None\ndef example(row):\n    return m and row",
        "import numpy\ndef example(row):\n    return numpy.random.rand() and row",
        "from .other import change\ndef example(row):\n    return change(row)",
        "class Reader:\n    def __call__(self, row):\n        return row\nexample = Reader()",
        "def outer(k):\n    def example(row):\n        return k and row\n    return example\nexample = outer(1)",
        "A = {}\nfor line in open(__file__):\n    A[line] = 1\ndef example(row):\n    return A and row",
        "A = []\nwith open(__file__) as file:\n    A.extend(file)\ndef example(row):\n    return A and row",
        "A = {}\nA.update(x=open(__file__).read())\ndef example(row):\n    return A and row",
        "A = {}\nA['x'] = open(__file__).read()\ndef example(row):\n    return A and row",
        "def example(row):\n    return example.given and row\nexample.given = open(__file__).read()",
        "def fill():\n    A[0] = open(__file__).read()\nA = {}\nfill()\ndef example(row):\n    return A and row",
        "def fill():\n    global A\n    A = id(fill)\nA = 1\nX = fill()\ndef example(row):\n    return A and row",
    ],
)
def test_a_script_that_may_depend_on_more_has_no_table(
    body: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    (tmp_path / "other.py").write_text("import os\ndef change(row):\n    return os.environ and row\n")
    (script := tmp_path / "script.py").write_text(body)
    assert len(prompts(write(tmp_path, rows()), tokenizer, load_example(script))[0]) == NUMBER
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_table_is_made_again(
    damage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    path = write(tmp_path, rows())
    made = prompts(path, tokenizer)
    for name in sorted(file.name for file in tables(folder)[0].iterdir()):
        file = tables(folder)[0] / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "flip":
            file.write_bytes(data)
        else:
            file.unlink()
        heard = Heard()
        assert prompts(path, tokenizer, progress=heard) == made
        assert "reading" in heard.done
        assert len(heard.said) == 1
        assert f"{file.parent} is damaged" in heard.said[0]


def test_a_folder_that_cannot_be_written_leaves_the_rows_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = write(tmp_path, rows()), prompts(write(tmp_path, rows()), tokenizer)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "below", Path("/dev/full")):
        monkeypatch.setenv(cache.FOLDER, str(place))
        heard = Heard()
        assert prompts(path, tokenizer, progress=heard) == made
        assert len(heard.said) == 1
        assert heard.said[0].startswith(f"{path}: kept in memory, because its table cannot be written to disk: ")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    path, heard = write(tmp_path, rows()), Heard()
    made = prompts(path, tokenizer, progress=heard)
    tables(folder)[0].rename(tmp_path / "aside")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        assert prompts(path, tokenizer, progress=heard) == made
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert len(heard.said) == 1
    assert "File too large" in heard.said[0]
    assert tables(folder) == []


def test_values_that_no_json_holds_stay_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    value = {"bytes": b"1", "when": datetime.datetime(2026, 1, 1), "none": None}
    made = [{"prompt": "1+1=", "extra_info": value, "pad": PAD}] * NUMBER
    datasets.Dataset.from_list(made).to_parquet(str(file := tmp_path / "rows.parquet"))
    found, _, _ = prompts(str(file), tokenizer)
    assert [prompt.extra_info for prompt in found] == [value] * NUMBER


def test_rows_of_datasets_have_a_table_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": f"{n}=", "pad": f"{n}{PAD}"} for n in range(NUMBER)])
    data.save_to_disk(str(tmp_path / "saved"))
    data.select([3, 1, 2]).save_to_disk(str(tmp_path / "chosen"))
    heard = Heard()
    made = prompts(str(tmp_path / "saved"), tokenizer)
    assert prompts(str(tmp_path / "saved"), tokenizer, progress=heard) == made
    assert (len(made[0]), heard.done) == (NUMBER, ["checking"])
    assert [prompt.text for prompt in prompts(str(tmp_path / "chosen"), tokenizer)[0]] == ["3=", "1=", "2="]


def test_a_row_takes_little_more_than_its_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bytes beyond the text, in memory: 1 kB a row is the bound, with 60 tokens in each."""
    text = "Tom has 12 apples and buys 30 more. " * 3
    made = [{"messages": [{"role": "user", "content": f"{n} {text}"}], "response": text} for n in range(500)]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    found = [load_prompts(str(file), tokenizer, None, 500), load_examples(str(file), tokenizer, None, 500)[0]]
    for table in (each.table for each in found):
        assert len(table.columns["ids"].values) >= 60 * len(made)
        arrays = [array for column in table.columns.values() for array in (column.values, column.starts)]
        texts = table.columns["text"].values.nbytes if "text" in table.columns else 0
        assert (sum(array.nbytes for array in arrays) - texts) / len(made) < 1000


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow", "saved"])
def test_rows_are_in_memory_in_pieces(suffix: str, tmp_path: Path) -> None:
    made = [{"prompt": f"{n} {'long ' * 50}"} for n in range(2 * PIECE + 1)]
    path, data = str(tmp_path / f"rows.{suffix}"), datasets.Dataset.from_list(made)
    if suffix == "arrow":
        data.save_to_disk(str(tmp_path / "saved"))
        path = str(next((tmp_path / "saved").glob("*.arrow")))
    elif suffix == "json":
        Path(path).write_text(json.dumps(made))
    else:
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet, "saved": data.save_to_disk}[suffix](
            path
        )
    shares, rows = list[float](), list[Any]()
    for piece in BadRows(path).pieces(None, shares.append):
        assert len(piece) <= PIECE
        rows += piece.values()
    assert rows == made
    assert [round(share, 1) for share in shares] == [0.5, 1.0]


def build(path: str, root: str, tokenizer: PreTrainedTokenizerBase, numbers: Any) -> None:
    os.environ[cache.FOLDER] = root
    heard = Heard()
    found = prompts(path, tokenizer, progress=heard)
    numbers.put((len(found[0]), "reading" in heard.done, heard.said))


@pytest.mark.slow
def test_of_several_processes_one_makes_the_table(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    path, context = write(tmp_path, rows()), multiprocessing.get_context("fork")
    numbers = context.Queue()
    workers = [context.Process(target=build, args=(path, str(folder), tokenizer, numbers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [numbers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert [number for number, _, _ in found] == [NUMBER] * 4
    assert sum(was_read for _, was_read, _ in found) == 1
    assert all(not said for _, _, said in found)


def test_a_table_that_another_machine_has_made_meanwhile_is_taken(tmp_path: Path, folder: Path) -> None:
    """Where locks do not reach, as on some network file systems, two make the same table."""
    bad, name = BadRows(write(tmp_path, rows())), "f" * 32

    def build(writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
        if not (folder / name).exists():
            (folder / name).mkdir()
            theirs = Writer(("row",), folder / name)
            theirs.add(row=[[1], [2]])
            theirs.finish({"bad": {}})
        writer.add(row=[[1], [2]])
        return {}

    heard = Heard()
    assert len(cache.table(bad, name, ("row",), build, heard)) == 2
    assert heard.said == []
    assert [place.name for place in tables(folder)] == [name]


def test_waiting_for_another_process_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    path, bad = write(tmp_path, rows()), BadRows(str(tmp_path / "rows.jsonl"), skip=True)
    folder.mkdir()
    heard, name = Heard(), "f" * 32
    with (folder / f"{name}.lock").open("a+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        found = cache.table(bad, name, ("row",), lambda writer, tell: writer.add(row=[[1]]) or {}, heard, wait_s=0.3)
    assert len(found) == 1
    assert heard.said == [
        f"{path}: kept in memory, because its table cannot be written to disk: "
        "another process has been writing it for 0.3 s"
    ]


def test_tables_have_a_bound(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 30_000)
    path = write(tmp_path, rows())
    for longest in range(90, 96):
        load_prompts(path, tokenizer, None, longest, BadRows(path, skip=True))
        os.utime(newest := max(tables(folder), key=lambda place: place.stat().st_mtime_ns), (longest, longest))
        size = sum(file.stat().st_size for file in newest.iterdir())
    assert 1 <= len(tables(folder)) <= max(1, 30_000 // size)
    assert newest in tables(folder)
