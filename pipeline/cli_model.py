"""The commands rank, verify, pack, unpack and report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edgepress.checkpoints.errors import EdgepressError, PlanError
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Device, Dtype, Json, with_model
from edgepress.pipeline.recipe import SELF, build

if TYPE_CHECKING:
    from edgepress.hardware.soc import Soc
    from edgepress.pipeline.page.content import Chip
    from edgepress.pipeline.page.read import StageRun, Study


@with_model("model")
def rank(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf or .bin; default: the packaged model.")] = "",
    metric: Annotated[
        str,
        typer.Option(help="Of blocks perplexity, taylor(-signed), magnitude or influence; bits: each layer's bits."),
    ] = "perplexity",
    quant: Annotated[str, typer.Option(help="With bits: a quantiser of the family to rank.")] = "gptq4-s",
    samples: Annotated[int | None, typer.Option(help="Calibration windows; default: 10, with bits 8.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: 128, with bits 512.")] = None,
    data: Annotated[str, typer.Option(help="Calibration text, as for compress --data.")] = "",
    protect_first: Annotated[int, typer.Option(help="First blocks left out of the ranking.")] = 0,
    protect_last: Annotated[int, typer.Option(help="Last blocks left out of the ranking.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write OUT.png and OUT.json.")] = None,
    as_json: Json = False,
) -> None:
    """Rank a model's blocks by what each is worth, or its layers' bits.

    The lowest block would be removed first. Of bits: what every layer would take and cost at each way to quantise it,
    and what each block's absence and EoRA's adapters would.
    """
    quiet_libraries()
    from edgepress.checkpoints.manifest import is_special, require_output
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.rank import print_bits, print_ranking, rank_bits, rank_blocks, write_bits, write_ranking
    from edgepress.stages.options import Depth

    flags = {"model": model or None, "data": data or None, "seed": seed, "device": device, "dtype": dtype}
    flags["text"] = "embedded" if data == SELF else None  # nothing is measured; a recipe must name a text for it
    options = {"metric": metric, "protect_first": protect_first, "protect_last": protect_last}
    options |= {"samples": 10 if samples is None else samples, "length": 128 if length is None else length, "remove": 1}
    for path in (out.with_suffix(".png"), out.with_suffix(".json")) if out and not is_special(out) else ():
        require_output(path)
    limits = Depth(protect_first=protect_first, protect_last=protect_last)
    if bits := metric == "bits":
        own = {
            "quant": quant,
            "samples": 8 if samples is None else samples,
            "length": 512 if length is None else length,
        }
        wanted = build(None, flags | {f"gptq.{key}": value for key, value in own.items()}, "depth,wanda,lora,eora")
    else:
        wanted = build(None, flags | {f"depth.{key}": value for key, value in options.items()})
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        ranking = rank_bits(wanted, reporter, limits) if bits else rank_blocks(wanted, reporter)
    if out is not None:
        (write_bits if bits else write_ranking)(ranking, out)
    if as_json:
        typer.echo(json.dumps(ranking, indent=2))
    else:
        (print_bits if bits else print_ranking)(Console(), ranking, out)


@with_model("checkpoint")
def verify(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")]) -> None:
    """Prove a checkpoint: hashes, zeros, finiteness, sizes.

    Every file's hash, the N:M pattern and the manifest's numbers are computed anew.
    """
    quiet_libraries()
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import verify as prove
    from edgepress.pipeline.store import checkpoint_folder

    for line in prove(Checkpoint.open(checkpoint_folder(checkpoint))):
        typer.echo(line)


@with_model("checkpoint")
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of any stage, or a model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("model.bin"),
    tokenizer: Annotated[bool, typer.Option("--tokenizer", help="Take the tokenizer's files along.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a packed file that is there.")] = False,
    layout: Annotated[
        str, typer.Option(help="packed: fewest bytes; rv32: as export's program reads it, and what unpack needs.")
    ] = "packed",
    as_json: Json = False,
) -> None:
    """Write a checkpoint as one packed file for a chip.

    It holds the kept weights at their bit width and the index of the zeros.
    """
    if out.is_file() and not force:
        raise PlanError(f"{out} is there already; write over it with --force, or choose another with -o")
    quiet_libraries()
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.image import pack_checkpoint
    from edgepress.checkpoints.packed_sizes import packed_sizes
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.report import print_packed
    from edgepress.pipeline.store import checkpoint_folder

    if layout not in ("packed", "rv32"):
        raise PlanError(f"--layout {layout}: there are packed and rv32")
    source = Checkpoint.open(checkpoint_folder(checkpoint), hashes=True)
    if layout == "rv32":
        from edgepress.pipeline.device_image import pack_device

        written = pack_device(source, out, tokenizer)
        if as_json:
            typer.echo(json.dumps({"path": str(out), **asdict(written)}, indent=2))
        else:
            typer.echo(
                f"{out}: {written.nbytes:,} bytes; the first {written.program_bytes:,} are the program's weights.bin"
            )
        return
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
    from edgepress.checkpoints.image import unpack_checkpoint
    from edgepress.pipeline.device_image import is_device_image, unpack_device
    from edgepress.pipeline.progress import Reporter

    with Reporter(Console(stderr=True)) as reporter:
        read = unpack_device if image.is_file() and is_device_image(image) else unpack_checkpoint
        restored = read(image, out, reporter)
    typer.echo(f"{out}: {len(restored.shape.blocks)} blocks, {restored.shape.file_bytes} bytes of safetensors files")


# --- report -----------------------------------------------------------------------------------------------------------
# The command that makes a page of what an output folder holds: report.


def report(
    out: Annotated[Path, typer.Argument(help="The -o of a finished run or sweep.")] = Path("out"),
    samples: Annotated[int, typer.Option(help="Checkpoints that write samples of text, at most; 0: none.")] = 4,
    prompts: Annotated[list[str] | None, typer.Option(help="What the samples continue; may come often.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each sample, at most.")] = 48,
    soc: Annotated[str, typer.Option(help="Chip to hold results against; default: the recipe's.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for the samples.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write OUT/report.html, one file without a network.

    Its figures lie beside it as PNG.

    Samples of text are generated once and kept in OUT.
    """
    if samples < 0 or tokens < 1:
        raise PlanError("--samples must be 0 or more, and --tokens at least 1")
    quiet_libraries()
    from edgepress.checkpoints.runtime import machine
    from edgepress.pipeline.page.read import read_study
    from edgepress.pipeline.page.render import PROMPTS, chosen, generate_samples, intention, write_report
    from edgepress.pipeline.progress import Reporter

    study, asked = read_study(out), prompts or PROMPTS
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        for note in study.notes:
            reporter.note(note)
        chip = chip_of(study, soc)
        reporter.say(intention(study, asked, samples, tokens))
        found, why_none = None, "switched off by --samples 0."
        if samples and not chosen(study, samples):
            why_none = "no checkpoint is on this disk."
        elif samples:
            found = generate_samples(study, asked, samples, tokens, device, reporter)
            why_none = "no checkpoint could be opened."
    written = write_report(study, chip, found, why_none, machine())
    if as_json:
        facts = {"page": str(written.page), "bytes": written.bytes, "figures": [str(p) for p in written.figures]}
        typer.echo(json.dumps(facts | {"left_out": written.left_out}, indent=2))
        return
    for reason in written.left_out:
        typer.echo(f"left out: {reason}")
    typer.echo(f"{written.page}: {written.bytes / 2**10:,.0f} KiB, {len(written.figures)} figures in {out / 'figures'}")


