"""Read and write llama2.c's files: the legacy `.bin` model (export version 0) and its tokenizer `.bin`.

Format: https://github.com/karpathy/llama2.c, `export.py:legacy_export` and `tokenizer.py:Tokenizer.export`.
All numbers are little-endian. A model does not name its tokenizer, so `find_tokenizer` looks beside it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from edgepress.checkpoints.errors import CheckpointError

_HEADER = struct.Struct("<7i")
VERSIONED_MAGIC = 0x616B3432  # "ak42": the first word of export versions 1 and 2
_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, whatever the file calls them ("\n<s>\n" for 1)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # ids 3..258: run.c computes byte + 3


@dataclass(frozen=True)
class _Header:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int
    tied: bool

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every stored tensor in file order: name inside its place, and shape with layers first."""
        kv_dim = self.dim // self.heads * self.kv_heads
        rotary = (self.length, self.dim // self.heads // 2)
        stored: list[tuple[str, tuple[int, ...]]] = [
            ("model.embed_tokens", (self.vocabulary, self.dim)),
            ("input_layernorm", (self.layers, self.dim)),
            ("self_attn.q_proj", (self.layers, self.dim, self.dim)),
            ("self_attn.k_proj", (self.layers, kv_dim, self.dim)),
            ("self_attn.v_proj", (self.layers, kv_dim, self.dim)),
            ("self_attn.o_proj", (self.layers, self.dim, self.dim)),
            ("post_attention_layernorm", (self.layers, self.dim)),
            ("mlp.gate_proj", (self.layers, self.hidden, self.dim)),
            ("mlp.down_proj", (self.layers, self.dim, self.hidden)),
            ("mlp.up_proj", (self.layers, self.hidden, self.dim)),
            ("model.norm", (self.dim,)),
            ("freq_cis_real", rotary),
            ("freq_cis_imag", rotary),
        ]
        return stored if self.tied else [*stored, ("lm_head", (self.vocabulary, self.dim))]


def read_model(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration and the float32 tensors of a llama2.c model, under Hugging Face's names.

    The tensors are private views of the mapped file, read when touched; only q_proj and k_proj are copies,
    because their rows are reordered. A tied model has no `lm_head.weight`.
    """
    header = _read_header(path)
    flat = torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    start = _HEADER.size // 4
    for name, shape in header.tensors():
        stop = start + math.prod(shape)
        stored, start = flat[start:stop].view(shape), stop
        if name.startswith("freq_cis"):
            continue  # cos and sin of theta 10000, which transformers computes itself
        if name.startswith(("model.", "lm_head")):
            tensors[f"{name}.weight"] = stored
            continue
        for layer, weight in enumerate(stored):
            if name == "self_attn.q_proj":
                weight = _pairs_to_halves(weight, header.heads)
            elif name == "self_attn.k_proj":
                weight = _pairs_to_halves(weight, header.kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=header.vocabulary,
        hidden_size=header.dim,
        intermediate_size=header.hidden,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    return config, tensors


def _pairs_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of wq or wk (heads * head_dim, dim) from llama2.c's rotary layout to Hugging Face's.

    llama2.c rotates the rows (2i, 2i + 1) of a head together, Hugging Face the rows (i, i + head_dim / 2).
    """
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse: the rows in llama2.c's order, and in that of llama.cpp's llama."""
    rows, dim = weight.shape
    return weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)


def _read_header(path: Path) -> _Header:
    """The header, once it is plausible and the file is exactly as long as it says."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        found = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read the llama2.c model {path}: {error.strerror}") from error
    if len(head) < _HEADER.size:
        raise CheckpointError(
            f"{path} is not a llama2.c model: expected a header of {_HEADER.size} bytes, found {found} bytes"
        )
    dim, hidden, layers, heads, kv_heads, vocabulary, length = _HEADER.unpack(head)
    if dim == VERSIONED_MAGIC:
        raise CheckpointError(
            f"{path} is a llama2.c export of version {hidden}; only the legacy format is read here. "
            "Export it again with llama2.c's `export.py --version 0`."
        )
    header = _Header(dim, hidden, layers, heads, kv_heads, abs(vocabulary), length, tied=vocabulary > 0)
    said = (
        f"dim {dim}, hidden {hidden}, layers {layers}, heads {heads}, kv_heads {kv_heads}, "
        f"vocab {vocabulary}, seq {length}"
    )
    positive = min(dim, hidden, layers, heads, kv_heads, header.vocabulary, length) > 0
    if not positive or dim % heads or heads % kv_heads or dim // heads % 2:
        raise CheckpointError(
            f"{path} is not a llama2.c model: its header says {said}. Expected whole positive sizes, heads that "
            f"divide dim into an even width, kv_heads that divide heads; found {found} bytes in all."
        )
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in header.tensors())
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged or not a llama2.c model: its header ({said}) calls for {expected} bytes, "
            f"found {found} bytes. Copy or download it again."
        )
    return header


