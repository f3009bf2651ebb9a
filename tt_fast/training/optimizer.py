"""AdamW groups, learning-rate schedule and budget of a training run, as the original has them,
and what the original has not: an average of the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from tt_fast.config import TrainConfig
from tt_fast.model import DimensionHead, TrajectoryTransformer

#: Windows of the original's whole schedule: 50 epochs of a million (scripts/train.py:102).
ORIGINAL_WINDOWS = 50_000_000


def build_optimizer(model: TrajectoryTransformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrix weights only (transformers.py:129-170)."""
    decayed = {
        f"{prefix}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, DimensionHead))
    }
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if n in decayed]},
        {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(float(config.betas[0]), float(config.betas[1])),
        weight_decay=config.weight_decay,
        fused=model.pos_emb.device.type == "cuda" or None,  # None: torch's choice
    )


class WeightAverage:
    """An exponential moving average of a model's weights, over optimiser steps.

    Args:
        model: whose weights it starts with.
        decay: part of the old average that a step keeps. Early on it keeps less,
            (1 + step) / (10 + step), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: TrajectoryTransformer, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: TrajectoryTransformer, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        average: list[torch.Tensor] = [*self.model.parameters()]
        weights: list[torch.Tensor] = [*model.parameters()]
        torch._foreach_lerp_(average, weights, 1.0 - decay)


@dataclass(frozen=True)
class Budget:
    """How long a run trains, and how far it is."""

    config: TrainConfig
    num_windows: int
    """Windows of one epoch"""
    window_len: int
    """Target tokens of one window"""

    def fraction(self, tokens: int, windows: int, seconds: float) -> float:
        """Share of the budget used, 1.0 or more when it is spent.

        Args:
            tokens: target tokens trained, stop tokens not counted.
            windows: windows trained.
            seconds: wall time spent training.
        """
        config, used = self.config, []
        if config.max_tokens is not None:
            used.append(tokens / config.max_tokens)
        if config.max_epochs is not None:
            used.append(windows / (config.max_epochs * self.num_windows))
        if config.max_windows is not None:
            used.append(windows / config.max_windows)
        if config.max_minutes is not None:
            used.append(seconds / (60.0 * config.max_minutes))
        return max(used, default=windows / ORIGINAL_WINDOWS)

    def learning_rate(self, tokens: int, fraction: float) -> float:
        """Learning rate after `tokens`, of a budget used up to `fraction`.

        Linear warm-up over one epoch's tokens, then a cosine to 10 % at 20 epochs
        (scripts/train.py:77-78, training.py:57-69). A smaller budget warms up over at most 5 % of
        it and ends its cosine with it. Past 20 epochs the cosine turns up again, as the original's
        does. The very first step runs at the peak rate, as there (training.py:54 steps before it
        sets a rate).
        """
        if tokens == 0:
            return self.config.learning_rate
        epoch_tokens = float(self.num_windows * self.window_len)
        budget_tokens = tokens / max(fraction, 1e-9)
        warmup = min(epoch_tokens, 0.05 * budget_tokens)
        final = min(20.0 * epoch_tokens, budget_tokens)
        if tokens < warmup:
            return self.config.learning_rate * tokens / warmup
        progress = (tokens - warmup) / max(1.0, final - warmup)
        return self.config.learning_rate * max(0.1, 0.5 * (1.0 + math.cos(math.pi * progress)))
