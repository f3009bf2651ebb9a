"""Discretizer against its naive twin, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tt_fast.discretizer import Discretizer

EPS = np.finfo(np.float64).eps

# Few distinct values, so that columns repeat them and are sometimes constant.
ROUND = st.integers(-4, 4).map(lambda i: i / 2)
ANY = st.floats(-1e6, 1e6, width=32)


def columns(elements: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[np.float64]]:
    shapes = st.tuples(st.integers(1, 60), st.integers(1, 4))
    return hnp.arrays(np.float64, shapes, elements=elements)


TRANSITIONS = st.one_of(columns(ROUND), columns(ANY))


@st.composite
def fitted(draw: st.DrawFn) -> tuple[NDArray[np.float64], Discretizer]:
    """Transitions and a discretizer fitted to them, by either strategy."""
    transitions = draw(TRANSITIONS)
    num_bins = draw(st.integers(1, len(transitions)))
    if draw(st.booleans()):
        return transitions, Discretizer.fit(transitions, num_bins, strategy="uniform")
    works = [n for n in range(1, num_bins + 1) if stride_works(len(transitions), n)]
    return transitions, Discretizer.fit(transitions, works[-1])


def stride_works(num_rows: int, num_bins: int) -> bool:
    """Whether every ceil(n / N)-th row of n gives N rows."""
    return len(range(0, num_rows, -(-num_rows // num_bins))) == num_bins


# --- against the twins ----------------------------------------------------------------------------


@given(TRANSITIONS, st.integers(1, 70))
def test_quantile_thresholds_or_the_largest_number_that_works(
    transitions: NDArray[np.float64], num_bins: int
) -> None:
    num_rows = len(transitions)
    if stride_works(num_rows, num_bins):
        fitted = Discretizer.fit(transitions, num_bins)
        expected = reference.quantile_thresholds(transitions, num_bins)
        np.testing.assert_array_equal(fitted.thresholds, expected)
        return
    largest = max(n for n in range(1, num_bins) if stride_works(num_rows, n))
    message = f"num_bins: expected at most {largest} for {num_rows} rows"
    with pytest.raises(ValueError, match=re.escape(message)):
        Discretizer.fit(transitions, num_bins)
    assert Discretizer.fit(transitions, largest).num_bins == largest


@given(TRANSITIONS, st.integers(1, 70))
def test_uniform_thresholds_are_equally_wide(
    transitions: NDArray[np.float64], num_bins: int
) -> None:
    thresholds = Discretizer.fit(transitions, num_bins, strategy="uniform").thresholds
    low, high = transitions.min(axis=0), transitions.max(axis=0)
    np.testing.assert_array_equal(thresholds[0], low)
    np.testing.assert_array_equal(thresholds[-1], high)
    widths = np.diff(thresholds, axis=0)
    magnitude = np.abs(low) + np.abs(high)
    assert (np.abs(widths - (high - low) / num_bins) <= 4 * EPS * magnitude).all()


@given(fitted(), st.data())
def test_encode_and_decode_equal_their_twins(
    pair: tuple[NDArray[np.float64], Discretizer], data: st.DataObject
) -> None:
    transitions, discretizer = pair
    far = hnp.arrays(np.float64, (5, transitions.shape[1]), elements=st.floats(-1e9, 1e9))
    x = np.concatenate([transitions, data.draw(far), discretizer.thresholds])
    tokens = discretizer.encode(x)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, reference.encode(discretizer.thresholds, x))
    decoded = discretizer.decode(tokens)
    np.testing.assert_array_equal(decoded, reference.decode(discretizer.thresholds, tokens))


@given(fitted())
def test_a_decoded_value_lies_in_its_bin_and_encodes_to_its_token(
    pair: tuple[NDArray[np.float64], Discretizer],
) -> None:
    transitions, discretizer = pair
    tokens = discretizer.encode(transitions)
    decoded = discretizer.decode(tokens)
    left = np.take_along_axis(discretizer.thresholds, tokens, axis=0)
    right = np.take_along_axis(discretizer.thresholds, tokens + 1, axis=0)
    assert (left <= decoded).all()
    assert (decoded <= right).all()
    # Bins one float apart have no midpoint of their own, and a maximum's bin may have no width.
    wide = (right - left) > 4 * EPS * np.maximum(np.abs(left), np.abs(right))
    np.testing.assert_array_equal(discretizer.encode(decoded)[wide], tokens[wide])


@given(fitted())
def test_encode_is_monotone(pair: tuple[NDArray[np.float64], Discretizer]) -> None:
    transitions, discretizer = pair
    tokens = discretizer.encode(np.sort(transitions, axis=0))
    assert (np.diff(tokens, axis=0) >= 0).all()


@given(fitted(), st.data())
def test_a_slice_of_dimensions_encodes_as_within_the_whole(
    pair: tuple[NDArray[np.float64], Discretizer], data: st.DataObject
) -> None:
    transitions, discretizer = pair
    start = data.draw(st.integers(0, transitions.shape[1] - 1))
    stop = data.draw(st.integers(start + 1, transitions.shape[1]))
    dims = slice(start, stop)
    tokens = discretizer.encode(transitions)[:, dims]
    np.testing.assert_array_equal(discretizer.encode(transitions[:, dims], dims), tokens)
    np.testing.assert_array_equal(
        discretizer.decode(tokens, dims),
        discretizer.decode(discretizer.encode(transitions))[:, dims],
    )


@given(fitted(), st.data())
def test_estimates_equal_their_twins(
    pair: tuple[NDArray[np.float64], Discretizer], data: st.DataObject
) -> None:
    _, discretizer = pair
    num_bins, dim = discretizer.num_bins, data.draw(st.integers(-discretizer.transition_dim, -1))
    masses = st.integers(0, 16).map(lambda i: i / (16 * num_bins))  # sums of them are exact
    probs = data.draw(hnp.arrays(np.float64, (4, num_bins), elements=masses))
    q = data.draw(st.floats(0.01, 0.99))
    expected = reference.expectation(discretizer.thresholds, probs, dim)
    bound = 4 * num_bins * EPS * np.abs(discretizer.thresholds[:, dim]).max()
    assert (np.abs(discretizer.expectation(probs, dim) - expected) <= bound).all()
    np.testing.assert_array_equal(
        discretizer.percentile(probs, q, dim),
        reference.percentile(discretizer.thresholds, probs, q, dim),
    )


# --- what the design says in words ----------------------------------------------------------------


def test_a_constant_column_has_one_token_and_decodes_exactly() -> None:
    for strategy in ("quantile", "uniform"):
        discretizer = Discretizer.fit(np.full((20, 1), 2.5), 10, strategy=strategy)
        tokens = discretizer.encode(np.full((3, 1), 2.5))
        assert tokens.tolist() == [[9]] * 3
        assert discretizer.decode(tokens).tolist() == [[2.5]] * 3


def test_values_outside_and_the_stop_token_go_to_the_nearest_bin() -> None:
    discretizer = Discretizer([[0.0], [1.0], [2.0]])
    assert discretizer.encode([[-9.0], [0.0], [1.0], [2.0], [9.0]]).ravel().tolist() == [
        0,
        0,
        1,
        1,
        1,
    ]
    assert discretizer.decode([[-1], [0], [1], [2]]).ravel().tolist() == [0.5, 0.5, 1.5, 1.5]


def test_quantile_bins_hold_equal_shares() -> None:
    transitions = np.random.default_rng(0).standard_normal((100_000, 3))
    tokens = Discretizer.fit(transitions).encode(transitions)
    for column in tokens.T:
        assert np.bincount(column).tolist() == [1000] * 100


def test_thresholds_are_a_frozen_float64_copy() -> None:
    edges = np.array([[0, 0], [1, 2]], dtype=np.float32)
    discretizer = Discretizer(edges)
    edges[0] = 5
    assert discretizer.thresholds.dtype == np.float64
    assert discretizer.thresholds.tolist() == [[0, 0], [1, 2]]
    assert (discretizer.num_bins, discretizer.transition_dim) == (1, 2)
    assert repr(discretizer) == "Discretizer(num_bins=1, transition_dim=2)"
    with pytest.raises(ValueError, match="read-only"):
        discretizer.thresholds[0, 0] = 1.0


# --- refusals -------------------------------------------------------------------------------------

TWO_BINS = Discretizer([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.0, 1.0], "thresholds: expected shape (num_bins + 1, transition_dim), got (2,)"),
        ([[0.0]], "thresholds: expected shape (num_bins + 1, transition_dim), got (1, 1)"),
        ([[0.0], [np.nan]], "thresholds: expected finite numbers, got 'NaN or Inf'"),
        ([[0.0, 1.0], [1.0, 0.0]], "thresholds: expected ascending columns, got 'descents in [1]'"),
    ],
)
def test_bad_thresholds(thresholds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Discretizer(thresholds)


@pytest.mark.parametrize(
    ("transitions", "settings", "message"),
    [
        (np.zeros(3), {}, "transitions: expected shape (num_steps, transition_dim), got (3,)"),
        (np.zeros((0, 2)), {}, "transitions: expected shape (num_steps, transition_dim)"),
        ([[0, 1], [2, np.inf]], {}, "transitions: expected finite numbers, got 'inf at row 1,"),
        (np.zeros((3, 1)), {"num_bins": 0}, "num_bins: expected an integer >= 1, got 0"),
        (np.zeros((3, 1)), {"num_bins": 4}, "num_bins: expected at most 3 for 3 rows (the largest"),
        (np.zeros((3, 1)), {"strategy": "k"}, "strategy: expected one of 'quantile', 'uniform'"),
    ],
)
def test_bad_fits(transitions: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Discretizer.fit(transitions, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.encode([0.0, 0.0]), "x: expected shape (n, 2), got (2,)"),
        (lambda d: d.encode([[0.0, 0.0]], slice(0, 1)), "x: expected shape (n, 1), got (1, 2)"),
        (
            lambda d: d.encode([[0.0, np.nan]]),
            "x: expected finite numbers, got 'nan at row 0, column 1'",
        ),
        (lambda d: d.decode([[0.5, 0.5]]), "tokens: expected integers, got dtype('float64')"),
        (lambda d: d.decode([[0]]), "tokens: expected shape (n, 2), got (1, 1)"),
        (
            lambda d: d.expectation([[0.5, 0.25, 0.25]], 0),
            "probs: expected shape (n, 2), got (1, 3)",
        ),
        (lambda d: d.percentile([0.5, 0.5], 0.9, 0), "probs: expected shape (n, 2), got (2,)"),
        (
            lambda d: d.percentile([[0.5, 0.5]], 1.0, 0),
            "q: expected a percentile in (0, 1), got 1.0",
        ),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:

    with pytest.raises(ValueError, match=re.escape(message)):
        call(TWO_BINS)
