"""Packed images of random checkpoints: every tensor back bit for bit, in a file of the predicted size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.bits import pack_bits
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.image import (
    decode_linear,
    encode_linear,
    open_image,
    pack_checkpoint,
    read_block,
    unpack_checkpoint,
)
from edgepress.checkpoints.masks import group_zeros
from edgepress.checkpoints.packed_sizes import block_records, packed_bits, packed_sizes, place
from edgepress.checkpoints.shape import BlockShape, LinearShape, parse_sparsity
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.writer import CheckpointWriter, verify
from tests.random_checkpoint import DTYPES, Wanted

pytestmark = pytest.mark.unit


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file, by its name and whether it is the model's, the adapter's, the edge's."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        place = "" if path.parent == folder else path.parent.name
        found |= {f"{place}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@st.composite
def wanted(draw: st.DrawFn) -> Wanted:
    of = draw(st.integers(2, 16))
    pattern = draw(st.sampled_from([None, f"{draw(st.integers(1, of - 1))}:{of}", "0.5", "0.05", "0.9"]))
    bits = draw(st.sampled_from([None, 3, 4, 8]))
    common = 32 if bits else 2
    unit = of * common // torch.gcd(torch.tensor(of), torch.tensor(common)).item() * draw(st.integers(1, 2))
    return Wanted(
        seed=draw(st.integers(0, 10**6)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        pattern=pattern,
        bits=bits,
        group=draw(st.sampled_from([32, -1])),
        symmetric=draw(st.booleans()),
        desc_act=draw(st.booleans()) if bits else False,
        rank=draw(st.sampled_from([0, 3])) if bits else 0,
        adapter_bits=draw(st.sampled_from([8, 16])),
        edge_bits=draw(st.sampled_from([None, 4, 8])),
        bias=draw(st.booleans()),
        zeros=draw(st.sampled_from([0.0, 0.3])),
        rows=32 * draw(st.integers(1, 2)) if bits else draw(st.integers(1, 40)),
        unit=int(unit),
    )


@given(wanted=wanted())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_layer_comes_back_as_it_was_and_takes_the_bytes_that_its_shape_says(wanted: Wanted) -> None:
    wanted.g = torch.Generator().manual_seed(wanted.seed)
    stored = (
        wanted.codes(wanted.rows, wanted.unit) if wanted.bits else {"weight": wanted.dense(wanted.rows, wanted.unit)}
    )
    grid = Grid(wanted.bits, wanted.group, wanted.symmetric) if wanted.bits else None
    pattern = parse_sparsity(wanted.pattern) if wanted.pattern else None
    x = LinearShape("q_proj", wanted.rows, wanted.unit, wanted.dtype, pattern=pattern, grid=grid)
    (entry,), size = place(block_records(BlockShape((x,), ()), ordered=not wanted.desc_act))
    parts = encode_linear(entry, stored)
    assert {name: part.size for name, part in parts.items() if part.size} == {
        name: length for name, (_, length) in entry["parts"].items()
    }
    assert parts["values"].size + (parts["index"].size if "index" in parts else 0) - packed_bits(x) / 8 < 2
    assert sum(part.size for part in parts.values()) <= size
    back = decode_linear(json.loads(json.dumps(entry)), parts)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))


@given(wanted=wanted())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_unpacking_is_the_inverse_of_packing_and_the_size_is_the_predicted_one(wanted: Wanted) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = wanted.make(folder / "it")
        image = pack_checkpoint(checkpoint, folder / "model.bin")
        assert checkpoint.manifest is not None
        assert image.nbytes == (folder / "model.bin").stat().st_size == checkpoint.manifest.packed_bytes
        restored = unpack_checkpoint(folder / "model.bin", folder / "back")
        assert_same_bits(folder / "it", folder / "back")
        assert restored.config == checkpoint.config
        assert restored.shape.pattern == checkpoint.shape.pattern
        for index in range(2):
            for name, tensor in checkpoint.block(index).items():
                assert torch.equal(restored.block(index)[name], tensor)
        verify(restored)
        assert sorted(p.name for p in folder.iterdir()) == ["back", "it", "model.bin"]
        # and packing what came back gives the same bytes
        again = pack_checkpoint(restored, folder / "again.bin")
        assert again.sha256 == image.sha256


# --- the file as the docstring tells it ----------------------------------------------------------------------------


def test_a_reader_that_knows_only_the_documentation_finds_the_weights(tmp_path: Path) -> None:
    """2:4 at 4 bits, read with nothing but struct, json and integers."""
    checkpoint = Wanted(pattern="2:4", bits=4, symmetric=True).make(tmp_path / "it")
    pack_checkpoint(checkpoint, tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    assert data[:8] == b"EDGEPACK"
    header = json.loads(data[64 : 64 + int.from_bytes(data[12:16], "little")])
    start = -(-(64 + int.from_bytes(data[12:16], "little")) // 4096) * 4096
    assert int.from_bytes(data[16:24], "little") == len(data)
    block = header["blocks"][1]
    entry = next(e for e in header["layouts"][block["layout"]] if e["name"] == "mlp.down_proj")
    rows, columns = entry["shape"]

    def stream(part: str) -> int:
        at, size = entry["parts"][part]
        assert at % 16 == 0
        return int.from_bytes(data[start + block["at"] + at :][:size], "little")

    words, codes = stream("index"), stream("values")
    sets = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]  # colexicographic
    at, size = entry["parts"]["scales"]
    scales = torch.frombuffer(bytearray(data[start + block["at"] + at :][:size]), dtype=torch.float16)
    scales = scales.view(columns // entry["group"], rows).float()
    weight = torch.zeros(rows, columns)
    bits, joint, taken = entry["index"]["bits"], entry["index"]["groups"], 0
    for group in range(rows * columns // 4):
        word = words >> (group // joint * bits) & (2**bits - 1)
        removed = sets[word // 6 ** (group % joint) % 6]
        for column_of_group in range(4):
            if column_of_group not in removed:
                row, column = divmod(4 * group + column_of_group, columns)
                code = codes >> (4 * taken) & 15
                weight[row, column] = scales[column // entry["group"], row] * (code - 8)
                taken += 1
    expected = checkpoint.base_weight(1, checkpoint.shape.blocks[1].linears[0])
    assert checkpoint.shape.blocks[1].linears[0].name == "mlp.down_proj"
    assert torch.equal(weight, expected)
    assert bool((group_zeros(weight, 4) >= 2).all())


def test_blocks_can_be_read_alone(tmp_path: Path) -> None:
    checkpoint = Wanted(bits=3, pattern="1:8", rank=2).make(tmp_path / "it")
    pack_checkpoint(checkpoint, tmp_path / "model.bin")
    contents = read_block(open_image(tmp_path / "model.bin"), 1)
    stored = checkpoint.stored_block(1)
    assert contents.tensor.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in contents.tensor.items())
    assert contents.adapter.keys() == checkpoint.adapter_part(1).keys()


def test_a_family_model_with_tokenizer_generates_the_same_text(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Checkpoint.open(tiny_model("gemma3_text"))
    image = pack_checkpoint(source, tmp_path / "model.bin", tokenizer=True)
    files = [f for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
             if (source.folder / f).is_file()]  # fmt: skip
    extra = image.nbytes - packed_sizes(source.shape).total
    assert extra >= sum((source.folder / f).stat().st_size for f in files)
    back = unpack_checkpoint(tmp_path / "model.bin", tmp_path / "back").folder
    for name in files:
        assert (back / name).read_bytes() == (source.folder / name).read_bytes()
    ids = AutoTokenizer.from_pretrained(back)("the loop", return_tensors="pt").input_ids
    one, other = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source.folder, back))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_an_adapter_at_8_bits_travels_as_its_codes(tmp_path: Path) -> None:
    checkpoint = Wanted(bits=4, rank=5, adapter_bits=8, pattern="2:4").make(tmp_path / "it")
    image = pack_checkpoint(checkpoint, tmp_path / "model.bin")
    entries = [e for e in image.table["layouts"][0] if "adapter" in e["kind"]]
    sizes = {e["name"]: sum(size for _, size in e["parts"].values()) for e in entries}
    assert sizes == {
        "self_attn.q_proj.lora_A.codes": 5 * 32,
        "self_attn.q_proj.lora_A.scales": 5 * 4,
        "self_attn.q_proj.lora_A.weight": 0,
        "self_attn.q_proj.lora_B.codes": 32 * 5,
        "self_attn.q_proj.lora_B.scales": 5 * 4,
        "self_attn.q_proj.lora_B.weight": 0,
        "mlp.down_proj.lora_A.codes": 5 * 64,
        "mlp.down_proj.lora_A.scales": 5 * 4,
        "mlp.down_proj.lora_A.weight": 0,
        "mlp.down_proj.lora_B.codes": 64 * 5,
        "mlp.down_proj.lora_B.scales": 5 * 4,
        "mlp.down_proj.lora_B.weight": 0,
    }
    linears = [x for block in checkpoint.shape.blocks for x in block.linears]
    assert packed_sizes(checkpoint.shape).adapters == 2 * sum(sizes.values()) == sum(x.adapter_bytes for x in linears)
    back = unpack_checkpoint(tmp_path / "model.bin", tmp_path / "back")
    for name in ("adapter/packed.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (back.folder / name).read_bytes() == (checkpoint.folder / name).read_bytes()
    assert any("8-bit codes" in line for line in verify(back))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack_checkpoint(Wanted(pattern="2:4", bits=4).make(tmp_path / "it"), tmp_path / "model.bin")
    return tmp_path / "model.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is not a packed image"),
        (lambda data: b"GGUF" + data[4:], "is not a packed image"),
        (lambda data: data[:30], "is cut off after 30 bytes"),
        (lambda data: data[:-1], r"has \d+ bytes where its beginning announces \d+"),
        (lambda data: data + b"\0", r"has \d+ bytes where its beginning announces \d+"),
        (lambda data: data[:8] + b"\x09" + data[9:], "of version 9; this one reads version 1"),
        (lambda data: data[:25] + b"\x01" + data[26:], "is damaged"),
        (lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:], "is damaged"),
        (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "is damaged"),
    ],
    ids=["empty", "foreign", "preamble", "cut", "longer", "version", "scale", "header", "weights"],
)
def test_a_damaged_file_is_one_error_and_leaves_nothing(
    packed: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    packed.write_bytes(change(packed.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        unpack_checkpoint(packed, packed.parent / "back")
    assert sorted(p.name for p in packed.parent.iterdir()) == ["it", "model.bin"]


def test_no_file_and_places_that_are_taken(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        unpack_checkpoint(packed.parent / "none.bin", packed.parent / "back")
    with pytest.raises(CheckpointError, match=r"restore its folder first: compress unpack"):
        open_source(str(packed))
    with pytest.raises(PlanError, match="not an empty folder"):
        unpack_checkpoint(packed, packed.parent / "it")
    with pytest.raises(PlanError, match="there is no folder"):
        unpack_checkpoint(packed, packed.parent / "a" / "b")
    checkpoint = Checkpoint.open(packed.parent / "it")
    for taken in (packed.parent / "it", packed.parent / "it" / "config.json"):
        with pytest.raises(PlanError, match="is not a packed image; choose another"):
            pack_checkpoint(checkpoint, taken)
    with pytest.raises(PlanError, match="there is no folder"):
        pack_checkpoint(checkpoint, packed.parent / "a" / "model.bin")
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        pack_checkpoint(checkpoint, packed, tokenizer=True)
    before = packed.read_bytes()
    pack_checkpoint(checkpoint, packed)  # an image may be written over
    assert packed.read_bytes() == before


def test_a_failure_while_packing_leaves_the_old_file(packed: Path) -> None:
    before = packed.read_bytes()
    liar = Wanted(pattern="2:4", bits=4).make(packed.parent / "liar")
    spoilt = dict(liar.stored_block(1))
    spoilt["self_attn.q_proj.qweight"] = torch.full_like(spoilt["self_attn.q_proj.qweight"], 0x21212121)
    CheckpointWriter(liar.folder).write_block(1, spoilt)
    message = r"layers\.1\.self_attn\.q_proj is said to hold 2:4, but \d+ of its 256 groups have fewer zeros"
    with pytest.raises(CheckpointError, match=message):
        pack_checkpoint(Checkpoint(liar.folder, liar.manifest), packed)
    assert packed.read_bytes() == before
    assert not list(packed.parent.glob(".*partial"))


def test_what_the_image_could_not_bring_back_is_refused(tmp_path: Path) -> None:
    def refused(
        name: str, message: str, index: int | None, change: Callable[[dict[str, Tensor]], None], w: Wanted
    ) -> None:
        made = w.make(tmp_path / name)
        tensors = dict(made.stored_block(0) if index == 0 else made.outer())
        change(tensors)
        writer = CheckpointWriter(made.folder)
        if index == 0:
            writer.write_block(0, tensors)
        else:
            writer.write_outer(tensors)
        with pytest.raises(CheckpointError, match=message):
            pack_checkpoint(Checkpoint(made.folder, made.manifest), tmp_path / f"{name}.bin")

    q = "self_attn.q_proj"

    def minus(t: dict[str, Tensor]) -> None:
        t[f"{q}.weight"] = torch.where(t[f"{q}.weight"] == 0, -0.0, t[f"{q}.weight"])

    def zero_points(t: dict[str, Tensor]) -> None:
        t[f"{q}.qzeros"] = t[f"{q}.qzeros"] + 1

    def order(t: dict[str, Tensor]) -> None:
        t["mlp.down_proj.g_idx"] = t["mlp.down_proj.g_idx"].flip(0)

    def embedding(t: dict[str, Tensor]) -> None:
        t["model.embed_tokens.weight"] = t["model.embed_tokens.weight"] + 1

    refused("minus", "a zero with a minus sign", 0, minus, Wanted(pattern="2:4"))
    refused("sym", "not all the middle code", 0, zero_points, Wanted(bits=4, symmetric=True))
    refused("order", "out of storage order", 0, order, Wanted(bits=4))
    refused("edge", "embed_tokens.weight is not what the packed codes", None, embedding, Wanted(edge_bits=8))


def test_an_adapter_that_is_not_what_its_codes_stand_for_is_refused(tmp_path: Path) -> None:
    made = Wanted(bits=4, rank=2, adapter_bits=8).make(tmp_path / "it")
    path = made.folder / "adapter" / "packed.safetensors"
    codes = load_file(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B"
    codes[f"{name}.codes"][3, 1] ^= 64
    save_file(codes, path, metadata={"format": "pt"})
    message = r"layers\.1\.mlp\.down_proj\.lora_B\.weight is not what the packed codes beside it stand for"
    with pytest.raises(CheckpointError, match=message):
        pack_checkpoint(Checkpoint(made.folder, made.manifest), tmp_path / "model.bin")
    del codes[f"{name}.scales"]
    save_file(codes, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"packed\.safetensors lacks {name}\.scales"):
        pack_checkpoint(Checkpoint(made.folder, made.manifest), tmp_path / "model.bin")
    assert not (tmp_path / "model.bin").exists()


def test_an_adapter_beyond_plain_lora_is_refused_with_all_its_reasons(tmp_path: Path) -> None:
    made = Wanted(bits=4, rank=2).make(tmp_path / "it")
    path = made.folder / "adapter_config.json"
    plain = json.loads(path.read_text())

    def refused(*reasons: str, **changes: object) -> None:
        path.write_text(json.dumps(plain | changes))
        with pytest.raises(CheckpointError, match="asks for what an image has no place for") as caught:
            pack_checkpoint(made, tmp_path / "model.bin")
        assert all(reason in str(caught.value) for reason in reasons), caught.value

    refused("fan_in_fan_out True", "rank_pattern {'q_proj': 4}", fan_in_fan_out=True, rank_pattern={"q_proj": 4})
    refused("alpha_pattern {'q_proj': 4}", alpha_pattern={"q_proj": 4})
    refused("use_dora True", use_dora=True)
    refused("bias lora_only", bias="lora_only")
    refused("r is 4, but A has rank 2", r=4)
    refused("peft_type LOHA", peft_type="LOHA")
    refused("from_the_future 3", from_the_future=3)
    # what does not change the sum, or was not there in an older peft, is no reason
    older = {key: value for key, value in plain.items() if "pattern" not in key}
    harmless = {"lora_dropout": 0.1, "base_model_name_or_path": "x", "task_type": None, "from_the_future": None}
    path.write_text(json.dumps(older | harmless))
    pack_checkpoint(made, tmp_path / "model.bin")
    path.write_text(json.dumps(plain | {"use_rslora": True}))  # another scale, and nothing else
    anew = Checkpoint(made.folder, made.manifest)
    assert pack_checkpoint(anew, tmp_path / "model.bin").adapter_scale == plain["lora_alpha"] / 2**0.5


def test_three_bit_streams_lie_as_told() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]).numpy(), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
