"""How large the house is, and how many of its files are crossed on two ways through it.

    .venv/bin/python -m benchmarks.house

Prints files and lines of each folder, and the files whose functions run (a) from flags to the last manifest of a run
of all five stages on a tiny random model, and (b) from safetensors to packed bytes in `compress pack` of its result.
Import circles are counted by tests/test_house.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "stages", "eval", "hardware", "checkpoints")
FLAGS = (
    "--data embedded --window 64 --tokens 256 --depth 1 --protect-first 1 --protect-last 1 --depth-samples 2 "
    "--depth-length 32 --wanda 2:4 --wanda-samples 2 --wanda-length 32 --lora-samples 16 --lora-length 32 "
    "--lora-steps 2 --lora-batch 4 --quant-samples 2 --quant-length 32 --group 32 --eora 4 --eora-samples 2 "
    "--eora-length 32"
)


def crossed(command: Sequence[str]) -> list[str]:
    """Files of the house whose functions a command calls, in the order of their first call."""
    from edgepress.pipeline.cli import main

    found: dict[str, None] = {}
    roots = tuple(str((ROOT / folder).resolve()) + os.sep for folder in FOLDERS)
    known: dict[str, str] = {}

    def called(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name != "<module>":
            real = known.setdefault(name, os.path.realpath(name))
            if real.startswith(roots):
                found[os.path.relpath(real, ROOT)] = None

    sys.argv = ["compress", *command]
    sys.setprofile(called)
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.setprofile(None)
    return list(found)


def size() -> None:
    files = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in FOLDERS}
    for folder, paths in files.items():
        lines = [len(path.read_text().splitlines()) for path in paths]
        print(f"{folder:12} {len(paths):4} files {sum(lines):7,} lines, {sum(n < 100 for n in lines)} of less than 100")
    print(f"{'all':12} {sum(map(len, files.values())):4} files")


def main() -> None:
    from tests.models import save_tiny

    size()
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        save_tiny(model)
        run = crossed(["--model", str(model), *FLAGS.split(), "-o", str(out)])
        pack = crossed(["pack", str(out / "result"), "-o", str(Path(folder) / "model.bin")])
    print(f"(a) from flags to the last manifest: {len(run)} files\n    {' '.join(run)}")
    print(f"(b) from safetensors to packed bytes: {len(pack)} files\n    {' '.join(pack)}")


if __name__ == "__main__":
    main()
