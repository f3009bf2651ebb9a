"""Checkpoints scored while training: by episodes that the planner plays."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import DEMO, SMALL, TOY, refuse, run, save_model, usage_error
from tiny import tiny_dataset, tiny_model_config, tiny_train_config
from toy_env import ToyEnv

from tt_fast import train
from tt_fast.checkpoint import Checkpoint
from tt_fast.config import PlanConfig
from tt_fast.evaluate import evaluate
from tt_fast.planning import Planner
from tt_fast.selection import EpisodeScore

PLAN = PlanConfig(horizon=2, beam_width=3, n_expand=2)


def test_a_score_is_the_mean_return_of_its_episodes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(save_model(tmp_path / "model"))
    score = EpisodeScore(TOY, 3, PLAN, plan_freq=2, max_steps=4, seed=7)
    planner = Planner(checkpoint, PLAN, plan_freq=2)
    alone = [evaluate(planner, TOY, seed=7 + j, max_steps=4, progress=False) for j in range(3)]
    assert score(checkpoint) == pytest.approx(sum(r.mean_return for r in alone) / 3)
    assert score(checkpoint) == score(checkpoint)


def test_ctrl_c_gives_no_score_of_fewer_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.load(save_model(tmp_path / "model"))
    step, calls = ToyEnv.step, []

    def counted(env: ToyEnv, action: np.ndarray) -> Any:
        calls.append(action)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return step(env, action)

    stop_at = 0
    monkeypatch.setattr(ToyEnv, "step", counted)
    EpisodeScore(TOY, 3, PLAN)(checkpoint)
    stop_at, calls = len(calls), []  # in the last step of the longest episode
    with pytest.raises(KeyboardInterrupt):
        EpisodeScore(TOY, 3, PLAN)(checkpoint)
    assert len(calls) == stop_at


@pytest.mark.parametrize("name", ["episodes", "plan_freq", "max_steps", "seed"])
def test_numbers_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer >="):
        EpisodeScore(**{name: -1})


def test_plans_are_not_held_longer_than_they_are() -> None:
    with pytest.raises(ValueError, match="plan_freq: expected an integer >= 1 and <= 2, got 3"):
        EpisodeScore(plan=PLAN, plan_freq=3)


def test_a_device_that_there_is_not_shows_before_training(tmp_path: Path) -> None:
    config = tiny_train_config(max_epochs=1.0, eval_every=2)
    scorer = EpisodeScore(TOY, device="gpu")
    with pytest.raises(ValueError, match="device: expected one that torch can use, got 'gpu'"):
        train(tiny_dataset(), tiny_model_config(), config, tmp_path / "run", evaluator=scorer)
    assert not (tmp_path / "run").exists()


def test_auto_is_a_device(tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(save_model(tmp_path / "model"))
    auto = EpisodeScore(TOY, episodes=1, plan=PLAN, device="auto")
    assert auto(checkpoint) == EpisodeScore(TOY, episodes=1, plan=PLAN)(checkpoint)


def test_what_cannot_be_played_shows_before_training(tmp_path: Path) -> None:
    dataset = tiny_dataset()  # of an environment that there is not
    config = tiny_train_config(eval_every=1, max_windows=8)
    with pytest.raises(ValueError, match="Tiny-v0"):
        train(dataset, tiny_model_config(), config, tmp_path / "run", evaluator=EpisodeScore())
    score = EpisodeScore(TOY, plan=PlanConfig(k_act=1000))
    with pytest.raises(ValueError, match="k_act"):
        train(dataset, tiny_model_config(), config, tmp_path / "run", evaluator=score)
    assert not (tmp_path / "run").exists()


def test_train_evaluates_and_says_where_the_best_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--max-windows", "40", "--eval-every", "2", "--eval-episodes", "2"]
    options += ["--eval-max-steps", "3", "--eval-horizon", "1", "--eval-beam-width", "2"]
    run("train", DEMO, "--output-dir", folder, *SMALL, *options)
    assert f"{folder / 'best'}: best score" in capsys.readouterr().out
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    best = Checkpoint.load(folder / "best")
    scores = {int(row["step"]): float(row["score"]) for row in rows}
    assert scores[best.metadata["step"]] == max(scores.values())


def test_patience_needs_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = usage_error(capsys, "train", DEMO, "--output-dir", tmp_path / "run", "--patience", "2")
    assert "patience: expected None, as eval_every is None, got 2" in said
    said = refuse(capsys, "train", DEMO, "--output-dir", tmp_path / "run", "--eval-episodes", "2")
    assert said.startswith("eval_every: expected a number of steps, as there are other options")
