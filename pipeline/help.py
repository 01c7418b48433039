"""What `--help` shows: short words for the kinds of values, none for switches, and paragraphs that fill the line."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

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
