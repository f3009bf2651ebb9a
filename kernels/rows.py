"""A token's way through the model, for a tile of rows that do not know each other.

h (M, embed) float32 is the residual stream; columns past `embed_dim` are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tt_fast.kernels.layout import ModelShape


@triton.jit
def matmul(x, matrix, model: tl.constexpr):
    """x (M, K) float32 times a matrix (K, N), accumulated in float32."""
    if model.has_bf16_products:
        return tl.dot(x.to(tl.bfloat16), matrix)
    elif model.is_bf16:  # noqa: RET505 - only one of the three is compiled
        return tl.dot(x.to(tl.bfloat16).to(tl.float32), matrix.to(tl.float32))
    else:
        return tl.dot(x, matrix, input_precision=model.precision)


@triton.jit
def embed(weights, token, dim, position, mask, model: tl.constexpr):
    """Embeddings of tokens of a dimension at a position of the window; (M,) -> (M, embed)."""
    vocab_size: tl.constexpr = model.num_ids - 1
    # the stop token of all dimensions has one embedding, the last
    index = tl.where(
        token == vocab_size, vocab_size * model.transition_dim, token + dim * vocab_size
    )
    column = tl.arange(0, model.embed)[None, :]
    live = mask[:, None]
    h = tl.load(weights.token + index[:, None] * model.embed + column, mask=live, other=0.0)
    place = position[:, None] * model.embed + column
    return h + tl.load(weights.position + place, mask=live, other=0.0)


@triton.jit
def moments(h, model: tl.constexpr):
    """Mean and 1 / standard deviation, both (M, 1), over the true width."""
    column = tl.arange(0, model.embed)[None, :]
    mean = tl.sum(h, axis=1)[:, None] / model.embed_dim
    centred = tl.where(column < model.embed_dim, h - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / model.embed_dim
    return mean, tl.rsqrt(variance + 1e-5)


@triton.jit
def normalized(h, mean, scale, gamma_beta, first, N: tl.constexpr, model: tl.constexpr):
    """LayerNorm of columns [first, first + N), which are h; gamma_beta is zero in padding."""
    column = first + tl.arange(0, N)
    gamma = tl.load(gamma_beta + column)[None, :]
    beta = tl.load(gamma_beta + model.embed + column)[None, :]
    return (h - mean) * scale * gamma + beta


@triton.jit
def layer_norm(h, gamma_beta, model: tl.constexpr):
    """LayerNorm over the true width; gamma_beta points at (2, embed)."""
    EMBED: tl.constexpr = model.embed
    mean, scale = moments(h, model)
    return normalized(h, mean, scale, gamma_beta, 0, EMBED, model)


@triton.jit
def gelu(x):
    """Exact GELU."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def norm_of(weights, layer, which, model: tl.constexpr):
    """Pointer to gamma and beta of a block's first or second LayerNorm."""
    return weights.norms + (layer * 2 + which) * 2 * model.embed


@triton.jit
def linear(
    x, matrix, bias, first, N: tl.constexpr, ld: tl.constexpr, model: tl.constexpr
):  # fmt: skip
    """Columns [first, first + N) of x (M, embed) @ matrix (embed, ld) + bias."""
    column = first + tl.arange(0, N)
    tile = tl.load(matrix + tl.arange(0, model.embed)[:, None] * ld + column[None, :])
    return matmul(x, tile, model) + tl.load(bias + column)[None, :]


@triton.jit
def norm_linear(
    h_ptr, row, live, gamma_beta, matrix, column, ld: tl.constexpr, BLOCK_K: tl.constexpr,
    model: tl.constexpr,
):  # fmt: skip
    """layer_norm(h) @ matrix: rows (M,) of h in memory, columns (N,) of a matrix (embed, ld).

    BLOCK_K columns of h at a time: of a wide model, whole tiles fit no registers.
    """
    EMBED: tl.constexpr = model.embed
    h_row, live = h_ptr + row[:, None] * EMBED, live[:, None]
    mean, scale = moments(
        tl.load(h_row + tl.arange(0, EMBED)[None, :], mask=live, other=0.0), model
    )
    out = tl.full((row.shape[0], column.shape[0]), 0.0, tl.float32)
    for first in tl.range(0, EMBED, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(h_row + k[None, :], mask=live, other=0.0)
        x = normalized(h, mean, scale, gamma_beta, first, BLOCK_K, model)
        out += matmul(x, tl.load(matrix + k[:, None] * ld + column[None, :]), model)
    return out


def embed_rows(model: ModelShape) -> int:
    """The most rows of a program that embeds tokens: so many fit registers."""
    return 8192 // model.embed


def product_block(model: ModelShape) -> int:
    """Columns a step of `norm_linear`; larger tiles of float32 do not fit registers."""
    return min(model.embed, 128 if model.is_bf16 else 32)
