"""What README and docs show works: Python blocks are run, commands go through the doors that users' go through.

A page is one place, a folder with the repository's files, and one namespace; its blocks come in their order. Nothing is
trained: a program checks its configuration, as before every run. A command that is not known here fails.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_configs import minimal
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase
from typer.main import get_command

from RL2.config.legacy_keys import RULES
from RL2.config.load import FREE_GROUPS, load, show
from RL2.config.programs import PROGRAMS, RLConfig, SFTConfig
from RL2.config.values import build, keys
from RL2.errors import ConfigError
from RL2.rollout.environment import load_environment
from RL2.tools import sweep
from RL2.tools.check_advantage import check as check_advantage
from RL2.tools.check_objective.main import check
from RL2.tools.cli import app
from RL2.tools.eval import evaluate
from RL2.tools.keys import annotated, table
from RL2.tools.keys import page as page_of_keys
from RL2.tools.plan.command import PlanRequest
from RL2.tools.settings import parse_settings
from RL2.trainer.unused_settings import refuse_advantage_objectives, refuse_unused_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
SHOWN = ("", "text", "json", "math", "py")
"""Languages of blocks that show what comes out, formulas, and programs of other libraries (`py`)."""
FILES = ("train.jsonl", "rows.jsonl", "runs/demo/data/train.jsonl", "runs/demo/data/test.jsonl")
"""Data that commands name; what is in them does not matter here."""
OF_OTHERS = ("python -m sglang.launch_server ", "python RL2/engines/vllm/plugin/launch.py ")
"""Servers of SGLang and vLLM; their options, which are not ours, are not checked."""
KEYS = {program: set(keys(cls)) for program, cls in PROGRAMS.items()}
GROUPS = {
    program: {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
    for program, keys in KEYS.items()
}
FREE = {group.rstrip(".") for group in FREE_GROUPS}
"""Groups with names of the user's own."""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMMANDS: Any = get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that its first line gives it: `# mine.py`."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)]


