"""Calls that real chat templates write are read back; broken and hostile ones are kept as errors, in little time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest
from real_templates import FILES, tokenizer_for, tokenizer_with

from RL2.data.source import DataError
from RL2.data.template import Chat, Template
from RL2.data.tool_calls import ParsedResponse, ResponseParser, ToolCall

CHAT = """\
{% for message in messages %}{% if message.role == 'user' %}USER{{ message.content }}ASSISTANT\
{% else %}{{ message.content or '' }}{% if message.tool_calls %}CALLS{% endif %}\
{{ eos_token }}{% endif %}{% endfor %}"""
MISTRAL = CHAT.replace("USER", "[INST] ").replace("ASSISTANT", "[/INST]")
BEGIN, END, SEP = (
    "<\uff5ctool\u2581call\u2581begin\uff5c>",
    "<\uff5ctool\u2581call\u2581end\uff5c>",
    "<\uff5ctool\u2581sep\uff5c>",
)
OWN = {  # written like those of Mistral 7B v0.3, Mistral Small 3.2 and DeepSeek V3.1, which trl does not carry
    "mistral": MISTRAL.replace(
        "CALLS",
        "[TOOL_CALLS] [{% for call in message.tool_calls %}{{ (call.function|tojson)[:-1] }}, "
        '"id": "{{ call.id }}"}{{ ", " if not loop.last }}{% endfor %}]',
    ),
    "mistral_v11": MISTRAL.replace(
        "CALLS",
        "{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
        "{{ call.function.arguments|tojson }}{% endfor %}",
    ),
    "deepseek_v3_1": CHAT.replace("USER", "<\uff5cUser\uff5c>")
    .replace("ASSISTANT", "<\uff5cAssistant\uff5c></think>")
    .replace(
        "CALLS",
        BEGIN.replace("call\u2581", "calls\u2581")
        + "{% for call in message.tool_calls %}"
        + BEGIN
        + "{{ call.function.name }}"
        + SEP
        + "{{ call.function.arguments|tojson }}"
        + END
        + "{% endfor %}"
        + END.replace("call\u2581", "calls\u2581"),
    ),
}
ARGUMENTS = {"harbour": 'Pell </tool_call> "é"\n  x', "days": 3, "exact": True, "of": ["tide", {"low": 1.5}]}
TYPES = {"harbour": "string", "days": "integer", "exact": "boolean", "of": "array"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Return the tide.",
        "parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}},
    },
}


def template_of(name: str) -> Template:
    return Template(tokenizer_for(OWN[name], "</s>") if name in OWN else tokenizer_with(name))


@cache
def parser_of(name: str) -> ResponseParser:
    return ResponseParser(template_of(name))


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "c12345678", "type": "function", "function": {"name": name, "arguments": arguments}}


def response(template: Template, turn: dict[str, Any]) -> tuple[str, str]:
    """Return prompt and response that the template writes for a turn; the prompt is empty if the turn reopens it."""
    question: list[dict[str, Any]] = [{"role": "user", "content": "High tide?"}]
    prompt = template.render(Chat(question, {"tools": [TOOL]}), add_generation_prompt=True)
    text = template.render(Chat([*question, turn], {"tools": [TOOL]}))
    text = text[: template.end_of_turn(text, len(prompt) - len(template.header))]
    text = text.removesuffix(next((end for end in template.ends if text.endswith(end)), ""))
    if text.startswith(prompt):
        return prompt, text.removeprefix(prompt)
    start = template.render(Chat(question, {"tools": [TOOL]}))
    return "", text.removeprefix(start).removeprefix(template.header.partition("<think>")[0])


@pytest.mark.skipif(not FILES, reason="trl is not installed")
@pytest.mark.parametrize("name", [*FILES, *OWN])
def test_what_a_template_writes_is_read_back(name: str) -> None:
    template = template_of(name)
    parser = ResponseParser(template)
    if not template.call_text:
        assert parser.format is None and not parser.is_harmony and not parser.is_atem
        return
    turn: dict[str, Any] = {"role": "assistant", "content": "" if name.startswith(("gptoss", "muse")) else "I look."}
    turn["tool_calls"] = [call("get_tide", ARGUMENTS), call("get_tide", {"harbour": "7"})]
    if template.reasoning:
        turn["reasoning_content"] = "Hm, a tide."
    try:
        prompt, text = response(template, turn)
    except DataError:  # Llama's takes one call a turn, and gpt-oss's writes the first
        turn["tool_calls"].pop()
        prompt, text = response(template, turn)
    parsed = parser.parse(text, prompt, [TOOL])
    expected = [ToolCall(each["function"]["name"], each["function"]["arguments"]) for each in turn["tool_calls"]]
    assert parsed.calls == (expected[:1] if parser.is_harmony else expected), text
    assert parsed.reasoning == ("Hm, a tide." if "Hm" in text else "")
    assert parsed.content == ("I look." if "I look." in text else "")


@pytest.mark.skipif(not FILES, reason="trl is not installed")
@pytest.mark.parametrize("name", FILES)
def test_results_of_calls_are_written_as_in_a_whole_conversation(name: str) -> None:
    template = template_of(name)
    if not template.call_text:
        return
    results = [
        {"role": "tool", "tool_call_id": "c12345678", "name": "get_tide", "content": f"06:{n}"} for n in (12, 15)
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": [call("get_tide", {}), call("get_tide", {})]}
    question = {"role": "user", "content": "High tide?"}
    try:
        whole = template.render(Chat([question, turn, *results], {"tools": [TOOL]}), add_generation_prompt=True)
    except DataError:
        whole = ""  # one call a turn
    behind = template.behind_calls([dict(result) for result in results], {"tools": [TOOL]})
    assert "06:12" in behind and "06:15" in behind
    assert behind.startswith(template.ends) or whole.endswith(behind)
    assert not whole or whole.endswith(behind)
    assert template.call_end in ("", behind[: len(template.call_end)])


def test_reasoning() -> None:
    parser = parser_of("qwen3")
    header = "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    assert parser.parse("Green.", header) == ParsedResponse("Green.", "", [])
    assert parser.parse("<think>\nHm.\n</think>\n\nGreen.") == ParsedResponse("Green.", "Hm.", [])
    assert parser.parse("Hm.\n</think>\n\nGreen.", header + "<think>\n") == ParsedResponse("Green.", "Hm.", [])
    assert parser.parse("Hm.</think>Green.") == ParsedResponse("Green.", "Hm.", [])
    assert parser.parse("Green.", header + "<think>\n\n</think>\n\n") == ParsedResponse("Green.", "", [])
    inner = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parser.parse(f"Hm.{inner}", header + "<think>\n") == ParsedResponse("", f"Hm.{inner}", [])
    argument = '<tool_call>{"name": "f", "arguments": {"x": "</think>"}}</tool_call>'
    assert parser.parse(argument).calls == [ToolCall("f", {"x": "</think>"})]
    assert parser_of("mistral").parse("<think>Hm.</think> Green.") == ParsedResponse("Green.", "Hm.", [])


def test_harmony() -> None:
    parser = parser_of("gptoss")
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'
    )
    assert parser.parse(text, "<|start|>assistant") == ParsedResponse("I look.", "Hm.", [ToolCall("f", {"x": 1})])
    opened = "<|start|>assistant<|channel|>analysis<|message|>"
    assert parser.parse("Hm.<|end|><|start|>assistant<|channel|>final<|message|>Green.", opened) == ParsedResponse(
        "Green.", "Hm.", []
    )
    assert parser.parse("Green.", "<|start|>assistant") == ParsedResponse("Green.", "", [])
    (broken,) = parser.parse("<|channel|>commentary to=functions.f<|message|>{'x'", "<|start|>assistant").calls
    assert (broken.name, broken.arguments) == ("f", {}) and str(broken.error).startswith("it is not JSON: ")


def test_variants_that_models_write() -> None:
    hermes, llama, tags = parser_of("qwen2_5"), parser_of("llama3_2"), parser_of("qwen3_6")
    two = [ToolCall("f", {"x": 1}), ToolCall("g", {})]
    assert hermes.parse('<tool_call>[{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]</tool_call>').calls == two
    unclosed = '<tool_call>{"name": "f", "arguments": {"x": 1}}\n<tool_call>{"name": "g", "parameters": null}'
    assert hermes.parse(unclosed).calls == two
    assert hermes.parse('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>').calls == two[:1]
    assert llama.parse('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}').calls == two
    assert llama.parse('Look:<|python_tag|>{"name": "f", "parameters": {"x": 1}}') == ParsedResponse(
        "Look:", "", two[:1]
    )
    assert llama.parse('{"name": "Ann", "age": 3}') == ParsedResponse('{"name": "Ann", "age": 3}', "", [])
    assert tags.parse("Look.\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>") == ParsedResponse(
        "Look.", "", two[:1]
    )
    assert parser_of("mistral").parse('[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}').calls == two


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("", {}),
        ("x=-1.5e3, ", {"x": -1500.0}),
        ("x = ('a', {'b': None},), y=[true, null]", {"x": ["a", {"b": None}], "y": [True, None]}),
        (r"x='\x41\u00e9\q\101\'\n'", {"x": "A\u00e9\\qA'\n"}),
        ("x='it's \\n here', y=2", {"x": "it's \\n here", "y": 2}),
        ("x='say 'hi', ok', y=\"b\"", {"x": "say 'hi', ok", "y": "b"}),
    ],
)
def test_arguments_in_python(written: str, arguments: dict[str, Any]) -> None:
    """Values are literals; a text that the template wrote with its own quotes in it ends where the next argument is."""
    text = f"Look.<|tool_call_start|>[f({written}), g.h-i(z=1)]<|tool_call_end|>"
    assert parser_of("lfm2_v2").parse(text) == ParsedResponse(
        "Look.", "", [ToolCall("f", arguments), ToolCall("g.h-i", {"z": 1})]
    )


@pytest.mark.parametrize(
    "written",
    [
        *("x=__import__('os')", "x=g(2)", "1", "**x", "x=lambda: 1", "x=b'a'", "x=1_0", "x={1: 2}", "x=1e999", "x=[1"),
        *(f"x={'9' * 5000}", f"x={'[' * 99}{']' * 99}", "x=1) + (2", "x='a", "x=-True", "x=1; y=2"),
    ],
)
def test_what_is_no_literal_is_an_error(written: str) -> None:
    good = "<|tool_call_start|>[g()]<|tool_call_end|>"
    broken, fine = parser_of("lfm2_v2").parse(f"<|tool_call_start|>[f({written})]<|tool_call_end|>{good}").calls
    assert broken.error and (broken.name, broken.arguments) == ("f", {}) and fine == ToolCall("g", {})
    value = written.removeprefix("x=")
    gemma = f"<|tool_call>call:f{{x:{value}}}<tool_call|><|tool_call>call:g{{}}<tool_call|>"
    if value not in ("1", "{1: 2}"):
        broken, fine = parser_of("gemma4_v5").parse(gemma).calls
        assert broken.error and (broken.name, broken.arguments) == ("f", {}) and fine == ToolCall("g", {})


def test_arbitrary_values_come_back_from_the_templates() -> None:
    """Texts of any characters but the marks, nested lists and objects, through real templates."""
    random = Random(0)
    letters = [*"ab'\"\\n,:=(){}[]<>| ", "\n", "\u00e9", "\U0001f600", "None", "', b=", '"}]']

    def text() -> str:
        return "".join(random.choices(letters, k=random.randrange(8))).replace("<|", "")

    def value(depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [text, lambda: random.choice((None, True, False, 0, -7, 1.5, 2**60))]
        if depth:
            kinds.append(lambda: [value(depth - 1) for _ in range(random.randrange(3))])
            kinds.append(lambda: {f"k{n}": value(depth - 1) for n in range(random.randrange(3))})
        return random.choice(kinds)()

    for _ in range(100):
        arguments = {f"a{n}": value(2) for n in range(random.randrange(4))}
        turn = {"role": "assistant", "content": "", "tool_calls": [call("get_tide", arguments)]}
        for name in ("gemma4_v5", "lfm2_v2"):
            template = template_of(name)
            prompt, written = response(template, turn)
            (found,) = parser_of(name).parse(written, prompt, [TOOL]).calls
            if name == "gemma4_v5":
                assert found.arguments == arguments, written
            else:  # it escapes nothing: texts between two quotes can be read in several ways
                assert found.error is not None or found.arguments.keys() <= arguments.keys(), written


def test_types_of_arguments_between_tags() -> None:
    """A schema decides between a number and a string of digits; without one, what is JSON is read as JSON."""

    def read(value: str, kind: str | None) -> Any:
        schema = {} if kind is None else {"type": kind}
        tool = {"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
        text = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
        (found,) = parser_of("qwen3_6").parse(text, tools=[tool]).calls
        return found.arguments["x"]

    assert [read("7", "string"), read("7", "integer"), read("7", None)] == ["7", 7, 7]
    assert [read("True", "boolean"), read("None", None), read("true", "string")] == [True, None, "true"]
    assert [read('"a"', None), read('"a"', "object"), read('{"a": [1]}', None)] == ['"a"', "a", {"a": [1]}]
    assert read("7 boats", "integer") == "7 boats"
    assert read("<p>\n</parameter> is a tag", None) == "<p>\n</parameter> is a tag"


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        ('{"name": "f", "arguments": {"x": }}', "", "it is not JSON: Expecting value at character 33"),
        ('{"name": "f", "arguments": [1]}', "f", "its arguments are a list, not an object"),
        ('{"arguments": {}}', "", "it has no name of a tool"),
        ('{"name": "f", "arguments": {"x": NaN}}', "", "it is not JSON: NaN is not a number"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "", "a string has half of a surrogate pair"),
        ('{"name": "f", "arguments": {}} thanks', "f", "other text comes before </tool_call>"),
        (f'{{"name": "f", "arguments": {{"x": {"[" * 99}{"]" * 99}}}}}', "", "it is nested more than 64 levels deep"),
        ("[" * 100_000, "", "it is nested more than 64 levels deep"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "", "it is not JSON: Exceeds the limit"),
    ],
)
def test_a_broken_call_is_an_error(text: str, name: str, error: str) -> None:
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    broken, fine = parser_of("qwen2_5").parse(f"<tool_call>{text}</tool_call>{good}").calls
    assert (broken.name, broken.arguments) == (name, {})
    assert str(broken.error).startswith(error)
    assert broken.text == f"<tool_call>{text}</tool_call>"
    assert fine == ToolCall("g", {})


def test_broken_calls_of_other_formats() -> None:
    def errors(name: str, text: str) -> list[tuple[str, str | None]]:
        return [(each.name, each.error) for each in parser_of(name).parse(text).calls]

    unclosed = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</function>\n</tool_call>"
    assert errors("qwen3_6", unclosed + unclosed) == [("f", "its argument 'x' is not closed")] * 2
    assert errors("qwen3_6", "<function=f>x") == [("f", "other text comes before </function>")]
    assert errors("glm4moe", "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</tool_call>") == [
        ("f", "its argument 'x' is not closed")
    ]
    assert errors("mistral", "[TOOL_CALLS]f[ARGS]") == [("f", "it is not JSON: Expecting value at character 0")]
    assert errors("deepseekv3", f"{BEGIN}f{{}}{END}") == [("", "it has no name of a tool")]
    assert errors("llama3_1", "<|python_tag|>search.call()") == [("", "it is not JSON: Expecting value at character 0")]


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_5", "qwen3_6", "glm4moe", "llama3_2", "mistral", "deepseekv3", "gptoss"),
        *("gemma4_v5", "lfm2_v2", "muse_glimmer"),
    ],
)
def test_hostile_text_takes_little_time(name: str) -> None:
    parser = parser_of(name)
    pieces = [
        *("<think>", "</think>", "[", "{", '"', "\\", " ", "\n", "[TOOL_CALLS]", "<|start|>", "<|python_tag|>"),
        *("<tool_call>", "</tool_call>", "<function=f>", "<function=f><parameter=x>", "</parameter>", "</arg_value> "),
        *('<tool_call>{"name": "', '<tool_call>["</tool_call>",', "<tool_call>f<arg_key>x</arg_key><arg_value>"),
        *('[TOOL_CALLS]f{"x":', f"{BEGIN}f{SEP}", "to=functions.f<|message|>", '{"name": "f", "parameters": '),
        f"<tool_call>{json.dumps('x' * 50)}",
        *("<|tool_call>call:f{x:", '<|tool_call>call:f{x:<|"|>', '<|"|>', "<|tool_call_start|>[f(x='", "'", "f(),"),
        *("<|tool_call_start|>[f(x='a' ", "<|tool_call_start|>[f(),", 'to=f<|message|><atem:invoke name="f">', "', a="),
    ]
    for piece in pieces:
        text = (piece * (200_000 // len(piece)))[:200_000]
        start_s = time.process_time()
        parsed = parser.parse(text, text)
        assert time.process_time() - start_s < 1, piece
        assert all(each.error for each in parsed.calls if not each.name)
