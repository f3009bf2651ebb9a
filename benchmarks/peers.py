"""Hugging Face's TrajectoryTransformer, driven by our reference search.

Its own search does not exist, and its cached path is wrong: with past_key_values it keeps position
0, token offset 0 and mask[:1, :1]. So it runs uncached, as the reference does.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from tt_fast import TrajectoryTransformer
from tt_fast.measure import Case
from tt_fast.planning.reference import ReferenceBackend

#: The last releases that have the model.
REQUIREMENT = "transformers<4.47"

#: Names of ours that are called otherwise there.
_RENAMED = {".mlp.0.": ".l1.", ".mlp.2.": ".l2."}


class TransformersModel(nn.Module):
    """Hugging Face's model with the weights and the interface of ours, for `ReferenceBackend`.

    Raises:
        ImportError: transformers is missing, or too new to have the model.
    """

    def __init__(self, model: TrajectoryTransformer) -> None:
        super().__init__()
        self.config = model.config
        self.inner = _empty_model(model)
        weights = {_renamed(name): tensor for name, tensor in model.state_dict().items()}
        self.inner.load_state_dict(weights)
        self.pos_emb = self.inner.pos_emb

    def forward(self, tokens: Tensor, goal: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, vocab_size + 1) logits."""
        assert goal is None
        logits: Tensor = self.inner(tokens, use_cache=False, return_dict=True).logits
        return logits


def transformers_backend(case: Case) -> tuple[ReferenceBackend, nn.Module]:
    """The reference search over Hugging Face's model, and that model.

    Raises:
        ImportError: see `TransformersModel`.
        ValueError: its logits are not ours to 1e-4.
    """
    peer = TransformersModel(case.model).eval()
    tokens = torch.from_numpy(case.context(0))[None]
    with torch.no_grad():
        error = float((peer(tokens) - case.model(tokens)).abs().max())
    if not error <= 1e-4:
        raise ValueError(f"transformers: expected our logits to 1e-4, got a difference of {error}")
    return ReferenceBackend(cast(TrajectoryTransformer, peer), case.discretizer), peer.inner


def _empty_model(model: TrajectoryTransformer) -> Any:
    try:
        theirs = importlib.import_module("transformers.models.deprecated.trajectory_transformer")
    except ImportError as error:
        raise ImportError(f'pip install "{REQUIREMENT}": {error}') from error
    config = model.config
    return theirs.TrajectoryTransformerModel(
        theirs.TrajectoryTransformerConfig(
            vocab_size=config.vocab_size,
            observation_dim=config.observation_dim,
            action_dim=config.action_dim,
            transition_dim=config.transition_dim,
            block_size=config.block_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.embed_dim,
            use_cache=False,
        )
    )


def _renamed(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name
