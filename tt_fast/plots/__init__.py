"""Figures of a run: losses, returns, latency, imagined against executed, attention.

Every function returns a `matplotlib.figure.Figure` of its own; the caller saves it. pyplot and its
global state are never touched.
"""

from tt_fast.plots.attention import plot_attention
from tt_fast.plots.imagined import plan_start, plot_imagined
from tt_fast.plots.losses import plot_losses
from tt_fast.plots.scores import plot_latency, plot_returns, plot_sweep

__all__ = [
    "plan_start",
    "plot_attention",
    "plot_imagined",
    "plot_latency",
    "plot_losses",
    "plot_returns",
    "plot_sweep",
]
