"""Commands that look into a model or checkpoint, or bring it into another form: rank, verify, pack, unpack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Device, Dtype, Json
from edgepress.pipeline.recipe import build


def rank(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf or .bin; default: the packaged model.")] = "",
    metric: Annotated[str, typer.Option(help="perplexity, taylor, magnitude or influence.")] = "perplexity",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    data: Annotated[str, typer.Option(help="Calibration text, as for compress --data.")] = "",
    protect_first: Annotated[int, typer.Option(help="First blocks left out of the ranking.")] = 0,
    protect_last: Annotated[int, typer.Option(help="Last blocks left out of the ranking.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write OUT.png and OUT.json.")] = None,
    as_json: Json = False,
) -> None:
    """Rank a model's blocks by what each is worth.

    The lowest would be removed first.
    """
    quiet_libraries()
    from edgepress.checkpoints.manifest import is_special, require_output
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.rank import print_ranking, rank_blocks, write_ranking

    flags = {"model": model or None, "data": data or None, "seed": seed, "device": device, "dtype": dtype}
    options = {"metric": metric, "protect_first": protect_first, "protect_last": protect_last}
    options |= {"samples": samples, "length": length, "remove": 1}
    for path in (out.with_suffix(".png"), out.with_suffix(".json")) if out and not is_special(out) else ():
        require_output(path)
    wanted = build(None, flags | {f"depth.{key}": value for key, value in options.items()})
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        ranking = rank_blocks(wanted, reporter)
    if out is not None:
        write_ranking(ranking, out)
    if as_json:
        typer.echo(json.dumps(ranking, indent=2))
    else:
        print_ranking(Console(), ranking, out)


def verify(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")]) -> None:
    """Prove a checkpoint: hashes, zeros, finiteness, sizes.

    Every file's hash, the N:M pattern and the manifest's numbers are computed anew.
    """
    quiet_libraries()
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.verify import verify as prove

    for line in prove(Checkpoint.open(checkpoint)):
        typer.echo(line)


def pack(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of any stage, or a model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("model.bin"),
    tokenizer: Annotated[bool, typer.Option("--tokenizer", help="Take the tokenizer's files along.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as one packed file for a chip.

    It holds the kept weights at their bit width and the index of the zeros.
    """
    quiet_libraries()
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.image import pack_checkpoint
    from edgepress.checkpoints.packed_sizes import packed_sizes
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.report import print_packed

    source = Checkpoint.open(checkpoint, hashes=True)
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        image = pack_checkpoint(source, out, tokenizer, reporter)
    sizes = packed_sizes(source.shape)
    if as_json:
        facts = {"path": str(out), "bytes": image.nbytes, "packed_bytes": sizes.total, "sha256": image.sha256}
        typer.echo(json.dumps(facts | {"file_bytes": source.shape.file_bytes, "parts": sizes.parts()}, indent=2))
    else:
        print_packed(Console(), out, image.nbytes, source.shape.file_bytes, sizes)


def unpack(
    image: Annotated[Path, typer.Argument(help="A file that pack wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
) -> None:
    """Restore a packed file's checkpoint folder, bit for bit."""
    quiet_libraries()
    from edgepress.checkpoints.image_restore import unpack_checkpoint
    from edgepress.pipeline.progress import Reporter

    with Reporter(Console(stderr=True)) as reporter:
        restored = unpack_checkpoint(image, out, reporter)
    typer.echo(f"{out}: {len(restored.shape.blocks)} blocks, {restored.shape.file_bytes} bytes of safetensors files")
