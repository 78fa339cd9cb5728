"""The `rl2` command. Each subcommand imports what it needs by itself, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@contextmanager
def ending(command: str) -> Iterator[None]:
    """What is wrong with the user's input, raised within, is the last line of `rl2 COMMAND`, and the exit code is 1.

    So is a package that is not installed; the commands import what they need within, therefore.
    """
    try:
        from RL2.errors import UserError

        try:
            yield
        except (UserError, OSError) as error:  # a folder that cannot be written, a disk that is full
            sys.exit(f"rl2 {command}: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"rl2 {command}: {error}; `rl2 doctor` says what to install")


def check_program(name: str) -> None:
    """Raise ConfigError unless there is a program of this name."""
    from RL2.config.programs import PROGRAMS
    from RL2.errors import ConfigError

    if name not in PROGRAMS:
        raise ConfigError(f"{name}: choose one of {', '.join(PROGRAMS)}")


@app.callback()
def rl2() -> None:
    """Post-training for language models with torchrun and no Ray, and token-level objectives on successful rollouts."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="a short warm-up and SPO 3.2 alone: two minutes")] = False,
    out: Annotated[Path, typer.Option(help="folder for everything it writes")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train four methods on a toy task, on a CPU, and write OUT/report.html.

    Example: rl2 demo --quick
    """
    with ending("demo"):
        from RL2.reproduce.demo import main

        code = main([*(["--quick"] if quick else []), "--out", str(out), "--seed", str(seed)])
    raise typer.Exit(code)


@app.command()
def train(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5 or path")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine: one for each GPU")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check all but the weights, count, and stop")] = False,
) -> None:
    """Run a program, through torchrun where it takes several processes. The command is printed first, to copy.

    `rl2 keys PROGRAM` lists every KEY with its default and meaning, `rl2 config PROGRAM KEY=VALUE ...` prints the
    configuration of a run.

    Example: rl2 train spo train_data.path=train.jsonl actor.model_name=Qwen/Qwen3-0.6B ... --nproc 8
    """
    import os
    import shlex
    from importlib import import_module

    with ending("train"):
        check_program(program)
        import_module("RL2.config.load")  # a package that is not installed is named here, not in a traceback
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    dry = ["trainer.dry_run=true"] if dry_run else []
    command = [sys.executable, *launcher, "-m", f"RL2.trainer.{program}", *(settings or []), *dry]
    print(shlex.join(command), flush=True)
    os.execv(sys.executable, command)  # this process becomes it: signals and the exit code are its own


@app.command()
def keys(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5 or path")],
    word: Annotated[str, typer.Argument(metavar="WORD", help="Only keys with this in their name or meaning.")] = "",
) -> None:
    """List the keys of a program with their defaults, values and meanings.

    Example: rl2 keys ppo entropy
    """
    from rich.console import Console

    with ending("keys"):
        from RL2.tools.keys import table

        check_program(program)
        found = table(program, word)
    (Console() if sys.stdout.isatty() else Console(width=160)).print(found)


@app.command()
def config(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5 or path")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
) -> None:
    """Print the configuration that settings resolve to, as YAML with the default and meaning of each key as comments.

    Example: rl2 config ppo actor.lr=2e-6
    """
    with ending("config"):
        from RL2.tools.keys import annotated

        check_program(program)
        text = annotated(program, settings or [])
    print(text)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder step_NNNNNN of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    model: Annotated[str, typer.Option(help="What the run began with, if its config.yaml no longer says so.")] = "",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with LoRA: the adapters alone, for peft.")
    ] = False,
) -> None:
    """A checkpoint as a folder for from_pretrained, in float32. A run's own end is in its latest.

    Of a reward model it is one for AutoModelForSequenceClassification, otherwise one for AutoModelForCausalLM, with
    LoRA's adapters merged.

    Example: rl2 export ckpts/spo/step_000020 spo-20
    """
    with ending("export"):
        from RL2.tools.export import export as write

        write(checkpoint, out, model, adapter=adapter)
    print(out)


@app.command()
def doctor() -> None:
    """What is installed, what is missing or of the wrong version, and what to do. Exit code 1 if RL2 cannot work.

    Example: rl2 doctor
    """
    from rich.console import Console

    from RL2.tools.doctor import examine, table

    findings = list(examine())
    Console().print(table(findings))
    if missing := [finding.what for finding in findings if finding.mark == "missing"]:
        sys.exit(f"rl2 doctor: not as needed: {', '.join(missing)}")


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
    from rich.console import Console
    from rich.table import Table

    from RL2.config.load import words
    from RL2.errors import in_table
    from RL2.tools.check_objective.main import check

    if unclear := [knob for knob in knobs or [] if "=" not in knob]:
        sys.exit(f"rl2 check-objective: {unclear[0]!r} is not a knob; write KNOB=VALUE")
    console = Console()
    with ending("check-objective"), console.status(f"trying {in_table(objective)}"):
        findings = check(objective, words(knobs or []))
    table = Table(title=in_table(" ".join([objective, *(knobs or [])])), title_justify="left")
    for heading in ("check", "", "what was seen"):
        table.add_column(heading)
    for finding in findings:
        mark = "[green]pass[/]" if finding.passed else "[bold red]FAIL[/]"
        table.add_row(finding.name, mark, in_table(finding.reason))
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

    from RL2.tools.plan.command import PlanRequest, table

    with ending("plan"):
        question = PlanRequest.of(settings)
        result, fits = table(question)
    Console().print(result)
    if not fits:
        raise typer.Exit(1)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its trainer.save_dir).")],
    step: Annotated[int, typer.Option(help="A step that trainer.replay_freq has kept.")],
    objectives: Annotated[str, typer.Option(help="NAME [KEY=VALUE ...], ...")] = "spo,rank_jsd",
) -> None:
    """Put the rollouts and weights of one step through several objectives: gradients, cosines, and where they lead.

    The numbers stand in the run's folder too, with the weight of every token. See docs/replay.md.

    Example: rl2 replay ckpts/spo --step 20 --objectives "spo, spo actor.path.detach_target=true, rank_jsd, ppo"
    """
    from rich.console import Console

    from RL2.parallel.processes import Processes
    from RL2.tools.replay import replay as put_through
    from RL2.tools.replay import save, table
    from RL2.trainer.run import replay_folder

    titles = [title.strip() for title in objectives.split(",") if title.strip()]
    with ending("replay"):
        processes = Processes.start(timeout_s=600)
        replayed = put_through(run, step, titles, processes)
    Console().print(table(replayed))
    save(replayed, file := replay_folder(run, step) / "replay.json")
    print(f"written to {file}")
    processes.stop()


@app.command("eval")
def eval_(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="model, data and env at least.")],
) -> None:
    """Judge a saved model: accuracy, pass@k and maj@k with 95% intervals, every response kept (docs/evaluation.md).

    model: a folder or hub name. data: as train_data.path. env: an environment script. samples (0): responses to each
    problem at temperature (1.0), top_p (1.0), top_k (0), beside the greedy one (greedy=true). max_new_tokens (1024),
    max_turns (1). limit: the first so many problems. seed (0). weights.NAME: as reward.weights.NAME
    in training. out (evals): where the folder of the evaluation comes; what was interrupted goes on there, and what is
    done is read back.

    Example: rl2 eval model=ckpts/spo/latest data=test@openai/gsm8k:main env=envs/gsm8k.py samples=8
    """
    from rich.console import Console

    from RL2.io.progress import Progress
    from RL2.tools.eval.evaluate import EvalConfig, evaluate, table

    with ending("eval"), Progress().phase("evaluating", 0, "problems") as phase:

        def progress(done: int, total: int) -> None:
            phase.resize(total)
            phase.to(done)

        folder, summary = evaluate(EvalConfig.of(settings), progress)
    Console().print(table(summary))
    print(f"responses and summary: {folder}")


@app.command()
def view(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or NAME=FOLDER,FOLDER... for seeds of one method."),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("view.html"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it on this machine instead; it follows the runs.")
    ] = False,
    port: Annotated[int, typer.Option(help="With --serve; 0 takes a free one.", min=0, max=65535)] = 8765,
) -> None:
    """Curves, rollouts and their tokens in one HTML page that needs no network (docs/viewer.md).

    Example: rl2 view ckpts/spo ckpts/grpo --out view.html
    """
    with ending("view"):
        from RL2.errors import UserError
        from RL2.tools.view.page import Server, write_page
        from RL2.tools.view.run_index import RunIndex

        book = RunIndex(runs)
        if not serve:
            write_page(book, out)
            print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {len(book.texts)} rollouts of {len(book.runs)} runs")
            return
        try:
            server = Server(book, port)
        except OSError as error:
            raise UserError(f"port {port} cannot be had ({error.strerror}); pass another --port") from error
    print(f"{server.address} (end with Ctrl-C)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


@app.command()
def compare(
    methods: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FOLDER[,FOLDER...]", help="Evaluations; several are seeds."),
    ],
    by: Annotated[str, typer.Option(help="greedy, or sampled: the mean of a problem's samples.")] = "greedy",
) -> None:
    """Is a method better than the first, worse, or can one not tell? Paired by problem (docs/evaluation.md).

    Example: rl2 compare grpo=evals/1f3a,evals/77b0 spo=evals/90cc,evals/2be1
    """
    from rich.console import Console

    from RL2.tools.eval.evaluate import compared

    with ending("compare"):
        lines = compared(methods, by)
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML with methods, what they share, and how to judge them.")],
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("sweeps/sweep"),
    nproc: Annotated[int, typer.Option(help="Processes of a run.", min=1)] = 1,
    slurm: Annotated[str, typer.Option(help="Print a command for each run instead, with this sbatch script.")] = "",
) -> None:
    """Run methods times seeds, judge every model, compare the methods; goes on where it was (docs/evaluation.md).

    Example: rl2 sweep sweep.yaml --seeds 3 --out sweeps/thesis --nproc 8
    """
    from RL2.tools import sweep as sweeping

    with ending("sweep"):
        of = sweeping.read(file, seeds, out)
        lines = list(sweeping.slurm(of, slurm)) if slurm else sweeping.run(of, nproc, typer.echo)
    for line in lines:
        typer.echo(line)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(metavar="thesis")],
    scale: Annotated[str, typer.Option(help="tiny: run it here; 4b: print the commands for a node of GPUs")] = "tiny",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    nproc: Annotated[int, typer.Option(min=1, help="4b: GPUs of the node")] = 8,
    out: Annotated[Path, typer.Option(help="folder for the runs and the page")] = Path("runs/thesis"),
) -> None:
    """The experiments of the thesis: every method under several seeds, and a page that says which claims hold.

    Given again, it goes on where it was. On two cores it takes about half an hour.

    Example: rl2 reproduce thesis --seeds 3
    """
    import os

    from RL2.errors import in_table

    with ending("reproduce"):
        from RL2.errors import ConfigError
        from RL2.reproduce import thesis
        from RL2.reproduce.demo import ProgressBoard

        if what != "thesis":
            raise ConfigError(f"{what}: there is one thing to reproduce, `rl2 reproduce thesis`")
        if scale not in ("tiny", "4b"):
            raise ConfigError(f"--scale {scale}: choose tiny or 4b")
        if scale == "4b":
            for command in thesis.gpu_commands(seeds, nproc):
                print(command)
            return
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so small a model gains nothing from a GPU
        board = ProgressBoard()
        with board.progress:
            claims = thesis.reproduce(out, seeds, board)
        for claim in claims:
            line = f"{claim.section}  {in_table(claim.text)}: [b]{claim.verdict}[/b]; {in_table(claim.measured)}"
            board.console.print(line, highlight=False, soft_wrap=True)
        board.say(f"{out / 'thesis.html'} written")


@app.command()
def audit_env(
    env: Annotated[Path, typer.Argument(help="An environment script.")],
    data: Annotated[str, typer.Option(help="As train_data.path; rows carry the right answer in extra_info.")],
    key: Annotated[str, typer.Option(help="Its name there.")] = "answer",
    limit: Annotated[int, typer.Option(help="Rows that are tried.")] = 50,
    part: Annotated[
        list[str] | None,
        typer.Option(help="A part of the reward that is about correctness, if `step` returns a dict; may be repeated."),
    ] = None,
) -> None:
    """Try an environment's reward: right answers must earn it, near misses and tricks must not; exit code 1 otherwise.

    Example: rl2 audit-env envs/gsm8k.py --data test@openai/gsm8k:main
    """
    from rich.console import Console

    from RL2.errors import printable
    from RL2.tools.audit import audit, table

    with ending("audit-env"):
        found = audit(env, data, key, limit, parts=part or ())
    Console().print(table(found))
    for note in found.notes:
        print(printable(note))
    if found.findings:
        parts = sorted({finding.part for finding in found.findings} - {""})
        of = f" (reward: {', '.join(parts)})" if parts else ""
        sys.exit(f"rl2 audit-env: {env} is wrong about {len(found.findings)} responses{of}")


@app.command()
def audit_judge(
    env: Annotated[Path, typer.Argument(help="An environment script that judges by a model, as envs/judge.py.")],
    data: Annotated[str, typer.Option(help="Rows with responses; pairs (chosen, rejected) show position bias.")],
    limit: Annotated[int, typer.Option(help="Rows that are tried.")] = 50,
    repeats: Annotated[int, typer.Option(help="Times that each response is judged.")] = 3,
) -> None:
    """Ask a judge again, and with pairs in both orders: how far it agrees with itself, with 95% intervals.

    Example: rl2 audit-judge envs/judge.py --data pairs.jsonl
    """
    from rich.console import Console

    from RL2.errors import printable
    from RL2.tools.audit_judge import audit, notes, table

    with ending("audit-judge"):
        found = audit(env, data, limit, repeats)
    Console().print(table(found))
    for note in notes(found):
        print(printable(note))


if __name__ == "__main__":
    app()
