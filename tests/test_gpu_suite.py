"""benchmarks/gpu_suite.sh: its benchmarks in the interpreter, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu
import bench_gpu_kernels
import bench_training
import gpu_common
import gpu_path
import gpu_report
import gpu_shard
import pytest
import torch
from gpu_common import COLUMNS, WrongAnswer

from tt_fast.planning.cuda import CudaBackend

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself runs on a GPU"),
]


@pytest.fixture(autouse=True)
def _few_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan in float32 of one environment."""
    job = bench_gpu.Job("hopper", "H2-B2x2", "fp32", 1)
    monkeypatch.setattr(bench_gpu, "jobs", lambda: [job])
    monkeypatch.setattr(bench_gpu, "tasks", lambda: ("hopper",))
    monkeypatch.setattr(bench_gpu, "DTYPES", ("fp32",))
    monkeypatch.setattr(bench_gpu, "PARITY", ("fp32", "bf16"))
    monkeypatch.setattr(bench_gpu_kernels, "DTYPES", ("bf16",))
    # quick_interpreter does, and undoes it
    monkeypatch.setattr(bench_gpu, "hurry_interpreter", lambda: None)


def records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


def test_a_dry_run_fills_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("first", "ceilings", "plans", "decode"):
        assert bench_gpu.main([part, "--out", str(tmp_path)]) == 0
    assert bench_gpu_kernels.main(["--out", str(tmp_path)]) == 0
    ours, theirs = records(tmp_path / "plans.csv")
    assert (ours["op"], ours["engine"], theirs["engine"]) == ("plan", "cuda", "torch")
    assert float(ours["plans_per_s"]) == pytest.approx(1000.0 / float(ours["median_ms"]))
    (first,) = records(tmp_path / "first.csv")
    assert ours["first_plan_s"] == first["first_plan_s"] != ""
    assert ours["p99_ms"] == ""  # of so few plans nobody knows
    assert records(tmp_path / "ceilings.csv") == []
    names = {record["op"] for record in records(tmp_path / "kernels.csv")}
    assert {"rank", "advance", "mlp", "segment, action", "prefill, all layers"} <= names
    environment = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert {"device", "torch", "triton", "commit", "python"} <= environment.keys()
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path)])
    gpu_report.main()
    assert len(records(tmp_path / "results.csv")) == 4 + len(records(tmp_path / "kernels.csv"))


def train_steps(folder: Path) -> int:
    """The training part, of one task."""
    return bench_training.main(["--device", "cuda", "--task", "hopper", "--out", str(folder)])


def test_a_dry_run_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_steps(tmp_path) == 0
    assert "hopper: loss and gradients are right in float32 and bfloat16" in capsys.readouterr().out
    found = gpu_report.steps(records(tmp_path / "training.csv"))
    engines = [("torch", "fp32"), ("cuda", "fp32"), ("torch", "bf16"), ("cuda", "bf16")]
    assert [(step["engine"], step["dtype"]) for step in found] == engines
    assert found[0]["times_as_fast"] == 1.0
    rates = [step["tokens_per_s"] for step in found]
    assert found[1]["times_as_fast"] == pytest.approx(rates[1] / rates[0])


