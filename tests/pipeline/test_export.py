"""`compress export` and `simulate`: the program's tokens are Python's, on this machine and on a simulated RV32 core.

The C sources are compiled for this machine wherever there is a compiler; for RV32 always: the extra `dev` has a
compiler and unicorn.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, eight_bit, unpacked
from edgepress.checkpoints.config import peft_config
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import CODEBOOKS, Grid
from edgepress.checkpoints.packing import dequantise_rows, encode, pack_linear
from edgepress.checkpoints.shape import parse_sparsity
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.hardware.rv32.build import build, compilers, find_compiler
from edgepress.hardware.rv32.families import layers
from edgepress.hardware.rv32.memory import STACK_BYTES
from edgepress.hardware.rv32.simulator import expected_tokens, find_simulator, simulate, used_bytes
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import plan_export, token_pieces
from tests.conftest import TinyModel
from tests.random_checkpoint import Wanted

pytestmark = pytest.mark.pipeline

CONTEXT, NEW = 48, 24
PROMPT = "for every value"
# What the storage of weights is tried on; test_export_families.py has the others.
FULL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
}
NATIVE_WEIGHTS = '.section .rodata\n.globl weights\n.balign 16\nweights:\n.incbin "weights.bin"\n'


@pytest.fixture
def on_this_machine() -> Callable[[Path], list[int]]:
    """The tokens of an exported folder's forward(), compiled for this machine."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler for this machine")

    def run(folder: Path) -> list[int]:
        (folder / "native.S").write_text(NATIVE_WEIGHTS)
        sources = ["runtime.c", "products.c", "lists.c", "model.c", "native.S"]
        command = [compiler, "-O2", "-std=c11", "-shared", "-fPIC", "-w", *sources, "-o", "native.so"]
        subprocess.run(command, cwd=folder, check=True)
        program = ctypes.CDLL(str(folder / "native.so"))
        wanted = list(expected_tokens(folder))
        prompt = re.search(r"#define PROMPT_TOKENS (\d+)", (folder / "model.h").read_text())
        assert prompt
        tokens = wanted[: int(prompt[1])]
        for position in range(len(wanted) - 1):
            last = position == len(tokens) - 1
            found = program.forward(tokens[position], position, int(last))
            tokens += [found] if last else []
        return tokens

    return run


@pytest.fixture(scope="module", params=["gcc", "clang"])
def rv32(request: pytest.FixtureRequest) -> list[str]:
    """Each of the compilers that are there; a warning is an error."""
    find_simulator(), find_compiler()
    command = compilers().get(request.param) or pytest.skip(f"{request.param} for RV32 is not installed")
    return [*command, "-Werror"]


