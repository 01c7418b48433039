"""Commands that hold a model against a chip: check, fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.flags import Json, quiet_libraries

EXIT_DOES_NOT_FIT = 3


_MODEL = "A checkpoint, model folder, config.json or preset; default: the packaged model."
Model = Annotated[str, typer.Argument(help=_MODEL)]
Soc = Annotated[str, typer.Option(help="A shipped chip or a .toml file.")]
Context = Annotated[int, typer.Option(help="Tokens in the KV cache.")]
KvBits = Annotated[int, typer.Option(help="Bits of a cached key or value.")]
ActivationBits = Annotated[int, typer.Option(help="Bits of an activation.")]


def check(
    checkpoint: Model = "",
    soc: Soc = "siracusa",
    context: Context = 256,
    kv_bits: KvBits = 8,
    activation_bits: ActivationBits = 8,
    as_json: Json = False,
) -> None:
    """Judge whether a model fits a chip's memories.

    Exit code 0: it fits; 3: it does not.
    """
    from hardware.check import check as judge
    from hardware.soc import load_soc
    from pipeline.shapes import PACKAGED_PRESET, model_shape

    verdict = judge(
        model_shape(checkpoint or None),
        load_soc(soc),
        context=context,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        name=checkpoint or PACKAGED_PRESET,
    )
    typer.echo(json.dumps(verdict.to_dict(), indent=2) if as_json else verdict.render())
    raise typer.Exit(0 if verdict.fits else EXIT_DOES_NOT_FIT)


def fit(
    model: Model = "",
    soc: Soc = "siracusa",
    context: Context = 256,
    kv_bits: KvBits = 8,
    activation_bits: ActivationBits = 8,
    corpus: Annotated[str, typer.Option("--trim-vocabulary", help="Text the vocabulary may be trimmed to.")] = "",
    sweep: Annotated[
        Path | None, typer.Option(help="Output folder of earlier runs; what they measured counts.")
    ] = None,
    protect_first: Annotated[int, typer.Option(help="First blocks that stay.")] = 4,
    protect_last: Annotated[int, typer.Option(help="Last blocks that stay.")] = 2,
    best: Annotated[int, typer.Option(help="Settings to show at most.")] = 8,
    as_json: Json = False,
) -> None:
    """Find settings of the stages with which a model fits a chip.

    Exit code 0: there are some; 3: there are none.
    """
    quiet_libraries()
    from rich.console import Console

    from hardware.soc import load_soc
    from pipeline.fit import command_of, print_fit, to_dict
    from pipeline.fit import fit as find
    from pipeline.shapes import PACKAGED_PRESET, model_shape

    shape, chip, protect = model_shape(model or None), load_soc(soc), (protect_first, protect_last)
    found, notes = find(
        model, shape, chip, corpus=corpus, sweep=sweep, protect=protect, best=best,
        context=context, kv_bits=kv_bits, activation_bits=activation_bits,
    )  # fmt: skip
    shown = found.fitting or found.closest
    commands = [command_of(model, shape, c.settings, corpus, protect) for c in shown]
    if as_json:
        lists = {"fitting": found.fitting, "closest": found.closest}
        parts = {name: [to_dict(c, m) for c, m in zip(of, commands, strict=False)] for name, of in lists.items()}
        typer.echo(json.dumps({"soc": chip.name, **parts, "verdicts": found.verdicts, "notes": notes}, indent=2))
    else:
        name = model or PACKAGED_PRESET
        title = f"{name} fits {chip.name} with" if found.fitting else f"{name} fits {chip.name} with nothing; closest:"
        print_fit(Console(), title, found, commands, notes)
    raise typer.Exit(0 if found.fitting else EXIT_DOES_NOT_FIT)
