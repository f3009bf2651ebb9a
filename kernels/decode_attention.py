"""Attention of newest tokens over the ancestors of their beams, wherever these lie."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tt_fast.kernels.layout import Machine, ModelShape, PlanShape, Tree, find_node, past_at


@triton.jit
def layer_base(layer, num_envs, model: tl.constexpr, plan: tl.constexpr):
    """Offset of a layer's keys, or values."""
    return tl.cast(layer, tl.int64) * num_envs * (plan.num_levels * plan.level_nodes * model.width)


@triton.jit
def attend_rows(
    q, tree, layer, head, env, beam, row, step, num_keys, mask, num_envs,
    model: tl.constexpr, plan: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head's softmax(q k / sqrt(head_dim)) v over num_keys visible tokens of rows' windows.

    q: (R, head_dim); env, beam, row, num_keys, mask: (R,). Returns (R, head_dim) float32.
    Online softmax, BLOCK_N tokens at a time.
    """
    R: tl.constexpr = q.shape[0]
    start = (step - past_at(tree, env, step, plan))[:, None]
    base = layer_base(layer, num_envs, model, plan) + head * model.head_dim
    column = tl.arange(0, model.head_dim)[None, None, :]
    queries = (q * model.scale)[:, None, :]
    largest = tl.full((R,), -1e30, tl.float32)
    total = tl.zeros((R,), tl.float32)
    out = tl.full((R, model.head_dim), 0.0, tl.float32)
    for first in tl.range(0, tl.max(num_keys), BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)[None, :]
        seen = mask[:, None] & (index < num_keys[:, None])  # (R, N)
        node = find_node(
            tree, env[:, None], beam[:, None], row[:, None], start, step, index, seen, model, plan
        )
        place = base + node[:, :, None] * model.width + column  # (R, N, F)
        live = seen[:, :, None]
        key = tl.load(tree.key_cache + place, mask=live, other=0.0).to(tl.float32)
        value = tl.load(tree.value_cache + place, mask=live, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(queries * key, axis=2), -1e30)
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weight = tl.where(seen, tl.exp(scores - new[:, None]), 0.0)
        fade = tl.exp(largest - new)
        out = out * fade[:, None] + tl.sum(weight[:, :, None] * value, axis=1)
        total = total * fade + tl.sum(weight, axis=1)
        largest = new
    return out / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["layer", "step", "dim", "num_envs", "rows_per_env"])
def decode_attention_kernel(
    q_ptr, out_ptr, tree, layer, step, dim, num_envs, rows_per_env,
    model: tl.constexpr, plan: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of ROWS rows."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    live = index < num_envs * rows_per_env
    env, row = tl.where(live, index // rows_per_env, 0), index % rows_per_env
    column = head * model.head_dim + tl.arange(0, model.head_dim)[None, :]
    place = index[:, None] * model.width + column
    q = tl.load(q_ptr + place, mask=live[:, None], other=0.0)
    num_keys = past_at(tree, env, step, plan) * model.visible + dim + 1
    out = attend_rows(
        q, tree, layer, head, env, row % plan.num_beams, row, step, num_keys, live, num_envs,
        model, plan, BLOCK_N,
    )  # fmt: skip
    tl.store(out_ptr + place, out, mask=live[:, None])


def key_block(rows: int, model: ModelShape, machine: Machine) -> int:
    """Tokens whose keys make up a tile."""
    return max(4, min(128, machine.key_tile // (rows * model.head_dim)))


def decode_attention(
    q: Any, out: Any, tree: Tree, layer: int, step: int, dim: int, num_envs: int,
    rows_per_env: int, machine: Machine, model: ModelShape, plan: PlanShape,
) -> None:  # fmt: skip
    """Attention of the token of dimension `dim` of `step`, for every row of every environment.

    Args:
        q: (num_envs * rows_per_env, width) float32.
        out: the same shape, written.
        tree: keys and values of this token are already there.
        layer: whose keys.
        step: of the sequence.
        dim: of the transition; -1: the value token before it, which sees whole transitions.
        num_envs: environments.
        rows_per_env: beams, or candidates.
        machine: the device.
        model: sizes.
        plan: sizes.
    """
    rows = 4
    grid = (triton.cdiv(num_envs * rows_per_env, rows), model.num_heads)
    decode_attention_kernel[grid](
        q, out, tree, layer, step, dim, num_envs, rows_per_env, model, plan,
        ROWS=rows, BLOCK_N=key_block(rows, model, machine), enable_fp_fusion=True,
    )  # fmt: skip
