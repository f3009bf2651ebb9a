"""Selection: the best candidates of every environment, and what their ancestors are from now on."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tt_fast.kernels.layout import PlanShape, Tree, past_at


class Scores(NamedTuple):
    """What selection reads and writes, for all planned steps."""

    factors: Any
    """(horizon + 1,) float64: discount ** t, a running product"""
    returns: Any
    """(horizon + 1, num_envs, num_beams) float64: discounted rewards so far, before each step"""
    scores: Any
    """(num_envs, horizon, num_rows) float64 of the candidates"""
    parents: Any
    """(num_envs, horizon, num_beams) int32 rows kept, best first"""


@triton.jit
def candidate_scores(scores, estimates, env, t, row, num_envs, mask, plan: tl.constexpr):
    """Return so far and score of candidates: returns + factor r, then + factor' V, in float64."""
    place = (t * num_envs + env) * plan.num_beams + row % plan.num_beams
    total = tl.load(scores.returns + place, mask=mask, other=0.0)
    at = (env * 2 * plan.horizon + t) * plan.num_rows + row
    reward = tl.load(estimates + at, mask=mask, other=0.0).to(tl.float64)
    value = tl.load(estimates + at + plan.horizon * plan.num_rows, mask=mask, other=0.0).to(
        tl.float64
    )
    total += tl.load(scores.factors + t) * reward
    return total, total + tl.load(scores.factors + t + 1) * value


@triton.jit
def is_better(a, row_a, b, row_b):
    """Whether a candidate ranks before another: higher score, then lower row; NaN after all."""
    nan_a, nan_b = (a != a).to(tl.int32), (b != b).to(tl.int32)
    tie = (a == b) | (nan_a + nan_b == 2)
    return (nan_a < nan_b) | (a > b) | (tie & (row_a < row_b))


@triton.jit(do_not_specialize=["t", "num_envs"])
def rank_kernel(
    scores, estimates, t, num_envs, plan: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A candidate's rank is the number of better ones: higher score, or as high and a lower row."""
    env = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < plan.num_rows
    total, score = candidate_scores(scores, estimates, env, t, row, num_envs, live, plan)
    tl.store(scores.scores + (env * plan.horizon + t) * plan.num_rows + row, score, mask=live)
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, plan.num_rows, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N)
        exists = other < plan.num_rows
        _, rival = candidate_scores(scores, estimates, env, t, other, num_envs, exists, plan)
        better = is_better(rival[None, :], other[None, :], score[:, None], row[:, None])
        rank += tl.sum((better & exists[None, :]).to(tl.int32), axis=1)
    kept = live & (rank < plan.num_beams)
    place = (env * plan.horizon + t) * plan.num_beams + rank
    tl.store(scores.parents + place, row, mask=kept)
    to = ((t + 1) * num_envs + env) * plan.num_beams + rank
    tl.store(scores.returns + to, total, mask=kept)


def rank(scores: Scores, estimates: Any, t: int, num_envs: int, plan: PlanShape) -> None:
    """Score the candidates of planned step t and rank them: score descending, then row ascending.

    Args:
        scores: factors and returns[t] are read; scores[:, t], parents[:, t] and returns[t + 1] are
            written.
        estimates: (num_envs, 2: reward and value, horizon, num_rows) float32.
        t: planned step.
        num_envs: environments.
        plan: sizes.
    """
    grid = (num_envs, triton.cdiv(plan.num_rows, 64))
    # without contraction, so that sums round as the reference's do
    rank_kernel[grid](
        scores, estimates, t, num_envs, plan, BLOCK=64, BLOCK_N=64, enable_fp_fusion=False
    )


