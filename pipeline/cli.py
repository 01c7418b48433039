"""The command line; heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError, in_words
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline import cli_eval, cli_export, cli_hardware, cli_model, cli_sweep
from edgepress.pipeline.flags import (
    Json,
    Out,
    PlainCommand,
    PlainGroup,
    RecipeFile,
    Skip,
    recipe_flags,
    with_model_argument,
    with_verbosity,
)
from edgepress.pipeline.recipe import Recipe, draft
from edgepress.pipeline.sweep_recipe import is_sweep

EXIT_BUG, EXIT_ERROR, EXIT_PIPE = 1, 2, 141

app = typer.Typer(
    cls=PlainGroup,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="rich",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)


Budget = Annotated[
    str,
    typer.Option(help="Bytes (60MiB), bits a parameter (4.5bits) or a chip: the best bits and blocks that fit."),
]
BudgetAs = Annotated[str, typer.Option(help="Whose bytes --budget counts: packed, or gguf of export --to gguf.")]
BudgetWith = Annotated[str, typer.Option(help="Stages to try with and without: wanda, vocabulary.")]
Rounds = Annotated[int, typer.Option("--budget-rounds", help="Plans of --budget that are run and measured, at most.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Forecast only, as the command plan does.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgepress {version('edgepress')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
@with_verbosity
@recipe_flags
def compress(
    ctx: typer.Context,
    flags: dict[str, Any],
    recipe: RecipeFile = "",
    skip: Skip = "",
    out: Out = Path("out"),
    plan_only: PlanOnly = False,
    budget: Budget = "",
    budget_as: BudgetAs = "packed",
    budget_with: BudgetWith = "",
    budget_rounds: Rounds = 2,
    as_json: Json = False,
    show_version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Turn a LLaMA-like language model into something that fits a tiny chip, honestly measured.

    Without a command, a model goes through the stages below: depth, wanda, lora, gptq, eora, or those not skipped.
    Each writes a checkpoint that loads on its own, and is measured. The same command again goes on where it stopped;
    finished stages are never computed twice.
    """
    _require_surroundings()
    if ctx.invoked_subcommand is not None:
        if given := [key for key, value in flags.items() if value is not None]:
            raise PlanError(f"options go behind the command: compress {ctx.invoked_subcommand} … ({', '.join(given)})")
        return
    _run(flags, recipe, skip, out, plan_only, as_json, budget, budget_as, budget_with, budget_rounds)


@with_model_argument
@recipe_flags
def run(
    flags: dict[str, Any],
    recipe: RecipeFile = "",
    skip: Skip = "",
    out: Out = Path("out"),
    plan_only: PlanOnly = False,
    budget: Budget = "",
    budget_as: BudgetAs = "packed",
    budget_with: BudgetWith = "",
    budget_rounds: Rounds = 2,
    as_json: Json = False,
) -> None:
    """Send a model through the stages, as compress does without a command."""
    _run(flags, recipe, skip, out, plan_only, as_json, budget, budget_as, budget_with, budget_rounds)


def _run(
    flags: dict[str, Any],
    recipe: str,
    skip: str,
    out: Path,
    plan_only: bool,
    as_json: bool,
    budget: str,
    counted: str,
    tried: str,
    rounds: int,
) -> None:
    if not budget and (counted != "packed" or tried):
        flag = f"--budget-with {tried}" if tried else f"--budget-as {counted}"
        raise PlanError(f"{flag} says more of --budget, and there is no --budget; give one")
    if budget and plan_only:
        raise PlanError("--budget looks at the weights, so --plan cannot forecast what it chooses; leave one out")
    if plan_only:
        _plan(flags, recipe, skip, as_json)
        return
    if budget:
        from edgepress.pipeline.budget import Wish, candidate_stages, print_outcome, require_possible, run_budget
        from edgepress.pipeline.store import open_model

        names = tuple(dict.fromkeys(name.strip() for name in tried.split(",") if name.strip()))
        wish = Wish(budget, counted, flags.get("gptq.quant_embeddings"), rounds=rounds, tried=names)
        if not recipe:
            flags, skip, beside = candidate_stages(flags, skip, counted, names)
            wish = replace(wish, beside=beside)
    drafted = draft(recipe or None, flags, skip)
    quiet_libraries()
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.report import print_summary
    from edgepress.pipeline.run import prepared
    from edgepress.pipeline.run import run as run_stages
    from edgepress.pipeline.store import Store

    wanted, console = prepared(drafted, out), Console(stderr=as_json)
    if budget:  # before anything is written
        require_possible(wanted, wish, open_model(wanted.model))
    with Store(out).opened(), Reporter(console, out / "compress.log", quiet=as_json) as reporter:
        try:
            with interrupts.gently(reporter.interrupt):
                if budget:
                    found = run_budget(wanted, wish, out, reporter)
                result = found.result if budget else run_stages(wanted, out, reporter)
        except KeyboardInterrupt:
            interrupts.caught(None if as_json else reporter.say)  # quiet, it would say it to the log alone
            raise
    if as_json:
        typer.echo(json.dumps(result.report | ({"budget": found.to_dict()} if budget else {}), indent=2))
    else:
        print_summary(console, result, out)
        if budget:
            print_outcome(console, found)


