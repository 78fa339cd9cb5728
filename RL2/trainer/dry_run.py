"""A dry run: what a run needs is looked at, tried and counted, and no model is loaded. One table says what was found.

Nothing is fetched: what is on the hub, and not in its cache here, is named as not checked.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from RL2.agents.roles import RolePlayer
from RL2.agents.session import Policy as Answering
from RL2.batch.registry import configured as estimator_of
from RL2.config.here import missing_for_critic, missing_here
from RL2.config.model import Critic, RefActor, Teacher, Trainable, TrainableChat, TrainablePolicy, num_shards
from RL2.config.programs import Config, DPOConfig, RLConfig, SFTConfig, trained
from RL2.config.values import EMA, LATEST, START
from RL2.data.bad_rows import BadRows
from RL2.data.chat import is_chat, question_of
from RL2.data.cursor import Cursor
from RL2.data.prompts import given_away
from RL2.data.source import describe, from_json, is_here
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError, UserError, first_line, in_table, naming
from RL2.io import checkpoint
from RL2.io.checkpoint import NOTES
from RL2.io.progress import Progress
from RL2.io.run_lock import refuse_if_running
from RL2.models.dtypes import compute_dtype
from RL2.models.inspection import own_forward_line
from RL2.models.loading import configuration, folder_here, match_weights, refuse_no_model, tensors_for
from RL2.models.multimodal import multimodal_line
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy, configured_tokenizer, end_tokens, max_length, refuse_unknown_tokens, stop_tokens
from RL2.models.quantised import quantised_line
from RL2.models.stored import check_values
from RL2.models.value import ValueModel
from RL2.objectives.registry import needs_reference, preference
from RL2.ops.attention import is_packed
from RL2.parallel.cost import GRADIENT, MASTER, MOMENTS, Layout, Shape, peak, teacher_memory, training_memory
from RL2.parallel.experts import check_experts
from RL2.parallel.mesh import layout_group
from RL2.parallel.tp import check_sizes
from RL2.rollout.environment import Environment
from RL2.rollout.episode import run_episode
from RL2.trainer.announce import count
from RL2.trainer.build import actor_updates, load_tasks, make_cursor
from RL2.trainer.run import number_of_steps, refuse_another_base, refuse_another_run
from RL2.trainer.supervised import Rows, pairs_reader, reads_reference, train_and_test
from RL2.trainer.tasks import Example, Source, reader
from RL2.trainer.teacher_tokens import refuse_another_tokenizer
from RL2.types import Prompt, Sampling, Trajectory
from RL2.workers.learner import refuse_no_recomputation, refuse_no_routers

GIB = 2**30
RESPONSE = "42"
"""Response with which the environment is tried."""


class Findings:
    """The lines of the table, and what could not be checked here."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.lines: list[tuple[str, str]] = []
        self.unseen: list[str] = []
        self.warnings = 0

    def say(self, what: str, *found: str) -> None:
        self.lines += [(what if number == 0 else "", line) for number, line in enumerate(found)]

    def miss(self, what: str, why: str) -> None:
        self.say(what, f"{why}: not checked")
        self.unseen.append(what)

    def warn(self, what: str) -> None:
        """Note what ends the run if it stays as it is; the machine that runs it may be another."""
        self.say("WARNING", what)
        self.warnings += 1

    def show(self) -> None:
        """Print the table, and in the last line whether all was looked at."""
        table = Table(show_header=False)
        for what, line in self.lines:
            table.add_row(f"[bold]{what}[/]", in_table(line))
        unseen = f"; not checked: {', '.join(self.unseen)}" if self.unseen else ""
        console = Console(soft_wrap=True)
        console.print(table)
        if self.warnings:
            console.print(f"{self.warnings} WARNING(s), see above: the run would fail on this machine", highlight=False)
        console.print(f"dry run: all checks passed{unseen}", highlight=False)


