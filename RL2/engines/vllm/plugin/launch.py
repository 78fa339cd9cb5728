"""vLLM's API server (0.32), with the arguments of `vllm serve`. It ends when its parent does, and starts fast on CPUs.

By itself vLLM on a CPU imports everything, 12 CPU seconds, in three processes one after the other: API server, engine
core and worker. Here it is imported once, and the engine core, which also does the worker's part, is a fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Linux: SIGKILL as soon as the parent is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_fast_on_a_cpu() -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # or the CPU platform makes the worker a process
    if "--enforce-eager" in sys.argv:
        import torch._dynamo

        # one small function asks to be compiled whatever the arguments say, which takes 15 s and a C++ compiler
        torch._dynamo.config.disable = True
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)  # asks for spawn; but no thread of OpenMP runs yet, and a fork is safe
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)

    # models are inspected in a process of their own to keep CUDA out of this one: there is none
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda inspect: inspect()

    from vllm.v1.engine import core

    run = core.EngineCoreProc.run_engine_core

    def run_engine_core(*args: Any, **kwargs: Any) -> None:
        die_with_parent()  # a server that is killed leaves no engine behind
        run(*args, **kwargs)

    core.EngineCoreProc.run_engine_core = staticmethod(run_engine_core)

    # before the fork, so that its memory is shared
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401


def main(parent: int | None) -> None:
    """`parent` started it and wants it to end with itself; None: a person did."""
    if parent is not None:
        die_with_parent()
        if os.getppid() != parent:  # it was gone before we asked
            sys.exit("the trainer has ended")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        start_fast_on_a_cpu()

    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main(int(os.environ["RL2_PARENT"]) if "RL2_PARENT" in os.environ else None)
