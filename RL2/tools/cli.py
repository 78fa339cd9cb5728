"""Command line `rl2`. Each subcommand imports what it needs itself, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from RL2.tools.checking import Finding

app = typer.Typer(no_args_is_help=True)


@contextmanager
def ending(command: str) -> Iterator[None]:
    """Print an error of the user's input in the `with` block as the last line of `rl2 COMMAND` and exit with code 1.

    A missing package is handled the same way, so commands import what they need inside the block.
    """
    try:
        from RL2.errors import UserError

        try:
            yield
        except (UserError, OSError) as error:  # a folder that cannot be written, a full disk
            sys.exit(f"rl2 {command}: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"rl2 {command}: {error}; `rl2 doctor` lists what to install")


def check_program(name: str) -> None:
    """Raise ConfigError unless there is a program of this name."""
    from RL2.config.programs import PROGRAMS
    from RL2.errors import ConfigError

    if name not in PROGRAMS:
        raise ConfigError(f"{name}: choose one of {', '.join(PROGRAMS)}")


@app.callback()
def rl2() -> None:
    """Post-train language models with torchrun and no Ray, with token-level objectives on successful rollouts."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Only a short warm-up and SPO 3.2: two minutes.")] = False,
    real: Annotated[bool, typer.Option("--real", help="With a pretrained model of 135M parameters.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all output; default: runs/demo or runs/demo-real.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data, the model and the runs.")] = 0,
) -> None:
    """Train four methods on a toy task, on a CPU, and write OUT/report.html.

    Example: rl2 demo --quick
    """
    with ending("demo"):
        from RL2.tools.reproduce.demo import main

        options = [name for name, given in (("--quick", quick), ("--real", real)) if given]
        code = main([*options, *(["--out", str(out)] if out else []), "--seed", str(seed)])
    raise typer.Exit(code)


