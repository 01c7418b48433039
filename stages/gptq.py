"""Stage 4: low-bit integer weights, each column's error compensated by the columns after it.

GPTQ (Frantar et al., arXiv 2210.17323), with a fixed mask as in SparseGPT (arXiv 2301.00774): a masked
position gets the zero point's code, exactly zero, and its error flows on like any other. The solver is our
own because no public one keeps a mask; packing and file format are GPTQModel's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import NumericsError
from checkpoints.packing import pack_linear
from checkpoints.reshape import packable, with_grid
from checkpoints.runtime import Runtime
from checkpoints.shape import Grid, ModelShape
from checkpoints.tokens import TokenBatches
from checkpoints.walk import BlockVisit, Walk
from checkpoints.writer import CheckpointWriter
from stages import edge
from stages.dense import require_dense
from stages.hessian import hessians, inverse_factor, live_diagonal, output_error
from stages.options import Gptq as Options
from stages.refine import REFINE_TOKENS, DenseOutputs, TunedLinear, refine

VERSION = 1
COLUMNS = 128  # columns solved before their errors are applied to the rest: GPTQ's lazy batch


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with a grid on every layer that the file format can hold. Raises PlanError."""
    require_dense(shape, "gptq")
    after = with_grid(shape, options.bits, options.wanted_group, options.symmetric, options.quant_embeddings)
    assert after.grid is not None
    quantization = quantization_config(after.grid, options, left_dense(shape))
    return replace(after, config=dict(shape.config) | {"quantization_config": quantization})


def remarks(shape: ModelShape, options: Options) -> list[str]:
    """What differs from what was asked, in words a person should read before the run."""
    said = []
    grid = plan(shape, options).grid
    if grid is not None and grid.group != options.wanted_group:
        said.append(f"gptq: groups of {grid.group}: {options.group} does not divide every layer")
    if dense := left_dense(shape):
        said.append(
            f"gptq: {', '.join(dense)} stay in 16 or 32 bits: sides that are no multiple of 32 do not fit the format"
        )
    if options.effort == "high":
        said.append(
            f"gptq: --quant-effort high takes {options.effort_steps} gradient steps in each of {len(shape.blocks)} "
            "blocks, several times as long as normal effort"
        )
    return said


