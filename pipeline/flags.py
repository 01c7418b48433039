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

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import require_place
from edgepress.checkpoints.quiet import set_verbosity
from edgepress.eval.tasks import Settings
from edgepress.pipeline.recipe import Recipe
from edgepress.stages.options import STAGES

_COMMON: dict[str, tuple[str, type, str]] = {
    "model": ("--model", str, "Folder, hub id, .gguf, llama2.c .bin; default: the packaged SmolLM2-135M-Instruct."),
    "data": ("--data", str, "Calibration text: c4, wikitext2, embedded, self, a file, or several joined with +."),
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

    return _dressed(wrapper, command, sorted(parameters, key=lambda p: p.default is not inspect.Parameter.empty))


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
    parameters = list(wanted.values())
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

    return _dressed(wrapper, command, parameters)


# --- flags of every command -------------------------------------------------------------------------------------------


_QUIET = typer.Option("--quiet", "-q", help="Results and warnings only.", show_default=False)
_VERBOSE = typer.Option("--verbose", "-v", help="Every step, and what libraries say.", show_default=False)


def with_verbosity(command: Callable[..., None], resumed: bool = True) -> Callable[..., None]:
    """Give a command --quiet and --verbose, which hold for all that it calls, and over those before the command.

    Raises CheckpointError before anything else where nothing can be written at its --out.
    resumed: whether the command goes on from what it had done when it was interrupted.
    """

    def wrapper(quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise PlanError("--quiet and --verbose exclude each other")
        if quiet or verbose or "ctx" in given:  # the group: it comes first, and begins anew
            set_verbosity(verbose - quiet)
        if not resumed:
            interrupts.begins_anew()
        other = "ctx" in given and given["ctx"].invoked_subcommand is not None
        if given.get("out") and not other and not given.get("plan_only"):
            require_place(Path(given["out"]))
        command(**given)

    declared = (("quiet", Annotated[bool, _QUIET]), ("verbose", Annotated[bool, _VERBOSE]))
    return _extended(wrapper, command, [_keyword(name, kind, False) for name, kind in declared])


def with_model(parameter: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let the command's argument `parameter`, a model or a list of them, be given with --model as well."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True).parameters[parameter]
        many = declared.annotation.__origin__ == list[str]
        required = declared.default is inspect.Parameter.empty

        def wrapper(model_option: Any, **given: Any) -> None:
            if model_option and given[parameter]:
                raise PlanError("the model is given twice, as an argument and with --model; once is enough")
            given[parameter] = model_option or given[parameter]
            if required and not given[parameter]:
                raise PlanError(f"a {parameter.removesuffix('s')} must be named: its folder, as the argument")
            command(**given)

        kind: Any = list[str] | None if many else declared.annotation.__origin__ | None
        option: Any = Annotated[kind, typer.Option("--model", help="The same as the argument.", show_default=False)]
        extended = _extended(wrapper, command, [_keyword("model_option", option, None)])
        signature = inspect.signature(extended)
        optional = [
            p.replace(default=[] if many else None) if p.name == parameter and required else p
            for p in signature.parameters.values()
        ]
        extended.__signature__ = signature.replace(parameters=optional)  # type: ignore[attr-defined]
        return extended

    return decorate


def with_model_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Let the model of a command made by `recipe_flags` be given as an argument as well."""

    def wrapper(model_argument: str, **given: Any) -> None:
        if model_argument and given["model"]:
            raise PlanError("the model is given twice, as an argument and with --model; once is enough")
        command(**given | {"model": model_argument or given["model"]})

    text = "The same as --model."
    argument = Annotated[str, typer.Argument(metavar="MODEL", help=text, show_default=False)]
    return _extended(wrapper, command, [_keyword("model_argument", argument, "")])


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _extended(
    wrapper: Callable[..., None], command: Callable[..., None], more: list[inspect.Parameter]
) -> Callable[..., None]:
    """The wrapper with the command's name, text and parameters, and these more."""
    return _dressed(wrapper, command, [*inspect.signature(command, eval_str=True).parameters.values(), *more])


def _dressed(
    wrapper: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """The wrapper with the command's name and text, and these parameters, which typer makes flags of."""
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    wrapper.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in keywords}
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


def _require_one_output(command: Any, ctx: Any, args: list[str]) -> None:
    """Fail where an output is named twice: a result would lie elsewhere than one of them says.

    Of other options the last one counts, so that a script's usual ones can be followed by others.
    """
    if ctx.resilient_parsing:  # a shell completes a line that is not finished
        return
    given = [param for param in command.make_parser(ctx).parse_args(args=list(args))[2] if param.name == "out"]
    if len(given) > 1 and given[0].param_type_name == "option":
        ctx.fail(f"{' / '.join(given[0].opts)} is given twice; there is one output")


class PlainCommand(TyperCommand):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.help = _refilled(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _require_one_output(self, ctx, args)
        return super().parse_args(ctx, args)


class PlainGroup(TyperGroup):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.help = _refilled(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _require_one_output(self, ctx, args)
        return super().parse_args(ctx, args)
