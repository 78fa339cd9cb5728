"""`rl2 keys`, `rl2 config` and `--help` say what the keys of a program are."""

from __future__ import annotations

import sys

import pytest
import yaml
from test_configs import RL, minimal
from typer.testing import CliRunner

from RL2.config.load import load, show
from RL2.config.programs import PROGRAMS
from RL2.tools.cli import app
from RL2.tools.keys import annotated, keys_of, shown
from RL2.trainer.launch import main


def said(*words: str) -> str:
    """Return what `rl2` prints, without the ends of its lines."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_configuration_with_comments_is_the_configuration(program: str) -> None:
    text = annotated(program, minimal(program))
    assert yaml.safe_load(text) == yaml.safe_load(show(load(program, minimal(program))))
    words = " ".join(text.replace("#", " ").split())
    assert [key.name for key in keys_of(program) if ".NAME." not in key.name and key.meaning not in words] == []
    assert max(map(len, text.splitlines())) <= 110


def test_a_configuration_says_which_keys_are_missing() -> None:
    text = annotated("sft", ["data.path=x", "actor.lr=2e-6"])
    required = "data.max_length actor.model_name actor.max_length_per_device trainer.experiment_name"
    assert text.startswith(f"# required, and not set (???): {required}\n")
    values = yaml.safe_load(text)
    assert (values["actor"]["lr"], values["actor"]["model_name"]) == (2e-6, "???")
    assert values["trainer"]["save_dir"] == "ckpts/${trainer.experiment_name}"


def test_a_configuration_shows_no_secrets() -> None:
    text = annotated("ppo", [*RL, "rollout.engine=vllm", "rollout.vllm.env.MY_TOKEN=abc123"])
    assert "abc123" not in text
    assert "MY_TOKEN: '***'" in text


def test_keys_are_found_by_a_word_of_their_name_or_meaning() -> None:
    text = said("keys", "ppo", "STALENESS")
    assert "rollout.max_staleness" in text
    assert "Maximum staleness of a token, in weight versions" in text
    assert "actor.lr" not in text
    result = CliRunner().invoke(app, ["keys", "ppo", "no-such-word"])
    assert str(result.exception) == "rl2 keys: no key of ppo has 'no-such-word' in its name or meaning"


def test_defaults_are_shown_as_one_writes_them() -> None:
    default = {key.name: shown(key, value) for key, value in keys_of("ppo").items()}
    keys = ("actor.model_name", "critic.model_name", "actor.clip", "trainer.dry_run", "actor.lr")
    assert [default[key] for key in keys] == ["required", "${actor.model_name}", "null", "false", "1e-06"]


def test_a_program_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", "--help"])
    main("sft")
    text = capsys.readouterr().out
    assert "usage: python -m RL2.trainer.sft KEY=VALUE" in text
    assert "data.path data.max_length actor.model_name actor.max_length_per_device trainer.experiment_name" in text
    assert "rl2 keys sft" in text
