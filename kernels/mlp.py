"""The second half of a block: attention's projection, then the MLP, each added to the stream."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tt_fast.kernels.layout import ModelShape, Weights
from tt_fast.kernels.rows import gelu, layer_norm, linear, matmul, norm_of


@triton.jit
def mlp_rows(h, weights, layer, model: tl.constexpr, BLOCK_H: tl.constexpr):
    """h + down(gelu(up(ln2(h)))), BLOCK_H hidden columns at a time."""
    x = layer_norm(h, norm_of(weights, layer, 1, model), model)
    up = weights.up + layer * model.embed * model.hidden
    down = weights.down + layer * model.hidden * model.embed
    column = tl.arange(0, model.embed)[None, :]
    HIDDEN: tl.constexpr = model.hidden
    for first in tl.range(0, HIDDEN, BLOCK_H):
        hidden = linear(
            x, up, weights.up_bias + layer * model.hidden, first,
            BLOCK_H, HIDDEN, model,
        )  # fmt: skip
        place = (first + tl.arange(0, BLOCK_H))[:, None] * model.embed + column
        h += matmul(gelu(hidden), tl.load(down + place), model)
    return h + tl.load(weights.out_bias + (layer * 2 + 1) * model.embed + column)


@triton.jit(do_not_specialize=["layer", "per_count"])
def mlp_kernel(
    h_ptr, attended_ptr, weights, layer, count_ptr, per_count, model: tl.constexpr,
    M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h += proj(attended); h += mlp(ln2(h)). One tile of M rows a program."""
    num_rows = tl.load(count_ptr) * per_count
    row = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= num_rows:
        return
    live = (row < num_rows)[:, None]
    column = tl.arange(0, model.embed)[None, :]
    place = h_ptr + row[:, None] * model.embed + column
    h = tl.load(place, mask=live, other=0.0)
    proj = weights.proj + layer * model.width * model.embed
    for first in tl.range(0, model.width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(attended_ptr + row[:, None] * model.width + k[None, :], mask=live, other=0.0)
        h += matmul(x, tl.load(proj + k[:, None] * model.embed + column), model)
    h += tl.load(weights.out_bias + layer * 2 * model.embed + column)
    tl.store(place, mlp_rows(h, weights, layer, model, BLOCK_H), mask=live)


def hidden_block(model: ModelShape) -> int:
    """Hidden columns a step, so that two matrices' tiles fit shared memory beside each other."""
    if model.embed > 256:
        return 16
    return 64 if model.is_bf16 else 32


def mlp(
    h: Any, attended: Any, weights: Weights, layer: int, count: Any, per_count: int,
    model: ModelShape, M: int = 16,
) -> None:  # fmt: skip
    """In place: h (rows, embed) float32 += proj(attended), then += mlp(ln2(h)).

    Args:
        h: (max_rows, embed) float32.
        attended: (max_rows, width) float32.
        weights: of all layers.
        layer: which one.
        count: (1,) int32 on the device; count * per_count rows are computed.
        per_count: see `count`.
        model: sizes.
        M: rows of a program.
    """
    grid = (triton.cdiv(len(h), M),)
    mlp_kernel[grid](
        h, attended, weights, layer, count, per_count, model,
        M=M, BLOCK_K=16 if model.embed > 256 else min(model.width, 32),
        BLOCK_H=hidden_block(model), num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
