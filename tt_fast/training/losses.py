"""What a model's losses are measured on and against: batches, held-still weights, marginals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tt_fast.config import TOKEN_KINDS, ModelConfig
from tt_fast.data.windows import TokenWindows, marginal_entropies, spaced_ids
from tt_fast.model import TrajectoryTransformer


def model_batch(
    model: TrajectoryTransformer, windows: TokenWindows, window_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs, targets, mask and goal of windows, on the model's device, as `token_losses` wants.

    Args:
        window_ids: (batch,) int64.

    Returns:
        Three (batch, T) tensors and, for a goal-conditioned model, (batch, observation_dim).
    """
    config, device = model.config, model.pos_emb.device
    inputs, targets, mask = (x.to(device) for x in windows.gather(window_ids))
    if not config.goal_conditioned:
        return inputs, targets, mask, None
    return inputs, targets, mask, windows.goals(window_ids, config.observation_dim).to(device)


def evaluate_losses(
    model: TrajectoryTransformer, windows: TokenWindows, max_windows: int = 2048
) -> dict[str, float]:
    """Loss per token kind without dropout, over at most `max_windows` evenly spaced windows.

    Returns:
        Nats per token, keys as TOKEN_KINDS.
    """
    totals, counts = torch.zeros(len(TOKEN_KINDS)), torch.zeros(len(TOKEN_KINDS))
    kinds = model.target_kinds(windows.window_len).cpu()
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for window_ids in spaced_ids(len(windows), max_windows).split(128):
            inputs, targets, mask, goal = model_batch(model, windows, window_ids)
            losses = (model.token_losses(inputs, targets, goal) * mask).sum(0).cpu()
            totals.index_add_(0, kinds, losses)
            counts.index_add_(0, kinds, mask.sum(0).cpu().float())
    model.train(was_training)
    return dict(zip(TOKEN_KINDS, (totals / counts.clamp(min=1)).tolist(), strict=True))


def marginal_losses(windows: TokenWindows, model_config: ModelConfig) -> dict[str, float]:
    """Loss per token kind of predicting each dimension's marginal, nats per token."""
    entropies, counts = marginal_entropies(windows)
    dims = (model_config.observation_dim, model_config.action_dim, 1, 1)
    parts = np.split(np.arange(windows.transition_dim), np.cumsum(dims)[:-1])
    return {
        kind: float(entropies[part] @ counts[part] / max(1, counts[part].sum()))
        for kind, part in zip(TOKEN_KINDS, parts, strict=True)
    }
