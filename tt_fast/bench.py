"""This machine's planning speed: every backend but cuda at a few settings, answers checked.

A row comes from a process of its own (`measure`); the reference judges what is planned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tt_fast.config import DEFAULT_DISCOUNT, ModelConfig, PlanConfig, Precision
from tt_fast.discretizer import Discretizer
from tt_fast.measure import Case, Ceiling, Job, Measurement, measure_apart, percentile
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import BeamPlan, PlanTrace, make_backend
from tt_fast.planning.cpu import is_available
from tt_fast.tables import Column, number, short
from tt_fast.validate import refuse

#: (observation_dim, action_dim) of the tasks that a model with random weights stands for.
TASKS = {"hopper": (11, 3), "halfcheetah": (17, 6)}

#: The original's small and large setting: context 5, cdf_act 0.6 (config/offline.py:55-92).
SETTINGS = ("H5-B32x2", "H15-B128x2")

_SETTING = re.compile(r"H(\d+)[- ]B(\d+)X(\d+)(?:[- ]F(\d+))?")

#: Candidates x steps up to which the reference is timed unasked: those of H5-B32x2.
_SMALL = 5 * 32 * 2

#: Beams of a plan whose tokens are checked, and the plans that are tried.
_CHECKED_BEAMS, _CHECKED_PLANS = 4, 2

#: Beams of a single step whose estimates are compared.
_COMPARED_BEAMS = 64

#: Error that bfloat16 may add to twice that of torch's bfloat16, a share of the bins' range.
_TINY = 1e-3

Measure = Callable[[Job], Measurement]


@dataclass(frozen=True)
class Setting:
    """A plan, and how often one is made."""

    plan: PlanConfig
    plan_freq: int = 1
    """Environment steps between two plans"""

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From a name: H5-B32x2 is horizon 5, beam width 32, 2 children; -F3 plans every 3 steps.

        Raises:
            ValueError: not such a name, or a number that a plan cannot have.
        """
        found = _SETTING.fullmatch(text.strip().upper())
        if found is None:
            refuse("setting", "a name such as H5-B32x2 or H5-B32x2-F3", text)
        horizon, beam_width, n_expand, plan_freq = (int(number or 1) for number in found.groups())
        plan = PlanConfig(horizon=horizon, beam_width=beam_width, n_expand=n_expand)
        if not 1 <= plan_freq <= horizon:
            refuse("setting", f"F from 1 to the horizon of {horizon}", text)
        return cls(plan, plan_freq)

    @property
    def name(self) -> str:
        """What `parse` takes."""
        plan, every = self.plan, f"-F{self.plan_freq}" if self.plan_freq > 1 else ""
        return f"H{plan.horizon}-B{plan.beam_width}x{plan.n_expand}{every}"


@dataclass(frozen=True)
class Answer:
    """How a backend's plan compares with the reference's in float32."""

    equal_tokens: float
    """Share of the tokens"""
    score_difference: float
    text: str
    """In words"""


@dataclass(frozen=True)
class BackendRow:
    """One backend at one setting. What is None is not known, or no such thing exists."""

    task: str
    setting: str
    backend: str
    dtype: str
    num_plans: int
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    times_reference: float | None
    """How many times as fast as the reference"""
    times_torch: float | None
    rows_asked: float
    rows_computed: float
    sharing: float
    """Rows asked / rows computed"""
    gflops: float
    """Of a whole plan"""
    percent: float | None
    """Of the ceiling"""
    gemm_gflops: float | None
    gemm_percent: float | None
    ceiling_gflops: float | None
    """Multiply-adds in registers, measured before and after this row"""
    extra_mb: float | None
    """Resident memory that planning added, 10^6 bytes"""
    equal_tokens: float
    score_difference: float
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class BenchOptions:
    """How long to measure."""

    num_threads: int
    num_plans: int = 200
    """Plans to time per row"""
    max_seconds: float = 20.0
    """Of a row; one plan is always timed"""
    all_rows: bool = False
    """Time the reference at large settings too"""


