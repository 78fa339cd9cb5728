"""Programs of a model, judged by tests: what is taken from a response, and what each kind of row becomes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource")
try:
    from envs import code
except ValueError as error:
    pytest.skip(f"this machine cannot hold programs: {error}", allow_module_level=True)

ROOT = Path(__file__).parents[3]
PROMPT = '''import math


def twice(x: int) -> int:
    return 2 * x


def area(r: int) -> int:
    """Return the area of a square."""
'''
HUMAN_EVAL = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "canonical_solution": "    return math.prod([r, r])\n",
    "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == twice(2)\n    assert candidate(3) == 9\n",
    "entry_point": "area",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to count the leaves of a tree.",
    "code": "class Node:\n    def __init__(self, *below):\n        self.below = below\n\n"
    "def sum(node):\n    return __builtins__['sum'](map(sum, node.below)) or 1\n",
    "test_list": ["assert sum(tree) == 2", "assert sum(Node()) == 1"],
    "test_setup_code": "tree = Node(Node(Node()), Node())",
    "challenge_test_list": ["assert sum(Node(tree, tree)) == 4"],
}
SANITIZED = {
    "task_id": 2,
    "prompt": "Write a function for the area of a circle.",
    "code": "import math\ndef area(r):\n    return math.pi * r * r",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(1), 3.14159, abs_tol=0.001)"],
}
APPS = {
    "problem_id": 0,
    "question": "Add two numbers.",
    "input_output": json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}),
}
CALLED = {
    "question": "Add two numbers.",
    "starter_code": "def add(a, b):",
    "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]}),
}
VERL = {"prompt": [{"role": "user", "content": "Add."}], "reward_model": {"ground_truth": APPS["input_output"]}}


@pytest.fixture(autouse=True, scope="module")
def _programs_end() -> Iterator[None]:
    yield
    code.programs.close()


def block(text: str, language: str = "python") -> str:
    return f"So:\n```{language}\n{text}\n```\nDone."


def judge(row: dict[str, Any], action: str | None = None, state: str = "q") -> tuple[float, str]:
    made = code.example(row)
    assert made is not None
    result = asyncio.run(code.step(state, made["response"] if action is None else action, made["extra_info"]))
    assert (result["next_state"], result["done"]) == (None, True)
    assert result["score"] == float(result["metrics"]["tests_passed"] == 1)
    return result["reward"], result["extra_info"]["verdict"]


@pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP, SANITIZED], ids=["HumanEval", "MBPP", "sanitized"])
def test_solutions_of_the_data_pass(row: dict[str, Any]) -> None:
    assert judge(row) == (1.0, "passed")


@pytest.mark.parametrize(
    ("row", "action", "verdict"),
    [
        (HUMAN_EVAL, "    return r * r\n", "passed"),
        (HUMAN_EVAL, block("    return twice(r) * r // 2"), "passed"),
        (HUMAN_EVAL, block("from __future__ import annotations\ndef area(r): return math.prod([r, r])"), "passed"),
        (HUMAN_EVAL, block("def twice(x): return 9\ndef area(r): return r + r"), "test 1: AssertionError"),
        (HUMAN_EVAL, block("def other(r): return r * r"), "test 1: AssertionError"),
        (HUMAN_EVAL, "", "no program"),
        (HUMAN_EVAL, "    return r *", "SyntaxError: "),
        (APPS, block("a, b = map(int, input().split())\nprint(a + b)\nexit()"), "passed"),
        (APPS, block("import sys\nprint(*[sum(map(int, s.split())) for s in sys.stdin], '\\n')"), "passed"),
        (APPS, block("if __name__ == '__main__':\n    print(3)"), "test 2: another output"),
        (APPS, block("print(3)\n1 / 0"), "test 1: the program ended with exit code 1"),
        (VERL, block("print(sum(map(int, input().split())))"), "passed"),
        (CALLED, block("class Solution:\n    def add(self, a, b):\n        return a + b"), "passed"),
        (CALLED, block("def add(a, b): return 3"), "test 2: AssertionError"),
        (MBPP, block("def sum(n): return 2\nclass Node:\n    def __init__(self, *n): pass"), "test 2: AssertionError"),
        (MBPP, block("def other(node): return 2"), "NameError: name 'Node' is not defined"),
    ],
)  # fmt: skip
def test_programs_are_judged_by_what_they_do(row: dict[str, Any], action: str, verdict: str) -> None:
    reward, said = judge(row, action)
    assert said.startswith(verdict)
    assert reward == float(verdict == "passed")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("f", "f"),
        ("```\nf\n```", "f\n"),
        ("```python\na\n```\n```py\nb\n```\n", "b\n"),
        ("```python\na\n```\n```bash\nls\n```\n```text\n42\n```", "a\n"),
        ("```python\na\n```\n```python\nb is cut off", "a\n"),
        ("```python\nb is cut off", None),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("  ```Python  \n  a\n  ```", "  a\n"),
        ("```json\n{}\n```", None),
        ("", None),
        ("```python\n```", None),
    ],
)
def test_the_last_closed_block_of_python_counts(answer: str, found: str | None) -> None:
    assert code.program(answer, "", "") == (None if found is None else [found])


def test_reasoning_is_not_judged() -> None:
    right = block("def area(r): return r * r")
    assert judge(HUMAN_EVAL, f"<think>{block('def area(r): return 0')}</think>{right}")[0] == 1.0
    assert judge(HUMAN_EVAL, f"<think>{right}")[0] == 0.0
    assert judge(HUMAN_EVAL, right, state="q<think>\n")[0] == 0.0


def test_a_fraction_of_the_tests_can_be_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    half = block("print(3)")
    assert judge(APPS, half)[0] == 0.0
    monkeypatch.setattr(code, "IS_FRACTION", True)
    assert judge(APPS, half)[0] == 0.5
    two = "def sum(node):\n    return 1\n" + str(MBPP["code"]).partition("\n\n")[0]
    assert judge(MBPP, block(two))[0] == pytest.approx(1 / 3)


def test_prompts_show_as_many_tests_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> int:
        made = code.example(MBPP)
        assert made is not None
        return made["messages"][0]["content"].count("assert")

    assert shown() == 1
    monkeypatch.setattr(code, "SHOWN_TESTS", 3)
    assert shown() == 3
    monkeypatch.setattr(code, "SHOWN_TESTS", 0)
    assert shown() == 0


def test_a_base_model_goes_on_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "IS_CHAT", False)
    made = code.example(HUMAN_EVAL)
    assert made is not None
    assert (made["prompt"], made["response"]) == (PROMPT, HUMAN_EVAL["canonical_solution"])
    assert judge(HUMAN_EVAL) == (1.0, "passed")


def test_rows_of_ones_own_stay_as_they_are() -> None:
    row = {"prompt": "Double.", "extra_info": {"tests": ["assert f(2) == 4", "g = f\nassert g(0) == 0"]}}
    assert code.example(row) == row
    assert judge({**row, "response": ""}, block("def f(x): return 2 * x")) == (1.0, "passed")
    row = {"prompt": "Double.", "extra_info": {"inputs": ["1"], "outputs": ["2"]}}
    assert judge(row, block("print(2 * int(input()))")) == (1.0, "passed")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "Add."}, "it has no tests"),
        ({"question": "Add.", "input_output": '{"inputs": ["1"], "outputs": []}'}, "it has 1 inputs and 0 outputs"),
    ],
)
def test_rows_without_tests_are_refused(row: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        code.example(row)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("CODE_REWARD=half", "CODE_REWARD='half': choose all or fraction"),
        ("CODE_LIMIT_S=soon", "CODE_LIMIT_S='soon': expected a whole number of at least 0"),
        ("CODE_SANDBOX=bubblewrap", "CODE_SANDBOX='bubblewrap': choose auto or namespaces or landlock"),
    ],
)
@pytest.mark.slow
def test_settings_that_make_no_sense_are_refused(setting: str, error: str) -> None:
    command = ["env", setting, sys.executable, "-c", "import envs.code"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.strip().splitlines()[-1] == f"ValueError: {error}"


@pytest.mark.slow
def test_a_machine_that_cannot_hold_programs_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    """An architecture that nothing is known of stands for every machine without the means."""
    for path in (ROOT / "envs").glob("*.py"):
        (tmp_path / path.name).write_text(
            path.read_text().replace('"x86_64": (0', '"m68k": (0').replace("aarch64", "vax")
        )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path.parent)!r})\n"
        f"from {tmp_path.name} import code\nimport asyncio\n"
        "print(asyncio.run(code.programs.run('print(1 + 1)', '')))\nraise SystemExit"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ValueError: programs cannot be locked down here: it runs on Linux with x86-64" in done.stderr
    assert "CODE_ALLOW_UNSAFE=true" in done.stderr.strip().splitlines()[-1]
    done = subprocess.run(["env", "CODE_ALLOW_UNSAFE=true", *command], capture_output=True, text=True, check=False)
    assert "'output': '2\\n'" in done.stdout
    assert "programs of the model run with your rights" in done.stderr
