"""Write a checkpoint as a program for a chip's plain RV32 cores, and run it there in simulation."""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.config import rotary_width
from edgepress.checkpoints.errors import CheckpointError, NumericsError, PlanError, TextError, require_unicode
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.manifest import folders_above, write_bytes
from edgepress.checkpoints.packing import dequantise_rows, group_of, unpack
from edgepress.checkpoints.quiet import readable
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.eval.perplexity import Protocol, token_windows
from edgepress.eval.text import Text
from edgepress.hardware.rv32.cost import code_bytes
from edgepress.hardware.rv32.families import (
    Layer,
    Numbers,
    Rope,
    family_of,
    halves_first,
    layers,
    norms,
    numbers_of,
    rope_kinds,
)
from edgepress.hardware.rv32.layout import (
    FINAL_NORM,
    Layout,
    code_form,
    form_facts,
    form_notes,
    is_ordered,
    matrices,
    require_runnable,
    shared,
)
from edgepress.hardware.rv32.memory import LINEAR_BYTES, Use, linker_script, memory_use, table_bytes
from edgepress.hardware.rv32.native import Native
from edgepress.hardware.rv32.predict import Prediction, predict, require_activations, require_kv_bits
from edgepress.hardware.rv32.project import Run, makefile, model_header, model_source, sources
from edgepress.hardware.rv32.rows import encode, encode_numbers
from edgepress.hardware.soc import Soc
from edgepress.pipeline.store import checkpoint_folder

PROMPT = "Once upon a time"
_PIECE = 6  # bytes of a token's text where there is no tokenizer to tell
NATIVE = f"the same C compiled for {platform.machine()}"
FLOAT_TOKENS = "float32.txt"  # of a program with rounded inputs: Python's tokens without any rounding
WINDOW, MEASURED_ON = 512, 4096  # tokens
_OURS = "memory.json"  # a folder that has it was written here, and may be written anew


@dataclass(frozen=True)
class Quality:
    """Perplexity of a program on a text, with the inputs of its linear layers in float32 and in int8."""

    in_float: float
    in_int8: float
    windows: int
    window: int  # tokens
    text: str

    def __str__(self) -> str:
        where = f"{self.text}, {self.windows} windows of {self.window} tokens"
        more = f"{self.in_int8 / self.in_float - 1:+.2%}"
        return f"perplexity {self.in_int8:.4g} with activations in int8, {self.in_float:.4g} in float: {more} ({where})"


@dataclass(frozen=True)
class Export:
    """A program that can be made of a checkpoint, and what it asks of each memory."""

    checkpoint: Checkpoint
    soc: Soc
    run: Run
    numbers: Numbers
    pieces: list[bytes]  # the tokens' texts
    layout: Layout
    uses: tuple[Use, Use, Use]

    @property
    def shape(self) -> ModelShape:
        """The checkpoint's."""
        return self.checkpoint.shape

    @property
    def notes(self) -> list[str]:
        """What became of the zeros of N:M patterns."""
        return form_notes(self.shape)

    @torch.no_grad()
    def write(self, folder: Path, text: Text | None = None) -> Quality | None:
        """Write the program's files; nothing where the weights hold what the program cannot run (CheckpointError).

        text: what rounding to int8 costs is measured on; it has to have a window of tokens (TextError).
        """
        shape, layout, run = self.shape, self.layout, self.run
        windows = None if text is None else self._windows(text)
        model = exact_model(self.checkpoint)  # first: it says in words where the files do not make a model
        with readable(f"transformers cannot run {self.checkpoint.folder}"):
            expected = _greedy(model, run)
        weights = layout.joined(program_contents(self.checkpoint, self.pieces))
        ropes = _ropes(model, shape)
        facts = {
            "soc": self.soc.label,
            "memories": [use.to_dict() for use in self.uses],
            # By which the simulator names a layer.
            "linears": {"roles": [layer.role for layer in layers(shape, shape.blocks[0])], "bytes": LINEAR_BYTES},
            "zeros": form_facts(shape),
        }
        files = {
            **sources(),
            "weights.bin": weights,
            "model.h": model_header(shape, layout, run, self.numbers, ropes).encode(),
            "model.c": model_source(shape, layout, run, ropes).encode(),
            "link.ld": linker_script(self.uses, self.soc.label).encode(),
            "Makefile": makefile().encode(),
        }
        quality = None
        if run.activations == "int8":
            in_float = model_header(shape, layout, replace(run, activations="float"), self.numbers, ropes).encode()
            with tempfile.TemporaryDirectory(prefix="edgepress-native-") as made:
                native = _native(Path(made), files)
                files[FLOAT_TOKENS] = _words(expected)
                expected = native.continued(run.prompt, run.new_tokens, run.ends)
                if text is not None and windows is not None:
                    floats = _native(Path(made), files | {"model.h": in_float})
                    quality = Quality(
                        self._perplexity(floats, windows), self._perplexity(native, windows),
                        len(windows), len(windows[0]), text.name,
                    )  # fmt: skip
            facts["expected"] = NATIVE
        files |= {"expected.txt": _words(expected), _OURS: json.dumps(facts, indent=2).encode() + b"\n"}
        write_files(folder, files)
        return quality

    def _windows(self, text: Text) -> list[list[int]]:
        size, tokenizer = min(self.run.context, WINDOW), self.checkpoint.tokenizer()
        try:
            windows = token_windows(text, tokenizer, Protocol("windows", size, max(size, MEASURED_ON)))
        except TextError:  # a shorter text
            windows = token_windows(text, tokenizer, Protocol("windows", size, 0))
        return [[int(token) for token in row] for row in windows]

    def _perplexity(self, native: Native, windows: list[list[int]]) -> float:
        numbers = self.numbers
        nats = sum(native.losses(window, numbers.logit_factor, numbers.logit_cap) for window in windows)
        return math.exp(nats / sum(len(window) - 1 for window in windows))


