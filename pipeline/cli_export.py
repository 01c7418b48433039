"""The commands export and simulate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.manifest import require_place
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Json, with_model
from edgepress.pipeline.formats import FORMATS, Wanted, formats_for, module_of

if TYPE_CHECKING:
    from edgepress.pipeline.export import Export

EXIT_OTHER_TOKENS = 1
ON_CHIPS = {
    "rv32": "a C program for a chip's plain RISC-V cores with an FPU, linked into exactly its memories, that continues "
    "the prompt greedily. README lists the families whose blocks it has. Nothing is lost",
    "deeploy": "one decode step as a graph of 8-bit integers for the compiler Deeploy. Its perplexity is measured",
}


Soc = Annotated[str, typer.Option(help="A shipped chip or a .toml file, with addresses.")]
Context = Annotated[int, typer.Option(help="Tokens in the KV cache.")]
KvBits = Annotated[int, typer.Option(help="Bits of a cached key or value, in Python too: 32, or 8 with scales.")]
Activations = Annotated[
    str, typer.Option(help="What linear layers multiply their codes by: float, or int8, integers with a scale a group.")
]
NewTokens = Annotated[int, typer.Option(help="New tokens at most.")]


def _telling_targets(command: Callable[..., None]) -> Callable[..., None]:
    """Put each value of --to into the command's `--help`."""
    told = [f"{name}: {words}." for name, words in ON_CHIPS.items()]
    told += [f"{name}: for {form.reader}. {form.loses}." for name, form in FORMATS.items()]
    command.__doc__ = "\n\n".join([command.__doc__ or "", *told])
    return command


