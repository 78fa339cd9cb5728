"""Python programs, run and tested in a locked-down process: HumanEval, MBPP, or inputs with expected outputs.

    CODE_LIMIT_S=5          seconds of processor time for all tests of a response
    CODE_MEMORY_MB=1024     memory
    CODE_REWARD=all         1 if all tests pass; "fraction": the share that passes. The score is always "all"
    CODE_FORM=chat          form of HumanEval's prompts; "completion": the text that a base model continues
    CODE_SHOWN_TESTS=1      number of MBPP's tests that the prompt shows
    CODE_PYTHON=            interpreter whose packages programs can import; default: only the standard library
    CODE_SANDBOX=auto       or "namespaces", "landlock"
    CODE_ALLOW_UNSAFE=false "true": if the machine supports neither, programs run unconfined with your rights

A program that fails or exceeds a limit earns 0; a machine that fails leaves the response unscored. docs/code.md
describes how programs are confined and how a program could deceive a test.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

from .gsm8k import behind_reasoning
from .sandbox import Programs
from .variables import chosen, number

LIMIT_S = max(1, number("CODE_LIMIT_S", "5"))
MEMORY_BYTES = max(64, number("CODE_MEMORY_MB", "1024")) << 20
IS_FRACTION = chosen("CODE_REWARD", "all", "fraction") == "fraction"
IS_CHAT = chosen("CODE_FORM", "chat", "completion") == "chat"
SHOWN_TESTS = number("CODE_SHOWN_TESTS", "1")
SANDBOX = chosen("CODE_SANDBOX", "auto", "namespaces", "landlock")
IS_UNSAFE = chosen("CODE_ALLOW_UNSAFE", "false", "true") == "true"
LONGEST = 100_000
"""Limit in characters of a program; a longer one earns nothing."""

COMPLETE = "Complete this function. Give all of its code in one block that begins with ```python.\n\n```python\n{}\n```"
ANSWER = "\nGive the code in one block that begins with ```python."
PYTHON = ("", "python", "python3", "py")
"""Languages after the backticks that mark a block as Python."""


def make_programs() -> Programs:
    """Return the processes that confine programs. Raise ValueError if this machine cannot confine them."""
    made = Programs(LIMIT_S, MEMORY_BYTES, SANDBOX, os.environ.get("CODE_PYTHON") or None)
    try:
        made.check()
        return made
    except ValueError as error:
        if not IS_UNSAFE:
            raise ValueError(
                f"programs cannot be locked down here: {str(error)[:80]}; docs/code.md lists the requirements, and "
                "CODE_ALLOW_UNSAFE=true skips them"
            ) from None
        made.close()
        warnings.warn(f"CODE_ALLOW_UNSAFE: programs of the model run with your rights ({error})", stacklevel=2)
        return Programs(LIMIT_S, MEMORY_BYTES, "none", os.environ.get("CODE_PYTHON") or None)


programs = make_programs()


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    why: str | None
    parts = program(behind_reasoning(action, state), extra_info.get("optional", ""), extra_info.get("entry_point", ""))
    if parts is None or sum(map(len, parts)) > LONGEST:
        share, why = 0.0, "no program" if parts is None else "the program is too long"
    elif "inputs" in extra_info:
        share, why = await share_of_outputs("\n".join(parts), extra_info["inputs"], extra_info["outputs"])
    else:
        tests = request(extra_info)
        found = await programs.test(parts, tests)
        share, why = sum(found["passed"]) / len(tests["tests"]), found["why"]
    score = float(share == 1)
    return {
        "next_state": None,
        "reward": share if IS_FRACTION else score,
        "score": score,
        "done": True,
        "extra_info": extra_info | {"verdict": why or "passed"},
        "metrics": {"tests_passed": share},
    }


def example(row: dict[str, Any]) -> dict[str, Any] | None:
    """Convert a row of HumanEval, MBPP, APPS or PRIME to a prompt with its tests in `extra_info`.

    A row whose `extra_info` has `tests`, or `inputs` and `outputs`, stays unchanged.
    """
    row = {key: value for key, value in row.items() if value is not None}
    extra_info = row.get("extra_info") or {}
    extra_info = json.loads(extra_info) if isinstance(extra_info, str) else extra_info
    if "tests" in extra_info or "inputs" in extra_info:
        return row
    if "entry_point" in row and "test" in row:
        return human_eval(row)
    if "test_list" in row:
        return mbpp(row)
    truth = row["input_output"] if "input_output" in row else (row.get("reward_model") or {}).get("ground_truth")
    tests = json.loads(truth) if isinstance(truth, str) else truth
    if not isinstance(tests, dict) or not tests.get("inputs"):
        raise ValueError("it has no tests: neither test_list, nor test and entry_point, nor inputs and outputs")
    made = {"extra_info": extra_info | in_and_out(tests)}
    if "prompt" in row or "messages" in row:
        return {key: value for key, value in row.items() if key != "reward_model"} | made
    question = "\n\n".join(text for text in (row["question"], row.get("starter_code")) if text)
    return {"messages": [{"role": "user", "content": question + ANSWER}]} | made


def human_eval(row: dict[str, Any]) -> dict[str, Any]:
    prompt, entry_point = row["prompt"], row["entry_point"]
    tests = {
        "optional": prompt,  # its helpers serve the tests, and its imports serve the program
        "before": row["test"],
        "names": [f"candidate={entry_point}", entry_point],
        "tests": [f"check({entry_point})"],
        "entry_point": entry_point,
    }
    solution = row.get("canonical_solution", "")
    if not IS_CHAT:
        return {"prompt": prompt, "response": solution, "extra_info": tests}
    messages = [{"role": "user", "content": COMPLETE.format(prompt.strip("\n"))}]
    return {"messages": messages, "response": f"```python\n{prompt}{solution}\n```", "extra_info": tests}


def mbpp(row: dict[str, Any]) -> dict[str, Any]:
    tests = [*row["test_list"], *(row.get("challenge_test_list") or [])]
    shown = "\n".join(tests[:SHOWN_TESTS])
    question = row["text"] if "text" in row else row["prompt"]
    question += f"\nThe code should pass tests such as\n{shown}\n" if shown else "\n"
    extra_info = {
        "before": "\n".join(row.get("test_imports") or []),
        "setup": row.get("test_setup_code", ""),
        "tests": tests,
    }
    extra_info["names"] = wanted(extra_info, row.get("code"))
    return {
        "messages": [{"role": "user", "content": question + ANSWER[1:]}],
        "response": f"```python\n{row.get('code', '').strip()}\n```",
        "extra_info": extra_info,
    }


def in_and_out(tests: dict[str, Any]) -> dict[str, Any]:
    """Return tests of inputs and outputs: of a program's standard streams, or of the function `fn_name`."""
    inputs, outputs, name = tests["inputs"], tests["outputs"], tests.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"it has {len(inputs)} inputs and {len(outputs)} outputs")
    if not name:
        as_text = [
            ["\n".join(item) if isinstance(item, list) else str(item) for item in of] for of in (inputs, outputs)
        ]
        return {"inputs": as_text[0], "outputs": as_text[1]}
    results = [out[0] if isinstance(out, list) and len(out) == 1 else out for out in outputs]  # APPS wraps some
    checks = [
        f"result = {name}(*{given!r})\nassert result in ({out!r}, {result!r})"
        for given, out, result in zip(inputs, outputs, results, strict=True)
    ]
    return {"tests": checks, "names": [name]}


