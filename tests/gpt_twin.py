"""Objects with the interface of the original's GPT and QuantileDiscretizer, made of our parts.

The original is not there when the tests run; what its callers see of it is: attributes, parameter
names, signatures and types. tests/run_original.py runs the real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer


class GPT(nn.Module):
    """The attributes and parameters of a GPT (or a ConditionalGPT, with a goal embedding)."""

    def __init__(self, ours: TrajectoryTransformer) -> None:
        super().__init__()
        config = ours.config
        self.tok_emb, self.pos_emb, self.drop = ours.tok_emb, ours.pos_emb, ours.drop
        self.blocks = nn.Sequential(*ours.blocks)
        self.ln_f, self.head = ours.ln_f, ours.head
        for block in self.blocks:
            block.attn.n_head = config.num_heads
        if config.goal_conditioned:
            self.goal_emb = ours.goal_emb
        self.observation_dim, self.action_dim = config.observation_dim, config.action_dim
        self.transition_dim, self.vocab_size = config.transition_dim, config.vocab_size
        self.block_size = config.block_size + config.goal_len
        self.embedding_dim = config.embed_dim


class QuantileDiscretizer:
    """discretize, reconstruct and value_fn as the original's callers use them."""

    def __init__(self, thresholds: NDArray[Any]) -> None:
        self.ours = Discretizer(thresholds)
        self.thresholds, self.N = thresholds, len(thresholds) - 1

    def discretize(self, x: NDArray[Any], subslice: Any = (None, None)) -> NDArray[np.int64]:
        return self.ours.encode(np.atleast_2d(x), slice(*subslice))

    def reconstruct(self, indices: Any, subslice: Any = (None, None)) -> NDArray[np.float64]:
        return self.ours.decode(np.atleast_2d(np.asarray(indices)), slice(*subslice))

    def value_fn(self, probs: Tensor, percentile: str | float) -> tuple[Tensor, Tensor]:
        """float32 tensors of rewards and values; the stop token's probability is left out."""
        assert isinstance(probs, Tensor)
        weights = probs.numpy()[:, :, :-1]
        if percentile == "mean":
            pair = [self.ours.expectation(weights[:, i], i - 2) for i in (0, 1)]
        else:
            pair = [self.ours.percentile(weights[:, i], float(percentile), i - 2) for i in (0, 1)]
        rewards, values = (torch.tensor(x, dtype=torch.float32) for x in pair)
        return rewards, values