def write_files(folder: Path, files: Mapping[str, bytes], mark: str = _OURS) -> None:
    """Write a folder's files, what marks it as ours last; where that is interrupted, no new folder is left."""
    undo = (lambda: None) if folder.exists() else partial(shutil.rmtree, folder, ignore_errors=True)
    with folders_above(folder), interrupts.or_undone(undo):
        folder.mkdir(exist_ok=True)
        for name in sorted(files, key=lambda name: name == mark):
            write_bytes(folder / name, files[name])


def _native(folder: Path, files: Mapping[str, bytes]) -> Native:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Native(folder)


def _words(tokens: Sequence[int]) -> bytes:
    return " ".join(map(str, tokens)).encode() + b"\n"


def require_room_for(folder: Path) -> None:
    """Raise PlanError where other things than an earlier export lie in the folder."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _OURS).is_file()):
        raise PlanError(f"{folder} is there and holds no exported program; name another folder with -o")


def plan_export(
    checkpoint: Checkpoint, soc: Soc, prompt: str, new_tokens: int, context: int, kv_bits: int = 32,
    activations: str = "float",
) -> Export:  # fmt: skip
    """The program that continues `prompt` greedily by at most `new_tokens` tokens. No weights are read.

    Raises PlanError for what the program or the chip cannot do, CheckpointError without a tokenizer.
    """
    shape = checkpoint.shape
    require_kv_bits(kv_bits)
    require_runnable(shape, context)
    numbers = numbers_of(shape, checkpoint.hf_config().to_dict(), context)
    require_activations(shape, activations)
    run = plan_run(checkpoint, prompt, new_tokens, context, kv_bits, activations)
    pieces = token_pieces(checkpoint.folder, shape.vocabulary)
    layout = Layout(shape, sum(map(len, pieces)))
    tables = table_bytes(shape, len(run.prompt), len(run.ends), context)
    uses = memory_use(shape, soc, layout.nbytes, tables, context, kv_bits, code_bytes(shape, run), activations)
    return Export(checkpoint, soc, run, numbers, pieces, layout, uses)


def plan_run(
    checkpoint: Checkpoint, prompt: str, new_tokens: int | None, context: int, kv_bits: int, activations: str = "float"
) -> Run:
    """The prompt in tokens, and what ends the text. new_tokens: None for as many as the context holds."""
    shape, tokenizer = checkpoint.shape, checkpoint.tokenizer()
    require_unicode(prompt, "the prompt", PlanError)
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    new_tokens = context - len(ids) if new_tokens is None else new_tokens
    if not ids:
        raise PlanError("the prompt gives no token to begin with: write a word")
    if max(ids) >= shape.vocabulary:
        raise PlanError(f"the prompt has the token {max(ids)}, and the model's vocabulary ends at {shape.vocabulary}")
    if new_tokens < 1 or len(ids) + new_tokens > context:
        raise PlanError(
            f"a prompt of {len(ids)} tokens and {new_tokens} new ones: at least one must be new, and all must go into "
            f"the context of {context}; change --tokens or --context"
        )
    return Run(ids, new_tokens, ends_of(checkpoint, tokenizer), context, kv_bits, activations)


def predict_program(
    source: str, shape: ModelShape, soc: Soc, context: int, kv_bits: int, activations: str, name: str
) -> Prediction:
    """What the program of a model asks of a chip, told before anything is written.

    source: what the shape was read from. Of a folder with a tokenizer the bytes are exactly an export's with its own
    prompt; of a shape alone the tokens' texts are assumed.
    """
    folder = checkpoint_folder(source) if source and Path(source).expanduser().is_dir() else None
    if folder and (folder / "tokenizer.json").is_file():
        run = plan_run(Checkpoint.open(folder), PROMPT, None, context, kv_bits, activations)
        pieces = sum(map(len, token_pieces(folder, shape.vocabulary)))
        return predict(shape, soc, run, pieces, name)
    run = Run(range(5), max(1, context - 5), [2], context, kv_bits, activations)
    note = f"Assumed, as there is no tokenizer.json: {_PIECE} bytes of text a token, a prompt of 5 tokens."
    return predict(shape, soc, run, _PIECE * shape.vocabulary, name, (note,))


def _ropes(model: Any, shape: ModelShape) -> list[Rope]:
    turned = model.base_model.rotary_emb
    names = [f"{kind}_" if kind else "" for kind in rope_kinds(shape)]
    found = [
        Rope(getattr(turned, f"{name}inv_freq").tolist(), float(getattr(turned, f"{name}attention_scaling")))
        for name in names
    ]
    if any(2 * len(rope.frequencies) != rotary_width(shape.config) for rope in found):
        raise RuntimeError(f"angles for other channels than the {rotary_width(shape.config)} planned")
    return found


def ends_of(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the tokenizer and both of the checkpoint's configurations."""
    found = [tokenizer.eos_token_id, checkpoint.config.get("eos_token_id")]
    path = checkpoint.folder / "generation_config.json"
    if path.is_file():
        found.append(json.loads(path.read_text()).get("eos_token_id"))
    return sorted({int(t) for item in found for t in (item if isinstance(item, list) else [item]) if t is not None})


