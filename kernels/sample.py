"""From the residual stream to a token: head, temperature, truncation, draw; and what it is worth.

Rows are independent. Arithmetic is the contract's: probabilities in float32, accumulated in
float64, compared where torch compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from tt_fast.kernels.layout import ModelShape, PlanShape, Tree, Weights
from tt_fast.kernels.rows import layer_norm, matmul, norm_linear, product_block

#: What a token removed by its probability gets, as in the original (sampling.py:15-28).
REMOVED = tl.constexpr(-1000.0)
MAX_FLOAT32 = tl.constexpr(3.4028234663852886e38)


class Draws(NamedTuple):
    """How tokens are drawn, and where what was drawn goes."""

    settings: Any
    """(8,) float32: cdf of observation, action, reward (-1: none); top_k of these (0: none);
    temperature; percentile of estimates (-1: mean)"""
    seeds: Any
    """(num_envs,) int64"""
    plan_indices: Any
    """(num_envs,) int32"""
    uniforms: Any
    """(num_envs, num_draws, num_rows) float64, used instead of the generator if given"""
    thresholds: Any
    """(2: reward and value, vocab_size + 1) float64"""
    estimates: Any
    """(num_envs, 2: reward and value, horizon, num_rows) float32, written"""
    probs: Any
    """(num_envs, num_rows, 2: reward and value, num_ids) float32, written if wanted"""
    broken: Any
    """(1,) int32, becomes 1 where logits are not finite; else nothing is written"""


@dataclass(frozen=True)
class DrawFlags:
    """Compile-time choices of a draw."""

    given_uniforms: bool
    keep_probs: bool


@triton.jit
def softmax(x):
    """(M, ids) -> (M, ids) float32."""
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def report_broken(x, draws, live, model: tl.constexpr):
    """Write down whether a live row's logits x (M, ids) are infinite or NaN."""
    is_logit = live[:, None] & (tl.arange(0, model.ids)[None, :] < model.num_ids)
    is_broken = is_logit & ~(tl.abs(x) <= MAX_FLOAT32)
    found = tl.max(tl.max(is_broken.to(tl.int32), axis=1), axis=0)
    tl.store(draws.broken, 1, mask=found > 0)


@triton.jit
def at_rank(ordered, rank, model: tl.constexpr):
    """(M,) the element of that rank (M,) in rows (M, ids)."""
    here = tl.arange(0, model.ids)[None, :] == rank[:, None]
    return tl.sum(tl.where(here, ordered, 0.0), axis=1)


@triton.jit
def filter_cdf(x, probs, cdf, model: tl.constexpr):
    """Remove the least likely tokens up to a mass of `cdf`, ties too (sampling.py:15-28)."""
    column = tl.arange(0, model.ids)[None, :]
    ordered = tl.sort(tl.where(column < model.num_ids, probs, 2.0))
    below = tl.cumsum(ordered.to(tl.float64), axis=1).to(tl.float32) < cdf
    rank = tl.maximum(tl.sum(below.to(tl.int32), axis=1) - 1, 0)
    limit = at_rank(ordered, rank, model)
    return tl.where((probs <= limit[:, None]) & (column < model.num_ids), REMOVED, x)


@triton.jit
def keep_top_k(x, top_k, model: tl.constexpr):
    """Remove all but the `top_k` likeliest tokens and those tied with the last."""
    if top_k == 1:
        smallest = tl.max(x, axis=1)
    else:
        rank = tl.zeros((x.shape[0],), tl.int32) + (model.ids - top_k)
        smallest = at_rank(tl.sort(x), rank, model)
    return tl.where(x < smallest[:, None], float("-inf"), x)


@triton.jit
def truncate(x, probs, draws, kind, model: tl.constexpr):
    """Logits after the filters of a kind of token: 0 observation, 1 action, 2 reward and value."""
    cdf = tl.load(draws.settings + kind)
    top_k = tl.load(draws.settings + 3 + kind).to(tl.int32)
    if cdf >= 0.0:
        x = filter_cdf(x, probs, cdf, model)
    if top_k > 0:
        x = keep_top_k(x, top_k, model)
    return x


