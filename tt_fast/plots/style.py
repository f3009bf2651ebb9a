"""What the figures have in common: colours, axes, labels, and the numbers that they take.

Colour-blind readers can tell the colours (Okabe and Ito's) apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tt_fast.discretizer import Floats
from tt_fast.validate import require

INK, MUTED, RULE, FILL = "#1f2328", "#656d76", "#d8dee4", "#b6bec9"
POLICY = "#d55e00"


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Axes) -> None:
    """Only what carries data: two light spines, small grey ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(labelsize=8, colors=MUTED, color=RULE, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9, color=MUTED)


def label(
    axes: Axes, x: float, y: float, text: str, color: str, offset: tuple[int, int], **place: Any
) -> None:
    """Text at data (x, y), moved by `offset` points; `place` is its alignment, ha and va."""
    unit = "offset points"
    axes.annotate(text, (x, y), offset, textcoords=unit, fontsize=9, color=color, **place)


def label_beside(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Text at (x, y), on the side that has more room."""
    if x > sum(axes.get_xlim()) / 2:
        label(axes, x, y, text, color, (-7, 0), ha="right", va="center")
    else:
        label(axes, x, y, text, color, (7, 0), ha="left", va="center")


def finite_vector(name: str, values: ArrayLike) -> Floats:
    """float64 (num_values,), at least one.

    Raises:
        ValueError: another shape, NaN or Inf; it names `name`.
    """
    vector = np.asarray(values, dtype=np.float64)
    shape_ok = vector.ndim == 1 and vector.size >= 1
    require(shape_ok, name, "shape (num_values,), at least one", vector.shape)
    require(bool(np.isfinite(vector).all()), name, "finite numbers", "NaN or Inf")
    return vector