# --- the parts of weights.bin -----------------------------------------------------------------------------------------


def program_contents(checkpoint: Checkpoint, pieces: list[bytes]) -> dict[str, bytes]:
    """The parts of weights.bin by name. Raises CheckpointError for weights that the program cannot read."""
    shape, outer = checkpoint.shape, checkpoint.outer()
    found: dict[str, bytes] = {FINAL_NORM: _norm(shape, outer[f"{FINAL_NORM}.weight"])}
    edge = checkpoint.edge()
    _require_finite(checkpoint.folder.name, {**outer, **edge})
    for name in matrices(shape):
        kinds = ("codes", "scales", "minimum") if edge else ()
        found |= {f"{name}.{kind}": _raw(edge[f"{name}.{kind}"]) for kind in kinds}
        if not edge:
            found[f"{name}.codes"] = _raw(outer[f"{name}.weight"])
    for index, block in enumerate(shape.blocks):
        stored = checkpoint.stored_block(index)
        adapter, codes = checkpoint.adapter_part(index), checkpoint.adapter_codes_part(index)
        for kind, norm in norms(shape, block).items():
            found[f"{index}.{kind}"] = _norm(shape, stored[norm.name], of_heads=kind in ("Q_NORM", "K_NORM"))
        for layer in layers(shape, block):
            x, where = layer.source, f"{checkpoint.folder.name}: block {index}: {layer.source.name}"
            order = _order(x, stored, where) if is_ordered(shape, x) else None
            parts = _base(x, stored, order, where)
            if x.adapter_rank:
                parts |= _adapter(x, adapter, codes, checkpoint.adapter_scale)
            _require_finite(where, parts)
            if order is not None:
                parts |= {"order": order.to(torch.uint16)} | ({"a": parts["a"][:, order]} if x.adapter_rank else {})
            found |= {f"{index}.{layer.name}.{kind}": data for kind, data in _own(shape, layer, parts, where).items()}
    starts = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0).to(torch.int32)
    return found | {"piece_starts": _raw(starts), "pieces": b"".join(pieces)}


