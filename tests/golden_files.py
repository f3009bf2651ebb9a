"""The golden files, and the weights of their models drawn again from the seeds.

The files were written with models of four shapes, initialised as the original does and then
perturbed so that every parameter matters; tests/golden/README.md has the recipe in words.
Drawing them again in plain torch keeps some 25 MB of random numbers out of the repository.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tt_fast.config import ModelConfig
from tt_fast.model import TrajectoryTransformer

GOLDEN_DIR = Path(__file__).parent / "golden"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GoldenModel:
    """One golden model: its shape, its seed and how its head was scaled."""

    observation_dim: int
    action_dim: int
    seed: int
    vocab_size: int = 100
    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    head_scale: float = 5.0
    action_head_scale: float = 1.0
    goal_conditioned: bool = False

    @property
    def transition_dim(self) -> int:
        return self.observation_dim + self.action_dim + 2

    @property
    def num_positions(self) -> int:
        """Ten transitions less a token; the original's goal model adds the goal's width."""
        goal_len = self.observation_dim if self.goal_conditioned else 0
        return 10 * self.transition_dim - 1 + goal_len


def _odd(seed: int, **scales: float) -> GoldenModel:
    return GoldenModel(5, 2, seed, 37, num_layers=3, num_heads=2, embed_dim=48, **scales)


GOLDEN_MODELS = {
    "hopper": GoldenModel(11, 3, 100),
    "halfcheetah": GoldenModel(17, 6, 101),
    "ant": GoldenModel(27, 8, 102),
    "odd": _odd(103),
    "hopper_soft": GoldenModel(11, 3, 200, action_head_scale=0.1),
    "odd_soft": _odd(201, action_head_scale=0.1),
    "odd_bs": _odd(300, head_scale=3.0),
    "odd_goal": _odd(301, head_scale=3.0, goal_conditioned=True),
}


def load_golden(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of tests/golden/`name`.npz."""
    with np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def golden_config(name: str, **changes: Any) -> ModelConfig:
    """The `ModelConfig` of golden model `name`."""
    golden = GOLDEN_MODELS[name]
    fields = ("observation_dim", "action_dim", "vocab_size", "num_layers", "num_heads", "embed_dim")
    values = {field: getattr(golden, field) for field in (*fields, "goal_conditioned")}
    return ModelConfig(**(values | {"goal_value_mask": "original"} | changes))


@functools.cache
def golden_model(name: str) -> TrajectoryTransformer:
    """Golden model `name` in eval mode; shared between tests, so leave its weights alone."""
    return build_golden_model(name)


def build_golden_model(name: str, **changes: Any) -> TrajectoryTransformer:
    """A fresh golden model, with changes to its config that do not touch its weights' shapes."""
    model = TrajectoryTransformer(golden_config(name, **changes))
    model.load_state_dict(golden_weights(name))
    return model.eval()


def golden_weights(name: str) -> Weights:
    """The state_dict of golden model `name`, under the original's key names, float32."""
    golden = GOLDEN_MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(golden.seed)
        return _perturbed(_initial_weights(golden), golden)


def _initial_weights(golden: GoldenModel) -> Weights:
    """The original's random initialisation (transformers.py:88-130, ein.py:21-27).

    Building a torch layer draws its default weights, so the order of construction is part of the
    recipe although most of these draws are overwritten.
    """
    width, vocab_size = golden.embed_dim, golden.vocab_size
    layers: dict[str, nn.Module] = {
        "tok_emb": nn.Embedding(vocab_size * golden.transition_dim + 1, width)
    }
    for idx in range(golden.num_layers):
        layers |= {f"blocks.{idx}.{name}": layer for name, layer in _block_layers(width).items()}
    layers["ln_f"] = nn.LayerNorm(width)
    head = torch.empty(golden.transition_dim, vocab_size + 1, width)
    for matrix in head:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    for layer in layers.values():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            layer.weight.normal_(0.0, 0.02)
    if golden.goal_conditioned:  # comes after the original's initialisation: stays N(0, 1)
        layers["goal_emb"] = nn.Embedding(vocab_size * golden.observation_dim, width)
    weights = {f"{n}.{key}": p.data for n, m in layers.items() for key, p in m.named_parameters()}
    return {"pos_emb": torch.zeros(1, golden.num_positions, width), "head.weight": head} | weights


def _block_layers(width: int) -> dict[str, nn.Module]:
    """Layers of one block, in the original's order of construction (transformers.py:12-76)."""
    return {
        "ln1": nn.LayerNorm(width),
        "ln2": nn.LayerNorm(width),
        "attn.key": nn.Linear(width, width),
        "attn.query": nn.Linear(width, width),
        "attn.value": nn.Linear(width, width),
        "attn.proj": nn.Linear(width, width),
        "mlp.0": nn.Linear(width, 4 * width),
        "mlp.2": nn.Linear(4 * width, width),
    }


def _perturbed(weights: Weights, golden: GoldenModel) -> Weights:
    """Larger matrices, and random numbers where the initialisation leaves zeros and ones."""
    for name, weight in sorted(weights.items()):
        if name == "pos_emb":
            weight.normal_(0.0, 0.08)
        elif name == "head.weight":
            weight *= golden.head_scale
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.05)
        elif weight.dim() == 1:
            weight.normal_(0.0, 0.1).add_(1.0)  # not normal_(1, 0.1): that rounds otherwise
        else:
            weight *= 4.0
    actions = slice(golden.observation_dim, golden.observation_dim + golden.action_dim)
    weights["head.weight"][actions] *= golden.action_head_scale
    return weights
