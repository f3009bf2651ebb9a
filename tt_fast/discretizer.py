"""Continuous transitions to tokens and back, one set of bins per dimension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_fast.config import Strategy
from tt_fast.validate import refuse, require, require_choice, require_int, require_number

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]

_ALL = slice(None)


class Discretizer:
    """Bins of a transition's dimensions; a token is the index of a bin.

    Source: trajectory/utils/discretization.py. A value's token is the largest threshold index not
    above it, clipped to [0, num_bins - 1]; a token decodes as its bin's midpoint.

    Args:
        thresholds: (num_bins + 1, transition_dim), ascending in each column; duplicates are legal
            (sparse rewards). Kept as float64.
        edge_tolerance: (relative, absolute) distance below a threshold from which a value counts as
            above it. The original has none; faster-trajectory-transformer has (1e-5, 1e-8).

    Raises:
        ValueError: wrong shape, not finite, or a column that descends; a negative tolerance.
    """

    def __init__(
        self, thresholds: ArrayLike, edge_tolerance: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        edges = _as_floats("thresholds", thresholds)
        shape_ok = edges.ndim == 2 and edges.shape[0] >= 2 and edges.shape[1] >= 1
        require(shape_ok, "thresholds", "shape (num_bins + 1, transition_dim)", edges.shape)
        require(bool(np.isfinite(edges).all()), "thresholds", "finite numbers", "NaN or Inf")
        descending = np.flatnonzero((np.diff(edges, axis=0) < 0).any(axis=0))
        ascending = descending.size == 0
        require(ascending, "thresholds", "ascending columns", f"descents in {descending.tolist()}")
        edges.setflags(write=False)
        self.thresholds: Floats = edges
        relative, absolute = edge_tolerance
        for distance in edge_tolerance:
            require_number("edge_tolerance", distance, 0.0)
        self.edge_tolerance = (float(relative), float(absolute))

    @classmethod
    def fit(
        cls, transitions: ArrayLike, num_bins: int = 100, strategy: Strategy = "quantile"
    ) -> Discretizer:
        """Bins of equal mass ("quantile") or equal width ("uniform") for each column.

        Args:
            transitions: (num_steps, transition_dim), finite.
            num_bins: bins per dimension.
            strategy: quantile thresholds are every ceil(num_steps / num_bins)-th sorted value and
                the maximum (discretization.py:13-19), taken in float64.

        Raises:
            ValueError: bad shape, NaN or Inf (with its row and column), or too few rows for
                `num_bins` quantiles; the message names the largest number that works.
        """
        columns = _as_floats("transitions", transitions)
        shape_ok = columns.ndim == 2 and columns.shape[0] >= 1 and columns.shape[1] >= 1
        require(shape_ok, "transitions", "shape (num_steps, transition_dim)", columns.shape)
        _require_finite("transitions", columns)
        return cls.fit_columns(columns.T, num_bins, strategy)

    @classmethod
    def fit_columns(
        cls, columns: Iterable[Floats], num_bins: int = 100, strategy: Strategy = "quantile"
    ) -> Discretizer:
        """`fit` to columns that come one after another, so that only one need be in memory.

        Args:
            columns: (num_steps,) each, at least one; finite.
            num_bins: as in `fit`.
            strategy: as in `fit`.

        Raises:
            ValueError: as `fit`.
        """
        require_int("num_bins", num_bins, 1)
        require_choice("strategy", strategy, ("quantile", "uniform"))
        checked = (_finite_column(column, dim) for dim, column in enumerate(columns))
        if strategy == "uniform":
            bounds = np.array([(column.min(), column.max()) for column in checked])
            require(len(bounds) > 0, "columns", "at least one", "none")
            # in one call: numpy rounds otherwise where any column is constant
            return cls(np.linspace(bounds[:, 0], bounds[:, 1], num_bins + 1))
        thresholds = [_quantile_thresholds(column, num_bins) for column in checked]
        require(len(thresholds) > 0, "columns", "at least one", "none")
        return cls(np.stack(thresholds, axis=1))

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays by name, for a file."""
        found: dict[str, Any] = {"thresholds": self.thresholds}
        if any(self.edge_tolerance):
            found["edge_tolerance"] = np.array(self.edge_tolerance)
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Discretizer:
        """The inverse of `arrays`.

        Raises:
            KeyError: no thresholds.
            ValueError: what `Discretizer` refuses.
        """
        tolerance = np.asarray(arrays.get("edge_tolerance", (0.0, 0.0)))
        require(tolerance.shape == (2,), "edge_tolerance", "two numbers", tolerance.shape)
        return cls(arrays["thresholds"], (tolerance[0].item(), tolerance[1].item()))

    @property
    def num_bins(self) -> int:
        """Bins per dimension."""
        return len(self.thresholds) - 1

    @property
    def transition_dim(self) -> int:
        """Number of dimensions."""
        return int(self.thresholds.shape[1])

    def encode(self, x: ArrayLike, dims: slice = _ALL) -> Tokens:
        """Tokens of values.

        Args:
            x: (n, dims) finite values of the dimensions `dims`; out-of-range ones go to the first
                or last bin.
            dims: which columns of `thresholds` the columns of `x` are.

        Returns:
            (n, dims) int64 tokens in [0, num_bins - 1].
        """
        edges = self.thresholds[:, dims]
        values = _as_floats("x", x)
        shape_ok = values.ndim == 2 and values.shape[1] == edges.shape[1]
        require(shape_ok, "x", f"shape (n, {edges.shape[1]})", values.shape)
        _require_finite("x", values)
        relative, absolute = self.edge_tolerance
        if relative or absolute:
            values += absolute + relative * np.abs(values)
        tokens = np.empty(values.shape, dtype=np.int64)
        for i in range(values.shape[1]):
            tokens[:, i] = np.searchsorted(edges[:, i], values[:, i], side="right") - 1
        return np.clip(tokens, 0, self.num_bins - 1, out=tokens)

    def decode(self, tokens: ArrayLike, dims: slice = _ALL) -> Floats:
        """Midpoints of the tokens' bins; a stop token decodes as bin num_bins - 1.

        Args:
            tokens: (n, dims) integers; outside [0, num_bins - 1] they are clipped, as in
                discretization.py:90-92.
            dims: which dimensions the columns are.

        Returns:
            (n, dims) float64.
        """
        edges = self.thresholds[:, dims]
        ids = np.asarray(tokens)
        require(np.issubdtype(ids.dtype, np.integer), "tokens", "integers", ids.dtype)
        shape_ok = ids.ndim == 2 and ids.shape[1] == edges.shape[1]
        require(shape_ok, "tokens", f"shape (n, {edges.shape[1]})", ids.shape)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        bins = np.clip(ids.astype(np.int64), 0, self.num_bins - 1)
        return np.take_along_axis(midpoints, bins, axis=0)

    def expectation(self, probs: ArrayLike, dim: int) -> Floats:
        """Mean of a distribution over bins, NOT renormalised (discretization.py:107-122).

        Args:
            probs: (n, num_bins) probabilities, the stop token's column already dropped: its mass
                counts as value 0.
            dim: the dimension, may be negative.

        Returns:
            (n,) float64.
        """
        weights = self._check_probs(probs).astype(np.float64)
        edges = self.thresholds[:, self._check_dim(dim)]
        return (weights @ edges[:-1] + weights @ edges[1:]) / 2.0

    def percentile(self, probs: ArrayLike, q: float, dim: int) -> Floats:
        """Percentile of a distribution over bins, as the original takes it.

        With i the first bin whose cumulative probability passes `q`, the result is the midpoint of
        bin i - 1; for i = 0, and where no bin passes, it wraps to (max + min) / 2
        (discretization.py:124-141).

        Args:
            probs: (n, num_bins) probabilities, the stop token's column dropped. Cumulated in their
                own dtype.
            q: in (0, 1).
            dim: the dimension, may be negative.

        Returns:
            (n,) float64.
        """
        require(0.0 < q < 1.0, "q", "a percentile in (0, 1)", q)
        passes = np.cumsum(self._check_probs(probs), axis=-1) > q
        first = np.argmax(passes, axis=-1)  # 0 where none passes
        edges = self.thresholds[:, self._check_dim(dim)]
        midpoints: Floats = (edges[first - 1] + edges[first]) / 2.0
        return midpoints

    def _check_probs(self, probs: ArrayLike) -> NDArray[Any]:
        weights = np.asarray(probs)
        shape_ok = weights.ndim == 2 and weights.shape[1] == self.num_bins
        require(shape_ok, "probs", f"shape (n, {self.num_bins})", weights.shape)
        return weights

    def _check_dim(self, dim: int) -> int:
        inside = -self.transition_dim <= dim < self.transition_dim
        require(inside, "dim", f"one of {self.transition_dim} dimensions", dim)
        return dim

    def __repr__(self) -> str:
        return f"Discretizer(num_bins={self.num_bins}, transition_dim={self.transition_dim})"