def _norm(shape: ModelShape, weight: Tensor, of_heads: bool = False) -> bytes:
    family, weight = family_of(shape), weight.float()
    if of_heads and family.neighbours:
        weight = weight.flatten()[halves_first(shape, weight.numel())]
    return _raw(1.0 + weight if family.one_more else weight)


def _require_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericsError for a part with a number that is none: the program reads its bits as another one's."""
    for kind, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{name}: its {kind} have values that are not finite, which the program cannot run")


def _own(shape: ModelShape, layer: Layer, parts: Mapping[str, Tensor], where: str) -> dict[str, bytes]:
    """Of a linear layer's parts those of a program's layer, with its rows alone in its order."""
    own = {kind: tensor for kind, tensor in parts.items() if kind not in shared(layer)}
    if layer.rows is not None:
        rows = torch.tensor(layer.rows)
        own = {kind: x if kind in ("a", "rank_scales", "order") else x[rows] for kind, x in own.items()}
    found, form = {}, code_form(shape, layer.shape)
    try:
        if isinstance(layer.shape.grid, Grid):
            codes, scales, zeros = (own.pop(kind, None) for kind in ("codes", "scales", "zeros"))
            assert codes is not None and scales is not None
            found["codes"] = encode(form, codes.numpy(), scales.numpy(), None if zeros is None else zeros.numpy())
        elif form.of:
            bits = own.pop("codes").contiguous().view(torch.int32 if form.bits == 32 else torch.int16)
            found["codes"] = encode_numbers(form, bits.numpy().view(f"<u{form.bits // 8}"))
    except ValueError as error:
        raise CheckpointError(f"{where} is said to hold {layer.shape.pattern}, but has {error}") from None
    return found | {kind: _raw(tensor) for kind, tensor in own.items()}


def _order(x: LinearShape, stored: Mapping[str, Tensor], where: str) -> Tensor:
    """The layer's inputs (in,) group by group, those of a group as they were."""
    groups = stored[f"{x.name}.g_idx"]
    order = groups.argsort(stable=True)
    if x.grid is None or not groups[order].equal(group_of(x.in_features, x.grid.group)):
        raise CheckpointError(f"{where} has groups of unlike sizes (g_idx), which the program cannot run")
    return order


def _base(x: LinearShape, stored: Mapping[str, Tensor], order: Tensor | None, where: str) -> dict[str, Tensor]:
    """The layer without its adapter; codes (out, in) of a grid one a byte, its columns in this order."""
    parts: dict[str, Tensor] = {}
    if isinstance(x.grid, Grid):
        groups = stored[f"{x.name}.g_idx"]
        codes = unpack(stored[f"{x.name}.qweight"], x.grid.bits, x.in_features).to(torch.uint8)
        if order is not None:
            codes = codes[order]
        elif not groups.equal(group_of(x.in_features, x.grid.group)):
            raise CheckpointError(f"{where} has groups out of storage order, though config.json says desc_act is false")
        zeros = unpack(stored[f"{x.name}.qzeros"].T.contiguous(), x.grid.bits, x.out_features)
        parts |= {"codes": codes.T, "scales": stored[f"{x.name}.scales"].T}
        if not x.grid.symmetric:
            parts["zeros"] = zeros.to(torch.uint8)
        elif bool((zeros != 2 ** (x.grid.bits - 1) - 1).any()):
            raise CheckpointError(
                f"{where} is said to have a symmetric grid, but has other zero points than the middle"
            )
    else:
        parts["codes"] = stored[f"{x.name}.weight"]
    if x.bias:
        parts["bias"] = stored[f"{x.name}.bias"].float()
    return parts


