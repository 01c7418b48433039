"""Print tables whose numbers are never cut, and write safe cells of CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

# What a spreadsheet computes or strips (OWASP, "CSV Injection"), behind any number of quotes, so that one put before
# it can be taken off again.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def plain_cell(value: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would compute gets a quote before it; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value) else value


def read_cell(value: Any) -> Any:
    """What `plain_cell` was given."""
    quoted = isinstance(value, str) and value.startswith("'") and _FORMULA.match(value[1:])
    return value[1:] if quoted else value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) is not None


def print_whole(console: Console, table: Table, labels: int = 1) -> None:
    """Print a table, in parts of as many columns as the console has room for.

    Each part begins with the first `labels` columns, which name the rows. A column that is too wide even alone is
    printed at its own width: a line that the terminal breaks still has all its digits.
    """
    names, rest = table.columns[:labels], table.columns[labels:]
    while rest:
        counts = range(len(rest), 0, -1)
        fitting = (k for k in counts if _width(console, _part(table, [*names, *rest[:k]])) <= console.width)
        count = next(fitting, 1)
        part, rest = _part(table, [*names, *rest[:count]]), rest[count:]
        width = _width(console, part)
        (console if width <= console.width else Console(file=console.file, width=width)).print(part)


def _part(table: Table, columns: Sequence[Column]) -> Table:
    part = Table(box=table.box, pad_edge=table.pad_edge, collapse_padding=table.collapse_padding)
    for column in columns:
        part.add_column(column.header, justify=column.justify, no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*cells)
    return part


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum
