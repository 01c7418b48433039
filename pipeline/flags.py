"""Make flags from option fields, and the texts of `--help`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from edgepress.eval.tasks import Settings
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


# --- flags of eval ----------------------------------------------------------------------------------------------------
# One flag of `compress eval` and `compress compare` for every field of edgepress.eval.tasks.Settings.


_PANEL = "Tasks"


def settings_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's keyword `settings` by the flags that make it."""
    wanted = dict(inspect.signature(command, eval_str=True).parameters)
    del wanted["settings"]
    types = get_type_hints(Settings)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in wanted.values()]
    for field in fields(Settings):
        flag, kind, default = field.metadata["flag"], types[field.name], field.default
        many = kind == tuple[str, ...]
        declared = typer.Option(flag, help=field.metadata["help"], rich_help_panel=_PANEL)
        shown: Any = list[str] if many else kind
        annotation = Annotated[shown, declared]
        value = [] if many else default
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)
        )

    def wrapper(**given: Any) -> None:
        values = {field.name: given.pop(field.name) for field in fields(Settings)}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        command(settings=Settings(**values), **given)

    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


# --- --help -----------------------------------------------------------------------------------------------------------
# What `--help` shows: short words for the kinds of values, none for switches, and paragraphs that fill the line.


_KINDS = {"int": "N", "float": "X", "bool": "", "Path": "PATH"}


def _refilled(text: str | None) -> str | None:
    """Without a docstring's line ends, which rich would keep."""
    return text and "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _plain(params: list[Any]) -> list[Any]:
    for param in params:
        if param.param_type_name == "option":
            kind = getattr(param.type_descriptor.annotation, "__name__", "")
            param.metavar = param.metavar or _KINDS.get(kind, "TEXT")
        else:  # an argument's metavar would stand for its name
            param.display_type_rich = lambda ctx: ""
    return params


class PlainCommand(TyperCommand):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.help = _refilled(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class PlainGroup(TyperGroup):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.help = _refilled(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))