def spans(page: Path) -> Iterator[str]:
    """Code within the text."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Random models that the pages load: language models and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)
    for name, cls in {"lora": LlamaForCausalLM, "sft": LlamaForCausalLM, "rm": LlamaForSequenceClassification}.items():
        cls(config).save_pretrained(folder / name / "latest")
        tokenizer.save_pretrained(folder / name / "latest")
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader of a page is."""
    for name in ("RL2", "benchmarks", "docs", "envs", "examples", "requirements", "tests", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ckpts").symlink_to(models)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    for block in blocks(ROOT / "docs" / "own_objective.md"):  # other pages train with its script
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    monkeypatch.setenv("OPENAI_API_KEY", "of an episode")  # agents make their clients when they are imported
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_what_a_page_shows_works(page: Path, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text)
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "sh":
            for command in commands(block.text):
                follow(command, place)
        elif block.language == "yaml":
            assert block.file, f"a YAML block needs its file's name in its first line:\n{block.text}"
            assert sweep.read(Path(block.file), seeds=1, folder=place / "sweep").jobs
        else:
            assert block.language in SHOWN, f"nobody checks blocks in {block.language}"
            assert not re.match(r"\s*(rl2|make|python|torchrun) ", block.text), f"a command is sh:\n{block.text}"


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    before = set(namespace)
    exec(compile(block.text, block.file or "block.py", "exec"), namespace)  # texts of this repository
    for name in set(namespace) - before:
        if name.startswith("test_"):
            namespace[name]()
    if block.file and "async def step" in block.text:
        environment = load_environment(block.file, timeout_s=10)
        environment.close()
        for action, earned in (("2", 1), ("3", 0)):
            result = asyncio.run(namespace["step"]("1 + 1 = ", action, {"answer": "2"}))
            reward = result["reward"]
            assert (reward["correct"] if isinstance(reward, dict) else reward) == earned
            assert result["done"] or not earned


def commands(text: str) -> list[list[str]]:
    """The words of each, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def follow(words: list[str], place: Path) -> None:
    """Through the door of the command; raises or fails if it does not open."""
    words = [word.replace("$PWD", str(place)) for word in words]
    while "=" in words[0] and re.match(r"[A-Z][A-Z_0-9]*=", words[0]):
        words = words[1:]
    if shlex.join(words).startswith(OF_OTHERS):
        return
    match words:
        case ["rl2", name, *rest]:
            rl2(name, rest)
        case ["torchrun", *rest]:
            given = get_args_parser().parse_args(rest)
            assert given.module, f"torchrun needs -m: {shlex.join(words)}"
            resolve(given.training_script, given.training_script_args)
        case ["python", "-m", module, *rest] if module.startswith("RL2.trainer."):
            resolve(module, rest)
        case ["python", script, *rest] if script.endswith(".py"):
            text = Path(script).read_text()
            assert [word for word in rest if word.startswith("--") and word.split("=")[0] not in text] == []
        case ["bash", script, *rest] | [script, *rest] if script.startswith("examples/"):
            environment = os.environ | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(["bash", script, *rest], env=environment, capture_output=True, text=True, check=True)
            follow(["torchrun", *done.stdout.splitlines()], place)
        case ["make", *targets]:
            assert set(targets) <= targets_of_make()
        case ["pip", "install", *packages]:
            asked = {extra for package in packages for extra in re.findall(r"\w[\w-]*", package.partition("[")[2])}
            assert asked <= set(EXTRAS), f"no such extra: {asked - set(EXTRAS)}"
            assert any(package.startswith((".", "rl2-spo")) for package in packages), f"of whom? {packages}"
        case ["pytest", folder]:
            assert list(Path(folder).glob("test_*.py")), f"no tests in {folder}"
        case ["git", "clone", *_] | ["cd", _] | ["export", *_] | ["source", ".venv/bin/activate"]:
            pass
        case _:
            pytest.fail(f"nobody checks this command: {shlex.join(words)}")


def resolve(module: str, overrides: list[str]) -> None:
    """Through the program's door, up to where it looks at data and models, which are not here.

    `...` stands for what every run of the program needs.
    """
    program = module.removeprefix("RL2.trainer.")
    if "..." in overrides:
        overrides = [*minimal(program), *(override for override in overrides if override != "...")]
    config = load(program, overrides)
    if isinstance(config, RLConfig):
        refuse_unused_settings(config)
    elif isinstance(config, SFTConfig):
        refuse_advantage_objectives(config)


def rl2(name: str, words: list[str]) -> None:
    context = COMMANDS[name].make_context(name, list(words))
    given = context.params
    if name == "train":
        resolve(f"RL2.trainer.{given['program']}", list(given["settings"] or ()))
    elif name == "check-objective":
        knobs = {k: float(v) for k, _, v in (word.partition("=") for word in given["knobs"] or ())}
        assert all(finding.passed for finding in check(given["objective"], knobs))
    elif name == "check-advantage":
        knobs = {k: float(v) for k, _, v in (word.partition("=") for word in given["knobs"] or ())}
        assert all(finding.passed for finding in check_advantage(given["estimator"], knobs))
    elif name == "eval":
        env = parse_settings(evaluate.EvalConfig, given["settings"]).env
        assert env is None or Path(env).is_file()
    elif name == "audit-env":
        assert given["env"].is_file()
    elif name == "keys":
        table(given["program"], given["word"])
    elif name == "config":
        annotated(given["program"], given["settings"] or [])
    elif name == "plan":
        parse_settings(PlanRequest, given["settings"])


def targets_of_make() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_the_text_are_there(page: Path) -> None:
    """Keys with their values, subcommands with their options, targets of make, files of the repository."""
    wrong = [f"`{span}`: {why}" for span in spans(page) if (why := what_is_wrong(span, page))]
    assert wrong == []


def what_is_wrong(span: str, page: Path) -> str | None:
    if page.stem == "coming_from" and re.search(rf"^\| [^|]*`{re.escape(span)}`", page.read_text(), re.MULTILINE):
        return None  # the first column has other libraries' names
    first, *rest = span.split()
    if first == "make" and rest and rest[0] not in targets_of_make():
        return "no such target"
    if first == "rl2" and rest and re.match(r"[a-z]", rest[0]):
        if rest[0] not in COMMANDS:
            return "no such subcommand"
        options = {option for parameter in COMMANDS[rest[0]].params for option in parameter.opts} | {"--help"}
        return next((f"no option {word}" for word in rest if word.startswith("--") and word not in options), None)
    if re.match(r"(RL2|benchmarks|docs|envs|examples|requirements|tests)/", span) and not span.endswith("/"):
        path = span.split()[0].partition(":")[0]
        return None if any(ROOT.glob(path)) else "no such file"
    if re.match(r"(actor|critic|ref_actor|teacher|rollout|reward|adv|trainer|data|train_data|test_data)\.[a-z]", span):
        return what_is_wrong_with_keys(span.split())
    return None


def what_is_wrong_with_keys(words: list[str]) -> str | None:
    """Words that are not KEY or KEY=VALUE stand there to be read."""
    words = [word for word in words if re.fullmatch(r"[a-z_0-9]+(\.\w+)+(\.\*)?(=.*)?", word)]
    words = [word for word in words if word.partition("=")[0] not in RULES.keys() - set().union(*KEYS.values())]
    knowing = set(PROGRAMS) - {"spo_0p5", "path"}
    for word in words:
        key = word.partition("=")[0].removesuffix(".*").removesuffix(".NAME")
        group = key.rpartition(".")[0]
        knowing &= {p for p, keys in KEYS.items() if key in keys | GROUPS[p] or group in keys & FREE}
        if not knowing:
            return None if key.endswith((".json", ".jsonl", ".py")) else f"no program has the key {key}"
    settings = tuple(word for word in words if re.search(r"=[^A-Z.]", word))
    errors = [error for program in sorted(knowing) if settings and (error := malformed(program, settings))]
    return errors[0] if len(errors) == len(knowing) else None


def malformed(program: str, settings: tuple[str, ...]) -> str | None:
    """As `load` would say it, which takes a hundred times as long."""
    values = deepcopy(resolved(program))
    for override in OverridesParser.create().parse_overrides(list(settings)):
        *groups, name = override.key_or_group.split(".")
        place = reduce(dict.__getitem__, groups, values)
        place[name] = override.value()
    try:
        build(PROGRAMS[program], values, "")
    except ConfigError as error:
        # a setting that only wants another one beside it is well formed
        return str(error) if re.search(r"choose|expected|must be|is a group|nothing reads", str(error)) else None
    return None


@cache
def resolved(program: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.create(show(load(program, minimal(program)))))  # type: ignore[return-value]


@pytest.mark.parametrize("program", ["sft", "rm", "dpo"])
def test_defaults_on_the_page_of_a_program_are_its_own(program: str) -> None:
    page = (ROOT / "docs" / f"{program}.md").read_text()
    said = re.findall(r"^\| `([\w.]+)` \|.*?([\d.e-]+) unless set", page, re.MULTILINE)
    assert said
    for key, value in said:
        assert float(value) == reduce(lambda of, name: of[name], key.split("."), resolved(program)), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """The site's own build checks those between its pages once more."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_page_of_all_keys_is_up_to_date_and_has_them_all() -> None:
    text = (ROOT / "docs" / "keys.md").read_text()
    assert text == page_of_keys(), "run python -m RL2.tools.keys > docs/keys.md"
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    assert {key for key, _, _ in rows} == set().union(*KEYS.values())
    default = {(key, default) for key, default, _ in rows}
    assert ("trainer.timeout_s", "`1800`") in default
    assert ("actor.tis_coef", "`2.0` (ppo); `0.0` (spo, spo_0p5, path, distill)") in default
    assert ("data.path", "*required*") in default
