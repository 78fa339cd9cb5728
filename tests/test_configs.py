"""Every program's YAML loads, every knob says what it means, and every mistake is answered in the user's words."""

from __future__ import annotations

import ast
import inspect
import re
import resource
import subprocess
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from RL2.config import data, model, programs, rollout, rules, trainer
from RL2.config.here import check_here
from RL2.config.load import composed, load, show
from RL2.config.model import num_shards
from RL2.config.programs import PROGRAMS, RLConfig, trained
from RL2.config.values import defaults
from RL2.errors import ConfigError
from RL2.trainer.estimator_rules import check_estimator

ROOT = Path(__file__).resolve().parents[1]
YAMLS = ROOT / "RL2" / "trainer" / "config"

MODEL = ("actor.model_name=model", "actor.max_length_per_device=512", "trainer.experiment_name=test")
SFT = ("data.path=rows.jsonl", "data.max_length=512", *MODEL)
RL = (
    "train_data.path=rows.jsonl",
    "train_data.prompts_per_rollout=4",
    "rollout.train_sampling_params.max_new_tokens=16",
    f"rollout.env_path={ROOT}/envs/gsm8k.py",
    *MODEL,
)


PAIRS = ("data.path=rows.jsonl", "data.max_length=256")
RM = (*PAIRS, *(override.replace("actor.", "critic.") for override in MODEL))
DPO = (*PAIRS, *MODEL)


def minimal(program: str) -> tuple[str, ...]:
    of_rl = {"path": (*RL, "test_data.path=rows.jsonl"), "distill": (*RL, "teacher.model_name=teacher")}
    return ({"sft": SFT, "rm": RM, "dpo": DPO} | of_rl).get(program, RL)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_needs_few_overrides_and_shows_what_it_resolved(program: str) -> None:
    loaded = load(program, minimal(program))
    group, model = trained(loaded)
    assert model.model_name == "model"
    assert loaded.trainer.save_dir == "ckpts/test"
    shown = OmegaConf.create(show(loaded))
    assert shown[group].max_length_per_device == 512


@pytest.mark.parametrize(
    ("program", "missing"),
    [
        (program, i)
        for program, given in {"ppo": RL, "sft": SFT, "rm": RM, "dpo": DPO}.items()
        for i in range(len(given))
        if not given[i].startswith("train_data.path")  # an environment may make up tasks
    ],
)
def test_what_the_minimum_lacks_is_asked_for(program: str, missing: int) -> None:
    given = minimal(program)
    key = given[missing].partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load(program, given[:missing] + given[missing + 1 :])
    assert str(caught.value) == f"{key} is not set; pass {key}=..."


def test_all_that_the_minimum_lacks_is_asked_for_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("sft", SFT[1:3])
    assert str(caught.value) == (
        "3 keys are not set; pass data.path=... actor.max_length_per_device=... trainer.experiment_name=... "
        "(`rl2 keys sft` explains them)"
    )


