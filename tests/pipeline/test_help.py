"""What a newcomer reads: every command's --help at 80 columns, in one process."""

from __future__ import annotations

from dataclasses import fields

import pytest
from typer.testing import CliRunner

from edgepress.pipeline.cli import app
from edgepress.pipeline.recipe import Recipe
from edgepress.stages.options import STAGES

pytestmark = pytest.mark.unit

COMMANDS = (
    "plan", "check", "fit", "socs", "rank", "sweep", "ablate", "report",
    "eval", "compare", "generate", "verify", "pack", "unpack", "export", "simulate",
)  # fmt: skip


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_has_one_line_in_the_order_of_use() -> None:
    lines = shown().splitlines()
    places = [k for name in COMMANDS for k, line in enumerate(lines) if line.startswith(f"│ {name} ")]
    assert len(places) == len(COMMANDS) and places == sorted(places)
    for place in places:
        assert lines[place].rstrip("│ ").endswith(".")  # the sentence ends on the line it begins on


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_python_type_stands_in_the_way(command: str) -> None:
    text = shown(*command.split())
    for clutter in ("<str>", "<int>", "<bool>", "<float>", "<path>", "list["):
        assert clutter not in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_default_of_a_run_is_named_and_none_is_cut() -> None:
    text = " ".join(" ".join(line.strip("│ ") for line in shown("plan").splitlines()).split())
    defaults = [
        getattr(Recipe, name)
        for name in ("protocol", "window", "tokens", "seed", "device", "soc", "homotopic", "spill_mib")
    ]
    defaults += [field.default for options in STAGES.values() for field in fields(options)]
    for default in defaults:
        words = str(default).replace(",", ", ") if not isinstance(default, bool) else "yes" if default else "no"
        assert not words or f"[default: {words}]" in text, words
    wanted = sum(default != "" for default in defaults) + 1  # dtype's is auto too
    assert text.count("[default: ") == wanted


def test_a_mistaken_flag_still_names_it() -> None:
    done = CliRunner().invoke(app, ["plan", "--depth", "two"], env={"COLUMNS": "80"})
    assert done.exit_code == 2 and "'--depth'" in done.output
