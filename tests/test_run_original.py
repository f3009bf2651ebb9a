"""The original code beside ours, only with `pytest --original PATH`; its statistics always."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_original import chi_square

PARTS = [
    "inputs",
    "train.py",
    "plan.py, its planner",
    "plan.py, our import",
    "plan.py, our planner",
    "greedy plans",
    "beam_search",
    "sampled plans",
    "times",
]


@pytest.fixture(scope="module")
def summary(request, tmp_path_factory):
    """What tests/run_original.py found, in a process of its own: it changes modules for good."""
    original = request.config.getoption("--original")
    if original is None:
        pytest.skip("needs --original PATH, a checkout of the original code")
    pytest.importorskip("mujoco")
    out = tmp_path_factory.mktemp("original")
    script = Path(__file__).with_name("run_original.py")
    command = [sys.executable, str(script), "--original", original, "--out", str(out)]
    done = subprocess.run(
        [*command, "--plans", "500"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path = out / "summary.json"
    assert path.is_file(), done.stdout + done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", PARTS)
def test_part(summary, part):
    assert list(summary) == PARTS
    ok, detail = summary[part]
    assert ok, detail


def test_missing_checkout_is_named(tmp_path):
    script = Path(__file__).with_name("run_original.py")
    command = [sys.executable, str(script), "--original", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--original: expected a checkout with scripts/plan.py, got {tmp_path}" in done.stderr


def test_chi_square_of_a_table_worked_by_hand():
    # 2 x 2 with counts 30, 70 and 50, 50: expected 40 and 60 in both rows
    first, second = [0] * 30 + [1] * 70, [0] * 50 + [1] * 50
    value, degrees, p = chi_square(first, second)
    assert value == pytest.approx(2 * (10**2 / 40 + 10**2 / 60))
    assert degrees == 1
    assert p == pytest.approx(0.00389, abs=1e-5)  # erfc(sqrt(value / 2))


def test_chi_square_tells_distributions_apart():
    rng = np.random.default_rng(0)
    flat, bent = np.full(10, 0.1), np.linspace(0.08, 0.12, 10)
    sample = [rng.choice(10, 3000, p=p) for p in (flat, flat, bent)]
    assert chi_square(sample[0], sample[1])[2] > 0.01
    assert chi_square(sample[0], sample[2])[2] < 1e-3


def test_rare_tokens_are_pooled():
    first = [0] * 50 + [1] * 2 + [2] * 1
    second = [0] * 50 + [3] * 3
    value, degrees, p = chi_square(first, second)
    assert (value, degrees, p) == (0.0, 1, 1.0)
    assert chi_square([4] * 9, [4] * 9) == (0.0, 0, 1.0)
