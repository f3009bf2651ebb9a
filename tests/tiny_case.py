"""A case to plan from in milliseconds, and a way to make a backend wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast.config import PlanConfig
from tt_fast.measure import Case
from tt_fast.planning.cpu import CpuBackend

PLAN = PlanConfig(horizon=2, beam_width=3, discount=0.9)


def tiny_case() -> Case:
    """Two contexts of two transitions."""
    model, rng = tiny_model(), np.random.default_rng(1)
    context_len = 2 * model.config.transition_dim + OBSERVATION_DIM
    contexts = rng.integers(0, NUM_BINS, (2, context_len))
    return Case("tiny", model, tiny_discretizer(), tuple(contexts))


def spoil(monkeypatch: pytest.MonkeyPatch, *, plans: int, shift: float = 0.0) -> None:
    """The first so many plans of the cpu backend have another first token, or other rewards."""
    plan, calls = CpuBackend.plan, []

    def wrong(self: CpuBackend, *args: Any, **kwargs: Any) -> Any:
        found = plan(self, *args, **kwargs)
        calls.append(1)
        if len(calls) > plans:
            return found
        if shift:
            (trace,) = found.trace or ()
            return replace(found, trace=(replace(trace, rewards=trace.rewards + shift),))
        found.tokens[0, 0, 0] = (found.tokens[0, 0, 0] + 1) % NUM_BINS
        return found

    monkeypatch.setattr(CpuBackend, "plan", wrong)
