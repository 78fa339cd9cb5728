"""Playing an environment by hand: it shows what the model reads and what each step returned."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from RL2.errors import UserError
from RL2.tools.cli import app
from RL2.tools.play import FROM_INPUT, PlayRequest, play, responses_of, typed

GUESS = """
import time

async def step(state, action, extra_info):
    if action == "sleep":
        time.sleep(60)
    if action == "raise":
        raise ValueError("no \\x1b[31mnumber")
    extra_info["tries"] = extra_info.get("tries", 0) + 1
    right = action == extra_info["answer"]
    return {
        "next_state": state + action + "\\x1b[2JLower.\\n",
        "reward": {"right": right, "length": -len(action)},
        "spans": [{"span": [0, 1], "reward": 2.0, "part": "first"}],
        "score": right,
        "done": right,
        "extra_info": extra_info,
        "metrics": {"length": len(action), "word": "x"},
        "train": action != "30",
    }

async def reset(extra_info):
    extra_info["answer"] = "7"
    return "A number from 1 to 10.\\n"
"""

CHAT = """
async def step(state, action, extra_info):
    return {
        "next_state": None if "<tool>" in state else [{"role": "user", "content": "<tool> says 7"}],
        "reward": 1,
        "score": 0.25,
        "done": "<tool>" in state,
        "extra_info": extra_info,
    }
"""


@pytest.fixture
def guess(tmp_path: Path) -> Path:
    file = tmp_path / "guess.py"
    file.write_text(GUESS)
    return file


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    file = tmp_path / "chat.py"
    file.write_text(CHAT)
    return file


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "3+4=", "extra_info": {"answer": "7"}},
        {"messages": [{"role": "user", "content": "3+4?"}], "extra_info": {"answer": "7"}},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def played(request: PlayRequest, *said: str) -> tuple[bool, list[str]]:
    """Return whether the episode has a score, and the lines that were printed."""
    console = Console(file=io.StringIO(), width=20, highlight=False)
    is_scored = play(request, responses_of(said, console), console)
    assert isinstance(console.file, io.StringIO)
    return is_scored, console.file.getvalue().splitlines()


def test_every_turn_shows_its_text_and_its_result(guess: Path) -> None:
    is_scored, lines = played(PlayRequest(guess, weights={"length": 0.5}), "30", "7")
    assert is_scored
    assert lines[0] == "--- prompt: 22 tokens"
    assert lines[1] == "A number from 1 to 10."
    first = lines[lines.index("--- step 1") : lines.index("--- response 2")]
    assert first == [
        "--- step 1",
        "reward      1",
        "- right     0",
        "- length    -2, times 0.5",
        "- first     2",
        "- span      2, up to '3'",
        "score       0",
        "done        false, the episode goes on",
        "train       false, the tokens of this response are not trained on",
        "env/length  2",
        "env/word    left out: step returned metrics['word']=a str; expected a number or a bool",
        f"extra_info  {json.dumps({'seed': 387397684, 'answer': '7', 'tries': 1})}",
        "--- environment: 10 tokens",
        r"\x1b[2JLower.",
        "",
    ]
    assert lines[lines.index("--- episode") :] == [
        "--- episode",
        "responses   2",
        "reward      3.5, so it is correct",
        "score       1",
        "to train    rollout.max_turns=2 or more; unless set, it is 1",
    ]


def test_a_chat_is_shown_as_its_template_writes_it(chat: Path, rows: str) -> None:
    is_scored, lines = played(PlayRequest(chat, data=rows, row=2), "call", "7")
    assert is_scored
    assert lines[0] == 'extra_info  {"answer": "7"}'
    assert lines[2:5] == ["<|im_start|>user", "3+4?<|im_end|>", "<|im_start|>assistant"]
    added = lines[lines.index("--- step 1") : lines.index("--- response 2")]
    assert added[-4:] == ["<|im_start|>user", "<tool> says 7<|im_end|>", "<|im_start|>assistant", ""]
    assert lines[-3:-1] == ["reward      2, so it is correct", "score       0.5"]


@pytest.mark.parametrize(
    ("said", "timeout_s", "cause"),
    [
        ("raise", 60, r"ValueError: no \x1b[31mnumber"),
        ("sleep", 0.2, "step took longer than rollout.env_timeout_s=0.2"),
    ],
)
def test_a_step_that_fails_leaves_the_episode_unscored(guess: Path, said: str, timeout_s: float, cause: str) -> None:
    is_scored, lines = played(PlayRequest(guess, timeout_s=timeout_s), said)
    assert not is_scored
    assert lines[-2] == "--- episode"
    assert lines[-1].startswith(f"unscored    {cause}")


def test_without_a_further_response_it_stops(guess: Path) -> None:
    is_scored, lines = played(PlayRequest(guess), "1")
    assert is_scored
    assert lines[-1] == "stopped     after 1 response(s), before the episode was done"


def test_the_limit_of_turns_ends_it(guess: Path) -> None:
    _, lines = played(PlayRequest(guess, max_turns=2), "1", "2", "7")
    assert "responses   2" in lines
    assert "--- step 3" not in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "rows", "row": 3}, "--row 3: .*rows.jsonl has no such row; the last one is row 2"),
        ({}, "chat.py has no reset, so its tasks are rows; pass --data FILE"),
    ],
)
def test_a_task_that_is_not_there_is_refused(chat: Path, rows: str, settings: dict[str, object], message: str) -> None:
    settings = settings | ({"data": rows} if "data" in settings else {})
    with pytest.raises(UserError, match=message):
        play(PlayRequest(chat, **settings), iter([]), Console(file=io.StringIO()))  # type: ignore[arg-type]


def test_a_row_without_data_has_no_effect(guess: Path) -> None:
    with pytest.raises(UserError, match="--row 2 has no effect without --data"):
        played(PlayRequest(guess, row=2))


def test_lines_of_the_input_are_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\\\nlines\n\nlast"))
    assert list(typed()) == ["one", "two\nlines", "", "last"]


def test_the_input_continues_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\n"))
    said: Iterator[str] = responses_of(["one", FROM_INPUT, "three"], Console(file=io.StringIO()))
    assert list(said) == ["one", "two", "three"]


def command(*words: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["play", *words], input=typed)


def test_the_command_reads_responses_from_the_input(guess: Path) -> None:
    result = command(str(guess), "--weight", "length=0", typed="30\n7\n")
    assert result.exit_code == 0, result.exception
    assert "reward      5, so it is correct" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_command_fails_where_there_is_no_reward(guess: Path) -> None:
    result = command(str(guess), "--say", "raise")
    assert result.exit_code == 1
    assert "unscored    " in result.stdout


ROLES = """
ROLES = {"hider": "You hide.", "seeker": ""}

