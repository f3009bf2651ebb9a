"""Models and discretizers of faster-trajectory-transformer in terms of ours.

Source: Howuhh/faster-trajectory-transformer at 213e58d.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.formats import faster_tt as file_format
from tt_fast.formats import new_model
from tt_fast.formats.faster_tt import EDGE_TOLERANCE, weights_from
from tt_fast.formats.torch_file import check_shapes
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning.base import PlanBackend
from tt_fast.planning.fingerprint import fingerprint
from tt_fast.planning.search import make_backend
from tt_fast.validate import refuse, require


@dataclass(frozen=True, eq=False)
class PublishedGPT:
    """Their model as data: weights by their names, and its sizes."""

    weights: Mapping[str, Tensor]
    """Their state_dict, without the masks"""
    config: ModelConfig
    """Of the model of ours that it becomes"""

    @classmethod
    def load(cls, folder: str | Path) -> tuple[PublishedGPT, Discretizer]:
        """Read one of their folders without their code, and without running what it holds.

        Args:
            folder: with config.yaml, model_last.pt and discretizer.pt.

        Raises:
            FileNotFoundError: a file is absent.
            ValueError: damaged, hostile, or its files do not belong together.
        """
        config, weights = file_format.read_own_weights(Path(folder))
        path = Path(folder) / file_format.DISCRETIZER
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: expected {file_format.DISCRETIZER}, got none")
        return cls(weights, config), file_format.read_discretizer_file(path, config)

    @classmethod
    def of(cls, model: Any) -> PublishedGPT:
        """One of theirs, of ours, or one that is described already; weights are not copied.

        Args:
            model: their GPT (any module with its attributes and parameter names), a
                `TrajectoryTransformer` (its stop token's probability goes to the other tokens, and
                its window is a token shorter than theirs), or a `PublishedGPT`.

        Raises:
            ValueError: none of them; says what is missing.
        """
        if isinstance(model, PublishedGPT):
            return model
        if isinstance(model, TrajectoryTransformer):
            plain = not model.config.goal_conditioned
            require(plain, "model", "one without goal", "goal_conditioned=True")
            state = {name: w.detach() for name, w in model.state_dict().items()}
            return cls(_without_masks(file_format.weights_to(state, model.config)), model.config)
        return _describe(model)

    @property
    def seq_len(self) -> int:
        """Tokens of their window."""
        return self.weights["pos_emb"].shape[1]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.weights["pos_emb"].device


def _describe(model: Any) -> PublishedGPT:
    """What their GPT keeps of its arguments (gpt.py:88-126)."""
    expected = "their GPT, a TrajectoryTransformer, a Checkpoint or a PublishedGPT"
    if not isinstance(model, nn.Module):
        refuse("model", expected, type(model).__name__)
    theirs: Any = model
    names = (
        "vocab_size", "transition_dim", "observation_dim", "action_dim", "seq_len",
        "embedding_dim", "num_layers", "use_sep_heads",
    )  # fmt: skip
    try:
        sizes = {name: getattr(theirs, name) for name in names}
        sizes["num_heads"] = theirs.blocks[0].attention.num_heads
    except (AttributeError, TypeError, IndexError) as error:
        got = type(model).__name__
        raise ValueError(f"model: expected {expected}, got {got}: {error}") from error
    config = file_format.model_config("model", sizes, {})
    weights = _without_masks(model.state_dict())
    shapes = file_format.their_shapes("model", config, sizes["seq_len"], sizes["use_sep_heads"])
    check_shapes("model", _without_masks(shapes), {k: tuple(w.shape) for k, w in weights.items()})
    return PublishedGPT(weights, config)


def _without_masks(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith(".attn_mask")}


def as_discretizer(discretizer: Any, model: Any = None) -> Discretizer:
    """Ours from their KBinsDiscretizer (utils/discretization.py:5-54).

    Args:
        discretizer: theirs, anything with their bin_edges; ours is returned as it is; None takes
            the one of `model`.
        model: a `Checkpoint`, for that.

    Raises:
        ValueError: none of them.
    """
    if discretizer is None and isinstance(model, Checkpoint):
        discretizer = model.discretizer
    if isinstance(discretizer, Discretizer):
        return discretizer
    edges = getattr(discretizer, "bin_edges", None)
    if edges is None:
        got = type(discretizer).__name__
        refuse("discretizer", "their KBinsDiscretizer or a tt_fast.Discretizer", got)
    return Discretizer(np.asarray(edges).T, EDGE_TOLERANCE)


@dataclass(frozen=True)
class _Adopted:
    """Our model and backend for one of theirs, as it was."""

    versions: tuple[Any, ...]
    discretizer: Discretizer
    backend: PlanBackend


# A cache and nothing else: it holds no model alive, and an entry is made again when it is stale.
_ADOPTED: weakref.WeakKeyDictionary[Any, _Adopted] = weakref.WeakKeyDictionary()


def adopt(model: Any, discretizer: Discretizer) -> PlanBackend:
    """The backend that plans with a model, made anew where weights or bins have changed.

    Args:
        model: theirs, a `TrajectoryTransformer` or a `PublishedGPT`.
        discretizer: ours.

    Raises:
        ValueError: none of these models, or bins that do not fit it.
    """
    versions = _versions(model)
    found = _ADOPTED.get(model)
    if found is None or found.versions != versions or not _same(found.discretizer, discretizer):
        backend = make_backend("auto", _our_model(model), discretizer)
        found = _ADOPTED[model] = _Adopted(versions, discretizer, backend)
    return found.backend


def _our_model(model: Any) -> TrajectoryTransformer:
    if isinstance(model, TrajectoryTransformer):
        return copy.copy(model)  # shares everything, and does not keep the cache's key alive
    theirs = PublishedGPT.of(model)
    weights = {name: w.detach().float().cpu() for name, w in theirs.weights.items()}
    return new_model(theirs.config, weights_from(weights, theirs.config)).to(theirs.device)


def _versions(model: Any) -> tuple[Any, ...]:
    """Changes when a weight does."""
    is_data = isinstance(model, PublishedGPT)
    return fingerprint(model.weights.values() if is_data else model.parameters())


def _same(a: Discretizer, b: Discretizer) -> bool:
    return a is b or bool(np.array_equal(a.thresholds, b.thresholds))


def config_of(model: Any) -> ModelConfig:
    """The config of ours that a model of theirs, of ours or a `Checkpoint` has."""
    inner = model.model if isinstance(model, Checkpoint) else model
    known = isinstance(inner, TrajectoryTransformer)
    config: ModelConfig = inner.config if known else PublishedGPT.of(inner).config
    return config