def test_every_program_has_a_yaml_and_a_module() -> None:
    assert {path.stem for path in YAMLS.glob("*.yaml")} == set(PROGRAMS)
    assert all((ROOT / "RL2" / "trainer" / f"{program}.py").is_file() for program in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_yaml_has_only_what_its_program_changes(program: str) -> None:
    given: Any = OmegaConf.to_container(OmegaConf.load(YAMLS / f"{program}.yaml"))
    base = given.pop("defaults")[0]
    before = composed(base, [])[0] if base in PROGRAMS else defaults(PROGRAMS[program])
    if base not in PROGRAMS:
        assert base == PROGRAMS[program].__name__
    assert leaves(given) and leaves(given).keys() <= leaves(before).keys()
    assert [key for key, value in leaves(given).items() if leaves(before)[key] == value] == []


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_every_rule_has_a_program() -> None:
    listed = {*rules.RL_RULES, *rules.SFT_RULES, *rules.RM_RULES, *rules.DPO_RULES}
    functions = [f for name, f in vars(rules).items() if inspect.isfunction(f) and f.__module__ == rules.__name__]
    assert {f for f in functions if not f.__name__.startswith("_")} - {rules.check, rules.check_limit} == listed
    assert all(f.__doc__.startswith("Refuse ") for f in listed)


def knobs() -> dict[str, bool]:
    """Class.field -> whether a text stands below it; without the fields that are groups of others."""
    found = {}
    modules = (data, model, programs, rollout, trainer)
    for module, node in ((m, node) for m in modules for node in ast.walk(ast.parse(inspect.getsource(m)))):
        cls = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if not is_dataclass(cls):
            continue
        hints = typing.get_type_hints(cls)
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and not is_dataclass(hints[statement.target.id]):
                text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                found[f"{node.name}.{statement.target.id}"] = text and isinstance(following.value.value, str)
    return found


def test_every_knob_says_what_it_means() -> None:
    found = knobs()
    assert len(found) > 70
    assert [name for name, has_text in found.items() if not has_text] == []


MISTAKES = [
    ("actor.kl.estimator=k9", "actor.kl.estimator='k9'; choose one of k1, k2, k3, exact"),
    ("actor.kl.esimator=k2", "ppo has no key 'actor.kl.esimator'; did you mean actor.kl.estimator?"),
    ("+actor.kl.esimator=k2", "nothing reads actor.kl.esimator"),
    ("zzz=1", "ppo has no key 'zzz'"),
    ("actor.lr", "'actor.lr' is not an override; write key=value"),
    ("actor.lr=fast", "actor.lr='fast'; expected a number"),
    ("actor.lr=nan", "actor.lr=nan; expected a finite number"),
    ("actor.lr=-1", "actor.lr=-1; must be at least 0"),
    ("actor.lr=null", "actor.lr is not set; pass actor.lr=..."),
    ("actor.clip=0", "actor.clip=0; must be above 0"),
    ("actor.warmup_ratio=1.5", "actor.warmup_ratio=1.5; must be at least 0 and at most 1"),
    ("actor.update_per_rollout=2.5", "actor.update_per_rollout=2.5; expected an integer"),
    ("actor.update_per_rollout=0", "actor.update_per_rollout=0; must be at least 1"),
    ("actor.use_liger_kernel=1", "actor.use_liger_kernel=1; expected true or false"),
    ("actor.betas=0.9", "actor.betas=0.9; expected a list: 'actor.betas=[...]'"),
    ("actor.betas=[0.9,2]", "actor.betas[1]=2; must be at least 0 and at most 1"),
    ("actor.kl=0.1", "actor.kl=0.1; actor.kl is a group: set actor.kl.NAME=value"),
    ("rollout.tp_size=2", "rollout.tp_size=2; choose 1"),
    ("rollout.model_name=other", "rollout.model_name='other' is not actor.model_name='model'"),
    ("actor.avg_length=5", "actor.avg_length has no effect with actor.avg_level=token"),
    ("actor.select.entropy_quantile=1", "actor.select.entropy_quantile=1; must be at least 0 and at most 0.999"),
    ("adv.overlong_buffer=17", "adv.overlong_buffer=17 is more than rollout.train_sampling_params.max_new_tokens=16"),
    ("adv.overlong_penalty=2", "adv.overlong_penalty has no effect with adv.overlong_buffer=0"),
    ("trainer.max_logprob_gap=0", "trainer.max_logprob_gap=0; must be above 0"),
    (
        "trainer.test_freq=5",
        "trainer.test_freq=5 needs test_data.path, or test_data.prompts_per_rollout tasks that the environment "
        "generates, or test_data.sets",
    ),
    ("trainer.keep=2", "trainer.keep=2 has no effect without trainer.save_freq"),
    ("trainer.keep_best=true", "trainer.keep_best=true has no effect without trainer.test_freq"),
    ("trainer.early_stop=true", "trainer.early_stop=true has no effect without trainer.test_freq"),
    (
        "trainer.eval_only=true",
        "trainer.eval_only=true needs test_data.path, test_data.prompts_per_rollout or test_data.sets",
    ),
    ("adv.gamma=0.9", "adv.gamma=0.9 has no effect with adv.estimator=reinforce"),
    ("adv.lamda=0.9", "adv.lamda=0.9 has no effect with adv.estimator=reinforce"),
    ("actor.freeze_steps=3", "actor.freeze_steps=3 has no effect with adv.estimator=reinforce"),
    (
        "rollout.dynamic_filtering_rounds=2",
        "rollout.dynamic_filtering_rounds=2 has no effect with rollout.dynamic_filtering=false",
    ),
    ("actor.average_over=correct", "actor.average_over=correct needs actor.train_on=correct"),
    (
        "actor.average_over=kept",
        "actor.average_over=kept has no effect: actor.train_on=all and actor.select keep everything",
    ),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_answered_with_the_override_to_change(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted(*RL, override)
    assert str(caught.value) == message


def accepted(*overrides: str) -> RLConfig:
    """Return the configuration of `ppo`, with the settings of its estimator checked as before a run."""
    config: RLConfig = load("ppo", overrides)
    check_estimator(config)
    return config


REFUSED_BY_HYDRA = [
    ("actor.betas=[0.9", "actor.betas=[0.9: [ and ] do not match"),
    ("actor.lr=${trainer.seed", "actor.lr=${trainer.seed: { and } do not match"),
    ("trainer.project='a", "trainer.project='a: a quotation mark is missing"),
    (
        "test_data.path=a,b",
        "test_data.path=a,b: one value is expected; write a list as 'test_data.path=[a,b]', "
        "a string as 'test_data.path=\"a,b\"'",
    ),
    (
        "trainer.project=a=b",
        "trainer.project=a=b: put a value with special characters in quotes: 'trainer.project=\"a=b\"'",
    ),
    (
        "rollout.vllm.args=[--x=1]",
        'rollout.vllm.args=[--x=1]: put items with special characters in quotes: \'rollout.vllm.args=["...","..."]\'',
    ),
    ("trainer.seed=range(1,3)", "trainer.seed=range(1,3): Hydra's sweeps are not supported; give one value "),
    ("actor.lr=${actor.rate}", "actor.lr=${actor.rate}: Interpolation key 'actor.rate' not found"),
    ("trainer.project=${trainer.project}", "trainer.project=${trainer.project}: Recursive interpolation detected"),
    ("trainer.project=${env:HOME}", "trainer.project=${env:HOME}: Unsupported interpolation type env"),
    ("~actor.lr", "~actor.lr: a key cannot be removed; give it a value, or null"),
    ("actor=null", "actor=null; actor is a group: set actor.NAME=value"),
    ("=3", "'=3' is not an override; write key=value"),
    ("actor@x=1", "ppo has no key 'actor@x'; did you mean actor.lr?"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED_BY_HYDRA, ids=[override for override, _ in REFUSED_BY_HYDRA])
def test_what_hydra_refuses_is_said_in_a_line_that_names_the_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("ppo", (*RL, override, "trainer.max_steps=3"))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
    assert "trainer.max_steps" not in str(caught.value)


SUPERVISED_MISTAKES = [
    ("sft", ("trainer.test_freq=5",), "trainer.test_freq=5 needs data.test_path or data.test_ratio"),
    ("rm", ("data.test_ratio=0.1",), "data.test_ratio=0.1 has no effect without trainer.test_freq"),
    ("dpo", ("data.test_ratio=0.1", "data.test_path=a"), "data.test_path=a and data.test_ratio=0.1: choose one"),
    ("sft", ("data.test_path=a",), "data.test_path=a has no effect without trainer.test_freq"),
    (
        "dpo",
        ("data.columns.chose=better",),
        "data.columns.chose: there is no such column; choose one of prompt, messages, response, chosen, rejected",
    ),
    (
        "sft",
        ("data.columns.prompt=[1]",),
        "data.columns.prompt=[1]; expected the name of a column, or null to ignore it",
    ),
    ("dpo", ("actor.label_smoothing=0.5",), "actor.label_smoothing=0.5; must be at least 0 and at most 0.499"),
    (
        "dpo",
        ("actor.reference_free=true", "ref_actor.model_name=other"),
        "ref_actor.model_name has no effect with actor.reference_free=true",
    ),
    ("rm", ("critic.beta=1",), "rm has no key 'critic.beta'; did you mean critic.betas?"),
]


@pytest.mark.parametrize(("program", "overrides", "message"), SUPERVISED_MISTAKES)
def test_a_mistake_in_supervised_programs(program: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(program, (*minimal(program), *overrides))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("program", "group"), [("sft", "actor"), ("dpo", "actor"), ("rm", "critic"), ("ppo", "actor"), ("ppo", "critic")]
)
def test_phases_of_a_schedule_that_overlap_are_named_by_their_model(program: str, group: str) -> None:
    overlap = [f"{group}.{x}" for x in ("scheduler=wsd", "warmup_ratio=0.8", "decay_ratio=0.5")]
    gae = ["adv.estimator=gae"] * (program == "ppo")
    with pytest.raises(ConfigError) as caught:
        load(program, (*minimal(program), *gae, *overlap))
    assert str(caught.value) == (
        f"{group}.warmup_ratio=0.8 and {group}.decay_ratio=0.5 overlap; together they must be at most 1"
    )


@pytest.mark.parametrize("estimator", ["rloo", "spo"])
@pytest.mark.parametrize("knob", ["global_norm", "norm_var"])
def test_knobs_of_reinforce_are_refused_elsewhere(estimator: str, knob: str) -> None:
    assert accepted(*RL, f"adv.estimator={estimator}").adv.estimator == estimator
    with pytest.raises(ConfigError, match=f"have no effect with adv.estimator={estimator}"):
        accepted(*RL, f"adv.estimator={estimator}", f"adv.{knob}=true")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ("adv.estimator=rloo adv.std_over=tokens", "adv.estimator=rloo"),
        ("adv.estimator=gae adv.norm_var=true adv.std_over=tokens", "adv.estimator=gae"),
        ("adv.std_over=tokens", "adv.norm_var=false"),
        ("adv.std_over=rollout adv.norm_var=true adv.global_norm=true", "the mean is over the whole rollout already"),
        ("adv.std_over=rollout adv.norm_var=true", "the mean is over the whole rollout already"),
    ],
)
def test_a_deviation_without_effect_is_refused(overrides: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"has no effect.*{why}"):
        accepted(*RL, "train_data.responses_per_prompt=1", *overrides.split())
    good = "train_data.responses_per_prompt=2 adv.std_over=rollout adv.norm_var=true"
    assert accepted(*RL, *good.split()).adv.std_over == "rollout"


def test_the_critic_takes_after_the_actor_and_must_hold_its_sequences() -> None:
    loaded = accepted(*RL, "adv.estimator=gae", "critic.lr=1e-5", "actor.freeze_steps=3", "adv.lamda=0.95")
    assert (loaded.critic.model_name, loaded.critic.lr, loaded.critic.max_length_per_device) == ("model", 1e-5, 512)
    for key in ("max_length_per_device", "max_inference_length_per_device"):
        message = f"critic.{key}=100 is less than actor.max_length_per_device=512, so a sequence may not fit"
        with pytest.raises(ConfigError, match=message):
            accepted(*RL, "adv.estimator=gae", f"critic.{key}=100", "critic.max_inference_length_per_device=100")


def test_a_file_that_is_not_there_is_named() -> None:
    named = {
        "ppo": ("rollout.env_path=envs/nothing.py", "train_data.path=nothing.parquet", "test_data.path=nothing.json"),
        "sft": (
            "data.path=nothing.jsonl",
            "data.test_path=nothing.csv trainer.test_freq=1",
            "data.env_path=envs/nothing.py",
        ),
    }
    for program, overrides in named.items():
        for override in overrides:
            # what is no file name is a hub data set
            rows = "data.path=rows" if program == "sft" else "train_data.path=owner/rows-v1.5"
            given = (*minimal(program), rows, *override.split())
            key, _, path = override.split()[0].partition("=")
            with pytest.raises(ConfigError) as caught:
                check_here(load(program, given))
            assert str(caught.value) == f"{key}={path}: there is no such file"


def test_a_mistake_ends_a_program_in_one_line() -> None:
    before = cpu_seconds_of_children()
    command = [sys.executable, "-m", "RL2.trainer.spo", *RL, "actor.kl.estimator=k9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "spo: actor.kl.estimator='k9'; choose one of k1, k2, k3, exact\n"
    assert cpu_seconds_of_children() - before < 5  # so before anything heavy is imported or loaded


def cpu_seconds_of_children() -> float:
    """Not the time on the clock, which says more about what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("sizes", "product"),
    [
        (("actor.tp_size=3",), "actor.ddp_size=1 x actor.sp_size=1 x actor.tp_size=3 = 3"),
        (("actor.ddp_size=2", "actor.sp_size=4"), "actor.ddp_size=2 x actor.sp_size=4 x actor.tp_size=1 = 8"),
        (("adv.estimator=gae", "critic.sp_size=8"), "critic.ddp_size=1 x critic.sp_size=8 x critic.tp_size=1 = 8"),
    ],
)
def test_a_layout_that_the_processes_do_not_allow(
    sizes: tuple[str, ...], product: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "x.jsonl").write_text("{}")
    paths = f"train_data.path={tmp_path}/x.jsonl", f"rollout.env_path={tmp_path}/x.jsonl"
    check = check_estimator if "adv.estimator=gae" in sizes else check_here
    with pytest.raises(ConfigError) as caught:
        check(load("ppo", (*RL, *paths, *sizes)))
    assert str(caught.value) == (
        f"{product} does not divide the 4 processes (4 = ddp_size x FSDP shards x sp_size x tp_size)"
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (("actor.ep_size=4", "actor.ddp_size=2"), "does not divide the 2 FSDP shards of a replica (4 processes /"),
        (("actor.ep_size=2", "actor.tp_size=2"), "needs actor.sp_size=1 and actor.tp_size=1, and they are 1 and 2"),
        (("actor.ep_size=2", "actor.use_liger_kernel=true"), "needs actor.use_liger_kernel=false"),
    ],
)
def test_experts_are_split_among_the_shards(sizes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sizes[0]} {re.escape(message)}"):
        num_shards(load("ppo", (*RL, *sizes)).actor, 4, "actor")


def test_a_longer_sequence_fits_on_more_processes() -> None:
    long = "rollout.train_sampling_params.max_new_tokens=20000", "actor.max_length_per_device=8192"
    load("ppo", (*RL, *long, "actor.sp_size=4"))
    with pytest.raises(ConfigError, match=r"actor.max_length_per_device=8192 x actor.sp_size=2$"):
        load("ppo", (*RL, *long, "actor.sp_size=2"))
