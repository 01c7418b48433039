"""The program has the same logits, to the last bit, on a simulated RV32 core and compiled for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.hardware.rv32.build import build
from edgepress.hardware.rv32.native import Native, find_compiler
from edgepress.hardware.rv32.simulator import simulate
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import plan_export
from tests.conftest import TinyModel
from tests.models import VOCABULARY, WINDOW
from tests.pipeline.test_export import compressed, rv32  # noqa: F401
from tests.pipeline.test_export_families import SETTINGS

pytestmark = pytest.mark.pipeline

PROMPT, NEW, CONTEXT = "for every value in the list", 60, 96
# Feeds what main.c feeds, and hands over all logits of a token as its text.
MAIN = """
#include "model.h"
float logits[VOCABULARY];
static void call(unsigned number, unsigned a, unsigned b, unsigned c) {
    register unsigned a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
}
int main(void) {
    int token = PROMPT[0];
    for (int position = 0; position < PROMPT_TOKENS + NEW_TOKENS; position++) {
        int next = forward(token, position, 1);
        call(1, (unsigned)token, (unsigned)logits, sizeof logits);
        token = position + 1 < PROMPT_TOKENS ? PROMPT[position + 1] : next;
    }
    call(2, 0, 0, 0);
    return 0;
}
"""
THREE = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
# A model, how its weights are stored, and the bits of the cache.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    ("llama", {"num_hidden_layers": 2}, {"pattern": "2:4", "bits": 4, "rank": 4, "adapter_bits": 8, "edge_bits": 8}, 8),
    ("llama", {"num_hidden_layers": 2}, {"pattern": "1:8", "bits": 4, "rank": 4}, 32),
    ("llama", {"num_hidden_layers": 2}, {"bits": 3, "edge_bits": 4, "order": True}, 32),
    ("qwen3", THREE, {"bits": 4, "symmetric": True}, 8),
    ("gemma2", {"num_hidden_layers": 2}, {"bits": 8}, 32),
    ("gemma3_text", THREE, {"bits": 2, "edge_bits": 8}, 32),
    ("mistral", {"num_hidden_layers": 2, "dtype": "bfloat16"}, {"bits": 4, "rank": 4, "edge_bits": 4}, 32),
    ("cohere", {"num_hidden_layers": 2, "hidden_act": "gelu"}, {}, 8),
]


@pytest.mark.parametrize(("family", "overrides", "how", "kv_bits"), CASES)
def test_every_logit_is_the_same_to_the_bit(
    family: str, overrides: dict[str, Any], how: dict[str, Any], kv_bits: int, tiny_model: TinyModel, tmp_path: Path,
    rv32: list[str],  # noqa: F811
) -> None:  # fmt: skip
    model = tiny_model(family, **SETTINGS.get(family, {}) | overrides)
    if how:
        model = compressed(tmp_path / "model", model, **{"pattern": None, **how})
    folder = tmp_path / "chip"
    planned = plan_export(Checkpoint.open(model), load_soc("siracusa"), PROMPT, NEW, CONTEXT, kv_bits)
    planned.write(folder)
    (folder / "main.c").write_text(MAIN)
    build(folder, [*rv32, "-DEVERY_LOGIT"])
    outcome = simulate(folder, limit=1_000_000_000)

    native = Native(folder)
    found = np.frombuffer(outcome.text, np.float32).reshape(-1, VOCABULARY)
    assert len(found) == len(planned.run.prompt) + NEW > 4 * WINDOW and len(set(outcome.tokens)) > 8
    for position, (token, logits) in enumerate(zip(outcome.tokens, found, strict=True)):
        own = native.logits(token, position)
        assert bool(np.isfinite(own).all()) and len(np.unique(own)) > VOCABULARY // 2
        assert own.tobytes() == logits.tobytes(), f"position {position}: {np.abs(own - logits).max()}"


def test_this_machines_compiler_is_named_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_compiler()[1:] == ["-m", "ziglang", "cc"]
    monkeypatch.setattr("edgepress.hardware.rv32.native.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="no C compiler for this machine was found: apt-get install gcc, or pip"):
        find_compiler()
