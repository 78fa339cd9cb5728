"""Lines that a run prints before its first step: models, engine, plan."""

from __future__ import annotations

from RL2.config.programs import RLConfig
from RL2.config.trainer import Trainer as TrainerConfig
from RL2.models.inspection import own_forward_line
from RL2.models.multimodal import multimodal_line
from RL2.models.quantised import quantised_line
from RL2.trainer.tasks import TestTasks
from RL2.workers.learner import Learner
from RL2.workers.worker import Worker


def count(number: float) -> str:
    """Return a number in words: 1234567 is 1.23 million."""
    for unit, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def describe_model(name: str, worker: Worker) -> str:
    """Describe the model called `name`: its class, size, precision and device."""
    parameters = list(worker.policy.parameters())
    size = count(sum(parameter.numel() for parameter in parameters))
    if worker.has_adapters:
        size += f" parameters, {count(sum(p.numel() for p in parameters if p.requires_grad))} of them in adapters"
    else:
        size += " parameters"
    dtype, device = str(worker.dtype).removeprefix("torch."), worker.processes.device.type
    number = worker.processes.world_size
    where = f"on {device}" if number == 1 else f"on {number} processes ({device})"
    said = [multimodal_line(worker.lm) if isinstance(worker, Learner) else None]
    said += [quantised_line(worker.lm), own_forward_line(worker.lm)]
    described = f"{name}: {worker.lm.name_or_path}: {type(worker.lm).__name__}, {size}, {dtype}, {where}"
    return "; ".join([described, *filter(None, said)])


def describe_engine(config: RLConfig) -> str:
    """Describe the engine that samples."""
    rollout = config.rollout
    if (servers := rollout.servers) is None:
        return f"engine: {rollout.engine}, in the training processes"
    if servers.urls:
        return f"engine: {rollout.engine} at {', '.join(servers.urls)}"
    return f"engine: {rollout.engine}, {servers.num_servers} server(s) of this run; their logs are in trainer.save_dir"


def describe_plan(config: RLConfig, first_step: int, num_steps: int) -> str:
    """Return the plan of a run of reinforcement learning."""
    data, trainer, rollout = config.train_data, config.trainer, config.rollout
    if trainer.eval_only or first_step >= num_steps:
        return "plan: one test, and no training"
    most = rollout.train_sampling_params.max_new_tokens * rollout.max_turns
    number = data.prompts_per_rollout * data.responses_per_prompt
    left = num_steps - first_step
    return (
        f"plan: {_steps(first_step, num_steps)}, each of {data.prompts_per_rollout} prompts x "
        f"{data.responses_per_prompt} responses of at most {count(most)} tokens: at most {count(left * number * most)} "
        f"tokens in all; {_frequencies(trainer)}"
    )


def describe_test(tasks: TestTasks) -> str:
    """Describe the first test of a set."""
    settings = tasks.settings
    of = f" of {settings.name}" if settings.name else ""
    return (
        f"first test{of}: {len(tasks.prompts)} prompts x {settings.responses_per_prompt} responses of at most "
        f"{settings.sampling.max_new_tokens} tokens"
    )


def describe_supervised_plan(
    batch_size: int, what: str, tokens_per_row: float, trainer: TrainerConfig, first: int, steps: int
) -> str:
    """Return the plan of a supervised run."""
    left = steps - first
    return (
        f"plan: {_steps(first, steps)}, each of {batch_size} {what}: about "
        f"{count(left * batch_size * tokens_per_row)} tokens in all; {_frequencies(trainer)}"
    )


def _steps(first: int, number: int) -> str:
    done = f" ({first} are done)" if first else ""
    return f"{number} step{'s' * (number != 1)}{done}"


def _frequencies(trainer: TrainerConfig) -> str:
    tests = "no tests" if trainer.test_freq is None else f"a test every {trainer.test_freq} steps"
    saves = "no checkpoints" if trainer.save_freq is None else f"a checkpoint every {trainer.save_freq} steps"
    return f"{tests}, {saves}, the model at the end"