@with_model_argument
@recipe_flags
def plan(flags: dict[str, Any], recipe: RecipeFile = "", skip: Skip = "", as_json: Json = False) -> None:
    """Forecast what each stage leaves, needs and fits.

    Parameters, bytes, peak memory and the chip's verdict, without touching a weight.
    """
    _plan(flags, recipe, skip, as_json)


def _plan(flags: dict[str, Any], recipe: str, skip: str, as_json: bool) -> None:
    if is_sweep(recipe):
        cli_sweep.plan_sweep(recipe, flags, skip, as_json)
        return
    drafted = draft(recipe or None, flags, skip)
    quiet_libraries()
    from edgepress.hardware.soc import load_soc
    from edgepress.pipeline.plan import examined, judge, to_dict
    from edgepress.pipeline.report import forecast_recovery, print_plan
    from edgepress.pipeline.shapes import model_shape

    wanted, (shape, stages) = drafted.recipe, examined(drafted, lambda recipe: model_shape(recipe.model))
    final = stages[-1].shape if stages else shape
    verdict = judge(final, load_soc(wanted.soc), _model_name(wanted), timing=True)
    recovery = forecast_recovery(wanted, shape, stages)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": _model_name(wanted),
                    "source": {
                        "parameters_total": shape.parameters_total,
                        "parameters_nonzero": shape.parameters_nonzero,
                        "file_bytes": shape.file_bytes,
                        "packed_bytes": packed_sizes(shape).total,
                    },
                    "stages": [stage.to_dict() for stage in stages],
                    "recovery": [entry.to_dict() for entry in recovery],
                    "notes": list(wanted.notes),
                    "hardware": to_dict(verdict),
                },
                indent=2,
            )
        )
    else:
        print_plan(
            Console(),
            _model_name(wanted),
            shape,
            stages,
            wanted.notes,
            verdict,
            [entry.in_words() for entry in recovery],
        )


def _model_name(recipe: Recipe) -> str:
    return recipe.model or "smollm2-135m-instruct"


# In the order of use: what would come out, then what a result is worth, then its files.
_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "A run": (run,),
    "Before a run": (plan, cli_hardware.check, cli_hardware.fit, cli_hardware.socs, cli_model.rank),
    "Many runs": (cli_sweep.sweep, cli_sweep.ablate, cli_model.report),
    "What a result is worth": (cli_eval.evaluate, cli_eval.compare, cli_eval.generate),
    "A result's files": (cli_model.verify, cli_model.pack, cli_model.unpack, cli_export.export, cli_export.simulate),
}
_RESUMED = (run, cli_sweep.sweep, cli_sweep.ablate, cli_eval.evaluate, cli_eval.compare)  # the others begin anew
for panel, commands in _COMMANDS.items():
    for command in commands:
        name = {"evaluate": "eval"}.get(command.__name__, command.__name__)
        app.command(name=name, cls=PlainCommand, rich_help_panel=panel)(with_verbosity(command, command in _RESUMED))


def main() -> None:
    """The `compress` command in this process: what goes wrong is one message, and SystemExit has the exit code."""
    with interrupts.listening():
        ended = perform()
    sys.exit(interrupts.code() or ended)


def perform() -> int:
    """Do what `sys.argv` says; the exit code. Signals are listened to by the caller."""
    _open_streams()
    ended = _ended_by(interrupts.outcome(lambda: app(prog_name="compress", standalone_mode=True)))
    if interrupts.code():  # also where a library has made another error of it
        interrupts.wind_up()
        ended = interrupts.code()
    try:
        sys.stdout.flush()
    except OSError:
        _close_pipe()
        ended = ended or EXIT_PIPE
    return ended


def _require_surroundings() -> None:
    """Raise PlanError where libraries that come later could not work, and would blame the model or themselves."""
    try:
        os.getcwd()
    except OSError:
        raise PlanError("the current folder is gone; change to one that is there") from None
    if sys.flags.optimize > 1:
        raise PlanError("PYTHONOPTIMIZE=2 (python -OO) takes away docstrings that transformers needs; set it to 1 or 0")


def _open_streams() -> None:
    """Open what the shell has closed, or the next file to be opened would be taken for it; and print any character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ended_by(error: BaseException | None) -> int:
    """Say what the error was, and return the exit code."""
    if interrupts.code() or isinstance(error, KeyboardInterrupt):
        return interrupts.code() or 130
    if error is None:
        return 0
    cause = error.__context__ if isinstance(error, SystemExit) else error  # typer makes an exit of a broken pipe
    if isinstance(cause, BrokenPipeError):
        _close_pipe()
        return EXIT_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if (message := in_words(error)) is not None:
        plain = message.encode(errors="backslashreplace").decode()  # a name from outside may not be text
        Console(stderr=True).print(f"error: {plain}", style="red", highlight=False, markup=False, soft_wrap=True)
        return EXIT_ERROR
    import platform
    import traceback

    traceback.print_exception(error)
    print(
        f"\nthis is a bug in edgepress ({type(error).__name__}). Please report it with the lines above, the command "
        f"({' '.join(sys.argv)}), Python {platform.python_version()} and the model's config.json. What a finished "
        "stage wrote is sound; the same command goes on from there.",
        file=sys.stderr,
    )
    return EXIT_BUG


def _close_pipe() -> None:
    """Nobody reads standard output any more; Python would complain once more when it flushes at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
