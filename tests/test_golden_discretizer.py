"""Discretizer against the original's (tests/golden/README.md)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from golden_files import load_golden
from numpy.typing import NDArray

from tt_fast.discretizer import Discretizer

FILES = ("disc_gauss", "disc_gauss_float32", "disc_sparse")


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest) -> dict[str, NDArray[Any]]:
    return load_golden(request.param)


@pytest.fixture
def discretizer(golden: dict[str, NDArray[Any]]) -> Discretizer:
    return Discretizer.fit(golden["data"], int(golden["N"]))


def rounding(golden: dict[str, NDArray[Any]]) -> float:
    """Unit roundoff of the original's arithmetic in this file, float32 or float64."""
    return float(np.finfo(golden["thresholds"].dtype).eps)


def test_thresholds_are_data_values_and_equal(
    golden: dict[str, NDArray[Any]], discretizer: Discretizer
) -> None:
    assert discretizer.thresholds.dtype == np.float64
    np.testing.assert_array_equal(discretizer.thresholds, golden["thresholds"])


def test_tokens(golden: dict[str, NDArray[Any]], discretizer: Discretizer) -> None:
    x = golden["X"]
    np.testing.assert_array_equal(discretizer.encode(x), golden["indices"])
    middle = discretizer.encode(x[:, 1:3], dims=slice(1, 3))
    np.testing.assert_array_equal(middle, golden["indices_sub_1_3"])
    np.testing.assert_array_equal(discretizer.encode(x[:1]), golden["indices_1d"])


def test_decoded_values(golden: dict[str, NDArray[Any]], discretizer: Discretizer) -> None:
    # One rounded sum, halved exactly: half a unit of the original's dtype.
    rtol = rounding(golden) / 2
    np.testing.assert_allclose(discretizer.decode(golden["indices"]), golden["recon"], rtol=rtol)
    outside = discretizer.decode(golden["oor_indices"])
    np.testing.assert_allclose(outside, golden["oor_recon"], rtol=rtol)


@pytest.mark.parametrize(("letter", "dim"), [("r", -2), ("V", -1)])
def test_estimates(
    golden: dict[str, NDArray[Any]], discretizer: Discretizer, letter: str, dim: int
) -> None:
    probs = golden["probs"]
    means = discretizer.expectation(probs, dim)
    error = np.abs(means - golden[f"expectation_{letter}"])
    assert (error <= dot_error(golden, discretizer, probs, dim)).all()
    for q in (5, 9):
        percentiles = discretizer.percentile(probs, q / 10, dim)
        expected = golden[f"percentile{q}_{letter}"]
        np.testing.assert_allclose(percentiles, expected, rtol=rounding(golden) / 2)


@pytest.mark.parametrize(("letter", "dim", "row"), [("r", -2, 0), ("V", -1, 1)])
def test_reward_and_value_of_the_planner(
    golden: dict[str, NDArray[Any]], discretizer: Discretizer, letter: str, dim: int, row: int
) -> None:
    probs = golden["rv_probs"][:, row, :-1]  # the stop token's column dropped
    means = discretizer.expectation(probs, dim)
    stored = float(np.finfo(np.float32).eps) * np.abs(golden[f"mean_{letter}"])
    error = np.abs(means - golden[f"mean_{letter}"])
    assert (error <= dot_error(golden, discretizer, probs, dim) + stored).all()
    percentiles = discretizer.percentile(probs, 0.9, dim)
    np.testing.assert_allclose(percentiles, golden[f"p9_{letter}"], rtol=np.finfo(np.float32).eps)


def dot_error(
    golden: dict[str, NDArray[Any]], discretizer: Discretizer, probs: NDArray[Any], dim: int
) -> NDArray[np.float64]:
    """Bound on the rounding of n products and their sum in the original's dtype: n u sum|p t|."""
    edges = np.abs(discretizer.thresholds[:, dim])
    magnitude = np.abs(probs).astype(np.float64) @ np.maximum(edges[:-1], edges[1:])
    return len(edges) * rounding(golden) * magnitude


def test_too_few_rows_are_refused_with_the_largest_number_that_works() -> None:
    golden = load_golden("disc_few_points")  # here the original has 97 thresholds instead of 101
    with pytest.raises(ValueError, match=re.escape("num_bins: expected at most 96 for 1050 rows")):
        Discretizer.fit(golden["data"], int(golden["N"]))
    assert Discretizer.fit(golden["data"], 96).num_bins == 96
    # 96 bins have the stride that the original had with 100: the same thresholds
    thresholds = Discretizer.fit(golden["data"], 96).thresholds
    np.testing.assert_array_equal(thresholds, golden["thresholds"])
    tokens = Discretizer(thresholds).encode(golden["X"])
    inside = golden["X"] < thresholds[-1]  # the original leaves the maximum unclipped there
    np.testing.assert_array_equal(tokens[inside], golden["indices"][inside])
