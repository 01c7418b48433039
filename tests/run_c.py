"""llama2.c's run.c once more, in plain Python and torch: what the reader of its files is held against."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

# The order of the file, as in run.c:memory_map_weights.
ORDER = (
    *("embedding", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3"),
    *("rms_final", "freq_real", "freq_imag"),
)


def sizes(head: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    dim, hidden, layers, heads, kv_heads, vocabulary, length = head
    width = dim // heads
    return {
        "embedding": (abs(vocabulary), dim),
        "rms_att": (layers, dim),
        "wq": (layers, heads * width, dim),
        "wk": (layers, kv_heads * width, dim),
        "wv": (layers, kv_heads * width, dim),
        "wo": (layers, dim, heads * width),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_real": (length, width // 2),
        "freq_imag": (length, width // 2),
        "head": (abs(vocabulary), dim),
    }


def forward(head: tuple[int, ...], w: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """run.c:forward for every token in turn, neighbouring pairs rotated by the file's own tables: (tokens, vocab)."""
    dim, _, layers, heads, kv_heads, _, _ = head
    width = dim // heads
    keys: list[list[Tensor]] = [[] for _ in range(layers)]
    values: list[list[Tensor]] = [[] for _ in range(layers)]
    logits = []

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x / torch.sqrt((x * x).mean() + 1e-5))

    def rotate(x: Tensor, position: int) -> Tensor:
        real, imaginary = w["freq_real"][position], w["freq_imag"][position]
        out = torch.empty_like(x)  # (heads, width)
        out[:, 0::2] = x[:, 0::2] * real - x[:, 1::2] * imaginary
        out[:, 1::2] = x[:, 0::2] * imaginary + x[:, 1::2] * real
        return out

    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for i in range(layers):
            xb = norm(x, w["rms_att"][i])
            q = rotate((w["wq"][i] @ xb).view(heads, width), position)
            keys[i].append(rotate((w["wk"][i] @ xb).view(kv_heads, width), position))
            values[i].append((w["wv"][i] @ xb).view(kv_heads, width))
            k, v = torch.stack(keys[i]), torch.stack(values[i])  # (position + 1, kv_heads, width)
            seen = []
            for h in range(heads):
                group = h // (heads // kv_heads)
                attention = torch.softmax(k[:, group] @ q[h] / width**0.5, dim=0)
                seen.append(attention @ v[:, group])
            x = x + w["wo"][i] @ torch.cat(seen)
            xb = norm(x, w["rms_ffn"][i])
            gate = w["w1"][i] @ xb
            x = x + w["w2"][i] @ (gate * torch.sigmoid(gate) * (w["w3"][i] @ xb))
        logits.append(w.get("head", w["embedding"]) @ norm(x, w["rms_final"]))
    return torch.stack(logits)


def encode(pieces: list[bytes], scores: list[float], text: str) -> list[int]:
    """run.c:encode with bos: dummy prefix, an id a character or byte + 3, then the best union, leftmost first."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokens = [ids[b" "]] if text else []
    for character in text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best, best_id, best_at = -1e10, -1, -1
        for at in range(len(tokens) - 1):
            union = ids.get(pieces[tokens[at]] + pieces[tokens[at + 1]], -1)
            if union != -1 and scores[union] > best:
                best, best_id, best_at = scores[union], union, at
        if best_at == -1:
            return [1, *tokens]
        tokens[best_at : best_at + 2] = [best_id]


def read_pieces(path: Path) -> tuple[list[bytes], list[float]]:
    raw, at = path.read_bytes(), 4
    pieces, scores = [], []
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    return pieces, scores
