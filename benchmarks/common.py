"""What the benchmarks measure: models of the official size and the original's planner settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tt_fast import Discretizer, ModelConfig, PlanConfig, TrajectoryTransformer


@dataclass(frozen=True)
class Task:
    """Widths of an environment."""

    observation_dim: int
    action_dim: int


TASKS = {"hopper": Task(11, 3), "halfcheetah": Task(17, 6)}

#: Context 5, cdf_act 0.6, k_obs 1 in all of them: config/offline.py:55-80 and 88-92.
SETTINGS = {
    "H5-B32x2": PlanConfig(horizon=5, beam_width=32),
    "H15-B128x2": PlanConfig(horizon=15, beam_width=128),
}


@dataclass(frozen=True)
class Case:
    """A model with random weights, bins of normal data and a context of five transitions."""

    model: TrajectoryTransformer
    discretizer: Discretizer
    context: NDArray[np.int64]
    """(1, 5 * transition_dim + observation_dim) tokens"""


def make_case(task: Task, seed: int = 0) -> Case:
    """The same case for the same seed."""
    rng = np.random.default_rng(seed)
    config = ModelConfig(task.observation_dim, task.action_dim)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = TrajectoryTransformer(config).eval()
    rows = rng.normal(size=(10_000, config.transition_dim))
    context_len = 5 * config.transition_dim + config.observation_dim
    context = rng.integers(0, config.vocab_size, (1, context_len))
    return Case(model, Discretizer.fit(rows, config.vocab_size), context)
