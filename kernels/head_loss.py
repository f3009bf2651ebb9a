"""Heads and cross-entropy in one pass, for training: logits are never stored.

Every dimension of a transition has a head of its own. A program takes M tokens of one dimension,
and that head BLOCK_N ids at a time; it keeps the logarithm of the softmax's sum, from which the
backward pass finds the probabilities again:

    loss = log(sum_v exp(z_v)) - z_target,        z_v = x . w_v
    dz_v = (exp(z_v - log_sum) - [v = target]) * d_loss
    dx   = sum_v dz_v w_v,                        dw_v = sum over tokens of dz_v x

Letters in shapes: B windows, T tokens of one, D dimensions, V ids less the stop token, E width.
Strides are in numbers; tensors without one are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tt_fast.kernels.rows import matmul

#: Widest model: gradients of a tile's tokens are summed whole.
MAX_EMBED = 512
#: Programs that share the sum over all tokens. Not the device's: every GPU adds in the same order.
NUM_SUMMERS = 256
#: Of a program that sums gradients: with half as many, the sums spill registers in float32.
GRADIENT_WARPS = 8


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the heads. A compile-time constant of kernels."""

    num_dims: int
    num_ids: int
    """vocab_size + 1"""
    embed_dim: int
    precision: str
    """of products: "ieee" or, rounding what is multiplied, "bf16"; "bf16 in float32" is the same
    arithmetic for the interpreter"""

    @property
    def embed(self) -> int:
        """embed_dim padded to a power of two, at least 16."""
        return max(16, 1 << (self.embed_dim - 1).bit_length())

    @property
    def is_bf16(self) -> bool:
        """Whether products round to bfloat16."""
        return self.precision.startswith("bf16")

    @property
    def has_bf16_products(self) -> bool:
        """Whether matrix units take bfloat16 as it is."""
        return self.precision == "bf16"

    @property
    def block(self) -> int:
        """Tokens or ids of a tile."""
        numbers = 8192 if self.is_bf16 else 4096
        return min(64, max(16, numbers // self.embed))

    @property
    def block_k(self) -> int:
        """Columns of a step of the logits' product."""
        return min(self.embed, 64 if self.is_bf16 else 32)


@triton.jit
def find_rows(tile, dim, num_windows, num_tokens, head: tl.constexpr, M: tl.constexpr):
    """Windows, positions and existence (M,) of a tile's tokens of a dimension."""
    per_window = tl.cdiv(num_tokens, head.num_dims)
    row = tile * M + tl.arange(0, M)
    window = (row // per_window).to(tl.int64)
    position = (row % per_window * head.num_dims + dim).to(tl.int64)
    return window, position, (window < num_windows) & (position < num_tokens)


@triton.jit
def rounded(x, head: tl.constexpr):
    """What a product multiplies. The interpreter's own bfloat16 is cut, a GPU's the nearest."""
    if head.has_bf16_products:
        x = x.to(tl.bfloat16)
    elif head.is_bf16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_columns(row_ptr, live, first, K: tl.constexpr, head: tl.constexpr):
    """Columns [first, first + K) of the vectors at pointers (N,), rounded as products want them.

    Zero if not live, and past embed_dim.
    """
    column = first + tl.arange(0, K)[None, :]
    mask = live[:, None] & (column < head.embed_dim)
    return rounded(tl.load(row_ptr[:, None] + column, mask=mask, other=0.0), head)


@triton.jit
def id_rows(weight_ptr, dim, ids, head: tl.constexpr):
    """Pointers (N,) to the weights of ids (N,) of a dimension's head."""
    return weight_ptr + (dim.to(tl.int64) * head.num_ids + ids) * head.embed_dim


@triton.jit
def find_logits(x_row, w_row, live, ids, head: tl.constexpr):
    """z of tokens at pointers (M,) and ids at pointers (N,), (M, N) float32.

    A few columns at a time: whole tiles would be held in registers from one loop to the next.
    """
    z = tl.full((x_row.shape[0], w_row.shape[0]), 0.0, tl.float32)
    WIDTH: tl.constexpr = head.embed
    for first in tl.range(0, WIDTH, head.block_k):
        x = load_columns(x_row, live, first, head.block_k, head)
        w = load_columns(w_row, ids < head.num_ids, first, head.block_k, head)
        z += matmul(x, tl.trans(w), head)
    return z


@triton.jit
def logit_gradients(z, target, log_sum, d_loss, ids, head: tl.constexpr):
    """dz of logits (M, N), as products want it."""
    is_target = (ids[None, :] == target[:, None]).to(tl.float32)
    dz = (tl.exp(z - log_sum[:, None]) - is_target) * d_loss[:, None]
    return rounded(tl.where(ids[None, :] < head.num_ids, dz, 0.0), head)


@triton.jit(do_not_specialize=["num_windows", "num_tokens"])
def head_loss_kernel(
    x_ptr, weight_ptr, target_ptr, loss_ptr, log_sum_ptr, stride_xb, stride_xt, stride_tb,
    stride_tt, num_windows, num_tokens, head: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Losses of M tokens of a dimension; NaN where a target is no id."""
    dim = tl.program_id(1)
    window, position, live = find_rows(tl.program_id(0), dim, num_windows, num_tokens, head, M)
    x_row = x_ptr + window * stride_xb + position * stride_xt
    place = window * stride_tb + position * stride_tt
    target = tl.load(target_ptr + place, mask=live, other=0).to(tl.int32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    picked = tl.zeros((M,), tl.float32)
    for first in tl.range(0, head.num_ids, BLOCK_N):
        ids = first + tl.arange(0, BLOCK_N)
        z = find_logits(x_row, id_rows(weight_ptr, dim, ids, head), live, ids, head)
        picked += tl.sum(tl.where(ids[None, :] == target[:, None], z, 0.0), axis=1)
        z = tl.where(ids[None, :] < head.num_ids, z, float("-inf"))
        new = tl.maximum(largest, tl.max(z, axis=1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new[:, None]), axis=1)
        largest = new
    log_sum = largest + tl.log(total)
    is_id = (target >= 0) & (target < head.num_ids)
    to = window * num_tokens + position
    tl.store(loss_ptr + to, tl.where(is_id, log_sum - picked, float("nan")), mask=live)
    tl.store(log_sum_ptr + to, log_sum, mask=live)


@triton.jit(do_not_specialize=["num_windows", "num_tokens"])
def head_loss_dx_kernel(
    x_ptr, weight_ptr, target_ptr, log_sum_ptr, d_loss_ptr, dx_ptr, stride_xb, stride_xt, stride_tb,
    stride_tt, num_windows, num_tokens, head: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of M tokens of a dimension."""
    dim = tl.program_id(1)
    window, position, live = find_rows(tl.program_id(0), dim, num_windows, num_tokens, head, M)
    x_row = x_ptr + window * stride_xb + position * stride_xt
    place = window * stride_tb + position * stride_tt
    target = tl.load(target_ptr + place, mask=live, other=0).to(tl.int32)
    at = window * num_tokens + position
    log_sum = tl.load(log_sum_ptr + at, mask=live, other=0.0)
    d_loss = tl.load(d_loss_ptr + at, mask=live, other=0.0)
    dx = tl.full((M, head.embed), 0.0, tl.float32)
    for first in tl.range(0, head.num_ids, BLOCK_N):
        ids = first + tl.arange(0, BLOCK_N)
        w_row = id_rows(weight_ptr, dim, ids, head)
        z = find_logits(x_row, w_row, live, ids, head)
        dz = logit_gradients(z, target, log_sum, d_loss, ids, head)
        dx += matmul(dz, load_columns(w_row, ids < head.num_ids, 0, head.embed, head), head)
    column = tl.arange(0, head.embed)[None, :]
    to = dx_ptr + at[:, None] * head.embed_dim + column
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=live[:, None] & (column < head.embed_dim))


@triton.jit(do_not_specialize=["num_windows", "num_tokens"])
def head_loss_dw_kernel(
    x_ptr, weight_ptr, target_ptr, log_sum_ptr, d_loss_ptr, dw_ptr, stride_xb, stride_xt, stride_tb,
    stride_tt, num_windows, num_tokens, head: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dw of BLOCK_N ids of a dimension, of every num_programs(2)-th tile of M tokens."""
    dim, split = tl.program_id(1), tl.program_id(2)
    ids = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = id_rows(weight_ptr, dim, ids, head)
    dw = tl.full((BLOCK_N, head.embed), 0.0, tl.float32)
    num_tiles = tl.cdiv(num_windows * tl.cdiv(num_tokens, head.num_dims), M)
    for tile in tl.range(split, num_tiles, tl.num_programs(2)):
        window, position, live = find_rows(tile, dim, num_windows, num_tokens, head, M)
        x_row = x_ptr + window * stride_xb + position * stride_xt
        place = window * stride_tb + position * stride_tt
        target = tl.load(target_ptr + place, mask=live, other=0).to(tl.int32)
        at = window * num_tokens + position
        log_sum = tl.load(log_sum_ptr + at, mask=live, other=0.0)
        d_loss = tl.load(d_loss_ptr + at, mask=live, other=0.0)
        z = find_logits(x_row, w_row, live, ids, head)
        dz = logit_gradients(z, target, log_sum, d_loss, ids, head)
        dw += matmul(tl.trans(dz), load_columns(x_row, live, 0, head.embed, head), head)
    column = tl.arange(0, head.embed)[None, :]
    row = (split * head.num_dims + dim).to(tl.int64) * head.num_ids + ids
    to = dw_ptr + row[:, None] * head.embed_dim + column
    tl.store(to, dw, mask=(ids < head.num_ids)[:, None] & (column < head.embed_dim))


def head_loss(x: Any, weight: Any, targets: Any, head: HeadShape) -> tuple[Any, Any]:
    """Cross-entropy of each target by the head of its position, nats.

    Args:
        x: (B, T, E) float32 or bfloat16, contiguous in E.
        weight: (D, V + 1, E) float32 or bfloat16; position p has head p mod D.
        targets: (B, T) integers of any type; strides may be anything.
        head: sizes.

    Returns:
        Losses, and logarithms of the softmaxes' sums for the backward pass; (B, T) float32.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    log_sums, grid = torch.empty_like(losses), (num_tiles(x, head), head.num_dims)
    head_loss_kernel[grid](
        x, weight, targets, losses, log_sums, *x.stride()[:2], *targets.stride(), *x.shape[:2],
        head, M=head.block, BLOCK_N=head.block, enable_fp_fusion=True,
    )  # fmt: skip
    return losses, log_sums


def head_loss_dx(
    x: Any, weight: Any, targets: Any, log_sums: Any, d_losses: Any, head: HeadShape
) -> Any:
    """Gradient of x, (B, T, E) in its type.

    Args:
        x, weight, targets, head: as `head_loss` took them.
        log_sums: (B, T) float32, as it returned them.
        d_losses: (B, T) float32, gradient of its losses.
    """
    dx, grid = torch.empty_like(x, memory_format=torch.contiguous_format), num_tiles(x, head)
    head_loss_dx_kernel[grid, head.num_dims](
        x, weight, targets, log_sums, d_losses, dx, *x.stride()[:2], *targets.stride(),
        *x.shape[:2], head, M=head.block, BLOCK_N=head.block, num_warps=GRADIENT_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return dx


def head_loss_dw(
    x: Any, weight: Any, targets: Any, log_sums: Any, d_losses: Any, head: HeadShape
) -> Any:
    """Gradient of the weight, (D, V + 1, E) in its type; the same bits in every run.

    Args:
        x, weight, targets, log_sums, d_losses, head: as `head_loss_dx` takes them.
    """
    id_tiles, splits = triton.cdiv(head.num_ids, head.block), num_splits(x, head)
    parts = torch.empty((splits, *weight.shape), dtype=torch.float32, device=x.device)
    head_loss_dw_kernel[id_tiles, head.num_dims, splits](
        x, weight, targets, log_sums, d_losses, parts, *x.stride()[:2], *targets.stride(),
        *x.shape[:2], head, M=head.block, BLOCK_N=head.block, num_warps=GRADIENT_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return parts.sum(0).to(weight.dtype)


def num_tiles(x: Any, head: HeadShape) -> int:
    """Tiles of a dimension's tokens."""
    return int(triton.cdiv(len(x) * triton.cdiv(x.shape[1], head.num_dims), head.block))


def num_splits(x: Any, head: HeadShape) -> int:
    """Programs that share the sum over tokens of one tile of ids."""
    id_tiles = head.num_dims * triton.cdiv(head.num_ids, head.block)
    return max(1, min(num_tiles(x, head), NUM_SUMMERS // id_tiles))
