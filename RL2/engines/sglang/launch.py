"""`python -m sglang.launch_server` with the same arguments, but it ends when its parent does, and wants a token."""

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
            # SIGKILL as soon as the parent is gone, however it went; SGLang's other processes do the same with this one
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["RL2_PARENT"]):  # it was gone before we asked
            sys.exit("the trainer has ended")
    if token := os.environ.get("SGLANG_API_KEY"):
        # here, and not on the command line, which every user of the machine can read; in one, for it may begin with "-"
        sys.argv.append(f"--api-key={token}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
