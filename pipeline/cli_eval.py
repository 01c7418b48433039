"""Commands that measure a checkpoint: eval, generate."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from pipeline.flags import Json, quiet_libraries


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
    quiet_libraries()
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


def generate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoints of any stage, models, or an output folder for all its stages.")
    ],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 60,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="Sample at this temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, also on a terminal.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with a checkpoint's effective weights; several checkpoints stand side by side."""
    quiet_libraries()
    from checkpoints.memory import release
    from checkpoints.runtime import choose_device
    from eval.generate import Decoding, continue_prompt
    from pipeline.lineup import line_up
    from pipeline.side_by_side import as_dict, print_plain, print_table

    decoding, where = Decoding(tokens, temperature, seed, chat), choose_device(device)
    entries = line_up(checkpoints)
    found = []
    for entry in entries:
        found.append(continue_prompt(entry.checkpoint, prompt, decoding, where))
        release()  # one model at a time in memory
    console = Console()
    if as_json:
        typer.echo(json.dumps(as_dict(prompt, decoding, entries, found), indent=2))
    elif len(entries) == 1:
        typer.echo(found[0].text.strip() if chat else found[0].prompt + found[0].text)
    elif plain or not console.is_terminal:
        print_plain(console, entries, found)
    else:
        print_table(console, prompt, decoding, entries, found)
