"""Small plans of the C++ backend, for its tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast import PlanConfig
from tt_fast.planning import BeamPlan
from tt_fast.planning.base import Draws
from tt_fast.planning.cpu import CpuBackend

D = OBSERVATION_DIM + ACTION_DIM + 2
CONFIG = PlanConfig(5, 6, 3, max_context_transitions=3, discount=0.9)
DRAWS = Draws((7,), (0,))


def context(num_past: int = 2, seed: int = 0) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, NUM_BINS, num_past * D + OBSERVATION_DIM)


def tiny_backend(seed: int = 0, **options: Any) -> CpuBackend:
    return CpuBackend(tiny_model(seed), tiny_discretizer(), **options)


def assert_same_plan(got: BeamPlan, want: BeamPlan) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(got.rewards, want.rewards)
    np.testing.assert_array_equal(got.values, want.values)


def mean_values(probs: NDArray[np.float32]) -> tuple[Any, Any]:
    """What the "mean" estimate computes."""
    discretizer = tiny_discretizer()
    return (
        discretizer.expectation(probs[:, 0, :-1], -2),
        discretizer.expectation(probs[:, 1, :-1], -1),
    )
