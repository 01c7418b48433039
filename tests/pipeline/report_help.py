"""Output folders made by hand, small enough for every test: a run of five stages, and a sweep's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from edgepress.checkpoints.manifest import Manifest, sealed, write_json
from edgepress.pipeline.page.content import Chip
from edgepress.pipeline.page.facts import weight_room
from edgepress.pipeline.page.read import Study
from edgepress.pipeline.recipe import Recipe

MIB = 2**20
MEASURED = {"protocol": "windows of 64, first 1024 tokens", "text": "embedded", "dtype": "bfloat16"}
STAGES = ("depth", "wanda", "lora", "gptq", "eora")
PERPLEXITY = (20.0, 26.0, 28.0, 23.0, 25.0, 24.0)  # the uncompressed model's first
PACKED = (100 * MIB, 90 * MIB, 80 * MIB, 80 * MIB, 24 * MIB, 30 * MIB)
LAYERS = ("self_attn.q_proj", "mlp.down_proj")
FACTS: dict[str, dict[str, Any]] = {
    "depth": {"metric": "perplexity", "ranking": [{"1": 30.5, "2": 26.0, "3": 400.0, "4": 27.0}], "removed": [2]},
    "wanda": {},
    "lora": {"losses": [3.0, 2.5, 2.6], "held_out_losses": {"1": 2.9, "3": 2.7}, "kept_step": 3},
    "gptq": {
        "blocks": [
            {"self_attn.q_proj": {"error": 0.01}, "mlp.down_proj": {"error": 0.04}, "refined": {"steps": 3}},
            {"self_attn.q_proj": {"error": 0.02}},
        ]
    },
    "eora": {"rank": 4},
}
VERDICT: dict[str, Any] = {
    "soc": "Siracusa",
    "fits": False,
    "summary": "It does not fit.",
    "notes": ["a note"],
    "memories": [
        {"name": "MRAM", "role": "weights", "capacity_bytes": 4 * MIB, "parts": {"block codes": 9 * MIB, "norms": 0}},
        {"name": "tile memory", "role": "tiles", "capacity_bytes": 4 * MIB, "parts": {"KV cache": MIB}},
        {"name": "HyperRAM", "role": "off_chip", "capacity_bytes": 64 * MIB, "parts": {}},
    ],
}


def manifest(stage: str, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": stage, "stage_version": 1, "options": {}, "fingerprint": f"{stage}-print", "parent": None, "seed": 7,
        "dtype": "bfloat16", "device": "cpu", "calibration": {"name": "embedded"}, "parameters_total": 1000,
        "parameters_nonzero": 900, "sparsity": None, "file_bytes": 100, "packed_bytes": 90, "seconds": 1.0,
        "peak_memory_bytes": MIB, "versions": {"python": "3.11.7", "torch": "2.14.1"}, "files": {},
        "origin": {"blocks": [0, 5]}, "facts": FACTS[stage],
    }  # fmt: skip
    return Manifest(**(values | changes))


def stage_folder(out: Path, position: int, stage: str) -> Path:
    folder = out / f"{position}-{stage}-{position:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    manifest(stage).write(folder)
    return folder


def write_run(out: Path, stages: tuple[str, ...] = STAGES, **changes: Any) -> Path:
    """A finished run; `changes` go over report.json."""
    entries = []
    for position, stage in enumerate(stages, 1):
        folder = stage_folder(out, position, stage)
        entries.append(
            {
                "stage": stage,
                "path": f"somewhere/else/{folder.name}",
                "fingerprint": f"{stage}-print",
                "seconds": 10.0 * position,
                "peak_memory_bytes": position * MIB,
                "file_bytes": 2 * PACKED[position],
                "packed_bytes": PACKED[position],
                "parameters_total": 1000,
                "parameters_nonzero": 900,
                "sparsity": {"pattern": "1:8" if position > 1 else None},
                "perplexity": {"before": PERPLEXITY[position - 1], "after": PERPLEXITY[position], **MEASURED},
            }
        )
    source = {"path": "", "fingerprint": "s", "file_bytes": 2 * PACKED[0], "packed_bytes": PACKED[0]}
    report = {
        "model": "tiny", "machine": "2 cores", "source": source, "recipe": Recipe(model="tiny").to_dict(),
        "baseline": {"perplexity": PERPLEXITY[0], "bits_per_byte": 1.5, **MEASURED}, "stages": entries,
        "hardware": VERDICT,
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    (out / ".edgepress").touch()
    write_json(out / "report.json", sealed(report | changes))
    return out


def sweep_row(
    position: int, stage: str, key: str, through: list[str], ends: list[str], value: float, packed: int, **changes: Any
) -> list[dict[str, Any]]:
    """The rows of one stage run: a configuration names it by `key`."""
    row = {
        "sweep": "small", "configurations": json.dumps(through), "result_of": json.dumps(ends), "model": "tiny",
        "seed": 0, "data": "embedded", "position": position, "stage": stage, "fingerprint": key, "parent": "",
        "folder": f"{position}-{key}-0000000{position}", "options": "{}", "protocol": MEASURED["protocol"],
        "text": MEASURED["text"], "dtype": MEASURED["dtype"], "seconds": float(position), "peak_memory_bytes": MIB,
        "file_bytes": 2 * packed, "packed_bytes": packed, "parameters_total": 1000, "parameters_nonzero": 900,
        "pattern": "", "reused": False,
    }  # fmt: skip
    row |= changes
    metrics = (("perplexity", value, "perplexity"), ("bits_per_byte", value / 10, "bits/byte"))
    return [row | {"metric": name, "value": number, "unit": unit} for name, number, unit in metrics]


def sweep_rows(names: tuple[str, str, str] = ("none", "pruned", "both")) -> list[dict[str, Any]]:
    """Three configurations: the uncompressed model, wanda, and wanda and gptq; plus one gptq alone that is beaten."""
    none, pruned, both = names
    everyone = [none, pruned, both, "worse"]
    return [
        *sweep_row(0, "source", "s", everyone, [none], 20.0, 100 * MIB, folder="/nowhere"),
        *sweep_row(1, "wanda", "w", [pruned, both], [pruned], 22.0, 90 * MIB, pattern="1:8"),
        *sweep_row(2, "gptq", "g", [both], [both], 24.0, 30 * MIB),
        *sweep_row(1, "gptq", "x", ["worse"], ["worse"], 30.0, 30 * MIB),
    ]


def write_sweep(out: Path, rows: list[dict[str, Any]], state: dict[str, Any] | None = None) -> Path:
    out.mkdir(exist_ok=True)
    (out / ".edgepress").touch()
    table = pd.DataFrame(rows)
    table.to_csv(out / "results.csv", index=False)
    table.to_parquet(out / "results.parquet", index=False)
    if state is not None:
        write_json(out / "sweep.json", sealed(state))
    return out


def chip(study: Study) -> Chip:
    return Chip("Siracusa", weight_room(VERDICT), study.verdict or VERDICT, "tiny")
