"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from checkpoints.errors import EdgepressError, PlanError, RecipeError
from pipeline.recipe import Recipe, build
from stages.options import STAGES

EXIT_ERROR, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 2, 3, 130

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Turn a LLaMA-like language model into something that fits a tiny chip, honestly measured.",
)

_COMMON: dict[str, tuple[str, type, str]] = {
    "model": ("--model", str, "Folder, hub id, .gguf, llama2.c .bin; default: the packaged SmolLM2-135M-Instruct."),
    "data": ("--data", str, "Calibration text: c4, wikitext2, embedded, self, or a file."),
    "text": ("--text", str, "Text to measure on; default: the held-out part of the calibration text."),
    "protocol": ("--protocol", str, "How perplexity is measured: windows or rows."),
    "window": ("--window", int, "Tokens per window or row."),
    "tokens": ("--tokens", int, "Tokens of the text that are measured; 0 is all."),
    "seed": ("--seed", int, "Seed of every stage's own random generator."),
    "device": ("--device", str, "auto, cpu or cuda."),
    "dtype": ("--dtype", str, "Precision of forward passes: auto, bfloat16 or float32."),
    "soc": ("--soc", str, "Chip of the verdict: a shipped name or a .toml file."),
    "spill_mib": ("--spill-mib", int, "Calibration states beyond this many MiB go to a temporary file."),
}


def recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every recipe key and every option of every stage.

    The command's keyword `flags` receives them as `{"seed": 1, "depth.remove": 2}`; None means not given.
    """
    wanted = dict(inspect.signature(command, eval_str=True).parameters)
    del wanted["flags"]
    parameters = list(wanted.values())
    names: dict[str, str] = {}

    def add(key: str, flag: str, kind: Any, text: str, panel: str) -> None:
        name = key.replace(".", "__")
        names[name] = key
        flag_names = [flag, f"--no-{flag[2:]}"] if kind is bool else [flag]
        declared = typer.Option("/".join(flag_names), help=text, rich_help_panel=panel, show_default=False)
        annotation = Annotated[kind | None, declared]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    for key, (flag, kind, text) in _COMMON.items():
        add(key, flag, kind, text, "Model, data, measuring")
    for stage, options in STAGES.items():
        types = get_type_hints(options)
        for field in fields(options):
            text = f"{field.metadata['help']} [{field.default}]" if field.default != "" else field.metadata["help"]
            add(f"{stage}.{field.name}", field.metadata["flag"], types[field.name], text, f"Stage {stage}")

    def wrapper(**given: Any) -> None:
        flags = {names[name]: given.pop(name) for name in names}
        command(flags=flags, **given)

    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    order = sorted(parameters, key=lambda p: p.default is not inspect.Parameter.empty)
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in order]
    )
    wrapper.__annotations__ = {p.name: p.annotation for p in order}
    return wrapper


RecipeFile = Annotated[str, typer.Option("--recipe", help="YAML file or shipped recipe; flags go over it.")]
Skip = Annotated[str, typer.Option("--skip", help="Stages to leave out, comma-separated.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output, nothing else.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder, a store of finished stages.")]


@app.callback(invoke_without_command=True)
@recipe_flags
def compress(
    ctx: typer.Context,
    flags: dict[str, Any],
    recipe: RecipeFile = "",
    skip: Skip = "",
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Compress a causal language model in five stages: depth, wanda, lora, gptq, eora.

    Each stage runs with its default unless skipped, writes a checkpoint that loads on its own, and is measured.
    The same command again goes on where it stopped; finished stages are never computed twice.
    """
    if ctx.invoked_subcommand is not None:
        if given := [key for key, value in flags.items() if value is not None]:
            raise PlanError(f"options go behind the command: compress {ctx.invoked_subcommand} … ({', '.join(given)})")
        return
    wanted = build(recipe or None, flags, skip)
    _quiet_libraries()
    from pipeline.progress import Reporter
    from pipeline.report import print_summary
    from pipeline.run import run
    from pipeline.store import Store

    console = Console(stderr=as_json)
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


