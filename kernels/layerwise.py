"""A segment with a launch per operation, for models too wide for one program to hold a row tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tt_fast.kernels.decode_attention import decode_attention
from tt_fast.kernels.layer_norm_qkv import layer_norm_qkv
from tt_fast.kernels.layout import Machine, ModelShape, PlanShape, Tree, Weights, node_at, past_at
from tt_fast.kernels.mlp import mlp
from tt_fast.kernels.prefill import Scratch
from tt_fast.kernels.rows import embed, embed_rows
from tt_fast.kernels.sample import DrawFlags, Draws, logits, sample
from tt_fast.kernels.segment import Segment


class Newest(NamedTuple):
    """Memory of a decoded token of all rows."""

    scratch: Scratch
    logits: Any
    """(max_rows, ids) float32"""
    one: Any
    """(1,) int32: 1"""


@triton.jit(do_not_specialize=["step", "dim", "num_envs", "rows_per_env"])
def embed_newest_kernel(
    h_ptr, node_ptr, tree, weights, step, dim, num_envs, rows_per_env,
    model: tl.constexpr, plan: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Embeddings of M rows' tokens of dimension `dim`, -1: the value before; and their nodes."""
    index = tl.program_id(0) * M + tl.arange(0, M)
    live = index < num_envs * rows_per_env
    env, row = tl.where(live, index // rows_per_env, 0), index % rows_per_env
    at, input_dim, origin = step, dim, row
    if dim < 0:  # of the row that selection kept
        at, input_dim = step - 1, model.transition_dim - 1
        origins = tree.origins + (env * plan.num_steps + at) * plan.num_beams
        origin = tl.load(origins + row, mask=live, other=0)
    place = ((env * plan.num_steps + at) * plan.num_rows + origin) * model.transition_dim
    token = tl.load(tree.tokens + place + input_dim, mask=live, other=0)
    position = past_at(tree, env, step, plan) * model.transition_dim + dim
    h = embed(weights, token, input_dim, position, live, model)
    to = index[:, None] * model.embed + tl.arange(0, model.embed)[None, :]
    tl.store(h_ptr + to, h, mask=live[:, None])
    node = tl.where(dim < 0, -1, node_at(env, step, row, dim, model, plan))
    tl.store(node_ptr + index, node, mask=live)


def run_layerwise(
    segment: Segment, weights: Weights, tree: Tree, draws: Draws, step: int, num_envs: int,
    rows_per_env: int, machine: Machine, newest: Newest, model: ModelShape, plan: PlanShape,
    flags: DrawFlags,
) -> None:  # fmt: skip
    """As `run_segment`, for any width.

    Args:
        segment: which tokens.
        weights: of the model.
        tree: see `run_segment`.
        draws: how; its estimates are written.
        step: of the sequence.
        num_envs: environments.
        rows_per_env: beams or candidates; see `sample`.
        machine: the device.
        newest: memory for at least num_envs * rows_per_env rows.
        model: sizes.
        plan: sizes.
        flags: compile-time choices.
    """
    rows = num_envs * rows_per_env
    h, q, attended, hidden, node = (buffer[:rows] for buffer in newest.scratch)
    M = min(16, embed_rows(model))
    for dim in range(segment.first_dim, segment.last_dim + 1):
        embed_newest_kernel[(triton.cdiv(rows, M),)](
            h, node, tree, weights, step, dim, num_envs, rows_per_env, model, plan, M=M,
            enable_fp_fusion=True,
        )  # fmt: skip
        for layer in range(model.num_layers):
            layer_norm_qkv(h, node, q, tree, weights, layer, newest.one, rows, model)
            decode_attention(
                q, attended, tree, layer, step, dim, num_envs, rows_per_env, machine, model, plan
            )
            mlp(h, attended, hidden, weights, layer, newest.one, rows, model)
        if dim == segment.last_dim or not segment.is_given:
            head = dim % model.transition_dim
            logits(h, newest.logits, weights, head, rows, model)
            sample(
                newest.logits, tree, draws, step, dim + 1, num_envs, rows_per_env,
                model, plan, flags,
            )  # fmt: skip
