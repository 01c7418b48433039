"""A trimmed vocabulary through the whole pipeline: every later stage, calibration and measuring use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.writer import verify
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build

pytestmark = pytest.mark.pipeline

Run = Callable[..., Any]
SHORT = "The try statement is used for handlers. If there is one, else it is not: a name, an expression.\n" * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def trimmed_chain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_recipe: Run, corpus: Path) -> Path:
    out: Path = tmp_path_factory.mktemp("trimmed") / "out"
    run_recipe(out, tiny_llama, vocabulary__corpus=str(corpus), gptq__quant_embeddings=8)
    return out


def folders(out: Path) -> list[Path]:
    return sorted(p for p in out.iterdir() if p.name[0].isdigit())


def test_all_six_stages_run_on_the_trimmed_vocabulary(trimmed_chain: Path) -> None:
    stages = json.loads((trimmed_chain / "report.json").read_text())["stages"]
    assert [s["stage"] for s in stages] == ["vocabulary", "depth", "wanda", "lora", "gptq", "eora"]
    rows = {Checkpoint.open(f).shape.vocabulary for f in folders(trimmed_chain)}
    assert len(rows) == 1
    assert rows.pop() < 512
    for folder, stage in zip(folders(trimmed_chain), stages, strict=True):
        assert verify(Checkpoint.open(folder))
        assert stage["bits_per_byte"]["after"] > 0
    last = Checkpoint.open(folders(trimmed_chain)[-1])
    assert last.shape.embedding_bits == 8
    tokenizer = last.tokenizer()
    assert tokenizer.decode(tokenizer("Grüße, 北京")["input_ids"]) == "Grüße, 北京"


def test_plan_knows_the_bytes_before_any_weight(trimmed_chain: Path, tiny_llama: Path, corpus: Path) -> None:
    flags = {"model": str(tiny_llama), "vocabulary.corpus": str(corpus), "gptq.group": 32, "eora.rank": 4}
    planned = plan(build(None, flags | {"depth.protect_first": 1, "gptq.quant_embeddings": 8}), _shape(tiny_llama))
    report = json.loads((trimmed_chain / "report.json").read_text())["stages"]
    assert [p.shape.file_bytes for p in planned] == [s["file_bytes"] for s in report]
    assert [p.shape.parameters_total for p in planned] == [s["parameters_total"] for s in report]


def _shape(folder: Path) -> Any:
    return Checkpoint.open(folder).shape


def test_nothing_is_done_twice_and_another_corpus_is_another_run(
    trimmed_chain: Path, tiny_llama: Path, run_recipe: Run, corpus: Path, tmp_path: Path
) -> None:
    options = {"vocabulary__corpus": str(corpus), "gptq__quant_embeddings": 8}
    assert run_recipe(trimmed_chain, tiny_llama, **options).computed == 0
    first = json.loads((trimmed_chain / "report.json").read_text())["stages"][0]["fingerprint"]
    corpus.write_text(SHORT + "Zebras.\n")  # the same name, other words
    try:
        result = run_recipe(tmp_path / "out", tiny_llama, skip="depth,wanda,lora,gptq,eora", **options)
    finally:
        corpus.write_text(SHORT)
    assert result.stages[0].checkpoint.fingerprint != first


@pytest.mark.parametrize(
    ("order", "skip"),
    [
        ("depth vocabulary wanda lora gptq eora", "lora,gptq,eora"),
        ("depth wanda lora gptq eora vocabulary", "depth,wanda,lora"),
    ],
    ids=["after depth", "after eora"],
)
def test_it_may_stand_anywhere(
    tiny_llama: Path, run_recipe: Run, corpus: Path, tmp_path: Path, order: str, skip: str
) -> None:
    recipe = tmp_path / "order.yaml"
    recipe.write_text("stages:\n" + "".join(f"  - {name}\n" for name in order.split()))
    result = run_recipe(tmp_path / "out", tiny_llama, recipe=str(recipe), skip=skip, vocabulary__corpus=str(corpus))
    at = [s["stage"] for s in result.report["stages"]].index("vocabulary")
    before, after = (result.stages[i].checkpoint for i in (at - 1, at))
    kept = _kept(before, after)
    ids = torch.tensor([after.tokenizer()(SHORT)["input_ids"][:32]])
    with torch.no_grad():
        want = before.model(dtype=torch.float32)(kept[ids]).logits[..., kept]
        got = after.model(dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    assert result.report["stages"][at]["file_bytes"] == after.shape.file_bytes


def _kept(before: Checkpoint, after: Checkpoint) -> torch.Tensor:
    names, numbers = after.tokenizer().get_vocab(), before.tokenizer().get_vocab()
    return torch.tensor([numbers[name] for name in sorted(names, key=names.__getitem__)])


def test_self_written_text_uses_kept_tokens_only(
    tiny_llama: Path, run_recipe: Run, corpus: Path, tmp_path: Path
) -> None:
    result = run_recipe(
        tmp_path / "out", tiny_llama, skip="depth,lora,gptq,eora", data="self", text="embedded",
        vocabulary__corpus=str(corpus),
    )  # fmt: skip
    assert [s["stage"] for s in result.report["stages"]] == ["vocabulary", "wanda"]


def test_distilling_from_the_uncompressed_model(
    tiny_llama: Path, run_recipe: Run, corpus: Path, tmp_path: Path
) -> None:
    more = {"vocabulary__corpus": str(corpus), "lora__distill": 0.5}
    result = run_recipe(tmp_path / "out", tiny_llama, skip="depth,wanda,gptq,eora", **more)
    assert [s["stage"] for s in result.report["stages"]] == ["vocabulary", "lora"]


def test_bad_input(tiny_llama: Path, run_recipe: Run, corpus: Path, tmp_path: Path) -> None:
    def planned(**more: Any) -> Any:
        flags = {"model": str(tiny_llama)} | {key.replace("__", "."): value for key, value in more.items()}
        return plan(build(None, flags), _shape(tiny_llama))

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    for name, says in (
        ("missing.txt", "there is no text"),
        ("empty.txt", "is empty"),
        ("binary.txt", "is not UTF-8"),
    ):
        with pytest.raises(RecipeError, match=says):
            planned(vocabulary__corpus=str(tmp_path / name))
    with pytest.raises(RecipeError, match="special tokens, single bytes"):
        planned(vocabulary__corpus=str(corpus), vocabulary__size=3)
    with pytest.raises(PlanError, match="does not say which tokens stay"):
        run_recipe(tmp_path / "out", tiny_llama, vocabulary__size=400)
    text = str(corpus)
    with pytest.raises(RecipeError, match="both choose the vocabulary and be measured"):
        planned(vocabulary__corpus=text, text=text)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(RecipeError, match="holds no tokenizer"):
        plan(build(None, {"model": str(bare), "vocabulary.corpus": text}), _shape(tiny_llama))
    preset = shape_from_config(PRESETS["stories15m"])
    with pytest.raises(RecipeError, match="is a preset: it has no tokenizer"):
        plan(build(None, {"model": "stories15m", "vocabulary.corpus": text}), preset)
    stages = plan(build(None, {"model": "stories15m", "vocabulary.size": 4096}, skip="depth,wanda,eora"), preset)
    assert stages[0].shape.vocabulary == 4096
    late = tmp_path / "late.yaml"
    late.write_text(f"stages:\n  - depth\n  - vocabulary: {{corpus: '{corpus}'}}\n  - lora: {{distill: 0.5}}\n")
    with pytest.raises(RecipeError, match="only if the vocabulary stage is the first; here depth"):
        plan(build(str(late), {"model": str(tiny_llama)}), _shape(tiny_llama))


def test_a_corpus_shared_with_the_measured_text_gives_its_calibration_part(corpus: Path, tmp_path: Path) -> None:
    from edgepress.pipeline.calibration import corpus_text

    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(f"story number {n}" for n in range(10)))
    shared = corpus_text(build(None, {"data": str(path)}), str(path))
    assert len(shared.documents) == 8
    assert len(corpus_text(build(None, {"data": str(corpus)}), str(path)).documents) == 10
    with pytest.raises(TextError, match="there is no text"):
        corpus_text(build(None, {}), "nowhere.txt")


def test_an_odd_feed_forward_goes_through_all_stages_padded(
    make_tiny: Callable[..., Path], run_recipe: Run, corpus: Path, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "odd", blocks=3)
    config = json.loads((model / "config.json").read_text())
    _narrow(model, config, 100)
    result = run_recipe(
        tmp_path / "out", model, skip="depth,lora,eora", pad__multiple=32, vocabulary__corpus=str(corpus)
    )
    assert [s["stage"] for s in result.report["stages"]] == ["vocabulary", "pad", "wanda", "gptq"]
    last = result.stages[-1].checkpoint
    assert last.shape.number("intermediate_size") == 128
    assert all(x.grid is not None for block in last.shape.blocks for x in block.linears)
    padded = result.report["stages"][1]["perplexity"]
    assert padded["after"] == pytest.approx(padded["before"], rel=1e-2)  # bfloat16 sums in another order
    for stage, done in zip(result.report["stages"], result.stages, strict=True):
        assert stage["file_bytes"] == done.checkpoint.shape.file_bytes
    assert run_recipe(
        tmp_path / "out", model, skip="depth,lora,eora", pad__multiple=32, vocabulary__corpus=str(corpus)
    ).computed == 0  # fmt: skip


def _narrow(model: Path, config: dict[str, Any], inner: int) -> None:
    """Cut a tiny model's feed-forward to a width that GPTQ's format does not take."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:inner].contiguous()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :inner].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": inner}))
