"""The planner's inner loop in one launch: a block of rows through all tokens of a segment.

Rows do not know each other between two selections, so a program takes its rows through token after
token and layer after layer with nobody to wait for; weights stream from the second cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from tt_fast.kernels.decode_attention import attend_rows, key_block, layer_base
from tt_fast.kernels.layout import Machine, ModelShape, PlanShape, Tree, Weights, node_at, past_at
from tt_fast.kernels.mlp import hidden_block, mlp_rows
from tt_fast.kernels.rows import embed, layer_norm, linear, matmul, norm_of
from tt_fast.kernels.sample import DrawFlags, Draws, head_logits, sample_rows


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other without a selection.

    Inputs are the tokens of dimensions [first_dim, last_dim] of a step, -1 being the value token of
    the step before; each input's logits give the next token.
    """

    first_dim: int
    last_dim: int
    is_given: bool
    """the inputs are known; only the token after the last one is drawn"""


def context_segment(model: ModelShape) -> Segment:
    """The current observation, which is given; its logits are the first action token's."""
    return Segment(0, model.observation_dim - 1, True)


def observation_segment(model: ModelShape) -> Segment:
    """From a value token to a beam's next observation, and its children's first action tokens."""
    return Segment(-1, model.observation_dim - 1, False)


def action_segment(model: ModelShape) -> Segment:
    """From a candidate's first action token to its value token."""
    return Segment(model.observation_dim, model.transition_dim - 2, False)


@triton.jit
def first_rows(x, ROWS: tl.constexpr):
    """(M, ...) -> its first ROWS rows."""
    groups: tl.constexpr = x.shape[0] // ROWS
    grouped = tl.reshape(x, (groups, ROWS, x.shape[1]))
    first = tl.arange(0, groups)[:, None, None] == 0
    return tl.sum(tl.where(first, grouped, 0.0), axis=0)


@triton.jit
def pad_rows(x, M: tl.constexpr):
    """(ROWS, N) -> (M, N), repeated."""
    groups: tl.constexpr = M // x.shape[0]
    wide = tl.broadcast_to(x[None, :, :], (groups, x.shape[0], x.shape[1]))
    return tl.reshape(wide, (M, x.shape[1]))


