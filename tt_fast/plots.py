"""Figures of a run: losses, returns, latency, imagined against executed, attention.

Every function returns a `matplotlib.figure.Figure` of its own; the caller saves it. pyplot and its
global state are never touched. Colour-blind readers can tell the colours (Okabe and Ito's) apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import TOKEN_KINDS
from tt_fast.discretizer import Discretizer, Floats
from tt_fast.model import TrajectoryTransformer
from tt_fast.results import EpisodeRecord, standard_error
from tt_fast.training.log import read_metrics
from tt_fast.validate import require, require_int

INK, MUTED, RULE, FILL = "#1f2328", "#656d76", "#d8dee4", "#b6bec9"
POLICY = "#d55e00"
KIND_COLORS = dict(zip(TOKEN_KINDS, ("#0072b2", "#d55e00", "#009e73", "#b5568f"), strict=True))

_HISTORY_STEPS = 5  # executed steps that `plot_imagined` shows before the plan


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
    figure = _new_figure(10.0, 2.7)
    panels = figure.subplots(1, len(TOKEN_KINDS), sharey=True)
    for axes, kind in zip(panels, TOKEN_KINDS, strict=True):
        _quiet(axes)
        baseline = (marginal_losses or {}).get(kind)
        _draw_loss(axes, kind, millions, columns[f"loss_{kind}"], baseline)
        axes.set_xlim(left=0.0)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_ylim(bottom=0.0)
    figure.supxlabel("tokens trained on (millions)", fontsize=9, color=MUTED)
    return figure


def plot_returns(
    dataset_returns: ArrayLike,
    policy_returns: ArrayLike,
    *,
    ref_scores: tuple[float, float] | None = None,
    dataset_name: str = "dataset",
) -> Figure:
    """Histogram of the dataset's returns, with each of the policy's marked.

    Args:
        dataset_returns: (num_episodes,) undiscounted.
        policy_returns: (num_episodes,) undiscounted.
        ref_scores: (min, max) of the normalised score, for an axis on top.
        dataset_name: what the legend calls the dataset.

    Raises:
        ValueError: no returns, or not finite.
    """
    stored = _finite_vector("dataset_returns", dataset_returns)
    scored = _finite_vector("policy_returns", policy_returns)
    figure = _new_figure(8.0, 3.4)
    strip, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    bins = np.histogram_bin_edges(np.concatenate([stored, scored]), bins=50)
    _draw_stored(axes, stored, bins, dataset_name)
    _draw_scored(strip, axes, scored)
    if ref_scores is not None:
        _add_normalised_axis(strip, ref_scores)
    return figure


def plot_latency(
    decision_ms: ArrayLike,
    returns: ArrayLike,
    std_errors: Sequence[float | None],
    *,
    names: Sequence[str],
) -> Figure:
    """Return against latency, a labelled dot a setting; what nothing beats in both is filled.

    Args:
        decision_ms: (num_settings,) median milliseconds of a decision, above 0.
        returns: (num_settings,) mean return.
        std_errors: (num_settings,) standard error of the mean, None where it is unknown.
        names: (num_settings,) labels.

    Raises:
        ValueError: no settings, numbers that are not finite, or lengths that differ.
    """
    x, y = _finite_vector("decision_ms", decision_ms), _finite_vector("returns", returns)
    lengths = [len(x), len(y), len(std_errors), len(names)]
    require(len(set(lengths)) == 1, "returns, std_errors, names", f"{lengths[0]} each", lengths[1:])
    require(bool((x > 0.0).all()), "decision_ms", "numbers above 0", float(x.min()))
    figure = _new_figure(8.0, 4.2)
    axes = figure.subplots()
    _quiet(axes)
    axes.set_xscale("log")
    for i, error in enumerate(std_errors):
        beaten = bool(((x <= x[i]) & (y >= y[i]) & ((x < x[i]) | (y > y[i]))).any())
        face = "white" if beaten else POLICY
        axes.errorbar(
            x[i], y[i], error, fmt="o", color=POLICY, mfc=face, markersize=6, elinewidth=1.0
        )
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("median time of a decision that plans (ms)")
    axes.set_ylabel("return of an episode, mean ± standard error")
    figure.draw_without_rendering()  # from here on it is known where dots and labels lie
    labels: list[Annotation] = []
    for i, name in enumerate(names):
        labels.append(_label_apart(axes, float(x[i]), float(y[i]), name, labels))
    return figure


def plot_sweep(
    names: Sequence[str],
    means: ArrayLike,
    std_errors: Sequence[float | None],
    seed_means: Sequence[Sequence[float]],
    *,
    label: str,
) -> Figure:
    """A row a dataset: the mean of all episodes with its standard error, each seed's mean above.

    Args:
        names: (num_datasets,) of the datasets.
        means: (num_datasets,) over all episodes.
        std_errors: (num_datasets,) of those means, None where unknown.
        seed_means: (num_datasets,) the mean of each seed's own episodes.
        label: what the numbers are.

    Raises:
        ValueError: no datasets, numbers that are not finite, or lengths that differ.
    """
    x = _finite_vector("means", means)
    lengths = [len(x), len(names), len(std_errors), len(seed_means)]
    wanted = f"{lengths[0]} each"
    require(len(set(lengths)) == 1, "names, std_errors, seed_means", wanted, lengths[1:])
    figure = _new_figure(8.0, 0.9 + 0.5 * len(x))
    axes = figure.subplots()
    _quiet(axes)
    for row, (mean, error, seeds) in enumerate(zip(x, std_errors, seed_means, strict=True)):
        dots = _finite_vector("seed_means", seeds)
        axes.plot(dots, np.full(len(dots), row - 0.22), "o", color=MUTED, markersize=4, alpha=0.7)
        axes.errorbar(mean, row, xerr=error, fmt="o", color=POLICY, markersize=6, elinewidth=1.2)
    axes.set_yticks(range(len(x)), names)
    axes.set_ylim(len(x) - 0.5, -0.6)  # the first dataset on top
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel(f"{label}, mean ± standard error of all episodes; grey: each seed")
    return figure


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
    figure = _new_figure(2.05 * num_columns, 1.55 * num_rows + 0.5)
    panels = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel().tolist()
    for dim, (axes, name) in enumerate(zip(panels, names, strict=False)):
        _quiet(axes)
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


def plot_attention(
    checkpoint_or_model: Checkpoint | TrajectoryTransformer, tokens: ArrayLike
) -> Figure:
    """Attention weights of one context, a row a layer and a column a head.

    Value tokens are hidden as keys, so their columns stay black; the future is left blank.

    Args:
        checkpoint_or_model: whose attention; a goal-conditioned model is refused.
        tokens: (context_len,) integers, at most the model's block_size.

    Raises:
        ValueError: a goal-conditioned model, or tokens that are not such a vector.
    """
    source = checkpoint_or_model
    model = source.model if isinstance(source, Checkpoint) else source
    plain = not model.config.goal_conditioned
    require(plain, "checkpoint_or_model", "a model without a goal", "a goal-conditioned one")
    maps = _attention_maps(model, np.asarray(tokens))
    num_layers, num_heads, num_tokens, _ = maps.shape
    figure = _new_figure(2.2 * num_heads + 0.9, 2.2 * num_layers + 0.6)
    panels = figure.subplots(num_layers, num_heads, sharex=True, sharey=True, squeeze=False)
    future = np.triu(np.ones((num_tokens, num_tokens), dtype=bool), k=1)
    colors = _weight_colors()
    for (layer, head), axes in np.ndenumerate(panels):
        shown = np.ma.masked_array(maps[layer, head], mask=future)
        # square root: most weights are small, and they are what one looks for; only 0 is below
        norm = PowerNorm(0.5, vmin=1e-300, vmax=1.0)
        image = axes.imshow(shown, cmap=colors, norm=norm, interpolation="nearest")
        _tick_transitions(axes, num_tokens, model.config.transition_dim)
    _label_heads(panels)
    _add_weight_scale(figure, image, panels)
    return figure


def _new_figure(width: float, height: float) -> Figure:
    """An empty white figure, inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Axes) -> None:
    """Only what carries data: two light spines, small grey ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(labelsize=8, colors=MUTED, color=RULE, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9, color=MUTED)


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
    _label(axes, end, losses[-1], last, color, (0, -6), ha="right", va="top")
    if baseline is not None:
        axes.axhline(baseline, color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)))
        text = f"marginal {baseline:.2f}"
        _label(axes, end, baseline, text, MUTED, (0, 3), ha="right", va="bottom")


def _label(
    axes: Axes, x: float, y: float, text: str, color: str, offset: tuple[int, int], **place: Any
) -> None:
    """Text at data (x, y), moved by `offset` points; `place` is its alignment, ha and va."""
    unit = "offset points"
    axes.annotate(text, (x, y), offset, textcoords=unit, fontsize=9, color=color, **place)


def _label_apart(
    axes: Axes, x: float, y: float, text: str, others: Sequence[Annotation]
) -> Annotation:
    """Text in the corner of (x, y) that is inside the axes and free of other labels, if any is."""

    def place(right: int, up: int) -> Annotation:
        align: dict[str, Any] = {
            "ha": "left" if right > 0 else "right",
            "va": "bottom" if up > 0 else "top",
        }
        offset, unit = (6 * right, 4 * up), "offset points"
        return axes.annotate(text, (x, y), offset, textcoords=unit, fontsize=9, color=INK, **align)

    taken = [other.get_window_extent() for other in others]
    for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        label = place(right, up)
        box = label.get_window_extent()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        if inside and not box.count_overlaps(taken):
            return label
        label.remove()
    return place(1, 1)


def _label_beside(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Text at (x, y), on the side that has more room."""
    if x > sum(axes.get_xlim()) / 2:
        _label(axes, x, y, text, color, (-7, 0), ha="right", va="center")
    else:
        _label(axes, x, y, text, color, (7, 0), ha="left", va="center")


