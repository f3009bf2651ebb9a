"""LayerNorm and the projections to queries, keys and values; keys and values go to their nodes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tt_fast.kernels.layout import ModelShape, Tree, Weights
from tt_fast.kernels.rows import norm_linear, norm_of, product_block


@triton.jit(do_not_specialize=["layer", "per_count", "num_nodes"])
def layer_norm_qkv_kernel(
    h_ptr, node_ptr, q_ptr, keys_ptr, values_ptr, weights, layer, count_ptr, per_count,
    num_nodes, model: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one of the three, for M rows. Rows without a node (-1) keep only q."""
    num_rows = tl.load(count_ptr) * per_count
    row = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M >= num_rows:
        return
    live = row < num_rows
    which = tl.program_id(2)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = weights.qkv + (layer * 3 + which) * model.embed * model.width
    bias = weights.qkv_bias + (layer * 3 + which) * model.width
    WIDTH: tl.constexpr = model.width
    norm = norm_of(weights, layer, 0, model)
    out = norm_linear(h_ptr, row, live, norm, matrix, column, WIDTH, BLOCK_K, model)
    out += tl.load(bias + column)[None, :]
    column = column[None, :]
    if which == 0:
        tl.store(q_ptr + row[:, None] * model.width + column, out, mask=live[:, None])
    else:
        node = tl.load(node_ptr + row, mask=live, other=-1)
        to = (tl.cast(layer, tl.int64) * num_nodes + node[:, None]) * model.width + column
        kept = (node >= 0)[:, None]
        if which == 1:
            tl.store(keys_ptr + to, out.to(keys_ptr.dtype.element_ty), mask=kept)
        else:
            tl.store(values_ptr + to, out.to(values_ptr.dtype.element_ty), mask=kept)


def layer_norm_qkv(
    h: Any, node: Any, q: Any, tree: Tree, weights: Weights, layer: int, count: Any,
    per_count: int, model: ModelShape, M: int = 16,
) -> None:  # fmt: skip
    """q = ln1(h) Wq + bq; keys[layer, node] and values[layer, node] likewise.

    Args:
        h: (max_rows, embed) float32.
        node: (max_rows,) int32, -1 for a row that nobody will see.
        q: (max_rows, width) float32, written.
        tree: its keys and values are written.
        weights: of all layers.
        layer: which one.
        count: (1,) int32 on the device; count * per_count rows are computed.
        per_count: see `count`.
        model: sizes.
        M: rows of a program.
    """
    block = min(model.width, 64 if model.is_bf16 else 32)
    num_nodes = tree.key_cache[0].numel() // model.width
    grid = (triton.cdiv(len(h), M), model.width // block, 3)
    layer_norm_qkv_kernel[grid](
        h, node, q, tree.key_cache, tree.value_cache, weights, layer, count, per_count, num_nodes,
        model, M=M, BLOCK_N=block, BLOCK_K=product_block(model), enable_fp_fusion=True,
    )  # fmt: skip