@triton.jit
def row_vectors(count, num_envs, rows_per_env, ROWS: tl.constexpr):
    """Environment and row of `count` lanes, and which of them live; lanes past ROWS repeat."""
    index = tl.program_id(0) * ROWS + tl.arange(0, count) % ROWS
    live = index < num_envs * rows_per_env
    return tl.where(live, index // rows_per_env, 0), index % rows_per_env, live


@triton.jit
def project(x, matrix, bias, which, first, model: tl.constexpr):
    """One head's query, key or value (which: 0, 1, 2) of x (M, embed)."""
    F: tl.constexpr = model.head_dim
    WIDTH: tl.constexpr = model.width
    return linear(
        x, matrix + which * model.embed * model.width, bias + which * model.width, first,
        F, WIDTH, model,
    )  # fmt: skip


@triton.jit
def attention_rows(
    h, weights, tree, layer, step, dim, num_envs, rows_per_env,
    model: tl.constexpr, plan: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h + proj(attention(ln1(h))); the token's key and value are kept unless nobody sees it."""
    M: tl.constexpr = h.shape[0]
    F: tl.constexpr = model.head_dim
    env, row, live = row_vectors(M, num_envs, rows_per_env, ROWS)
    is_kept = (live & (tl.arange(0, M) < ROWS) & (dim >= 0))[:, None]
    node = node_at(env, step, row, dim, model, plan)[:, None] * model.width
    env, row, live = row_vectors(ROWS, num_envs, rows_per_env, ROWS)
    num_keys = past_at(tree, env, step, plan) * model.visible + dim + 1

    x = layer_norm(h, norm_of(weights, layer, 0, model), model)
    matrix = weights.qkv + layer * 3 * model.embed * model.width
    bias = weights.qkv_bias + layer * 3 * model.width
    proj = weights.proj + layer * model.width * model.embed
    base = layer_base(layer, num_envs, model, plan)
    column = tl.arange(0, model.embed)[None, :]
    for head in tl.range(0, model.num_heads):
        first = head * F
        q = project(x, matrix, bias, 0, first, model)
        place = base + node + first + tl.arange(0, F)[None, :]
        key = project(x, matrix, bias, 1, first, model).to(tree.key_cache.dtype.element_ty)
        value = project(x, matrix, bias, 2, first, model).to(tree.value_cache.dtype.element_ty)
        tl.store(tree.key_cache + place, key, mask=is_kept)
        tl.store(tree.value_cache + place, value, mask=is_kept)
        tl.debug_barrier()  # other threads of this program read them
        attended = attend_rows(
            first_rows(q, ROWS), tree, layer, head, env, row % plan.num_beams, row, step,
            num_keys, live, num_envs, model, plan, BLOCK_N,
        )  # fmt: skip
        tile = tl.load(proj + (first + tl.arange(0, F))[:, None] * model.embed + column)
        h += matmul(pad_rows(attended, M), tile, model)
    return h + tl.load(weights.out_bias + layer * 2 * model.embed + column)


@triton.jit(do_not_specialize=["step", "num_envs", "rows_per_env"])
def segment_kernel(
    weights, tree, draws, step, num_envs, rows_per_env,
    segment: tl.constexpr, model: tl.constexpr, plan: tl.constexpr, flags: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """ROWS rows, computed as a tile of M, which matrix units ask for."""
    env, row, live = row_vectors(M, num_envs, rows_per_env, ROWS)
    writes = live & (tl.arange(0, M) < ROWS)
    past = past_at(tree, env, step, plan)
    at = (env * plan.num_steps + step) * plan.num_rows
    if segment.first_dim < 0:  # the value token that selection kept, of its own row
        origin = tl.load(
            tree.origins + (env * plan.num_steps + step - 1) * plan.num_beams + row, mask=live
        )
        at_value = (env * plan.num_steps + step - 1) * plan.num_rows + origin
        place = at_value * model.transition_dim + model.transition_dim - 1
    else:
        place = (at + row) * model.transition_dim + segment.first_dim
    token = tl.load(tree.tokens + place, mask=live, other=0)
    for dim in tl.range(segment.first_dim, segment.last_dim + 1):
        input_dim = tl.where(dim < 0, model.transition_dim - 1, dim)
        position = past * model.transition_dim + dim
        h = embed(weights, token, input_dim, position, live, model)
        for layer in tl.range(0, model.num_layers):
            h = attention_rows(
                h, weights, tree, layer, step, dim, num_envs, rows_per_env,
                model, plan, ROWS, BLOCK_N,
            )  # fmt: skip
            h = mlp_rows(h, weights, layer, model, BLOCK_H)
        if (dim == segment.last_dim) | (not segment.is_given):
            token = sample_rows(
                head_logits(h, weights, input_dim, model, BLOCK_V),
                tree, draws, env, row, step, dim + 1, rows_per_env, writes, model, plan, flags,
            )  # fmt: skip
        else:
            place = (at + row) * model.transition_dim + dim + 1
            token = tl.load(tree.tokens + place, mask=live, other=0)


def fits_segment(model: ModelShape) -> bool:
    """Whether a program can hold a tile of rows of this model, and a matrix beside it."""
    return model.embed <= 128 and model.width <= 128 and model.ids <= 256


def tile_rows(num_rows: int, machine: Machine) -> int:
    """Rows of a program: few enough that every multiprocessor has work, and that registers hold."""
    rows = 4
    while rows < 16 and num_rows > rows * machine.num_programs:
        rows *= 2
    return rows


def run_segment(
    segment: Segment, weights: Weights, tree: Tree, draws: Draws, step: int, num_envs: int,
    rows_per_env: int, machine: Machine, model: ModelShape, plan: PlanShape, flags: DrawFlags,
) -> None:  # fmt: skip
    """All tokens of a segment of `step`, for every row of every environment.

    Args:
        segment: which tokens.
        weights: of the model.
        tree: ancestors' keys and values, and the first input token, are there; this segment's are
            written.
        draws: how; its estimates are written.
        step: of the sequence.
        num_envs: environments.
        rows_per_env: beams or candidates; see `sample`.
        machine: the device.
        model: sizes; `embed` and `width` at most 128.
        plan: sizes.
        flags: compile-time choices.
    """
    rows = tile_rows(num_envs * rows_per_env, machine)
    grid = (triton.cdiv(num_envs * rows_per_env, rows),)
    segment_kernel[grid](
        weights, tree, draws, step, num_envs, rows_per_env, segment, model, plan, flags,
        ROWS=rows, M=16, BLOCK_N=key_block(rows, model, machine),
        BLOCK_H=hidden_block(model),
        BLOCK_V=model.ids if model.is_bf16 else min(model.ids, 32),
        num_warps=8, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
