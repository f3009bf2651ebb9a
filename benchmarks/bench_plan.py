"""One plan, every engine: `pytest benchmarks/bench_plan.py` (pip install -e ".[bench]").

Groups are task and setting. Each engine first shows that it plans what the reference plans. The
reference, and Hugging Face's model in its search, are timed at the small setting only: a plan of
the large one takes minutes. `--benchmark-json FILE` keeps the rows for make_readme.py.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from common import Work, make_row, plan_config
from peers import transformers_backend
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from tt_fast import PlanConfig
from tt_fast.bench import SETTINGS, TASKS, Judge, make_case
from tt_fast.config import Precision
from tt_fast.limits import available_cpus
from tt_fast.measure import Case, Ceiling, count_work, rows_asked
from tt_fast.planning import PlanBackend, make_backend
from tt_fast.planning.cpu import CpuBackend

#: (engine, dtype), plans timed at each setting; 0: none.
ENGINES: dict[tuple[str, Precision], tuple[int, int]] = {
    ("reference", "float32"): (3, 0),
    ("transformers", "float32"): (3, 0),
    ("torch", "float32"): (10, 3),
    ("cpu", "float32"): (100, 20),
    ("cpu", "bfloat16"): (100, 20),
}

CASES = [
    pytest.param(
        task,
        setting,
        *engine,
        rounds[i],
        id="-".join([task, setting, *engine]),
        marks=pytest.mark.benchmark(group=f"{task} {setting}"),
    )
    for task in TASKS
    for i, setting in enumerate(SETTINGS)
    for engine, rounds in ENGINES.items()
    if rounds[i]
]


@pytest.mark.parametrize(("task", "setting", "engine", "dtype", "rounds"), CASES)
def test_plan(
    benchmark: BenchmarkFixture,
    task: str,
    setting: str,
    engine: str,
    dtype: Precision,
    rounds: int,
) -> None:
    case, config = make_case(task), plan_config(setting, dtype)
    backend, model = make_engine(case, engine)
    check(case, config, engine, backend)
    work = warm_up(case, config, backend, model)
    num_threads = torch.get_num_threads()
    if isinstance(backend, CpuBackend):
        backend.reset_stats()
        num_threads = backend.num_threads
    peak = Ceiling(dtype, num_threads)
    peak.sample()
    rounds = 1 if benchmark.disabled else rounds
    plan = partial(case.plan, backend, config, 0)
    benchmark.pedantic(plan, rounds=rounds)  # type: ignore[no-untyped-call]
    peak.sample()
    if benchmark.stats is None:  # --benchmark-disable
        return
    plan_ms = [1000.0 * seconds for seconds in benchmark.stats.stats.data]
    if isinstance(backend, CpuBackend):
        work = Work.of_cpu(backend, len(plan_ms))
    names = {"op": "plan", "task": task, "setting": setting, "dtype": dtype, "engine": engine}
    row = make_row(names, plan_ms, work, peak.gflops, num_threads)
    benchmark.extra_info["row"] = asdict(row)


def make_engine(case: Case, engine: str) -> tuple[PlanBackend, nn.Module]:
    """A backend of ours, or the peer, and the model that it runs if it runs in torch."""
    if engine == "transformers":
        pytest.importorskip("transformers.models.deprecated.trajectory_transformer")
        return transformers_backend(case)
    return make_backend(engine, case.model, case.discretizer), case.model


def check(case: Case, config: PlanConfig, engine: str, backend: PlanBackend) -> None:
    """Plans of a few beams at this horizon are the reference's; the peer's too."""
    if engine != "transformers":
        Judge(case, config, available_cpus()).check(engine, config.dtype)
        return
    small = replace(config, beam_width=4)
    reference = make_backend("reference", case.model, case.discretizer)
    want, got = (case.plan(one, small, 0) for one in (reference, backend))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5)


def warm_up(case: Case, config: PlanConfig, backend: PlanBackend, model: nn.Module) -> Work:
    """One plan that is not timed, what torch computes for it counted."""
    with count_work(model) as (rows, flops):
        case.plan(backend, config, 0)
    return Work(rows_asked(case.model, config, len(case.context(0))), rows.rows, flops.flops)
