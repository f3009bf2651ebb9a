"""Returns: against the dataset's, against latency, of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from tt_fast.discretizer import Floats
from tt_fast.plots.style import (
    FILL,
    INK,
    MUTED,
    POLICY,
    RULE,
    finite_vector,
    label_beside,
    new_figure,
    quiet,
)
from tt_fast.results import standard_error
from tt_fast.validate import require


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
    stored = finite_vector("dataset_returns", dataset_returns)
    scored = finite_vector("policy_returns", policy_returns)
    figure = new_figure(8.0, 3.4)
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
    x, y = finite_vector("decision_ms", decision_ms), finite_vector("returns", returns)
    lengths = [len(x), len(y), len(std_errors), len(names)]
    require(len(set(lengths)) == 1, "returns, std_errors, names", f"{lengths[0]} each", lengths[1:])
    require(bool((x > 0.0).all()), "decision_ms", "numbers above 0", float(x.min()))
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots()
    quiet(axes)
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
    x = finite_vector("means", means)
    lengths = [len(x), len(names), len(std_errors), len(seed_means)]
    wanted = f"{lengths[0]} each"
    require(len(set(lengths)) == 1, "names, std_errors, seed_means", wanted, lengths[1:])
    figure = new_figure(8.0, 0.9 + 0.5 * len(x))
    axes = figure.subplots()
    quiet(axes)
    for row, (mean, error, seeds) in enumerate(zip(x, std_errors, seed_means, strict=True)):
        dots = finite_vector("seed_means", seeds)
        axes.plot(dots, np.full(len(dots), row - 0.22), "o", color=MUTED, markersize=4, alpha=0.7)
        axes.errorbar(mean, row, xerr=error, fmt="o", color=POLICY, markersize=6, elinewidth=1.2)
    axes.set_yticks(range(len(x)), names)
    axes.set_ylim(len(x) - 0.5, -0.6)  # the first dataset on top
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel(f"{label}, mean ± standard error of all episodes; grey: each seed")
    return figure


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


def _draw_stored(axes: Axes, returns: Floats, bins: Floats, name: str) -> None:
    """Histogram of the dataset's returns, with their mean and best."""
    quiet(axes)
    counts, _, _ = axes.hist(returns, bins=bins.tolist(), color=FILL, rwidth=0.92)
    top = float(np.max(np.asarray(counts)))
    mean, best = float(returns.mean()), float(returns.max())
    label = f"{name}: {len(returns)} episodes, mean {mean:.0f}"
    for value, text, height in ((mean, label, 1.1), (best, f"best {best:.0f}", 1.25)):
        axes.vlines(value, 0.0, (height + 0.05) * top, color=MUTED, linewidth=1.0, linestyle=":")
        label_beside(axes, value, height * top, text, MUTED)
    axes.set_ylim(0.0, 1.35 * top)
    axes.set_xlabel("return of an episode (undiscounted)")
    axes.set_ylabel("episodes")


def _draw_scored(strip: Axes, axes: Axes, returns: Floats) -> None:
    """A dot for each of the policy's episodes above the histogram, and what they come to."""
    quiet(strip)
    strip.spines[["left", "bottom"]].set_visible(False)
    strip.tick_params(bottom=False)
    strip.set(yticks=[], ylim=(-1.0, 1.0))
    for value in returns:
        strip.axvline(value, 0.0, 0.3, color=POLICY, linewidth=1.0)
        axes.axvline(value, color=POLICY, linewidth=1.0, alpha=0.35)
    strip.plot(returns, np.full(len(returns), -0.4), "o", color=POLICY, markersize=6, alpha=0.85)
    mean = float(returns.mean())
    text = f"policy: {mean:.0f}"
    if len(returns) > 1:
        error = standard_error(returns.tolist())
        text = f"policy: {len(returns)} episodes, mean {mean:.0f} ± {error:.0f} (s.e.)"
    on_left = mean > sum(strip.get_xlim()) / 2
    outermost = float(returns.min() if on_left else returns.max())
    label_beside(strip, outermost, 0.6, text, POLICY)  # above the dots, however many there are


def _add_normalised_axis(axes: Axes, ref_scores: tuple[float, float]) -> None:
    low, high = ref_scores
    per_point = (high - low) / 100.0
    to_score = (lambda x: (x - low) / per_point, lambda score: low + score * per_point)
    top = axes.secondary_xaxis("top", functions=to_score)
    top.set_xlabel("normalised score", fontsize=9, color=MUTED)
    top.tick_params(labelsize=8, colors=MUTED, color=RULE, length=3)
    top.spines["top"].set_color(RULE)
