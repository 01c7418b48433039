"""What `compress export --to deeploy` prints: the fit, the integer form's perplexity, and Deeploy's own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import write_bytes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import with_bits
from edgepress.hardware.check import check as judge
from edgepress.hardware.deeploy.memory import INSTALL, LEVELS, compiled, interpreter
from edgepress.hardware.rv32.memory import does_not_fit
from edgepress.hardware.show import print_verdict
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.cli_hardware import EXIT_DOES_NOT_FIT
from edgepress.pipeline.deeploy import FACTS, Export, in_words, plan_export, require_room_for, write
from edgepress.pipeline.export import token_pieces
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.store import checkpoint_folder

AS_DEEPLOY = {"sram_role": "weights", "kv_copies": "2"}  # settings of Siracusa's file


def export_to_deeploy(
    checkpoint: Path, soc: str, context: int, prompt: str, tokens: int, text: str, deeploy: str, force: bool, out: Path
) -> None:
    """Write the graph; exit code 3 where it does not fit and is not forced, before anything is written."""
    require_room_for(out)
    python = interpreter(deeploy)
    planned = plan_export(
        Checkpoint.open(checkpoint_folder(checkpoint), hashes=True), load_soc(soc), prompt, tokens, context, text
    )
    for use in planned.uses:
        parts = ", ".join(f"{part} {nbytes:,}" for part, nbytes in use.parts.items())
        typer.echo(f"{use.name}: {use.nbytes:,} of {use.capacity:,} bytes ({parts})")
    _require_fit(planned, soc, force)
    with Reporter(Console(stderr=True)) as reporter:
        written = write(planned, out, Runtime(progress=reporter))
    for line in in_words(written):
        typer.echo(line)
    pieces = token_pieces(planned.checkpoint.folder, planned.checkpoint.shape.vocabulary)
    typer.echo(f"in integers: {b''.join(pieces[token] for token in written.tokens).decode(errors='replace').strip()}")
    if python:
        _compare(planned, compiled(out, python, planned.uses), out)
    else:
        typer.echo(f"no Python with Deeploy is on PATH; --deeploy PYTHON names one, made by: {INSTALL}")
    typer.echo(f"{out}: network.onnx, inputs.npz and outputs.npz of one decode step; host.npz has what is looked up")


def _require_fit(planned: Export, soc: str, force: bool) -> None:
    """End with the code 3 and the verdict of the command check where the graph does not fit."""
    missing = does_not_fit(planned.uses)
    if not missing:
        return
    typer.echo(f"the graph does not fit {planned.soc.label}: {missing}")
    typer.echo("Deeploy puts weights into SRAM alone. The verdict of the command check, which has MRAM for them too:")
    known = {setting.name for setting in planned.soc.settings if setting.value == setting.default}
    chip = load_soc(soc, [f"{name}={value}" for name, value in AS_DEEPLOY.items() if name in known])
    verdict = judge(
        with_bits(planned.checkpoint.shape, 8, -1), chip, context=planned.context, kv_bits=8, activation_bits=8,
        prefill_chunk=1, name=planned.checkpoint.name, levers=True,
    )  # fmt: skip
    print_verdict(Console(), verdict)
    if not force:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _compare(planned: Export, found: dict[str, Any], out: Path) -> None:
    """Deeploy's figures beside ours, on the screen and in the folder."""
    operators, jobs, seconds = found["operators"], found["jobs"], found["seconds"]
    typer.echo(f"Deeploy compiled it in {seconds} s: {operators} operators, {jobs} of them on N-EUREKA")
    for use in planned.uses:
        theirs = found["memories"][LEVELS[use.name]]
        both = theirs["static"] + theirs["dynamic"]
        typer.echo(
            f"{use.name}: Deeploy {both:,} bytes ({theirs['static']:,} constant + {theirs['dynamic']:,} at run time), "
            f"ours {use.nbytes:,}"
        )
    facts = json.loads((out / FACTS).read_text(encoding="utf-8")) | {"deeploy": found}
    write_bytes(out / FACTS, json.dumps(facts, indent=2).encode() + b"\n")