@app.command()
@recipe_flags
def plan(flags: dict[str, Any], recipe: RecipeFile = "", skip: Skip = "", as_json: Json = False) -> None:
    """Forecast every stage's parameters, bytes and memory, and the verdict, without touching a weight."""
    wanted = build(recipe or None, flags, skip)
    _quiet_libraries()
    from hardware.check import check
    from hardware.soc import load_soc
    from pipeline.plan import plan as plan_stages
    from pipeline.report import print_plan
    from pipeline.shapes import model_shape

    shape = model_shape(wanted.model)
    stages = plan_stages(wanted, shape)
    final = stages[-1].shape if stages else shape
    verdict = check(final, load_soc(wanted.soc), context=min(256, shape.positions), name=_model_name(wanted))
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": _model_name(wanted),
                    "source": {
                        "parameters_total": shape.parameters_total,
                        "parameters_nonzero": shape.parameters_nonzero,
                        "file_bytes": shape.file_bytes,
                    },
                    "stages": [stage.to_dict() for stage in stages],
                    "notes": list(wanted.notes),
                    "hardware": verdict.to_dict(),
                },
                indent=2,
            )
        )
    else:
        print_plan(Console(), _model_name(wanted), shape, stages, wanted.notes, verdict)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of any stage, or any model --model takes.")] = "",
    text: Annotated[str, typer.Option(help="A text file, wikitext2, or embedded.")] = "embedded",
    protocol: Annotated[str, typer.Option(help="windows or rows.")] = "windows",
    window: Annotated[int, typer.Option(help="Tokens per window or row.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are measured; 0 is all.")] = 16384,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure a checkpoint's perplexity. A file is measured from its beginning, named texts on their test part."""
    _quiet_libraries()
    from checkpoints.runtime import Runtime, choose_device, choose_dtype
    from checkpoints.sources import open_source
    from eval.perplexity import Protocol, measure
    from eval.text import NAMED, load_text
    from pipeline.progress import Reporter

    how = Protocol(protocol, window, tokens)
    data = load_text(text, "evaluate" if text in NAMED else "whole")
    model = open_source(checkpoint or None)
    where = choose_device(device)
    precision = choose_dtype(dtype, where, model.shape.blocks[0].linears[0].dtype)
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        result = measure(model, data, how, Runtime(where, precision, progress=reporter))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4f}  ({result.protocol}; {result.text}; {result.dtype}; "
            f"{result.bits_per_byte:.3f} bits per byte)"
        )


@app.command()
def rank(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf or .bin; default: the packaged model.")] = "",
    metric: Annotated[str, typer.Option(help="perplexity, taylor, magnitude or influence.")] = "perplexity",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    data: Annotated[str, typer.Option(help="Calibration text, as for compress --data.")] = "",
    protect_first: Annotated[int, typer.Option(help="First blocks left out of the ranking.")] = 0,
    protect_last: Annotated[int, typer.Option(help="Last blocks left out of the ranking.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write OUT.png and OUT.json.")] = None,
    as_json: Json = False,
) -> None:
    """Rank a model's blocks by what each is worth; the lowest would be removed first."""
    _quiet_libraries()
    from pipeline.progress import Reporter
    from pipeline.rank import print_ranking, rank_blocks, write_ranking

    flags = {"model": model or None, "data": data or None, "seed": seed, "device": device, "dtype": dtype}
    options = {"metric": metric, "protect_first": protect_first, "protect_last": protect_last}
    options |= {"samples": samples, "length": length, "remove": 1}
    wanted = build(None, flags | {f"depth.{key}": value for key, value in options.items()})
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        ranking = rank_blocks(wanted, reporter)
    if out is not None:
        write_ranking(ranking, out)
    if as_json:
        typer.echo(json.dumps(ranking, indent=2))
    else:
        print_ranking(Console(), ranking, out)


@app.command()
def check(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, model folder, config.json or preset.")] = "",
    soc: Annotated[str, typer.Option(help="A shipped chip or a .toml file.")] = "siracusa",
    context: Annotated[int, typer.Option(help="Tokens in the KV cache.")] = 256,
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached key or value.")] = 8,
    activation_bits: Annotated[int, typer.Option(help="Bits of an activation.")] = 8,
    as_json: Json = False,
) -> None:
    """Judge whether a model fits a chip's memories. Exit code 0: it fits; 3: it does not."""
    from hardware.check import check as judge
    from hardware.soc import load_soc
    from pipeline.shapes import model_shape

    verdict = judge(
        model_shape(checkpoint or None),
        load_soc(soc),
        context=context,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        name=checkpoint or "smollm2-135m",
    )
    typer.echo(json.dumps(verdict.to_dict(), indent=2) if as_json else verdict.render())
    raise typer.Exit(0 if verdict.fits else EXIT_DOES_NOT_FIT)


@app.command()
def verify(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")]) -> None:
    """Re-check a checkpoint: every hash, the N:M pattern, finiteness, and the manifest's numbers."""
    _quiet_libraries()
    from checkpoints.checkpoint import Checkpoint
    from checkpoints.verify import verify as prove

    for line in prove(Checkpoint.open(checkpoint)):
        typer.echo(line)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of any stage, or any model --model takes.")],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 60,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a prompt greedily with a checkpoint's effective weights."""
    _quiet_libraries()
    from checkpoints.runtime import choose_device
    from checkpoints.sources import open_source
    from eval.generate import continue_greedily

    typer.echo(continue_greedily(open_source(checkpoint), prompt, tokens, choose_device(device)))


def _model_name(recipe: Recipe) -> str:
    return recipe.model or "smollm2-135m-instruct"


def _quiet_libraries() -> None:
    """Their warnings and bars would run through ours; errors still come through."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def main() -> None:
    """Entry point of the `compress` command."""
    try:
        app(standalone_mode=True)
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
