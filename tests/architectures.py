"""Every exact architecture in training and sampling, compared with transformers' own forward of each sequence alone.

    python tests/architectures.py [--model lfm2 ...] [--parts numbers programs] [--json FILE]
    torchrun --nproc_per_node=2 tests/architectures.py [--model lfm2 ...] [--json FILE]

Models are tiny and random (`tiny_models.py`, `tiny_multimodal.py`), in float32. On one process:

    numbers    gradients of the losses of sft, spo, ppo and dpo through a `Learner` (microbatches, shared prompts,
               recomputed layers) against those of the unmodified model; log-probabilities of trainer and model, and of
               engine and trainer, for 64 new tokens with more requests than rows
    programs   two steps of sft, dpo, spo, ppo, rm, and ppo with a critic

On two processes: the gradients of spo and dpo under FSDP and, for packed models, sequence and tensor parallelism.
Results of models are added to FILE one by one; a run with the same FILE skips what it has. All models take hours
on two busy cores.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from exactness import ENGINE_LIMITS, GROUPS, LIMITS, NO_RECOMPUTATION, Results, numbers, save_model
from model_tables import listed

sys.path.append(str(Path(__file__).parent / "integration"))
from programs import World, make_world

from RL2.errors import ConfigError, LostProcess, ModelError
from RL2.parallel.processes import Processes
from RL2.trainer.launch import main as run_program

LAYOUTS: dict[str, dict[str, int]] = {"fsdp": {}, "sp": {"sp_size": 2}, "tp": {"tp_size": 2}}
PROGRAMS = ("sft", "dpo", "spo", "ppo", "rm", "ppo with a critic")
REFUSABLE = ("tp", "rm", "ppo with a critic")
"""What an exact model may lack."""
TOO_LONG = (("llama, dynamic rope", "dpo"),)
"""A row of data is longer than the model's limit."""
SHORT = ("train_data.responses_per_prompt=2", "rollout.train_sampling_params.max_new_tokens=8")
"""Settings of short rollouts."""


def tried(act: Callable[..., Results], *arguments: Any) -> Results:
    """Return the result of `act`, or its error in one line."""
    try:
        return act(*arguments)
    except LostProcess:
        raise
    except (ConfigError, ModelError) as error:
        return {"refused": str(error)}
    except Exception as error:  # models fail in many ways
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def of_program(world: World, folder: Path, program: str) -> Results:
    """Return the gap of trainer and engine in two steps of a program, or its refusal in one line."""
    name, group = program.split()[0], "critic" if program == "rm" else "actor"
    save_dir = folder.parent / f"run {program}"
    settings = [*world.settings(name), f"{group}.model_name={folder}", f"trainer.save_dir={save_dir}"]
    settings.append("trainer.max_steps=2")
    if name in ("spo", "ppo"):
        settings += [*SHORT, world.reward("sum(map(ord, action)) % 2 == 0")]
    if "critic" in program:
        settings += ["adv.estimator=gae", f"critic.model_name={folder}", "critic.max_length_per_device=256"]
    found = attempt(name, settings)
    if NO_RECOMPUTATION in found:
        groups = [group, "critic"] if "critic" in program else [group]
        found = attempt(name, settings + [f"{each}.gradient_checkpointing=false" for each in groups])
    if found:
        return {"refused": found}
    steps = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if f"{group}/grad_norm" in step]
    values = [value for step in steps for value in step.values() if isinstance(value, float)]
    assert len(steps) == 2, f"{len(steps)} steps"
    assert all(map(math.isfinite, values)), "a metric is not finite"
    assert any(step[f"{group}/grad_norm"] > 0 for step in steps), "no gradient"
    gaps = [step["actor/logp_gap_max"] for step in steps if "actor/logp_gap_max" in step]
    return {"steps": 2} | ({"engine": max(gaps)} if gaps else {})


def attempt(program: str, settings: list[str]) -> str:
    """Run a program in this process; return '' if it ends well, and the line that it ends with otherwise."""
    with mock.patch.object(sys, "argv", ["", *settings]), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_program(program)
        except SystemExit as ended:
            if isinstance(ended.code, int):  # a signal has ended it
                raise KeyboardInterrupt from ended
            return str(ended.code)
        finally:
            if dist.is_initialized():  # it has failed
                dist.destroy_process_group()
    return ""


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes of torchrun, or be the only one."""
    processes = Processes.start(timeout_s=300)
    try:
        yield processes
    finally:
        processes.stop()


def on_one_process(name: str, parts: list[str], world: World, folder: Path) -> Results:
    """Return the results of the `parts` for one model."""
    save_model(name, folder / "model", world.model)
    found: Results = {}
    if "numbers" in parts:
        with joined() as processes:
            found["numbers"] = tried(numbers, folder / "model", processes, {})
    if "programs" in parts:
        found["programs"] = {program: tried(of_program, world, folder / "model", program) for program in PROGRAMS}
    return found


def on_two_processes(name: str, processes: Processes, world: World | None) -> Results:
    """Return the results of each layout for one model, on the first process (collective)."""
    with tempfile.TemporaryDirectory() as own:
        (folder,) = processes.gather([own] if processes.is_first else [])
        if world is not None:
            save_model(name, Path(folder), world.model)
        processes.wait()
        found: Results = {}
        for layout, sizes in LAYOUTS.items():
            found[layout] = tried(numbers, Path(folder), processes, sizes)
            if not found[layout].get("packed"):
                break  # only FSDP divides it
        processes.wait()
    return found


class Store:
    """Results in a file, by model and part."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.results: dict[str, Results] = json.loads(file.read_text()) if file and file.exists() else {}

    def lacks(self, name: str, parts: list[str]) -> list[str]:
        return [part for part in parts if part not in self.results.get(name, {})]

    def add(self, name: str, found: Results, begun: float) -> None:
        self.results[name] = self.results.get(name, {}) | found
        print(f"{name} ({time.process_time() - begun:.1f} s): {json.dumps(found)}", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.results, indent=1) + "\n")