def _adapter(
    x: LinearShape, adapter: Mapping[str, Tensor], codes: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """A (rank, in), B (out, rank), and what each of the rank numbers between them is multiplied by, float32."""
    scales = torch.full((x.adapter_rank,), scale)
    if not x.adapter_packed:
        return {"a": adapter[f"{x.name}.lora_A.weight"], "b": adapter[f"{x.name}.lora_B.weight"], "rank_scales": scales}
    a, b = (codes[f"{x.name}.{side}.scales"].flatten() for side in ("lora_A", "lora_B"))
    return {"a": codes[f"{x.name}.lora_A.codes"], "b": codes[f"{x.name}.lora_B.codes"], "rank_scales": scales * a * b}


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


# --- what the program is compared with --------------------------------------------------------------------------------


def exact_model(checkpoint: Checkpoint) -> Any:
    """transformers' model in float32 with exactly the numbers that the codes stand for.

    `Checkpoint.block` rounds them to the precision that the weights had before, as other libraries do; the chip does
    not.
    """
    model: Any = checkpoint.model(dtype=torch.float32)
    for index, block in enumerate(checkpoint.shape.blocks):
        adapter, packed = checkpoint.adapter_part(index), checkpoint.adapter_codes_part(index)
        for x in block.linears:
            if x.grid is None and not x.adapter_rank:
                continue
            weight = checkpoint.base_weight(index, x).float()
            if x.adapter_rank:
                own = _adapter(x, adapter, packed, checkpoint.adapter_scale)
                weight = weight + own["b"].float() * own["rank_scales"] @ own["a"].float()
            name = f"{checkpoint.shape.block_prefix}.{index}.{x.name}"
            model.get_submodule(name).weight.data.copy_(weight)
    edge, bits = checkpoint.edge(), checkpoint.shape.embedding_bits
    for name in matrices(checkpoint.shape) if bits else ():
        codes, scales, minimum = (edge[f"{name}.{kind}"] for kind in ("codes", "scales", "minimum"))
        rows = dequantise_rows(codes, scales, minimum, bits or 8)
        model.get_submodule(name).weight.data.copy_(rows)
    return model


class RoundedCache(DynamicCache):
    """A KV cache that rounds as the program does: to codes of -127 to 127 and a scale for each token and head.

    The scale is the largest magnitude / 127, rounded up to bfloat16, whose range is float32's: at most 1/128 more, at
    half the bytes.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(_rounded(key_states), _rounded(value_states), *args, **kwargs)


def _rounded(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, head_dim), float32, as an 8-bit cache gives it back."""
    least = x.abs().amax(-1, keepdim=True) / 127
    scale = ((least.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    codes = torch.where(scale < 2.0**-100, 0, x * (1 / scale) + torch.where(x < 0, -0.5, 0.5)).trunc()
    return codes * scale


def _greedy(model: Any, run: Run) -> list[int]:
    """The prompt and the likeliest tokens after it, the one that ends the text included."""
    tokens = list(run.prompt)
    cache = RoundedCache(config=model.config) if run.kv_bits == 8 else DynamicCache(config=model.config)
    fed = torch.tensor([tokens])
    for _ in range(run.new_tokens):
        logits = model(fed, past_key_values=cache, use_cache=True).logits[0, -1]
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError(f"after the token {tokens[-1]} of its text the model's logits are not finite")
        token = int(logits.argmax())
        tokens.append(token)
        if token in run.ends:
            break
        fed = torch.tensor([[token]])
    return tokens


# --- the tokens' texts ------------------------------------------------------------------------------------------------


def token_pieces(folder: Path, vocabulary: int) -> list[bytes]:
    """The bytes that each token adds to a text; none for special tokens and for ids without a token.

    From tokenizer.json: pieces of bytes written as characters (GPT-2's), or as text with SentencePiece's space and
    byte tokens. Raises CheckpointError where there is no such file.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, from which the texts of the tokens are read")
    definition = json.loads(path.read_text(encoding="utf-8"))
    listed = definition["model"]["vocab"]
    pairs = listed.items() if isinstance(listed, dict) else ((entry[0], k) for k, entry in enumerate(listed))
    in_bytes = '"ByteLevel"' in json.dumps([definition.get("decoder"), definition.get("pre_tokenizer")])
    pieces = [b""] * vocabulary
    for piece, token in pairs:
        if token < vocabulary:
            pieces[token] = _from_characters(piece) if in_bytes else _from_text(piece)
    for added in definition.get("added_tokens", ()):
        if added["id"] < vocabulary:
            pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    return pieces


def _from_text(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _from_characters(piece: str) -> bytes:
    return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in piece)


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones of Latin-1 stand for themselves, the others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_characters()
