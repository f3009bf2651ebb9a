"""Figures hold the numbers they are given; bad ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic import (
    fit_discretizer,
    imagine,
    random_record,
    small_checkpoint,
    write_metrics,
)

from tt_fast.config import TOKEN_KINDS
from tt_fast.plots import plan_start, plot_attention, plot_imagined, plot_losses, plot_returns

MARGINAL = {"observation": 4.5, "action": 4.4, "reward": 4.3, "value": 4.2}


def test_losses_show_every_kind_and_its_marginal(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv")
    figure = plot_losses(tmp_path / "metrics.csv", MARGINAL)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(TOKEN_KINDS)
    for index, (axes, kind) in enumerate(zip(figure.axes, TOKEN_KINDS, strict=True)):
        curve, baseline = axes.lines
        np.testing.assert_allclose(_x(curve), np.arange(1, 7))  # millions of tokens
        np.testing.assert_allclose(_y(curve), index + 4.0 / np.arange(1, 7))
        assert set(_y(baseline)) == {MARGINAL[kind]}
        assert baseline.get_linestyle() == "--"
        assert _texts(axes) == [f"{index + 4 / 6:.2f}", f"marginal {MARGINAL[kind]:.2f}"]
    _draws(figure)


def test_losses_without_marginals_have_curves_alone(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", num_rows=1)
    figure = plot_losses(tmp_path / "metrics.csv")
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1, 1]
    _draws(figure)


def test_losses_refuse_a_missing_empty_or_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with pytest.raises(FileNotFoundError, match=r"metrics_csv: expected a run's metrics\.csv, got"):
        plot_losses(path)
    write_metrics(path, num_rows=0)
    with pytest.raises(ValueError, match="metrics_csv: expected at least one row, got 'none'"):
        plot_losses(path)
    path.write_text("step,tokens\n1,2\n")
    with pytest.raises(ValueError, match=r"none for \['loss_observation', 'loss_action'"):
        plot_losses(path)


def test_returns_count_the_dataset_and_mark_the_policy() -> None:
    stored, scored = np.linspace(0.0, 100.0, 40), [30.0, 50.0]
    figure = plot_returns(stored, scored, ref_scores=(0.0, 200.0), dataset_name="walks")
    strip, axes = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 40
    np.testing.assert_allclose(_x(strip.lines[-1]), scored)
    assert _texts(strip) == ["policy: 2 episodes, mean 40 ± 10 (s.e.)"]
    assert _texts(axes) == ["walks: 40 episodes, mean 50", "best 100"]
    (top,) = strip.child_axes
    _draws(figure)
    np.testing.assert_allclose(top.get_xlim(), np.array(strip.get_xlim()) / 2.0)


def test_returns_of_one_episode_have_no_error_and_no_scores() -> None:
    figure = plot_returns([1.0, 1.0], [3.0])
    assert _texts(figure.axes[0]) == ["policy: 3"]
    assert figure.axes[0].child_axes == []
    _draws(figure)


@pytest.mark.parametrize("name", ["dataset_returns", "policy_returns"])
@pytest.mark.parametrize(
    ("returns", "message"),
    [([], "at least one, got"), ([[1.0]], r"got \(1, 1\)"), ([np.nan], "expected finite numbers")],
)
def test_returns_refuse_none_or_nan(name: str, returns: Any, message: str) -> None:
    values = {"dataset_returns": [1.0], "policy_returns": [2.0], name: returns}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        plot_returns(**values)


def test_imagined_sets_the_plan_against_what_happened() -> None:
    record = imagine(random_record(), horizon=5)
    figure = plot_imagined(record, 10, discretizer=fit_discretizer(record))
    panels = [axes for axes in figure.axes if axes.axison]
    names = [*(f"observation {i}" for i in range(4)), "action 0", "action 1", "reward"]
    assert [axes.get_title(loc="left") for axes in panels] == names
    _, executed, imagined = panels[1].lines
    np.testing.assert_array_equal(_x(executed), np.arange(5, 15))
    np.testing.assert_array_equal(_y(executed), record.observations[5:15, 1])
    np.testing.assert_array_equal(_x(imagined), np.arange(10, 15))
    np.testing.assert_array_equal(_y(imagined), record.plans[10].observations[:, 1])
    for bar, value in zip(panels[1].patches, _y(imagined), strict=True):
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(value)  # a bin and its midpoint
    _draws(figure)


def test_imagined_reaches_past_the_end_of_the_episode() -> None:
    record = imagine(random_record(num_steps=6), horizon=5)
    figure = plot_imagined(record, 5, observation_names=list("abcd"))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert list(panels)[:4] == list("abcd")
    _, executed, imagined = panels["action 0"].lines
    assert np.isnan(_y(executed)[-1])  # the last observation has no action
    assert _x(imagined)[-1] == 9
    assert not panels["a"].patches  # no bins without a discretizer
    _draws(figure)


def test_imagined_finds_the_step_at_which_a_held_plan_was_made() -> None:
    record = imagine(random_record(), horizon=5, plan_freq=3)
    assert [plan_start(record, step) for step in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    figure = plot_imagined(record, 5)
    assert _x(figure.axes[0].lines[-1])[0] == 3
    assert "imagined at step 3" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_imagined_refuses_what_it_cannot_draw() -> None:
    record = imagine(random_record())
    with pytest.raises(ValueError, match="record: expected an episode with plans"):
        plot_imagined(random_record(), 0)
    with pytest.raises(ValueError, match="step: expected an integer >= 0 and <= 29, got 30"):
        plot_imagined(record, 30)
    with pytest.raises(ValueError, match="observation_names: expected 4 names, got 2"):
        plot_imagined(record, 0, observation_names=["a", "b"])


def test_attention_hides_value_tokens_and_the_future() -> None:
    checkpoint = small_checkpoint(random_record())  # transition_dim 8
    tokens = np.arange(20) % 10
    figure = plot_attention(checkpoint, tokens)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 4  # 2 layers x 2 heads
    shown = np.ma.masked_array(images[0].get_array())
    assert shown.mask[np.triu_indices(20, k=1)].all()
    weights = shown.filled(0.0)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    assert (weights[:, 7::8] == 0.0).all()
    colors = images[0].cmap(images[0].norm(weights))
    assert (colors[19, [7, 15], :3] == 0.0).all()  # black
    assert (colors[19, [6, 8], :3].sum(axis=1) > 0.2).all()
    _draws(figure)


def test_attention_takes_a_model_and_leaves_its_mode() -> None:
    model = small_checkpoint(random_record(), attention_dropout=0.9, embed_dropout=0.9).model
    model.train()
    first, again = (plot_attention(model, [1, 2, 3]).axes[0].images[0] for _ in range(2))
    np.testing.assert_array_equal(first.get_array(), again.get_array())  # no dropout
    assert model.training


def test_attention_refuses_goals_and_bad_tokens() -> None:
    with pytest.raises(ValueError, match="checkpoint_or_model: expected a model without a goal"):
        plot_attention(small_checkpoint(random_record(), goal_conditioned=True), [1])
    checkpoint = small_checkpoint(random_record())
    for tokens in ([], [1.5], [[1]], [0] * 80):
        with pytest.raises(ValueError, match="tokens: expected 1 to 79 integers"):
            plot_attention(checkpoint, tokens)


def _x(line: Any) -> np.ndarray[Any, Any]:
    return np.asarray(line.get_xdata(), dtype=float)


def _y(line: Any) -> np.ndarray[Any, Any]:
    return np.asarray(line.get_ydata(), dtype=float)


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _draws(figure: Figure) -> None:
    """It can be drawn, and shows something."""
    figure.set_dpi(40)
    figure.canvas.draw()
    canvas: Any = figure.canvas
    assert np.asarray(canvas.buffer_rgba()).std() > 1.0
