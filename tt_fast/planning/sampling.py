"""Truncate a distribution over tokens and draw from it, as trajectory/search/sampling.py does.

Rows are independent; `logits` is (rows, vocab_size + 1) float32 in every function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: What a token removed by its probability gets; not -inf, so beam_search still counts it.
REMOVED = -1000.0


def require_finite_logits(are_finite: bool) -> None:
    """Logits after division by the temperature are finite; torch.multinomial asks for it, too.

    Raises:
        ValueError: some are not.
    """
    if are_finite:
        return
    raise ValueError(
        "model: expected finite logits, after division by the temperature, got infinite ones or NaN"
    )


def heated(logits: Tensor, temperature: float) -> Tensor:
    """`logits` divided by a temperature (sampling.py:88).

    Raises:
        ValueError: some are not finite then.
    """
    logits = logits / temperature
    require_finite_logits(bool(logits.isfinite().all()))
    return logits


def filter_cdf(logits: Tensor, cdf: float) -> Tensor:
    """Remove the least likely tokens up to a mass of `cdf` (sampling.py:15-28).

    With i the last index of the ascending probabilities whose cumulative sum is below `cdf` (0 if
    there is none), every token not likelier than that one goes, ties too.
    """
    probs = logits.softmax(dim=-1)
    ordered = probs.sort(dim=-1).values
    below = ordered.cumsum(dim=-1) < cdf
    positions = torch.arange(logits.shape[-1], device=logits.device)
    last_below = (below * positions).argmax(dim=-1, keepdim=True)
    return logits.masked_fill(probs <= ordered.gather(-1, last_below), REMOVED)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Remove all but the `k` likeliest tokens and those tied with the last (sampling.py:7-11)."""
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def truncate(logits: Tensor, top_k: int | None, cdf: float | None) -> Tensor:
    """Both filters, each if set: cdf first (sampling.py:86-93)."""
    if cdf is not None:
        logits = filter_cdf(logits, cdf)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return logits


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row by inverse CDF in ascending token order.

    Args:
        probs: (rows, vocab_size + 1) float32, accumulated in float64.
        uniforms: (rows,) float64 in [0, 1).

    Returns:
        (rows,) int64: the first i with cumsum[i] > u * cumsum[-1].
    """
    cumulative = probs.double().cumsum(dim=-1)
    target = uniforms * cumulative[:, -1]
    passed = (cumulative <= target[:, None]).sum(dim=-1)
    return passed.clamp(max=probs.shape[-1] - 1)
