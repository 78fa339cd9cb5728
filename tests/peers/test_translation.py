"""The TRL script that docs/coming_from.md translates has only arguments that TRL has."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import GRPOConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming_from.md"


@pytest.mark.parametrize("config", [GRPOConfig, LoraConfig])
def test_arguments_are_those_of_trl(config: type) -> None:
    (script,) = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == config.__name__]
    given = {keyword.arg for keyword in call.keywords}
    assert given
    assert given <= {field.name for field in fields(config)}  # type: ignore[arg-type]
