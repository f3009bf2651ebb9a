"""Every kernel once more in plain PyTorch: one row, one head, one node after another.

Arguments are the launchers', but for weights: a twin takes the model itself, in any arithmetic, and
computes in it. Where tensors are padded, twins write zeros into the padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tt_fast import Discretizer, TrajectoryTransformer
from tt_fast.kernels.layout import ModelShape, PlanShape, Tree
from tt_fast.kernels.sample import DrawFlags, Draws
from tt_fast.kernels.segment import Segment
from tt_fast.kernels.select import Scores
from tt_fast.planning.philox import philox_uniforms
from tt_fast.planning.sampling import draw, truncate

# --- layout ---------------------------------------------------------------------------------------


def pad_heads(x: Tensor, model: TrajectoryTransformer, shape: ModelShape) -> Tensor:
    """(..., embed_dim) -> (..., width)."""
    heads = model.config.num_heads
    split = x.reshape(*x.shape[:-1], heads, -1)
    missing = (0, shape.head_dim - split.shape[-1], 0, shape.num_heads - heads)
    return F.pad(split, missing).flatten(-2)


def trim_heads(x: Tensor, model: TrajectoryTransformer, shape: ModelShape) -> Tensor:
    """(..., width) -> (..., embed_dim)."""
    heads = model.config.num_heads
    head_dim = model.config.embed_dim // heads
    return x.reshape(*x.shape[:-1], shape.num_heads, -1)[..., :heads, :head_dim].flatten(-2)


def past_at(tree: Tree, env: int, step: int, plan: PlanShape) -> int:
    """Transitions before `step` in its window."""
    return min(int(tree.past[env]) + step - plan.first_step, plan.max_past)


def place_of(step: int, slot: int, dim: int, shape: ModelShape, plan: PlanShape) -> tuple[int, int]:
    """Level, and node in it, of a token."""
    node = slot * shape.observation_dim + dim
    if dim >= shape.observation_dim:
        action = slot * (shape.action_dim + 1) + dim - shape.observation_dim
        node = plan.num_beams * shape.observation_dim + action
    return step % plan.num_levels, node


def visible_places(
    tree: Tree, env: int, row: int, step: int, dim: int, shape: ModelShape, plan: PlanShape
) -> list[tuple[int, int]]:
    """Levels and nodes of all tokens that the token of dimension `dim` of `step` sees."""
    beam, places = row % plan.num_beams, []
    for at in range(step - past_at(tree, env, step, plan), step + 1):
        for d in range(dim + 1 if at == step else shape.visible):
            is_action = int(d >= shape.observation_dim)
            slot = int(tree.slots[env, is_action, at % plan.num_levels, beam])
            if at == step and is_action:
                slot = row
            places.append(place_of(at, slot, d, shape, plan))
    return places


def window_tokens(tree: Tree, env: int, beam: int, start: int, stop: int) -> list[Tensor]:
    """(transition_dim,) tokens of a beam's ancestors at steps [start, stop)."""
    steps = range(start, stop)
    return [tree.tokens[env, s, int(tree.origins[env, s, beam])].long() for s in steps]


# --- dense passes ---------------------------------------------------------------------------------


def layer_norm_qkv(
    h: Tensor, node: Tensor, q: Tensor, tree: Tree, model: TrajectoryTransformer, layer: int,
    count: Tensor, per_count: int, shape: ModelShape,
) -> None:  # fmt: skip
    """See the launcher; h (max_rows, embed)."""
    block: Any = model.blocks[layer]
    keys, values = (c[layer].view(-1, shape.width) for c in (tree.key_cache, tree.value_cache))
    for row in range(int(count) * per_count):
        x = block.ln1(h[row, : shape.embed_dim])
        q[row] = pad_heads(block.attn.query(x), model, shape)
        if node[row] >= 0:
            keys[node[row]] = pad_heads(block.attn.key(x), model, shape)
            values[node[row]] = pad_heads(block.attn.value(x), model, shape)


def mlp(
    h: Tensor, attended: Tensor, model: TrajectoryTransformer, layer: int, count: Tensor,
    per_count: int, shape: ModelShape,
) -> None:  # fmt: skip
    """See the launcher; in place."""
    block: Any = model.blocks[layer]
    for row in range(int(count) * per_count):
        x = h[row, : shape.embed_dim]
        x = x + block.attn.proj(trim_heads(attended[row], model, shape))
        h[row, : shape.embed_dim] = x + block.mlp(block.ln2(x))


def logits(
    h: Tensor, out: Tensor, model: TrajectoryTransformer, dim: int, num_rows: int, shape: ModelShape
) -> None:
    """See the launcher."""
    for row in range(num_rows):
        out[row] = -torch.inf
        out[row, : shape.num_ids] = model.head.weight[dim] @ model.ln_f(h[row, : shape.embed_dim])


