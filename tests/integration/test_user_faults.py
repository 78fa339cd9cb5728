"""What users get wrong ends in one line that says what and what to do, before anything long; docs/faults.md lists it.

The programs run in this process. With RL2_WRITE_DOCS=1 the table in the document is written anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import World
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from RL2.io import digests
from RL2.trainer.launch import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- made by tests/integration/test_user_faults.py -->\n", "<!-- to here -->\n"
LIMIT_S = 30
"""On a busy machine, and with torch's first use in it; alone each takes less than a second."""

Prepare = Callable[[World, Path], list[str]]
"""Makes what is wrong in a folder, and gives the overrides that use it."""


@dataclass(frozen=True)
class Fault:
    what: str
    program: str
    prepare: Prepare
    said: str
    """The line, with DIR for the folder."""


def data(*lines: str, key: str = "train_data.path") -> Prepare:
    def prepare(world: World, folder: Path) -> list[str]:
        (folder / "data.jsonl").write_text("".join(line + "\n" for line in lines))
        return [f"{key}={folder}/data.jsonl"]

    return prepare


def environment(script: str) -> Prepare:
    def prepare(world: World, folder: Path) -> list[str]:
        (folder / "env.py").write_text(script)
        return [f"rollout.env_path={folder}/env.py"]

    return prepare


def step(body: str) -> Prepare:
    return environment(f"import time\n\nasync def step(state, action, extra_info):\n    {body}\n")


def model(spoil: Callable[[Path], None], *more: str) -> Prepare:
    def prepare(world: World, folder: Path) -> list[str]:
        shutil.copytree(world.model, folder / "model")
        spoil(folder / "model")
        return [f"actor.model_name={folder}/model", *more]

    return prepare


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def cut_in_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 100)


def forget_template(folder: Path) -> None:
    without("chat_template.jinja")(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))


def overrides(*settings: str) -> Prepare:
    return lambda world, folder: [setting.replace("DIR", str(folder)) for setting in settings]


def chat_without_template(world: World, folder: Path) -> list[str]:
    row = {"messages": [{"role": "user", "content": "1+1"}], "extra_info": {}}
    return model(forget_template)(world, folder) + data(json.dumps(row))(world, folder)


