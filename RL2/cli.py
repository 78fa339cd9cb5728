"""The `rl2` command. Each subcommand imports what it needs by itself, so that --help is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def rl2() -> None:
    """Tools around RL2. Training has commands of its own: torchrun -m RL2.trainer.{sft,rm,dpo,ppo,spo,spo_0p5}."""


@app.command()
def check_objective(
    objective: Annotated[str, typer.Argument(metavar="PATH:FUNCTION", help="Or a name of the table, such as spo.")],
    knobs: Annotated[
        list[str] | None, typer.Argument(metavar="KNOB=VALUE", help="Knobs that are not at their defaults.")
    ] = None,
) -> None:
    """Tell whether an objective is sound, in seconds; the exit code is 1 if it is not.

    Example: rl2 check-objective mine.py:focal gamma=1.5
    """
    from omegaconf import OmegaConf
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from RL2.config import UserError
    from RL2.objectives.conformance import check

    if unclear := [knob for knob in knobs or [] if "=" not in knob]:
        sys.exit(f"rl2 check-objective: {unclear[0]!r} is not a knob; write KNOB=VALUE")
    given = {str(knob): value for knob, value in OmegaConf.from_dotlist(knobs or []).items()}
    console = Console()
    try:
        with console.status(f"trying {escape(objective)}"):
            findings = check(objective, given)
    except UserError as error:
        sys.exit(f"rl2 check-objective: {error}")
    table = Table(title=escape(" ".join([objective, *(knobs or [])])), title_justify="left")
    for heading in ("check", "", "what was seen"):
        table.add_column(heading)
    for finding in findings:
        mark = "[green]pass[/]" if finding.passed else "[bold red]FAIL[/]"
        table.add_row(finding.name, mark, escape(finding.reason))
    console.print(table)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="model and gpus at least; see below.")],
) -> None:
    """Say how to lay a model out over GPUs, what of their memory it takes, and how long a step is (docs/scaling.md).

    model: a hub name or folder. gpus: their number. memory_gib (80): of each. gpus_per_node (8). length (8192): tokens
    of the longest sequence. mean_length (half of it). sequences (512): of a step. rollout (true): sample them first,
    with the embedded engine; false for sft, rm and dpo. peak_tflops (989): dense bfloat16 of a GPU. utilisation (0.27):
    the share of it that is reached.

    Example: rl2 plan model=Qwen/Qwen3-4B gpus=8 memory_gib=80
    """
    from rich.console import Console

    from RL2.config import UserError
    from RL2.planning import Question, table

    try:
        question = Question.of(settings)
        result, fits = table(question)
    except UserError as error:
        sys.exit(f"rl2 plan: {error}")
    Console().print(result)
    if not fits:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
