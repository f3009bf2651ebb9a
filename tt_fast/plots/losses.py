"""Loss of each kind of token over a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tt_fast.config import TOKEN_KINDS
from tt_fast.discretizer import Floats
from tt_fast.plots.style import MUTED, label, new_figure, quiet
from tt_fast.training.log import read_metrics
from tt_fast.validate import require

KIND_COLORS = dict(zip(TOKEN_KINDS, ("#0072b2", "#d55e00", "#009e73", "#b5568f"), strict=True))


def plot_losses(
    metrics_csv: str | Path, marginal_losses: Mapping[str, float] | None = None
) -> Figure:
    """Loss of each token kind over the tokens trained on, one panel a kind.

    Args:
        metrics_csv: the run's metrics.csv, with columns `tokens` and `loss_<kind>`.
        marginal_losses: kind -> nats per token of predicting each dimension's marginal; dashed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or there is no row.
    """
    columns = _metric_columns(metrics_csv)
    millions = columns["tokens"] / 1e6
    figure = new_figure(10.0, 2.7)
    panels = figure.subplots(1, len(TOKEN_KINDS), sharey=True)
    for axes, kind in zip(panels, TOKEN_KINDS, strict=True):
        quiet(axes)
        baseline = (marginal_losses or {}).get(kind)
        _draw_loss(axes, kind, millions, columns[f"loss_{kind}"], baseline)
        axes.set_xlim(left=0.0)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_ylim(bottom=0.0)
    figure.supxlabel("tokens trained on (millions)", fontsize=9, color=MUTED)
    return figure


def _metric_columns(metrics_csv: str | Path) -> dict[str, Floats]:
    """What `plot_losses` needs of a run's metrics.csv, each (num_rows,) float64."""
    if not Path(metrics_csv).is_file():
        raise FileNotFoundError(f"metrics_csv: expected a run's metrics.csv, got {metrics_csv}")
    rows = read_metrics(metrics_csv)
    require(bool(rows), "metrics_csv", "at least one row", "none")
    names = ["tokens", *(f"loss_{kind}" for kind in TOKEN_KINDS)]
    missing = [name for name in names if name not in rows[0]]
    require(not missing, "metrics_csv", f"columns {names}", f"none for {missing}")
    return {name: np.array([row[name] for row in rows]) for name in names}


def _draw_loss(
    axes: Axes, kind: str, millions: Floats, losses: Floats, baseline: float | None
) -> None:
    color = KIND_COLORS[kind]
    axes.set_title(kind, fontsize=10, fontweight="bold", color=color, loc="left")
    axes.plot(millions, losses, color=color, linewidth=1.6, marker="o" if len(losses) < 3 else "")
    last, end = f"{losses[-1]:.2f}", float(millions[-1])
    label(axes, end, losses[-1], last, color, (0, -6), ha="right", va="top")
    if baseline is not None:
        axes.axhline(baseline, color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)))
        text = f"marginal {baseline:.2f}"
        label(axes, end, baseline, text, MUTED, (0, 3), ha="right", va="bottom")
