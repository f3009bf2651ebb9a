"""What plans cost, what they are compared with, and the rows of `tt-fast bench`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import OBSERVATION_DIM, tiny_discretizer, tiny_model
from tiny_case import PLAN, spoil, tiny_case

from tt_fast import bench, measure
from tt_fast.bench import BenchOptions, Judge, Setting
from tt_fast.config import PlanConfig
from tt_fast.measure import Case, Job, Measurement
from tt_fast.planning.cpu import CpuBackend
from tt_fast.planning.reference import ReferenceBackend


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CEILING_SECONDS", 1e-3)


def tiny_job(backend: str = "cpu") -> Job:
    return Job(tiny_case(), backend, PLAN, 4, 10.0, 1)


# ---- what is counted ----


@pytest.mark.parametrize("q", [50.0, 95.0, 99.0])
def test_percentiles_are_numpys_where_the_sample_is_large_enough(q: float) -> None:
    needed = round(100.0 / (100.0 - q))
    values = np.random.default_rng(0).normal(size=needed).tolist()
    assert measure.percentile(values, q) == np.percentile(values, q)
    assert measure.percentile(values[1:], q) is None


@pytest.mark.parametrize(
    ("plan", "num_past"),
    [
        (PLAN, 0),
        (PLAN, 2),
        (replace(PLAN, horizon=4, max_context_transitions=2), 3),
        (replace(PLAN, horizon=3, max_context_transitions=None), 4),
        (replace(PLAN, horizon=2, overflow="grow", max_context_transitions=2), 2),
    ],
)
def test_rows_asked_are_those_that_the_core_counts(plan: PlanConfig, num_past: int) -> None:
    model = tiny_model()
    context_len = num_past * model.config.transition_dim + OBSERVATION_DIM
    case = Case("tiny", model, tiny_discretizer(), (np.zeros(context_len, np.int64),))
    backend = CpuBackend(model, case.discretizer, num_threads=1)
    case.plan(backend, plan, 0)
    assert measure.rows_asked(model, plan, context_len) == backend.stats().rows_asked


def test_torchs_rows_and_operations_are_counted() -> None:
    model = tiny_model()
    tokens = torch.zeros(5, 10, dtype=torch.int64)
    with measure.count_work(model) as (rows, flops), torch.no_grad():
        model(tokens)
    config, num_rows = model.config, 5 * 10
    width = config.embed_dim
    products = config.num_layers * (4 + 8) * width * width
    head_rows = 5 * 2 * config.transition_dim  # padded to whole transitions
    head = head_rows * width * (config.vocab_size + 1)
    attention = config.num_layers * 2 * num_rows * 10 * width
    assert rows.rows == num_rows
    assert flops.flops == 2 * (num_rows * products + head + attention)
    model(tokens)
    assert rows.rows == num_rows  # only meanwhile


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_measurement_holds_together(backend: str) -> None:
    job = tiny_job(backend)
    found = measure.measure(job)
    assert len(found.plan_ms) == 4
    assert min(found.plan_ms) > 0.0
    assert found.rows_asked == measure.rows_asked(job.case.model, job.config, 17)
    assert (found.rows_computed < found.rows_asked) == (backend != "reference")
    assert found.flops > 0.0
    assert found.gflops == pytest.approx(found.flops / np.median(found.plan_ms) * 1e-6)
    assert (found.gemm_gflops is not None) == (backend == "cpu")
    assert found.extra_bytes is None or found.extra_bytes >= 0


def test_time_ends_a_measurement_after_one_plan() -> None:
    assert len(measure.measure(replace(tiny_job(), max_seconds=1e-9)).plan_ms) == 1


def test_a_fresh_process_measures_the_same_plans() -> None:
    here, apart = measure.measure(tiny_job()), measure.measure_apart(tiny_job())
    for name in ("rows_asked", "rows_computed", "flops"):
        assert getattr(apart, name) == getattr(here, name)
    if Path("/proc/self/clear_refs").exists():
        assert apart.extra_bytes is not None


def test_a_failed_process_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CHILD", "raise ValueError('one\\ntwo')")
    expected = r"measurement of the cpu backend \(float32\): exit status 1: two"
    with pytest.raises(ChildProcessError, match=expected):
        measure.measure_apart(tiny_job())


def test_ctrl_c_reaches_this_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other one has a session of its own, and is killed; what it would do later is not done."""
    program = (
        "import os, signal, time; from pathlib import Path\n"
        f"Path({str(tmp_path / 'session')!r}).write_text(str(os.getsid(0)))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(measure, "_CHILD", program)
    with pytest.raises(KeyboardInterrupt):
        measure.measure_apart(tiny_job())
    session = int((tmp_path / "session").read_text())
    assert session != os.getsid(0)
    with pytest.raises(ProcessLookupError):
        os.kill(session, 0)


def test_the_ceiling_is_a_median_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = measure.Ceiling("float32", 1)
    assert ceiling.gflops is None
    ceiling.sample()
    assert ceiling.gflops is not None
    assert ceiling.gflops > 0.0
    monkeypatch.setattr(measure, "is_available", lambda: False)
    without_core = measure.Ceiling("float32", 1)
    without_core.sample()
    assert without_core.gflops is None


# ---- settings and answers ----


@pytest.mark.parametrize("name", ["H5-B32x2", "H15-B128x2", "H5-B32x2-F3"])
def test_settings_have_names(name: str) -> None:
    assert Setting.parse(name).name == name
    assert Setting.parse(f" {name.lower().replace('-', ' ')} ") == Setting.parse(name)


def test_a_setting_is_the_originals_but_for_its_size() -> None:
    setting = Setting.parse("H5-B32x2-F3")
    assert setting == Setting(PlanConfig(horizon=5, beam_width=32, n_expand=2), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H5", "setting: expected a name such as H5-B32x2 or H5-B32x2-F3, got 'H5'"),
        ("H0-B32x2", "horizon: expected an integer >= 1 and <= 1048576, got 0"),
        ("H5-B32x2-F6", "setting: expected F from 1 to the horizon of 5, got 'H5-B32x2-F6'"),
        ("H5-B32x2-F0", "setting: expected F from 1 to the horizon of 5, got 'H5-B32x2-F0'"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting.parse(text)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_right_backend_plans_equally(backend: str) -> None:
    answer = Judge(tiny_case(), PLAN, 1).check(backend, "float32")
    assert (answer.equal_tokens, answer.text) == (1.0, "equal")
    assert abs(answer.score_difference) < 1e-4


def test_bfloat16_says_how_near_it_is() -> None:
    answer = Judge(tiny_case(), PLAN, 1).check("cpu", "bfloat16")
    assert 0.0 <= answer.equal_tokens <= 1.0
    assert answer.text.startswith(f"{answer.equal_tokens:.0%} of tokens, score ")


def test_a_wrong_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, plans=2)
    expected = "backend cpu, float32, tiny H2-B3x2: expected the reference's plans, got ones with"
    with pytest.raises(ValueError, match=expected):
        Judge(tiny_case(), PLAN, 1).check("cpu", "float32")


def test_one_plan_of_two_may_round_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, plans=1)
    answer = Judge(tiny_case(), PLAN, 1).check("cpu", "float32")
    assert answer.text == "equal in 1 of 2 plans"
    assert answer.equal_tokens < 1.0


@pytest.mark.parametrize("shift", [0.5, float("nan")])
def test_wrong_bfloat16_is_an_error(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    spoil(monkeypatch, plans=1, shift=shift)
    with pytest.raises(ValueError, match=r"expected first rewards and values within .* got"):
        Judge(tiny_case(), PLAN, 1).check("cpu", "bfloat16")


def test_the_reference_plans_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = ReferenceBackend.plan, []

    def counted(self: ReferenceBackend, *args: Any, **kwargs: Any) -> Any:
        calls.extend([1] if self.name == "reference" else [])
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceBackend, "plan", counted)
    judge = Judge(tiny_case(), PLAN, 1)
    for backend in ("reference", "torch", "cpu"):
        judge.check(backend, "float32")
    assert len(calls) == 1


# ---- rows of backends ----


def fake(job: Job) -> Measurement:
    """Backends of known speed."""
    milliseconds = {"reference": 100.0, "torch": 10.0, "cpu": 2.0}[job.backend]
    gemm = 8.0 if job.backend == "cpu" else None
    return Measurement((milliseconds,) * job.num_plans, 600.0, 200.0, 4e6, gemm, 3_000_000)


def test_rows_hold_the_measurements() -> None:
    options = BenchOptions(num_threads=1, num_plans=20)
    found = list(
        bench.bench_backends([tiny_case()], [Setting(PLAN)], options, measure=fake, progress=False)
    )
    engines = [(row.backend, row.dtype) for row in found]
    assert engines == bench.engines(PLAN, all_rows=False)
    assert [row.times_reference for row in found] == [1.0, 10.0, 50.0, 50.0]
    assert [row.times_torch for row in found] == [None, 1.0, 5.0, 5.0]
    row = found[2]
    assert (row.task, row.setting, row.num_plans) == ("tiny", "H2-B3x2", 20)
    assert (row.p50_ms, row.p95_ms, row.p99_ms) == (2.0, 2.0, None)
    assert (row.rows_asked, row.rows_computed, row.sharing) == (600.0, 200.0, 3.0)
    assert (row.gflops, row.gemm_gflops, row.extra_mb) == (2.0, 8.0, 3.0)
    assert row.ceiling_gflops is not None
    assert row.percent == pytest.approx(100.0 * row.gflops / row.ceiling_gflops)
    assert row.gemm_percent == pytest.approx(100.0 * 8.0 / row.ceiling_gflops)


def test_the_reference_is_timed_at_small_settings_unless_asked() -> None:
    small, large = PlanConfig(horizon=5, beam_width=32), PlanConfig()
    assert bench.engines(small, all_rows=False)[0] == ("reference", "float32")
    assert bench.engines(large, all_rows=False)[0] == ("torch", "float32")
    assert bench.engines(large, all_rows=True) == bench.engines(small, all_rows=False)


def test_without_the_core_its_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "is_available", lambda: False)
    assert bench.engines(PLAN, all_rows=False) == [("reference", "float32"), ("torch", "float32")]


def test_a_busy_machine_is_warned_of() -> None:
    machine = measure.describe_machine(1) | {"num_processors": 4}
    quiet, busy = (measure.machine_lines(machine | {"load_average": load}) for load in (1.0, 3.0))
    assert busy == f"{quiet}\nwarning: other work runs here (load 3.0); times will be too long"
    assert measure.machine_lines(machine | {"load_average": None}) == quiet


def test_an_official_case_is_the_same_every_time() -> None:
    first, second = bench.make_case("hopper"), bench.make_case("hopper")
    assert len(first.contexts[0]) == 5 * 16 + 11
    np.testing.assert_array_equal(first.contexts[0], second.contexts[0])
    assert torch.equal(first.model.pos_emb, second.model.pos_emb)
    assert bench.make_case("hopper", num_transitions=20).model.config.num_transitions == 20