def make_case(task: str, seed: int = 0, **changes: Any) -> Case:
    """A model of the official size with random weights, and one context of five transitions.

    `changes` are those of its `ModelConfig`.
    """
    rng = np.random.default_rng(seed)
    config = replace(ModelConfig(*TASKS[task]), **changes)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = TrajectoryTransformer(config).eval()
    rows = rng.normal(size=(10_000, config.transition_dim))
    context_len = 5 * config.transition_dim + config.observation_dim
    context = rng.integers(0, config.vocab_size, context_len)
    return Case(task, model, Discretizer.fit(rows, config.vocab_size), (context,))


def bench_backends(
    cases: Sequence[Case],
    settings: Sequence[Setting],
    options: BenchOptions,
    *,
    measure: Measure | None = None,
    progress: bool = True,
) -> Iterator[BackendRow]:
    """Rows of every case at every setting, as they are finished; `measure` None: `measure_apart`.

    Raises:
        ValueError: a backend plans something else than the reference.
        ChildProcessError: a measurement failed.
    """
    plans = [(case, setting.plan) for case in cases for setting in settings]
    total = sum(len(engines(config, options.all_rows)) for _, config in plans)
    with tqdm(total=total, unit="row", disable=not progress) as bar:
        for case, config in plans:
            config = config.with_discount(DEFAULT_DISCOUNT)
            judge = Judge(case, config, options.num_threads)
            p50_ms: dict[str, float] = {}  # of the backends so far
            for backend, dtype in engines(config, options.all_rows):
                bar.set_description(f"{case.name} {Setting(config).name} {backend} {dtype}")
                row = _bench_row(
                    judge, replace(config, dtype=dtype), backend, options, measure or measure_apart
                )
                p50_ms.setdefault(backend, row.p50_ms)
                bar.update()
                yield _add_ratios(row, p50_ms)


def engines(config: PlanConfig, all_rows: bool) -> list[tuple[str, Precision]]:
    """(backend, dtype) of the rows of a setting, slowest first."""
    rows: list[tuple[str, Precision]] = [("reference", "float32"), ("torch", "float32")]
    if is_available():
        rows += [("cpu", "float32"), ("cpu", "bfloat16")]
    is_small = config.num_rows * config.horizon <= _SMALL
    return rows if is_small or all_rows else rows[1:]


