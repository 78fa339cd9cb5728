"""Hints for a teacher: the same responses after other prompts, and the divergence that follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_settings import rl_config
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from RL2.batch.packing import loss_weights, pack
from RL2.config.model import Teacher
from RL2.data.prompts import make_prompt
from RL2.data.template import Template
from RL2.errors import ConfigError, UserError
from RL2.parallel.processes import Processes
from RL2.rollout.environment import load_environment
from RL2.rollout.hints import ChosenTeachers, Hints
from RL2.types import Prompt, Sequence, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.teacher import PolicyTeacher, make_teacher

SCRIPT = """
async def step(state, action, extra_info):
    return {{"next_state": None, "reward": 1.0, "score": 1.0, "done": True, "extra_info": extra_info}}


def hint(extra_info{more}):
    return {value}
"""
SOLUTION = "f\"The answer is {extra_info['answer']}.\""


def make_hints(
    folder: Path, value: str, tokenizer: PreTrainedTokenizerBase, processes: Processes, more: str = ""
) -> Hints:
    (folder / "env.py").write_text(SCRIPT.format(value=value, more=more))
    template = Template(tokenizer)
    asked = [{"role": "user", "content": "12+30=?"}]
    chat = make_prompt({"messages": asked, "extra_info": {"answer": 42}}, template, 4)
    chat = Prompt(chat.row, chat.text, chat.token_ids, chat.extra_info, chat.template_arguments, asked)
    raw = make_prompt({"prompt": "48-19=", "extra_info": {"answer": 29}}, template, 7)
    return Hints([chat, raw], load_environment(folder / "env.py"), template, processes, longest=200)


def rollout(hints: Hints) -> list[Trajectory]:
    """Two responses to each prompt; the second of the first prompt has another history."""
    found = []
    for prompt in hints.prompts:
        for sample in range(2):
            response = hints.template.tokenizer.encode(f" {sample}{prompt.row}", add_special_tokens=False)
            ids = [*prompt.token_ids, *response]
            if prompt.row == 4 and sample == 1:
                ids[0] += 1
            mask = [False] * len(prompt.token_ids) + [True] * len(response)
            zeros = [0.0] * len(ids)
            rewards = [*zeros[:-1], float(sample)]
            sequences = [Sequence(ids, mask, zeros, rewards)]
            found.append(Trajectory(prompt.row, prompt.row, sample, sequences, texts=[prompt.text, f"r{sample}"]))
    return found


def test_the_teacher_reads_the_hint_and_then_the_same_response(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    hints = make_hints(tmp_path, SOLUTION, tokenizer, processes)
    trajectories = rollout(hints)
    batch, told = pack(trajectories), hints.told(trajectories)
    texts = [
        tokenizer.decode([*told.sequences([b]).token_ids_T.tolist(), int(told.sequences([b]).labels_T[-1])])
        for b in range(4)
    ]
    assert "12+30=?\n\nThe answer is 42.<|im_end|>" in texts[0]
    assert texts[0].endswith("04")
    assert "answer" not in texts[1]  # it does not begin with its prompt
    assert texts[2] == "48-19=\n\nThe answer is 29. 07"
    for b in range(4):
        ours, theirs = batch.sequences([b]), told.sequences([b])
        assert ours.labels_T[ours.action_T].tolist() == theirs.labels_T[theirs.action_T].tolist()


def test_messages_attempts_and_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    value = "[{'role': 'system', 'content': 'Be brief.'}] if extra_info['answer'] == 42 else None"
    hints = make_hints(tmp_path, value, tokenizer, processes)
    trajectories = rollout(hints)
    told = hints.told(trajectories)
    assert tokenizer.decode(told.sequences([0]).token_ids_T).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert torch.equal(told.sequences([2]).token_ids_T, pack(trajectories).sequences([2]).token_ids_T)
    value = "' '.join(each['response'] for each in attempts if each['reward'] > 0 and not each['own']) or None"
    hints = make_hints(tmp_path, value, tokenizer, processes, more=", attempts")
    told = hints.told(rollout(hints))
    assert "\n\nr1" in tokenizer.decode(told.sequences([2]).token_ids_T)  # the other one earned a reward
    assert "\n\n" not in tokenizer.decode(told.sequences([3]).token_ids_T)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1 / 0", r"hint raises ZeroDivisionError: division by zero \(.*env.py:7\) for row 5"),
        ("3", "hint returned int for row 5; expected a text, a list of messages, or None"),
        ("[{'role': 'system', 'content': 'x'}]", "hint returned messages for row 8, whose prompt is raw text"),
        ("'0 ' * 400", "row 5: with its hint a sequence has .* more than the 200 of the teacher"),
    ],
)
def test_what_a_script_may_not_return(
    value: str, said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    hints = make_hints(tmp_path, value, tokenizer, processes)
    with pytest.raises(UserError, match=said):
        hints.told(rollout(hints))


def test_the_divergence_is_that_of_each_response_after_both_prompts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    """The policy with itself as the teacher is compared with whole logits in float64."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, initializer_range=0.3, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    settings = (f"actor.model_name={tmp_path}/model", "actor.objective=opd", "actor.max_length_per_device=60")
    actor = Actor(rl_config(*settings, "actor.tis_coef=0").actor, processes, 10, tmp_path)
    actor.teacher = make_teacher(Teacher(model_name="policy", hint=True), actor, 1.0)
    assert isinstance(actor.teacher, PolicyTeacher)
    hints = make_hints(tmp_path, SOLUTION, tokenizer, processes)
    trajectories = rollout(hints)
    batch = pack(trajectories)
    batch = batch.with_(weight_T=loss_weights(batch), told=hints.told(trajectories))
    loss = actor.backward(batch, actor.loss, actor.request)["loss"]

    lm = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    exact = torch.zeros((), dtype=torch.float64)
    for b in range(4):
        ours, theirs = batch.sequences([b]), batch.told.sequences([b])  # type: ignore[union-attr]
        p_TV = lm(ours.token_ids_T[None]).logits[0].log_softmax(-1)[ours.action_T]
        with torch.no_grad():
            q_TV = lm(theirs.token_ids_T[None]).logits[0].log_softmax(-1)[theirs.action_T]
        exact = exact + (p_TV.exp() * (p_TV - q_TV)).sum() / batch.action_T.sum()
    exact.backward()
    assert loss == pytest.approx(exact.item(), rel=1e-5)
    assert loss > 1e-3
    for name, parameter in lm.named_parameters():
        ours_grad = dict(actor.lm.named_parameters())[name].grad
        assert ours_grad is not None and parameter.grad is not None
        assert (ours_grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_the_policy_is_no_teacher_of_itself_without_hints() -> None:
    with pytest.raises(ConfigError, match=r"teacher.model_name=policy without teacher.hint=true"):
        Teacher(model_name="policy")
    with pytest.raises(ConfigError, match=r"teacher.hint=true reads `hint\(extra_info\)` of the environment's script"):
        rl_config("teacher.model_name=policy", "teacher.hint=true", "train_data.path=null")


def test_rows_name_their_teachers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    hints = make_hints(tmp_path, "None", tokenizer, processes)
    rows = [replace(one, extra_info={"domain": name}) for one, name in zip(hints.prompts, "ba", strict=True)]
    teacher = Teacher(models={"a": "x", "b": "y"}, column="domain")
    assert ChosenTeachers(rows, teacher).numbers(rollout(hints)).tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"row 5 has extra_info\['teacher'\]=None, and the teachers are a, b"):
        ChosenTeachers(rows, Teacher(models={"a": "x", "b": "y"})).numbers(rollout(hints))