@with_model("checkpoint")
@_telling_targets
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of any stage, or a model folder.")],
    to: Annotated[str, typer.Option(help="For what; the list is above.")] = "rv32",
    soc: Soc = "siracusa",
    context: Context = 256,
    kv_bits: KvBits = 32,
    activations: Activations = "float",
    prompt: Annotated[str, typer.Option(help="What the program continues.")] = "Once upon a time",
    tokens: NewTokens = 64,
    text: Annotated[
        str, typer.Option(help="deeploy: chooses scales with its first part, measures on the rest; int8: measures.")
    ] = "",
    deeploy: Annotated[str, typer.Option(help="deeploy: a Python that has deeploy-pulp.")] = "",
    kind: Annotated[str, typer.Option("--type", help="The format's own types, where the list has some.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Although it does not fit; over what is there.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write; by itself chip, model.gguf, ….")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a program for a chip, or a file others run.

    Exit code 0: written; 3: it does not fit the chip, and nothing was written.
    """
    if to not in ON_CHIPS and to not in FORMATS:
        read = [f"--to {name}" for name in formats_for(to)]
        told = f"; what it reads is {' or '.join(read)}" if read else near(to, (*ON_CHIPS, *FORMATS))
        raise PlanError(f"--to {to}: there is {', '.join((*ON_CHIPS, *FORMATS))}{told}")
    if to != "rv32" and activations != "float":
        raise PlanError(f"--activations {activations} goes with --to rv32")
    if to != "deeploy" and (deeploy or (text and activations == "float")):
        raise PlanError("--deeploy goes with --to deeploy, and --text with that or with --activations int8")
    if to == "deeploy" and kv_bits not in (8, 32):
        raise PlanError(f"--kv-bits {kv_bits}: Deeploy's graph has eight bits throughout")
    if to in FORMATS:
        of_chips = {"--soc": soc != "siracusa", "--kv-bits": kv_bits != 32, "--prompt": prompt != "Once upon a time"}
        of_chips |= {"--tokens": tokens != 64, "--context": context != 256 and not FORMATS[to].has_cache}
        if given := [flag for flag, changed in of_chips.items() if changed]:
            raise PlanError(f"{' and '.join(given)} would change nothing of --to {to}; leave it out")
        _export_file(checkpoint, to, kind, context, force, out, as_json)
        return
    if kind or as_json:
        raise PlanError(f"--type and --json go with --to {', '.join(FORMATS)}")
    out = out or Path("chip")
    quiet_libraries()
    if to == "deeploy":
        from edgepress.pipeline.cli_deeploy import export_to_deeploy

        export_to_deeploy(checkpoint, soc, context, prompt, tokens, text or "embedded", deeploy, force, out)
        return
    from edgepress.eval.text import load_text
    from edgepress.pipeline.export import NATIVE, require_room_for

    require_room_for(out)
    planned = _planned(checkpoint, soc, context, prompt, tokens, kv_bits, activations)
    measured_on = load_text(text or "embedded", "evaluate") if activations == "int8" else None
    for use in planned.uses:
        parts = ", ".join(f"{part} {nbytes:,}" for part, nbytes in use.parts.items())
        typer.echo(f"{use.name}: {use.nbytes:,} of {use.capacity:,} bytes ({parts})")
    for note in planned.notes:
        typer.echo(note)
    _require_fit(planned, force)
    quality = planned.write(out, measured_on)
    if quality:
        typer.echo(quality)
    with_whose = f"those of {NATIVE}" if quality else "Python's"
    typer.echo(f"{out}: make -C {out} check compiles it, runs it, and compares its tokens with {with_whose}")


def _export_file(
    checkpoint: Path, to: str, kind: str, context: int, force: bool, out: Path | None, as_json: bool
) -> None:
    """Write one of the formats that are no program."""
    form = FORMATS[to]
    if kind and kind not in form.types:
        there = f"there is {', '.join(form.types)}{near(kind, form.types)}" if form.types else f"--to {to} has no types"
        raise PlanError(f"--type {kind}: {there}")
    out = out or Path(form.default)
    if (out.is_file() or (out.is_dir() and any(out.iterdir()))) and not force:
        raise PlanError(f"{out} is there already; write over it with --force, or choose another with -o")
    require_place(out)
    quiet_libraries()
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.runtime import Runtime
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.store import checkpoint_folder

    source = Checkpoint.open(checkpoint_folder(checkpoint), hashes=True)
    with Reporter(Console(stderr=True), quiet=as_json) as reporter:
        written = module_of(form).write(source, Wanted(out, kind, context), Runtime(progress=reporter))
    if as_json:
        facts = {"path": str(written.path), "format": to, "bytes": written.nbytes, "notes": list(written.notes)}
        typer.echo(json.dumps(facts | dict(written.facts), indent=2))
        return
    typer.echo(f"{written.path}: {written.nbytes:,} bytes for {form.reader}")
    for note in written.notes:
        typer.echo(note)


@with_model("checkpoint")
def simulate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of any stage, or a model folder.")],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")] = "Once upon a time",
    soc: Soc = "siracusa",
    context: Context = 256,
    kv_bits: KvBits = 32,
    activations: Activations = "float",
    tokens: NewTokens = 64,
    simulator: Annotated[
        str, typer.Option(help="auto, unicorn, qemu or spike; unicorn alone counts by operator.")
    ] = "auto",
) -> None:
    """Let a checkpoint write on inside a chip's memories.

    The program of the command export is compiled and runs on a simulated RISC-V core. Exit code 1: its tokens are not
    those of Python; 3: it does not fit.
    """
    quiet_libraries()
    import tempfile

    from edgepress.hardware.rv32.build import build, find_compiler
    from edgepress.hardware.rv32.cost import instructions
    from edgepress.hardware.rv32.simulator import (
        difference,
        expected_of,
        expected_tokens,
        find_simulator,
        operator_lines,
        printer,
        tokens_of,
        used_bytes,
    )
    from edgepress.hardware.rv32.simulator import simulate as run_program
    from edgepress.pipeline.export import FLOAT_TOKENS

    simulator = find_simulator(simulator)
    compiler = find_compiler()
    planned = _planned(checkpoint, soc, context, prompt, tokens, kv_bits, activations)
    _require_fit(planned, force=False)

    with tempfile.TemporaryDirectory(prefix="edgepress-chip-") as made:
        folder = Path(made)
        planned.write(folder)
        build(folder, compiler)
        outcome = run_program(folder, printer(), simulator=simulator)
        wanted, whose = expected_tokens(folder), expected_of(folder)
        unrounded = tokens_of(folder / FLOAT_TOKENS) if activations == "int8" else wanted
    new = len(outcome.tokens) - len(planned.run.prompt)  # fewer than asked for where a token ended the text
    guess = instructions(planned.shape, replace(planned.run, new_tokens=new))
    typer.echo("\n\n" + "\n".join(operator_lines(outcome, guess)) + "\n")
    for row in used_bytes(outcome, [use.to_dict() for use in planned.uses]):
        parts = ", ".join(f"{part} {nbytes:,}" for part, nbytes in row["parts"].items())
        typer.echo(
            f"{row['memory']}: {row['used']:,} of {row['capacity']:,} bytes ({parts}); predicted {row['predicted']:,}"
        )
    if told := difference(outcome.tokens, wanted, whose):
        typer.echo(told)
        raise typer.Exit(EXIT_OTHER_TOKENS)
    alike = "" if kv_bits == 32 else f", its keys and values rounded to {kv_bits} bits alike"
    if activations == "int8":
        same = next((k for k, (a, b) in enumerate(zip(wanted, unrounded, strict=False)) if a != b), len(unrounded))
        alike = f"; the first {same} are Python's in float32 too"
    typer.echo(f"all {len(wanted)} tokens are those of {whose}{alike}")


def _planned(
    checkpoint: Path, soc: str, context: int, prompt: str, tokens: int, kv_bits: int, activations: str
) -> Export:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.hardware.soc import load_soc
    from edgepress.pipeline.export import plan_export
    from edgepress.pipeline.store import checkpoint_folder

    source = Checkpoint.open(checkpoint_folder(checkpoint), hashes=True)
    return plan_export(source, load_soc(soc), prompt, tokens, context, kv_bits, activations)


def _require_fit(planned: Export, force: bool) -> None:
    """End with the code 3 and the verdict of the command check where the program does not fit."""
    from edgepress.hardware.check import check as judge
    from edgepress.hardware.rv32.predict import misfit
    from edgepress.hardware.show import print_verdict
    from edgepress.pipeline.cli_hardware import EXIT_DOES_NOT_FIT

    missing = misfit(planned.shape, planned.run, planned.uses)
    if not missing:
        return
    typer.echo(f"the program does not fit {planned.soc.label}: {missing}")
    name, run = planned.checkpoint.name, planned.run
    verdict = judge(
        planned.checkpoint.shape, planned.soc, context=run.context, kv_bits=run.kv_bits, activation_bits=32,
        prefill_chunk=1, name=name, levers=True,
    )  # fmt: skip
    print_verdict(Console(), verdict)
    if not force:
        raise typer.Exit(EXIT_DOES_NOT_FIT)
