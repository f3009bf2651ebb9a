"""`tt-fast bench`: what it prints and writes, and how it fails."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TOY, refuse, run, save_model
from tiny_case import spoil, tiny_case

from tt_fast import bench, measure
from tt_fast.checkpoint import Checkpoint
from tt_fast.config import PlanConfig
from tt_fast.evaluate import evaluate
from tt_fast.measure import Job, Measurement
from tt_fast.planning import Planner


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, and a tiny model where the official one would be."""
    monkeypatch.setattr(bench, "measure_apart", measure.measure)
    monkeypatch.setattr(measure, "_CEILING_SECONDS", 1e-3)
    monkeypatch.setattr(bench, "make_case", lambda task: replace(tiny_case(), name=task))


SMALL = ["--setting", "H2-B3x2", "--plans", 3, "--threads", 1, "--no-progress"]


@pytest.mark.usefixtures("here")
def test_bench_prints_and_writes_a_table(capsys: Any, tmp_path: Path) -> None:
    files = {"json": tmp_path / "new" / "rows.json", "csv": tmp_path / "rows.csv"}
    run("bench", *SMALL, "--json", files["json"], "--csv", files["csv"])
    shown = capsys.readouterr().out.splitlines()
    assert "1 threads" in shown[0]
    assert "torch" in shown[1]
    heading = next(i for i, line in enumerate(shown) if line.startswith("backend"))
    titles = "backend dtype plans p50 ms p95 p99 x ref. x torch asked computed sharing GFLOP/s %"
    assert " ".join(shown[heading].split()) == f"{titles} products % MB answer"
    table = [line.split() for line in shown[heading + 1 : heading + 11]]
    names = [
        ["reference", "float32"],
        ["torch", "float32"],
        ["cpu", "float32"],
        ["cpu", "bfloat16"],
    ]
    assert [line[:2] for line in table[1:5]] == names
    assert (table[0], table[5]) == (["hopper", "H2-B3x2"], ["halfcheetah", "H2-B3x2"])
    assert table[3][-1] == "equal"
    assert "ceiling (multiply-adds in registers, all threads): " in shown[heading + 11]

    written = json.loads(files["json"].read_text())
    assert written["machine"]["num_threads"] == 1
    assert [row["backend"] for row in written["backends"]] == 2 * [name for name, _ in names]
    assert written["returns"] == []
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["hopper"] * 4 + ["halfcheetah"] * 4
    assert float(rows[2]["p50_ms"]) == written["backends"][2]["p50_ms"]
    assert rows[0]["p99_ms"] == ""


@pytest.mark.usefixtures("here")
def test_bench_ends_with_a_wrong_answer(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, plans=9)
    shown = refuse(capsys, "bench", *SMALL, "--task", "hopper")
    assert shown.startswith("backend cpu, float32, hopper H2-B3x2: expected the reference's plans")


@pytest.mark.usefixtures("here")
def test_bench_interrupted(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(job: Job) -> Measurement:
        if job.backend == "cpu":
            raise KeyboardInterrupt
        return measure.measure(job)

    monkeypatch.setattr(bench, "measure_apart", measured)
    run("bench", *SMALL, status=130)
    assert capsys.readouterr().err == "tt-fast: interrupted: nothing was written\n"
    out = tmp_path / "rows.json"
    run("bench", *SMALL, "--json", out, status=130)
    message = f"tt-fast: interrupted: the finished rows (2) are in {out}\n"
    assert capsys.readouterr().err == message
    assert len(json.loads(out.read_text())["backends"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plans", 0], "plans: expected an integer >= 1, got 0"),
        (["--seconds", 0], "seconds: expected a number in (0.0, inf), got 0.0"),
        (["--threads", 0], "threads: expected an integer >= 1, got 0"),
        (["--setting", "fast"], "setting: expected a name such as H5-B32x2 or H5-B32x2-F3, got 'f"),
        (["--setting", "H5-B32x2-F3"], "setting: expected a plan at every step (no -F) without"),
        (["--plot", "x.png"], "plot: expected None without --checkpoint, got 'x.png'"),
        (["--plot", "x.txt"], "suffix of plot: expected one of '.png', '.pdf', '.svg', got '.txt'"),
        (["--env-id", "Hopper-v4"], "env_id: expected None without --checkpoint, got 'Hopper-v4'"),
        (["--episodes", 3], "episodes: expected 2, without --checkpoint, got 3"),
        (["--seed", 3], "seed: expected 0, without --checkpoint, got 3"),
        (
            ["--dtype", "bfloat16"],
            "dtype: expected float32, without --checkpoint, got 'bfloat16'",
        ),
        (["--max-steps", 3], "max_steps: expected None, without --checkpoint, got 3"),
        (["--checkpoint", "x", "--task", "hopper"], "task: expected none with --checkpoint, got"),
        (["--json", "."], "json: expected the name of a file, got 'the folder .'"),
        (["--checkpoint", "none"], "none: expected a checkpoint"),
    ],
)
def test_bench_refuses_in_one_line(capsys: Any, words: list[Any], message: str) -> None:
    assert refuse(capsys, "bench", *words).startswith(message)


@pytest.mark.usefixtures("here")
def test_bench_of_a_checkpoint(capsys: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "model", ref_scores=[0.0, 50.0])
    out, plot = tmp_path / "rows", tmp_path / "plot.svg"
    argv = ["bench", "--checkpoint", tmp_path / "model", "--setting", "H2-B3x2", "H2-B3x2-F2"]
    argv += ["--plans", 3, "--threads", 1, "--no-progress", "--plot", plot]
    run(*argv, "--json", f"{out}.json", "--csv", f"{out}.csv", "--episodes", 2, "--seed", 1)
    shown = capsys.readouterr().out.splitlines()
    assert f"{TOY} H2-B3x2" in shown
    heading = next(i for i, line in enumerate(shown) if line.startswith("setting"))
    titles = ["setting", "plans", "p50", "ms", "p95", "p99", "ms/step", "return", "score", "length"]
    assert shown[heading].split() == titles
    assert [line.split()[0] for line in shown[heading + 1 : heading + 3]] == argv[4:6]
    assert f"{TOY}, 2 episodes a setting from seed 1; cpu backend, float32" in shown
    assert plot.read_text().startswith("<?xml")

    written = json.loads(Path(f"{out}.json").read_text())
    assert len(written["backends"]) == 4
    row = written["returns"][0]
    planner = Planner(Checkpoint.load(tmp_path / "model"), PlanConfig(horizon=2, beam_width=3))
    result = evaluate(planner, episodes=2, seed=1, progress=False)
    assert (row["mean_return"], row["std_error"]) == (result.mean_return, result.std_error)
    assert row["normalized_mean"] == result.normalized_mean
    assert row["mean_length"] == np.mean(result.lengths)
    with Path(f"{out}.csv").open(newline="") as file:
        tables = [row["table"] for row in csv.DictReader(file)]
    assert tables == ["backends"] * 4 + ["returns"] * 2
