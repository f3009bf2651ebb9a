"""Naive twins: the definitions written out with loops and broadcasting, slow and obvious.

They share no code with the package and are what its vectorised functions are tested against.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]

# --- discretizer ----------------------------------------------------------------------------------


def quantile_thresholds(transitions: Floats, num_bins: int) -> Floats:
    """Every ceil(n / num_bins)-th of each sorted column, and its maximum."""
    stride = math.ceil(len(transitions) / num_bins)
    columns = [sorted(column.tolist()) for column in transitions.T]
    return np.array([[*column[::stride], column[-1]] for column in columns]).T


def encode(thresholds: Floats, x: Floats) -> Tokens:
    """The number of thresholds not above each value, less one, clipped to the bins."""
    not_above = (thresholds[:, None, :] <= x[None]).sum(axis=0)
    return np.clip(not_above - 1, 0, len(thresholds) - 2)


def decode(thresholds: Floats, tokens: Tokens) -> Floats:
    """Midpoint of each token's bin; tokens outside the bins go to the nearest one."""
    values = np.empty(tokens.shape)
    for row, dim in np.ndindex(*tokens.shape):
        token = min(max(tokens[row, dim], 0), len(thresholds) - 2)
        values[row, dim] = (thresholds[token, dim] + thresholds[token + 1, dim]) / 2
    return values


def expectation(thresholds: Floats, probs: Floats, dim: int) -> Floats:
    """Sum of probability times midpoint; mass that is missing counts as zero."""
    midpoints = ((thresholds[:-1, dim] + thresholds[1:, dim]) / 2).tolist()
    return np.array([math.fsum(map(operator.mul, row, midpoints)) for row in probs.tolist()])


def percentile(thresholds: Floats, probs: Floats, q: float, dim: int) -> Floats:
    """Midpoint of the bin before the first one whose cumulative mass passes q.

    For the first bin, and if none passes, that is the wrapped (last + first threshold) / 2.
    """
    results = []
    for cumulative in np.cumsum(probs, axis=-1):
        passing = [i for i, mass in enumerate(cumulative) if mass > q]
        i = passing[0] if passing else 0
        before = thresholds[i - 1, dim] if i > 0 else thresholds[-1, dim]
        results.append((before + thresholds[i, dim]) / 2)
    return np.array(results)


# --- data -----------------------------------------------------------------------------------------


def paths(rows: Floats, ends: NDArray[np.bool_]) -> list[Floats]:
    """The rows but the last, cut after every end."""
    cut: list[list[Floats]] = [[]]
    for row, end in zip(rows[:-1], ends[:-1], strict=True):
        cut[-1].append(row)
        if end:
            cut.append([])
    return [np.stack(path) for path in cut if path]


def values_of_rewards(rewards: Floats, discount: float) -> Floats:
    """At each step of one path, the discounted sum of the rewards after it."""
    return np.array(
        [
            math.fsum(discount**k * reward for k, reward in enumerate(rewards[t + 1 :].tolist()))
            for t in range(len(rewards))
        ]
    )


def window(
    path: Tokens, start: int, num_transitions: int, step: int, stop_token: int, max_path_length: int
) -> tuple[list[int], list[int], list[bool]]:
    """Inputs, targets and mask of the window of one path's tokens that begins at `start`."""
    tokens, mask = [], []
    for k in range(num_transitions):
        t = start + k * step
        tokens += path[t].tolist() if t < len(path) else [stop_token] * path.shape[1]
        mask += [t <= max_path_length - step] * path.shape[1]
    return tokens[:-1], tokens[1:], mask[:-1]


# --- model ----------------------------------------------------------------------------------------


def logits(weights: dict[str, Any], config: Any, tokens: Tokens) -> Floats:
    """The model in float64 numpy, one sequence, one position, one head at a time.

    weights: state_dict as arrays; tokens: (num_tokens,). Returns (num_tokens, vocab_size + 1).
    """
    weights = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}
    x = np.stack([_embedding(weights, config, p, token) for p, token in enumerate(tokens.tolist())])
    for i in range(config.num_layers):
        block = {k.removeprefix(f"blocks.{i}."): w for k, w in weights.items()}
        x = x + _attention(block, config, _layer_norm(block, "ln1", x))
        hidden = _gelu(_linear(block, "mlp.0", _layer_norm(block, "ln2", x)))
        x = x + _linear(block, "mlp.2", hidden)
    x = _layer_norm(weights, "ln_f", x)
    heads = [weights["head.weight"][p % config.transition_dim] for p in range(len(x))]
    return np.stack([head @ row for head, row in zip(heads, x, strict=True)])


def _embedding(weights: dict[str, Any], config: Any, position: int, token: int) -> Floats:
    dim = position % config.transition_dim
    is_stop = token == config.vocab_size
    row = config.vocab_size * config.transition_dim if is_stop else token + dim * config.vocab_size
    embedding: Floats = weights["tok_emb.weight"][row] + weights["pos_emb"][0, position]
    return embedding


def _attention(block: dict[str, Any], config: Any, x: Floats) -> Floats:
    q, k, v = (_linear(block, f"attn.{name}", x) for name in ("query", "key", "value"))
    head_dim = config.embed_dim // config.num_heads
    y = np.zeros_like(x)
    for position in range(len(x)):
        # a value token is no key for anybody, itself included
        seen = [j for j in range(position + 1) if (j + 1) % config.transition_dim != 0]
        for head in range(config.num_heads):
            cols = slice(head * head_dim, (head + 1) * head_dim)
            scores = np.array([q[position, cols] @ k[j, cols] for j in seen]) / math.sqrt(head_dim)
            attention = np.exp(scores - scores.max())
            y[position, cols] = attention / attention.sum() @ v[seen, cols]
    return _linear(block, "attn.proj", y)


def _linear(block: dict[str, Any], name: str, x: Floats) -> Floats:
    y: Floats = x @ block[f"{name}.weight"].T + block[f"{name}.bias"]
    return y


def _layer_norm(block: dict[str, Any], name: str, x: Floats) -> Floats:
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    y: Floats = normed * block[f"{name}.weight"] + block[f"{name}.bias"]
    return y


def _gelu(x: Floats) -> Floats:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
