"""The commands check, fit and socs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Json, with_model

if TYPE_CHECKING:
    from edgepress.checkpoints.shape import ModelShape
    from edgepress.hardware.check import Verdict
    from edgepress.hardware.soc import Soc

EXIT_DOES_NOT_FIT = 3


_MODEL = "A checkpoint, model folder, config.json or preset; default: the packaged model."
Model = Annotated[str, typer.Argument(help=_MODEL)]
Chip = Annotated[str, typer.Option(help="A shipped chip or a .toml file.")]
Context = Annotated[int, typer.Option(help="Tokens in the KV cache.")]
KvBits = Annotated[int, typer.Option(help="Bits of a cached key or value.")]
ActivationBits = Annotated[int, typer.Option(help="Bits of an activation.")]
Chunk = Annotated[int, typer.Option(help="Prompt tokens that pass at once; 0 is the whole context.")]


@with_model("checkpoint")
def check(
    checkpoint: Model = "",
    soc: Chip = "siracusa",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the chip, name=value; may come often.")
    ] = None,
    context: Context = 256,
    kv_bits: Annotated[
        int | None, typer.Option(help="Bits of a cached key or value; default: 8, of a program 32.", show_default=False)
    ] = None,
    kv_window: Annotated[int, typer.Option(help="Newest tokens that stay in the KV cache; 0 is all.")] = 0,
    kv_sinks: Annotated[int, typer.Option(help="First tokens that stay beside the window.")] = 4,
    kv_groups: Annotated[
        bool, typer.Option("--kv-groups", help="Count the KV cache's scales and zero points, as eval --kv-bits has it.")
    ] = False,
    activation_bits: ActivationBits = 8,
    prefill_chunk: Chunk = 0,
    bits: Annotated[int, typer.Option(help="Judge as if the stage gptq had left 8, 4 or 3 bits; 0: as it is.")] = 0,
    embedding_bits: Annotated[int, typer.Option(help="As if embedding and head had 8 or 4 bits; 0: as it is.")] = 0,
    program: Annotated[str, typer.Option(help="rv32: judge the program that export writes, on one plain core.")] = "",
    activations: Annotated[
        str, typer.Option(help="Of such a program: inputs of linear layers in float, or rounded to int8.")
    ] = "float",
    csv: Annotated[Path | None, typer.Option(help="Write every tensor's bytes and place.")] = None,
    operators: Annotated[
        Path | None, typer.Option(help="Write every operator's tiles, bytes and cycles (CSV).")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the memories, and address x time of the tile memory.")] = None,
    as_json: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="With --json: every tensor and operator too.")] = False,
) -> None:
    """Judge whether a model fits a chip's memories.

    Where it does not, it says what would have to give. Exit code 0: it fits; 3: it does not.
    """
    from edgepress.hardware.check import check as judge
    from edgepress.hardware.soc import load_soc
    from edgepress.pipeline.shapes import (
        PACKAGED_PRESET,
        measured_bytes,
        model_shape,
        require_consistent,
        with_other_bits,
    )

    faults = [
        f"{path.parent}: there is no such folder to write to"
        for path in (csv, operators, png)
        if path and not path.parent.is_dir()
    ]
    if activations != "float" and not program:
        faults.append(
            "--activations belongs to --program rv32; --activation-bits counts those of the chip's own engine"
        )
    if tensors and not as_json:
        faults.append("--tensors belongs to --json; --csv writes the same as a table")
    if faults:
        raise PlanError("\n".join(faults))
    shape = model_shape(checkpoint or None)
    require_consistent(checkpoint, shape)
    chip = load_soc(soc, setting or ())
    as_if = with_other_bits(shape, bits, embedding_bits, chip)
    if program:
        drawn = csv or operators or png
        others = kv_window or kv_groups or activation_bits != 8 or prefill_chunk or tensors
        kept = 32 if kv_bits is None else kv_bits
        run = (context, kept, activations)
        _check_program(program, checkpoint, as_if, chip, run, bool(drawn or others), as_json)
    verdict = judge(
        as_if,
        chip,
        context=context,
        kv_bits=8 if kv_bits is None else kv_bits,
        kv_window=kv_window,
        kv_sinks=kv_sinks,
        kv_groups=kv_groups,
        activation_bits=activation_bits,
        prefill_chunk=prefill_chunk or None,
        name=checkpoint or PACKAGED_PRESET,
        file_bytes=measured_bytes(checkpoint) if as_if is shape else None,
        levers=True,
        timing=True,
    )
    if csv:
        _write_csv(csv, verdict.rows())
    if operators:
        _write_csv(operators, verdict.operator_rows())
    if png:
        from edgepress.hardware.draw import draw_verdict

        draw_verdict(verdict, png)
    if as_json:
        typer.echo(json.dumps(verdict.to_dict(tensors=tensors), indent=2))
    else:
        from rich.console import Console

        from edgepress.hardware.show import print_verdict

        print_verdict(Console(), verdict)
    raise typer.Exit(0 if verdict.fits else EXIT_DOES_NOT_FIT)


def _check_program(
    program: str, model: str, shape: ModelShape, soc: Soc, run: tuple[int, int, str], more: bool, as_json: bool
) -> None:
    """Print what the program of `compress export` asks of the chip, and end."""
    if program != "rv32":
        raise PlanError(f"--program {program}: there is rv32, the program that compress export writes")
    if more:
        raise PlanError(
            "--program rv32 is judged with --context, --kv-bits, --activations, --bits and --embedding-bits: the "
            "program computes token by token, and its cache keeps every token; it has no tensors' places to write or "
            "draw"
        )
    quiet_libraries()
    from edgepress.pipeline.export import predict_program
    from edgepress.pipeline.shapes import PACKAGED_PRESET

    found = predict_program(model, shape, soc, *run, model or PACKAGED_PRESET)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
    raise typer.Exit(0 if found.fits else EXIT_DOES_NOT_FIT)


@with_model("model")
def fit(
    model: Model = "",
    soc: Chip = "siracusa",
    context: Context = 256,
    kv_bits: KvBits = 8,
    activation_bits: ActivationBits = 8,
    prefill_chunk: Chunk = 0,
    corpus: Annotated[str, typer.Option("--trim-vocabulary", help="Text the vocabulary may be trimmed to.")] = "",
    sweep: Annotated[
        Path | None, typer.Option(help="Output folder of earlier runs; what they measured counts.")
    ] = None,
    protect_first: Annotated[int, typer.Option(help="First blocks that stay.")] = 4,
    protect_last: Annotated[int, typer.Option(help="Last blocks that stay.")] = 2,
    best: Annotated[int, typer.Option(help="Settings to show at most.")] = 8,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what each layer's bits cost, choose by it, run the best.")
    ] = False,
    data: Annotated[str, typer.Option(help="With --measure: calibration text, as of compress run.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --measure: output folder, a store of finished stages.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find settings of the stages with which a model fits a chip.

    Exit code 0: there are some; 3: there are none.
    """
    quiet_libraries()
    from rich.console import Console

    from edgepress.hardware.soc import load_soc
    from edgepress.pipeline.fit import command_of, print_fit, to_dict
    from edgepress.pipeline.fit import fit as find
    from edgepress.pipeline.shapes import PACKAGED_PRESET, model_shape

    shape, chip, protect = model_shape(model or None), load_soc(soc), (protect_first, protect_last)
    if (data or out) and not measure:
        raise PlanError("--data and --out say where --measure reads and writes, and there is no --measure; give it")
    if measure:
        if sweep is not None:
            raise PlanError("--sweep ranks by what earlier runs measured, --measure measures now: leave one out")
        how = (context, kv_bits, activation_bits, prefill_chunk or None)
        _fit_measured(model, shape, chip, soc, how, data, corpus, protect, best, out or Path("out"), as_json)
    found, notes = find(
        model, shape, chip, corpus=corpus, sweep=sweep, protect=protect, best=best,
        context=context, kv_bits=kv_bits, activation_bits=activation_bits, prefill_chunk=prefill_chunk or None,
    )  # fmt: skip
    shown = found.fitting or found.closest
    commands = [command_of(model, shape, c.settings, corpus, protect) for c in shown]
    if as_json:
        lists = {"fitting": found.fitting, "closest": found.closest}
        parts = {name: [to_dict(c, m) for c, m in zip(of, commands, strict=False)] for name, of in lists.items()}
        typer.echo(json.dumps({"soc": chip.name, **parts, "verdicts": found.verdicts, "notes": notes}, indent=2))
    else:
        name = model or PACKAGED_PRESET
        title = f"{name} fits {chip.name} with"
        if not found.fitting:
            title = f"No setting of the stages makes {name} fit {chip.name}. These come closest:"
        print_fit(Console(), title, found, commands, notes)
    raise typer.Exit(0 if found.fitting else EXIT_DOES_NOT_FIT)