def find_tokenizer(model_path: Path) -> Path:
    """The tokenizer beside a model: `tok{vocab}.bin`, else `tokenizer.bin` (llama2.c's own default)."""
    names = (f"tok{_read_header(model_path).vocabulary}.bin", "tokenizer.bin")
    for name in names:
        if (path := model_path.parent / name).is_file():
            return path
    raise CheckpointError(
        f"no tokenizer for {model_path.name}: looked for {' and '.join(names)} in {model_path.parent.absolute()}. "
        "Put llama2.c's tokenizer there under one of these names."
    )


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that encodes as llama2.c's `encode` does with bos, and decodes as its `decode` does.

    run.c joins, again and again, the neighbours whose union has the best score. That is BPE with, as merges,
    every split of a piece into two others, ordered by the piece's score. Two splits of one piece rank one after
    the other here, while run.c takes the leftmost: the same but where both overlap, which no text tried has met.
    Spaces stay spaces in the vocabulary, so that U+2581 in a text is not taken for one. `<unk>`, `<s>` and
    `</s>` inside a text are the special tokens, as everywhere in transformers; to run.c they are characters.
    """
    pieces, scores = _read_pieces(path, vocabulary)
    ids = {piece: index for index, piece in enumerate(pieces)}
    ordinary = range(len(_SPECIAL), len(pieces))
    merges = [
        (pieces[index][:cut], pieces[index][cut:])
        for index in sorted(ordinary, key=lambda index: -scores[index])
        for cut in range(1, len(pieces[index]))
        if ids.get(pieces[index][:cut], 0) in ordinary and ids.get(pieces[index][cut:], 0) in ordinary
    ]
    unknown, bos, eos = _SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")  # run.c's dummy prefix; an empty text stays empty
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),  # bos skipped: the text starts with the dummy prefix
            decoders.Replace(Regex(f"^{bos} "), bos),  # bos kept
        ]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in _SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def _read_pieces(path: Path, vocabulary: int) -> tuple[list[str], list[float]]:
    """The pieces in id order, special ones under their Hugging Face names, and their scores."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the llama2.c tokenizer {path}: {error.strerror}") from error
    pieces: list[str] = []
    scores: list[float] = []
    start = 4  # the longest piece's length, which only run.c's buffers need
    for index in range(vocabulary):
        score, size = struct.unpack_from("<fi", raw, start) if start + 8 <= len(raw) else (0.0, 0)
        stop = start + 8 + size
        if size < 0 or stop > len(raw):
            raise CheckpointError(
                f"{path} is damaged or not a tokenizer of {vocabulary} pieces: piece {index} should end at byte "
                f"{stop}, the file has {len(raw)} bytes"
            )
        try:
            piece = raw[start + 8 : stop].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not a llama2.c tokenizer: piece {index} is not UTF-8") from error
        if not math.isfinite(score):
            raise CheckpointError(f"{path} is not a llama2.c tokenizer: the score of piece {index} is {score}")
        pieces.append(piece)
        scores.append(score)
        start = stop
    if start != len(raw):
        raise CheckpointError(
            f"{path} is not a tokenizer of {vocabulary} pieces: they end at byte {start}, the file has {len(raw)} "
            "bytes. The model's header and the tokenizer must agree on the vocabulary."
        )
    pieces[: len(_SPECIAL)] = _SPECIAL
    first = len(_SPECIAL)
    if pieces[first : first + 256] != list(_BYTES):
        raise CheckpointError(
            f"{path} is not a llama2.c tokenizer: pieces {first} to {first + 255} should be {_BYTES[0]} to {_BYTES[-1]}"
        )
    if len(set(pieces)) != len(pieces):
        twice = next(piece for index, piece in enumerate(pieces) if piece in pieces[:index])
        raise CheckpointError(f"{path} is not a llama2.c tokenizer: the piece {twice!r} occurs twice")
    return pieces, scores
