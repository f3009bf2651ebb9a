"""What a plan imagined against what was then executed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tt_fast.discretizer import Discretizer, Floats
from tt_fast.plots.style import INK, POLICY, RULE, new_figure, quiet
from tt_fast.results import EpisodeRecord
from tt_fast.validate import require, require_int

#: Executed steps that are shown before the plan.
_HISTORY_STEPS = 5


def plot_imagined(
    record: EpisodeRecord,
    step: int,
    *,
    discretizer: Discretizer | None = None,
    observation_names: Sequence[str] | None = None,
) -> Figure:
    """The plan held at `step` against what was then executed, one panel a dimension.

    Args:
        record: an episode with its plans.
        step: environment step, from 0.
        discretizer: draws each imagined token's bin, the finest the model can say.
        observation_names: one a dimension, with units; "observation 0", ... where None.

    Raises:
        ValueError: no plans, a step outside the episode, or the wrong number of names.
    """
    require(len(record.plans) > 0, "record", "an episode with plans", "none")
    require_int("step", step, 0, len(record.plans) - 1)
    names = _transition_names(record, observation_names)
    start, plan = plan_start(record, step), record.plans[step]
    executed = _executed_columns(record)
    imagined = np.column_stack([plan.observations, plan.actions, plan.rewards])
    num_columns = math.ceil(math.sqrt(1.6 * len(names)))
    num_rows = math.ceil(len(names) / num_columns)
    figure = new_figure(2.05 * num_columns, 1.55 * num_rows + 0.5)
    panels = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel().tolist()
    for dim, (axes, name) in enumerate(zip(panels, names, strict=False)):
        quiet(axes)
        axes.set_title(name, fontsize=8.5, color=INK, loc="left")
        _draw_dimension(axes, executed[:, dim], imagined[:, dim], start)
        if discretizer is not None:
            _draw_bins(axes, discretizer.thresholds[:, dim], plan.tokens[:, dim], start)
    _label_steps(panels, len(names), num_columns)
    _imagined_legend(figure, start, with_bins=discretizer is not None)
    return figure


def plan_start(record: EpisodeRecord, step: int) -> int:
    """Step at which the plan held at `step` was made (`plan_freq` may hold one for several)."""
    while step > 0 and record.plans[step - 1] is record.plans[step]:
        step -= 1
    return step


def _transition_names(record: EpisodeRecord, observation_names: Sequence[str] | None) -> list[str]:
    """A title for every panel: observation, action and reward dimensions."""
    observation_dim, action_dim = record.observations.shape[1], record.actions.shape[1]
    names = observation_names or [f"observation {dim}" for dim in range(observation_dim)]
    fits = len(names) == observation_dim
    require(fits, "observation_names", f"{observation_dim} names", len(names))
    return [*names, *(f"action {dim}" for dim in range(action_dim)), "reward"]


def _executed_columns(record: EpisodeRecord) -> Floats:
    """(T + 1, observation_dim + action_dim + 1); nothing is done after the last observation."""
    done = np.column_stack([record.actions, record.rewards])
    return np.column_stack([record.observations, np.vstack([done, np.full_like(done[:1], np.nan)])])


def _draw_dimension(axes: Axes, executed: Floats, imagined: Floats, start: int) -> None:
    first, stop = max(0, start - _HISTORY_STEPS), start + len(imagined)
    seen = executed[first:stop]
    axes.axvline(start, color=RULE, linewidth=1.0)
    axes.plot(np.arange(first, first + len(seen)), seen, color=INK, linewidth=1.4, zorder=3)
    steps = np.arange(start, stop)
    axes.plot(steps, imagined, color=POLICY, linewidth=1.2, marker="o", markersize=2.6, zorder=4)
    axes.margins(y=0.12)
    axes.set_xlim(first - 0.6, stop - 0.4)
    axes.autoscale(False)  # bins may reach far beyond what happened


def _draw_bins(axes: Axes, edges: Floats, tokens: NDArray[np.int64], start: int) -> None:
    """The bin of each imagined token as a bar; what is off the panel is cut."""
    bins = np.clip(tokens, 0, len(edges) - 2)
    steps = np.arange(start, start + len(tokens))
    heights = edges[bins + 1] - edges[bins]
    axes.bar(steps, heights, 0.9, bottom=edges[bins], color=POLICY, alpha=0.18, linewidth=0)


def _label_steps(panels: Sequence[Axes], num_used: int, num_columns: int) -> None:
    """Name the axis under the lowest panel of each column; hide panels not used."""
    for axes in panels[num_used - num_columns : num_used]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelbottom=True)
    for axes in panels[num_used:]:
        axes.set_axis_off()


def _imagined_legend(figure: Figure, start: int, *, with_bins: bool) -> None:
    handles: list[Artist] = [
        Line2D([], [], color=INK, linewidth=1.4, label="executed"),
        Line2D([], [], color=POLICY, marker="o", markersize=3, label=f"imagined at step {start}"),
    ]
    if with_bins:
        handles.append(Patch(color=POLICY, alpha=0.18, linewidth=0, label="bin of the token"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9.5)
