"""A checkpoint folder's shape, read from the headers of its safetensors files alone. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.forms import (
    CODEBOOK_METHOD,
    CODEBOOKS,
    REAL_METHOD,
    TORCH_NAMES,
    Codebook,
    Form,
    Grid,
    RealGrid,
    TensorShape,
)  # fmt: skip
from checkpoints.manifest import MANIFEST, Manifest, require_inside, require_own_links
from checkpoints.shape import BlockShape, LinearShape, ModelShape
from checkpoints.sparsity import Sparsity, parse_sparsity

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter/adapter_model.safetensors"
ADAPTER_PACKED = "adapter/packed.safetensors"
EDGE = "edge/embedding.safetensors"

_Adapter = tuple[int, str, bool, str]  # rank, precision, whether packed codes lie beside it, vector
_NO_ADAPTER: _Adapter = (0, "BF16", False, "")


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    require_own_links(folder)
    if not path.is_file():
        beside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if "adapter_config.json" in beside:
            raise CheckpointError(
                f"{folder} is an adapter in PEFT's format, not a model. Give the model's folder: the one the adapter "
                "was made for, or one with the adapter merged"
            )
        raise CheckpointError(
            f"{folder} is not a model folder: it has no config.json"
            + (f" (it holds {', '.join(beside[:8])}{' …' if len(beside) > 8 else ''})" if beside else "")
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor, perhaps, text at all
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a configuration")
    return config


def read_header(path: Path) -> dict[str, TensorShape]:
    """The tensors of one safetensors file by name. Raises CheckpointError if the file is cut or foreign."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                raise ValueError("the header length makes no sense")
            header = json.loads(file.read(length))
        tensors = {
            name: TensorShape(name, tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        expected = 8 + length + sum(t.nbytes for t in tensors.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if path.stat().st_size != expected:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes where its header announces {expected}")
    return tensors


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, through the index or the single file."""
    index = folder / INDEX
    if index.is_file():
        try:
            names: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from None
        require_inside(folder, names.values(), str(index))
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:4])}, which its index names")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    pickled = [p.name for p in folder.glob("*.bin")]
    hint = f" {pickled[0]} is pickled and is never opened; save the model as safetensors." if pickled else ""
    raise CheckpointError(f"{folder} holds no safetensors weights (neither {INDEX} nor model.safetensors).{hint}")


def block_prefix(names: list[str], blocks: int, folder: Path) -> str:
    """The module path under which the blocks are numbered 0 … blocks - 1, e.g. model.layers."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := re.match(r"(.+?)\.(\d+)\.", name):
            numbers[match[1]].add(int(match[2]))
    found = [prefix for prefix, seen in numbers.items() if seen == set(range(blocks))]
    if len(found) != 1:
        seen_text = ", ".join(f"{prefix} ({len(seen)})" for prefix, seen in numbers.items()) or "none"
        raise CheckpointError(
            f"{folder}: cannot tell which tensors form its {blocks} blocks; numbered groups found: {seen_text}"
        )
    return found[0]


def shape_from_folder(folder: Path) -> ModelShape:
    """The shape of a checkpoint of any stage, or of any Hugging Face causal language model folder."""
    config = read_config(folder)
    files = weight_files(folder)
    tensors: dict[str, TensorShape] = {}
    for path in sorted(set(files.values())):
        tensors.update(read_header(path))
    lost = sorted(set(files) - set(tensors))
    if lost:
        raise CheckpointError(f"{folder}: its index names {lost[0]}, which no file holds")

    count = config.get("num_hidden_layers")
    if not isinstance(count, int):
        raise CheckpointError(f"{folder}/config.json states no num_hidden_layers")
    prefix = block_prefix(list(tensors), count, folder)
    members: dict[int, dict[str, TensorShape]] = defaultdict(dict)
    outer = []
    for name, tensor in tensors.items():
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name):
            members[int(match[1])][match[2]] = tensor
        else:
            outer.append(tensor)

    form = _form(config)
    codes = _read_notes(files) if isinstance(form, Codebook) else {}
    pattern = _pattern(folder)
    adapters = _adapters(folder, prefix)
    blocks = []
    for i in range(count):
        start = f"{prefix}.{i}."
        coded = {name.removeprefix(start): x for name, x in codes.items() if name.startswith(start)}
        blocks.append(_block(members[i], form, coded, pattern, adapters.get(i, {})))
    bits = None
    if (folder / EDGE).is_file():
        rows = next(t for name, t in read_header(folder / EDGE).items() if name.endswith(".codes"))
        bits = rows.shape[1] * 8 // int(config["hidden_size"])
    return ModelShape(str(config.get("model_type")), config, tuple(blocks), tuple(outer), prefix, bits)


def _block(
    members: dict[str, TensorShape],
    form: Form | None,
    coded: dict[str, _Coded],
    pattern: Sparsity | None,
    adapters: dict[str, _Adapter],
) -> BlockShape:
    linears, others = [], []
    dtypes = Counter(t.dtype for t in members.values() if t.dtype in ("F32", "F16", "BF16"))
    for name, tensor in members.items():
        base, _, kind = name.rpartition(".")
        adapter = adapters.get(base, _NO_ADAPTER)
        bias = f"{base}.bias" in members
        zeros = pattern if pattern is not None and pattern.covers(base) else None
        if base in coded and kind == "weight":
            codebook, (outs, ins), dense = coded[base]
            linears.append(LinearShape(base, outs, ins, dense, bias, zeros, codebook, *adapter))
            _require_stored(linears[-1], members)
        elif kind == "qweight" or (isinstance(form, RealGrid) and kind == "weight" and f"{base}.zeros" in members):
            words, outs = tensor.shape
            ins = words * 32 // form.bits if isinstance(form, RealGrid) else members[f"{base}.g_idx"].elements
            dense = next((d for d, _ in dtypes.most_common() if d != "F16"), "F16")
            linears.append(LinearShape(base, outs, ins, dense, bias, zeros, form, *adapter))
            _require_stored(linears[-1], members)
        elif kind == "weight" and len(tensor.shape) == 2 and not base.endswith("norm"):  # Cohere's has a row a head
            outs, ins = tensor.shape
            if tensor.dtype not in TORCH_NAMES:
                raise CheckpointError(
                    f"{name} is stored as {tensor.dtype} without saying what its codes stand for; give the checkpoint "
                    "from before quantisation"
                )
            linears.append(LinearShape(base, outs, ins, tensor.dtype, bias, zeros, None, *adapter))
        elif name.partition(".weight.")[0] not in coded and not _belongs_to_linear(name, members):
            others.append(TensorShape(name, tensor.shape, tensor.dtype))
    return BlockShape(tuple(linears), tuple(others))


def _require_stored(linear: LinearShape, members: dict[str, TensorShape]) -> None:
    """Raise CheckpointError where a quantised layer lacks a tensor, or one is not of the shape that its form has."""
    for wanted in linear.stored():
        found = members.get(wanted.name)
        if found is None:
            raise CheckpointError(
                f"a layer stored as {linear.grid.describe() if linear.grid else ''} lacks {wanted.name}"
            )
        if ".quant_state." in wanted.name or wanted.name.endswith(".bias"):
            continue  # a note may be of any length, and a bias of any precision
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(
                f"{wanted.name} is {found.dtype} {list(found.shape)}, where {wanted.dtype} {list(wanted.shape)} is "
                "wanted; save the model again, bitsandbytes' with bnb_4bit_quant_storage uint8"
            )


def _belongs_to_linear(name: str, members: dict[str, TensorShape]) -> bool:
    """Whether a tensor is a linear layer's bias, or lies beside its packed codes."""
    base, _, kind = name.rpartition(".")
    if kind in ("qzeros", "zeros", "scales", "g_idx"):
        return True
    weight = members.get(f"{base}.weight")
    return kind == "bias" and (f"{base}.qweight" in members or (weight is not None and len(weight.shape) == 2))


# --- quantised layers ----------------------------------------------------------------------------------------------

_Coded = tuple[Codebook, tuple[int, int], str]  # form, (out, in), precision of the weights
_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


def _form(config: dict[str, Any]) -> Form | None:
    """What config.json says of the weights. A codebook's blocks are told by each layer's own note."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "gptq":
        return Grid(int(quantization["bits"]), int(quantization["group_size"]), bool(quantization.get("sym", False)))
    if method == REAL_METHOD:
        return RealGrid(int(quantization["bits"]), int(quantization["group_size"]))
    if (
        method == "bitsandbytes"
        and quantization.get("load_in_4bit")
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    ):
        return CODEBOOKS["nf4"]
    if method == CODEBOOK_METHOD and quantization.get("codebook") in CODEBOOKS:
        return CODEBOOKS[quantization["codebook"]]
    raise CheckpointError(
        f"the weights are quantised by '{method}'; only GPTQ's format, bitsandbytes' nf4 and what this project writes "
        "can be read back. Give the checkpoint from before quantisation"
    )


def _read_notes(files: dict[str, Path]) -> dict[str, _Coded]:
    """Of each layer with a codebook its form, sides and precision, by the layer's name.

    They stand in a note of a few hundred bytes beside the codes; nothing else of the files is read.
    """
    noted: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        if ".weight.quant_state." in name:
            noted[path].append(name)
    found = {}
    for path, names in noted.items():
        for name, data in _read_bytes(path, names).items():
            base = name.partition(".weight.quant_state.")[0]
            try:
                note = json.loads(data)
                codebook = replace(
                    CODEBOOKS[note["quant_type"]],
                    block=int(note["blocksize"]),
                    nested=int(note.get("nested_blocksize", 0)),
                )
                outs, ins = map(int, note["shape"])
                found[base] = (codebook, (outs, ins), _DTYPES[note["dtype"]])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: {name} does not say how the layer is stored ({error!r})") from None
    return found


def _read_bytes(path: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of a few small tensors of a file whose header is sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = {}
        for name in names:
            begin, end = header[name]["data_offsets"]
            file.seek(8 + length + begin)
            found[name] = file.read(end - begin)
    return found


def _pattern(folder: Path) -> Sparsity | None:
    if not (folder / MANIFEST).is_file():
        return None
    sparsity = Manifest.read(folder).sparsity
    return parse_sparsity(sparsity["pattern"]) if sparsity else None


def _adapters(folder: Path, prefix: str) -> dict[int, dict[str, _Adapter]]:
    """What lies beside each block's linear layers, by block and name."""
    found: dict[int, dict[str, _Adapter]] = defaultdict(dict)
    path, packed = folder / ADAPTER, (folder / ADAPTER_PACKED).is_file()
    kinds = r"lora_A\.weight|lora_magnitude_vector|ia3_l"
    for name, tensor in (read_header(path) if path.is_file() else {}).items():
        if match := re.fullmatch(rf"base_model\.model\.{re.escape(prefix)}\.(\d+)\.(.+)\.({kinds})", name):
            index, base, kind = int(match[1]), match[2], match[3]
            rank, dtype, _, vector = found[index].get(base, _NO_ADAPTER)
            if kind == "lora_A.weight":
                rank, dtype = tensor.shape[0], tensor.dtype
            else:
                vector = "magnitude" if kind != "ia3_l" else "rows" if tensor.shape[1] == 1 else "columns"
            found[index][base] = (rank, dtype, packed, vector)
    return found