@triton.jit
def uniform(draws, env, row, draw_idx, mask, plan: tl.constexpr, flags: tl.constexpr):
    """(M,) float64 in [0, 1): word 0 of philox4x32-10 at (row, draw, plan, 0), or the given one."""
    if flags.given_uniforms:
        place = (env * plan.num_draws + draw_idx) * plan.num_rows + row
        return tl.load(draws.uniforms + place, mask=mask, other=0.0)
    seed = tl.load(draws.seeds + env, mask=mask, other=0)
    plan_idx = tl.load(draws.plan_indices + env, mask=mask, other=0)
    zero = row * 0
    word, _, _, _ = tl.philox(seed, row, zero + draw_idx, plan_idx, zero)
    return (word >> 8).to(tl.float64) * 5.9604644775390625e-08  # 2 ** -24


@triton.jit
def estimate(probs, draws, which, model: tl.constexpr):
    """(M,) reward (0) or value (1) of raw probabilities: mean or percentile, in float64."""
    bins: tl.constexpr = model.num_ids - 1
    column = tl.arange(0, model.ids)
    edges = draws.thresholds + which * model.num_ids
    inside = column < bins
    percentile = tl.load(draws.settings + 7)
    if percentile < 0.0:
        p = tl.where(inside[None, :], probs, 0.0).to(tl.float64)
        low = tl.sum(p * tl.load(edges + column, mask=inside, other=0.0)[None, :], axis=1)
        high = tl.sum(p * tl.load(edges + column + 1, mask=inside, other=0.0)[None, :], axis=1)
        number = (low + high) / 2.0
    else:
        # the midpoint of the bin before the first one past the percentile; for bin 0, or none, the
        # original's index wraps to the other end (discretization.py:124-141)
        mass = tl.cumsum(probs.to(tl.float64), axis=1).to(tl.float32)
        first = tl.sum(((mass <= percentile) & inside[None, :]).to(tl.int32), axis=1)
        first = tl.where(first == bins, 0, first)
        before = tl.where(first == 0, bins, first - 1)
        number = (tl.load(edges + before) + tl.load(edges + first)) / 2.0
    return number.to(tl.float32)


