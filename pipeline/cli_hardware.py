"""Commands that hold a model against a chip: check."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.flags import Json

EXIT_DOES_NOT_FIT = 3


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
