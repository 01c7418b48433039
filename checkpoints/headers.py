"""A checkpoint's shape, read from the headers of its safetensors files; no torch."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgepress.checkpoints.config import read_config, stated_form, tied
from edgepress.checkpoints.documents import CONFIG_BYTES, parse_json, read_small
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import known_families, shape_from_config
from edgepress.checkpoints.forms import DTYPE_BITS, TORCH_NAMES, Form, Layer, TensorShape
from edgepress.checkpoints.manifest import MANIFEST, Manifest, require_inside
from edgepress.checkpoints.shape import (
    DENSE_DTYPE,
    OWN_KEY,
    SAME_BLOCKS,
    BlockShape,
    LinearShape,
    ModelShape,
    Sparsity,
    parse_sparsity,
)

INDEX_BYTES = 64 * 2**20
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Under these names, beside the weights, transformers finds an adapter and loads it with them; a folder of an earlier
# day has both in `adapter/`.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_PACKED = "adapter/packed.safetensors"
EDGE = "edge/embedding.safetensors"

# Files of an earlier day hold what the model computes itself: rotary tables, causal masks, positions. transformers
# ignores them (its _keys_to_ignore_on_load_unexpected; huggingface/transformers#35255).
_COMPUTED = re.compile(
    r"(^|\.)(rotary\w*\.(original_)?(inv_freq|cos_cached|sin_cached)|(attention|attn|self_attn)\.(masked_)?bias"
    r"|position_ids)$"
)
# What transformers calls otherwise than the files of a family do (its conversion_mapping.py).
RENAMED = {"gpt_neox": {"embed_out.weight": "lm_head.weight"}}

_Adapter = tuple[int, str, bool, str]  # rank, precision, whether packed codes lie beside it, vector
_NO_ADAPTER: _Adapter = (0, "BF16", False, "")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, its name there, and what it is, under the name that transformers' model has."""

    path: Path
    name: str
    tensor: TensorShape


def adapter_path(folder: Path, name: str = ADAPTER) -> Path:
    """Where a folder has its adapter, or `name` beside it; if it has none, where one would be."""
    earlier = folder / "adapter"
    return (earlier if (earlier / ADAPTER).is_file() and not (folder / ADAPTER).is_file() else folder) / name


def read_header(path: Path) -> dict[str, TensorShape]:
    """The tensors of one safetensors file by name. Raises CheckpointError if the file is cut or foreign."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(100_000_000, size):
                raise ValueError("the header length makes no sense")
            header = parse_json(file.read(length), "its header")
        tensors, spans = {}, []
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = tensor = TensorShape(name, tuple(map(_side, entry["shape"])), entry["dtype"])
                begin, end = entry["data_offsets"]
                if (end - begin) * 8 != tensor.elements * DTYPE_BITS[tensor.dtype]:
                    raise ValueError(f"{name} has {end - begin} bytes, which do not make {list(tensor.shape)}")
                spans.append((begin, end))
        at = 0
        for begin, end in sorted(spans):
            if begin != at:
                raise ValueError(f"its tensors overlap or leave a gap at byte {at}")
            at = end
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if size != (expected := 8 + length + at):
        raise CheckpointError(f"{path} has {size} bytes where its header announces {expected}")
    return tensors


def _side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a side of {value!r}")
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, through the single file or the index.

    Where both are there, the single file counts and the index does not, as in transformers. Raises CheckpointError
    where the two make a finished checkpoint ambiguous.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        if (folder / MANIFEST).is_file() and SINGLE not in Manifest.read(folder).files:
            raise CheckpointError(
                f"{folder} holds {SINGLE}, which its manifest does not list and which would be read in place of its "
                "shards; move that file away"
            )
        return dict.fromkeys(read_header(single), single)
    if index.is_file():
        try:
            names: dict[str, str] = dict(parse_json(read_small(index, INDEX_BYTES), str(index))["weight_map"])
        except (ValueError, KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from None
        require_inside(folder, names.values(), str(index))
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:4])}, which its index names")
        return {name: folder / file for name, file in names.items()}
    pickled = [p.name for p in folder.glob("*.bin")]
    hint = f" {pickled[0]} is pickled and is never opened; save the model as safetensors." if pickled else ""
    raise CheckpointError(f"{folder} holds no safetensors weights (neither {INDEX} nor {SINGLE}).{hint}")


def stored_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor of a model folder by the name that transformers' model has, buffers that it computes left out.

    Raises CheckpointError where the index and the files disagree, or two files hold a tensor of one name.
    """
    files = weight_files(folder)
    renamed = RENAMED.get(str(config.get("model_type")), {})
    found: dict[str, Stored] = {}
    lost = set(files)
    for path in sorted(set(files.values())):
        for name, tensor in read_header(path).items():
            if files.get(name) != path:
                where = f"keeps in {files[name].name}" if name in files else "does not name"
                raise CheckpointError(
                    f"{folder}: {path.name} holds {name}, which its index {where}; save the model again"
                )
            lost.discard(name)
            if _COMPUTED.search(name) and not _is_parameter(tensor):
                continue
            own = renamed.get(name, name)
            found[own] = Stored(path, name, replace(tensor, name=own))
    if lost:
        raise CheckpointError(f"{folder}: its index names {min(lost)}, which no file holds")
    return found