# --- attention ------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor, out: Tensor, tree: Tree, layer: int, step: int, dim: int, num_envs: int,
    rows_per_env: int, shape: ModelShape, plan: PlanShape,
) -> None:  # fmt: skip
    """See the launcher; in the arithmetic of q, to which keys and values are converted."""
    for index in range(num_envs * rows_per_env):
        env, row = divmod(index, rows_per_env)
        places = visible_places(tree, env, row, step, dim, shape, plan)
        levels, nodes = zip(*places, strict=True) if places else ((), ())
        keys = tree.key_cache[layer, env, list(levels), list(nodes)].to(q.dtype)
        values = tree.value_cache[layer, env, list(levels), list(nodes)].to(q.dtype)
        for head in range(shape.num_heads):
            part = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            weights = (keys[:, part] @ q[index, part] * shape.scale).softmax(dim=0)
            out[index, part] = weights @ values[:, part]


def keys_and_values(model: TrajectoryTransformer, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(T, embed_dim) keys and values of every layer, of a plain forward pass over tokens (T,)."""
    seen: list[Tensor] = []
    layers: Any = [module for b in model.blocks for module in (b.attn.key, b.attn.value)]
    hooks = [m.register_forward_hook(lambda _, x, y: seen.append(y[0])) for m in layers]
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    # a block asks for its keys before its values
    return list(zip(seen[::2], seen[1::2], strict=True))


def prefill(
    nodes: Tensor, count: Tensor, tree: Tree, model: TrajectoryTransformer, current: int,
    shape: ModelShape, plan: PlanShape,
) -> None:  # fmt: skip
    """See the launcher: a forward pass over each listed transition and all before it."""
    for packed in nodes[: int(count)].tolist():
        place, slot = divmod(packed, plan.num_beams)
        env, step = divmod(place, plan.num_steps)
        start = current - past_at(tree, env, current, plan)
        tokens = torch.cat(window_tokens(tree, env, slot, start, step + 1))
        write_keys(tree, model, tokens, env, step, slot, range(shape.visible), shape, plan)


def write_keys(
    tree: Tree, model: TrajectoryTransformer, tokens: Tensor, env: int, step: int, slot: int,
    dims: range, shape: ModelShape, plan: PlanShape,
) -> None:  # fmt: skip
    """Keys and values of a window's last transition, some dimensions of it."""
    first = (len(tokens) - 1) // shape.transition_dim * shape.transition_dim
    for layer, (keys, values) in enumerate(keys_and_values(model, tokens)):
        for dim in dims:
            level, node = place_of(step, slot, dim, shape, plan)
            tree.key_cache[layer, env, level, node] = pad_heads(keys[first + dim], model, shape)
            tree.value_cache[layer, env, level, node] = pad_heads(values[first + dim], model, shape)


# --- sampling -------------------------------------------------------------------------------------


def uniforms_of(
    draws: Draws, env: int, num_envs: int, plan: PlanShape, flags: DrawFlags
) -> np.ndarray:
    """(num_draws, num_rows)"""
    if flags.given_uniforms:
        return draws.uniforms.view(num_envs, plan.num_draws, plan.num_rows)[env].numpy()
    seed, index = int(draws.seeds[env]) % 2**64, int(draws.plan_indices[env]) % 2**32
    return philox_uniforms(seed, index, plan.num_draws, plan.num_rows)


def estimate(probs: Tensor, draws: Draws, which: int) -> Tensor:
    """(rows,) of raw probabilities (rows, num_ids)."""
    discretizer = Discretizer(draws.thresholds.T.numpy())
    bins, percentile = probs[:, :-1].numpy(), float(draws.settings[7])
    if percentile < 0:
        return torch.from_numpy(discretizer.expectation(bins, which))
    return torch.from_numpy(discretizer.percentile(bins, percentile, which))


def sample(
    x: Tensor, tree: Tree, draws: Draws, step: int, out_dim: int, num_envs: int, rows_per_env: int,
    shape: ModelShape, plan: PlanShape, flags: DrawFlags,
) -> None:  # fmt: skip
    """See the launcher: the reference's own truncation, draw and estimate, in x's arithmetic."""
    kind = int(out_dim >= shape.observation_dim)
    kind += int(out_dim >= shape.observation_dim + shape.action_dim)
    cdf, top_k = float(draws.settings[kind]), int(draws.settings[3 + kind])
    t = step - plan.first_step
    draw_idx = t * shape.transition_dim + out_dim - shape.observation_dim
    for env in range(num_envs):
        rows = x[env * rows_per_env : (env + 1) * rows_per_env, : shape.num_ids]
        scaled = rows / draws.settings[6]
        if kind == 2:
            which = out_dim - shape.transition_dim + 2
            raw = scaled.softmax(dim=-1)
            draws.estimates[env, which, t] = estimate(raw, draws, which)
            if flags.keep_probs:
                draws.probs.view(num_envs, plan.num_rows, 2, -1)[env, :, which] = raw
        cut = truncate(scaled, top_k if top_k > 0 else None, cdf if cdf >= 0 else None)
        uniforms = torch.from_numpy(uniforms_of(draws, env, num_envs, plan, flags)[draw_idx])
        for child in range(plan.num_rows):
            row = child % rows_per_env
            u = uniforms[row if kind == 0 else child]
            probs = cut[row : row + 1].softmax(dim=-1)
            tree.tokens[env, step, child, out_dim] = int(draw(probs, u[None]))


# --- selection ------------------------------------------------------------------------------------


def rank(scores: Scores, estimates: Tensor, t: int, num_envs: int, plan: PlanShape) -> None:
    """See the launcher: as the reference selects."""
    for env in range(num_envs):
        reward, value = estimates[env, :, t].double()
        before = scores.returns[t, env].repeat(plan.num_rows // plan.num_beams)
        returns = before + scores.factors[t] * reward
        score = returns + scores.factors[t + 1] * value
        order = np.argsort(-score.numpy(), kind="stable")[: plan.num_beams]
        scores.scores[env, t] = score
        scores.parents[env, t] = torch.from_numpy(order.astype(np.int32))
        scores.returns[t + 1, env] = returns[order]


def advance(
    scores: Scores, old: Tree, tree: Tree, current: int, num_envs: int, plan: PlanShape
) -> set[int]:
    """See the launcher; what is to be encoded anew is returned."""
    nodes = set()
    for env in range(num_envs):
        past = past_at(old, env, current, plan)
        crops = plan.crops and past == plan.max_past
        parents = scores.parents[env, current - plan.first_step].tolist()
        for step in range(current + 1):
            inherited = [_inherited(old, env, step, current, p, plan) for p in parents]
            origins = [origin for _, _, origin in inherited]
            for beam, (observation, action, origin) in enumerate(inherited):
                tree.origins[env, step, beam] = origin
                if step < current - past + crops:
                    continue  # no window holds it any more
                if crops:
                    observation = action = origins.index(origin)
                    nodes.add((env * plan.num_steps + step) * plan.num_beams + action)
                level = step % plan.num_levels
                tree.slots[env, 0, level, beam] = observation
                tree.slots[env, 1, level, beam] = action
        for beam in range(plan.num_beams):
            tree.slots[env, 0, (current + 1) % plan.num_levels, beam] = beam
    return nodes


def _inherited(
    old: Tree, env: int, step: int, current: int, parent: int, plan: PlanShape
) -> tuple[int, int, int]:
    """Slots of observation and action, and origin, of a parent's ancestor."""
    beam, level = parent % plan.num_beams, step % plan.num_levels
    observation = int(old.slots[env, 0, level, beam])
    if step == current:
        return observation, parent, parent
    return observation, int(old.slots[env, 1, level, beam]), int(old.origins[env, step, beam])


# --- segments -------------------------------------------------------------------------------------


def run_segment(
    segment: Segment, model: TrajectoryTransformer, tree: Tree, draws: Draws, step: int,
    num_envs: int, rows_per_env: int, shape: ModelShape, plan: PlanShape, flags: DrawFlags,
) -> None:  # fmt: skip
    """See the launcher: a forward pass over the whole window for each row and token."""
    for dim in range(segment.first_dim, segment.last_dim + 1):
        newest = []
        for index in range(num_envs * rows_per_env):
            env, row = divmod(index, rows_per_env)
            start = step - past_at(tree, env, step, plan)
            window = window_tokens(tree, env, row % plan.num_beams, start, step)
            tokens = torch.cat([*window, tree.tokens[env, step, row, : dim + 1].long()])
            newest.append(model(tokens[None])[0, -1])
            if dim >= 0:
                one = range(dim, dim + 1)
                write_keys(tree, model, tokens, env, step, row, one, shape, plan)
        if dim == segment.last_dim or not segment.is_given:
            padded = F.pad(torch.stack(newest), (0, shape.ids - shape.num_ids), value=-torch.inf)
            sample(
                padded, tree, draws, step, dim + 1, num_envs, rows_per_env, shape, plan, flags
            )  # fmt: skip


# --- training -------------------------------------------------------------------------------------


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(B, T) losses in the arithmetic of x and weight; autograd has its gradients."""
    losses = []
    for window, ids in zip(x, targets.tolist(), strict=True):
        for position, (vector, target) in enumerate(zip(window, ids, strict=True)):
            z = weight[position % len(weight)] @ vector
            losses.append(z.logsumexp(0) - z[target])
    return torch.stack(losses).view(targets.shape)