def _as_floats(name: str, values: ArrayLike) -> Floats:
    """A float64 copy of array-like numbers."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of numbers: {error}") from error


def _finite_column(column: Floats, dim: int) -> Floats:
    finite = np.isfinite(column)
    if not finite.all():
        row = int(finite.argmin())
        refuse("transitions", "finite numbers", f"{column[row]} at row {row}, column {dim}")
    return column


def _quantile_thresholds(column: Floats, num_bins: int) -> Floats:
    """Every stride-th sorted value and the maximum; (num_bins + 1,)."""
    num_steps = len(column)
    if not _quantiles_exist(num_steps, num_bins):
        fewer = range(min(num_bins, num_steps), 0, -1)
        largest = next(n for n in fewer if _quantiles_exist(num_steps, n))
        expected = f"at most {largest} for {num_steps} rows (the largest that works)"
        refuse("num_bins", expected, num_bins)
    ordered = np.sort(column)
    return np.append(ordered[:: _stride(num_steps, num_bins)], ordered[-1])


def _stride(num_steps: int, num_bins: int) -> int:
    return -(-num_steps // num_bins)


def _quantiles_exist(num_steps: int, num_bins: int) -> bool:
    # sorted[::stride] has num_bins entries only if its last index lies inside
    return (num_bins - 1) * _stride(num_steps, num_bins) < num_steps


def _require_finite(name: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        refuse(name, "finite numbers", f"{values[row, column]} at row {row}, column {column}")