async def play(ask, task):
    hidden = await ask("hider", f"Hide from 1 to {task['seed']}.")
    found = await ask("seeker", "Where?")
    if found == "nowhere":
        return {"rewards": {"hider": 1}}
    found = await ask("seeker", "Again?") if found != hidden else found
    return {"rewards": {"hider": found != hidden, "seeker": found == hidden}, "score": 0.5, "metrics": {"tries": 2}}
"""


def test_roles_are_played_by_one_person(tmp_path: Path) -> None:
    (file := tmp_path / "roles.py").write_text(ROLES)

    def said(*responses: str) -> Result:
        settings = [str(file), "--seed", "9", *(word for text in responses for word in ("--say", text))]
        return CliRunner().invoke(app, ["play", *settings])

    result = said("7", "6", "7")
    assert result.exit_code == 0
    titles = [line.partition(":")[0][4:] for line in result.stdout.splitlines() if line.startswith("---")]
    assert titles == [
        "prompt of hider",
        "response 1 of hider",
        "prompt of seeker",
        "response 2 of seeker",
        "environment of seeker",
        "response 3 of seeker",
        "episode",
    ]
    assert "You hide.<|im_end|>" in result.stdout and "Hide from 1 to 9." in result.stdout
    end = [line.split(maxsplit=1) for line in result.stdout.partition("--- episode\n")[2].splitlines()]
    assert dict(end) == {
        "responses": "3",
        "hider": "reward 0",
        "seeker": "reward 1, so it is correct",
        "score": "0.5",
        "env/tries": "2",
    }
    assert "stopped     after 2 response(s)" in said("7", "6").stdout
    missing = said("7", "nowhere")
    assert missing.exit_code == 1 and "unscored    there is no reward of seeker" in missing.stdout
