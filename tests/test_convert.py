"""`tt-fast convert` as a user types it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint, tiny_dataset, weights_equal

from tt_fast import Checkpoint
from tt_fast.cli import main
from tt_fast.data.hdf5 import write_hdf5


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny_checkpoint().save(tmp_path / "ours")


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("jannerm", {"state_0.pt", "model_config.pkl", "data_config.pkl"}),
        ("huggingface", {"config.json", "model.safetensors"}),
        ("faster_tt", {"config.yaml", "discretizer.pt", "model_last.pt"}),
        ("tt_fast", {"config.json", "weights.safetensors"}),
    ],
)
def test_there_and_back(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, files: set[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(saved), "--to", to, "--output-dir", str(there)]) == 0
    assert files <= {path.name for path in there.iterdir()}
    assert main(["convert", str(there), "--output-dir", str(back)]) == 0
    printed = capsys.readouterr().out
    assert "observation 3, action 2, 4 transitions, 2 layers, 2 heads, width 16" in printed
    assert ("note: this format has no stop token" in printed) == (to == "faster_tt")
    before, after = Checkpoint.load(saved), Checkpoint.load(back)
    assert before.discretizer is not None
    assert after.discretizer is not None
    np.testing.assert_array_equal(before.discretizer.thresholds, after.discretizer.thresholds)
    assert after.metadata["env_id"] == "Tiny-v0"
    if to != "faster_tt":  # whose logits tests/test_formats.py compares
        assert weights_equal(before.model, after.model)


def test_the_discretizer_is_fitted_on_the_dataset(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, fitted = tmp_path / "bare", tmp_path / "fitted"
    theirs = Checkpoint.load(saved).save_foreign(tmp_path / "theirs", "jannerm")
    (theirs / "discretizer.npz").unlink()
    assert main(["convert", str(theirs), "--output-dir", str(bare)]) == 0
    assert "note: a planner needs a discretizer" in capsys.readouterr().out
    data = tiny_dataset()
    write_hdf5(
        tmp_path / "data.hdf5",
        {
            "observations": data.observations, "actions": data.actions, "rewards": data.rewards,
            "terminals": data.terminations, "timeouts": data.truncations,
        },
        {},
    )  # fmt: skip
    dataset = ["--dataset", str(tmp_path / "data.hdf5")]
    assert main(["convert", str(theirs), "--output-dir", str(fitted), *dataset]) == 0
    assert "discretizer with 8 bins" in capsys.readouterr().out
    assert Checkpoint.load(bare).discretizer is None
    assert Checkpoint.load(fitted).discretizer is not None
    # ours, once more as the note says; and one that has its bins
    again = tmp_path / "again"
    assert main(["convert", str(bare), "--output-dir", str(again), *dataset]) == 0
    for folder in (fitted, again):
        found = Checkpoint.load(folder).discretizer
        assert found is not None
        np.testing.assert_array_equal(
            found.thresholds, Checkpoint.load(fitted).discretizer.thresholds
        )
        argv = ["convert", str(folder), "--output-dir", str(tmp_path / "x"), *dataset]
        capsys.readouterr()
        assert main(argv) == 2
        assert "dataset: expected None, as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "faster_tt", "--epoch", "3"], "epoch: expected None"),
        (["--output-dir", "."], "output-dir: expected a new or empty folder"),
    ],
)
def test_errors_leave_nothing(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    there = tmp_path / "there"
    argv = ["convert", str(saved), "--output-dir", str(there), *options]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not there.exists()


def test_what_a_format_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goal = tiny_checkpoint(goal_conditioned=True).save(tmp_path / "goal")
    bare = Checkpoint(tiny_checkpoint().model, None).save(tmp_path / "bare")
    uniform = replace(tiny_checkpoint(), metadata={"train_config": {"strategy": "uniform"}})
    cases = [
        (uniform.save(tmp_path / "uniform"), "jannerm", 'strategy: expected "quantile"'),
        (goal, "huggingface", "model: expected one without goal"),
        (goal, "faster_tt", "model: expected one without goal"),
        (goal, "jannerm", "goal_value_mask: expected"),
        (bare, "faster_tt", "discretizer: expected one"),
    ]
    for folder, to, message in cases:
        there = tmp_path / "there"
        assert main(["convert", str(folder), "--to", to, "--output-dir", str(there)]) == 2
        assert message in capsys.readouterr().err
        assert not there.exists()


def test_a_folder_of_the_original_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where `tt-fast` takes a checkpoint it takes a foreign folder too."""
    theirs = tiny_checkpoint().save_foreign(tmp_path / "theirs", "jannerm")
    options = ["--observation", "0,0,0", "--horizon", "2", "--beam-width", "4"]
    assert main(["plan", str(theirs), *options]) == 0
    assert "2 steps, 4 beams" in capsys.readouterr().out