def _finite_vector(name: str, values: ArrayLike) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    shape_ok = vector.ndim == 1 and vector.size >= 1
    require(shape_ok, name, "shape (num_episodes,), at least one", vector.shape)
    require(bool(np.isfinite(vector).all()), name, "finite numbers", "NaN or Inf")
    return vector


def _draw_stored(axes: Axes, returns: Floats, bins: Floats, name: str) -> None:
    """Histogram of the dataset's returns, with their mean and best."""
    _quiet(axes)
    counts, _, _ = axes.hist(returns, bins=bins.tolist(), color=FILL, rwidth=0.92)
    top = float(np.max(np.asarray(counts)))
    mean, best = float(returns.mean()), float(returns.max())
    label = f"{name}: {len(returns)} episodes, mean {mean:.0f}"
    for value, text, height in ((mean, label, 1.1), (best, f"best {best:.0f}", 1.25)):
        axes.vlines(value, 0.0, (height + 0.05) * top, color=MUTED, linewidth=1.0, linestyle=":")
        _label_beside(axes, value, height * top, text, MUTED)
    axes.set_ylim(0.0, 1.35 * top)
    axes.set_xlabel("return of an episode (undiscounted)")
    axes.set_ylabel("episodes")


def _draw_scored(strip: Axes, axes: Axes, returns: Floats) -> None:
    """A dot for each of the policy's episodes above the histogram, and what they come to."""
    _quiet(strip)
    strip.spines[["left", "bottom"]].set_visible(False)
    strip.tick_params(bottom=False)
    strip.set(yticks=[], ylim=(-1.0, 1.0))
    for value in returns:
        strip.axvline(value, 0.0, 0.5, color=POLICY, linewidth=1.0)
        axes.axvline(value, color=POLICY, linewidth=1.0, alpha=0.35)
    strip.plot(returns, np.zeros(len(returns)), "o", color=POLICY, markersize=6, alpha=0.85)
    mean = float(returns.mean())
    text = f"policy: {mean:.0f}"
    if len(returns) > 1:
        error = standard_error(returns.tolist())
        text = f"policy: {len(returns)} episodes, mean {mean:.0f} ± {error:.0f} (s.e.)"
    on_left = mean > sum(strip.get_xlim()) / 2
    outermost = float(returns.min() if on_left else returns.max())
    _label_beside(strip, outermost, 0.0, text, POLICY)


