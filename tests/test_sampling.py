"""Filters and draws against naive loops over one row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tt_fast.planning.sampling import REMOVED, draw, filter_cdf, keep_top_k, truncate

#: Few distinct logits, so that ties are the rule.
rows = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=12)


def naive_filter_cdf(logits: list[float], cdf: float) -> list[float]:
    """trajectory/search/sampling.py:13-28, one row, by its words."""
    probs = torch.tensor(logits).softmax(0)
    ordered = probs.sort().values
    cumulative, last = torch.tensor(0.0), 0
    for i, p in enumerate(ordered):
        cumulative = cumulative + p
        if cumulative < cdf:
            last = i
    return [REMOVED if p <= ordered[last] else x for p, x in zip(probs, logits, strict=True)]


@given(rows, st.floats(0.0, 1.0))
def test_filter_cdf(logits: list[float], cdf: float) -> None:
    got = filter_cdf(torch.tensor([logits]), cdf)[0].tolist()
    assert got == naive_filter_cdf(logits, cdf)


def test_filter_cdf_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = filter_cdf(logits, 0.6) > REMOVED
    assert kept.tolist() == [[True, False, False]]  # .2 and .5 are below .6: both bins go
    equal = torch.zeros(1, 4)
    assert (filter_cdf(equal, 0.6) == REMOVED).all()  # ties all go, sampling is uniform again


@given(rows, st.data())
def test_top_k(logits: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(logits)))
    got = keep_top_k(torch.tensor([logits]), k)[0].tolist()
    smallest = sorted(logits)[-k]
    assert got == [x if x >= smallest else -math.inf for x in logits]


def test_cdf_comes_before_top_k() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    both = truncate(logits, 2, 0.6)
    assert both[0, 1:].tolist() == [REMOVED, REMOVED]  # tied after cdf, so top 2 keeps all three
    assert truncate(logits, None, None) is logits


@given(rows, st.floats(0.0, 1.0, exclude_max=True))
def test_draw(logits: list[float], u: float) -> None:
    probs = torch.tensor([logits]).softmax(-1)
    cumulative = np.cumsum(probs[0].numpy().astype(np.float64))
    want = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    got = draw(probs, torch.tensor([u], dtype=torch.float64))
    assert got.tolist() == [min(int(want), len(logits) - 1)]


def test_draw_never_takes_a_removed_token() -> None:
    probs = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).repeat(3, 1)
    edges = torch.tensor([0.0, 0.5, 1.0 - 2.0**-24], dtype=torch.float64)
    assert draw(probs, edges).tolist() == [2, 2, 2]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(4000, 1)
    uniforms = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    share = torch.bincount(draw(probs, uniforms), minlength=4) / 4000
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-3)
