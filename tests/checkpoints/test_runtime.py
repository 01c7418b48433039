"""Randomness of one's own, choices of device and precision, and silence."""

from __future__ import annotations

import logging
import random
import sys

import numpy as np
import pytest
import torch

from edgepress.checkpoints.errors import PlanError, RecipeError
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime, Silent, choose_device, choose_dtype

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def draw(runtime: Runtime, purpose: str) -> list[float]:
    return torch.rand(5, generator=runtime.generator(purpose)).tolist()  # type: ignore[no-any-return]


def test_generators_are_their_own() -> None:
    runtime = Runtime(seed=3)
    assert draw(runtime, "wanda") == draw(Runtime(seed=3), "wanda")
    assert draw(runtime, "wanda") != draw(runtime, "lora")
    assert draw(runtime, "wanda") != draw(Runtime(seed=4), "wanda")
    # "1" + "2 x" and "12" + " x" must not be the same purpose
    assert draw(Runtime(seed=1), "2 x") != draw(Runtime(seed=12), "x")
    one, other = runtime.generator("a"), runtime.generator("b")
    expected = draw(runtime, "b")
    torch.rand(100, generator=one)
    assert torch.rand(5, generator=other).tolist() == expected


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    draw(Runtime(seed=1), "lora")
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(PlanError, match="--device cuda: torch sees no GPU here; use --device cpu"):
        choose_device("cuda")
    with pytest.raises(PlanError, match=r"unknown device 'tpu' \(near: cpu\); there are auto, cpu and cuda"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu") == CPU


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    capable: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    assert choose_dtype("auto", CPU, "BF16") == torch.float32
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        capable.clear()
        capable[name] = True
        assert choose_dtype("auto", CPU, "BF16") == torch.bfloat16
        assert choose_dtype("auto", CPU, "F16") == torch.bfloat16
        assert choose_dtype("auto", CPU, "F32") == torch.float32
    assert choose_dtype("float32", CPU, "BF16") == torch.float32
    assert choose_dtype("bfloat16", CPU, "F32") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_dtype("auto", torch.device("cuda"), "BF16") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_dtype("auto", torch.device("cuda"), "BF16") == torch.bfloat16
    with pytest.raises(
        PlanError,
        match=r"unknown precision 'float16' \(near: bfloat16, float32\); there are auto, bfloat16 and float32",
    ):
        choose_dtype("float16", CPU, "BF16")


def test_silent_progress_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start("wanda", 3)
    silent.step(loss=1.0)
    silent.note("something")
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------ quiet


def test_banners_are_not_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    with quiet_import():
        print("a banner")
        print("a warning", file=sys.stderr)
        assert logger.level == logging.ERROR
        import os

        assert os.environ["GPTQMODEL_CPU_WORKERS"] == "2"
    print("afterwards")
    assert capsys.readouterr() == ("afterwards\n", "")
    assert logger.level == level


def test_errors_come_through_and_a_setting_of_ones_own_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "5")
    level = logging.getLogger("torch.utils.cpp_extension").level
    with pytest.raises(ImportError, match="nonesuch"), quiet_import():
        import nonesuch  # type: ignore[import-not-found]  # noqa: F401
    import os

    assert os.environ["GPTQMODEL_CPU_WORKERS"] == "5"
    assert logging.getLogger("torch.utils.cpp_extension").level == level
    print("heard")
    assert capsys.readouterr().out == "heard\n"


# ------------------------------------------------------------------ errors


def test_all_faults_of_a_recipe_at_once() -> None:
    assert str(RecipeError(["depth is -1"])) == "1 error in the recipe:\n  - depth is -1"
    error = RecipeError(fault for fault in ("a", "b"))
    assert str(error) == "2 errors in the recipe:\n  - a\n  - b"
    assert error.faults == ("a", "b")
    assert isinstance(error, PlanError)