def compressed(folder: Path, model: Path, pattern: str | None, bits: int | None, rank: int = 0, **how: Any) -> Path:
    """A model's weights rounded to the nearest code, with zeros of a pattern and a random adapter beside them.

    how: group, symmetric, adapter_bits (16 or 8), edge_bits (8 or 4), codebook, order (columns in any group), unlike
    (a group has one column more than another).
    """
    source, writer = Checkpoint.open(model), CheckpointWriter(folder)
    g = torch.Generator().manual_seed(3)
    for index, block in enumerate(source.shape.blocks):
        tensors, adapter = source.block(index), {}
        dtype = tensors[f"{block.linears[0].name}.weight"].dtype
        for x in block.linears:
            weight = pruned(tensors.pop(f"{x.name}.weight").float(), pattern)
            parts = {"weight": weight.to(dtype)}
            if bits:
                parts = codes(weight, bits, how.get("group", 32), how.get("symmetric", False))
            if how.get("order"):
                parts["g_idx"] = parts["g_idx"][torch.randperm(x.in_features, generator=g)]
            if how.get("unlike"):
                parts["g_idx"][0] = 1
            if how.get("codebook"):
                parts = encode(weight, CODEBOOKS[how["codebook"]], dtype)
            tensors |= {f"{x.name}.{kind}": tensor for kind, tensor in parts.items()}
            for side, shape, within in (
                (("A", (rank, x.in_features), 1), ("B", (x.out_features, rank), 0)) if rank else ()
            ):
                matrix = (0.1 * torch.randn(shape, generator=g)).to(dtype)
                name = f"{x.name}.lora_{side}"
                if how.get("adapter_bits") == 8:
                    adapter[f"{name}.codes"], adapter[f"{name}.scales"] = eight_bit(matrix, within)
                    matrix = unpacked(adapter[f"{name}.codes"], adapter[f"{name}.scales"], dtype)
                adapter[f"{name}.weight"] = matrix
        writer.write_block(index, tensors)
        if adapter:
            writer.write_adapter_part(index, adapter)
    outer = dict(source.outer())
    if how.get("edge_bits"):
        edge = {}
        for name in [name for name, tensor in outer.items() if tensor.dim() == 2]:
            parts, rows = row_codes(outer[name].float(), how["edge_bits"])
            edge |= {f"{name.removesuffix('weight')}{kind}": tensor for kind, tensor in parts.items()}
            outer[name] = rows.to(outer[name].dtype)
        writer.write_edge(edge)
    writer.write_outer(outer)
    if rank:
        writer.join_adapter(peft_config(rank, 2.0 * rank, [x.name for x in source.shape.blocks[0].linears]))
    config = dict(source.config)
    if bits:
        config["quantization_config"] = Grid(bits, how.get("group", 32), how.get("symmetric", False)).config("F32")
        config["quantization_config"]["desc_act"] = bool(how.get("order") or how.get("unlike"))
    if how.get("codebook"):
        config["quantization_config"] = CODEBOOKS[how["codebook"]].config("F32")
    writer.finish(config, source)
    writer.work.remove()
    Wanted(pattern=pattern).seal(folder)
    return folder


def pruned(weight: Tensor, pattern: str | None) -> Tensor:
    """The weights with the smallest of every M gone."""
    if pattern is None:
        return weight
    nm = parse_sparsity(pattern).on(weight.shape[1])
    groups = weight.view(weight.shape[0], -1, nm.of)
    gone = groups.abs().argsort(-1).argsort(-1) < nm.removed
    return groups.masked_fill(gone, 0.0).view(weight.shape)


def codes(weight: Tensor, bits: int, group: int, symmetric: bool) -> dict[str, Tensor]:
    width, top = weight.shape[1] if group == -1 else group, 2**bits - 1
    groups = weight.view(weight.shape[0], -1, width)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (2 * groups.abs().amax(-1) / top if symmetric else (high - low) / top).clamp(min=1e-4).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(1, top)
    found = (groups / scales.unsqueeze(-1)).round().add(zeros.unsqueeze(-1)).clamp(0, top)
    return pack_linear(found.view(weight.shape).int(), scales, zeros.int(), group, bits)


