"""Episodes while training: scores, the best checkpoint, an early stop."""

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import weights_equal
from train_runs import columns, interrupt_in_step, run

from tt_fast import Checkpoint
from tt_fast.config import ModelConfig
from tt_fast.data import OfflineDataset
from tt_fast.training.log import read_metrics


class _Scores:
    """An evaluator that knows its scores beforehand."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.steps = list(scores), []

    def __call__(self, checkpoint: Checkpoint) -> float:
        assert not checkpoint.model.training
        self.steps.append(checkpoint.metadata["step"])
        return self.scores[len(self.steps) - 1]


def _scores(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["score"]) for row in read_metrics(folder / "scores.csv")]


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    evaluator = _Scores(1.0, 5.0, 5.0, 2.0)
    last = run(tmp_path / "run", 10, eval_every=3, evaluator=evaluator)
    assert evaluator.steps == [3, 6, 9, 10]
    assert _scores(tmp_path / "run") == [(3, 1.0), (6, 5.0), (9, 5.0), (10, 2.0)]
    best = Checkpoint.load(tmp_path / "run" / "best")
    assert best.metadata["step"] == 6  # the first of equals
    assert best.metadata["best_score"] == last.metadata["best_score"] == 5.0
    assert last.metadata["step"] == 10
    assert weights_equal(last.model, run(tmp_path / "plain", 10).model)  # nothing else changed


def test_patience_ends_training(tmp_path: Path) -> None:
    options = {"eval_every": 2, "patience": 2}
    last = run(tmp_path, 20, evaluator=_Scores(1.0, 3.0, 2.0, 3.0), **options)
    assert last.metadata["step"] == 8
    assert last.metadata["eval_losses"]
    assert Checkpoint.load(tmp_path / "best").metadata["step"] == 4
    again = run(tmp_path, 20, evaluator=_Scores(), resume=True, **options)
    assert weights_equal(again.model, last.model)
    patient = run(tmp_path, 20, evaluator=_Scores(*[0.0] * 7), resume=True, eval_every=2)
    assert patient.metadata["step"] >= 20


def test_evaluations_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_step(7, patch)
        run(tmp_path, 11, eval_every=3, evaluator=_Scores(4.0, 7.0))
    run(tmp_path, 11, eval_every=3, evaluator=_Scores(5.0, 6.0), resume=True)
    assert _scores(tmp_path) == [(3, 4.0), (6, 7.0), (9, 5.0), (11, 6.0)]
    best = Checkpoint.load(tmp_path / "best")
    assert (best.metadata["step"], best.metadata["best_score"]) == (6, 7.0)


def test_ctrl_c_in_an_evaluation_ends_it_at_once_and_it_comes_again(tmp_path: Path) -> None:
    def interrupted(checkpoint: Checkpoint) -> float:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 8, eval_every=4, evaluator=interrupted)
    assert Checkpoint.load(tmp_path).metadata["step"] == 4
    assert _scores(tmp_path) == []
    run(tmp_path, 8, eval_every=4, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


def test_kill_9_between_two_renames_of_the_best(tmp_path: Path) -> None:
    run(tmp_path, 4, eval_every=4, evaluator=_Scores(1.0))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    for name in (
        ".best.new",
        "..best.new.abcdefg_",
        ".metrics.csv.01234567",
        ".scores.csv.abcdefgh",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / ".metrics.csv.swp").touch()  # somebody's own
    (tmp_path / ".best.backup").mkdir()
    run(tmp_path, 8, eval_every=4, evaluator=_Scores(0.5), resume=True)
    assert Checkpoint.load(tmp_path / "best").metadata["step"] == 4
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".metrics.csv.swp", ".best.backup"}


def test_a_signal_before_an_evaluation_saves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_step(4, patch)
        run(tmp_path, 8, eval_every=4, evaluator=_Scores())  # it has none: not to be asked
    assert Checkpoint.load(tmp_path).metadata["step"] == 4
    run(tmp_path, 8, eval_every=4, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


def test_an_interrupt_of_the_last_evaluation_leaves_nothing_out(tmp_path: Path) -> None:
    scores = iter([1.0, None])

    def interrupted(checkpoint: Checkpoint) -> float:
        score = next(scores)
        if score is None:
            raise KeyboardInterrupt
        return score

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 8, eval_every=4, evaluator=interrupted)
    resumed = run(tmp_path, 8, eval_every=4, evaluator=_Scores(2.0), resume=True)
    assert resumed.metadata["best_score"] == 2.0
    assert Checkpoint.load(tmp_path).metadata == json.loads(json.dumps(resumed.metadata))
    run(tmp_path, 8, eval_every=4, evaluator=_Scores(), resume=True)  # nothing is left to score
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]


@pytest.mark.parametrize("make", [np.float32, np.int64, torch.tensor])
def test_a_score_may_be_any_number(tmp_path: Path, make: Callable[[int], Any]) -> None:
    last = run(tmp_path, 3, eval_every=3, evaluator=_Scores(make(7)))
    assert last.metadata["best_score"] == 7.0
    assert Checkpoint.load(tmp_path / "best").metadata["best_score"] == 7.0


def test_an_evaluator_that_fails_costs_no_training(tmp_path: Path) -> None:
    scores = _Scores(3.0)  # and an IndexError at step 4
    with pytest.raises(IndexError):
        run(tmp_path, 6, eval_every=2, checkpoint_steps=100, evaluator=scores)
    saved = Checkpoint.load(tmp_path).metadata
    assert (saved["step"], saved["best_score"]) == (4, 3.0)
    run(tmp_path, 6, eval_every=2, checkpoint_steps=100, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(2, 3.0), (4, 1.0), (6, 2.0)]
    assert Checkpoint.load(tmp_path / "best").metadata["step"] == 2


def test_a_score_is_saved_with_its_checkpoint(tmp_path: Path) -> None:
    kept = []

    def evaluator(checkpoint: Checkpoint) -> float:
        kept.append(Checkpoint.load(tmp_path).metadata)  # what a kill now would leave
        return 10.0 - checkpoint.metadata["step"]

    run(tmp_path, 5, eval_every=2, checkpoint_steps=100, evaluator=evaluator)
    assert [(found["step"], found["best_score"]) for found in kept] == [
        (2, None),
        (4, 8.0),
        (5, 8.0),
    ]


def test_an_early_stop_logs_its_last_steps(tmp_path: Path) -> None:
    options = {"eval_every": 2, "patience": 1, "log_steps": 50}
    last = run(tmp_path, 20, evaluator=_Scores(2.0, 1.0), **options)
    assert [row[0] for row in columns(tmp_path)] == [last.metadata["step"]] == [4]
    assert last.metadata["losses"]


def test_an_evaluator_is_checked_first(tmp_path: Path) -> None:
    class Checked(_Scores):
        def check(self, dataset: OfflineDataset, model: ModelConfig) -> None:
            raise ValueError(f"env_id: {dataset.name}, {model.embed_dim}")

    with pytest.raises(ValueError, match="env_id: tiny, 16"):
        run(tmp_path / "run", 3, eval_every=3, evaluator=Checked())
    assert not (tmp_path / "run").exists()


def test_an_evaluator_and_its_interval_come_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluator: expected a function, as eval_every is 3"):
        run(tmp_path, 3, eval_every=3)
    with pytest.raises(ValueError, match=r"patience: expected None, as eval_every is None, got 1"):
        run(tmp_path, 3, patience=1)
    with pytest.raises(ValueError, match=r"eval_every: expected a number of steps, as there is"):
        run(tmp_path, 3, evaluator=_Scores(1.0))
    with pytest.raises(ValueError, match=r"evaluator's score: expected a finite number"):
        run(tmp_path, 3, eval_every=3, evaluator=_Scores(float("nan")))


def test_an_evaluator_that_absorbs_ctrl_c_does_not_score(tmp_path: Path) -> None:
    def part_of_a_score(checkpoint: Checkpoint) -> float:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return 99.0

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 8, eval_every=4, evaluator=part_of_a_score)
    assert _scores(tmp_path) == []
    run(tmp_path, 8, eval_every=4, evaluator=_Scores(1.0, 2.0), resume=True)
    assert _scores(tmp_path) == [(4, 1.0), (8, 2.0)]