def gaps_of(results: dict[str, Results]) -> dict[str, dict[str, float]]:
    """Return what -> model -> gap, of every comparison that was made."""
    found: dict[str, dict[str, float]] = {}
    for name, parts in results.items():
        measured = {"one process": parts.get("numbers", {}), **parts.get("layouts", {})}
        measured |= {f"run of {program}": one for program, one in parts.get("programs", {}).items()}
        for where, one in measured.items():
            for what in one.keys() & LIMITS.keys():
                found.setdefault(f"{where}: {what}", {})[name] = one[what]
    return found


def summary(results: dict[str, Results]) -> tuple[list[str], bool]:
    """Return lines that sum up the results, and whether all are as they should be."""
    lines, good = [], True
    for what, of_models in sorted(gaps_of(results).items()):
        worst, limit = max(of_models, key=of_models.__getitem__), LIMITS[what.rpartition(": ")[2]]
        lines.append(f"{what}: {len(of_models)} models, at most {of_models[worst]:.2g} ({worst}), limit {limit:g}")
        for name in (name for name, gap in of_models.items() if not gap <= limit):
            exact = results[name].get("numbers", {}).get("engine in float64", math.inf)
            excused = what.endswith(": engine") and (exact <= limit or of_models[name] <= ENGINE_LIMITS.get(name, 0))
            good &= excused
            lines.append(
                f"    beyond: {name} {of_models[name]:.2g}" + f" by rounding ({exact:.1g} in float64)" * excused
            )
    for program in PROGRAMS:
        ended = {name: parts["programs"][program] for name, parts in results.items() if "programs" in parts}
        refused = [(name, one["refused"]) for name, one in ended.items() if "refused" in one]
        lines.append(f"{program}: {len(ended)} models, {len(refused)} refused")
        lines += [f"    refused: {name}: {why}" for name, why in refused]
    for name, parts in results.items():
        all_parts = {"numbers": parts.get("numbers", {}), **parts.get("programs", {}), **parts.get("layouts", {})}
        for where, one in all_parts.items():
            if "error" in one:
                good = False
                lines.append(f"{name}, {where}: {one['error']}")
            elif "refused" in one:
                good &= where in REFUSABLE or (name, where) in TOO_LONG
                if where not in PROGRAMS:
                    lines.append(f"{name}, {where}: refused: {one['refused']}")
    return lines, good


def run_alone(names: list[str], parts: list[str], store: Store) -> None:
    with tempfile.TemporaryDirectory() as root:
        world = make_world(Path(root), num_rows=8)
        for name in names:
            begun = time.process_time()
            if missing := store.lacks(name, parts):
                with tempfile.TemporaryDirectory() as folder:
                    store.add(name, on_one_process(name, missing, world, Path(folder)), begun)
            gc.collect()


def run_together(names: list[str], store: Store) -> None:
    with tempfile.TemporaryDirectory() as root, joined() as processes:
        world = make_world(Path(root), num_rows=8) if processes.is_first else None
        (names,) = processes.gather([[n for n in names if store.lacks(n, ["layouts"])]] if processes.is_first else [])
        for name in names:
            begun = time.process_time()
            found = {"layouts": on_two_processes(name, processes, world)}
            if processes.is_first:
                store.add(name, found, begun)
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="only these models")
    parser.add_argument("--parts", nargs="+", choices=["numbers", "programs"], default=["numbers", "programs"])
    parser.add_argument("--json", type=Path, help="file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.model or [name for group in GROUPS for name in listed(group)]
    store = Store(options.json)
    if "RANK" in os.environ:
        run_together(names, store)
    else:
        run_alone(names, options.parts, store)
    if os.environ.get("RANK", "0") == "0":
        lines, good = summary(store.results)
        print(*lines, sep="\n")
        sys.exit(0 if good else "some results are not as they should be")


if __name__ == "__main__":
    main()