def _is_parameter(tensor: TensorShape) -> bool:
    """Whether what is called a bias of the attention is one, and not the causal mask that some families stored."""
    return tensor.name.endswith(".bias") and len(tensor.shape) == 1 and tensor.dtype in TORCH_NAMES


def block_prefix(names: list[str], blocks: int, folder: Path) -> str:
    """The module path under which the blocks are numbered 0 … blocks - 1, e.g. model.layers."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := re.match(r"(.+?)\.(\d+)\.", name):
            numbers[match[1]].add(int(match[2]))
    found = [prefix for prefix, seen in numbers.items() if seen == set(range(blocks))]
    if len(found) != 1:
        if len(numbers) == 1:
            prefix, seen = next(iter(numbers.items()))
            raise CheckpointError(
                f"{folder}: the configuration states {blocks} blocks (num_hidden_layers), and its files hold "
                f"{len(seen)}, {prefix}.{min(seen)} to {prefix}.{max(seen)}"
            )
        seen_text = ", ".join(f"{prefix} ({len(seen)})" for prefix, seen in numbers.items()) or "none"
        raise CheckpointError(
            f"{folder}: cannot tell which tensors form its {blocks} blocks; numbered groups found: {seen_text}"
        )
    return found[0]


def shape_from_folder(folder: Path) -> ModelShape:
    """The shape of a checkpoint of any stage, or of any Hugging Face causal language model folder.

    Raises CheckpointError where the files do not hold what the configuration states.
    """
    config = read_config(folder)
    return shape_of(folder, config, stored_tensors(folder, config))


def shape_of(folder: Path, config: dict[str, Any], stored: Mapping[str, Stored]) -> ModelShape:
    """As `shape_from_folder`, of a folder whose configuration and headers were read already."""
    try:
        return _shape_of(folder, config, stored)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _shape_of(folder: Path, config: dict[str, Any], stored: Mapping[str, Stored]) -> ModelShape:
    form = stated_form(config)
    if form is not None:
        _require_agreement(folder, config["quantization_config"])
    count = int(config["num_hidden_layers"])
    prefix = block_prefix(list(stored), count, folder)
    members: dict[int, dict[str, TensorShape]] = defaultdict(dict)
    outer = []
    for name, place in stored.items():
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name):
            members[int(match[1])][match[2]] = place.tensor
        else:
            outer.append(_float(place.tensor))
    outer = _without_tied_head(folder, config, outer, stored)

    noted = _read_notes(form, {x.name: x.path for x in stored.values()}) if form is not None and form.note else {}
    pattern = _pattern(folder)
    adapters = _adapters(folder, prefix)
    blocks = []
    for i in range(count):
        start = f"{prefix}.{i}."
        coded = {name.removeprefix(start): x for name, x in noted.items() if name.startswith(start)}
        dense = str((config.get(OWN_KEY) or {}).get(DENSE_DTYPE) or "")
        form_at = partial(form.own, config=config["quantization_config"]) if form is not None else None
        blocks.append(_block(members[i], form, coded, pattern, adapters.get(i, {}), dense, form_at, start))
    bits = None
    if (folder / EDGE).is_file():
        rows = next(t for name, t in read_header(folder / EDGE).items() if name.endswith(".codes"))
        bits = rows.shape[1] * 8 // int(config["hidden_size"])
    _require_firsts(folder, config, blocks)
    shape = ModelShape(str(config.get("model_type")), config, tuple(blocks), tuple(outer), prefix, bits)
    if form is not None and shape.grid is None:
        raise CheckpointError(
            f"{folder}: its configuration says that weights are quantised ({form.describe()}), and all of its files' "
            "layers are dense; take quantization_config out of config.json if that is what they should be"
        )
    require_as_stated(shape, folder)
    return shape


def _require_agreement(folder: Path, stated: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the quantiser's own file tells another format than config.json, which is read here.

    transformers writes config.json without the format that GPTQModel keeps in quantize_config.json.
    """
    path = folder / "quantize_config.json"
    if stated.get("quant_method") != "gptq" or not path.is_file():
        return
    try:
        beside = parse_json(read_small(path, CONFIG_BYTES), str(path))
    except CheckpointError:
        return  # nobody needs it
    for name in ("checkpoint_format", "format"):
        own = beside.get(name) if isinstance(beside, dict) else None
        if own and own != "gptq":
            raise CheckpointError(
                f"{path} says {name} '{own}', and config.json does not; save the model again in GPTQ's version 1, "
                "'gptq', or give the checkpoint from before quantisation"
            )


