"""Attention weights of one context."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray

from tt_fast.checkpoint import Checkpoint
from tt_fast.discretizer import Floats
from tt_fast.model import TrajectoryTransformer
from tt_fast.plots.style import INK, MUTED, new_figure
from tt_fast.validate import require


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
    figure = new_figure(2.2 * num_heads + 0.9, 2.2 * num_layers + 0.6)
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