@triton.jit
def inherit(old, env, step, current, parent, mask, plan: tl.constexpr):
    """Slots of observation and action, and origin, of the parents' (N,) ancestors at `step`."""
    beam = parent % plan.num_beams
    from_candidate = beam * 0 + step == current  # of the parent itself
    level = step % plan.num_levels
    place = (env * 2 * plan.num_levels + level) * plan.num_beams + beam
    observation = tl.load(old.slots + place, mask=mask, other=0)
    action = tl.load(old.slots + place + plan.num_levels * plan.num_beams, mask=mask, other=0)
    origin = tl.load(
        old.origins + (env * plan.num_steps + step) * plan.num_beams + beam, mask=mask, other=0
    )
    action = tl.where(from_candidate, parent, action)
    return observation, action, tl.where(from_candidate, parent, origin)


@triton.jit(do_not_specialize=["current"])
def advance_kernel(
    parents_ptr, old, tree, nodes_ptr, count_ptr, current, plan: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the sequence of one environment: what BLOCK of its beams have there."""
    env, step = tl.program_id(0), tl.program_id(1)
    beam = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    live = beam < plan.num_beams
    parents = parents_ptr + (env * plan.horizon + current - plan.first_step) * plan.num_beams
    parent = tl.load(parents + beam, mask=live, other=0)
    observation, action, origin = inherit(old, env, step, current, parent, live, plan)
    tl.store(
        tree.origins + (env * plan.num_steps + step) * plan.num_beams + beam, origin, mask=live
    )
    past = past_at(tree, env, current, plan)
    # the window of the next step starts one later then, and is encoded anew
    crops = (past == plan.max_past) & plan.crops
    start = current - past + crops.to(tl.int32)
    inside = live & (beam * 0 + step >= start)  # no later step has a program
    if crops & (step >= start):
        # the first beam with the same ancestor encodes it for all
        owner = beam
        for first in tl.range(0, plan.num_beams, BLOCK_N):
            rival = first + tl.arange(0, BLOCK_N)
            exists = rival < plan.num_beams
            parent_of = tl.load(parents + rival, mask=exists, other=0)
            _, _, theirs = inherit(old, env, step, current, parent_of, exists, plan)
            same = (theirs[None, :] == origin[:, None]) & exists[None, :]
            owner = tl.minimum(
                owner, tl.min(tl.where(same, rival[None, :], plan.num_beams), axis=1)
            )
        observation, action = owner, owner
        mine = ((owner == beam) & live).to(tl.int32)
        at = tl.atomic_add(count_ptr, tl.sum(mine)) + tl.cumsum(mine, axis=0) - 1
        packed = (env * plan.num_steps + step) * plan.num_beams + beam
        tl.store(nodes_ptr + at, packed, mask=mine == 1)
    place = (env * 2 * plan.num_levels + step % plan.num_levels) * plan.num_beams + beam
    tl.store(tree.slots + place, observation, mask=inside)
    tl.store(tree.slots + place + plan.num_levels * plan.num_beams, action, mask=inside)
    if step == current:  # the next observation is every beam's own
        place = (env * 2 * plan.num_levels + (step + 1) % plan.num_levels) * plan.num_beams + beam
        tl.store(tree.slots + place, beam, mask=live)


def advance(
    scores: Scores, old: Tree, tree: Tree, nodes: Any, count: Any, current: int, num_envs: int,
    plan: PlanShape,
) -> None:  # fmt: skip
    """Beams take over their parents' ancestors; nothing but indices moves.

    Args:
        scores: its parents of this step are read.
        old: slots and origins before the selection.
        tree: slots and origins after it, written; other memory than `old`'s.
        nodes: (max_nodes,) int32, written: transitions to encode anew where a window was cropped.
        count: (1,) int32, zero; written: how many.
        current: the step whose candidates were ranked.
        num_envs: environments.
        plan: sizes.
    """
    block = min(128, triton.next_power_of_2(plan.num_beams))
    grid = (num_envs, current + 1, triton.cdiv(plan.num_beams, block))
    advance_kernel[grid](
        scores.parents, old, tree, nodes, count, current, plan, BLOCK=block, BLOCK_N=16,
        enable_fp_fusion=True,
    )  # fmt: skip
