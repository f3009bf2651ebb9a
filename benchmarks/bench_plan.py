"""One plan, every backend: `pytest benchmarks/bench_plan.py` (pip install -e ".[bench]").

Groups are task and setting. Each backend first shows that it plans what the reference plans; the
reference itself is timed at the small setting only, as a plan of the large one takes minutes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from common import SETTINGS, TASKS, Case, make_case
from pytest_benchmark.fixture import BenchmarkFixture

from tt_fast import PlanConfig, beam_plan

CASES = [
    pytest.param(task, setting, backend, marks=pytest.mark.benchmark(group=f"{task} {setting}"))
    for task in TASKS
    for setting in SETTINGS
    for backend in ("reference", "torch")
    if (backend, setting) != ("reference", "H15-B128x2")
]


def check(case: Case, config: PlanConfig, backend: str) -> None:
    """The backend's plan of four beams, at this horizon, has the reference's tokens."""
    small = replace(config, beam_width=4)
    want, got = (
        beam_plan(case.model, case.discretizer, case.context, small, backend=name, seed=1)
        for name in ("reference", backend)
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5)


@pytest.mark.parametrize(("task", "setting", "backend"), CASES)
def test_plan(benchmark: BenchmarkFixture, task: str, setting: str, backend: str) -> None:
    case, config = make_case(TASKS[task]), SETTINGS[setting]
    check(case, config, backend)
    benchmark.pedantic(
        beam_plan,
        (case.model, case.discretizer, case.context, config),
        {"backend": backend, "seed": 1},
        rounds=3,
        warmup_rounds=1,
    )