def left_dense(shape: ModelShape) -> list[str]:
    linears = [x for block in shape.blocks for x in block.linears]
    return sorted({x.name for x in linears if not packable(x.out_features, x.in_features)})


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    after = plan(source.shape, options)
    grid, masked = after.grid, source.shape.pattern is not None
    assert grid is not None
    refined = options.effort == "high"
    chunks = calibration.chunks(REFINE_TOKENS if refined else runtime.chunk_tokens)
    walk = Walk(source, chunks, runtime, target.work, task=options.quant)
    dense = DenseOutputs(source, chunks, runtime) if refined else None
    for block in walk:
        quantised = {x.name for x in after.blocks[block.index].linears if x.grid is not None}
        masks = {name: block.linears[name].weight != 0 if masked else None for name in quantised}
        solved = solve_block(block, masks, grid, options, f"{source.shape.block_prefix}.{block.index}")
        facts: dict[str, Any] = {
            name: {"error": s.error, "damping": s.damping, "float64": s.float64} for name, s in solved.items()
        }
        if dense is not None:
            generator = runtime.generator(f"refine block {block.index}")
            targets = dense.of(block.index)
            facts["refined"] = refine_block(block, solved, masks, grid, targets, options.effort_steps, generator)
        for name, s in solved.items():
            block.linears[name].weight.copy_(s.weight)
        tensors = {n: t for n, t in block.weights().items() if n.removesuffix(".weight") not in solved}
        for name, s in solved.items():
            packed = pack_linear(s.codes.cpu(), s.scales.cpu(), s.zeros.cpu(), grid.group, grid.bits)
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in packed.items()}
        target.write_block(block.index, tensors)
        block.done(facts)
    target.copy_outer(source)
    if options.quant_embeddings:
        # The 16-bit tensors become what the packed codes stand for, so every loader sees the same model.
        outer, packed = edge.quantise_outer(source.outer(), options.quant_embeddings)
        target.write_outer(outer)
        target.write_edge(packed)
    config = dict(source.config)
    config["quantization_config"] = quantization_config(grid, options, left_dense(source.shape))
    target.finish(config, source)
    return {"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric, "blocks": walk.facts}


def solve_block(
    block: BlockVisit, masks: Mapping[str, Tensor | None], grid: Grid, options: Options, place: str
) -> dict[str, Solution]:
    """GPTQ's solution of each layer that `masks` names. Raises NumericsError that names the layer, under `place`."""
    solved: dict[str, Solution] = {}
    for names, hessian in hessians(block).items():
        for name in (n for n in names if n in masks):
            try:
                solved[name] = solve(block.linears[name].weight.float(), hessian, masks[name], grid, options)
            except NumericsError as error:
                raise NumericsError(f"{place}.{name}: {error}") from None
    return solved


def refine_block(
    block: BlockVisit,
    solved: dict[str, Solution],
    masks: Mapping[str, Tensor | None],
    grid: Grid,
    targets: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Put better codes and scales into `solved`, and tune the block's norms; the block's error before and after."""
    layers = {}
    for name, s in solved.items():
        assert s.position is not None
        layers[name] = TunedLinear.start(s.position, s.scales, s.zeros, masks[name], grid)
    errors = refine(block, layers, targets, steps, generator)
    for name, layer in layers.items():
        codes, scales = layer.codes().to(torch.uint8), layer.rounded_scales()
        solved[name] = replace(solved[name], codes=codes, scales=scales, position=None)
    return errors


@dataclass
class Solution:
    codes: Tensor  # (out, in) uint8
    scales: Tensor  # (out, groups) float32 holding float16 values
    zeros: Tensor  # (out, groups) int32, 1 … 2^bits - 1
    position: Tensor | None  # (out, in) float32: the compensated weight in codes, at most half a one away; high effort
    error: float  # tr(dW H dW^T) / tr(W H W^T): relative squared error of the layer's output
    damping: float  # share of the mean diagonal that the factorisation needed
    float64: bool

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: scales * (codes - zeros)."""
        levels = self.codes.view(*self.scales.shape, -1) - self.zeros.unsqueeze(-1)
        return (self.scales.unsqueeze(-1) * levels).view(self.codes.shape)


def solve(weight: Tensor, hessian: Tensor, mask: Tensor | None, grid: Grid, options: Options) -> Solution:
    """Codes that keep the layer's output W X close, column by column.

    weight (out, in) float32; hessian (in, in) = X^T X; mask (out, in) is True where a weight may live.
    GPTQ algorithm 1 with static groups: scales are fixed from the uncompensated weights in storage order, so
    columns can be taken by falling diagonal ("activation order") while groups stay contiguous in the file.
    """
    columns = weight.shape[1]
    group = columns if grid.group == -1 else grid.group
    # A feature that calibration never used is rounded on its own, and counts in its group like an average one.
    H, _ = live_diagonal(hessian)
    importance = H.diagonal().clone()
    scales, zeros = fit_grid(weight, importance, grid, options.scale_search)

    order = importance.argsort(descending=True, stable=True) if options.activation_order else torch.arange(columns)
    inverse = order.argsort()
    U, damping, float64 = inverse_factor(H[order][:, order], options.damping)
    W = weight[:, order].clone()
    keep = mask[:, order] if mask is not None else None
    group_of = (torch.arange(columns, device=weight.device) // group)[order]
    S, Z = scales[:, group_of], zeros[:, group_of].float()  # (out, in) in solving order
    Q, P = torch.empty_like(W), torch.empty_like(W)
    top = 2**grid.bits - 1

    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        W1, E1 = W[:, start:end], torch.empty_like(W[:, start:end])
        for j in range(end - start):
            c = start + j
            p = W1[:, j] / S[:, c] + Z[:, c]
            q = p.round().clamp_(0, top)
            if keep is not None:
                q = torch.where(keep[:, c], q, Z[:, c])
            Q[:, c], P[:, c] = q, p.clamp(q - 0.5, q + 0.5)
            e = (W1[:, j] - S[:, c] * (q - Z[:, c])) / U[c, c]
            W1[:, j + 1 :] -= torch.outer(e, U[c, c + 1 : end])
            E1[:, j] = e
        W[:, end:] -= E1 @ U[start:end, end:]

    codes, position = Q[:, inverse].to(torch.uint8), P[:, inverse] if options.effort == "high" else None
    solution = Solution(codes, scales, zeros, position, 0.0, damping, float64)
    solution.error = output_error(weight, solution.weight, hessian)
    return solution


def fit_grid(weight: Tensor, importance: Tensor, grid: Grid, search: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group: (out, groups) float32 holding float16 values, and int32.

    weight (out, in); importance (in,) is the Hessian's diagonal. The search shrinks the range in 2.5 % steps
    and keeps, for each group, the one with the least squared error weighted by the diagonal.
    """
    out, columns = weight.shape
    group = columns if grid.group == -1 else grid.group
    w = weight.view(out, -1, group)
    h = importance.view(1, -1, group)
    top = 2**grid.bits - 1
    low, high = w.amin(dim=-1).clamp(max=0), w.amax(dim=-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best_scale, best_zero, best = None, None, None
    for shrink in (1 - 0.025 * step for step in range(25 if search else 1)):
        # float16 keeps its full precision from 6e-5 up; smaller scales would be rounded away
        scale = ((high - low) * shrink / top).clamp(min=6.2e-5).to(torch.float16).float()
        if grid.symmetric:
            zero = torch.full_like(scale, (top + 1) // 2)
        else:
            zero = torch.round(-low * shrink / scale).clamp(1, top)
        if not search:
            return scale, zero.to(torch.int32)
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = ((s * ((torch.round(w / s) + z).clamp_(0, top) - z) - w).square_() * h).sum(dim=-1)
        if best is None or best_scale is None or best_zero is None:
            best_scale, best_zero, best = scale, zero, error
        else:
            better = error < best
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best = torch.where(better, error, best)
    assert best_scale is not None and best_zero is not None
    return best_scale, best_zero.to(torch.int32)


def quantization_config(grid: Grid, options: Options, dense: list[str]) -> dict[str, Any]:
    """What transformers, GPTQModel and vLLM need to read the folder."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": grid.group,
        "sym": grid.symmetric,
        "desc_act": False,  # groups are static and in storage order, whatever order solved them
        "static_groups": True,
        "lm_head": False,
        "damp_percent": options.damping,
        "pack_dtype": "int32",
        # GPTQModel reads asymmetric files only from writers that store zero points the way it does
        "meta": {"quantizer": ["edgepress:" + version("edgepress"), "gptqmodel:" + version("gptqmodel")]},
    }
    if dense:
        config["dynamic"] = {f"-:.*{name.replace('.', chr(92) + '.')}$": {} for name in dense}
        config["modules_in_block_to_quantize"] = None
    return config
