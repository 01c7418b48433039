"""A finished model folder: opened lazily, read one block at a time as dense effective weights."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from edgepress.checkpoints.adapters import adapter_scale, applied
from edgepress.checkpoints.config import read_config
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.headers import (
    ADAPTER,
    ADAPTER_PACKED,
    EDGE,
    different_head,
    same_values,
    shape_of,
    stored_tensors,
    weight_files,
)
from edgepress.checkpoints.manifest import (
    MANIFEST,
    WORK,
    Manifest,
    check_files,
    require_finished,
    require_inside,
    sha256_file,
)
from edgepress.checkpoints.nm import require_finite
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.quiet import readable
from edgepress.checkpoints.reshape import with_pattern
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.checkpoints.sparsity import Sparsity
from edgepress.checkpoints.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A model folder of any stage, or any Hugging Face causal language model stored as safetensors.

    Reading a block costs that block's bytes and no more; nothing is unpickled and no remote code runs.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = read_config(folder)
        self._stored = stored_tensors(folder, self.config)
        self.shape: ModelShape = shape_of(folder, self.config, self._stored)

    @classmethod
    def open(cls, folder: Path, hashes: bool = False) -> Checkpoint:
        """Open after the cheap checks: manifest readable, every file there with its size, headers sound.

        hashes: compare every file's sha256 as well. Raises CheckpointError naming what is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
        require_finished(folder)
        if manifest is not None:
            check_files(folder, manifest, hashes)
        return cls(folder, manifest)

    # --- identity ---------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """The manifest's, or for a foreign folder a hash over its configuration and weight files."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        return foreign_fingerprint(self.folder)

    @property
    def name(self) -> str:
        """What tables call it: its folder's name, and for a model converted from one file that model's."""
        folder = self.folder.resolve().name
        if self.manifest is None or self.manifest.stage != "source":
            return folder
        return folder.removesuffix(f"-{self.manifest.options['sha256'][:12]}-v{self.manifest.stage_version}")

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The precision that most weights of this checkpoint have, or had before quantisation."""
        return _TORCH_DTYPES[self.shape.dense_dtype]

    def parent(self) -> Checkpoint:
        """The checkpoint this one was made from. Raises CheckpointError if it is gone or changed."""
        if self.manifest is None or self.manifest.parent is None:
            raise CheckpointError(f"{self.folder} was not made from another checkpoint")
        link = self.manifest.parent
        if not Path(link["path"]).is_absolute():  # within one store, `../NAME`
            told_by = f"{self.folder / MANIFEST}, the parent's path in it,"
            require_inside(self.folder.resolve().parent, [link["path"].removeprefix("../")], told_by)
        parent = Checkpoint.open((self.folder.resolve() / link["path"]).resolve())
        if parent.fingerprint != link["fingerprint"]:
            raise CheckpointError(f"{parent.folder} is not the checkpoint that {self.folder} was made from")
        return parent

    def ancestors(self) -> Iterator[Checkpoint]:
        """This checkpoint, its parent, and so on to the uncompressed model."""
        current = self
        while True:
            yield current
            if current.manifest is None or current.manifest.parent is None:
                return
            current = current.parent()

    # --- weights ----------------------------------------------------------------------------------------------

    def stored_block(self, index: int) -> dict[str, Tensor]:
        """The block's tensors as they lie on disk, names relative to the block; memory-mapped, not copied."""
        prefix = f"{self.shape.block_prefix}.{index}."
        return self._read([name for name in self._stored if name.startswith(prefix)], prefix)

    def block(self, index: int) -> dict[str, Tensor]:
        """The block's dense effective weights: codes dequantised, adapter added, in the stored precision.

        Raises NumericsError naming a tensor that holds NaN or infinity.
        """
        dense = self.stored_block(index)
        linears = self.shape.blocks[index].linears
        codes = {x.name: {k: dense.pop(f"{x.name}.{k}") for k in x.grid.kinds} for x in linears if x.grid}
        adapter = self.adapter_part(index)
        for x in linears:
            if x.grid:
                weight = x.grid.read(codes[x.name], x.out_features, x.in_features)
                dense[f"{x.name}.weight"] = weight.to(_TORCH_DTYPES[x.dtype])
            if x.adapted:
                own = {kind: dense[f"{x.name}.{kind}"] for kind in ("weight", "bias") if f"{x.name}.{kind}" in dense}
                beside = {t.name.removeprefix(f"{x.name}."): adapter[t.name] for t in x.adapter()}
                for kind, tensor in applied(own, beside, self.adapter_scale).items():
                    dense[f"{x.name}.{kind}"] = tensor
        for name, tensor in dense.items():
            require_finite(f"{self.folder.name}: {self.shape.block_prefix}.{index}.{name}", tensor)
        return dense

    def base_weight(self, index: int, linear: LinearShape) -> Tensor:
        """One layer's weights without the adapter (out, in), where an N:M mask can be seen."""
        prefix = f"{self.shape.block_prefix}.{index}.{linear.name}."
        if linear.grid is None:
            return self._read([f"{prefix}weight"], prefix)["weight"]
        stored = self._read([f"{prefix}{kind}" for kind in linear.grid.kinds], prefix)
        return linear.grid.read(stored, linear.out_features, linear.in_features)

    def outer(self) -> dict[str, Tensor]:
        """Everything outside the blocks by its full name; memory-mapped."""
        tensors = self._read([t.name for t in self.shape.outer], "")
        for name, tensor in tensors.items():
            require_finite(f"{self.folder.name}: {name}", tensor)
        return tensors

    def _read(self, names: list[str], prefix: str) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._stored[name].path].append(name)
        tensors: dict[str, Tensor] = {}
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    tensors[name.removeprefix(prefix)] = file.get_tensor(self._stored[name].name)
        return tensors

    def require_same_values(self, head: str, embedding: str) -> None:
        """Raise CheckpointError where the files hold another matrix for the head than for what it is tied to."""
        if not same_values(self._stored[head], self._stored[embedding]):
            raise different_head(self.folder, head)

    def adapter_part(self, index: int) -> dict[str, Tensor]:
        """The block's adapter as it is stored, names relative to the block; empty where it has none."""
        names = [t.name for t in self.shape.blocks[index].adapter()]
        if not names:
            return {}
        with safe_open(self.folder / ADAPTER, framework="pt") as file:
            key = f"base_model.model.{self.shape.block_prefix}.{index}"
            return {name: file.get_tensor(f"{key}.{name}") for name in names}

    def adapter_codes_part(self, index: int) -> dict[str, Tensor]:
        """The block's adapter as 8-bit codes and scales, names relative to the block; empty where it has none."""
        names = [t.name for t in self.shape.blocks[index].packed_adapter()]
        if not names:
            return {}
        key = f"base_model.model.{self.shape.block_prefix}.{index}"
        with safe_open(self.folder / ADAPTER_PACKED, framework="pt") as file:
            present = set(file.keys())
            if missing := [name for name in names if f"{key}.{name}" not in present]:
                raise CheckpointError(f"{self.folder / ADAPTER_PACKED} lacks {key}.{missing[0]}")
            return {name: file.get_tensor(f"{key}.{name}") for name in names}

    def edge(self) -> dict[str, Tensor]:
        """The packed copies of embedding and head, by full name; empty where there are none."""
        names = [t.name for t in self.shape.edge_tensors()]
        if not names:
            return {}
        with safe_open(self.folder / EDGE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    @cached_property
    def adapter_scale(self) -> float:
        """What B A is multiplied with; 1 where an adapter has neither."""
        return adapter_scale(json.loads((self.folder / "adapter" / "adapter_config.json").read_text()))

    # --- transformers' objects ----------------------------------------------------------------------------------

    def hf_config(self) -> PreTrainedConfig:
        """The configuration as transformers reads it, without the note that weights are quantised."""
        from transformers import AutoConfig

        with readable(f"transformers does not know the model in {self.folder}"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError if the folder holds none."""
        return load_tokenizer(self.folder)

    def model(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in memory with its effective dense weights; for training and generating."""
        from edgepress.checkpoints.skeleton import Skeleton

        return Skeleton(self).filled(torch.device(device), dtype or self.stored_dtype)

    def facts(self, pattern: Sparsity | None = None) -> dict[str, Any]:
        """Counts measured on the files: parameters in total, non-zero, bytes of all safetensors files and packed.

        pattern: what the manifest will claim, as long as there is none to read it from.
        """
        zeros = 0
        for index, block in enumerate(self.shape.blocks):
            for linear in block.linears:
                zeros += int((self.base_weight(index, linear) == 0).sum())
        return {
            "parameters_total": self.shape.parameters_total,
            "parameters_nonzero": self.shape.parameters_total - zeros,
            "file_bytes": sum(
                path.stat().st_size
                for path in self.folder.rglob("*.safetensors")
                if path.relative_to(self.folder).parts[0] != WORK
            ),
            "packed_bytes": packed_sizes(with_pattern(self.shape, pattern) if pattern else self.shape).total,
        }


def foreign_fingerprint(folder: Path) -> str:
    """Sha256 over the names and hashes of the files that make a model what it is."""
    digest = hashlib.sha256()
    names = set(weight_files(folder).values()) | {folder / "config.json"}
    names |= {path for pattern in ("*token*", "*.model") for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(names):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