def row_codes(rows: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    minimum = rows.amin(1, keepdim=True).half()
    scales = ((rows.amax(1, keepdim=True) - minimum.float()) / (2**bits - 1)).half()
    found = ((rows - minimum.float()) / scales.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    packed = found if bits == 8 else found[:, ::2] | found[:, 1::2] << 4
    return {"codes": packed, "scales": scales, "minimum": minimum}, dequantise_rows(packed, scales, minimum, bits)


def exported(checkpoint: Path, out: Path, soc: str = "siracusa") -> Path:
    plan_export(Checkpoint.open(checkpoint), load_soc(soc), PROMPT, NEW, CONTEXT).write(out)
    return out


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("pattern", [None, "2:4", "1:8"])
@pytest.mark.parametrize("family", FULL)
def test_the_programs_tokens_are_pythons(
    family: str, pattern: str | None, bits: int, rank: int, tiny_model: TinyModel, tmp_path: Path, on_this_machine: Any
) -> None:
    model = tiny_model(family, num_hidden_layers=2, **FULL[family])
    made = compressed(tmp_path / "model", model, pattern, bits, rank, adapter_bits=16 if pattern else 8)
    folder = exported(made, tmp_path / "chip")
    wanted = list(expected_tokens(folder))
    assert len(set(wanted)) > 4
    assert on_this_machine(folder) == wanted


# What the grid above leaves out, each once: the bits of the codes, then what else there is.
OTHERS: list[tuple[str, int | None, dict[str, Any], dict[str, Any]]] = [
    ("llama", 2, {}, {}),
    ("llama", None, {"rank": 4}, {}),
    ("llama", 4, {"edge_bits": 8, "group": -1}, {"tie_word_embeddings": False}),
    ("qwen2", 4, {"edge_bits": 4, "symmetric": True}, {}),
    ("llama", 8, {"symmetric": True, "rank": 4, "group": 64}, {"attention_bias": True, "mlp_bias": True}),
    ("mistral", 4, {"rank": 4, "adapter_bits": 8}, {"dtype": "bfloat16", "tie_word_embeddings": True}),
    ("llama", None, {}, {"dtype": "float16", "head_dim": 32, "num_key_value_heads": 4}),
    ("llama", None, {"rank": 5}, {"head_dim": 6, "num_key_value_heads": 1}),  # six rows: not whole fours
    ("llama", 2, {"rank": 7, "adapter_bits": 8, "edge_bits": 4}, {}),
    ("llama", 2, {"pattern": "2:4"}, {}),
    ("llama", 4, {"pattern": "4:8", "symmetric": True}, {}),
    ("llama", 3, {"pattern": "4:8"}, {}),
    ("llama", 8, {"pattern": "1:8", "group": -1}, {}),
    ("llama", None, {"pattern": "2:4"}, {}),
    ("llama", None, {"pattern": "4:8", "rank": 4}, {"dtype": "float16"}),
    ("llama", 4, {"pattern": "3:4", "symmetric": True, "edge_bits": 8}, {}),
    ("llama", 3, {"edge_bits": 8}, {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "bits", "how", "overrides"), OTHERS)
def test_everything_else_that_can_be_stored(
    family: str, bits: int | None, how: dict[str, Any], overrides: dict[str, Any], tiny_model: TinyModel,
    tmp_path: Path, on_this_machine: Any,
) -> None:  # fmt: skip
    model = tiny_model(family, num_hidden_layers=2, **FULL[family] | overrides)
    made = compressed(tmp_path / "model", model, bits=bits, **{"pattern": None} | how)
    folder = exported(made, tmp_path / "chip")
    assert on_this_machine(folder) == list(expected_tokens(folder))


@pytest.mark.parametrize(("family", "pattern", "bits", "rank"), [
    ("llama", None, 4, 4), ("llama", "1:8", 3, 0), ("llama", "2:4", 3, 4), ("qwen2", "2:4", 8, 4),
    ("mistral", "1:8", 4, 0), ("llama", None, None, 0), ("gemma2", None, 4, 0), ("cohere", None, 4, 4),
    ("phi3", "2:4", 4, 0),
])  # fmt: skip
def test_on_a_simulated_core_they_are_the_same_in_the_memory_that_was_predicted(
    family: str,
    pattern: str | None,
    bits: int | None,
    rank: int,
    tiny_model: TinyModel,
    tmp_path: Path,
    rv32: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = {"clang" if "ziglang" in rv32 else "gcc": rv32}  # whose code is predicted
    monkeypatch.setattr("edgepress.hardware.rv32.cost.compilers", lambda: taken)
    model = tiny_model(family, num_hidden_layers=2, **FULL.get(family, {}))
    folder = exported(compressed(tmp_path / "model", model, pattern, bits, rank), tmp_path / "chip")
    build(folder, rv32)
    outcome = simulate(folder, limit=200_000_000)
    assert outcome.tokens == expected_tokens(folder)
    shape = Checkpoint.open(model).shape
    linears = {f"linear {layer.role}": layer.shape.weights for layer in layers(shape, shape.blocks[0])}
    around = {"attention", "norm", "rotary", "activation", "embedding", "head", "other"}
    assert outcome.operators.keys() == linears.keys() | around
    # Of two blocks; a weight takes at least a multiplication and an addition.
    assert all(2 * 2 * weights < outcome.operators[name] / outcome.fed for name, weights in linears.items())
    assert outcome.operators["other"] < 0.01 * outcome.instructions
    memories = json.loads((folder / "memory.json").read_text())["memories"]
    predicted = {part: nbytes for memory in memories for part, nbytes in memory["parts"].items()}
    used = {part: nbytes for row in used_bytes(outcome, memories) for part, nbytes in row["parts"].items()}
    for part in ("tables", "weights", "KV cache", "activations"):
        assert used[part] == predicted[part], part
    assert 0 < used["code"] <= predicted["code"] and 0 < used["stack"] <= STACK_BYTES
    assert outcome.sections.keys() <= {".text", ".tables", ".weights", ".kv", ".bss", ".stack"}  # all are counted


@pytest.mark.parametrize("simulator", ["qemu", "spike"])
def test_other_simulators_have_its_tokens_and_count_the_same(
    simulator: str, tiny_model: TinyModel, tmp_path: Path, rv32: list[str]
) -> None:
    try:
        find_simulator(simulator)
    except PlanError as error:
        pytest.skip(str(error))
    model = tiny_model("llama", num_hidden_layers=2)
    folder = exported(compressed(tmp_path / "model", model, "1:8", 4, 4), tmp_path / "chip")
    build(folder, rv32)
    first, other = simulate(folder), simulate(folder, simulator=simulator)
    assert other.tokens == expected_tokens(folder)
    assert (other.text, other.stack, other.instructions) == (first.text, first.stack, first.instructions)


def test_the_printed_text_is_the_tokens_text(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    tokenizer: Any = Checkpoint.open(folder).tokenizer()
    text = "for each größer value:\n  try 東京"
    pieces = token_pieces(folder, 512)
    ids = tokenizer(text)["input_ids"]
    assert b"".join(pieces[token] for token in [1, *ids, 2]).decode() == text


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "overrides", "words"), [
    ("stablelm", {}, "the family 'stablelm': the program knows the blocks of arcee, cohere,"),
    ("llama", {"partial_rotary_factor": 0.5}, "rotary embeddings on a part of a head's channels"),
    ("llama", {"hidden_act": "gelu_new"}, "the activation function 'gelu_new'"),
])  # fmt: skip
def test_a_model_the_program_cannot_run_is_refused_by_name(
    family: str,
    overrides: dict[str, Any],
    words: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    compress: Callable[..., Any],
) -> None:
    model = shutil.copytree(tiny_model(family), tmp_path / "model")
    config = model / "config.json"  # changed after the model was made: transformers itself cannot make all of these
    config.write_text(json.dumps(json.loads(config.read_text()) | overrides))
    done = compress("export", model, "--context", 48, "--tokens", 8, "-o", tmp_path / "chip")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "chip").exists()


def test_weights_the_program_cannot_read_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    book = compressed(tmp_path / "book", model, None, None, codebook="nf4")
    with pytest.raises(PlanError, match="weights in nf4: quantise to an integer grid"):
        exported(book, tmp_path / "chip")
    small = compressed(tmp_path / "small", model, None, 3, group=16)
    with pytest.raises(PlanError, match="groups of 16 in rows of 64 3-bit codes"):
        exported(small, tmp_path / "chip")
    unlike = compressed(tmp_path / "unlike", model, None, 4, unlike=True)
    with pytest.raises(CheckpointError, match="groups of unlike sizes"):
        exported(unlike, tmp_path / "chip")
    assert not (tmp_path / "chip").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--to", "avr"], "--to avr: there is rv32"),
    (["--soc", "gap9"], "memories.MRAM has no address and access"),
    (["--soc", "rp2350"], "Hazard3 (RV32IMAC), have no floating-point unit"),
    (["--soc", "esp32-s3"], "its cores are Xtensa LX7"),
    (["--context", "512"], "the model has positions for 1 to 256"),
    (["--tokens", "60", "--context", "32"], "all must go into the context of 32"),
    (["--tokens", "0"], "at least one must be new"),
])  # fmt: skip
def test_a_mistake_gets_one_message_and_code_2(
    arguments: list[str], words: str, tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    done = compress("export", tiny_model("llama"), *arguments, "-o", tmp_path / "chip")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "chip").exists()


