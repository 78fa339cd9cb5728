"""The model of costs and `rl2 plan`: figures that are known, and what it says when something does not fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, LlavaConfig, Qwen3Config
from typer.testing import CliRunner

from RL2.errors import UserError
from RL2.parallel.cost import PRESETS, Layout, Machine, Shape, Work, kv_bytes, operations, traffic, training_memory
from RL2.tools.cli import app
from RL2.tools.plan.command import PlanRequest
from RL2.tools.plan.search import best, cost, layouts
from RL2.tools.settings import parse_settings

GIB = 2**30
BILLIONS = dict(zip(PRESETS, (0.596, 1.721, 4.022, 8.191, 14.768, 32.762, 30.532, 70.554), strict=True))
WORK = Work(sequences=512, length=8192, mean_length=4096)


@pytest.mark.parametrize(("model", "billions"), BILLIONS.items())
def test_presets_have_the_published_number_of_parameters(model: str, billions: float) -> None:
    # the router of a mixture of experts is not counted
    assert PRESETS[model].parameters / 1e9 == pytest.approx(billions, abs=0.02 if PRESETS[model].experts else 0.001)


def test_a_token_uses_some_of_the_experts() -> None:
    shape = PRESETS["Qwen/Qwen3-30B-A3B"]
    assert shape.active / 1e9 == pytest.approx(3.35, abs=0.02)
    assert operations(shape, 1.0, 0.0) == 2 * shape.active
    assert shape.stored_layer(1) - shape.stored_layer(8) == pytest.approx(7 / 8 * 128 * 3 * 2048 * 768)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe"])
def test_the_shape_of_a_mixture_of_experts_has_all_its_parameters(model_type: str) -> None:
    config = tiny_config(model_type, {"hidden_size": 128, "num_hidden_layers": 3})
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in lm.parameters()), rel=0.005)
    assert shape.all_experts == sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)


def test_a_model_whose_layers_are_all_dense_has_no_experts() -> None:
    assert Shape.of(tiny_config("qwen3_moe", {"mlp_only_layers": [0, 1]})).experts == 0


def test_a_mixture_of_experts_beside_other_layers_than_attention_is_refused() -> None:
    with pytest.raises(UserError, match="type qwen3_next is not built like Llama or Qwen with experts"):
        Shape.of(tiny_config("qwen3_next"))


@pytest.mark.parametrize(
    ("model", "recompute", "gib"),
    [
        ("Qwen/Qwen3-0.6B", False, 27.2),
        ("Qwen/Qwen3-0.6B", True, 11.4),
        ("Qwen/Qwen3-1.7B", False, 53.9),
        ("Qwen/Qwen3-1.7B", True, 32.2),
    ],
)
def test_memory_is_what_a_gpu_took(model: str, recompute: bool, gib: float) -> None:
    """The peaks of benchmarks/gpu_update.py in docs/measurements.md: 8,192 positions, one H200."""
    said = sum(training_memory(PRESETS[model], Layout(), 8192, recompute=recompute).values()) / GIB
    assert said == pytest.approx(gib, rel=0.1)


def test_time_is_what_a_gpu_took() -> None:
    """1.7B, activations kept: 1.34 s for 32,768 tokens in sequences of 2,048 (docs/measurements.md)."""
    shape, work = PRESETS["Qwen/Qwen3-1.7B"], Work(sequences=16, length=2048, mean_length=2048, rollout=False)
    plan = cost(shape, Layout(), work, Machine(), 8192, recompute=False, offload=False)
    assert plan.microbatches == 4
    assert plan.step_s == pytest.approx(1.34, rel=0.05)
    assert 3 * operations(shape, work.tokens, 2048) / 1.34 / 989e12 == pytest.approx(0.273, abs=0.005)


def test_a_process_alone_sends_nothing() -> None:
    sent = traffic(PRESETS["Qwen/Qwen3-0.6B"], Layout(), microbatches=3, tokens=1e4, actions=1e4)
    assert not any(sent.values())


def test_sharding_divides_what_it_should() -> None:
    shape = PRESETS["Qwen/Qwen3-8B"]
    alone, four = (training_memory(shape, layout, 8192, recompute=True) for layout in (Layout(), Layout(fsdp=2, tp=2)))
    for part in ("weights", "gradients", "optimizer"):
        assert four[part] == alone[part] / 4
    replicas = training_memory(shape, Layout(ddp=4), 8192, recompute=True)
    assert replicas == alone
    half = traffic(shape, Layout(fsdp=8), microbatches=2, tokens=1e4, actions=1e4)
    whole = traffic(shape, Layout(fsdp=8), microbatches=4, tokens=1e4, actions=1e4)
    assert sum(whole.values()) == 2 * sum(half.values())


def test_a_teacher_takes_its_shard_and_one_forward_pass() -> None:
    student, teacher = PRESETS["Qwen/Qwen3-0.6B"], PRESETS["Qwen/Qwen3-4B"]
    alone = Work(sequences=64, length=2048, mean_length=2048, rollout=False)
    taught = Work(sequences=64, length=2048, mean_length=2048, rollout=False, teacher=teacher)
    for layout in (Layout(), Layout(fsdp=8), Layout(fsdp=4, tp=2)):
        without, plan = (
            cost(student, layout, work, Machine(), 8192, recompute=False, offload=False) for work in (alone, taught)
        )
        assert {name: plan.memory[name] for name in without.memory} == without.memory
        # float32 weights, sharded; beside them the embeddings and head, and two layers, in bfloat16
        embedding, layer = 151936 * 2560, (teacher.parameters - 151936 * 2560) / 36
        expected = 4 * teacher.parameters / layout.size + 2 * (embedding + 2 * layer) / layout.tp
        assert plan.memory["teacher"] == pytest.approx(expected, rel=0.001)
        assert plan.peak == pytest.approx(without.peak + plan.memory["teacher"])
        # a forward pass: at least two operations for each weight and token
        least = 2 * teacher.parameters * alone.tokens / (layout.size * 989e12)
        assert least < plan.seconds["teacher"] < 20 * least


def test_layouts_divide_the_gpus_and_the_heads() -> None:
    found = list(layouts(PRESETS["Qwen/Qwen3-14B"], 16, 8))  # 40 query and 8 key/value heads
    assert {layout.size for layout in found} == {16}
    assert Layout(fsdp=16) in found
    assert Layout(ddp=2, fsdp=1, tp=8) in found
    assert all(layout.tp * layout.sp <= 8 for layout in found)
    assert not [layout for layout in found if (40 // layout.tp) % layout.sp]


def test_layouts_of_a_mixture_of_experts_split_the_experts() -> None:
    found = list(layouts(PRESETS["Qwen/Qwen3-30B-A3B"], 16, 8))
    assert {(layout.size, layout.tp, layout.sp) for layout in found} == {(16, 1, 1)}
    assert Layout(fsdp=16, ep=8) in found
    assert Layout(ddp=4, fsdp=4, ep=4) in found
    assert all(layout.fsdp % layout.ep == 0 for layout in found)


def test_split_experts_send_tokens_in_place_of_weights() -> None:
    shape, few = PRESETS["Qwen/Qwen3-30B-A3B"], {"microbatches": 1, "tokens": 1e4, "actions": 1e4}
    whole, split = (traffic(shape, Layout(fsdp=8, ep=ep), **few) for ep in (1, 8))
    assert split["fsdp", "reduce-scatter"] < 0.1 * whole["fsdp", "reduce-scatter"]
    assert split["ep", "all-to-all"] == pytest.approx(7 / 8 * 6 * 48 * 1e4 * 8 * 2048 * 2)
    memory = [training_memory(shape, Layout(fsdp=8, ep=ep), 8192, recompute=True) for ep in (1, 8)]
    assert memory[0]["weights"] == memory[1]["weights"]
    assert memory[1]["gathered layers"] < 0.5 * memory[0]["gathered layers"]


@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
@pytest.mark.parametrize("model", PRESETS)
def test_what_is_recommended_fits(model: str, gpus: int) -> None:
    machine = Machine()
    for rollout in (True, False):
        work = Work(sequences=512, length=8192, mean_length=4096, rollout=rollout)
        plan, why = best(PRESETS[model], gpus, work, machine)
        assert plan.layout.size == gpus
        assert plan.max_length_per_device * plan.layout.sp >= work.length
        sampled = plan.sync <= machine.memory and plan.kv_cache >= rollout * kv_bytes(PRESETS[model]) * work.length
        assert (plan.peak <= machine.memory and sampled) == (not why)


def test_the_engine_sleeps_in_the_update_and_weights_are_back_at_the_sync() -> None:
    shape, machine = PRESETS["Qwen/Qwen3-32B"], Machine()
    plans = [cost(shape, Layout(fsdp=8), WORK, machine, 8192, recompute=True, offload=flag) for flag in (False, True)]
    alone = Work(sequences=512, length=8192, mean_length=4096, rollout=False)
    for plan, offload in zip(plans, (False, True), strict=True):
        assert plan.engine == 2 * shape.parameters
        assert plan.peak == cost(shape, Layout(fsdp=8), alone, machine, 8192, recompute=True, offload=offload).peak
        assert plan.sync >= plan.engine + plan.memory["weights"]
    assert plans[1].kv_cache == machine.memory - plans[1].engine
    assert plans[0].kv_cache == plans[1].kv_cache - plans[0].memory["weights"] - plans[0].memory["optimizer"]


def test_a_long_rollout_does_not_hide_a_slow_update() -> None:
    """Recomputation is for memory; beside minutes of rollout it is still not chosen where there is enough."""
    for model, gpus in (("Qwen/Qwen3-0.6B", 1), ("Qwen/Qwen3-1.7B", 64), ("Qwen/Qwen3-4B", 64)):
        with_rollout, _ = best(PRESETS[model], gpus, WORK, Machine())
        without, _ = best(
            PRESETS[model], gpus, Work(sequences=512, length=8192, mean_length=4096, rollout=False), Machine()
        )
        assert with_rollout.seconds["rollout"] > 20 * with_rollout.seconds["update"]
        assert with_rollout.seconds["update"] <= 1.05 * without.seconds["update"]


def test_more_gpus_are_not_slower() -> None:
    for model in ("Qwen/Qwen3-4B", "Qwen/Qwen3-32B"):
        steps = [best(PRESETS[model], gpus, WORK, Machine())[0].step_s for gpus in (64, 128, 256, 512, 1024)]
        assert all(later <= 1.05 * earlier for earlier, later in pairwise(steps)), (model, steps)


def test_a_sequence_longer_than_a_gpu_has_memory_for_is_split() -> None:
    work = Work(sequences=64, length=65_536, mean_length=65_536, rollout=False)
    for gib, sizes in ((80, {1}), (50, {2, 4, 8})):
        plan, why = best(PRESETS["Qwen/Qwen3-8B"], 8, work, Machine(memory=gib * GIB))
        assert not why
        assert plan.layout.sp * plan.layout.tp in sizes


def ask(*settings: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *settings], env={"COLUMNS": "200"})
    return result.exit_code, " ".join([result.output, str(result.exception or "")])


def test_the_command_recommends_a_layout() -> None:
    code, said = ask("model=Qwen/Qwen3-4B", "gpus=8", "memory_gib=80")
    assert code == 0
    for part in (
        "actor.tp_size=1",
        "actor.max_length_per_device=8192",
        "optimizer",
        "engine",
        "rollout",
        "fsdp all-gather",
    ):
        assert part in said


def test_the_command_splits_experts() -> None:
    code, said = ask("model=Qwen/Qwen3-30B-A3B", "gpus=16", "rollout=false", "length=2048", "sequences=64")
    assert code == 0
    assert "30.52 billion parameters (3.34 active)" in said
    assert "actor.ep_size=2" in said
    assert "ep all-to-all" in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("model=meta-llama/Llama-3.1-70B", "gpus=64"), "the engine has a whole copy of the weights"),
        (("model=Qwen/Qwen3-8B", "gpus=1", "rollout=false"), "they need at least 2 GPUs"),
        (("model=Qwen/Qwen3-32B", "gpus=8"), "what stays beside it while it receives them"),
        (("model=Qwen/Qwen3-1.7B", "gpus=1", "length=65536", "memory_gib=40", "rollout=false"), "for activations"),
    ],
)
def test_the_command_says_why_something_does_not_fit(settings: tuple[str, ...], why: str) -> None:
    code, said = ask(*settings)
    assert code == 1
    assert "does not fit" in said
    assert why in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("model=Qwen/Qwen3-4B",), "gpus= is missing"),
        (("model=Qwen/Qwen3-4B", "gpus=0"), "gpus=0; must be at least 1"),
        (("model=Qwen/Qwen3-4B", "gpus=8", "rollout=1"), "rollout=1; expected true or false"),
        (("model=Qwen/Qwen3-4B", "gpus=8", "memory=80"), "'memory' is not a setting"),
        (("model=Qwen/Qwen3-4B", "gpus=8", "mean_length=9000"), "is above length=8192"),
        (("model=./nothing-here", "gpus=8"), "model=./nothing-here"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: tuple[str, ...], why: str) -> None:
    code, said = ask(*settings)
    assert code == 1
    assert why in said


def test_the_shape_of_a_folder(tmp_path: Path) -> None:
    Qwen3Config(hidden_size=64, num_hidden_layers=3, vocab_size=100, tie_word_embeddings=True).save_pretrained(tmp_path)
    shape = parse_settings(PlanRequest, [f"model={tmp_path}", "gpus=2"]).shape
    assert (shape.hidden, shape.layers, shape.vocabulary, shape.tied) == (64, 3, 100, True)


def test_the_shape_of_the_text_part_of_a_multimodal_folder(tmp_path: Path) -> None:
    text = Qwen3Config(hidden_size=64, num_hidden_layers=3, vocab_size=100)
    LlavaConfig(text_config=text, tie_word_embeddings=True).save_pretrained(tmp_path)
    shape = parse_settings(PlanRequest, [f"model={tmp_path}", "gpus=2"]).shape
    assert (shape.hidden, shape.layers, shape.vocabulary, shape.tied) == (64, 3, 100, True)


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    class Other:
        model_type = "other"
        num_hidden_layers = 2

    with pytest.raises(UserError, match="type other is not built like"):
        Shape.of(Other())