def below_a_file(world: World, folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"trainer.save_dir={folder}/file/run"]


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = {name: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    first = min(names.values())
    save_file({name: weights[name] for name in names if names[name] == first}, folder / first)
    (folder / "model.safetensors").unlink()


def more_tokens(world: World, folder: Path) -> list[str]:
    def add(model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([f"word{n}" for n in range(200)])
        tokenizer.save_pretrained(model)

    return model(add)(world, folder) + data(json.dumps({"prompt": "word199", "extra_info": {}}))(world, folder)


def another_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end of all|>"})
    tokenizer.save_pretrained(folder)


def endless_expression(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"^(?:(a+)+)\1b"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    file.write_text(json.dumps(tokenizer))


def endless_row(world: World, folder: Path) -> list[str]:
    row = data(json.dumps({"prompt": "a" * 40 + "!", "extra_info": {}}))
    return model(endless_expression)(world, folder) + row(world, folder)


def checkpoint(world: World, folder: Path) -> Path:
    run = world.run("sft", "trainer.max_steps=1", "trainer.save_freq=1", save_dir=folder / "before").succeeded()
    return run.save_dir / "step_000001"


def smaller_model(world: World, folder: Path) -> list[str]:
    def take_a_layer(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        number = config["num_hidden_layers"] - 1
        config |= {"num_hidden_layers": number, "layer_types": config["layer_types"][:number]}
        (model / "config.json").write_text(json.dumps(config))
        weights = load_file(model / "model.safetensors")
        fewer = {name: x for name, x in weights.items() if f".layers.{number}." not in name}
        save_file(fewer, model / "model.safetensors", metadata={"format": "pt"})

    source = checkpoint(world, folder)
    notes = json.loads((source / "notes.json").read_text())
    notes["models"]["actor.model_name"] = "larger"  # where the world lies is no part of the text
    (source / "notes.json").write_text(json.dumps(notes))
    digests.write(source, digests.compute(source, digests.read(source, ())))
    return [*model(take_a_layer)(world, folder), f"trainer.load_ckpt_from={source}"]


def damaged_checkpoint(world: World, folder: Path) -> list[str]:
    source = checkpoint(world, folder)
    (source / "random.safetensors").unlink()
    return [f"trainer.load_ckpt_from={source}"]


def blocked(world: World, folder: Path) -> list[str]:
    return [*step("time.sleep(60)")(world, folder), "rollout.env_timeout_s=0.2", "train_data.prompts_per_rollout=1"]


def another_run(world: World, folder: Path) -> list[str]:
    (folder / "other").mkdir()
    (folder / "other" / "metrics.jsonl").write_text("{}\n")
    return [f"trainer.save_dir={folder}/other"]


RESULT = "dict(next_state=None, reward={}, score=0.0, done=True, extra_info=extra_info)"
NO_REWARD = "spo: none of the 16 trajectories has a reward; the most common causes: 16 times: "
FAULTS = [
    Fault(
        "no data",
        "spo",
        overrides("train_data.path=DIR/data.jsonl"),
        "spo: train_data.path=DIR/data.jsonl: there is no such file",
    ),
    Fault("empty data", "spo", data(), "spo: DIR/data.jsonl: no rows"),
    Fault(
        "broken JSON",
        "spo",
        data('{"prompt": "a", "extra_info": {}}', '{"prompt": '),
        "spo: DIR/data.jsonl, row 2: line 2: Expecting value (column 1); train_data.on_bad_row=skip continues "
        "without such rows",
    ),
    Fault(
        "wrong columns",
        "spo",
        data('{"question": "a"}'),
        "spo: DIR/data.jsonl, row 1: neither 'prompt' nor 'messages'; its keys are question; example(row) in the "
        "environment script (rollout.env_path, in SFT data.env_path) can convert others; "
        "train_data.on_bad_row=skip continues without such rows",
    ),
    Fault(
        "an empty prompt",
        "spo",
        data('{"prompt": "", "extra_info": {}}'),
        "spo: DIR/data.jsonl, row 1: 'prompt' is empty; train_data.on_bad_row=skip continues without such rows",
    ),
    Fault(
        "a prompt that is too long",
        "spo",
        data(json.dumps({"prompt": "7 " * 200, "extra_info": {}})),
        "spo: DIR/data.jsonl, row 1: its prompt has 400 tokens, the limit is 256; raise actor.max_length_per_device or "
        "remove the row; train_data.on_bad_row=skip continues without such rows",
    ),
    Fault(
        "a misspelt key",
        "spo",
        overrides("actor.lrr=1"),
        "spo: spo has no key 'actor.lrr'; did you mean actor.lr?",
    ),
    Fault(
        "a folder that is not a model",
        "spo",
        overrides("actor.model_name=DIR"),
        "spo: actor.model_name=DIR is not a model: it has no config.json",
    ),
    Fault(
        "a model without weights",
        "spo",
        model(without("model.safetensors")),
        "spo: actor.model_name=DIR/model has no weights in safetensors format (no *.safetensors in DIR/model)",
    ),
    Fault(
        "corrupt safetensors",
        "spo",
        model(not_safetensors),
        "spo: actor.model_name=DIR/model: model.safetensors is broken (Error while deserializing header: invalid JSON "
        "in header: EOF while parsing a value at line 1 column 0); was a download or a copy cut off? Remove it and "
        "download it again",
    ),
    Fault(
        "an interrupted download",
        "spo",
        model(cut_in_half),
        "spo: actor.model_name=DIR/model: model.safetensors is broken (Error while deserializing header: incomplete "
        "metadata, file not fully covered); was a download or a copy cut off? Remove it and download it again",
    ),
    Fault(
        "a model without a tokenizer",
        "spo",
        model(without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
        "spo: actor.model_name=DIR/model has no tokenizer: it has no tokenizer.json",
    ),
    Fault(
        "messages without a chat template",
        "spo",
        chat_without_template,
        "spo: DIR/data.jsonl, row 1: the tokenizer has no chat template; pass rows with 'prompt' or a tokenizer with a "
        "chat template",
    ),
    Fault(
        "no environment",
        "spo",
        overrides("rollout.env_path=DIR/env.py"),
        "spo: rollout.env_path=DIR/env.py: there is no such file",
    ),
    Fault(
        "an environment without `step`",
        "spo",
        environment("steps = 1\n"),
        "spo: DIR/env.py has no `async def step(state, action, extra_info)`",
    ),
    Fault(
        "an environment with a syntax error",
        "spo",
        environment("def step(:\n"),
        "spo: DIR/env.py cannot be imported: SyntaxError: invalid syntax (env.py, line 1) (DIR/env.py:1)",
    ),
    Fault(
        "`step` returns the wrong type",
        "spo",
        step("return 3"),
        f"{NO_REWARD}step returned an int; expected a dict",
    ),
    Fault(
        "a reward that is not a number",
        "spo",
        step("return " + RESULT.format("float('nan')")),
        f"{NO_REWARD}step returned reward=nan; expected a finite number",
    ),
    Fault(
        "`step` raises",
        "spo",
        step("raise RuntimeError('no such service')"),
        f"{NO_REWARD}RuntimeError: no such service (DIR/env.py:4)",
    ),
    Fault(
        "a folder that cannot be written",
        "spo",
        below_a_file,
        "spo: trainer.save_dir=DIR/file/run cannot be written: [Errno 20] Not a directory: 'DIR/file/run'",
    ),
    Fault(
        "a folder that is not a checkpoint",
        "spo",
        overrides("trainer.load_ckpt_from=DIR"),
        "spo: trainer.load_ckpt_from=DIR is not a checkpoint (it has no notes.json)",
    ),
    Fault(
        "an objective that needs advantages, in `sft`",
        "sft",
        overrides("actor.objective=ppo"),
        "sft: actor.objective=ppo reads advantages, and rows of data have none; choose sft, rank_jsd or another "
        "objective that reads none",
    ),
    Fault(
        "a model that does not exist",
        "spo",
        overrides("actor.model_name=DIR/nothing"),
        "spo: actor.model_name=DIR/nothing: there is no such folder, and a model on the hub is named OWNER/NAME",
    ),
    Fault(
        "a missing file of the weights",
        "spo",
        model(lose_a_shard),
        "spo: actor.model_name=DIR/model: model-00002-of-00002.safetensors is listed in "
        "model.safetensors.index.json but missing, with 1 of 2 files in all; download the model again",
    ),
    Fault(
        "the tokenizer of another model",
        "spo",
        more_tokens,
        "spo: actor.model_name=DIR/model: its tokenizer produces token 653 from the data, but the model has 454; "
        "the tokenizer belongs to another model, or the model was not resized for it",
    ),
    Fault(
        "a tokenizer with an endless regular expression",
        "spo",
        endless_row,
        "spo: the tokenizers library failed (Onig: Regex search error: retry-limit-in-match over); the model's "
        "tokenizer.json may have a regular expression that does not terminate on some text",
    ),
    Fault(
        "an end token that the model does not have, in data",
        "dpo",
        model(another_end),
        "dpo: actor.model_name=DIR/model: its tokenizer produces token 454 from the data, but the model has 454; "
        "the tokenizer belongs to another model, or the model was not resized for it",
    ),
    Fault(
        "an end token that the model does not have, in sampling",
        "spo",
        model(another_end),
        "spo: actor.model_name=DIR/model: its responses end with token 454, but the model has 454; the tokenizer "
        "belongs to another model, or the model was not resized for it",
    ),
    Fault(
        "an environment that ends the program",
        "spo",
        environment("raise SystemExit(3)\n"),
        "spo: DIR/env.py cannot be imported: SystemExit: 3 (DIR/env.py:1)",
    ),
    Fault(
        "`step` does not return",
        "spo",
        blocked,
        "spo: none of the 4 trajectories has a reward; the most common causes: 4 times: step took longer than "
        "rollout.env_timeout_s=0.2",
    ),
    Fault(
        "a checkpoint of another model",
        "sft",
        smaller_model,
        "sft: trainer.load_ckpt_from=DIR/before/step_000001 belongs to a larger model: it also has "
        "model.lm.model.layers.1.input_layernorm.weight; its run had actor.model_name=larger, and here it is "
        "DIR/model",
    ),
    Fault(
        "a damaged checkpoint",
        "sft",
        damaged_checkpoint,
        "sft: trainer.load_ckpt_from=DIR/before/step_000001: DIR/before/step_000001 is damaged: random.safetensors is "
        "missing; resume from another checkpoint",
    ),
    Fault(
        "a folder that contains another run",
        "sft",
        another_run,
        "sft: trainer.save_dir=DIR/other already contains a run; resume it (trainer.load_ckpt_from=latest) or "
        "choose another trainer.save_dir",
    ),
    Fault(
        "an empty trainer.save_dir",
        "sft",
        overrides("trainer.save_dir="),
        "sft: trainer.save_dir is empty; name a folder",
    ),
    Fault(
        "a string for a number",
        "spo",
        overrides("actor.lr=fast"),
        "spo: actor.lr='fast'; expected a number",
    ),
    Fault(
        "an override without a value",
        "spo",
        overrides("actor.lr"),
        "spo: 'actor.lr' is not an override; write key=value",
    ),
    Fault(
        "a batch that is larger than the data",
        "spo",
        overrides("train_data.prompts_per_rollout=100", "trainer.max_steps=null"),
        "spo: a batch of 100 is more than 1 epoch(s) of 24 rows hold; lower the batch or raise trainer.n_epochs",
    ),
    Fault(
        "nothing to compare a response with",
        "ppo",
        overrides("train_data.prompts_per_rollout=1", "train_data.responses_per_prompt=1"),
        "ppo: adv.estimator=reinforce compares a response with others, and a step has only one; raise "
        "train_data.responses_per_prompt or train_data.prompts_per_rollout",
    ),
    Fault(
        "examples longer than a microbatch",
        "sft",
        lambda world, folder: [
            *data(json.dumps({"prompt": "1", "response": "1" * 70}), key="data.path")(world, folder),
            "actor.max_length_per_device=16",
        ],
        "sft: DIR/data.jsonl: a sequence of 71 tokens does not fit into actor.max_length_per_device=16; raise that to "
        "71, or lower data.max_length=128",
    ),
    Fault(
        "more processes per model than there are",
        "spo",
        overrides("actor.tp_size=3"),
        "spo: actor.ddp_size=1 x actor.sp_size=1 x actor.tp_size=3 = 3 does not divide the 1 processes (1 = "
        "ddp_size x FSDP shards x sp_size x tp_size)",
    ),
    Fault(
        "rows nested too deep",
        "spo",
        data('{"prompt": "a", "extra_info": ' + "[" * 100_000),
        "spo: DIR/data.jsonl, row 1: line 1: lists or objects are nested too deeply; "
        "train_data.on_bad_row=skip continues without such rows",
    ),
    Fault(
        "a setting that has no effect",
        "spo",
        overrides("trainer.keep=2"),
        "spo: trainer.keep=2 has no effect without trainer.save_freq",
    ),
]


def said(fault: Fault, world: World, folder: Path) -> tuple[str, float]:
    """The last words of the program, and the seconds until then."""
    settings = [*world.settings(fault.program), f"trainer.save_dir={folder}/run", *fault.prepare(world, folder)]
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["", *settings])
        with pytest.raises(SystemExit) as ended:
            main(fault.program)
    assert isinstance(ended.value.code, str), "a text is printed, and the exit code is 1"
    text = re.sub(r"\s+", " ", ended.value.code).replace(str(folder), "DIR")
    return text, time.monotonic() - started


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_is_named(fault: Fault, world: World, tmp_path: Path) -> None:
    text, seconds = said(fault, world, tmp_path)
    assert text == fault.said
    assert seconds < LIMIT_S
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "nothing was begun that would have to be undone"


@pytest.mark.parametrize("program", ["spo", "rm"])
def test_a_tokenizer_without_a_padding_token_is_none(program: str, world: World, tmp_path: Path) -> None:
    def forget(model: Path) -> None:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        assert settings.pop("pad_token")
        (model / "tokenizer_config.json").write_text(json.dumps(settings))

    [named] = model(forget)(world, tmp_path)
    named = named.replace("actor", "critic") if program == "rm" else named
    world.run(program, named, "trainer.max_steps=1").succeeded()


def test_the_document_lists_them() -> None:
    rows = ["| mistake | message |\n", "|---|---|\n"]
    rows += [f"| {fault.what} | `{fault.said.replace('|', chr(92) + '|').replace('`', '')}` |\n" for fault in FAULTS]
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    if os.environ.get("RL2_WRITE_DOCS"):
        DOCUMENT.write_text(before + BEGIN + "".join(rows) + END + after, encoding="utf-8")
        return
    assert table == "".join(rows), "RL2_WRITE_DOCS=1 pytest tests/integration/test_user_faults.py writes it anew"