def test_what_does_not_fit_ends_with_3_and_is_written_only_by_force(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    chip = tmp_path / "small.toml"
    chip.write_text(
        'based_on = "siracusa"\n[memories.MRAM]\n'
        'capacity = { value = 64, unit = "KiB", kind = "stated", source = "a test" }\n'
    )
    arguments = ("export", tiny_model("llama"), "--soc", chip, "--tokens", 4, "-o", tmp_path / "chip")
    done = compress(*arguments)
    assert done.returncode == 3 and not (tmp_path / "chip").exists()
    assert "does not fit Siracusa: MRAM would hold" in done.stdout and "weights need" in done.stdout
    assert compress(*arguments, "--force").returncode == 0
    assert (tmp_path / "chip" / "weights.bin").stat().st_size > 64 * 1024
    with pytest.raises(PlanError, match="could not build"):
        build(tmp_path / "chip", find_compiler())


def test_a_folder_with_other_things_is_left_alone(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = compress("export", tiny_model("llama"), "-o", tmp_path)
    assert done.returncode == 2 and "holds no exported program" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_interrupted_export_leaves_no_folder(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(path: Path, data: bytes) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        path.write_bytes(data)
        written.append(path.name)

    monkeypatch.setattr("edgepress.pipeline.export.write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        exported(tiny_model("llama", num_hidden_layers=1), tmp_path / "chip")
    assert len(written) == 3 and not (tmp_path / "chip").exists()


def test_simulate_prints_the_text_and_what_it_took(
    tiny_model: TinyModel, rv32: list[str], compress: Callable[..., Any]
) -> None:
    done = compress("simulate", tiny_model("llama"), "for each", "--tokens", 4, "--context", 16)
    assert done.returncode == 0, done.stderr
    wanted = ["for each", "instructions a token", "linear down", "all, on one core", "MRAM: ", "stack "]
    for words in [*wanted, "tokens are those of Python in float32"]:
        assert words in done.stdout


def test_simulate_says_what_it_compared_and_ends_with_1_where_tokens_differ(
    tiny_model: TinyModel, rv32: list[str], compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("simulate", tiny_model("llama"), "for each", "--tokens", 2, "--context", 16, "--kv-bits", 8)
    alike = compress(*few)
    assert alike.returncode == 0 and "keys and values rounded to 8 bits alike" in alike.stdout, alike.stderr
    monkeypatch.setattr("edgepress.hardware.rv32.simulator.expected_tokens", lambda folder: [1])
    done = compress(*few)
    assert done.returncode == 1 and "not those of Python in float32 from place 0" in done.stdout


def test_simulate_names_what_to_install(
    tiny_model: TinyModel, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepress.hardware.rv32.simulator.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    done = compress("simulate", tiny_model("llama"))
    assert done.returncode == 2 and "no simulator was found: pip install" in done.stderr
    done = compress("simulate", tiny_model("llama"), "--simulator", "spike")
    assert done.returncode == 2 and "the simulator spike was not found: pip install spike" in done.stderr
    monkeypatch.setattr("edgepress.hardware.rv32.simulator.find_spec", lambda name: True)
    monkeypatch.setattr("edgepress.hardware.rv32.build.find_spec", lambda name: None)
    done = compress("simulate", tiny_model("llama"))
    assert done.returncode == 2 and "no compiler for RV32 was found: apt-get install" in done.stderr
