"""The second half of a block: attention's projection, then the MLP, each added to the stream.

One launch, or of a wide model one per product.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tt_fast.kernels.layout import ModelShape, Weights
from tt_fast.kernels.rows import (
    gelu,
    layer_norm,
    linear,
    matmul,
    norm_linear,
    norm_of,
    product_block,
)


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


@triton.jit(do_not_specialize=["layer", "per_count"])
def mlp_up_kernel(
    h_ptr, hidden_ptr, weights, layer, count_ptr, per_count, model: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden = gelu(up(ln2(h))): BLOCK_N columns for M rows."""
    num_rows = tl.load(count_ptr) * per_count
    row = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= num_rows:
        return
    live = row < num_rows
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    HIDDEN: tl.constexpr = model.hidden
    matrix = weights.up + layer * model.embed * HIDDEN
    norm = norm_of(weights, layer, 1, model)
    out = norm_linear(h_ptr, row, live, norm, matrix, column, HIDDEN, BLOCK_K, model)
    out += tl.load(weights.up_bias + layer * HIDDEN + column)[None, :]
    tl.store(hidden_ptr + row[:, None] * HIDDEN + column[None, :], gelu(out), mask=live[:, None])


@triton.jit(do_not_specialize=["per_count"])
def add_product_kernel(
    h_ptr, x_ptr, matrix_ptr, bias_ptr, count_ptr, per_count, model: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h += x @ matrix + bias: BLOCK_N columns for M rows, BLOCK_K of x's K columns at a time."""
    num_rows = tl.load(count_ptr) * per_count
    row = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= num_rows:
        return
    live = (row < num_rows)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = h_ptr + row[:, None] * model.embed + column
    out = tl.load(place, mask=live, other=0.0) + tl.load(bias_ptr + column)
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=live, other=0.0)
        out += matmul(x, tl.load(matrix_ptr + k[:, None] * model.embed + column), model)
    tl.store(place, out, mask=live)


def fits_mlp(model: ModelShape) -> bool:
    """Whether a program can hold whole rows, and tiles of the MLP's matrices beside them."""
    return model.embed <= 256


def hidden_block(model: ModelShape) -> int:
    """Hidden columns a step, so that two matrices' tiles fit shared memory beside each other."""
    return 64 if model.is_bf16 else 32


def mlp(
    h: Any, attended: Any, hidden: Any, weights: Weights, layer: int, count: Any, per_count: int,
    model: ModelShape, M: int = 16,
) -> None:  # fmt: skip
    """In place: h (rows, embed) float32 += proj(attended), then += mlp(ln2(h)).

    Args:
        h: (max_rows, embed) float32.
        attended: (max_rows, width) float32.
        hidden: (max_rows, hidden) float32, overwritten; of a model that `fits_mlp`, no rows.
        weights: of all layers.
        layer: which one.
        count: (1,) int32 on the device; count * per_count rows are computed.
        per_count: see `count`.
        model: sizes.
        M: rows of a program.
    """
    if not fits_mlp(model):
        _wide_mlp(h, attended, hidden, weights, layer, count, per_count, model, M)
        return
    grid = (triton.cdiv(len(h), M),)
    mlp_kernel[grid](
        h, attended, weights, layer, count, per_count, model,
        M=M, BLOCK_K=min(model.width, 32), BLOCK_H=hidden_block(model), num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip


def _wide_mlp(
    h: Any, attended: Any, hidden: Any, weights: Weights, layer: int, count: Any, per_count: int,
    model: ModelShape, M: int,
) -> None:  # fmt: skip
    """A launch per product."""
    rows, block = triton.cdiv(len(h), M), hidden_block(model)

    def add_product(x: Any, matrix: Any, bias: Any) -> None:
        add_product_kernel[(rows, model.embed // block)](
            h, x, matrix, bias, count, per_count, model, K=len(matrix), M=M, BLOCK_N=block,
            BLOCK_K=block, enable_fp_fusion=True,
        )  # fmt: skip

    add_product(attended, weights.proj[layer], weights.out_bias[layer, 0])
    mlp_up_kernel[(rows, model.hidden // block)](
        h, hidden, weights, layer, count, per_count, model, M=M, BLOCK_N=block,
        BLOCK_K=product_block(model), enable_fp_fusion=True,
    )  # fmt: skip
    add_product(hidden, weights.down[layer], weights.out_bias[layer, 1])
