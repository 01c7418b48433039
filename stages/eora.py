"""Stage 5: a low-rank answer to the compression error, without training.

EoRA (Liu et al., arXiv 2410.21271): the error dW is projected into the eigenspace of the layer's inputs,
scaled by the square roots of the eigenvalues, and the best rank-r approximation is taken there, where it
minimises the error of the layer's output instead of that of its weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError, PlanError
from checkpoints.peft_config import peft_config
from checkpoints.runtime import Runtime
from checkpoints.shape import LinearShape, ModelShape
from checkpoints.tokens import TokenBatches
from checkpoints.walk import Walk
from checkpoints.writer import CheckpointWriter
from stages.gptq import hessians, output_error
from stages.options import Eora as Options

VERSION = 1


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with an adapter on every quantised layer. Raises PlanError where nothing was quantised."""
    if shape.grid is None:
        raise PlanError("eora compensates quantisation, and nothing is quantised before it; use --skip eora")
    if any(x.adapter_rank for block in shape.blocks for x in block.linears):
        raise PlanError("this checkpoint already carries an adapter")
    limit = min(min(x.out_features, x.in_features) for block in shape.blocks for x in block.linears if x.grid)
    if options.rank > limit:
        raise PlanError(f"--eora {options.rank}: the smallest quantised layer has rank {limit}; choose at most that")

    def compensated(linear: LinearShape) -> LinearShape:
        return replace(linear, adapter_rank=options.rank, adapter_dtype=linear.dtype) if linear.grid else linear

    blocks = tuple(replace(block, linears=tuple(map(compensated, block.linears))) for block in shape.blocks)
    return replace(shape, blocks=blocks)


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    reference, numbers = reference_weights(source, options.against)
    after = plan(source.shape, options)
    walk = Walk(source, calibration.chunks(runtime.chunk_tokens), runtime, target.work, task="eora")
    for block in walk:
        wanted = {x.name: x for x in after.blocks[block.index].linears if x.adapter_rank}
        dense = reference.block(numbers[block.index])
        adapter: dict[str, Tensor] = {}
        facts: dict[str, dict[str, float]] = {}
        for names, covariance in hessians(block).items():
            for name in (n for n in names if n in wanted):
                linear = block.linears[name]
                exact = dense[f"{name}.weight"].to(linear.weight.device).float()
                present = linear.weight.float()
                B, A = compensate(exact - present, covariance, options.rank)
                A, B = A.to(source.stored_dtype), B.to(source.stored_dtype)
                before = output_error(exact, present, covariance)
                now = output_error(exact, present + B.float() @ A.float(), covariance)
                if now > before:  # rounding can undo a correction that was tiny to begin with
                    A, B, now = torch.zeros_like(A), torch.zeros_like(B), before
                linear.weight.copy_(present + B.float() @ A.float())
                adapter |= {f"{name}.lora_A.weight": A.cpu(), f"{name}.lora_B.weight": B.cpu()}
                facts[name] = {"error_before": before, "error_after": now}
        target.write_adapter_part(block.index, adapter)
        block.done(facts)

    for index in range(len(source.shape.blocks)):
        target.copy_block(index, source, index)
    target.copy_outer(source)
    target.copy_edge(source)
    target.join_adapter(adapter_config(after, options))
    target.finish(source.config, source)
    return {"rank": options.rank, "against": options.against, "blocks": walk.facts}


def reference_weights(source: Checkpoint, against: str) -> tuple[Checkpoint, list[int]]:
    """The checkpoint whose weights are to be reached, and its block number for each block of the source."""
    chain = list(source.ancestors())
    if against == "parent":
        dense = next((c for c in chain if c.shape.grid is None), None)
        if dense is None:
            raise CheckpointError(f"{source.folder} has no dense ancestor in the store to compensate against")
    else:
        dense = chain[-1]
    count = len(source.shape.blocks)
    if len(dense.shape.blocks) == count:
        return dense, list(range(count))
    kept = source.manifest.origin.get("blocks") if source.manifest else None
    if kept is None or len(kept) != count:
        raise CheckpointError(f"it is not recorded which blocks of {dense.folder} are left in {source.folder}")
    return dense, list(kept)


def compensate(error: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), float32, with B A the best rank-r answer to `error` on these inputs.

    error dW (out, in) = wanted - present; covariance (in, in) = X^T X. With X^T X = Q L Q^T and
    Q' = Q sqrt(L): dW Q' = U S V^T, B = U_r S_r, A = V_r^T Q'^-1 (EoRA, equations 3 to 5). It minimises
    norm(dW X - B A X), so it is never worse than no adapter. S is shared evenly between B and A, which
    halves the range that 16-bit storage has to cover.
    """
    L, Q = torch.linalg.eigh(covariance.double())
    # Directions without input cannot matter, and their inverse would only amplify noise.
    root = L.clamp_min(0).sqrt()
    live = root > root.max() * 1e-6
    inverse = torch.where(live, 1 / root.clamp_min(1e-300), torch.zeros_like(root))
    projected = error.double() @ Q * root  # (out, in)
    out, columns = projected.shape
    # The leading singular vectors from the smaller Gram matrix: cheaper than a full decomposition.
    if out <= columns:
        _, U = torch.linalg.eigh(projected @ projected.T)
        U = U[:, -rank:].flip(1)  # (out, r)
        SV = U.T @ projected  # (r, in) = S V^T
    else:
        _, V = torch.linalg.eigh(projected.T @ projected)
        V = V[:, -rank:].flip(1)  # (in, r)
        US = projected @ V  # (out, r)
        S = US.norm(dim=0)
        U = US / S.clamp_min(1e-300)
        SV = S.unsqueeze(1) * V.T
    S = SV.norm(dim=1)
    B = U * S.sqrt()
    A = (SV / S.sqrt().clamp_min(1e-150).unsqueeze(1)) * inverse @ Q.T
    return B.float(), A.float()


def adapter_config(shape: ModelShape, options: Options) -> dict[str, Any]:
    """The adapter's description in PEFT's own words."""
    adapted = [x.name for block in shape.blocks for x in block.linears if x.adapter_rank]
    return peft_config(options.rank, options.rank, adapted)