# --- what the files hold against what the configuration states ----------------------------------------------------


def _require_firsts(folder: Path, config: Mapping[str, Any], blocks: Sequence[BlockShape]) -> None:
    """Raise CheckpointError where the blocks that are said to have the same weights cannot have them."""
    own = config.get(OWN_KEY) or {}
    if SAME_BLOCKS not in own:
        return
    firsts = own[SAME_BLOCKS]
    sound = isinstance(firsts, list) and len(firsts) == len(blocks) and all(type(f) is int for f in firsts)
    if not sound or any(not 0 <= f <= i or firsts[f] != f or blocks[f] != blocks[i] for i, f in enumerate(firsts)):
        raise CheckpointError(
            f"{folder / 'config.json'}: {OWN_KEY}.{SAME_BLOCKS} must name, for each of {len(blocks)} blocks, the first "
            "block of its weights"
        )


def require_as_stated(shape: ModelShape, folder: Path) -> None:
    """Raise CheckpointError where a tensor is missing, left over, or of another shape than the configuration states.

    Without torch, so by the table of families; of a family that is not in it, by what all have in common. Whoever
    builds transformers' module compares with that in `checkpoint.py`.
    """
    found = dense_tensors(shape)
    if shape.family in known_families():
        try:
            plain = {k: v for k, v in shape.config.items() if k != "quantization_config"}
            wanted = dense_tensors(shape_from_config(plain))
        except PlanError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        require_same(wanted, found, str(folder))
        return
    rows = shape.config.get("vocab_size")
    tables = [name for name, sides in found.items() if len(sides) == 2 and sides[0] == rows and "." in name]
    outside = [name for name in tables if not name.startswith(f"{shape.block_prefix}.")]
    needed = 1 if shape.config.get("tie_word_embeddings", True) else 2
    if isinstance(rows, int) and rows and len(outside) < needed:
        what = "a head of its own, which an untied configuration asks for," if outside else "an embedding"
        raise CheckpointError(f"{folder}: no file holds {what} with vocab_size = {rows} rows")


