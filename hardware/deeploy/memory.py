"""What the graph asks of the chip's memories under Deeploy, and Deeploy's own figures where it is there. No torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.deeploy.model import EVEN
from edgepress.hardware.rv32.memory import Use, inner
from edgepress.hardware.soc import Memory, Soc

INSTALL = "python3 -m venv deeploy-venv && deeploy-venv/bin/pip install deeploy-pulp==0.2.1"
WEIGHTS, SHARED, TILES = "SRAM", "L2", "L1"  # Siracusa's memories as Deeploy uses them
LEVELS = {WEIGHTS: "WeightMemory_SRAM", SHARED: "L2", TILES: "L1"}
WIDENED = ("mlp.gate_proj", "mlp.up_proj")  # by rows of zeros, where their number is not even for the kernels
BLOCK = 32  # input channels that N-EUREKA reads at once; rows of weights are filled up to it
RESHAPES = 1856  # bytes of a block's constants that Deeploy 0.2.1 itself adds, counted on its output


def memory_use(shape: ModelShape, soc: Soc, context: int) -> tuple[Use, Use, Use]:
    """Bytes of weights, of what lies in L2, and of the smallest tiles in L1, for a cache of `context` tokens.

    Weights are exact. Of L2 and L1 they are estimates: Deeploy lays out both itself. Raises PlanError for a chip
    without the three memories of Deeploy's target.
    """
    found = {memory.name: memory for memory in soc.memories}
    if missing := [name for name in LEVELS if name not in found]:
        raise PlanError(
            f"{soc.label} has no memory {', '.join(missing)}: Deeploy's target Siracusa_w_neureka puts weights into "
            f"{WEIGHTS}, all else into {SHARED} and tiles into {TILES}; take --soc siracusa"
        )
    width, heads, kv, head = shape.hidden_size, shape.heads, shape.kv_heads, shape.head_dim
    blocks, linears = len(shape.blocks), [x for block in shape.blocks for x in block.linears]
    matrices = [
        (_even(x.out_features), x.in_features) if x.name in WIDENED else (x.out_features, x.in_features)
        for x in linears
    ]
    matrices.append((shape.vocabulary, width))
    weights = sum(rows * -(-columns // BLOCK) * BLOCK for rows, columns in matrices)
    rounding = 8 * sum(rows for rows, _ in matrices) + 8 * blocks * (3 * head + context)
    norms = 4 * width * (2 * blocks + 1) + 2 * width * blocks
    cache = blocks * 2 * kv * (context - 1) * head
    asked = 2 * heads * context + head * head + 2 * width + shape.vocabulary + 2 * blocks * kv * head
    tile = max(2 * context * head + head, 34 * context, -(-inner(shape) // BLOCK) * BLOCK + 288)
    return (
        _use(found[WEIGHTS], {"weights": weights}),
        _use(
            found[SHARED],
            {
                "scales and norms": rounding + norms + RESHAPES * blocks,
                "KV cache": 2 * cache,  # as it comes in, and with the new token behind it
                "inputs and outputs": asked,
                "activations": 4 * _even(inner(shape)),
            },
        ),
        _use(found[TILES], {"smallest tiles": tile}),
    )


def _even(size: int) -> int:
    return -(-size // EVEN) * EVEN


def _use(memory: Memory, parts: dict[str, int]) -> Use:
    capacity = memory.capacity_bytes - memory.reserved_bytes
    if memory.name == TILES:
        capacity //= 2  # the cores' stacks and Deeploy's run time share it
    return Use(memory.name, memory.first_address or 0, memory.access, capacity, parts)


# --- Deeploy itself ---------------------------------------------------------------------------------------------------


def interpreter(wanted: str) -> str:
    """A Python that has deeploy-pulp: the one wanted, or one on PATH; empty where none has and none was wanted.

    Raises PlanError where the one wanted has not.
    """
    candidates = [wanted] if wanted else [path for name in ("python3", "python") if (path := shutil.which(name))]
    for path in dict.fromkeys(candidates):
        if path == sys.executable and not wanted:
            continue  # it would need another numpy than this project
        command = [path, "-I", "-c", "import importlib.util as u; raise SystemExit(u.find_spec('Deeploy') is None)"]
        try:
            if subprocess.run(command, capture_output=True, timeout=60).returncode == 0:
                return path
        except (OSError, subprocess.TimeoutExpired):
            continue
    if wanted:
        raise PlanError(f"--deeploy {wanted} is no Python that has Deeploy; install it: {INSTALL}")
    return ""


def compiled(folder: Path, python: str, uses: tuple[Use, Use, Use]) -> dict[str, Any]:
    """Let Deeploy compile an exported folder; what `driver.py` prints. Raises PlanError with what Deeploy says."""
    sizes = {use.name: use.capacity for use in uses}
    command = [python, "-I", str(Path(__file__).with_name("driver.py")), str(folder)]
    done = subprocess.run([*command, str(sizes[TILES]), str(sizes[SHARED])], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PlanError(f"Deeploy could not compile {folder / 'network.onnx'}: {said[-1] if said else 'no reason'}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts
