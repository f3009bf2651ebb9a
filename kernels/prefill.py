"""Encode whole transitions at once: the context at the start, the kept windows after a crop.

A crop moves every kept token to another position, so its keys are computed anew, once for each
distinct ancestor: `nodes` lists these transitions, as (env * num_steps + step) * num_beams + slot,
and `count` says how many there are. Both stay on the device. A pass is dense over their tokens;
only attention knows the tree. Of the last layer nothing but keys and values is wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tt_fast.kernels.decode_attention import layer_base
from tt_fast.kernels.layer_norm_qkv import layer_norm_qkv
from tt_fast.kernels.layout import (
    Machine,
    ModelShape,
    PlanShape,
    Tree,
    Weights,
    find_node,
    node_at,
    past_at,
)
from tt_fast.kernels.mlp import mlp
from tt_fast.kernels.rows import embed, embed_rows, matmul


class Scratch(NamedTuple):
    """Activations of a pass over max_rows tokens."""

    h: Any
    """(max_rows, embed) float32"""
    q: Any
    """(max_rows, width) float32"""
    attended: Any
    """(max_rows, width) float32"""
    hidden: Any
    """(max_rows, hidden) float32, no rows where `fits_mlp`"""
    node: Any
    """(max_rows,) int32"""


@triton.jit
def unpack_node(packed, plan: tl.constexpr):
    """Environment, step and slot of an element of `nodes`."""
    place = packed // plan.num_beams
    return place // plan.num_steps, place % plan.num_steps, packed % plan.num_beams


@triton.jit(do_not_specialize=["current"])
def embed_nodes_kernel(
    nodes_ptr, count_ptr, h_ptr, node_ptr, tree, weights, current,
    model: tl.constexpr, plan: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Embeddings of M tokens of listed transitions, and where their keys go."""
    num_rows = tl.load(count_ptr) * model.visible
    if tl.program_id(0) * M >= num_rows:
        return
    index = tl.program_id(0) * M + tl.arange(0, M)
    live = index < num_rows
    packed = tl.load(nodes_ptr + index // model.visible, mask=live, other=0)
    env, step, slot = unpack_node(packed, plan)
    dim = index % model.visible
    origin = tl.load(
        tree.origins + (env * plan.num_steps + step) * plan.num_beams + slot, mask=live, other=0
    )
    place = ((env * plan.num_steps + step) * plan.num_rows + origin) * model.transition_dim + dim
    token = tl.load(tree.tokens + place, mask=live, other=0)
    start = current - past_at(tree, env, current, plan)
    position = (step - start) * model.transition_dim + dim
    h = embed(weights, token, dim, position, live, model)
    to = index[:, None] * model.embed + tl.arange(0, model.embed)[None, :]
    tl.store(h_ptr + to, h, mask=live[:, None])
    tl.store(node_ptr + index, node_at(env, step, slot, dim, model, plan), mask=live)


@triton.jit(do_not_specialize=["layer", "current", "num_envs"])
def tree_attention_kernel(
    nodes_ptr, count_ptr, q_ptr, out_ptr, tree, layer, current, num_envs,
    model: tl.constexpr, plan: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of M tokens of one listed transition, over its ancestors and itself."""
    i, head = tl.program_id(0), tl.program_id(2)
    if i >= tl.load(count_ptr):
        return
    env, step, slot = unpack_node(tl.load(nodes_ptr + i), plan)
    start = current - past_at(tree, env, current, plan)
    dim = tl.program_id(1) * M + tl.arange(0, M)
    row = i * model.visible + dim
    last = (step - start) * model.visible + dim  # a token's own index in its window
    column = head * model.head_dim + tl.arange(0, model.head_dim)[None, :]
    live = (dim < model.visible)[:, None]
    q = tl.load(q_ptr + row[:, None] * model.width + column, mask=live, other=0.0) * model.scale
    base = layer_base(layer, num_envs, model, plan)
    largest = tl.full((M,), -1e30, tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.full((M, model.head_dim), 0.0, tl.float32)
    num_keys = tl.minimum(tl.max(last), (step - start + 1) * model.visible - 1) + 1
    for first in tl.range(0, num_keys, BLOCK_N):
        index = first + tl.arange(0, BLOCK_N)
        inside = index < num_keys
        node = find_node(tree, env, slot, 0, start, current, index, inside, model, plan)
        place = base + node[:, None] * model.width + column
        key = tl.load(tree.key_cache + place, mask=inside[:, None], other=0.0)
        value = tl.load(tree.value_cache + place, mask=inside[:, None], other=0.0)
        seen = index[None, :] <= last[:, None]
        scores = tl.where(seen, matmul(q, tl.trans(key), model), -1e30)
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weight = tl.where(seen, tl.exp(scores - new[:, None]), 0.0)
        fade = tl.exp(largest - new)
        out = out * fade[:, None] + matmul(weight, value, model)
        total = total * fade + tl.sum(weight, axis=1)
        largest = new
    to = out_ptr + row[:, None] * model.width + column
    tl.store(to, out / total[:, None], mask=live)


def tree_attention(
    nodes: Any, count: Any, q: Any, out: Any, tree: Tree, layer: int, current: int,
    num_envs: int, model: ModelShape, plan: PlanShape,
) -> None:  # fmt: skip
    """Causal attention of all tokens of the listed transitions, each over its own window.

    Args:
        nodes: (max_nodes,) int32, see the top of this file.
        count: (1,) int32.
        q: (max_nodes * visible, width) float32.
        out: the same shape, written.
        tree: keys and values of these transitions and of their ancestors are there.
        layer: whose keys.
        current: the step that follows the windows.
        num_envs: environments.
        model: sizes.
        plan: sizes.
    """
    block = 16 if model.visible <= 16 else 32
    grid = (len(nodes), triton.cdiv(model.visible, block), model.num_heads)
    tree_attention_kernel[grid](
        nodes, count, q, out, tree, layer, current, num_envs, model, plan, M=block, BLOCK_N=32,
        enable_fp_fusion=True,
    )  # fmt: skip


def prefill(
    nodes: Any, count: Any, tree: Tree, weights: Weights, current: int, num_envs: int,
    machine: Machine, model: ModelShape, plan: PlanShape, scratch: Scratch,
) -> None:  # fmt: skip
    """Keys and values of the listed transitions, in all layers.

    Args:
        nodes: (max_nodes,) int32, see the top of this file.
        count: (1,) int32.
        tree: slots, origins and tokens are there; keys and values are written.
        weights: of the model.
        current: the step that follows the windows.
        num_envs: environments.
        machine: the device.
        model: sizes.
        plan: sizes.
        scratch: activations; its max_rows is at least max_nodes * visible.
    """
    rows, per_node = len(nodes) * model.visible, model.visible
    h, q, attended, hidden, node = (buffer[:rows] for buffer in scratch)
    M = machine.row_tile
    embedded = min(M, embed_rows(model))
    embed_nodes_kernel[(triton.cdiv(rows, embedded),)](
        nodes, count, h, node, tree, weights, current, model, plan, M=embedded,
        enable_fp_fusion=True,
    )  # fmt: skip
    for layer in range(model.num_layers):
        layer_norm_qkv(h, node, q, tree, weights, layer, count, per_node, model, M)
        if layer == model.num_layers - 1:
            return
        tree_attention(nodes, count, q, attended, tree, layer, current, num_envs, model, plan)
        mlp(h, attended, hidden, weights, layer, count, per_node, model, M)
