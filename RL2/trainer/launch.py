"""The door of every program: configuration, probe of the loss, dry run, errors in plain words; heavy imports wait."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from RL2.config import (
    Config,
    DPOConfig,
    LostProcess,
    RLConfig,
    SFTConfig,
    UserError,
    check_here,
    load,
    show,
    trained,
)
from RL2.data.source import describe

LOOPS = {
    "sft": "RL2.trainer.sft_loop",
    "rm": "RL2.trainer.rm_loop",
    "dpo": "RL2.trainer.dpo_loop",
    "ppo": "RL2.trainer.rl",
    "spo": "RL2.trainer.rl",
    "spo_0p5": "RL2.trainer.rl",
}
"""Program -> the module whose `train(config, run)` is its loop."""


def main(program: str) -> None:
    """Run `program` with the overrides of the command line. Errors of the user end in one line and exit code 1."""
    try:
        config = load(program, sys.argv[1:])
        check_here(config)
        # threads that spin while they wait make a CPU run up to 30 times slower as soon as anything else wants a core;
        # read by OpenMP when torch is first imported, which is below
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if isinstance(config, RLConfig):
            from RL2.objectives.probe import probe

            probe(config)
        elif isinstance(config, SFTConfig):
            from RL2.objectives.probe import probe_supervised

            probe_supervised(config.actor)
        if config.trainer.dry_run:
            if int(os.environ.get("RANK", 0)) == 0:
                print(show(config) + "\n" + summary(program, config))
            return
        from RL2.trainer.interrupt import Interrupted
        from RL2.trainer.run import start

        try:
            with start(config) as run:
                import_module(LOOPS[program]).train(config, run)
        except Interrupted as ended:
            _leave(f"{program}: {ended}")
    except KeyboardInterrupt:
        _leave(f"{program}: ended at once by Ctrl-C")
    except UserError as error:
        rank = os.environ.get("RANK")
        message = f"{program}{f' (rank {rank})' if rank else ''}: {error}"
        if isinstance(error, LostProcess):  # threads may wait for it too, and would hold the interpreter back
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)


def _leave(message: str) -> NoReturn:
    """With the exit code that shells give to a program that Ctrl-C has ended."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    sys.exit(130)


def summary(program: str, config: Config) -> str:
    """What a run would use, in words; nothing is loaded."""
    lines = [f"program      {program}", f"model        {trained(config)[1].model_name}"]
    if not isinstance(config, RLConfig):
        data = config.data
        tested = describe(data.test_path) if data.test_path else f"a share of {data.test_ratio:g} of it"
        lines += [f"data         {describe(data.path)}", f"rows through {data.env_path or 'as they are'}"]
        lines += [f"test data    {tested if config.trainer.test_freq else 'none'}"]
        if isinstance(config, DPOConfig):
            reference = "none" if config.actor.reference_free else config.ref_actor.model_name
            lines += [f"reference    {reference}"]
        per_step = f"{data.batch_size} {'examples' if isinstance(config, SFTConfig) else 'pairs'}"
    else:
        train, rollout = config.train_data, config.rollout
        lines += [f"train data   {describe(train.path)}"]
        lines += [f"test data    {describe(config.test_data.path) if config.tests else 'none'}"]
        lines += [f"environment  {rollout.env_path}, at most {rollout.max_turns} turn(s) of an episode"]
        lines += [f"engine       {rollout.engine}"]
        lines += [f"objective    {config.actor.objective}, advantages {config.adv.estimator}"]
        per_step = (
            f"{train.prompts_per_rollout} prompts x {train.responses_per_prompt} responses, "
            f"{config.actor.update_per_rollout} update(s)"
        )
    return "\n".join(
        [*lines, f"a step       {per_step}", f"writes to    {config.trainer.save_dir}", "dry run: all checks passed"]
    )
