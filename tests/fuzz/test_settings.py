"""Overrides, configurations and the settings of commands: refused in one line, or of the types that they say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import NASTY, clear, inputs, mangled, shaken, texts
from hypothesis import given
from hypothesis import strategies as st

from RL2.config.load import load, show
from RL2.config.programs import PROGRAMS
from RL2.config.values import build
from RL2.tools import sweep
from RL2.tools.eval.evaluate import EvalConfig
from RL2.tools.plan.command import PlanRequest
from RL2.tools.settings import parse_settings

NEEDED = {
    "rl": ["train_data.path=a", "train_data.prompts_per_rollout=4", "rollout.train_sampling_params.max_new_tokens=8"],
    "supervised": ["data.path=a", "data.max_length=64", "data.batch_size=4"],
}
KEYS = ["actor.lr", "actor", "trainer.seed", "actor.betas", "rollout.vllm.env.A", "actor.objective_args.x", "trainer"]
KEYS += ["actor.clip", "rollout.train_sampling_params.stop", "hydra.run.dir", "defaults", "+new.key", "~actor.lr", ""]
VALUES = ["1", "-1", "1e999", "nan", "null", "true", "[1,2]", "{a:1,1:2}", "${actor.lr}", "${oc.env:HOME}", "'x", "\\"]
VALUES += ["${trainer.seed}", "[[[[", "9" * 5000, "[" * 5000, "{1:2,null:3}", "x" * 5000, "${", "a b", "0x10", "???"]


def needed(program: str) -> list[str]:
    own = NEEDED["rl" if program in ("ppo", "spo", "spo_0p5", "path", "distill") else "supervised"]
    model = "critic" if program == "rm" else "actor"
    own = [*own, f"{model}.model_name=m", f"{model}.max_length_per_device=512", "trainer.experiment_name=x"]
    own += ["teacher.model_name=t"] * (program == "distill")
    return [*own, "rollout.env_path=e"] if own[0].startswith("train") else own


words = st.builds("{}={}".format, st.sampled_from(KEYS) | texts, st.sampled_from(VALUES) | texts) | texts


def check(config: Any) -> None:
    """What a class says of its fields holds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        if isinstance(value, float):
            assert math.isfinite(value), field.name


@inputs(0.02)
@given(st.sampled_from(sorted(PROGRAMS)), st.lists(words, min_size=1, max_size=3))
def test_overrides(program: str, overrides: list[str]) -> None:
    with clear():
        config = load(program, [*needed(program), *overrides])
        check(config)
        show(config)


@pytest.mark.parametrize("program", ["spo", "sft", "rm", "dpo"])
def test_trees(program: str) -> None:
    """Past Hydra: what stands in a YAML."""
    tree = yaml.safe_load(show(load(program, needed(program))))

    @inputs(0.035)
    @given(shaken(tree))
    def use(values: Any) -> None:
        with clear():
            config = build(PROGRAMS[program], values, "")
            check(config)
            show(config)

    use()


settings = st.lists(
    st.builds(
        "{}={}".format, st.sampled_from(["model", "data", "env", "samples", "seed", "gpus", "top_p", "out"]), texts
    )
    | words
    | st.sampled_from(["model=m", "data=d", "env=e", "gpus=8", "length=4096", "model=Qwen/Qwen3-4B"]),
    max_size=6,
)


@inputs(0.01)
@given(settings)
def test_settings_of_commands(given_words: list[str]) -> None:
    for question in (EvalConfig, PlanRequest):
        with clear():
            check(parse_settings(question, given_words))


SWEEP = (
    b"methods:\n  a: {program: spo, settings: [actor.lr=1e-5]}\n  b: {program: sft}\ncommon: [x=1]\neval: [data=d]\n"
)


def test_sweeps(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"

    @inputs(0.01)
    @given(mangled(SWEEP, *NASTY))
    def read(data: bytes) -> None:
        file.write_bytes(data)
        with clear():
            sweep.read(file, 2, tmp_path / "out")

    read()