@app.command()
def train(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5, distill or path.")
    ],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine: one per GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, load no model, and stop.")] = False,
) -> None:
    """Run a program, with torchrun if it takes several processes. The command is printed first, ready to copy.

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
        from RL2.tools.jobs import command_line

    overrides = [*(settings or []), *(["trainer.dry_run=true"] if dry_run else [])]
    command = command_line(program, overrides, nproc)
    if sys.stdout.isatty():  # a line for each override, and dim, so that an error below it is seen
        start = shlex.join(command[: len(command) - len(overrides)])
        typer.secho(" \\\n  ".join([start, *map(shlex.quote, overrides)]), dim=True)
    else:
        print(shlex.join(command))
    sys.stdout.flush()
    os.execv(sys.executable, command)  # replace this process, so that signals and the exit code are the program's


@app.command()
def keys(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5, distill or path.")
    ],
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
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="sft, rm, dpo, ppo, spo, spo_0p5, distill or path.")
    ],
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
    model: Annotated[str, typer.Option(help="Model that the run started from, if its config.yaml is missing.")] = "",
    adapter: Annotated[bool, typer.Option("--adapter", help="Export only the LoRA adapters, for peft.")] = False,
) -> None:
    """Export a checkpoint as a folder for from_pretrained, in float32; a run exports its last step itself, to `latest`.

    A reward model becomes a folder for AutoModelForSequenceClassification, any other model one for
    AutoModelForCausalLM, with LoRA adapters merged.

    Example: rl2 export ckpts/spo/step_000020 spo-20
    """
    with ending("export"):
        from RL2.tools.export import export as write

        write(checkpoint, out, model, adapter=adapter)
    print(out)


@app.command()
def doctor() -> None:
    """List what is installed, missing or of the wrong version, and how to fix it. Exit code 1 if RL2 cannot work.

    Example: rl2 doctor
    """
    from rich.console import Console

    from RL2.tools.doctor import examine, table

    findings = list(examine())
    Console().print(table(findings))
    if missing := [finding.what for finding in findings if finding.mark == "missing"]:
        sys.exit(f"rl2 doctor: missing or unsuitable: {', '.join(missing)}")


@app.command()
def check_objective(
    objective: Annotated[str, typer.Argument(metavar="PATH:FUNCTION", help="Or an objective's name, such as spo.")],
    knobs: Annotated[
        list[str] | None, typer.Argument(metavar="KNOB=VALUE", help="Knobs that differ from their defaults.")
    ] = None,
) -> None:
    """Check an objective for mistakes, in seconds; the exit code is 1 if it has one.

    Example: rl2 check-objective mine.py:focal gamma=1.5
    """
    from RL2.tools.check_objective.main import check

    _check("check-objective", check, objective, knobs or [])


@app.command()
def check_advantage(
    estimator: Annotated[str, typer.Argument(metavar="PATH:FUNCTION", help="Or a built-in name, such as rloo.")],
    knobs: Annotated[
        list[str] | None, typer.Argument(metavar="KNOB=VALUE", help="Knobs that differ from their defaults.")
    ] = None,
) -> None:
    """Check an advantage estimator on small rollouts, in seconds; the exit code is 1 if a check fails.

    Example: rl2 check-advantage mine.py:leave_best_out share=0.5
    """
    from RL2.tools.check_advantage import check

    _check("check-advantage", check, estimator, knobs or [])


def _check(command: str, check: Callable[..., list[Finding]], name: str, knobs: list[str]) -> None:
    """Run `check` on the function `name`, print what it finds, and exit with code 1 if something is wrong."""
    from rich.console import Console
    from rich.table import Table

    from RL2.config.load import words
    from RL2.errors import in_table

    if unclear := [knob for knob in knobs if "=" not in knob]:
        sys.exit(f"rl2 {command}: {unclear[0]!r} is not a knob; write KNOB=VALUE")
    console = Console()
    with ending(command), console.status(f"trying {in_table(name)}"):
        findings = check(name, words(knobs))
    table = Table(title=in_table(" ".join([name, *knobs])), title_justify="left")
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
    """Find a layout of a model over GPUs, with its memory and the time of a step (docs/scaling.md).

    model: a hub name or folder. gpus: their number. memory_gib (80): memory of each. gpus_per_node (8). length (8192):
    tokens of the longest sequence. mean_length (half of it). sequences (512): per step. rollout (true): sample them
    first with the embedded engine; false for sft, rm and dpo. teacher: a hub name or folder, for distillation.
    peak_tflops (989): dense bfloat16 of a GPU. utilisation (0.27): share of it that is reached.

    Example: rl2 plan model=Qwen/Qwen3-4B gpus=8 memory_gib=80
    """
    from rich.console import Console

    from RL2.tools.plan.command import PlanRequest, table
    from RL2.tools.settings import parse_settings

    with ending("plan"):
        request = parse_settings(PlanRequest, settings)
        result, fits = table(request)
    Console().print(result)
    if not fits:
        raise typer.Exit(1)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its trainer.save_dir), or of a step in it.")],
    step: Annotated[str, typer.Option(help="A step stored by trainer.replay_freq, or latest.")] = "latest",
    objectives: Annotated[str, typer.Option(help="NAME [KEY=VALUE ...], ...")] = "spo,rank_jsd",
) -> None:
    """Evaluate several objectives on the stored rollouts and weights of one step: gradients, cosines, token weights.

    The results are also written to the run's folder. See docs/replay.md.

    Example: rl2 replay ckpts/spo --step 20 --objectives "spo, spo actor.path.detach_target=true, rank_jsd, ppo"
    """
    from rich.console import Console

    from RL2.parallel.processes import Processes
    from RL2.tools.replay import replay as evaluate_objectives
    from RL2.tools.replay import save, table
    from RL2.trainer.run import kept_step, replay_folder

    titles = [title.strip() for title in objectives.split(",") if title.strip()]
    with ending("replay"):
        folder, number = kept_step(run, step)
        processes = Processes.start(timeout_s=600)
        replayed = evaluate_objectives(folder, number, titles, processes)
    Console().print(table(replayed))
    save(replayed, file := replay_folder(folder, number) / "replay.json")
    print(f"written to {file}")
    processes.stop()


@app.command()
def atlas(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its trainer.save_dir), or of a step in it.")],
    step: Annotated[str, typer.Option(help="A step stored by trainer.replay_freq, or latest.")] = "latest",
    objectives: Annotated[str, typer.Option(help="NAME [KEY=VALUE ...], ... besides the built-in ones.")] = "",
    tokens: Annotated[int, typer.Option(help="Maximum number of tokens to measure.", min=1)] = 4096,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("atlas.html"),
) -> None:
    """Measure every objective on one stored step, and write a page that compares them token by token.

    It has cosines between gradients, the pull on each token, changes of entropy and probability, and groups of
    objectives that coincide. See docs/atlas.md.

    Example: rl2 atlas ckpts/spo --step 20 --objectives "spo actor.path.detach_target=true" --out atlas.html
    """
    with ending("atlas"):
        from RL2.models.policy import load_tokenizer
        from RL2.parallel.processes import Processes
        from RL2.tools.atlas.measure import measure
        from RL2.tools.atlas.page import write_page
        from RL2.trainer.run import kept_step, replay_folder

        folder, number = kept_step(run, step)
        processes = Processes.start(timeout_s=600)
        more = [title.strip() for title in objectives.split(",") if title.strip()]
        found = measure(folder, number, processes, more, tokens)
        write_page(found, load_tokenizer(str(replay_folder(folder, number))), out)
        processes.stop()
    groups = sum(len(cluster) > 1 for cluster in found.clusters)
    print(
        f"{out}: {len(found.effects)} objectives on {len(found.logp_N)} tokens of step {number}, "
        f"{groups} {'group' if groups == 1 else 'groups'} that coincide, {len(found.left_out)} left out"
    )


@app.command()
def credit(
    run: Annotated[Path, typer.Argument(help="Folder of a run (its trainer.save_dir).")],
    step: Annotated[str, typer.Option(help="A step stored by trainer.replay_freq, or latest.")] = "latest",
    budget: Annotated[str, typer.Option(help="Tokens to sample, such as 500k or 2M.")] = "200k",
    answers: Annotated[int, typer.Option(help="Number of the step's recorded answers to look at.", min=1)] = 20,
    objectives: Annotated[
        str, typer.Option(help="NAME [KEY=VALUE ...], ... as for replay. [default: those that fit the run]")
    ] = "",
    engine: Annotated[str, typer.Option(help="As rollout.engine. [default: the run's]")] = "",
    rewards: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Least and largest reward of an answer.")] = "0,1",
    longest_whole: Annotated[
        int, typer.Option(help="Tokens up to which all places are looked at; longer answers are bisected.", min=1)
    ] = 64,
    precision: Annotated[float, typer.Option(help="Absolute advantage that counts as none.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the continuations.", min=0)] = 0,
    pairs: Annotated[
        Path | None, typer.Option(help="File for pairs of single tokens, for dpo with actor.loss=pivotal.")
    ] = None,
) -> None:
    """Measure which tokens decided the rewards of a stored step, by continuing its answers (docs/credit.md).

    Prints the tokens with the largest advantages, and how well objectives agree with them. The results are also written
    to the run's folder, where `rl2 view` finds them. A command that was interrupted continues.

    Example: rl2 credit ckpts/spo --step 20 --budget 2M
    """
    from rich.console import Console

    with ending("credit"):
        from RL2.errors import ConfigError
        from RL2.io.progress import Progress
        from RL2.tools.credit.command import RESULT, CreditRequest, parse_budget
        from RL2.tools.credit.command import credit as measure
        from RL2.tools.credit.table import tables
        from RL2.trainer.run import kept_step, replay_folder

        try:
            low, high = map(float, rewards.split(","))
        except ValueError as error:
            raise ConfigError(f"--rewards {rewards}: write two numbers, such as 0,1") from error
        request = CreditRequest(
            run=run,
            step=step,
            budget=parse_budget(budget),
            answers=answers,
            objectives=tuple(title.strip() for title in objectives.split(",") if title.strip()),
            engine=engine,
            rewards=(low, high),
            longest_whole=longest_whole,
            precision=precision,
            seed=seed,
            pairs=pairs,
        )
        result = measure(request, Progress())
        Console().print(tables(result))
        for one in result["skipped"]:
            print(f"row {one['row']}, sample {one['sample']} skipped: {one['reason']}")
        for title, reason in result["left_out"].items():
            print(f"{title} left out: {reason}")
        print(f"written to {replay_folder(*kept_step(run, step)) / RESULT}")


@app.command("eval")
def eval_(
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE", help="model, data, and env or agent, at least.")
    ],
) -> None:
    """Evaluate a saved model: accuracy, pass@k and maj@k with 95% intervals; every response is stored.

    model: a folder or hub name. dequantize (false): as actor.dequantize in training. data: as train_data.path. env: an
    environment script. agent: as rollout.agent in training, with agent_timeout_s (600), max_running_agents (16) and
    agent_env; env then judges its answers, or is left out. samples (0): responses per problem at temperature (1.0),
    top_p (1.0), top_k (0), beside the greedy one (greedy=true). max_new_tokens (1024), max_turns (1). limit: number of
    problems. seed (0). weights.NAME: as reward.weights.NAME in training. out (evals): parent of the evaluation's
    folder. An interrupted evaluation continues there, and a finished one is read back. See docs/evaluation.md.

    Example: rl2 eval model=ckpts/spo/latest data=test@openai/gsm8k:main env=envs/gsm8k.py samples=8
    """
    from rich.console import Console

    from RL2.io.progress import Progress
    from RL2.tools.eval.evaluate import EvalConfig, evaluate, table
    from RL2.tools.settings import parse_settings

    with ending("eval"), Progress().phase("evaluating", 0, "problems") as phase:

        def progress(done: int, total: int) -> None:
            phase.resize(total)
            phase.to(done)

        folder, summary = evaluate(parse_settings(EvalConfig, settings), progress)
    Console().print(table(summary))
    print(f"responses and summary: {folder}")


@app.command()
def view(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or NAME=FOLDER,FOLDER... for seeds of one method."),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("view.html"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine instead; it follows the runs.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port for --serve; 0 picks a free one.", min=0, max=65535)] = 8765,
) -> None:
    """Show curves, rollouts and their tokens in one HTML page that needs no network (docs/viewer.md).

    Example: rl2 view ckpts/spo ckpts/grpo --out view.html
    """
    with ending("view"):
        from RL2.errors import UserError
        from RL2.tools.view.page import Server, write_page
        from RL2.tools.view.run_index import RunIndex

        index = RunIndex(runs)
        if not serve:
            write_page(index, out)
            print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {len(index.texts)} rollouts of {len(index.runs)} runs")
            return
        try:
            server = Server(index, port)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); pass another --port") from error
    print(f"{server.address} (end with Ctrl-C)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


@app.command()
def compare(
    methods: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FOLDER[,FOLDER...]", help="Evaluations; several are seeds."),
    ],
    by: Annotated[str, typer.Option(help="Score: greedy, or sampled (mean of a problem's samples).")] = "greedy",
) -> None:
    """Compare each method with the first: better, worse or undecided, paired by problem (docs/evaluation.md).

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
    file: Annotated[Path, typer.Argument(help="YAML with methods, their common settings, and the evaluation.")],
    seeds: Annotated[int, typer.Option(help="Number of runs per method.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for all runs.")] = Path("sweeps/sweep"),
    nproc: Annotated[int, typer.Option(help="Processes per run.", min=1)] = 1,
    slurm: Annotated[str, typer.Option(help="Only print a command per run, for this sbatch script.")] = "",
) -> None:
    """Run each method with several seeds, evaluate and compare them; finished runs are skipped (docs/evaluation.md).

    Example: rl2 sweep sweep.yaml --seeds 3 --out sweeps/thesis --nproc 8
    """
    from RL2.tools import sweep as sweeping

    with ending("sweep"):
        plan = sweeping.read(file, seeds, out)
        lines = list(sweeping.slurm(plan, slurm)) if slurm else sweeping.run(plan, nproc, typer.echo)
    for line in lines:
        typer.echo(line)


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(metavar="thesis")],
    scale: Annotated[str, typer.Option(help="tiny: run here. 4b: print the commands for a GPU node.")] = "tiny",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    nproc: Annotated[int, typer.Option(min=1, help="With --scale 4b: GPUs of the node.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the page.")] = Path("runs/thesis"),
) -> None:
    """Repeat the experiments of the thesis under several seeds, and write a page with each claim's verdict.

    A repeated call resumes. It takes about half an hour on two cores.

    Example: rl2 reproduce thesis --seeds 3
    """
    import os

    from RL2.errors import in_table

    with ending("reproduce"):
        from RL2.errors import ConfigError
        from RL2.tools.reproduce import thesis
        from RL2.tools.reproduce.demo import ProgressBoard

        if what != "thesis":
            raise ConfigError(f"{what}: only `rl2 reproduce thesis` exists")
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
def serve(
    model: Annotated[str, typer.Argument(help="Folder of a model or checkpoint, or a name on the hub.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 picks a free one.", min=0, max=65535)] = 8000,
    key: Annotated[str | None, typer.Option(help="Key that clients have to send. [default: a random one]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Limit of a response. [default: the model's]", min=1)
    ] = None,
    max_running_requests: Annotated[int, typer.Option(help="As rollout.max_running_requests.", min=1)] = 64,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="As actor.dequantize.")] = False,
) -> None:
    """Serve a model on this machine in the protocols of OpenAI and Anthropic, to try it with any client.

    The engine and the endpoint are those of training with an agent (docs/agents.md). Ctrl-C ends it.

    Example: rl2 serve ckpts/spo/latest
    """
    with ending("serve"):
        from RL2.tools.serve import ServeConfig
        from RL2.tools.serve import serve as run

        config = ServeConfig(
            model=model,
            port=port,
            key=key,
            max_new_tokens=max_new_tokens,
            max_running_requests=max_running_requests,
            dequantize=dequantize,
        )

        def ready(address: str, key: str) -> None:
            print(f"serving {model}; Ctrl-C ends it\nexport OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={key}")
            print(f"export ANTHROPIC_BASE_URL={address} ANTHROPIC_API_KEY={key}", flush=True)

        run(config, ready)


