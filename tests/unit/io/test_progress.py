"""What a run says while it works: lines, and a sign of life in every silence."""

from __future__ import annotations

import io
import re
import time

import pytest

from RL2.io.progress import Phase, Progress, duration

LIFE = re.compile(r"\d\d:\d\d:\d\d  (.*)")


def lives(output: str) -> list[str]:
    """Signs of life, without the time of day."""
    return [found[1] for line in output.splitlines() if (found := LIFE.fullmatch(line))]


def wait_for_life(capsys: pytest.CaptureFixture[str], number: int = 1) -> list[str]:
    found, end = list[str](), time.monotonic() + 20
    while len(found) < number and time.monotonic() < end:
        time.sleep(0.01)
        found += lives(capsys.readouterr().out)
    return found


def test_long_work_gives_a_sign_of_life_with_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(interval_s=0.05)
    with progress.phase("rollout", 8, "responses") as phase:
        phase.update(2)
        assert wait_for_life(capsys, 2)[1].startswith("rollout: 2 of 8 responses (25%), 0:00 so far, about 0:0")
    with progress.phase("reading", 1) as phase:
        phase.to(0.5)
        assert wait_for_life(capsys)[0].startswith("reading: 50%, 0:00 so far, about 0:0")
    with progress.phase("loading"):
        assert wait_for_life(capsys)[0] == "loading: 0:00 so far"
        with progress.phase("reading a file"):
            assert "reading a file: 0:00 so far" in wait_for_life(capsys, 2)
        assert "loading: 0:00 so far" in wait_for_life(capsys, 2)
    time.sleep(0.2)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().out == "", "nothing goes on"


def test_work_in_many_short_pieces_is_no_silence(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(interval_s=8)
    progress._last -= 8  # pieces of work before it, each shorter than the interval
    with progress.phase("short"):
        assert re.fullmatch("short: 0:0[0-6] so far", wait_for_life(capsys)[0])


def test_where_enough_is_said_there_is_no_sign_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    progress, end = Progress(interval_s=5), time.monotonic() + 0.3
    with progress.phase("rollout", 8, "responses"):
        while time.monotonic() < end:
            progress.say("step")
            time.sleep(0.01)
    assert set(capsys.readouterr().out.splitlines()) == {"step"}


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(speaks=False, interval_s=0.01)
    with progress.phase("rollout", 8, "responses") as phase:
        phase.update(1)
        progress.say("hello")
        time.sleep(0.2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_thread_ends_when_nothing_goes_on() -> None:
    progress = Progress(interval_s=0.05)
    for _ in range(3):
        with progress.phase("short"):
            pass
    (thread,) = {progress._thread}
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
    with progress.phase("another"):
        assert progress._thread is not thread


def test_a_phase_that_fails_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(interval_s=0.05)
    with progress.phase("outer"):
        with pytest.raises(KeyError), progress.phase("inner"):
            raise KeyError
        assert wait_for_life(capsys) == ["outer: 0:00 so far"]


def test_a_bar_on_a_terminal_takes_the_place_of_signs_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(interval_s=0.02)
    with progress.phase("rollout", 8, "responses") as phase:
        phase.update(2)
        time.sleep(0.2)
    assert "\rrollout:" in terminal.getvalue()
    assert lives(capsys.readouterr().out) == []
    with progress.phase("loading"):  # nothing moves in a bar
        assert wait_for_life(capsys) == ["loading: 0:00 so far"]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_durations_are_read_at_a_glance(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_is_left_is_told_from_what_is_done() -> None:
    with Progress(speaks=False).phase("update", 40, "sequences") as phase:
        assert isinstance(phase, Phase)
        phase.begun -= 30
        assert str(phase) == "update: 0 of 40 sequences (0%), 0:30 so far"
        phase.update(10)
        assert str(phase) == "update: 10 of 40 sequences (25%), 0:30 so far, about 1:30 left"
        phase.resize(10)
        assert str(phase) == "update: 10 of 10 sequences (100%), 0:30 so far, about 0:00 left"
