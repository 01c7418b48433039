"""Write a checkpoint folder (a shard a block, the manifest last), and verify a finished one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, differing
from edgepress.checkpoints.errors import CheckpointError, require_unicode
from edgepress.checkpoints.headers import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_PACKED,
    EDGE,
    INDEX,
    adapter_path,
    read_header,
)
from edgepress.checkpoints.manifest import (
    MANIFEST,
    WORK,
    Manifest,
    check_files,
    drafted,
    replacing,
    require_inside,
    require_own_links,
    sync_folder,
    write_bytes,
    write_json,
)  # fmt: skip
from edgepress.checkpoints.masks import MaskProof
from edgepress.checkpoints.scaling import factors, scaling_name
from edgepress.checkpoints.shape import Sparsity, parse_sparsity
from edgepress.checkpoints.walk import Work

OUTER = "outer.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def shard_name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


class CheckpointWriter:
    """Writes the folder of one stage. Call write_block or link_block for each block, then finish."""

    def __init__(self, folder: Path, block_prefix: str = "model.layers") -> None:
        require_unicode(folder, f"the name of the folder {folder}")
        self.folder = folder
        self.block_prefix = block_prefix
        self._manifests: dict[Path, dict[str, dict[str, Any]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def work(self) -> Work:
        """The stage's durable progress, kept until the manifest is written."""
        return Work(self.folder / WORK)

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """tensors: names relative to the block."""
        full = {f"{self.block_prefix}.{index}.{name}": tensor for name, tensor in tensors.items()}
        self._save(self.folder / shard_name(index), full)

    def copy_block(self, index: int, source: Checkpoint, source_index: int) -> None:
        """Take over a block as it is stored; the same file where it already has this number."""
        if source_index == index and self._link(source.folder, shard_name(index)):
            return
        self.write_block(index, source.stored_block(source_index))

    def repeat_block(self, index: int, first: int) -> dict[str, Tensor]:
        """Write a block of the same weights as one that was written, with its factors; its tensors, by names in it."""
        prefix = f"{self.block_prefix}.{first}."
        tensors = {n.removeprefix(prefix): t for n, t in load_file(self.folder / shard_name(first)).items()}
        self.write_block(index, tensors)
        self.write_scaling(index, factors(self.folder, first))
        return tensors

    def write_outer(self, tensors: Mapping[str, Tensor]) -> None:
        self._save(self.folder / OUTER, tensors)

    def copy_outer(self, source: Checkpoint) -> None:
        """Take over what lies outside the blocks, with its packed copies if the source has them."""
        if not self._link(source.folder, OUTER):
            self.write_outer(source.outer())
        self.copy_edge(source)

    def write_adapter_part(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """One block's adapter, names relative to the block, kept with the work in progress until join_adapter."""
        full = {f"base_model.model.{self.block_prefix}.{index}.{name}": tensor for name, tensor in tensors.items()}
        self._save(self.work.folder / f"adapter-{index:05d}.safetensors", full)

    def repeat_adapter_part(self, index: int, first: int) -> dict[str, Tensor]:
        """Write the adapter of a block of the same weights as one whose adapter was written; its tensors."""
        prefix = f"base_model.model.{self.block_prefix}.{first}."
        part = load_file(self.work.folder / f"adapter-{first:05d}.safetensors")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in part.items()}
        self.write_adapter_part(index, tensors)
        return tensors

    def join_adapter(self, config: dict[str, Any]) -> None:
        """All parts as one adapter in PEFT's format, which transformers loads with the folder; 8-bit codes apart."""
        joined: dict[str, Tensor] = {}
        for part in sorted(name for name in self.work.vouched if name.startswith(f"{WORK}/adapter-")):
            joined |= load_file(self.folder / part)
        packed = {name: tensor for name, tensor in joined.items() if name.endswith((".codes", ".scales"))}
        if packed:
            self._save(self.folder / ADAPTER_PACKED, packed)
        self._save(self.folder / ADAPTER, {name: tensor for name, tensor in joined.items() if name not in packed})
        write_json(self.folder / ADAPTER_CONFIG, config)

    def write_scaling(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """What a block's layers were scaled with (checkpoints/scaling.py), names relative to the block."""
        if tensors:
            self._save(self.folder / scaling_name(index), tensors)

    def write_edge(self, tensors: Mapping[str, Tensor]) -> None:
        """Packed copies of embedding and head for the edge."""
        self._save(self.folder / EDGE, tensors)

    def copy_edge(self, source: Checkpoint) -> None:
        """Take over the packed embedding, if the source has one."""
        if (source.folder / EDGE).is_file():
            (self.folder / EDGE).parent.mkdir(exist_ok=True)
            self._link(source.folder, EDGE)

    def copy_adapter(self, source: Checkpoint) -> None:
        """Take over the adapter with its 8-bit codes, if the source has them."""
        if not (there := adapter_path(source.folder)).is_file():
            return
        for name in (ADAPTER, ADAPTER_CONFIG):
            self._link(source.folder, str(there.with_name(name).relative_to(source.folder)), name)
        if (source.folder / ADAPTER_PACKED).is_file():
            (self.folder / ADAPTER_PACKED).parent.mkdir(exist_ok=True)
            self._link(source.folder, ADAPTER_PACKED)

    def finish(self, config: Mapping[str, Any], source: Checkpoint | None) -> None:
        """Write configuration, tokenizer and index; afterwards the folder loads. The manifest is still to come."""
        write_json(self.folder / "config.json", dict(config))
        if source is not None:
            require_own_links(source.folder)
            for name in TOKENIZER_FILES:
                if (source.folder / name).is_file():
                    write_bytes(self.folder / name, (source.folder / name).read_bytes())
        names, total = {}, 0
        for path in sorted(path for path in self.folder.glob("*.safetensors") if path.name != ADAPTER):
            for name, tensor in read_header(path).items():
                names[name] = path.name
                total += tensor.nbytes
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
        sync_folder(self.folder)

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with drafted(path) as draft:
            try:
                save_file({name: t.contiguous() for name, t in tensors.items()}, draft, metadata={"format": "pt"})
            except SafetensorError as error:  # it tells neither the file nor, but in words, the system's error
                if (code := re.search(r"os error (\d+)", str(error))) is None:
                    raise
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        self._vouch(path)

    def _link(self, home: Path, name: str, own: str = "") -> bool:
        """Share an unchanged file of the folder `home`, where the file system can; own: its name here, if another.

        Raises CheckpointError where it is no longer the file that the folder's manifest lists.
        """
        path, target = home / name, self.folder / (own or name)
        if not path.is_file():
            return False
        require_inside(home, [name], str(home))
        target.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:
            with path.open("rb") as there, replacing(target) as here:
                shutil.copyfileobj(there, here)
        digest = self._vouch(target)
        listed = self._listed(home).get(name)
        if digest and listed and digest != listed["sha256"]:
            raise CheckpointError(f"the checkpoint {home} is damaged: {name} does not have the sha256 of its manifest")
        return True

    def _vouch(self, path: Path) -> str:
        """Have the stage's journal answer for a file; without work in progress there is none, and no hash."""
        return self.work.vouch(path) if "work" in self.__dict__ else ""

    def _listed(self, home: Path) -> dict[str, dict[str, Any]]:
        """The files of a finished folder by its manifest, which is read once."""
        if home not in self._manifests:
            self._manifests[home] = Manifest.read(home).files if (home / MANIFEST).is_file() else {}
        return self._manifests[home]


# --- verifying --------------------------------------------------------------------------------------------------------
# Proof that a finished checkpoint is what it claims: hashes, N:M pattern, finite values, true numbers.


def prove_pattern(checkpoint: Checkpoint, pattern: Sparsity, masks_from: Checkpoint | None = None) -> dict[str, Any]:
    """Count, over the linear layers of all blocks that the pattern covers, the zeros expected and kept.

    masks_from: a checkpoint with the same blocks whose zeros must all still be zeros; without it the pattern
    alone is asked for. An adapter that is stored beside the weights is not part of them.
    """
    proof = MaskProof(pattern)
    for index, block in enumerate(checkpoint.shape.blocks):
        masks = {x.name: x for x in masks_from.shape.blocks[index].linears} if masks_from else {}
        for linear in (x for x in block.linears if pattern.covers(x.name)):
            mask = masks_from.base_weight(index, masks[linear.name]) != 0 if masks_from else None
            proof.add(checkpoint.base_weight(index, linear), mask)
    return proof.facts()


def verify(checkpoint: Checkpoint) -> list[str]:
    """Re-check everything the manifest claims; what was found, one line each. Raises CheckpointError."""
    manifest = checkpoint.manifest
    if manifest is None:
        raise CheckpointError(f"{checkpoint.folder} has no manifest, so there is nothing to verify it against")
    check_files(checkpoint.folder, manifest, hashes=True)
    found = [f"{len(manifest.files)} files have the size and sha256 that the manifest says"]
    found.append("the manifest has the sha256 that it states of itself")
    checkpoint.outer()
    for index in range(len(checkpoint.shape.blocks)):
        checkpoint.block(index)  # raises NumericsError naming what is not finite
    found.append(f"{len(checkpoint.shape.blocks)} blocks, embedding and head are finite")
    if manifest.sparsity is not None:
        facts = prove_pattern(checkpoint, parse_sparsity(manifest.sparsity["pattern"]))
        if not facts["holds"]:
            raise CheckpointError(
                f"{checkpoint.folder} claims {facts['pattern']} but holds {facts['kept_zeros']} of "
                f"{facts['expected_zeros']} zeros"
            )
        found.append(f"{facts['pattern']}: {facts['kept_zeros']} of {facts['expected_zeros']} zeros are there")
    if (checkpoint.folder / ADAPTER_PACKED).is_file():
        if wrong := differing(checkpoint.folder):
            raise CheckpointError(f"{checkpoint.folder}: {wrong[0]} is not what its packed codes stand for")
        found.append("the adapter is exactly what its 8-bit codes stand for")
    for key, value in checkpoint.facts().items():
        claimed = getattr(manifest, key)
        if claimed != value:
            raise CheckpointError(f"{checkpoint.folder}: the manifest says {key} {claimed}, the files hold {value}")
        found.append(f"{key} {value}")
    return found