@triton.jit
def head_logits(h, weights, dim, model: tl.constexpr, BLOCK_N: tl.constexpr):
    """Logits (M, ids) after a token of dimension `dim`, -inf past num_ids; BLOCK_N at a time."""
    M: tl.constexpr = h.shape[0]
    BLOCKS: tl.constexpr = model.ids // BLOCK_N
    x = layer_norm(h, weights.last_norm, model)
    row = tl.arange(0, model.embed)[:, None] * model.ids
    column = tl.arange(0, model.ids)[None, :]
    out = tl.full((M, model.ids), float("-inf"), tl.float32)
    for i in tl.range(0, BLOCKS):
        at = weights.head + dim * model.embed * model.ids + i * BLOCK_N + tl.arange(0, BLOCK_N)
        part = matmul(x, tl.load(at[None, :] + row), model)
        wide = tl.broadcast_to(part[:, None, :], (M, BLOCKS, BLOCK_N))
        here = (column // BLOCK_N == i) & (column < model.num_ids)
        out = tl.where(here, tl.reshape(wide, (M, model.ids)), out)
    return out


@triton.jit
def sample_rows(
    logits, tree, draws, env, row, step, out_dim, rows_per_env, live,
    model: tl.constexpr, plan: tl.constexpr, flags: tl.constexpr,
):  # fmt: skip
    """Draw the token of dimension `out_dim` of `step`, write it to the tree, and return it (M,).

    logits: (M, ids) of the token before. An action's first token is drawn for every child of a
    beam; an observation's is drawn once and stored for all rows, candidates to be.
    """
    x = logits / tl.load(draws.settings + 6)
    report_broken(x, draws, live, model)
    probs = softmax(x)
    is_observation = out_dim < model.observation_dim
    is_estimated = out_dim >= model.observation_dim + model.action_dim
    if is_estimated:
        which = out_dim - model.transition_dim + 2
        t = step - plan.first_step
        place = ((env * 2 + which) * plan.horizon + t) * plan.num_rows + row
        tl.store(draws.estimates + place, estimate(probs, draws, which, model), mask=live)
        if flags.keep_probs:
            column = tl.arange(0, model.ids)[None, :]
            to = ((env * plan.num_rows + row) * 2 + which)[:, None] * model.num_ids + column
            tl.store(draws.probs + to, probs, mask=live[:, None] & (column < model.num_ids))
    kind = tl.where(is_observation, 0, tl.where(is_estimated, 2, 1))
    mass = tl.cumsum(softmax(truncate(x, probs, draws, kind, model)).to(tl.float64), axis=1)
    total = tl.max(mass, axis=1)
    draw_idx = (step - plan.first_step) * model.transition_dim + out_dim - model.observation_dim
    token = row * 0
    for first in tl.range(0, plan.num_rows, rows_per_env):
        child = first + row
        drawer = tl.where(is_observation, row, child)
        u = uniform(draws, env, drawer, draw_idx, live, plan, flags)
        passed = tl.sum((mass <= (u * total)[:, None]).to(tl.int32), axis=1)
        token = tl.minimum(passed, model.num_ids - 1)
        place = (env * plan.num_steps + step) * plan.num_rows + child
        tl.store(tree.tokens + place * model.transition_dim + out_dim, token, mask=live)
    return token


@triton.jit(do_not_specialize=["dim", "num_rows"])
def logits_kernel(
    h_ptr, logits_ptr, weights, dim, num_rows,
    model: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N logits of M rows, -inf past num_ids."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < num_rows
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = weights.head + dim * model.embed * model.ids
    IDS: tl.constexpr = model.ids
    out = norm_linear(h_ptr, row, live, weights.last_norm, matrix, column, IDS, BLOCK_K, model)
    column = column[None, :]
    out = tl.where(column < model.num_ids, out, float("-inf"))
    tl.store(logits_ptr + row[:, None] * model.ids + column, out, mask=live[:, None])


def logits(
    h: Any, out: Any, weights: Weights, dim: int, num_rows: int, model: ModelShape, M: int = 16
) -> None:
    """out (max_rows, ids) = ln_f(h) Head[dim], -inf past num_ids.

    Args:
        h: (max_rows, embed) float32.
        out: (max_rows, ids) float32, written.
        weights: the head's are used.
        dim: of the tokens that h belongs to.
        num_rows: rows to compute.
        model: sizes.
        M: rows of a program.
    """
    block = min(model.ids, 64 if model.is_bf16 else 32)
    grid = (triton.cdiv(num_rows, M), model.ids // block)
    logits_kernel[grid](
        h, out, weights, dim, num_rows, model, M=M, BLOCK_N=block, BLOCK_K=product_block(model),
        enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "out_dim", "num_envs", "rows_per_env"])
def sample_kernel(
    logits_ptr, tree, draws, step, out_dim, num_envs, rows_per_env,
    model: tl.constexpr, plan: tl.constexpr, flags: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A token for each of M rows."""
    index = tl.program_id(0) * M + tl.arange(0, M)
    live = index < num_envs * rows_per_env
    column = tl.arange(0, model.ids)[None, :]
    x = tl.load(logits_ptr + index[:, None] * model.ids + column, mask=live[:, None], other=0.0)
    env = tl.where(live, index // rows_per_env, 0)
    sample_rows(
        x, tree, draws, env, index % rows_per_env, step, out_dim, rows_per_env, live,
        model, plan, flags,
    )  # fmt: skip


def sample(
    x: Any, tree: Tree, draws: Draws, step: int, out_dim: int, num_envs: int, rows_per_env: int,
    model: ModelShape, plan: PlanShape, flags: DrawFlags,
) -> None:  # fmt: skip
    """Draw token `out_dim` of `step` for every row; tokens and estimates are written.

    Args:
        x: (num_envs * rows_per_env, ids) float32 logits, -inf past num_ids.
        tree: its tokens are written.
        draws: settings and random numbers; its estimates are written.
        step: of the sequence.
        out_dim: dimension of the token that is drawn.
        num_envs: environments.
        rows_per_env: beams or candidates, a divisor of num_rows; every row stands for all
            candidates that equal it modulo rows_per_env.
        model: sizes.
        plan: sizes.
        flags: compile-time choices.
    """
    M = max(1, min(16, 2048 // model.ids))
    grid = (triton.cdiv(num_envs * rows_per_env, M),)
    sample_kernel[grid](
        x, tree, draws, step, out_dim, num_envs, rows_per_env, model, plan, flags, M=M,
        enable_fp_fusion=True,
    )  # fmt: skip
