"""Flags that several commands share: one for every recipe key and every option of every stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from edgepress.pipeline.recipe import Recipe
from edgepress.stages.options import STAGES

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
    "homotopic": ("--homotopic", int, "Rounds of a little pruning, then distilling, in place of one of each; 0: one."),
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

    def add(key: str, flag: str, kind: Any, text: str, default: Any, panel: str) -> None:
        if default not in ("", None):
            shown = ("no", "yes")[default] if kind is bool else str(default).replace(",", ", ")
            text = f"{text} {escape(f'[default: {shown}]')}"
        name = key.replace(".", "__")
        names[name] = key
        flag_names = [flag, f"--no-{flag[2:]}"] if kind is bool else [flag]
        declared = typer.Option("/".join(flag_names), help=text, rich_help_panel=panel, show_default=False)
        annotation = Annotated[kind | None, declared]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    for key, (flag, kind, text) in _COMMON.items():
        add(key, flag, kind, text, getattr(Recipe, key), "Model, data, measuring")
    for stage, options in STAGES.items():
        types = get_type_hints(options)
        for field in fields(options):
            flag, text = field.metadata["flag"], field.metadata["help"]
            add(f"{stage}.{field.name}", flag, types[field.name], text, field.default, f"Stage {stage}")

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
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Precision of forward passes: auto, bfloat16 or float32.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder, a store of finished stages.")]
