"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from checkpoints.errors import EdgepressError, PlanError, RecipeError
from checkpoints.quiet import quiet_libraries
from pipeline import cli_eval, cli_hardware, cli_model, cli_report, cli_sweep
from pipeline.flags import Json, Out, RecipeFile, Skip, recipe_flags
from pipeline.help import PlainCommand, PlainGroup
from pipeline.recipe import Recipe, draft
from pipeline.sweep_recipe import is_sweep

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130

app = typer.Typer(
    cls=PlainGroup,
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
@recipe_flags
def compress(
    ctx: typer.Context,
    flags: dict[str, Any],
    recipe: RecipeFile = "",
    skip: Skip = "",
    out: Out = Path("out"),
    plan_only: Annotated[bool, typer.Option("--plan", help="Forecast only, as the command plan does.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a LLaMA-like language model into something that fits a tiny chip, honestly measured.

    Without a command, a model goes through the stages below: depth, wanda, lora, gptq, eora, or those not skipped.
    Each writes a checkpoint that loads on its own, and is measured. The same command again goes on where it stopped;
    finished stages are never computed twice.
    """
    if ctx.invoked_subcommand is not None:
        if given := [key for key, value in flags.items() if value is not None]:
            raise PlanError(f"options go behind the command: compress {ctx.invoked_subcommand} … ({', '.join(given)})")
        return
    if plan_only:
        _plan(flags, recipe, skip, as_json)
        return
    drafted = draft(recipe or None, flags, skip)
    quiet_libraries()
    from checkpoints.sources import open_source
    from pipeline.plan import examined
    from pipeline.progress import Reporter
    from pipeline.report import print_summary
    from pipeline.run import run
    from pipeline.store import Store
    from pipeline.vocabulary import corpus_fault

    if fault := corpus_fault(drafted.recipe):
        drafted = replace(drafted, faults=(*drafted.faults, fault))
    examined(drafted, lambda recipe: open_source(recipe.model).shape)
    wanted, console = drafted.recipe, Console(stderr=as_json)
    with Store(out).opened(), Reporter(console, out / "compress.log", quiet=as_json) as reporter:
        signal.signal(signal.SIGINT, reporter.interrupt)
        try:
            result = run(wanted, out, reporter)
        except KeyboardInterrupt:
            reporter.say("interrupted; the same command goes on from the last finished block or step")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(result.report, indent=2))
    else:
        print_summary(console, result, out)


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
    from hardware.soc import load_soc
    from pipeline.plan import examined
    from pipeline.recovery import forecast_recovery
    from pipeline.report import print_plan
    from pipeline.shapes import model_shape
    from pipeline.verdicts import judge, to_dict

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
                        "packed_bytes": shape.packed_bytes,
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
    "Before a run": (plan, cli_hardware.check, cli_hardware.fit, cli_hardware.socs, cli_model.rank),
    "Many runs": (cli_sweep.sweep, cli_sweep.ablate, cli_report.report),
    "What a result is worth": (cli_eval.evaluate, cli_eval.compare, cli_eval.generate),
    "A result's files": (cli_model.verify, cli_model.pack, cli_model.unpack),
}
for panel, commands in _COMMANDS.items():
    for command in commands:
        name = {"evaluate": "eval"}.get(command.__name__, command.__name__)
        app.command(name=name, cls=PlainCommand, rich_help_panel=panel)(command)


def main() -> None:
    """Entry point of the `compress` command."""
    try:
        app(prog_name="compress", standalone_mode=True)
    except RecipeError as error:
        _fail(str(error))
    except EdgepressError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _fail(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