def require_same(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError naming the first tensors that are missing, left over, or of another shape."""
    faults = []
    if missing := [name for name in wanted if name not in found]:
        if any(name.startswith("lm_head.") for name in missing):
            faults.append(
                "the configuration says the head is not tied to the embedding, and no file holds lm_head.weight"
            )
            missing = [name for name in missing if not name.startswith("lm_head.")]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            faults.append(f"no file holds {missing[0]}{more}, which the configuration asks for")
    if extra := [name for name in found if name not in wanted]:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        faults.append(f"its files hold {extra[0]}{more}, which the model that it states has not")
    for name, sides in wanted.items():
        if name in found and found[name] != sides:
            faults.append(f"{name} is {_sides(found[name])} in its files and {_sides(sides)} by its configuration")
            break
    if faults:
        raise CheckpointError(f"{where}: " + "; ".join(faults))


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def dense_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Full name -> sides of every tensor, quantised layers as the dense ones that they stand for."""
    found = {t.name: t.shape for t in shape.outer}
    for index, block in enumerate(shape.blocks):
        for x in block.linears:
            base = f"{shape.block_prefix}.{index}.{x.name}"
            found[f"{base}.weight"] = (x.out_features, x.in_features)
            if x.bias:
                found[f"{base}.bias"] = (x.out_features,)
        found |= {f"{shape.block_prefix}.{index}.{t.name}": t.shape for t in block.others}
    return found


def _without_tied_head(
    folder: Path, config: Mapping[str, Any], outer: list[TensorShape], stored: Mapping[str, Stored]
) -> list[TensorShape]:
    """Without the copy of the embedding that some files hold as the head of a model whose head is tied to it.

    Raises CheckpointError where the head is another matrix: the configuration and the files then state two models.
    """
    head = next((t for t in outer if t.name == "lm_head.weight"), None)
    if head is None or not tied(config):
        return outer
    tables = [t for t in outer if len(t.shape) == 2 and t.shape[0] == config.get("vocab_size") and t is not head]
    if not any(same_values(stored[t.name], stored[head.name]) for t in tables):
        raise different_head(folder, head.name)
    return [t for t in outer if t is not head]


def different_head(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the configuration says the head is tied to the embedding, and its files hold another {name}. Set "
        "tie_word_embeddings to false in config.json if that head is meant, or take it out of the files"
    )


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two tensors are the same bytes, compared a part at a time."""
    if (one.tensor.shape, one.tensor.dtype) != (other.tensor.shape, other.tensor.dtype):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        for file, place in ((a, one), (b, other)):
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length + json.loads(file.read(length))[place.name]["data_offsets"][0])
        left = one.tensor.nbytes
        while left > 0:
            size = min(left, 1 << 22)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _float(tensor: TensorShape) -> TensorShape:
    """The tensor, which is one of floating-point numbers that are read here. Raises CheckpointError if it is not."""
    if tensor.dtype in TORCH_NAMES:
        return tensor
    if tensor.dtype == "F64":
        raise CheckpointError(f"{tensor.name} is stored in float64, which is not read; save the model in float32")
    raise CheckpointError(
        f"{tensor.name} is stored as {tensor.dtype} without saying what its codes stand for; give the checkpoint "
        "from before quantisation"
    )


def _block(
    members: dict[str, TensorShape],
    form: Form | None,
    coded: dict[str, Layer],
    pattern: Sparsity | None,
    adapters: dict[str, _Adapter],
    dense_dtype: str,
    form_at: Callable[[str], Form] | None,
    start: str,
) -> BlockShape:
    """coded: layers that a note tells of; dense_dtype: of quantised layers before, where that is said;
    form_at: the form of a layer by its full name, which begins with `start`.

    Raises CheckpointError where a tensor makes no sense.
    """
    if form is None and (names := [name for name in members if name.endswith(".qweight")]):
        raise CheckpointError(
            f"{names[0]} holds packed codes, and config.json says nothing of quantisation; put what "
            "quantize_config.json says there into config.json as quantization_config, with quant_method gptq"
        )
    bases = dict.fromkeys(name.rpartition(".")[0] for name in members)
    told = {
        base: layer for base in bases if form_at is not None and (layer := form_at(start + base).layer(base, members))
    }
    linears, others = [], []
    dense_dtype = dense_dtype or usual_dtype(members.values())
    for name, tensor in members.items():
        base, _, kind = name.rpartition(".")
        adapter = adapters.get(base, _NO_ADAPTER)
        bias = f"{base}.bias" in members
        zeros = pattern if pattern is not None and pattern.covers(base) else None
        layer = coded.get(base) or told.get(base)
        if layer is not None and kind == layer.form.kinds[0]:
            dtype = layer.dtype or dense_dtype
            linears.append(LinearShape(base, layer.rows, layer.columns, dtype, bias, zeros, layer.form, *adapter))
            _require_stored(linears[-1], members)
        elif kind == "weight" and len(tensor.shape) == 2 and not base.endswith("norm"):  # Cohere's has a row a head
            outs, ins = _float(tensor).shape
            linears.append(LinearShape(base, outs, ins, tensor.dtype, bias, zeros, None, *adapter))
        elif not _belongs_to_linear(name, members, form, coded.keys() | told.keys()):
            others.append(_float(replace(tensor, name=name)))
    biases = {x.name: members[f"{x.name}.bias"].dtype for x in linears if x.bias}
    own = tuple(replace(x, bias_dtype=biases[x.name]) if biases.get(x.name, x.dtype) != x.dtype else x for x in linears)
    return BlockShape(own, tuple(others))


def usual_dtype(dense: Iterable[TensorShape]) -> str:
    """The precision that quantised layers are taken to have had: that of most tensors beside them, float16 last.

    GPTQ's scales are in float16 whatever the model was.
    """
    dtypes = Counter(t.dtype for t in dense if t.dtype in TORCH_NAMES)
    return next((d for d, _ in dtypes.most_common() if d != "F16"), "F16")


def _require_stored(linear: LinearShape, members: dict[str, TensorShape]) -> None:
    """Raise CheckpointError where a quantised layer lacks a tensor, or one is not of the shape that its form has."""
    for wanted in linear.stored():
        found = members.get(wanted.name)
        if found is None:
            raise CheckpointError(
                f"a layer stored as {linear.grid.describe() if linear.grid else ''} lacks {wanted.name}"
            )
        note = linear.grid.note if linear.grid else ""
        if (note and note in wanted.name) or wanted.name.endswith(".bias"):
            continue  # a note may be of any length, and a bias of any precision
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise CheckpointError(
                f"{wanted.name} is {found.dtype} {list(found.shape)}, where {wanted.dtype} {list(wanted.shape)} is "
                "wanted; save the model again, bitsandbytes' with bnb_4bit_quant_storage uint8"
            )


def _belongs_to_linear(name: str, members: dict[str, TensorShape], form: Form | None, coded: Set[str]) -> bool:
    """Whether a tensor is a linear layer's bias, or lies beside its codes; coded: names of the quantised layers."""
    base, _, kind = name.rpartition(".")
    if base in coded or name.partition(".weight.")[0] in coded or (form is not None and kind in form.kinds[1:]):
        return True
    weight = members.get(f"{base}.weight")
    return kind == "bias" and weight is not None and len(weight.shape) == 2


def _read_notes(form: Form, files: dict[str, Path]) -> dict[str, Layer]:
    """The layers whose form lies in a note of a few hundred bytes beside their codes, by name.

    Nothing else of the files is read.
    """
    noted: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        if f".{form.note}" in name:
            noted[path].append(name)
    found = {}
    for path, names in noted.items():
        for name, data in _read_bytes(path, names).items():
            try:
                found[name.partition(f".{form.note}")[0]] = form.noted(data)
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
    """What lies beside each block's linear layers, by block and name.

    Raises CheckpointError for an adapter beside the weights that transformers would load, and that is not read here.
    """
    found: dict[int, dict[str, _Adapter]] = defaultdict(dict)
    path, packed = adapter_path(folder), (folder / ADAPTER_PACKED).is_file()
    if not path.is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER}, the only form in which an adapter is read; save it so, "
            f"or take {ADAPTER_CONFIG} away if the model is meant without it"
        )
    kinds = r"lora_A\.weight|lora_magnitude_vector|ia3_l"
    for name, tensor in (read_header(path) if path.is_file() else {}).items():
        if not name.startswith(f"base_model.model.{prefix}."):
            raise CheckpointError(
                f"{path} holds {name}, an adapter of something else than the blocks' layers, which is not read; merge "
                "it into the weights first"
            )
        if match := re.fullmatch(rf"base_model\.model\.{re.escape(prefix)}\.(\d+)\.(.+)\.({kinds})", name):
            index, base, kind = int(match[1]), match[2], match[3]
            rank, dtype, _, vector = found[index].get(base, _NO_ADAPTER)
            if kind == "lora_A.weight":
                rank, dtype = tensor.shape[0], tensor.dtype
            else:
                vector = "magnitude" if kind != "ia3_l" else "rows" if tensor.shape[1] == 1 else "columns"
            found[index][base] = (rank, dtype, packed, vector)
    return found
