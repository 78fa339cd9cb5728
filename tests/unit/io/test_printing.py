"""Text of models, rows and scripts does not drive a terminal; secrets are in no file and no server that needs none."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rl_settings import rl_config

from RL2.config.load import show
from RL2.config.secrets import masked
from RL2.engines.served.server import Server, free_port
from RL2.engines.vllm.server_spec import VLLM_SERVER
from RL2.errors import ConfigError, UserError, one_line, printable
from RL2.io.report import Report
from RL2.tools import audit
from RL2.tools.audit import Audit, Finding
from RL2.tools.eval import evaluate

BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = [chr(n) for n in (*range(9), *range(11, 32), *range(127, 160))] + [*BIDIRECTIONAL, "\u2028", "\u2029"]
TEXT = "a\tb\nä 你好 👩\u200d👩 é\u0301"
"""As it is: tabs, lines, other scripts, a joiner."""


@pytest.mark.parametrize("character", CONTROLS, ids=lambda character: f"{ord(character):04x}")
def test_no_control_character_is_printed(character: str) -> None:
    shown = printable(f"{TEXT}{character}{TEXT}")
    assert character not in shown
    assert shown == f"{TEXT}{character.encode('unicode_escape').decode()}{TEXT}"


def test_errors_and_reports_are_printable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "".join(CONTROLS)
    Report(tmp_path, is_first=True, num_steps=1).say(f"an environment said {hostile}")
    said = [capsys.readouterr().out, str(UserError(f"a model wrote {hostile}")), str(ConfigError(hostile))]
    said.append(one_line(hostile))
    for text in said:
        assert not set(text) & set(CONTROLS)
        assert "\\x1b" in text
    assert one_line("\ud800") == "\\ud800"


def test_tables_are_printable_and_have_no_markup_of_others() -> None:
    hostile = "[bold]" + "".join(CONTROLS)
    found = Audit(1, {"a kind": 1}, [Finding(1, "a kind", hostile, hostile, hostile)], [])
    summary = {"problems": 1, "unscored": 0, hostile: 0.5}
    for table in (audit.table(found), evaluate.table(summary)):
        console = Console(file=io.StringIO(), width=2000)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert not (set(text) - {"\n"}) & set(CONTROLS)
        assert "[bold]" in text and "\\x1b" in text


SECRETS = {
    "HF_TOKEN": "hf_1",
    "WANDB_API_KEY": "w",
    "AWS_SECRET_ACCESS_KEY": "a",
    "db_password": "p",
    "MYAPIKEY": "m",
}
PLAIN = {"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO", "EMPTY_TOKEN": ""}


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    settings = {
        "actor": {"max_new_tokens": 5, "stop_token_ids": [1]},
        "rollout": {
            "vllm": {
                "env": SECRETS | PLAIN,
                "args": ("--api-key", "k", "--hf-token=h", "--seed", "7", "--max-num-batched-tokens", "9"),
                "urls": ["http://user:pass@host:1/x"],
            },
        },
    }
    shown = masked(settings)
    server = shown["rollout"]["vllm"]
    assert shown["actor"] == settings["actor"]
    assert server["env"] == dict.fromkeys(SECRETS, "***") | PLAIN
    assert server["args"] == ("--api-key", "***", "--hf-token=***", "--seed", "7", "--max-num-batched-tokens", "9")
    assert server["urls"] == ["http://***@host:1/x"]


def test_secrets_in_the_command_of_an_agent_are_masked() -> None:
    command = "env MY_KEY=a python a.py --api-key 'b c' --max-tokens 5 --token=d {prompt}"
    shown = masked({"rollout": {"agent": command}})["rollout"]["agent"]
    assert shown == "env MY_KEY=*** python a.py --api-key *** --max-tokens 5 --token=*** {prompt}"


def test_the_configuration_is_shown_without_secrets() -> None:
    config = rl_config("rollout.engine=vllm", "rollout.vllm.env.HF_TOKEN=hf_1", program="spo")
    assert config.rollout.vllm.env == {"HF_TOKEN": "hf_1"}
    assert "hf_1" not in show(config)
    assert "max_new_tokens: 4" in show(config)


def test_a_server_inherits_no_secret_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRETS | PLAIN).items():
        monkeypatch.setenv(name, value)
    place = {"log": tmp_path / "log", "folder": tmp_path / "f", "port": free_port()}
    server = Server(VLLM_SERVER, sys.executable, [], {"GIVEN_KEY": "g"}, "t", name="s", **place)
    server.command = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    server.start()
    assert server.process is not None
    server.process.wait()
    seen = json.loads((tmp_path / "log").read_text())
    assert {name for name in SECRETS if name in seen} == {"HF_TOKEN"}  # it may have to fetch the model
    assert seen.items() >= (PLAIN | {"GIVEN_KEY": "g", "VLLM_API_KEY": "t"}).items() - {("EMPTY_TOKEN", "")}
