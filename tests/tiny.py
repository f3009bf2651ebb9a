"""Models, datasets and checkpoints small enough to plan and train in milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig, TrainConfig
from tt_fast.data import OfflineDataset
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer

OBSERVATION_DIM, ACTION_DIM, NUM_BINS = 3, 2, 8


def tiny_model_config(**changes: Any) -> ModelConfig:
    values = {
        "observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "vocab_size": NUM_BINS,
        "num_transitions": 4, "num_layers": 2, "num_heads": 2, "embed_dim": 16,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def tiny_train_config(**changes: Any) -> TrainConfig:
    values = {
        "batch_size": 8, "num_bins": NUM_BINS, "log_steps": 3, "checkpoint_steps": 5,
        "device": "cpu", "max_path_length": 100,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def tiny_dataset(num_episodes: int = 5, length: int = 20, seed: int = 0) -> OfflineDataset:
    """Random walks; odd episodes terminate, even ones are cut."""
    rng = np.random.default_rng(seed)
    num_steps = num_episodes * length
    ends = np.arange(1, num_steps + 1) % length == 0
    odd = (np.arange(num_steps) // length) % 2 == 1
    return OfflineDataset(
        observations=rng.normal(size=(num_steps, OBSERVATION_DIM)).cumsum(0).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_steps, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=num_steps).astype(np.float32),
        terminations=ends & odd,
        truncations=ends & ~odd,
        env_id="Tiny-v0",
        name="tiny",
        ref_scores=(0.0, 10.0),
    )


def tiny_model(seed: int = 0, **changes: Any) -> TrajectoryTransformer:
    """Random weights, large enough that distributions are not flat; in eval mode."""
    model = TrajectoryTransformer(tiny_model_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model.eval()


def tiny_discretizer(seed: int = 0, num_bins: int = NUM_BINS) -> Discretizer:
    rng = np.random.default_rng(seed)
    return Discretizer.fit(rng.normal(size=(500, OBSERVATION_DIM + ACTION_DIM + 2)), num_bins)


def tiny_checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    metadata = {"env_id": "Tiny-v0", "dataset": "tiny", "discount": 0.9}
    return Checkpoint(tiny_model(seed, **changes), tiny_discretizer(seed), metadata)


def weights_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Every parameter, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
