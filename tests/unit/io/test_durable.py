"""Folders and files that are replaced are whole at every moment, whenever the process is killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from RL2.io import durable

KILLS = 20

REPLACES = """
import sys
from itertools import count
from pathlib import Path
from RL2.io import durable
folder = Path(sys.argv[1])
for n in count():
    durable.write_text(folder / "number", str(n))
    partial = folder / "latest.partial"
    if partial.exists():
        durable.remove(partial)
    partial.mkdir()
    for name in "ab":
        (partial / name).write_text(str(n))
    durable.replace_folder(partial, folder / "latest")
    if n == 1:
        print("begun", flush=True)
"""


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in "ab"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", REPLACES, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        one, other = content(tmp_path / "latest")
        assert one == other
        assert (tmp_path / "number").read_text().isdigit()


@pytest.mark.slow
def test_no_moment_is_without_the_folder(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", REPLACES, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    limit = time.monotonic() + 1
    while time.monotonic() < limit:
        assert (tmp_path / "latest").is_dir()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_where_names_can_be_swapped_and_where_not(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    target = tmp_path / "latest"
    for n in ("1", "2"):
        new = tmp_path / "latest.partial"
        new.mkdir()
        for name in "ab":
            (new / name).write_text(n)
        durable.replace_folder(new, target)
        assert content(target) == [n, n]
        assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_the_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "latest"
    (tmp_path / "latest.old").mkdir()
    durable.recover(target)
    assert target.is_dir()
    assert not (tmp_path / "latest.old").exists()
    durable.recover(target)
    assert target.is_dir()