class Judge:
    """Compares a backend's plans with the reference's, in plans small enough for the reference."""

    def __init__(self, case: Case, config: PlanConfig, num_threads: int) -> None:
        self.case, self._num_threads = case, num_threads
        self._where = f"{case.name} {Setting(config).name}"
        few = min(_CHECKED_BEAMS, config.beam_width)
        self._whole = replace(config, beam_width=few, dtype="float32")
        self._first_step = replace(config, beam_width=_COMPARED_BEAMS, horizon=1, dtype="float32")
        self._known: dict[tuple[PlanConfig, int], BeamPlan] = {}  # the reference's

    def check(self, backend: str, dtype: Precision) -> Answer:
        """Refuse a backend whose answers are wrong.

        In float32 the tokens must be the reference's. A probability may round to the other side of
        a random number, so if one plan differs a second one decides. In bfloat16 the estimates of a
        first step must be as near to the reference's as those of torch in bfloat16, twice its
        error.

        Raises:
            ValueError: wrong tokens, or estimates too far away.
        """
        if backend == "reference":
            return Answer(1.0, 0.0, "the judge")
        if dtype == "float32":
            return self._check_tokens(backend)
        self._check_estimates(backend, dtype)
        got, want = self._plan(backend, self._whole, 0, dtype), self._reference(self._whole, 0)
        share, difference = _equal_tokens(got, want), _score_difference(got, want)
        return Answer(share, difference, f"{share:.0%} of tokens, score {difference:+.2g}")

    def _check_tokens(self, backend: str) -> Answer:
        shares = []
        for plan_idx in range(_CHECKED_PLANS):
            got = self._plan(backend, self._whole, plan_idx)
            want = self._reference(self._whole, plan_idx)
            shares.append(_equal_tokens(got, want))
            if shares[-1] == 1.0 and np.allclose(got.scores, want.scores, rtol=1e-5, atol=1e-6):
                text = "equal" if plan_idx == 0 else f"equal in 1 of {len(shares)} plans"
                return Answer(shares[0], _score_difference(got, want), text)
        told = " and ".join(f"{share:.0%}" for share in shares)
        raise ValueError(
            f"backend {backend}, float32, {self._where}: expected the reference's plans, got ones "
            f"with {told} of its tokens, or with other scores"
        )

    def _check_estimates(self, backend: str, dtype: Precision) -> None:
        want = self._reference(self._first_step, 0)
        error = self._error(self._plan(backend, self._first_step, 0, dtype), want)
        rounded = self._reference(replace(self._first_step, dtype=dtype), 0)
        allowed = 2.0 * self._error(rounded, want) + _TINY
        if not (error <= allowed and math.isfinite(error)):
            raise ValueError(
                f"backend {backend}, {dtype}, {self._where}: expected first rewards and values "
                f"within {allowed:.2g} of the bins' range of the reference's, got {error:.2g}"
            )

    def _error(self, got: BeamPlan, want: BeamPlan) -> float:
        """Largest difference of a first reward or value, as a share of the bins' range.

        Of the candidates with the same tokens so far; infinite if there is none.
        """
        left, right = _trace_of(got), _trace_of(want)
        num_given = self.case.model.config.action_dim + 1  # actions and the reward
        drawn = zip(left.drawn[:num_given], right.drawn[:num_given], strict=True)
        same = np.logical_and.reduce([a == b for a, b in drawn])
        edges = self.case.discretizer.thresholds[:, -2:]
        reward_range, value_range = np.maximum(edges[-1] - edges[0], 1e-12)
        rewards = np.abs(left.rewards[0] - right.rewards[0])[same] / reward_range
        values = np.abs(left.values[0] - right.values[0])[same] / value_range
        return float(np.maximum(rewards, values).max(initial=0.0)) if same.any() else math.inf

    def _reference(self, config: PlanConfig, plan_idx: int) -> BeamPlan:
        key = config, plan_idx
        if key not in self._known:
            self._known[key] = self._plan("reference", config, plan_idx)
        return self._known[key]

    def _plan(
        self, backend: str, config: PlanConfig, plan_idx: int, dtype: Precision | None = None
    ) -> BeamPlan:
        case, threads = self.case, self._num_threads if backend == "cpu" else None
        made = make_backend(backend, case.model, case.discretizer, num_threads=threads)
        config = config if dtype is None else replace(config, dtype=dtype)
        return case.plan(made, config, plan_idx, trace=True)


BACKEND_COLUMNS = (
    Column("backend", -9, lambda row: row.backend),
    Column("dtype", -8, lambda row: row.dtype),
    Column("plans", 5, lambda row: str(row.num_plans)),
    Column("p50 ms", 7, lambda row: short(row.p50_ms)),
    Column("p95", 6, lambda row: short(row.p95_ms)),
    Column("p99", 6, lambda row: short(row.p99_ms)),
    Column("x ref.", 6, lambda row: short(row.times_reference)),
    Column("x torch", 7, lambda row: short(row.times_torch)),
    Column("asked", 7, lambda row: number(row.rows_asked)),
    Column("computed", 8, lambda row: number(row.rows_computed)),
    Column("sharing", 7, lambda row: number(row.sharing, 2)),
    Column("GFLOP/s", 7, lambda row: number(row.gflops)),
    Column("%", 3, lambda row: number(row.percent)),
    Column("products", 8, lambda row: number(row.gemm_gflops)),
    Column("%", 3, lambda row: number(row.gemm_percent)),
    Column("MB", 6, lambda row: number(row.extra_mb, 1)),
    Column("answer", -1, lambda row: row.answer),
)

