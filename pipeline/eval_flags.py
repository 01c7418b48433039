"""One flag of `compress eval` and `compress compare` for every field of edgepress.eval.settings.Settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from edgepress.eval.settings import Settings

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
