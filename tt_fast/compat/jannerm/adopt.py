"""The original's `GPT` objects as models of ours, without copying their weights."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tt_fast.config import ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.formats import expected_shapes
from tt_fast.formats.jannerm import model_config
from tt_fast.model import TrajectoryTransformer, is_over, model_over
from tt_fast.planning.base import PlanBackend
from tt_fast.planning.search import make_backend
from tt_fast.validate import refuse, require


@dataclass(frozen=True)
class AdoptedModel:
    """A model of ours over the parameters of one of theirs, and the backend that plans with it.

    The parameters are the very same objects: where theirs change, the backend sees it and packs its
    weights again.
    """

    model: TrajectoryTransformer
    backend: PlanBackend


# A cache and nothing else: it holds no model alive, and an entry is made again when it is stale.
_ADOPTED: weakref.WeakKeyDictionary[nn.Module, AdoptedModel] = weakref.WeakKeyDictionary()


def adopt(model: Any) -> AdoptedModel:
    """Our model and backend for one of the original's, made once for each object.

    Args:
        model: the original's GPT or ConditionalGPT (any class with its attributes and parameter
            names), or a `TrajectoryTransformer`.

    Raises:
        ValueError: neither; says what is missing.
    """
    if not isinstance(model, nn.Module):
        refuse("model", "the original's GPT or a TrajectoryTransformer", type(model).__name__)
    found = _ADOPTED.get(model)
    if found is None or not is_over(found.model, dict(model.named_parameters())):
        found = _ADOPTED[model] = _adopt(model)
    return found


def _adopt(theirs: nn.Module) -> AdoptedModel:
    config = theirs.config if isinstance(theirs, TrajectoryTransformer) else _config_of(theirs)
    wanted = expected_shapes("model", config)
    parameters = dict(theirs.named_parameters())
    for name in sorted(wanted.keys() | parameters.keys()):
        got = tuple(parameters[name].shape) if name in parameters else None
        require(wanted.get(name) == got, f"model: {name}", f"shape {wanted.get(name)}", got)
    ours = model_over(config, parameters)
    no_estimate = Discretizer(np.zeros((config.vocab_size + 1, config.transition_dim)))
    return AdoptedModel(ours.eval(), make_backend("auto", ours, no_estimate))


def _config_of(theirs: nn.Module) -> ModelConfig:
    """What the original's GPT keeps of its config (transformers.py:88-117, 250-258)."""
    is_conditional = hasattr(theirs, "goal_emb")
    try:
        first: Any = theirs.blocks[0]  # type: ignore[index]
        values: dict[str, Any] = {
            name: getattr(theirs, name)
            for name in ("observation_dim", "action_dim", "transition_dim", "vocab_size")
        }
        goal_len = values["observation_dim"] if is_conditional else 0
        values["block_size"] = theirs.block_size - goal_len  # type: ignore[operator]
        values |= {
            "n_layer": len(theirs.blocks),  # type: ignore[arg-type]
            "n_head": first.attn.n_head,
            "n_embd": theirs.embedding_dim,
        }
    except (AttributeError, TypeError, IndexError) as error:
        expected = "model: expected the original's GPT or a TrajectoryTransformer"
        raise ValueError(f"{expected}, got {type(theirs).__name__}: {error}") from error
    return model_config(values, "model", is_conditional)