@app.command()
def play(
    env: Annotated[Path, typer.Argument(help="An environment script.")],
    data: Annotated[str, typer.Option(help="As train_data.path; leave it out where `reset` makes up the tasks.")] = "",
    row: Annotated[int, typer.Option(help="Number of the row, from 1.", min=1)] = 1,
    say: Annotated[
        list[str] | None,
        typer.Option(help="A response; repeatable, one for each turn. '-': the lines of the standard input."),
    ] = None,
    model: Annotated[str, typer.Option(help="Model whose tokenizer and chat template are used, not its weights.")] = "",
    weight: Annotated[list[str] | None, typer.Option(metavar="PART=NUMBER", help="As reward.weights.PART.")] = None,
    max_turns: Annotated[int, typer.Option(help="As rollout.max_turns.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of a task that `reset` makes up.", min=0)] = 0,
    timeout_s: Annotated[float, typer.Option(help="As rollout.env_timeout_s.", min=0.001)] = 60,
) -> None:
    """Play an environment by hand: read what the model reads, type its responses, and see each reward.

    Without --say, each line of the standard input is a response; a backslash at the end of a line continues it. The
    exit code is 1 if the episode is unscored.

    Example: rl2 play envs/gsm8k.py --data test@openai/gsm8k:main --say "9 * 2 = 18 #### 18"
    """
    from rich.console import Console

    with ending("play"):
        from RL2.config.load import words
        from RL2.tools.play import FROM_INPUT, PlayRequest, responses_of
        from RL2.tools.play import play as run

        request = PlayRequest(env, data, row, model, max_turns, seed, timeout_s, words(weight or []))
        console = Console(highlight=False)
        is_scored = run(request, responses_of(say or [FROM_INPUT], console), console)
    if not is_scored:
        raise typer.Exit(1)


