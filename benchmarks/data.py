"""Time and memory until many rows are ready, on one process or several of a machine.

    python benchmarks/data.py --model FOLDER --rows 1000000 --kind prompt --processes 8

creates the rows once, reads them as the programs do, and reads them again like a second start. Memory is measured above
what a process had before: `peak` while reading, `own` private memory, `files` mapped files, which other processes may
share, and `share` its part if mapped files are divided by all who map them. Each figure is that of the process where it
is largest. `first batch` draws 128 rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MIB = 2**20
KINDS = ("prompt", "chat", "sft", "pair")
NAMES, THINGS = ("Luke", "Adam", "Ben", "Omar", "Mia", "Zoe"), ("stamps", "toys", "books", "apples")


def sentence(draw: random.Random) -> str:
    return f"{draw.choice(NAMES)} finds {draw.randrange(99)} {draw.choice(THINGS)}."


def row(draw: random.Random, kind: str) -> dict[str, Any]:
    """Return a row of about 60 tokens."""
    question = " ".join(sentence(draw) for _ in range({"prompt": 8, "chat": 5, "sft": 4, "pair": 3}[kind]))
    if kind == "prompt":
        return {"prompt": question, "extra_info": {"answer": str(draw.randrange(99))}}
    if kind == "chat":
        return {"messages": [{"role": "user", "content": question}], "extra_info": {"answer": str(draw.randrange(99))}}
    if kind == "sft":
        return {"prompt": question, "response": f"{sentence(draw)} {sentence(draw)} {sentence(draw)}"}
    return {"prompt": question, "chosen": sentence(draw), "rejected": sentence(draw)}


def memory() -> dict[str, int]:
    """Return resident memory of this process in bytes: private, mapped files, and proportional share."""
    found = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    rss, own, pss = (int(found[name]) * 1024 for name in ("Rss:", "Anonymous:", "Pss:"))
    return {"own": own, "files": rss - own, "share": pss}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(options: argparse.Namespace, path: Path, results: Any, start: Any) -> None:
    """Read the rows in a separate process."""
    from RL2.data.preference import load_pairs
    from RL2.data.prompts import load_prompts
    from RL2.data.sft import load_examples
    from RL2.models.policy import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    before, first, peak, ended = memory(), resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, resident() - first)

    thread = threading.Thread(target=watch)
    thread.start()
    start.wait()
    begun, worked = time.perf_counter(), time.process_time()
    found: Any
    if options.kind in ("prompt", "chat"):
        found = load_prompts(str(path), tokenizer, None, 4096)
    else:
        found, _ = (load_examples if options.kind == "sft" else load_pairs)(str(path), tokenizer, None, 4096)
    ready, worked = time.perf_counter() - begun, time.process_time() - worked
    [found[number] for number in random.Random(0).sample(range(len(found)), 128)]
    drawn = time.perf_counter() - begun - ready
    ended.set()
    thread.join()
    now = memory()
    results.put(
        {
            "seconds": ready,
            "processor seconds": worked,
            "first batch": drawn,
            "peak MiB": peak / MIB,
            **{f"{name} MiB": (now[name] - before[name]) / MIB for name in now},
            "own bytes/row": (now["own"] - before["own"]) / len(found),
            "rows": len(found),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a model, for its tokenizer")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kind", choices=KINDS, default="prompt")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RL2_CACHE"] = f"{folder}/cache"
        draw, path = random.Random(0), Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for _ in range(options.rows):
                file.write(json.dumps(row(draw, options.kind)) + "\n")
        print(f"{options.rows} rows of kind {options.kind}, {path.stat().st_size / MIB:.0f} MiB", flush=True)
        context = multiprocessing.get_context("spawn")
        for start in ("first start", "second start"):
            results, barrier = context.Queue(), context.Barrier(options.processes)
            workers = [
                context.Process(target=load, args=(options, path, results, barrier)) for _ in range(options.processes)
            ]
            for worker in workers:
                worker.start()
            found = [results.get() for _ in workers]
            for worker in workers:
                worker.join()
            worst = {name: max(each[name] for each in found) for name in found[0]}
            print(f"{start}: " + ", ".join(f"{name} {value:.4g}" for name, value in worst.items()), flush=True)


if __name__ == "__main__":
    main()
