"""Start of every program: configuration, check of the loss, dry run, errors in one line. Heavy imports come late."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import NoReturn

from RL2.config.here import check_here
from RL2.config.load import composed, load, renamed, show
from RL2.config.programs import PROGRAMS, DPOConfig, RLConfig, SFTConfig
from RL2.config.values import unset
from RL2.errors import LostProcess, UserError, first_line
from RL2.io.progress import INTERVAL_S, Progress

LOOPS = {
    "sft": "RL2.trainer.sft_loop",
    "rm": "RL2.trainer.rm_loop",
    "dpo": "RL2.trainer.dpo_loop",
    "ppo": "RL2.trainer.rl",
    "spo": "RL2.trainer.rl",
    "spo_0p5": "RL2.trainer.rl",
    "path": "RL2.trainer.rl",
    "distill": "RL2.trainer.rl",
}
"""Program -> the module whose `train(config, run)` is its loop."""


def main(program: str, interval_s: float = INTERVAL_S) -> None:
    """Run `program` with the overrides of the command line, `--dry-run` (`trainer.dry_run=true`) or `--help`.

    The first process is never silent for longer than `interval_s`. Errors of the user end in one line and exit code 1.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(usage(program))
        return
    try:
        is_first = int(os.environ.get("RANK", 0)) == 0
        given = ["trainer.dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
        notes = renamed(program, given)
        if is_first:
            print("".join(f"{note}\n" for note in notes), end="", flush=True)
        config = load(program, given)
        check_here(config)
        if config.trainer.dry_run and not is_first:
            return
        # threads that wait look for work for a moment and then sleep. By default they go on for so long that a CPU is
        # up to 50 times slower as soon as anything else wants a core; with OMP_WAIT_POLICY=PASSIVE they sleep at once,
        # and a small model takes twice as long. Read by OpenMP when torch is first imported, which is below
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        progress = Progress(is_first, interval_s)
        if not config.trainer.dry_run:
            progress.say(f"{program} begins on {time.strftime('%Y-%m-%d at %H:%M:%S')}")
        with progress.phase("checking the objective"):
            if isinstance(config, RLConfig):
                from RL2.trainer.unused_settings import refuse_unused_settings

                refuse_unused_settings(config)
            elif isinstance(config, SFTConfig):
                from RL2.trainer.unused_settings import refuse_advantage_objectives

                refuse_advantage_objectives(config)
            elif isinstance(config, DPOConfig):
                from RL2.trainer.unused_settings import check_preference

                check_preference(config)
        if config.trainer.dry_run:
            from RL2.trainer.dry_run import rehearse

            found = rehearse(program, config, progress)
            print(show(config))
            found.show()
            return
        with progress.phase("loading the libraries"):
            from RL2.trainer.interrupt import Interrupted
            from RL2.trainer.run import start

            loop = import_module(LOOPS[program])
        try:
            with start(config, progress) as run:
                loop.train(config, run)
        except Interrupted as ended:
            _leave(f"{program}: {ended}", ended.exit_code)
    except KeyboardInterrupt:
        _leave(f"{program}: ended at once by Ctrl-C", 130)
    except (MemoryError, RuntimeError, UserError) as error:
        if not isinstance(error, UserError):
            if not _is_out_of_memory(error):
                raise
            error = UserError(
                f"out of memory ({first_line(error)}); lower max_length_per_device, logits_budget_mib or "
                "rollout.max_running_requests, or use more processes"
            )
        rank = os.environ.get("RANK")
        message = f"{program}{f' (rank {rank})' if rank else ''}: {error}"
        if isinstance(error, LostProcess):  # threads may wait for it too, and would hold the interpreter back
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust, none of which gives its class a name
            raise
        sys.exit(
            f"{program}: the tokenizers library failed ({first_line(error)}); the model's tokenizer.json may have a "
            "regular expression that does not terminate on some text"
        )


def usage(program: str) -> str:
    """Return the text of `--help`."""
    required = unset(PROGRAMS[program], composed(program, [])[0])
    return f"""\
usage: python -m RL2.trainer.{program} KEY=VALUE ... [--dry-run]
       torchrun --nproc_per_node=N -m RL2.trainer.{program} KEY=VALUE ...

Required keys: {" ".join(required)}

`rl2 keys {program} [WORD]` lists every key with its default, values and meaning.
`rl2 config {program} KEY=VALUE ...` prints the configuration of a run.
--dry-run checks everything that the run needs, and stops."""


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: Python's, torch's on a CPU, a GPU's, or that for the stack of a thread."""
    kind, text = type(error).__name__, str(error)
    signs = ("DefaultCPUAllocator", "Resource temporarily unavailable", "can't start new thread")
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or any(sign in text for sign in signs)


def _leave(message: str, exit_code: int) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    sys.exit(exit_code)
