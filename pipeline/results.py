"""`results.parquet` and `results.csv` in OUT: one row for every stage run and metric of a sweep.

The uncompressed model is stage `source` at position 0; stage runs that several configurations share stand once.

| column | what |
|---|---|
| sweep | the recipe's name |
| configurations | JSON list of the names of all configurations that go through this stage run |
| result_of | JSON list of those that end with it |
| model, seed, data | of the recipe |
| position, stage | place in the chain from 1, and the stage's name |
| fingerprint, parent | of this stage run and of the one it started from (empty for the source) |
| folder | its folder in OUT (or at the store's URL); the model's path for the source |
| options | JSON of the stage's options |
| metric, value, unit | `perplexity`, `bits_per_byte`, and whatever numbers the measurement holds besides |
| protocol, text, dtype | how the metric was measured, on what, in which precision |
| seconds, peak_memory_bytes | of the stage itself, without the measurement |
| file_bytes, packed_bytes | of its safetensors files; packed for the edge, where the stage says so |
| parameters_total, parameters_nonzero, pattern | counts, and the N:M pattern that was proven to hold |
| reused | true where this sweep found it in the store |
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepress.checkpoints.manifest import write_bytes
from edgepress.pipeline.sweep import SweepResult
from edgepress.pipeline.tables import plain_cell
from edgepress.pipeline.tree import Node, Tree

COLUMNS = {
    "sweep": "string", "configurations": "string", "result_of": "string", "model": "string", "seed": "int64",
    "data": "string", "position": "int64", "stage": "string", "fingerprint": "string", "parent": "string",
    "folder": "string", "options": "string", "metric": "string", "value": "float64", "unit": "string",
    "protocol": "string", "text": "string", "dtype": "string", "seconds": "float64", "peak_memory_bytes": "Int64",
    "file_bytes": "Int64", "packed_bytes": "Int64", "parameters_total": "Int64", "parameters_nonzero": "Int64",
    "pattern": "string", "reused": "bool",
}  # fmt: skip
_UNITS = {"perplexity": "perplexity", "bits_per_byte": "bits/byte"}
_NOT_METRICS = ("tokens", "scored_tokens")  # they say how much was measured


def rows(sweep: str, result: SweepResult) -> list[dict[str, Any]]:
    """The table as plain rows, the source first, then by order of the configurations."""
    return [
        row
        for key, node in result.tree.nodes.items()
        if key in result.outcomes
        for row in _node_rows(sweep, node, result)
    ]


def write_results(out: Path, sweep: str, result: SweepResult) -> None:
    """Both files, each whole or not at all. Parquet has the same columns and values as the CSV, but for the quote
    before a text that a spreadsheet would take for a formula."""
    import io

    import pandas as pd

    table = pd.DataFrame(rows(sweep, result), columns=list(COLUMNS)).astype(COLUMNS)
    write_bytes(out / "results.csv", table.map(plain_cell).to_csv(index=False).encode())
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(out / "results.parquet", buffer.getvalue())


def metrics(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers of a measurement that say how good the model is."""
    return {
        key: float(value)
        for key, value in measured.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_METRICS
    }


def _node_rows(sweep: str, node: Node, result: SweepResult) -> list[dict[str, Any]]:
    outcome = result.outcomes[node.key]
    record, measured, recipe = outcome.record, outcome.measured, node.recipe
    # The options as they are now: a record written before an option was added does not state it.
    options = asdict(node.step.options) if node.step else {}
    fixed = {
        "sweep": sweep,
        "configurations": json.dumps(_through(result.tree, node.key)),
        "result_of": json.dumps(result.tree.ends(node.key)),
        "model": recipe.model or "",
        "seed": recipe.seed,
        "data": recipe.calibration_text,
        "position": node.position,
        "stage": node.stage,
        "fingerprint": record.fingerprint,
        "parent": record.parent["fingerprint"] if record.parent else "",
        "folder": outcome.folder,
        "options": json.dumps(options, sort_keys=True),
        "protocol": measured["protocol"],
        "text": measured["text"],
        "dtype": measured["dtype"],
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes or None,
        "file_bytes": record.file_bytes,
        "packed_bytes": record.packed_bytes,
        "parameters_total": record.parameters_total,
        "parameters_nonzero": record.parameters_nonzero,
        "pattern": record.sparsity["pattern"] if record.sparsity else "",
        "reused": outcome.reused,
    }
    found = metrics(measured).items()
    return [fixed | {"metric": name, "value": value, "unit": _UNITS.get(name, "")} for name, value in found]


def _through(tree: Tree, key: str) -> list[str]:
    return [name for name, path in tree.paths.items() if key in path]
