"""`python -m sglang.launch_server` that ends with its parent and requires a token; same arguments."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if "RL2_PARENT" in os.environ:
        if sys.platform == "linux":
            # SIGKILL as soon as the parent has ended; SGLang's other processes watch this one in the same way
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["RL2_PARENT"]):  # it ended before prctl took effect
            sys.exit("the trainer has ended")
    if token := os.environ.get("SGLANG_API_KEY"):
        # not on the parent's command line, which every user can read; one argument, because it may begin with "-"
        sys.argv.append(f"--api-key={token}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