def request(extra_info: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Programs.test`. Raise ValueError if there is no test."""
    if not extra_info.get("tests"):
        raise ValueError("extra_info has no tests")
    made = {name: extra_info.get(name) or "" for name in ("optional", "before", "setup")}
    names = extra_info.get("names") or wanted(extra_info, None)
    return made | {"tests": list(extra_info["tests"]), "names": list(names), "stop": not IS_FRACTION}


def wanted(tests: dict[str, Any], reference: str | None) -> list[str]:
    """Return the names that the tests take from the solution: those that the reference defines, if there is one.

    Without a reference, return all names that the tests use, except those that they define and Python's builtins.
    """
    used, made = set[str](), set[str]()
    for text in [tests.get("before") or "", tests.get("setup") or "", *tests["tests"]]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
            else:
                made |= set(defined(node))
    if reference is None:
        return sorted(used - made - set(dir(builtins)))
    return sorted(used & {name for node in ast.parse(reference).body for name in defined(node)})


def defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(node, ast.arg):
        yield node.arg


async def share_of_outputs(code: str, inputs: list[str], outputs: list[str]) -> tuple[float, str | None]:
    """Return the share of inputs with the expected output, and the first failure."""
    right, why = 0, None
    for place, (given, expected) in enumerate(zip(inputs, outputs, strict=True), 1):
        found = await programs.run(code, given)
        if found["why"] is None and lines(found["output"]) == lines(expected):
            right += 1
            continue
        why = why or f"test {place}: {found['why'] or 'another output'}"
        if not IS_FRACTION:
            break
    return right / len(inputs), why


def lines(text: str) -> list[str]:
    """Return the lines of an output without trailing white space."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def program(answer: str, prefix: str, entry_point: str) -> list[str] | None:
    """Return the parts of the program in a response, to be run in sequence; None if there is none.

    The program is the last closed block of Python, else the whole response. `prefix` is the beginning of a function
    that the program continues; if the program defines the whole function, the prefix still provides its imports.
    """
    code: str | None = answer
    if "```" in answer:
        code = last_block(answer)
    if not code or not code.strip():
        return None
    if not prefix:
        return [code]
    is_whole = re.search(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}[ \t]*\(", code, re.MULTILINE)
    return [prefix, code] if is_whole else [prefix + code]


def last_block(text: str) -> str | None:
    """Return the last closed block of Python between lines of backticks; None if there is none."""
    found, inside, fence = None, list[str](), ""
    is_python = False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        ticks = bare[: len(bare) - len(bare.lstrip("`"))]
        if fence and bare == ticks and len(ticks) >= len(fence):
            found = "".join(inside) if is_python else found
            fence = ""
        elif fence:
            inside.append(line)
        elif len(ticks) >= 3:
            fence, inside = ticks, []
            is_python = bare[len(ticks) :].strip().lower().partition(" ")[0] in PYTHON
    return found