@app.command()
def audit_env(
    env: Annotated[Path, typer.Argument(help="An environment script.")],
    data: Annotated[str, typer.Option(help="As train_data.path; rows have the right answer in extra_info.")],
    key: Annotated[str, typer.Option(help="Key of the right answer in extra_info.")] = "answer",
    limit: Annotated[int, typer.Option(help="Number of rows to try.")] = 50,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Part of the reward about correctness, if `step` returns a dict; repeatable."),
    ] = None,
) -> None:
    """Test an environment's reward: right answers must earn it, near misses and tricks must not; else exit code 1.

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
        affected = f" (reward: {', '.join(parts)})" if parts else ""
        sys.exit(f"rl2 audit-env: {env} is wrong about {len(found.findings)} responses{affected}")


@app.command()
def audit_judge(
    env: Annotated[Path, typer.Argument(help="An environment script that judges with a model, such as envs/judge.py.")],
    data: Annotated[str, typer.Option(help="Rows with responses; pairs (chosen, rejected) show position bias.")],
    limit: Annotated[int, typer.Option(help="Number of rows to try.")] = 50,
    repeats: Annotated[int, typer.Option(help="Number of times each response is judged.")] = 3,
) -> None:
    """Measure a judge's agreement with itself, on repeats and on swapped pairs, with 95% intervals.

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
