"""Compile a decoding step on a CPU into one program, without Python or a kernel per operation.

For a small model, Python's overhead per operation exceeds the computation. The program is compiled once, for any number
of rows and positions.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from RL2.errors import ConfigError
from RL2.ops.attention import Attend

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++")

Step = Callable[[Tensor, Tensor, Attend], Tensor]
"""(token ids [T], positions [T], attention) -> logits [T, V]: a pass through the model."""


class CompiledStep:
    """A `Step` that is compiled at its first call.

    A model that cannot be compiled runs uncompiled, with a warning.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        options: dict[str, Any] = {
            "cpp_wrapper": True,
            # guards on every module and tensor take a sixth of a small step. Only sizes change here, and they are
            # dynamic; no other program is compiled from this code object (see `_copy`)
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        }
        self.compiled = torch.compile(_copy(step), dynamic=True, fullgraph=True, options=options)
        self.can_compile = True

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if self.can_compile and len(ids) > 1:  # torch would compile again for a size of 1
            try:
                return self.compiled(ids, positions, attend)
            except TorchDynamoException as error:
                self.can_compile = False
                reason = str(error).strip().split("\n")[0]
                logger.warning("decoding step by step: this model cannot be compiled (%s)", reason)
        return self.step(ids, positions, attend)


def _copy(step: Step) -> Step:
    """Return `step` with a code object of its own, so that torch compiles a program per model."""

    def call(ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return step(ids, positions, attend)

    return FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


def refuse_no_compiler() -> None:
    """Raise ConfigError if there is no C++ compiler."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    if not any(map(shutil.which, names)):
        raise ConfigError(
            f"rollout.compile=true on a CPU needs a C++ compiler, and there is no {' or '.join(names)}; "
            "install one, or leave rollout.compile out"
        )
