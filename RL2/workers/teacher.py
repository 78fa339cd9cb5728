"""Teachers: models with whose distribution an update compares that of the policy (docs/distillation.md).

A teacher runs the microbatches of the policy, packed and with the same shared prefixes, just before the policy does.
Its hidden states and its head go to `teacher_stats`; no logits of either model are ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from RL2.config.model import Teacher as TeacherConfig
from RL2.config.model import TrainablePolicy
from RL2.config.values import EMA, POLICY, START
from RL2.models.lora import adapters_off
from RL2.models.packed import PackedModel
from RL2.models.policy import Policy
from RL2.ops.teacher_stats import Teacher as TeacherHead
from RL2.parallel.fsdp import local
from RL2.types import SharedPrefix, TokenBatch
from RL2.workers.learner import Learner
from RL2.workers.passes import TeacherPass
from RL2.workers.worker import Teacher, Worker


class FrozenTeacher(Worker):
    """A model of its own, in the layout of the policy."""

    def __init__(
        self,
        config: TeacherConfig,
        policy: Learner,
        temperature: float,
        model_name: str,
        group: str = "teacher",
        *,
        adapted: bool = False,
    ) -> None:
        """Load `model_name`; `group` is the prefix of its key.

        `adapted` gives it adapters like the policy's, and lets checkpoints hold its weights.
        """
        settings = policy.config
        lora = settings.lora if adapted and isinstance(settings, TrainablePolicy) and settings.lora.rank else None
        where = policy.mesh, policy.processes, group, Policy, settings.offload_model
        dequantize = config.dequantize or (model_name == settings.model_name and settings.dequantize)
        super().__init__(model_name, settings.dtype, *where, lora, dequantize)
        self.key = group if group.startswith("teacher.models.") else f"{group}.model_name"
        self.student, self.temperature = policy, config.temperature or temperature
        if not adapted:
            self.policy.requires_grad_(False)
        self.policy.eval()

    @contextmanager
    def teaching(self, batch: TokenBatch) -> Iterator[TeacherPass]:
        policy = self.policy
        assert isinstance(policy, Policy)
        self.check_packing(batch)
        with self.at_work("the teacher's passes"):
            yield lambda microbatch, shared: policy.teach(microbatch, shared, self.temperature, self.student.lm)
            self._reshard()

    def follow(self) -> None:
        """Do nothing: the teacher is frozen."""

    @property
    def kept_model(self) -> PackedModel | None:
        return None


class AveragedTeacher(FrozenTeacher):
    """The exponential moving average of the policy's weights over its optimizer steps."""

    def __init__(self, config: TeacherConfig, policy: Learner, temperature: float) -> None:
        super().__init__(config, policy, temperature, policy.config.model_name, adapted=True)
        self.step_share = 1 - config.ema_decay
        self._approach(1.0)  # new adapters are drawn at random

    def follow(self) -> None:
        """Move by 1 - `teacher.ema_decay` towards the policy."""
        with self.at_work("the average of the policy"):
            self._approach(self.step_share)

    @property
    def kept_model(self) -> PackedModel | None:
        return self.policy

    @torch.no_grad()
    def _approach(self, share: float) -> None:
        with self.student.at_work("the average of the policy"):
            for mine, its in zip(self.policy.parameters(), self.student.policy.parameters(), strict=True):
                if its.requires_grad:
                    local(mine).lerp_(local(its), share)
            for buffer, other in zip(self.policy.buffers(), self.student.policy.buffers(), strict=True):
                buffer.copy_(other)  # biases of routers, which are no weights


class PolicyTeacher:
    """The policy's own weights as they are in the update, without its adapters if it is to be the frozen start."""

    def __init__(self, config: TeacherConfig, policy: Learner, temperature: float, *, adapters: bool) -> None:
        self.student, self.adapters = policy, adapters
        self.temperature = config.temperature or temperature

    @contextmanager
    def teaching(self, batch: TokenBatch) -> Iterator[TeacherPass]:
        policy = self.student.policy
        assert isinstance(policy, Policy)

        def teach(microbatch: TokenBatch, shared: SharedPrefix | None) -> TeacherHead:
            with nullcontext() if self.adapters else adapters_off(self.student.lm):
                return policy.teach(microbatch, shared, self.temperature, self.student.lm)

        yield teach

    def follow(self) -> None:
        """Do nothing: the weights are the policy's."""

    @property
    def kept_model(self) -> PackedModel | None:
        return None


class SeveralTeachers:
    """Frozen teachers, of which `teacher_B` of a batch names one for each sequence."""

    def __init__(self, teachers: Sequence[FrozenTeacher]) -> None:
        self.teachers = teachers

    @contextmanager
    def teaching(self, batch: TokenBatch) -> Iterator[TeacherPass]:
        with ExitStack() as stack:
            passes = [stack.enter_context(teacher.teaching(batch)) for teacher in self.teachers]

            def teach(microbatch: TokenBatch, shared: SharedPrefix | None) -> TeacherHead:
                assert microbatch.teacher_B is not None
                (number,) = microbatch.teacher_B.unique().tolist()
                return passes[number](microbatch, shared)

            yield teach

    def follow(self) -> None:
        """Do nothing: the teachers are frozen."""

    @property
    def kept_model(self) -> PackedModel | None:
        return None


def make_teacher(config: TeacherConfig, policy: Learner, temperature: float, group: str = "teacher") -> Teacher:
    """Return the teacher that `config` names (collective).

    `temperature` is the policy's, and `group` the prefix of the key that names the model.
    """
    if config.models:
        return SeveralTeachers(
            [FrozenTeacher(config, policy, temperature, name, key) for key, name in config.named.items()]
        )
    name = config.model_name
    assert name is not None
    if name == POLICY:
        return PolicyTeacher(config, policy, temperature, adapters=True)
    if name == EMA:
        return AveragedTeacher(config, policy, temperature)
    if name == START and policy.has_adapters:
        return PolicyTeacher(config, policy, temperature, adapters=False)
    name = policy.config.model_name if name == START else name
    return FrozenTeacher(config, policy, temperature, name, group)