def _add_normalised_axis(axes: Axes, ref_scores: tuple[float, float]) -> None:
    low, high = ref_scores
    per_point = (high - low) / 100.0
    to_score = (lambda x: (x - low) / per_point, lambda score: low + score * per_point)
    top = axes.secondary_xaxis("top", functions=to_score)
    top.set_xlabel("normalised score", fontsize=9, color=MUTED)
    top.tick_params(labelsize=8, colors=MUTED, color=RULE, length=3)
    top.spines["top"].set_color(RULE)


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


def _attention_maps(model: TrajectoryTransformer, tokens: NDArray[np.integer]) -> Floats:
    """(num_layers, num_heads, context_len, context_len), dropout off."""
    limit = model.config.block_size
    integers = np.issubdtype(tokens.dtype, np.integer)
    shape_ok = integers and tokens.ndim == 1 and 1 <= len(tokens) <= limit
    require(shape_ok, "tokens", f"1 to {limit} integers, shape (context_len,)", tokens.shape)
    was_training = model.training
    model.eval()
    try:
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.pos_emb.device)[None]
        maps: Floats = model.attention_maps(ids)[:, 0].double().cpu().numpy()
    finally:
        model.train(was_training)
    return maps


def _weight_colors() -> Colormap:
    """Magma from purple on, so that black is left for the keys that a mask hides."""
    colors = ListedColormap(colormaps["magma"](np.linspace(0.2, 1.0, 256)))
    return colors.with_extremes(under="black", bad="white")


def _tick_transitions(axes: Axes, num_tokens: int, transition_dim: int) -> None:
    """Name each transition in its middle: t is the newest."""
    bounds = np.arange(0, num_tokens, transition_dim)
    middles = (bounds + np.minimum(bounds + transition_dim, num_tokens) - 1) / 2
    names = [f"t{offset}" if offset else "t" for offset in range(1 - len(bounds), 1)]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=0)


def _label_heads(panels: NDArray[np.object_]) -> None:
    for head, axes in enumerate(panels[0]):
        axes.set_title(f"head {head}", fontsize=9, color=INK)
    for layer, axes in enumerate(panels[:, 0]):
        axes.set_ylabel(f"layer {layer}\nquery", fontsize=9, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("key", fontsize=9, color=INK)


def _add_weight_scale(figure: Figure, image: AxesImage, panels: NDArray[np.object_]) -> None:
    ticks = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    place: dict[str, Any] = {"ax": list(panels.flat), "shrink": 0.5, "aspect": 30, "pad": 0.02}
    bar = figure.colorbar(image, ticks=ticks, format="%g", **place)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.ax.spines[:].set_visible(False)
    bar.set_label("attention weight (black: hidden value tokens)", fontsize=9, color=MUTED)