def rehearse(program: str, config: Config, progress: Progress) -> Findings:
    """Check everything in the order of the run. Raise a UserError for the first thing that is wrong."""
    found = Findings(progress)
    found.say("program", program)
    missing = missing_here(config)
    if isinstance(config, RLConfig) and estimator_of(config.adv).needs_critic:
        missing += missing_for_critic(config.critic)
    for each in missing:
        found.warn(each)
    look_at_folder(config, found)
    group, model = trained(config)
    layout = layout_of(model, group)
    lm, tokenizer = look_at_model(model, group, found)
    readers = {f"{group}.model_name": lm} if lm is not None else {}
    readers |= look_at_other_models(config, found)
    if isinstance(config, RLConfig):
        steps = look_at_tasks(config, readers, tokenizer, found)
    else:
        steps = look_at_rows(config, readers, tokenizer, found)
    count_checkpoints(config, lm, steps, found)
    if lm is not None:
        check_sizes(lm, layout.tp, layout.sp, layout_group(group))
        check_experts(lm, layout.ep, layout_group(group))
        estimate_memory(config, lm, layout, found)
    return found


def look_at_folder(config: Config, found: Findings) -> None:
    """Check where the run writes, and the checkpoint that it resumes from."""
    trainer, save_dir = config.trainer, Path(config.trainer.save_dir)
    refuse_if_running(save_dir)
    source, damaged = checkpoint.choose(trainer.load_ckpt_from, save_dir)
    if trainer.load_ckpt_from is None:
        refuse_another_run(save_dir)
    if source is not None:
        refuse_another_base(source, asdict(config))
    there = next(folder for folder in (save_dir, *save_dir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"trainer.save_dir={save_dir} cannot be written: {there} is no folder that may be written")
    found.say("writes to", f"{save_dir}, {shutil.disk_usage(there).free / GIB:.1f} GiB free")
    if trainer.load_ckpt_from is not None:
        found.say("goes on from", str(source) if source else "the beginning: there is no checkpoint yet", *damaged)


def look_at_model(
    model: TrainableChat, group: str, found: Findings
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """Return the model, on the meta device, and the tokenizer; None for both if they are not on this machine."""
    name, kind = model.model_name, Policy if isinstance(model, TrainablePolicy) else ValueModel
    with naming(f"{group}.model_name"):
        if (folder := folder_of(name)) is None:
            found.miss("model", f"{name}, on the hub")
            return None, None
        tokenizer = configured_tokenizer(replace(model, model_name=str(folder)), group)
        lm = look_at_weights(kind, folder, name, model.dequantize, found.progress)
    said = f"{type(lm).__name__}, {count(sum(p.numel() for p in lm.parameters()))} parameters"
    found.say("model", name, said, *filter(None, (multimodal_line(lm), quantised_line(lm), own_forward_line(lm))))
    if model.gradient_checkpointing:
        refuse_no_recomputation(lm, group)
    if isinstance(model, TrainablePolicy):
        refuse_no_routers(lm, model.moe)
    template = "" if tokenizer.chat_template else ", no chat template"
    ends = tokenizer.convert_ids_to_tokens(list(end_tokens(lm, tokenizer)))
    said = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens{template}"
    found.say("tokenizer", said, f"sampling ends with {', '.join(ends) or 'no token'}")
    return lm, tokenizer


def folder_of(name: str) -> Path | None:
    """Return `folder_here` of a model. Raise ModelError for a name that can be no model."""
    try:
        return folder_here(name)
    except ValueError:
        refuse_no_model(name)
        raise


def look_at_weights(
    kind: type[PackedModel], folder: Path, name: str, dequantize: bool, progress: Progress
) -> PreTrainedModel:
    """Build the model of `folder` without memory, and check its weights, if they are there: headers, then values."""
    lm = kind.build(name if folder == Path(name) else str(folder), dequantize)
    if folder == Path(name) or any(folder.glob("*.safetensors")):  # otherwise they are still to be fetched
        stored = tensors_for(lm, folder, name)
        match = match_weights(lm, stored, name, kind(lm).initial, kind.UNREAD)
        total = sum(file.stat().st_size for file in {each.file for each in stored.values()})
        with progress.phase(f"looking through the weights of {name}", total / GIB, "GiB") as phase:
            for num_bytes in check_values(match.names, stored, name):
                phase.update(num_bytes / GIB)
    return lm


def look_at_other_models(config: Config, found: Findings) -> dict[str, PreTrainedModel]:
    """Look at the reference and the critic, where the run loads them; return those on this machine by key."""
    # with the one whose layout it has
    used: list[tuple[str, RefActor | Critic | Teacher, type[PackedModel], Trainable]] = []
    if isinstance(config, RLConfig | DPOConfig):
        has_reference = needs_reference(config.actor) if isinstance(config, RLConfig) else reads_reference(config)
        if has_reference and config.ref_actor.model_name != config.actor.model_name:
            used.append(("ref_actor", config.ref_actor, Policy, config.actor))
    if isinstance(config, RLConfig) and estimator_of(config.adv).needs_critic:
        used.append(("critic", config.critic, ValueModel, config.critic))
    if isinstance(config, RLConfig | SFTConfig):
        for key, model_name in config.teacher.named.items():
            teacher = Teacher(model_name=model_name, dequantize=config.teacher.dequantize)
            used.append((key.removesuffix(".model_name"), teacher, Policy, config.actor))
    models = {}
    for group, settings, kind, model in used:
        name = settings.model_name
        assert name is not None
        key = group if group.startswith("teacher.models.") else f"{group}.model_name"
        with naming(key):
            if (folder := folder_of(name)) is None:
                found.miss(group, f"{name}, on the hub")
                continue
            lm = models[key] = look_at_weights(kind, folder, name, settings.dequantize, found.progress)
        if isinstance(settings, Teacher) and isinstance(model, TrainableChat):
            refuse_another_tokenizer(settings, model.model_name, configured_tokenizer(model, "actor"))
        check_sizes(lm, model.tp_size, model.sp_size, layout_group(group))
        check_experts(lm, model.ep_size, layout_group(group))
        if kind is ValueModel and model.gradient_checkpointing:
            refuse_no_recomputation(lm, group)
        lines = multimodal_line(lm) if kind is ValueModel else None, quantised_line(lm), own_forward_line(lm)
        found.say(group, f"{name}, {type(lm).__name__}", *filter(None, lines))
    return models


def look_at_tasks(
    config: RLConfig, readers: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None, found: Findings
) -> int | None:
    """Check data and environment of reinforcement learning; return the number of steps, None if it is not known.

    `readers` are the models that read its tokens, by key.
    """
    rollout, train, trainer = config.rollout, config.train_data, config.trainer
    longest, template = config.actor.max_length + 1, None
    if tokenizer is not None:
        template = Template(tokenizer)
        with naming("actor.model_name"):
            longest = min(longest, max_length(tokenizer.name_or_path))
    notes: dict[str, list[str]] = {}

    def load(source: Source, example: Example) -> Sequence[Prompt]:
        if not is_here(source.path):
            return []
        if template is None:
            bad = source.bad_rows()
            rows = formatted(bad, example)
            notes[source.key] = [f"{len(rows)} rows, in the right format", *bad.notes(None), *warn_of_answers(rows)]
            return rows
        said_of_rows: list[str] = []
        prompts = reader(template, longest, said_of_rows, progress=found.progress)(source, example)
        notes[source.key] = [*said_of_rows, *warn_of_answers(prompts)]
        return prompts

    with ExitStack() as closing:
        tasks = load_tasks(config, load, closing)
        given = list(tasks.largest_token_ids)
        if template is not None:
            with naming("actor.model_name"):
                given += stop_tokens(readers["actor.model_name"], template.tokenizer, template)
        for key, lm in readers.items():
            with naming(key):
                refuse_unknown_tokens(lm, given)
        say_of_tasks(config, notes, found)
        tried = {tasks.environment: ("rollout.env_path", tasks.prompts)}
        for each in tasks.tests:
            if each.environment not in tried:
                tried[each.environment] = f"{each.settings.key}.env_path", each.prompts
        for environment, (key, of) in tried.items():
            if environment is not tasks.environment:
                found.say("", f"{key}: {environment.path}")
            if config.rollout.agent is not None and not environment.roles:
                continue
            if of and template is not None:
                found.say("", *try_environment(config, environment, key, template, of[0], longest))
            else:
                found.unseen.append("step of the environment")
    found.say("engine", rollout.engine)
    found.say("objective", f"{config.actor.objective}, advantages {config.adv.estimator}")
    number = train.prompts_per_rollout * train.responses_per_prompt
    found.say(
        "a step",
        f"{train.prompts_per_rollout} prompts x {train.responses_per_prompt} responses, "
        f"{config.actor.update_per_rollout} update(s)",
    )
    steps = 0 if trainer.eval_only else trainer.max_steps
    if tasks.prompts and steps is None:
        steps = number_of_steps(trainer, make_cursor(len(tasks.prompts), config))
    at_most = number * rollout.train_sampling_params.max_new_tokens * rollout.max_turns
    if steps is None:
        found.say("steps", f"not known without the rows; each samples at most {count(at_most)} tokens")
    else:
        actor_updates(config, steps)
        found.say("steps", f"{steps}, which sample at most {count(steps * at_most)} tokens ({count(at_most)} each)")
    return steps


def say_of_tasks(config: RLConfig, notes: dict[str, list[str]], found: Findings) -> None:
    """Say which data a run trains and tests on, with the `notes` on each source, and which environment it has."""
    sources = {"train data": ("train_data", config.train_data.path)}
    sources |= {f"test data {each.name}".strip(): (each.key, each.path) for each in config.test_sets}
    for what, (key, path) in sources.items():
        if is_here(path):
            found.say(what, describe(path), *notes.get(key, []))
        else:
            found.miss(what, describe(path))
    if not config.test_sets:
        found.say("test data", "none")
    rollout = config.rollout
    if rollout.agent is not None:
        found.say("agent", f"{rollout.agent}, at most {rollout.max_turns} response(s) of an episode")
        found.unseen.append("an episode of the agent")
    named = {"rollout": rollout.opponents} | {each.key: each.opponents for each in config.test_sets}
    lines = [f"{group}.opponents.{role}: {name}" for group, of in named.items() for role, name in of.items()]
    for name in {name for of in named.values() for name in of.values()} - {START, LATEST}:
        if not Path(name).is_dir() and folder_of(name) is None:
            found.miss("opponent", f"{name}, on the hub")
    found.say("opponents", *lines)
    if rollout.env_path is not None:
        found.say("environment", f"{rollout.env_path}, at most {rollout.max_turns} turn(s) of an episode")


def formatted(bad: BadRows, example: Example) -> list[Prompt]:
    """Return the rows of a path, checked as far as possible without a tokenizer."""
    prompts = []
    for number, row in bad.load(example).items():
        with bad.row(number):
            text = str(question_of(row)) if is_chat(row) else row["prompt"]
            prompts.append(Prompt(number, text, [], from_json(row.get("extra_info")) or {}))
    bad.settle()
    return prompts


def warn_of_answers(prompts: Sequence[Prompt]) -> list[str]:
    """Return a line that names the first prompt with its own right answer in it, if there is one."""
    found = [(p.row, given) for p in prompts if (given := given_away(p.text, p.extra_info.get("answer")))]
    if not found:
        return []
    row, given = found[0]
    return [f"CAUTION: {len(found)} prompts give the right answer, first in row {row + 1}: {given!r}"]


def try_environment(
    config: RLConfig,
    environment: Environment,
    key: str,
    template: Template,
    prompt: Prompt,
    longest: int,
) -> list[str]:
    """Play one turn with a fixed response and describe its result. Raise UserError if it has no reward.

    Scripts with roles play a whole episode, which may well have none.
    """
    tokenizer = template.tokenizer
    engine = ScriptedEngine(lambda token_ids, sampling: tokenizer.encode(RESPONSE, add_special_tokens=False))
    sampling = Sampling(config.rollout.train_sampling_params.max_new_tokens)
    play: Callable[..., Coroutine[Any, Any, Trajectory]]
    if environment.roles:
        player = RolePlayer(Answering(engine, tokenizer, template, ResponseParser(template), longest), {})
        play = partial(player.play, max_turns=config.rollout.max_turns)
    else:
        play = partial(
            run_episode, engine=engine, tokenizer=tokenizer, max_turns=1, max_length=longest, template=template
        )
    seed = config.trainer.seed
    trajectory = asyncio.run(play(prompt, environment=environment, sampling=sampling, group=0, sample=0, seed=seed))
    if environment.roles:
        earned = ", ".join(f"{role} {reward:g}" for role, reward in trajectory.parts.items())
        found = f"rewards {earned}" if trajectory.unscored is None else f"CAUTION: unscored: {trajectory.unscored}"
        return [f"roles {', '.join(environment.roles)}; tried with the response {RESPONSE!r}: {found}"]
    of = f"the first row and the response {RESPONSE!r}"
    if trajectory.unscored is not None:
        raise UserError(f"{key}={environment.path}, tried with {of}: {trajectory.unscored}")
    parts = ", ".join(f"{name} {value:g}" for name, value in trajectory.parts.items())
    said = [f"tried with {of}: reward {trajectory.reward:g}" + (f", of {parts}" if parts else "")]
    if idle := sorted(config.reward.weights.keys() - trajectory.parts.keys()):
        keys = ", ".join(f"reward.weights.{name}" for name in idle)
        said.append(
            f"CAUTION: {keys} weighs no part of this reward; {f'it has {parts}' if parts else 'it is a number'}"
        )
    return said


def look_at_rows(
    config: Config,
    readers: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    found: Findings,
) -> int | None:
    """Check the data of supervised programs, which `readers` read; return the number of steps, None if unknown."""
    assert not isinstance(config, RLConfig)
    data, trainer = config.data, config.trainer
    what = "examples" if isinstance(config, SFTConfig) else "pairs"
    if isinstance(config, DPOConfig) and preference(config.actor).objective.trains_on == "labels":
        what = "responses"
    tested = describe(data.test_path) if data.test_path else f"a share of {data.test_ratio:g} of it"
    told = {"data": describe(data.path), "test data": tested if trainer.test_freq else "none"}
    notes: list[str] = []
    rows: Rows | None = None
    if tokenizer is not None and is_here(data.path) and is_here(data.test_path):
        read: Callable[[str], Rows]
        if isinstance(config, SFTConfig):
            read = import_module("RL2.trainer.sft_loop").reader(config, tokenizer, notes, progress=found.progress)
        elif isinstance(config, DPOConfig):
            read = import_module("RL2.trainer.dpo_loop").preference_reader(
                config, tokenizer, notes, progress=found.progress
            )
        else:
            read = pairs_reader(config, tokenizer, notes, progress=found.progress)
        rows, tests = train_and_test(data, read)
        for each in filter(None, (rows, tests)):
            for key, lm in readers.items():
                with naming(key):
                    refuse_unknown_tokens(lm, [each.largest_token_id])
        found.say("data", told["data"], *notes)
        found.say("test data", told["test data"])
    else:
        found.say("data", told["data"])
        found.say("test data", told["test data"])
        found.unseen.append("rows")
    found.say("rows through", data.env_path or "as they are")
    if isinstance(config, DPOConfig):
        found.say("reference", config.ref_actor.model_name if reads_reference(config) else "none")
    found.say("a step", f"{data.batch_size} {what}")
    steps = trainer.max_steps
    if rows is not None:
        steps = number_of_steps(trainer, Cursor(len(rows), data.batch_size, trainer.seed))
        mean = int(rows.lengths_B.sum()) / len(rows)
        found.say("steps", f"{steps} on {len(rows)} {what}, about {count(steps * data.batch_size * mean)} tokens")
    else:
        found.say("steps", "not known without the rows" if steps is None else str(steps))
    return steps


def layout_of(model: Trainable, group: str) -> Layout:
    """Return the layout on the processes of torchrun; without it, on as few as the sizes allow."""
    sizes = model.ddp_size * model.sp_size * model.tp_size * model.ep_size
    shards = num_shards(model, int(os.environ.get("WORLD_SIZE", sizes)), group)
    return Layout(ddp=model.ddp_size, fsdp=shards, sp=model.sp_size, tp=model.tp_size, ep=model.ep_size)


def count_checkpoints(config: Config, lm: PreTrainedModel | None, steps: int | None, found: Findings) -> None:
    """Report the number of checkpoints and their size on the disk."""
    trainer = config.trainer
    frequency, keep = trainer.save_freq, trainer.num_kept
    number, num_bytes = 0, 0
    if lm is not None and not (isinstance(trained(config)[1], TrainablePolicy) and lora_rank(config)):
        num_bytes = (MASTER + MOMENTS) * sum(p.numel() for p in lm.parameters())
    if frequency is None:
        found.say("checkpoints", "none (trainer.save_freq); only the model at the end")
    else:
        size = f", {bytes_in_words(num_bytes)} each" if num_bytes else ""
        stay = f"; {keep} stay" if keep else ""
        if steps is not None:
            number = min(steps // frequency, keep or steps)
            stay = f"; {number} stay"
        found.say("checkpoints", f"every {frequency} steps{size}{stay}")
        number = (number or 1) + (keep is not None)  # one more is written before an old one goes
    save_dir = Path(trainer.save_dir)
    free = shutil.disk_usage(next(x for x in (save_dir, *save_dir.absolute().parents) if x.exists())).free
    # `latest` is a third of a checkpoint, and written beside the old one
    needed = {"checkpoints and model": num_bytes * number + 2 * num_bytes // 3}
    if isinstance(config, RLConfig):
        needed["samples and tokens (trainer.records_mib)"] = trainer.records_mib << 20
    if sum(needed.values()) > free:
        named = ", ".join(f"{what} take up to {bytes_in_words(size)}" for what, size in needed.items())
        found.warn(
            f"{named}, and there are {bytes_in_words(free)} free in {save_dir}; lower trainer.keep or "
            "trainer.records_mib, raise trainer.save_freq, or choose another trainer.save_dir"
        )


def lora_rank(config: Config) -> int:
    model = trained(config)[1]
    return model.lora.rank if isinstance(model, TrainablePolicy) else 0


def estimate_memory(config: Config, lm: PreTrainedModel, layout: Layout, found: Findings) -> None:
    """Report an estimate of the memory of one process, made for GPUs (parallel/cost.py)."""
    model = trained(config)[1]
    if not is_packed(lm):
        found.miss("memory", "the estimate is for dense decoders like Llama")
        return
    try:
        shape = Shape.of(lm.config)
    except UserError as error:
        found.miss("memory", first_line(error))
        return
    has_gpu = torch.cuda.is_available()
    dtype = compute_dtype(model.dtype, torch.device("cuda" if has_gpu else "cpu"))
    adapters = shape.adapters(model.lora.rank, model.lora.counted) if isinstance(model, TrainablePolicy) else 0
    parts = training_memory(
        shape,
        layout,
        model.max_length_per_device,
        recompute=model.gradient_checkpointing,
        itemsize=dtype.itemsize,
        adapters=adapters,
    )
    offload = model.offload_model and model.offload_optimizer
    here = shape.parameters / (layout.tp * layout.shards)
    beside: dict[str, float] = {}
    if isinstance(config, RLConfig | SFTConfig):
        taught = teacher_shapes(config.teacher, shape, is_adapted=bool(adapters))
        beside |= {"teacher": sum(teacher_memory(one, layout, dtype.itemsize) for one in taught)}
    if isinstance(config, RLConfig):
        frozen = opponent_shapes(config, shape)
        beside |= {"opponents": sum(dtype.itemsize * one.parameters for one in frozen)}
        if needs_reference(config.actor) and not (adapters and config.ref_actor.model_name == config.actor.model_name):
            beside["reference"] = MASTER * here
        if estimator_of(config.adv).needs_critic:
            beside["critic"] = (MASTER + GRADIENT + MOMENTS) * here
    total = peak(parts, offload=offload) + sum(beside.values())
    what = ", ".join(f"{part} {bytes_in_words(size)}" for part, size in (parts | beside).items() if size)
    found.say(
        "memory",
        f"about {bytes_in_words(total)} a {'GPU' if has_gpu else 'process'} at the peak of an update, in "
        f"{str(dtype).removeprefix('torch.')}, on "
        f"{layout.size} process(es)",
        what,
    )
    if isinstance(config, RLConfig) and config.rollout.engine == "embedded":
        found.say("", f"engine, while sampling: weights of at most {bytes_in_words(dtype.itemsize * shape.parameters)}")
    if has_gpu:
        found.say("", f"this GPU has {bytes_in_words(torch.cuda.mem_get_info()[1])}")


def teacher_shapes(teacher: Teacher, policy: Shape, *, is_adapted: bool) -> list[Shape]:
    """Return the shapes, as far as they are known, of teachers with weights of their own; `policy` is the policy's."""
    if teacher.model_name == EMA or (teacher.model_name == START and not is_adapted):
        return [policy]
    return known_shapes(teacher.named.values())


def opponent_shapes(config: RLConfig, policy: Shape) -> list[Shape]:
    """Return the shapes, as far as they are known, of the frozen models that play roles; each is loaded once."""
    named = (config.rollout.opponents, *(each.opponents for each in config.test_sets))
    names = {name for opponents in named for name in opponents.values()}
    own = {name for name in names if name in (START, LATEST) or (Path(name) / NOTES).is_file()}
    return [policy] * len(own) + known_shapes(sorted(names - own))


def known_shapes(names: Iterable[str]) -> list[Shape]:
    """Return the shapes of the models that are folders here and that `Shape` describes."""
    found = []
    for name in names:
        with suppress(UserError):
            if folder_of(name) is not None:
                found.append(Shape.of(configuration(name)))
    return found


def bytes_in_words(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"