def chip_of(study: Study, soc: str) -> Chip:
    """The chip, what fits it, and the verdict of the checkpoint to take, made now from its files where they are here.

    A checkpoint of more packed bytes than twice the chip's memory for weights is not judged, and fits not.
    """
    from edgepress.hardware.soc import load_soc
    from edgepress.pipeline.page.content import Chip

    chip = load_soc(soc or study.soc)
    room = sum(memory.capacity_bytes for memory in chip.with_role("weights"))
    fits = {}
    for run in (c.run for c in study.comparable):
        if study.size(run) > 2 * room:
            fits[run.fingerprint] = False
        elif run.folder is not None and (verdict := _judged(run, chip, "", more=False).get("fits")) is not None:
            fits[run.fingerprint] = bool(verdict)
    bare = Chip(chip.label, room, None, fits=fits, soc=soc or study.soc)
    taken = bare.taken(study)
    if taken is None:
        return replace(bare, why_not="there is no checkpoint to take.")
    subject = f"{study.model_title}, {taken.choice.name}"
    known = study.verdict if not soc and taken.run is study.configurations[0].result else None
    if taken.run.folder is not None:
        made = _judged(taken.run, chip, subject, more=True)
        return replace(bare, verdict=known if known and made["fits"] is None else made, subject=subject)
    missing = f"the checkpoint {taken.choice.name} is not on this disk."
    return replace(bare, verdict=known, subject=subject, why_not="" if known else missing)


def _judged(run: StageRun, chip: Soc, name: str, more: bool) -> dict[str, Any]:
    """more: with levers and time."""
    from edgepress.pipeline.plan import judge, to_dict
    from edgepress.pipeline.shapes import model_shape

    try:
        shape = model_shape(str(run.folder))
    except EdgepressError as error:
        return {"fits": None, "summary": str(error)}
    return to_dict(judge(shape, chip, name, timing=more, levers=more))
