"""The command that makes a page of what an output folder holds: report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from edgepress.checkpoints.errors import EdgepressError, PlanError
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Json

if TYPE_CHECKING:
    from edgepress.pipeline.page.content import Chip
    from edgepress.pipeline.page.study import StageRun, Study


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
    from edgepress.pipeline.page.render import write_report
    from edgepress.pipeline.page.samples import PROMPTS, chosen, generate_samples

    console = Console(stderr=True)

    def tell(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    study = read_study(out)
    for note in study.notes:
        tell(f"! {note}")
    chip = chip_of(study, soc)
    found, why_none = None, "switched off by --samples 0."
    if samples and not chosen(study, samples):
        why_none = "no checkpoint is on this disk."
    elif samples:
        found = generate_samples(study, prompts or PROMPTS, samples, tokens, device, tell)
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
    """The chip and its verdict: the run's own, or made now from the files of a sweep's smallest result."""
    from edgepress.hardware.soc_file import load_soc
    from edgepress.pipeline.page.content import Chip
    from edgepress.pipeline.page.facts import weight_room

    result = study.smallest.result
    subject = f"{study.model}, {result.name}"
    known = study.verdict if not soc else None
    if known is not None and "memories" in known:
        return Chip(str(known["soc"]), weight_room(known), known, subject)
    chip = load_soc(soc or study.soc)
    room = sum(memory.capacity_bytes for memory in chip.with_role("weights"))
    if known is not None:
        return Chip(chip.name, room, known, subject)
    try:
        return Chip(chip.name, room, _judged(result, soc or study.soc, subject), subject)
    except EdgepressError as error:
        return Chip(chip.name, room, None, subject, str(error))


def _judged(result: StageRun, soc: str, name: str) -> dict[str, object]:
    from edgepress.hardware.soc_file import load_soc
    from edgepress.pipeline.shapes import model_shape
    from edgepress.pipeline.verdicts import judge, to_dict

    if result.folder is None:
        raise PlanError(f"the checkpoint {result.name} is not on this disk.")
    return to_dict(judge(model_shape(str(result.folder)), load_soc(soc), name))