def _fit_measured(
    model: str, shape: ModelShape, chip: Soc, named: str, how: tuple[int, int, int, int | None], data: str, corpus: str,
    protect: tuple[int, int], best: int, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Print the plans chosen by measured losses and what the best one gave, and end."""
    from rich.console import Console

    from edgepress.checkpoints import interrupts
    from edgepress.hardware.check import check as judge
    from edgepress.pipeline.allocate import TooSmallError
    from edgepress.pipeline.budget import print_outcome
    from edgepress.pipeline.fit import measured_fit

    context, kv_bits, activation_bits, chunk = how
    console = Console(stderr=as_json)

    def verdict(of: ModelShape) -> Verdict:
        return judge(
            of, chip, context=context, kv_bits=kv_bits, activation_bits=activation_bits, prefill_chunk=chunk, name=model
        )

    try:
        offers, outcome = measured_fit(
            model, shape, chip, named, data=data, corpus=corpus, protect=protect, best=best, out=out, console=console,
            quiet=as_json, fits=verdict,
        )  # fmt: skip
    except TooSmallError as error:
        if as_json:
            typer.echo(json.dumps({"soc": chip.name, "fitting": [], "notes": [str(error)]}, indent=2))
        else:
            console.print(str(error), highlight=False, emoji=False)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from None
    except KeyboardInterrupt:
        interrupts.caught(None)
        raise
    final = verdict(outcome.result.stages[-1].checkpoint.shape)
    if as_json:
        budget = outcome.to_dict()
        found = {"soc": chip.name, "fitting": offers, "budget": budget, "fits": final.fits, "summary": final.summary}
        typer.echo(json.dumps(found, indent=2))
    else:
        print_outcome(console, outcome)
        console.print(final.summary, highlight=False, emoji=False)
    raise typer.Exit(0 if final.fits else EXIT_DOES_NOT_FIT)


def socs() -> None:
    """List the shipped chips with their memories and settings."""
    from rich.console import Console

    from edgepress.hardware.show import print_soc
    from edgepress.hardware.soc import load_soc, shipped_socs

    for name in shipped_socs():
        print_soc(Console(), name, load_soc(name))


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    import csv
    import io

    from edgepress.checkpoints.manifest import write_bytes
    from edgepress.pipeline.tables import plain_cell

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({key: plain_cell(value) for key, value in row.items()} for row in rows)
    write_bytes(path, table.getvalue().encode())
