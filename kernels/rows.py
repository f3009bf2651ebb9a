"""A token's way through the model, for a tile of rows that do not know each other.

h (M, embed) float32 is the residual stream; columns past `embed_dim` are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def layer_norm(h, gamma_beta, model: tl.constexpr):
    """LayerNorm over the true width; gamma_beta points at (2, embed)."""
    column = tl.arange(0, model.embed)
    mean = tl.sum(h, axis=1)[:, None] / model.embed_dim
    centred = tl.where(column[None, :] < model.embed_dim, h - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / model.embed_dim
    gamma = tl.load(gamma_beta + column)[None, :]
    beta = tl.load(gamma_beta + model.embed + column)[None, :]
    return centred * tl.rsqrt(variance + 1e-5) * gamma + beta


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
