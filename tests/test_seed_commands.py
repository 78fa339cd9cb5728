"""Commands of RL2 and of the SPO fork run as they are, to the end of a dry run; the table of their keys holds."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from test_docs import KEYS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from RL2.config.legacy_keys import REASONS, RULES, TABLE, rows
from RL2.config.load import FREE_GROUPS, load, renamed
from RL2.errors import ConfigError
from RL2.trainer.launch import main

ROOT = Path(__file__).resolve().parents[1]
COMMANDS: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "tests" / "seed_commands.yaml").read_text())
OBJECTIVES = list(TABLE["actor.path.objective"])


def commands() -> list[Any]:
    """Return every command under its name, those of the fork's experiments once for each objective."""
    found = []
    for form, of_form in COMMANDS.items():
        for name, text in of_form.items():
            for objective in OBJECTIVES if "OBJECTIVE" in text else [""]:
                words = shlex.split(text.replace("OBJECTIVE", objective))
                # the keys of these are in other commands too, or in `SAME`
                marks = [pytest.mark.slow] if form == "between" or objective not in ("", "rank_jsd") else []
                found.append(
                    pytest.param(*words[:1], words[1:], marks=marks, id="-".join(filter(None, (form, name, objective))))
                )
    return found


MODELS = {
    word.partition("=")[2] for _, words in (c.values for c in commands()) for word in words if "model_name=" in word
}


def chat(n: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{n}+1"}], "extra_info": {"answer": str(n + 1)}} | more


def spoken(n: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{n}+1"}, {"role": "assistant", "content": answer}]


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "Chenmien/LIMO": lambda n: {"messages": spoken(n, str(n + 1))},
    "Chenmien/SkyworkRM": lambda n: {"chosen": spoken(n, str(n + 1)), "rejected": spoken(n, "0")},
    "Chenmien/UltraFeedback": lambda n: {"chosen": spoken(n, str(n + 1)), "rejected": spoken(n, "0")},
    "Chenmien/OpenReasonerZero": chat,
    "Chenmien/OlympiadBench": chat,
    "Chenmien/SearchR1": chat,
    "Chenmien/Countdown": lambda n: {"prompt": f"make {n + 8}", "extra_info": {"target": n + 8, "nums": [n, 8]}},
    "openai/gsm8k": lambda n: {"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1}"},
}
NUM_ROWS = {"openai/gsm8k": 520, "Chenmien/OpenReasonerZero": 640}
"""Those of which a command wants more than 256: train[500:], or more steps than the four of the critic alone."""
CARD = """\
---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""


NO_THINKING = """\
{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}
<think></think>
{% endif -%}
"""
"""The end of a chat template that reads `enable_thinking`, as that of Qwen3 does."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder in which the hub's names are folders."""
    root = tmp_path_factory.mktemp("hub")
    model = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=1 << 15,
    )
    LlamaForCausalLM(model).save_pretrained(root / "model")
    thinking = deepcopy(tokenizer)
    thinking.chat_template = f"{thinking.chat_template}{NO_THINKING}"
    thinking.save_pretrained(root / "model")
    for name in MODELS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(root / "model")
    for name, row in ROWS.items():
        (root / name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = (json.dumps(row(n)) + "\n" for n in range(NUM_ROWS.get(name, 256) if split == "train" else 8))
            (root / name / f"{split}.jsonl").write_text("".join(lines))
    (root / "openai" / "gsm8k" / "README.md").write_text(CARD)
    (root / "envs").symlink_to(ROOT / "envs")
    return root


@pytest.fixture
def dry_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, list[str]], str]:
    monkeypatch.chdir(world)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", world / "cache")

    def run(program: str, overrides: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", [program, *overrides, "trainer.dry_run=true"])
        main(program)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("program", "overrides"), commands())
def test_a_command_runs_dry_as_it_stands(
    program: str, overrides: list[str], dry_run: Callable[[str, list[str]], str]
) -> None:
    said = dry_run(program, overrides)
    assert said.splitlines()[-1] == "dry run: all checks passed"
    assert said.splitlines()[: len(renamed(program, overrides))] == renamed(program, overrides)


