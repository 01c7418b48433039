"""What a checkpoint folder says of itself, and the fingerprint that makes it findable.

A stage's folder counts as finished only once `manifest.json` lies in it; the manifest is written last and
atomically. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a file being written, which a kill may leave behind
WORK = ".work"  # a stage's durable progress, gone once the manifest is there


@dataclass
class Manifest:
    stage: str
    stage_version: int
    options: dict[str, Any]
    fingerprint: str
    parent: dict[str, str] | None  # {"path", "fingerprint"}; the path is relative where both lie in one store
    seed: int
    dtype: str
    device: str
    calibration: dict[str, Any] | None
    parameters_total: int
    parameters_nonzero: int
    sparsity: dict[str, Any] | None
    file_bytes: int
    packed_bytes: int  # of the image that `compress pack` writes
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}
    origin: dict[str, Any] = field(default_factory=dict)  # the uncompressed model and which of its blocks are left
    quality: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError where the file is missing, unreadable or of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no {MANIFEST}: it was never finished, or is not a checkpoint of ours"
            )
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {data['format']}; this version reads format {FORMAT}")
            return cls(**data)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); move the folder away to compute it again") from None


def fingerprint(
    parent: str, stage: str, version: int, options: Mapping[str, Any], calibration: str | None, seed: int, dtype: str
) -> str:
    """Sha256 over everything that decides a stage's output; equal fingerprints mean equal bytes."""
    facts = [FORMAT, parent, stage, version, dict(options), calibration, seed, dtype]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a checkpoint, the manifest, work in progress and cut writes left out."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and path.suffix != PARTIAL
        and path.relative_to(folder).parts[0] != WORK
    }


def check_files(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """Raise CheckpointError naming the folder and file if anything differs from what the manifest lists."""
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            fault = "is missing"
        elif path.stat().st_size != facts["bytes"]:
            fault = f"has {path.stat().st_size} bytes, the manifest says {facts['bytes']}"
        elif hashes and sha256_file(path) != facts["sha256"]:
            fault = "does not have the sha256 that the manifest says"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {name} {fault}. "
            "It was neither used nor removed; move it away and run the same command to compute it again."
        )


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: whoever looks sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
