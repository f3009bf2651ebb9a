"""Latency against return: what is timed, what is played, and the plot of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import save_model
from tiny import OBSERVATION_DIM

from tt_fast import tradeoff
from tt_fast.bench import Setting
from tt_fast.checkpoint import Checkpoint
from tt_fast.config import PlanConfig
from tt_fast.evaluate import evaluate
from tt_fast.planning import Planner
from tt_fast.planning.cpu import CpuBackend
from tt_fast.plots import plot_latency


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.load(save_model(tmp_path / "model"))


def test_only_decisions_that_plan_are_timed(checkpoint: Checkpoint) -> None:
    options = tradeoff.PlayOptions(episodes=1, num_threads=1, progress=False)
    settings = [Setting.parse(name) for name in ("H4-B2x2", "H4-B2x2-F4")]
    every, seldom = tradeoff.play_settings(checkpoint, settings, options)
    length = int(every.mean_length)
    assert every.num_plans == length - 1  # without the first, which packs the weights
    assert seldom.num_plans == max(1, -(-int(seldom.mean_length) // 4) - 1)
    assert min(every.p50_ms, every.step_ms, seldom.p50_ms, seldom.step_ms) > 0.0


def test_plans_of_another_dtype(checkpoint: Checkpoint) -> None:
    options = tradeoff.PlayOptions(
        episodes=1, num_threads=1, dtype="bfloat16", progress=False, max_steps=3
    )
    (row,) = tradeoff.play_settings(checkpoint, [Setting.parse("H2-B2x2")], options)
    assert row.dtype == "bfloat16"
    assert "cpu backend, bfloat16" in tradeoff.notes([row])


def test_an_interrupted_setting_has_no_row(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, calls = Planner.act, []

    def interrupted(self: Planner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return act(self, *args)

    monkeypatch.setattr(Planner, "act", interrupted)
    options = tradeoff.PlayOptions(episodes=9, num_threads=1, progress=False)
    rows = tradeoff.play_settings(checkpoint, [Setting.parse("H2-B2x2")], options)
    with pytest.raises(KeyboardInterrupt):
        list(rows)


def test_contexts_are_those_that_a_planner_saw(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = CpuBackend.plan, []

    def remembering(self: CpuBackend, contexts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(contexts)
        return plan(self, contexts, *args, **kwargs)

    monkeypatch.setattr(CpuBackend, "plan", remembering)
    planner = Planner(checkpoint, PlanConfig(horizon=2, beam_width=2, max_context_transitions=2))
    result = evaluate(planner, seed=1, record=True, progress=False)
    assert result.record is not None
    assert checkpoint.discretizer is not None
    contexts = tradeoff.recorded_contexts(result.record, checkpoint.discretizer, 2)
    assert len(contexts) == len(seen) - 2
    for got, want in zip(contexts, seen[2:], strict=True):
        np.testing.assert_array_equal(got, want)
    # of an episode that is too short, the longest
    (longest,) = tradeoff.recorded_contexts(result.record, checkpoint.discretizer, 99)
    assert len(longest) == (len(seen) - 1) * 7 + OBSERVATION_DIM


def test_a_checkpoint_without_discretizer_is_refused(checkpoint: Checkpoint) -> None:
    bare = replace(checkpoint, discretizer=None)
    with pytest.raises(ValueError, match="checkpoint: expected one with a discretizer"):
        tradeoff.make_case(bare, tradeoff.PlayOptions())


def test_the_plot_labels_settings_and_fills_what_nothing_beats() -> None:
    figure = plot_latency(
        [2.0, 20.0, 30.0], [5.0, 9.0, 7.0], [1.0, None, 2.0], names=["a", "b", "c"]
    )
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [np.asarray(line.get_xdata()).item() for line in dots] == [2.0, 20.0, 30.0]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, False, True]
    figure.draw_without_rendering()


def test_labels_of_the_plot_keep_apart_while_there_is_room() -> None:
    figure = plot_latency([2.0] * 5, [1.0] * 5, [None] * 5, names=list("abcde"))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list("abcde")
    # four corners of the dot, then one on top of the first
    assert [box.count_overlaps(boxes) - 1 for box in boxes] == [1, 0, 0, 0, 1]


def test_the_plot_refuses_bad_numbers() -> None:
    with pytest.raises(ValueError, match="decision_ms: expected numbers above 0, got 0"):
        plot_latency([0.0], [1.0], [None], names=["a"])
    with pytest.raises(ValueError, match="returns, std_errors, names: expected 1 each"):
        plot_latency([1.0], [1.0], [None], names=["a", "b"])