_LEGEND = """\
p50, p95, p99: milliseconds of a plan; - where there are too few plans. x ref., x torch: times as
fast. asked: rows (tokens) that a cached search without sharing runs through the model; computed:
rows that went through it; sharing: asked / computed. GFLOP/s: of a whole plan; products: inside
matrix products, all threads; % of the ceiling. MB: resident memory that planning adds. answer: a
plan of a few beams beside the reference's; in bfloat16 a draw may fall into the next bin, and from
there on the plans differ."""


def notes(rows: Sequence[BackendRow], options: BenchOptions) -> str:
    """The ceilings, why some rows have fewer plans than asked, and what the columns mean."""
    lines = [f"ceiling (multiply-adds in registers, all threads): {_ceilings(rows)}"]
    if any(row.num_plans < options.num_plans for row in rows):
        wanted = f"rows with fewer than {options.num_plans} plans"
        lines.append(f"{wanted} ended after {options.max_seconds:g} s")
    return "\n".join([*lines, _LEGEND])


def _ceilings(rows: Sequence[BackendRow]) -> str:
    parts = []
    for dtype in ("float32", "bfloat16"):
        found = [row.ceiling_gflops for row in rows if row.dtype == dtype and row.ceiling_gflops]
        if found:
            spread = f"{min(found):.0f} to {max(found):.0f} over the rows"
            parts.append(f"{np.median(found):.0f} GFLOP/s in {dtype} ({spread})")
    return ", ".join(parts) or "unknown without the C++ core"


def _bench_row(
    judge: Judge, config: PlanConfig, backend: str, options: BenchOptions, measure: Measure
) -> BackendRow:
    answer = judge.check(backend, config.dtype)
    ceiling = Ceiling(config.dtype, options.num_threads)
    ceiling.sample()
    limits = options.num_plans, options.max_seconds, options.num_threads
    found = measure(Job(judge.case, backend, config, *limits))
    ceiling.sample()
    return BackendRow(
        task=judge.case.name,
        setting=Setting(config).name,
        backend=backend,
        dtype=config.dtype,
        num_plans=len(found.plan_ms),
        p50_ms=found.p50_ms,
        p95_ms=percentile(found.plan_ms, 95.0),
        p99_ms=percentile(found.plan_ms, 99.0),
        times_reference=None,
        times_torch=None,
        rows_asked=found.rows_asked,
        rows_computed=found.rows_computed,
        sharing=found.rows_asked / found.rows_computed,
        gflops=found.gflops,
        percent=_percent(found.gflops, ceiling.gflops),
        gemm_gflops=found.gemm_gflops,
        gemm_percent=_percent(found.gemm_gflops, ceiling.gflops),
        ceiling_gflops=ceiling.gflops,
        extra_mb=None if found.extra_bytes is None else found.extra_bytes * 1e-6,
        equal_tokens=answer.equal_tokens,
        score_difference=answer.score_difference,
        answer=answer.text,
    )


def _add_ratios(row: BackendRow, p50_ms: Mapping[str, float]) -> BackendRow:
    reference, torch_ms = (p50_ms.get(name) for name in ("reference", "torch"))
    return replace(
        row,
        times_reference=None if reference is None else reference / row.p50_ms,
        times_torch=None if torch_ms is None else torch_ms / row.p50_ms,
    )


def _percent(rate: float | None, ceiling: float | None) -> float | None:
    return None if rate is None or ceiling is None else 100.0 * rate / ceiling


def _trace_of(plan: BeamPlan) -> PlanTrace:
    assert plan.trace is not None
    return plan.trace[0]


def _equal_tokens(got: BeamPlan, want: BeamPlan) -> float:
    return float(np.mean(got.tokens == want.tokens))


def _score_difference(got: BeamPlan, want: BeamPlan) -> float:
    return float(got.scores[0] - want.scores[0])