def test_steps_count_tokens() -> None:
    row = gpu_common.make_row(
        "train step", [500.0], shape="hopper 3+2", setting="batch 2", dtype="fp32", engine="torch"
    )
    record = {k: "" if v is None else str(v) for k, v in asdict(row).items()}
    (found,) = gpu_report.steps([record, {**record, "op": "plan"}])
    assert found["tokens_per_s"] == 2 * 2 * (10 * 7 - 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_losses_are_not_timed(
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    token_losses = bench_training.fused_loss.token_losses

    def spoilt(*args: Any) -> torch.Tensor:
        rounds = torch.is_autocast_enabled("cpu")
        return token_losses(*args) * (1.05 if rounds == (dtype == "bf16") else 1.0)

    monkeypatch.setattr(bench_training.fused_loss, "token_losses", spoilt)
    assert train_steps(tmp_path) == 1
    assert f"wrong answer: hopper {dtype}: " in capsys.readouterr().out
    assert records(tmp_path / "training.csv") == []


def test_training_without_a_gpu_needs_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_training.main([])
    assert "--original is needed" in capsys.readouterr().err


def test_right_answers_pass_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["parity", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("right") == 2


@pytest.mark.parametrize(("part", "wrong"), [("parity", "tokens"), ("plans", "rewards")])
def test_a_wrong_answer_fails(
    part: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = CudaBackend.plan

    def spoilt(self: CudaBackend, *args: Any, **kwargs: Any) -> Any:
        found = plan(self, *args, **kwargs)
        if wrong == "rewards":
            return replace(found, rewards=found.rewards + 0.5)
        return replace(found, tokens=(found.tokens + 1) % 8)

    monkeypatch.setattr(CudaBackend, "plan", spoilt)
    assert bench_gpu.main([part, "--out", str(tmp_path)]) == 1
    assert "wrong answer: hopper fp32: expected" in capsys.readouterr().out
    assert records(tmp_path / f"{part}.csv") == []


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_gpu_kernels.make_bench("fp32", 1)
    bench_gpu_kernels.check_dense(bench, "fp32")
    monkeypatch.setattr(bench_gpu_kernels, "mlp", lambda *args: None)
    with pytest.raises(WrongAnswer, match="mlp fp32: expected an error up to"):
        bench_gpu_kernels.check_dense(bench, "fp32")


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.op: row for row in bench_gpu.ceiling_rows(1024, 64, 256)}
    assert set(rows) == {"copy", "resident read", "product"}
    copied = rows["copy"]
    assert copied.rate == pytest.approx(1024 * 8 / copied.median_ms * 1e-6)
    monkeypatch.setattr(bench_gpu.torch, "equal", lambda *_: False)
    with pytest.raises(WrongAnswer, match="copy"):
        list(bench_gpu.ceiling_rows(16, 16, 16))


def test_the_floor_counts_tokens_and_weights() -> None:
    case, config = gpu_common.gpu_case("hopper"), gpu_common.config_of("H2-B2x2", "fp32")
    floor = gpu_common.plan_floor(case.model, config, len(case.context(0)))
    matrices = 2 * 12 * 32**2 + 32 * 9
    assert floor.tokens == 2 * (2 + 2) + 3
    assert floor.rows == 2 * 4 * (2 + 2) + 2 * 3
    assert floor.flops == 2.0 * floor.rows * matrices
    assert floor.weight_bytes == floor.tokens * 4 * matrices
    assert floor.milliseconds(1e-3, 1e9) == pytest.approx(floor.flops * 1e-6)
    assert floor.milliseconds(1e9, 1.0) == pytest.approx(floor.weight_bytes * 1e-6)


def test_shares_of_the_floor_need_ceilings() -> None:
    names = {"dtype": "fp32", "engine": "cuda"}
    plan = gpu_common.make_row("plan", [2.0], shape="hopper 3+2", setting="H2-B2x2", **names)
    rates = [
        gpu_common.make_row(op, [1.0], rate=1.0, **names) for op in ("product", "resident read")
    ]
    rows = [{k: "" if v is None else str(v) for k, v in asdict(r).items()} for r in (plan, *rates)]
    assert gpu_report.floors(rows[:1]) == []
    (found,) = gpu_report.floors(rows)
    assert found["share_of_floor"] == pytest.approx(found["floor_ms"] / 2.0)


def fake_test(name: str) -> Any:
    """As much of a pytest item as a shard asks for."""
    skips = "kernels/" in name
    return SimpleNamespace(
        nodeid=name,
        path=Path(name.partition("::")[0]),
        get_closest_marker=lambda marker: object() if skips else None,
    )


def test_shards_keep_parameters_together() -> None:
    functions = {"test_cuda.py::a": 13, "test_cuda.py::b": 3, "test_head_loss.py::c": 12}
    functions |= {f"test_cuda.py::alone{i}": 1 for i in range(20)} | {"kernels/test_mlp.py::d": 99}
    tests = [fake_test(f"{name}[{i}]") for name, n in functions.items() for i in range(n)]
    shards = gpu_shard.deal(tests, 6)
    assert sorted(t.nodeid for s in shards for t in s) == sorted(t.nodeid for t in tests)
    weights = [gpu_shard.weight(shard) for shard in shards]
    assert max(weights) <= 1.3 * sum(weights) / 6
    names = [{test.nodeid.partition("[")[0] for test in shard} for shard in shards]
    where = {name: sum(name in shard for shard in names) for name in functions}
    assert {name for name, count in where.items() if count > 1} == {"test_cuda.py::a"}
    assert where["test_cuda.py::a"] == 2  # all 13 would take longer than any other shard


def test_what_compiles_needs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[tuple[str, str]] = []
    monkeypatch.setattr(bench_gpu, "is_interpreted", lambda: False)
    monkeypatch.setattr(bench_gpu, "DTYPES", ("bf16", "fp32"))
    monkeypatch.setattr(bench_gpu, "decode_row", lambda *row: rows.append(row))
    table = SimpleNamespace(add=lambda row: None)
    bench_gpu.decode(table, bench_gpu.Clock(60.0), tmp_path)
    assert rows[0] == ("bf16", "torch.compile")
    assert len(rows) == 4
    rows.clear()
    bench_gpu.decode(table, bench_gpu.Clock(20.0), tmp_path)
    assert rows == [("bf16", "torch"), ("fp32", "torch")]
    assert "left out: bf16 torch.compile" in capsys.readouterr().out


def test_the_commit_is_gits() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", gpu_common.commit())


def test_the_package_is_importable_without_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_path, "is_importable", lambda package: False)
    found = gpu_path.build(tmp_path)
    assert found["stand_ins"] == list(gpu_path.UNUSED)
    code = """
import bench_gpu_kernels, tt_fast, tt_fast.kernels.segment as segment
print(tt_fast.__file__, segment.__file__)
from tqdm.auto import tqdm
try:
    tqdm(total=1)
except ImportError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), str(gpu_path.ROOT / "benchmarks")])
    # -S would hide torch too; the folder comes before what is installed
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "tt_fast")) == 2
    assert "tqdm.auto.tqdm: expected an installed tqdm.auto, got none" in done.stdout
