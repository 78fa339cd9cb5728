"""Report of what is installed, what is missing, and how to fix it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from rich.table import Table

PROJECT = "rl2-spo"
EXTRAS = {
    "view": "rl2 view",
    "demo": "rl2 demo, rl2 reproduce",
    "docs": "make docs",
    "math": "rewards for mathematics (envs/gsm8k.py, envs/orz.py)",
    "lora": "actor.lora.rank",
    "liger": "actor.use_liger_kernel, on GPUs",
    "tensorboard": "trainer.use_tensorboard",
    "trackio": "trainer.use_trackio",
    "wandb": "trainer.use_wandb",
    "gem": "envs/gem.py",
    "reasoning-gym": "envs/reasoning_gym.py",
    "verifiers": "envs/verifiers_env.py",
    "openenv": "envs/openenv.py",
    "agents": "rollout.agent, rl2 serve",
    "tools": "MCP servers in envs/tools.py",
}
"""Extra of the package -> what it is for."""
Mark = Literal["ok", "missing", "optional"]


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    mark: Mark
    """Verdict; with `missing`, RL2 does not work without it or with the version found."""
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Yield all findings, the most important first."""
    right = sys.version_info >= (3, 11)
    yield Finding(
        "Python", "ok" if right else "missing", platform.python_version(), "" if right else "install 3.11 or newer"
    )
    needed = [Requirement(line) for line in requires(PROJECT) or []]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)
    for extra, purpose in EXTRAS.items():
        wanted = [r for r in needed if r.marker is not None and r.marker.evaluate({"extra": extra})]
        lacking = [package for package in map(_package, wanted) if package.mark != "ok"]
        names = "".join(f"; {package.what}: {package.found}" for package in lacking)
        remedy = f"pip install '{PROJECT}[{extra}]'" if lacking else ""
        yield Finding(f"[{extra}]", "optional" if lacking else "ok", purpose + names, remedy)
    yield from _machine()


def extras() -> list[str]:
    """Return the names of all extras of the package."""
    return metadata(PROJECT).get_all("Provides-Extra") or []


def _package(requirement: Requirement) -> Finding:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(
            requirement.name, "missing", "not installed", f"pip install '{requirement.name}{requirement.specifier}'"
        )
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, "ok", found)
    return Finding(
        requirement.name,
        "missing",
        f"{found}, but {requirement.specifier} is needed",
        f"pip install '{requirement.name}{requirement.specifier}'",
    )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{cores}, {platform.machine()}")
    if (memory := _free_memory_gib()) is not None:
        yield Finding("free memory", "ok", f"{memory:.1f} GiB")
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    few = disk < 10
    yield Finding(
        "free disk", "optional" if few else "ok", f"{disk:.1f} GiB here", "checkpoints may not fit" if few else ""
    )
    yield from _gpus()
    servers = Path(".venv-vllm/bin/python")
    yield _extra_program(
        "vLLM servers", str(servers) if servers.exists() else None, "`make engine`, for rollout.engine=vllm on a CPU"
    )
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    yield _extra_program(
        "Chromium", browser, "the system's package, for `make test-browser`; pages open in any browser"
    )


def _extra_program(what: str, found: str | None, remedy: str) -> Finding:
    return Finding(what, "ok", found) if found else Finding(what, "optional", "not found", remedy)


def _gpus() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return  # reported above as missing
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing CUDA library is an OSError
        yield Finding("torch starts", "missing", str(error), "reinstall torch for this machine's CUDA or for a CPU")
        return
    build = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        remedy = f"`nvidia-smi`: the driver must exist and support CUDA {cuda}" if cuda else "a CUDA build of torch"
        yield Finding("GPUs", "optional", f"none that {build} can use", f"on a machine with GPUs: {remedy}")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"GPU {number}", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {build}")


def _free_memory_gib() -> float | None:
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().split("\n") if ":" in line)
    return int(lines["MemAvailable"].split()[0]) / 2**20


def table(findings: list[Finding]) -> Table:
    """Return a table of the findings."""
    shown = Table(title=f"{PROJECT} {version(PROJECT)}", title_justify="left")
    for heading in ("", "", "found", "what to do"):
        shown.add_column(heading)
    marks = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "optional": "[dim]optional[/]"}
    for finding in findings:
        shown.add_row(
            finding.what.replace("[", "\\["), marks[finding.mark], finding.found, finding.remedy.replace("[", "\\[")
        )
    return shown
