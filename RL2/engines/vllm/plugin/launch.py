"""vLLM's API server (0.32) that ends with its parent and starts fast on CPUs; arguments as for `vllm serve`.

vLLM on a CPU imports everything, 12 CPU seconds, in three processes one after the other: API server, engine core and
worker. Here it is imported once; the engine core is a fork and also does the worker's part.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux for a SIGKILL as soon as the parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_fast_on_a_cpu() -> None:
    """Replace the parts of vLLM that start further processes on a CPU."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the CPU platform puts the worker in a process
    if "--enforce-eager" in sys.argv:
        import torch._dynamo

        # vLLM compiles one small function even so, which takes 15 s and a C++ compiler
        torch._dynamo.config.disable = True
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)  # it sets spawn, but a fork is safe: no OpenMP thread runs yet
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)

    # vLLM inspects models in another process to keep CUDA out of this one; here is no CUDA
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda inspect: inspect()

    from vllm.v1.engine import core

    run = core.EngineCoreProc.run_engine_core

    def run_engine_core(*args: Any, **kwargs: Any) -> None:
        die_with_parent()  # no engine outlives a killed server
        run(*args, **kwargs)

    core.EngineCoreProc.run_engine_core = staticmethod(run_engine_core)

    # import before the fork, so that both share the memory
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401


def main(parent: int | None) -> None:
    """Run the server, which ends with the process `parent`; None if a person started it."""
    if parent is not None:
        die_with_parent()
        if os.getppid() != parent:  # it ended before prctl took effect
            sys.exit("the trainer has ended")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        start_fast_on_a_cpu()

    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main(int(os.environ["RL2_PARENT"]) if "RL2_PARENT" in os.environ else None)