@pytest.mark.slow
def test_a_command_on_two_processes_says_once_what_its_keys_became(world: Path) -> None:
    """The whole way, through torchrun."""
    program, *overrides = shlex.split(COMMANDS["fork_experiments"]["run_path"].replace("OBJECTIVE", "rank_jsd"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", f"RL2.trainer.{program}", *overrides, "trainer.dry_run=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(world / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if " -> " in line] == renamed(program, overrides)
    assert lines[-1] == "dry run: all checks passed"


MODEL = ["actor.model_name=m", "actor.max_length_per_device=512", "trainer.experiment_name=e"]
RL = [*MODEL, "train_data.path=a", "train_data.prompts_per_rollout=4", "rollout.env_path=e"]
RL += ["rollout.train_sampling_params.max_new_tokens=16"]
SFT = [*MODEL, "data.path=a", "data.max_length=64"]
SPO = "actor.objective=spo"

SAME = [
    ("ppo", RL, "actor.kl.type=null", "actor.kl.coef=0"),
    ("ppo", RL, "kl.type=loss kl.coef=0.1 kl.loss_estimator=k3", "actor.kl.coef=0.1 actor.kl.estimator=k3"),
    (
        "ppo",
        RL,
        "actor.kl.type=reward actor.kl.coef=0.1 actor.kl.reward_estimator=k1",
        "actor.kl.type=reward actor.kl.coef=0.1 actor.kl.estimator=k1",
    ),
    # what RL2's README says to set for PPO and for GRPO
    (
        "ppo",
        RL,
        "kl.type=reward kl.reward_estimator=k1 adv.estimator=gae",
        "actor.kl.type=reward actor.kl.estimator=k1 adv.estimator=gae",
    ),
    (
        "ppo",
        RL,
        "actor.avg_level=sequence kl.type=loss kl.loss_estimator=k3 adv.norm_var=true",
        "actor.avg_level=sequence actor.kl.type=loss actor.kl.estimator=k3 adv.norm_var=true",
    ),
    ("ppo", RL, "actor.optimizer.lr=3e-6 actor.scheduler.name=cosine", "actor.lr=3e-6 actor.scheduler=cosine"),
    ("ppo", RL, "critic.optimizer.weight_decay=0.5", "critic.weight_decay=0.5"),
    ("ppo", RL, "rollout.train.sampling_params.top_k=-1", "rollout.train_sampling_params.top_k=0"),
    ("ppo", RL, "rollout.train.sampling_params.no_stop_trim=true", ""),
    (
        "ppo",
        RL,
        "+rollout.train.sampling_params.top_p=0.9 actor.tis_coef=0",
        "rollout.train_sampling_params.top_p=0.9 actor.tis_coef=0",
    ),
    ("ppo", RL, "rollout.train.partial_rollout=False", "rollout.partial_rollout=0"),
    ("ppo", RL, "rollout.partial_rollout=true", "rollout.partial_rollout=0.5 rollout.max_staleness=1"),
    ("ppo", RL, "rollout.train.max_turns=3 rollout.test.max_turns=3", "rollout.max_turns=3"),
    ("ppo", RL, "rollout.test.sampling_params.temperature=0.5", "rollout.test_sampling_params.temperature=0.5"),
    ("ppo", RL, "rollout.train.prompt_key=q", "train_data.columns.prompt=q"),
    ("ppo", RL, "rollout.test.apply_chat_template=true", "test_data.columns.prompt=null"),
    ("ppo", RL, "actor=fsdp actor.attn_implementation=sdpa", ""),
    ("ppo", RL, "trainer.disable_wandb=false trainer.total_steps=5", "trainer.use_wandb=true trainer.max_steps=5"),
    ("sft", SFT, "data.train.prompt_key=q data.test.prompt_key=q", "data.columns.prompt=q"),
    ("sft", SFT, "data.test.path=b trainer.test_freq=5", "data.test_path=b trainer.test_freq=5"),
    ("spo", RL, "actor.path.objective=bernoulli_kl_detached", f"{SPO} actor.path.detach_target=true"),
    (
        "spo",
        RL,
        "actor.path.objective=bernoulli_kl_legacy actor.path.rank_cap=64",
        f"{SPO} actor.path.detach_target=false",
    ),
    ("spo", RL, "actor.path.objective=fixed_half", "actor.objective=spo_0p5 actor.path.region=all"),
    ("spo", RL, "actor.path.objective=fixed_half_legacy", "actor.objective=spo_0p5 actor.path.region=above_half"),
    ("spo", RL, "actor.path.objective=rank_kl", "actor.objective=rank_kl actor.objective_args.rank_cap=64"),
    (
        "spo",
        RL,
        "actor.path.objective='rank_jsd' actor.path.rank_cap=7",
        "actor.objective=rank_jsd actor.objective_args.rank_cap=7",
    ),
    ("path", RL, "", "actor.objective=rank_jsd actor.objective_args.rank_cap=64"),
    (
        "path",
        RL,
        "train_data.enable_thinking=false test_data.enable_thinking=false",
        "actor.chat_template_kwargs.enable_thinking=false",
    ),
    ("path", RL, "actor.path.objective=positive_ce", "actor.objective=positive_ce"),
    (
        "path",
        RL,
        "actor.path.token_entropy_quantile=0.8 actor.path.normalize_selected_tokens=true",
        "actor.select.entropy_quantile=0.8 actor.average_over=kept",
    ),
    (
        "path",
        RL,
        "actor.path.token_entropy_quantile=0.8",
        "actor.select.entropy_quantile=0.8 actor.average_over=correct",
    ),
]


@pytest.mark.parametrize(("program", "base", "there", "here"), SAME, ids=[f"{row[0]} {row[2]}" for row in SAME])
def test_a_setting_there_is_this_here(program: str, base: list[str], there: str, here: str) -> None:
    tests = ["test_data.path=b"] if program == "path" else []
    assert load(program, [*base, *tests, *there.split()]) == load(program, [*base, *tests, *here.split()])


ONE = "are one setting here,"
NOT_FOLLOWED = {
    "actor.lr=1 actor.optimizer.lr=2": f"actor.lr=1 and actor.optimizer.lr=2 {ONE} actor.lr; give one value",
    "train_data.path=x rollout.train.path=y": (
        f"train_data.path=x and rollout.train.path=y {ONE} train_data.path; give one value"
    ),
    "actor.kl.type=null actor.kl.coef=1": (
        f"actor.kl.type=null and actor.kl.coef=1 {ONE} actor.kl.coef; give one value"
    ),
    "rollout.test.max_turns=2": (
        "rollout.test.max_turns=2: tests share rollout.max_turns with training here; give rollout.max_turns=2 for both"
    ),
    "actor.kl.loss_estimator=k3": "actor.kl.loss_estimator=k3 has no effect without actor.kl.type=loss",
    "actor.kl.type=loss actor.kl.reward_estimator=k1": (
        "actor.kl.reward_estimator=k1 has no effect without actor.kl.type=reward or advantage"
    ),
    "rollout.train.sampling_params.no_stop_trim=false": (
        "rollout.train.sampling_params.no_stop_trim=false: it can only be true here"
    ),
    "actor.path.objective=best": f"actor.path.objective=best: it can only be {' or '.join(OBJECTIVES)} here",
}
NOT_FOLLOWED |= {
    setting: f"{setting}: {REASONS[key]}"
    for key, setting in {
        "actor=megatron": "actor=megatron",
        "critic.tf_config.*": "critic.tf_config.tensor_model_parallel_size=2",
        "ref_actor.cp_size": "ref_actor.cp_size=2",
        "rollout.server_args.*": "rollout.server_args.dp_size=1",
        "rollout.test_ratio": "rollout.test_ratio=0.03",
        "trainer.stop_file": "trainer.stop_file=STOP",
    }.items()
}


@pytest.mark.parametrize(("overrides", "message"), NOT_FOLLOWED.items(), ids=list(NOT_FOLLOWED))
def test_what_is_not_here_or_contradicts_itself_is_refused(overrides: str, message: str) -> None:
    base = [setting for setting in RL if not setting.startswith("train_data.path")]
    with pytest.raises(ConfigError) as caught:
        load("ppo", [*base, *overrides.split()])
    assert str(caught.value) == message


def test_of_one_key_the_last_value_counts_and_equal_values_agree() -> None:
    twice = ["rollout.train.path=x", "rollout.train.path=y", "actor.lr=1e-6", "actor.optimizer.lr=0.000001"]
    base = [setting for setting in RL if not setting.startswith("train_data.path")]
    assert load("ppo", [*base, *twice]).train_data.path == "y"


def test_own_keys_are_left_alone() -> None:
    assert [renamed(program, [*RL, "actor.kl.type=loss"]) for program in ("ppo", "spo")] == [[], []]


def test_every_row_of_the_table_leads_to_a_key() -> None:
    known = set().union(*KEYS.values()) | {"actor", "critic"}
    wrong = []
    for there, rule in RULES.items():
        for setting in [rule] if isinstance(rule, str) else " ".join(rule.values()).split():
            key = setting.partition("=")[0].removesuffix(".*")
            is_group = any(name.startswith(f"{key}.") for name in known)
            if key not in known and not is_group and not key.startswith(FREE_GROUPS):
                wrong.append(f"{there}: {key}")
    assert wrong == []


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    table = "\n".join(["| there | here |", "|---|---|", *(f"| {there} | {here} |" for there, here in rows())])
    assert table in page, f"docs/coming_from.md needs this table:\n{table}"
