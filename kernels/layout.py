"""What kernels agree on: sizes, tensors by name, and where a token's key lies.

Sequences. A plan's sequence is the last `max_past` transitions of the context, right-aligned, then
the planned ones: `num_steps` steps in all, the first planned one being `first_step`. A *row* is a
candidate (`num_rows` an environment) or, between two selections, a beam (`num_beams`). Row r
descends from beam r % num_beams, in tile order.

Nodes. Keys and values of a step lie in `num_levels` levels, step s in level s % num_levels. A level
holds an observation's tokens for every beam, then action and reward tokens for every row; value
tokens are seen by nobody and are not kept. Which beam's and which row's a beam sees, `slots` says:
nothing is ever copied when beams are selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, padded to what tiles need. A compile-time constant of kernels."""

    observation_dim: int
    action_dim: int
    num_layers: int
    embed_dim: int
    embed: int
    """embed_dim padded to a power of two, at least 16"""
    num_heads: int
    """padded to a power of two"""
    head_dim: int
    """padded to a power of two, at least 16"""
    hidden: int
    """of the MLP, padded to a multiple of 64"""
    num_ids: int
    """vocab_size + 1"""
    ids: int
    """num_ids padded to a power of two, at least 16"""
    scale: float
    """of attention scores, from the head's true width"""
    precision: str
    """of matrix products: "ieee" or "tf32" for float32 weights; "bf16", or "bf16 in float32", the
    same arithmetic for the interpreter, which knows no products of bfloat16"""

    @property
    def is_bf16(self) -> bool:
        """Whether matrices, keys and values are bfloat16."""
        return self.precision.startswith("bf16")

    @property
    def has_bf16_products(self) -> bool:
        """Whether matrix units take bfloat16 as it is."""
        return self.precision == "bf16"

    @property
    def transition_dim(self) -> int:
        """Tokens of a transition."""
        return self.observation_dim + self.action_dim + 2

    @property
    def visible(self) -> int:
        """Tokens of a transition that attention sees: all but the value."""
        return self.transition_dim - 1

    @property
    def width(self) -> int:
        """Of a token's queries, keys or values."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class PlanShape:
    """Sizes of a plan. A compile-time constant of kernels."""

    num_beams: int
    num_rows: int
    """candidates of an environment: num_beams * n_expand"""
    horizon: int
    first_step: int
    max_past: int
    """transitions before the current one that a window holds; older ones are cropped"""
    crops: bool
    """whether windows are cropped at all; else they grow, and every step has its level"""
    level_nodes: int
    """tokens that a level has room for"""
    num_draws: int
    """tokens sampled per row in a plan"""

    @property
    def num_steps(self) -> int:
        """Transitions of a sequence."""
        return self.first_step + self.horizon

    @property
    def num_levels(self) -> int:
        """Steps whose keys are kept: a window's and the current one's."""
        return self.max_past + 1 if self.crops else self.num_steps


class Machine(NamedTuple):
    """What the device does at once."""

    num_programs: int
    """multiprocessors"""
    key_tile: int
    """numbers of keys, and as many of values, that a program holds while it attends"""
    row_tile: int
    """rows of a program of a dense pass"""


class Weights(NamedTuple):
    """Tensors of a model. Matrices are (in, out), in the precision of matrix products."""

    token: Any
    """(transition_dim * vocab_size + 1, embed) float32"""
    position: Any
    """(block_size, embed) float32"""
    norms: Any
    """(num_layers, 4: gamma and beta of both LayerNorms, embed) float32"""
    qkv: Any
    """(num_layers, 3, embed, width)"""
    qkv_bias: Any
    """(num_layers, 3, width) float32"""
    proj: Any
    """(num_layers, width, embed)"""
    up: Any
    """(num_layers, embed, hidden)"""
    up_bias: Any
    """(num_layers, hidden) float32"""
    down: Any
    """(num_layers, hidden, embed)"""
    out_bias: Any
    """(num_layers, 2: projection and MLP, embed) float32"""
    last_norm: Any
    """(2, embed) float32"""
    head: Any
    """(transition_dim, embed, ids)"""


class Tree(NamedTuple):
    """Beams of all environments, and keys and values of their tokens."""

    key_cache: Any
    """(num_layers, num_envs, num_levels, level_nodes, width); dtype of the matrices"""
    value_cache: Any
    """the same"""
    slots: Any
    """(num_envs, 2: beam of the observation and row of the action, num_levels, num_beams) int32"""
    origins: Any
    """(num_envs, num_steps, num_beams) int32: which row's tokens a beam has"""
    tokens: Any
    """(num_envs, num_steps, num_rows, transition_dim) int32"""
    past: Any
    """(num_envs,) int32: transitions before the first planned one in its window"""


@triton.jit
def past_at(tree, env, step, plan: tl.constexpr):
    """Transitions before `step` in its window; the window of a crop ends just before it."""
    past = tl.load(tree.past + env) + step - plan.first_step
    return tl.minimum(past, plan.max_past)


@triton.jit
def node_in_level(slot, dim, model: tl.constexpr, plan: tl.constexpr):
    """Where in its level the token of a dimension lies; slot: of a beam or of a row."""
    is_action = dim >= model.observation_dim
    action = plan.num_beams * model.observation_dim + slot * (model.action_dim + 1)
    return tl.where(
        is_action, action + dim - model.observation_dim, slot * model.observation_dim + dim
    )


@triton.jit
def node_at(env, step, slot, dim, model: tl.constexpr, plan: tl.constexpr):
    """The node of a step's token."""
    level = env * plan.num_levels + step % plan.num_levels
    return level * plan.level_nodes + node_in_level(slot, dim, model, plan)


@triton.jit
def find_node(
    tree, env, beam, row, start, step, index, mask, model: tl.constexpr, plan: tl.constexpr
):
    """The node of the `index`-th visible token of a window.

    beam: whose ancestors; row: whose action tokens at `step`, the current one, which has no slot
    yet; start: the window's first step. All arguments broadcast.
    """
    at = start + index // model.visible
    dim = index % model.visible
    is_action = (dim >= model.observation_dim).to(tl.int32)
    slot = ((env * 2 + is_action) * plan.num_levels + at % plan.num_levels) * plan.num_beams + beam
    own = (is_action == 1) & (at == step)
    slot = tl.where(own, row, tl.load(tree.slots + slot, mask=mask & ~own, other=0))
    return node_at(env, at, slot, dim, model, plan)
