"""Every value that can never work raises at once, with a message that names the flag."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.stages.options import STAGES, Depth, Eora, Gptq, Lora, Wanda
from edgepress.stages.quantisers import form

pytestmark = pytest.mark.unit

IMPOSSIBLE: list[tuple[type, dict[str, Any], str]] = [
    (Depth, {"remove": -1}, "--depth -1"),
    (Depth, {"metric": "luck"}, "--metric luck: there are perplexity, taylor, taylor-signed, magnitude, influence"),
    (Depth, {"protect_first": -1}, "protected blocks"),
    (Depth, {"protect_last": -1}, "protected blocks"),
    (Depth, {"samples": 0}, "depth: 0 calibration windows"),
    (Depth, {"length": 1}, "depth: windows of 1 tokens"),
    (Wanda, {"pattern": "8"}, "a fraction of 8 cannot be removed"),
    (Wanda, {"pattern": "1.0"}, "a fraction of 1"),
    (Wanda, {"pattern": "0"}, "a fraction of 0"),
    (Depth, {"layers": "3-1"}, "--layers: '3-1' is not a block or a range of blocks"),
    (Depth, {"layers": "0-999999999999"}, "--layers: '0-999999999999' goes beyond the 10000 blocks"),
    (Lora, {"learning_rate": float("inf")}, "--lora-lr inf: must be positive and finite"),
    (Depth, {"layers": "0-3,x"}, "--layers: 'x' is not a block or a range of blocks"),
    (Depth, {"layers": " , "}, "--layers names no block"),
    (Wanda, {"pattern": "a:b"}, "'a:b' is not an N:M pattern"),
    (Wanda, {"pattern": "-1:4"}, "'-1:4' is not an N:M pattern"),
    (Wanda, {"pattern": "1:4:8"}, "'1:4:8' is not an N:M pattern"),
    (Wanda, {"pattern": ""}, "'' is not an N:M pattern"),
    (Wanda, {"pattern": "0:4"}, "0:4 removes 0 of every 4"),
    (Wanda, {"pattern": "4:4"}, "4:4 removes 4 of every 4"),
    (Wanda, {"pattern": "5:4"}, "5:4 removes 5 of every 4"),
    (
        Wanda,
        {"method": "luck"},
        "--prune luck: there are wanda, magnitude, sparsegpt, sparsegpt-layer, fisher, gate-l1",
    ),
    (Wanda, {"method": "magnitude", "pattern": "none"}, "--prune magnitude has nothing to prune with --wanda none"),
    (Wanda, {"pattern": "2:4 in gate_proj"}, "'2:4 in gate_proj' is not an N:M pattern"),
    (Wanda, {"samples": -3}, "wanda: -3 calibration windows"),
    (Wanda, {"length": 0}, "wanda: windows of 0 tokens"),
    (Lora, {"rank": 0}, "--lora-rank 0: must be positive; use --skip lora"),
    (Lora, {"alpha": 0}, "--lora-alpha 0"),
    (Lora, {"dropout": 1.0}, "--lora-dropout 1.0"),
    (Lora, {"dropout": -0.1}, "--lora-dropout -0.1"),
    (Lora, {"dropout": math.nan}, "--lora-dropout nan"),
    (Lora, {"batch": 0}, "--lora-batch and --lora-micro-batch must be positive"),
    (Lora, {"micro_batch": 0}, "--lora-batch and --lora-micro-batch must be positive"),
    (Lora, {"batch": 8, "micro_batch": 3}, "--lora-batch 8 is not a multiple of --lora-micro-batch 3"),
    (Lora, {"batch": 2, "micro_batch": 4}, "--lora-batch 2 is not a multiple of --lora-micro-batch 4"),
    (Lora, {"steps": -1}, "--lora-steps -1"),
    (Lora, {"learning_rate": 0.0}, "--lora-lr 0.0"),
    (Lora, {"learning_rate": math.nan}, "--lora-lr nan"),
    (Lora, {"save_steps": 0}, "--lora-save-steps 0"),
    (Lora, {"samples": 0}, "lora: 0 calibration windows"),
    (Lora, {"length": 1}, "lora: windows of 1 tokens"),
    (Lora, {"samples": 7, "held_out": 0}, "--lora-samples 7, less 0 held out, fill no batch of 8"),
    (Lora, {"samples": 11}, "--lora-samples 11, less 4 held out, fill no batch of 8"),
    (Lora, {"held_out": -1}, "--lora-held-out -1"),
    (Lora, {"patience": 0}, "--lora-patience 0"),
    (Lora, {"distill": 1.5}, "--distill 1.5"),
    (Lora, {"epochs": 0}, "--lora-epochs 0"),
    (Lora, {"teacher": "near"}, "--distill-teacher near: there are auto, held, streamed"),
    (Eora, {"bits": 4}, "--eora-bits 4: 8 or 16"),
    (
        Gptq,
        {"quant": "gptq5"},
        "--quant gptq5 (near: gptq5-s, gptq8, gptq4): there are gptq4, gptq3, gptq8, gptq4-channel, ",
    ),
    (Gptq, {"group": 0}, "--group 0"),
    (Gptq, {"group": 16}, "--group 16: at least 32, or -1 for whole rows"),
    (Gptq, {"quant": "gptq4-s", "group": 15}, "--group 15: at least 16, or -1 for whole rows"),
    (Gptq, {"layers": "down_proj=gptq8/16"}, "a group of 16; at least 32"),
    (Gptq, {"layers": "down_proj=gptq4-s/8"}, "a group of 8; at least 16"),
    (Gptq, {"embedding_codes": "best", "quant_embeddings": 4}, "--embedding-codes best: there are gptq and nearest"),
    (Gptq, {"embedding_codes": "gptq", "quant_embeddings": 8}, "--embedding-codes gptq is for 4 bits"),
    (Gptq, {"embedding_codes": "gptq", "quant_embeddings": 4, "quant": "int4"}, "--quant int4 looks at weights alone"),
    (Gptq, {"shrinkage": 1.5}, "--hessian-shrinkage 1.5: must be in [0, 1], or -1 for the default"),
    (Gptq, {"shrinkage": math.nan}, "--hessian-shrinkage nan"),
    (Gptq, {"shrinkage": 0.2, "quant": "hqq4"}, "GPTQ's solver, which --quant hqq4 does not use"),
    (Gptq, {"guidance": 1.5}, "--guidance 1.5: must be in [0, 1]"),
    (Gptq, {"guidance": math.nan}, "--guidance nan"),
    (Gptq, {"guidance": 0.5, "quant": "w4a8", "smooth": True}, "--guidance weighs tokens that --smooth looks at alike"),
    (Gptq, {"guidance": 0.5, "quant": "awq4"}, "GPTQ's solver, which --quant awq4 does not use"),
    (Gptq, {"group": -2}, "--group -2"),
    (Gptq, {"damping": 0.0}, "--damping 0.0"),
    (Gptq, {"damping": 1.0}, "--damping 1.0"),
    (Gptq, {"damping": math.nan}, "--damping nan"),
    (Gptq, {"quant_embeddings": 3}, "--quant-embeddings 3: 8, 4 or 0"),
    (Gptq, {"samples": 0}, "gptq: 0 calibration windows"),
    (Gptq, {"length": 1}, "gptq: windows of 1 tokens"),
    (Eora, {"rank": -1}, "--eora -1"),
    (Eora, {"against": "nothing"}, "--eora-against nothing: there are parent and dense"),
    (Eora, {"shrinkage": 1.5}, "--eora-shrinkage 1.5: must be in [0, 1], or -1 for the default"),
    (Eora, {"shrinkage": math.nan}, "--eora-shrinkage nan"),
    (Eora, {"samples": 0}, "eora: 0 calibration windows"),
    (Eora, {"length": 1}, "eora: windows of 1 tokens"),
]


@pytest.mark.parametrize(("options", "values", "says"), IMPOSSIBLE, ids=lambda x: x if isinstance(x, str) else None)
def test_impossible_values_raise(options: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        options(**values)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (Depth, {"remove": 0, "protect_first": 0, "protect_last": 0, "samples": 1, "length": 2}),
        (Wanda, {"pattern": "none"}),
        (Wanda, {"pattern": "15:16"}),
        (
            Lora,
            {
                "rank": 1,
                "alpha": 1,
                "dropout": 0.0,
                "batch": 1,
                "micro_batch": 1,
                "samples": 1,
                "held_out": 0,
                "steps": 0,
            },
        ),
        (Gptq, {"quant": "gptq3", "group": 32, "damping": 1e-6, "quant_embeddings": 8}),
        (Gptq, {"group": -1}),
        (Eora, {"rank": 0, "against": "dense"}),
    ],
    ids=str,
)
def test_the_last_possible_values_are_taken(options: type, values: dict[str, Any]) -> None:
    made = options(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_what_is_skipped_and_what_it_is_called() -> None:
    cases: list[tuple[Any, bool, str]] = [
        (Depth(remove=0), True, "depth-0"),
        (Depth(remove=3), False, "depth-3"),
        (Wanda(pattern="none"), True, "wanda-none"),
        (Wanda(pattern="2:4"), False, "wanda-2of4"),
        (Wanda(pattern="2:4", method="sparsegpt"), False, "sparsegpt-2of4"),
        (Wanda(pattern="0.05", method="gate-l1"), False, "gate-l1-0.05"),
        (Lora(rank=16), False, "lora-r16"),
        (Gptq(quant="none"), True, "none"),
        (Gptq(quant="gptq3"), False, "gptq3"),
        (Eora(rank=0, bits=16), True, "eora-r0"),
        (Eora(rank=8, bits=16), False, "eora-r8"),
        (Eora(rank=8), False, "eora-r8-8bit"),
        (Eora(), False, "eora-8bit"),
    ]
    for options, skipped, label in cases:
        assert (options.skipped, options.label) == (skipped, label)
    assert [form(Gptq(quant=f"gptq{bits}"), False).bits for bits in (3, 4, 8)] == [3, 4, 8]
    assert Lora(steps=5).total_steps == 5
    assert Lora(epochs=1, samples=50, batch=8, held_out=2).total_steps == 6
    assert Lora().total_steps == 18  # one pass over 144 windows
    assert Lora(samples=8192, batch=8, epochs=1).total_steps == 1023  # the thesis, four windows held out
    assert Lora(samples=8192).steps_over(100) == 12  # a text that has no more
    assert Lora(samples=8192, epochs=2).steps_over(100) == 24


def test_every_field_has_a_flag_of_its_own_and_a_line_of_help() -> None:
    flags = []
    for options in STAGES.values():
        made = options()
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.samples = 1  # type: ignore[misc]
        for field in dataclasses.fields(options):
            assert field.metadata["flag"].startswith("--")
            assert field.metadata["help"].endswith(".")
            flags.append(field.metadata["flag"])
    assert len(flags) == len(set(flags))


def test_options_need_no_torch() -> None:
    code = "import sys, edgepress.stages.options; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
