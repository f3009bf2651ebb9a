"""benchmarks/: its rows, its table, and Hugging Face's model, which plans as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import make_readme
import numpy as np
import pytest
from common import (
    BEGIN,
    END,
    README,
    Row,
    Work,
    make_row,
    read_rows,
    render,
    with_results,
    write_rows,
)
from tiny_case import PLAN, tiny_case

from tt_fast.planning import make_backend


def example_rows() -> Iterator[Row]:
    names = {"op": "plan", "task": "hopper", "setting": "H5-B32x2", "dtype": "float32"}
    for engine, milliseconds in (("reference", 60.0), ("cpu", 2.0)):
        work = Work(600.0, 200.0, 4e6) if engine == "cpu" else Work()
        plan_ms = [milliseconds - 1.0, milliseconds, milliseconds + 1.0]
        yield make_row({**names, "engine": engine}, plan_ms, work, 20.0, 2)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = list(example_rows())
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    assert (rows[1].gflops, rows[1].percent_of_peak) == (2.0, 10.0)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv: expected columns .* got \['a', 'b'\]"):
        read_rows(tmp_path / "rows.csv")


def test_the_table_compares_with_the_reference(tmp_path: Path) -> None:
    write_rows(tmp_path / "plan.csv", list(example_rows()))
    shown = render(tmp_path).splitlines()
    assert shown[0] == "### plan"
    assert shown[2].endswith("Times as fast as the reference.")
    cells = [cell.strip() for cell in shown[-1].strip("|").split("|")]
    assert cells == [
        "hopper", "H5-B32x2", "plan", "cpu", "float32", "2.00", "1.40 to 2.60", "3", "30.0",
        "600", "200", "2", "10",
    ]  # fmt: skip


def test_the_readme_has_the_table_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_results(text, render()) == text, "run python benchmarks/make_readme.py"
    with pytest.raises(ValueError, match="readme: expected the markers"):
        with_results(text.replace(END, ""), "")
    assert text.count(BEGIN) == 1


def test_rows_come_out_of_pytest_benchmarks_file(tmp_path: Path) -> None:
    rows = list(example_rows())
    runs = [{"extra_info": {"row": asdict(row)}} for row in rows] + [{"extra_info": {}}]
    (tmp_path / "plan.json").write_text(json.dumps({"benchmarks": runs}))
    assert make_readme.rows_of_json(tmp_path / "plan.json") == rows
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan\.json: expected rows of bench_plan\.py, got none"):
        make_readme.rows_of_json(tmp_path / "plan.json")


def test_hugging_faces_model_plans_as_ours() -> None:
    pytest.importorskip("transformers.models.deprecated.trajectory_transformer")
    from peers import transformers_backend

    case = tiny_case()
    peer, _ = transformers_backend(case)
    ours = make_backend("reference", case.model, case.discretizer)
    got, want = (case.plan(backend, PLAN, 0) for backend in (peer, ours))
    np.testing.assert_array_equal(got.tokens, want.tokens)
