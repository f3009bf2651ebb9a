"""What the benchmarks share: plans, the row that each of them writes, the table of all rows."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tt_fast import PlanConfig
from tt_fast.bench import Setting
from tt_fast.checkpoint import origin
from tt_fast.config import DEFAULT_DISCOUNT, Precision
from tt_fast.files import atomic_write
from tt_fast.measure import processor_name
from tt_fast.planning.cpu import CpuBackend, available_isas
from tt_fast.tables import csv_text, number, short

FOLDER = Path(__file__).parent
RESULTS, README = FOLDER / "results", FOLDER / "README.md"

#: What the table stands between in README.md.
BEGIN, END = "<!-- results: made by make_readme.py -->", "<!-- end of results -->"

_TITLES = (
    "task", "setting", "op", "engine", "dtype", "median ms", "p20 to p80", "runs", "times as fast",
    "rows asked", "rows computed", "GFLOP/s", "% of peak",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one engine took. None: not known, or there is no such thing."""

    op: str
    """What was done: "plan", or "plan, grow" """
    task: str
    setting: str
    dtype: str
    engine: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    num_runs: int
    rows_asked: float | None
    """Tokens of a plan that a cached search without any sharing runs through the model"""
    rows_computed: float | None
    """Tokens of a plan that went through the model"""
    gflops: float | None
    """GFLOP/s of a whole plan, on the rows computed"""
    percent_of_peak: float | None
    """Of multiply-adds in registers, measured in the same run"""
    device: str
    torch_version: str
    commit: str | None
    date: str


@dataclass(frozen=True)
class Work:
    """What one plan does. None: not counted."""

    rows_asked: float | None = None
    rows_computed: float | None = None
    flops: float | None = None
    """Floating point operations of the rows computed"""

    @classmethod
    def of_cpu(cls, backend: CpuBackend, num_plans: int) -> Work:
        """Mean over the plans since `reset_stats`."""
        stats = backend.stats()
        totals = stats.rows_asked, stats.rows_computed, stats.flops
        return cls(*(total / num_plans for total in totals))


def plan_config(setting: str, dtype: Precision = "float32") -> PlanConfig:
    """The plan of a name such as H5-B32x2: context 5, cdf_act 0.6, k_obs 1 as in the original."""
    plan = Setting.parse(setting).plan.with_discount(DEFAULT_DISCOUNT)
    return replace(plan, dtype=dtype)


def make_row(
    names: Mapping[str, str],
    plan_ms: Sequence[float],
    work: Work,
    peak_gflops: float | None,
    num_threads: int,
) -> Row:
    """A row of today, this machine and this commit; `names`: op, task, setting, dtype, engine."""
    p20, median, p80 = (float(value) for value in np.percentile(plan_ms, (20, 50, 80)))
    gflops = None if work.flops is None else work.flops / median * 1e-6
    known = gflops is not None and peak_gflops is not None
    isa = next(iter(available_isas()), "no C++ core")
    return Row(
        **names,
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        num_runs=len(plan_ms),
        rows_asked=work.rows_asked,
        rows_computed=work.rows_computed,
        gflops=gflops,
        percent_of_peak=100.0 * gflops / peak_gflops if known else None,  # type: ignore[operator]
        device=f"{processor_name()}, {num_threads} threads, {isa}",
        torch_version=torch.__version__,
        commit=origin()["git_commit"],
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(csv_text([asdict(row) for row in rows]), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file of `write_rows`.

    Raises:
        ValueError: other columns, or words where numbers belong.
    """
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    wanted = {field.name for field in fields(Row)}
    for record in records:
        if set(record) != wanted:
            raise ValueError(f"{path}: expected columns {sorted(wanted)}, got {sorted(record)}")
    return [Row(**{name: _value(name, text) for name, text in r.items()}) for r in records]


def _value(name: str, text: str) -> Any:
    kinds: dict[str, str] = {field.name: str(field.type) for field in fields(Row)}
    kind = kinds[name]
    if text == "" and "None" in kind:
        return None
    return int(text) if kind == "int" else float(text) if "float" in kind else text


# ---- the README's table ----


def render(folder: Path = RESULTS) -> str:
    """Markdown of every CSV file in a folder: a heading, where it was measured, a table."""
    parts = []
    for path in sorted(folder.glob("*.csv")):
        rows = read_rows(path)
        parts.append(f"### {path.stem}\n\n{_origin(rows)}\n\n{_table(rows)}")
    return "\n\n".join(parts)


def with_results(readme: str, results: str) -> str:
    """The README's text with `results` between its two markers.

    Raises:
        ValueError: a marker is missing.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"readme: expected the markers {BEGIN!r} and {END!r}, got others")
    return f"{head}{BEGIN}\n\n{results}\n\n{END}{tail}"


def _origin(rows: Sequence[Row]) -> str:
    """Where and when, one line a combination."""
    lines = {
        f"{row.device}; torch {row.torch_version}; commit {(row.commit or 'unknown')[:12]}; "
        f"{row.date}. Times as fast as the {_baseline(rows)}."
        for row in rows
    }
    return "\n".join(sorted(lines))


def _baseline(rows: Iterable[Row]) -> str:
    return "original" if any(row.engine == "original" for row in rows) else "reference"


def _table(rows: Sequence[Row]) -> str:
    base = {(r.task, r.setting): r.median_ms for r in rows if r.engine == _baseline(rows)}
    lines = [_line(_TITLES), _line(["---"] * 5 + ["---:"] * (len(_TITLES) - 5))]
    for row in rows:
        ratio = base.get((row.task, row.setting), math.nan) / row.median_ms
        lines.append(_line(_cells(row, None if math.isnan(ratio) else ratio)))
    return "\n".join(lines)


def _cells(row: Row, ratio: float | None) -> list[str]:
    return [
        row.task, row.setting, row.op, row.engine, row.dtype,
        short(row.median_ms), f"{short(row.p20_ms)} to {short(row.p80_ms)}", str(row.num_runs),
        short(ratio), number(row.rows_asked), number(row.rows_computed),
        number(row.gflops), number(row.percent_of_peak),
    ]  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
