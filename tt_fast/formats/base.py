"""What every foreign format is turned into, and what all of them share."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_fast.config import ModelConfig, Strategy
from tt_fast.data import load_dataset
from tt_fast.data.load import Source
from tt_fast.data.registry import find_dataset
from tt_fast.data.windows import build_transitions
from tt_fast.discretizer import Discretizer
from tt_fast.files import to_json
from tt_fast.model import TrajectoryTransformer
from tt_fast.validate import require, require_int

#: What we put beside a foreign format's own files: nothing reads it but us.
THRESHOLDS, METADATA = "discretizer.npz", "metadata.json"


@dataclass(frozen=True)
class Recipe:
    """How a discretizer was fitted: what formats store in place of its thresholds."""

    num_bins: int
    discount: float = 0.99
    termination_penalty: float | None = -100.0
    max_path_length: int = 1000
    strategy: Strategy = "quantile"

    @classmethod
    def of_metadata(cls, num_bins: int, metadata: Mapping[str, Any]) -> Recipe:
        """As the metadata of a checkpoint of ours tell it; the original's where they do not."""
        trained = metadata.get("train_config") or {}
        require(isinstance(trained, Mapping), "train_config", "an object", trained)
        return cls(
            num_bins,
            metadata.get("discount", cls.discount),
            trained.get("termination_penalty", cls.termination_penalty),
            trained.get("max_path_length", cls.max_path_length),
            trained.get("strategy", cls.strategy),
        )

    def fit(self, source: Source) -> Discretizer:
        """The discretizer of a dataset.

        Raises:
            ValueError: the dataset is bad, or has too few rows for `num_bins`; no such strategy.
        """
        transitions = build_transitions(
            load_dataset(source),
            discount=self.discount,
            termination_penalty=self.termination_penalty,
            max_path_length=self.max_path_length,
        )
        return Discretizer.fit_columns(transitions.columns(), self.num_bins, self.strategy)


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint in our terms."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """Of a `TrajectoryTransformer`, by its parameters' names; float32, on the CPU"""
    discretizer: Discretizer | None
    """None where the folder holds only a recipe, or nothing"""
    recipe: Recipe
    """What fits the discretizer, given the dataset"""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """What a writer needs of a checkpoint of ours."""

    model: TrajectoryTransformer
    discretizer: Discretizer | None
    metadata: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    def weights(self) -> dict[str, Tensor]:
        """float32 on the CPU, by name."""
        state = self.model.state_dict()
        return {name: w.detach().float().cpu().contiguous() for name, w in state.items()}

    def setting(self, name: str, default: Any) -> Any:
        """One of the settings it was trained with."""
        value = (self.metadata.get("train_config") or {}).get(name)
        return default if value is None else value


def new_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> TrajectoryTransformer:
    """A model of these weights, in eval mode."""
    with torch.random.fork_rng([]):  # initial weights draw from the global generator
        model = TrajectoryTransformer(config)
    model.load_state_dict(weights)
    return model.eval()


def expected_shapes(path: Path | str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a `TrajectoryTransformer`, by name, without making it.

    Raises:
        ValueError: more layers than any model has; names `path`.
    """
    require_int(f"{path}: number of layers", config.num_layers, 1, 10_000)
    width, dims, vocab_size = config.embed_dim, config.transition_dim, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (vocab_size * dims + 1, width),
        "pos_emb": (1, config.block_size + config.goal_len, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
        "head.weight": (dims, vocab_size + 1, width),
    }
    if config.goal_conditioned:
        shapes["goal_emb.weight"] = (vocab_size * config.observation_dim, width)
    squares = ("attn.key", "attn.query", "attn.value", "attn.proj")
    block: dict[str, tuple[int, ...]] = {
        **{f"{name}.{kind}": (width,) for name in ("ln1", "ln2") for kind in ("weight", "bias")},
        **{f"{name}.weight": (width, width) for name in squares},
        **{f"{name}.bias": (width,) for name in squares},
        "mlp.0.weight": (4 * width, width),
        "mlp.0.bias": (4 * width,),
        "mlp.2.weight": (width, 4 * width),
        "mlp.2.bias": (width,),
    }
    for layer in range(config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def whole_transitions(path: Path | str, num_positions: int, transition_dim: int) -> int:
    """Transitions of a window of k * transition_dim - 1 tokens.

    Raises:
        ValueError: it is no such window.
    """
    count, rest = divmod(num_positions + 1, transition_dim)
    expected = f"k * transition_dim - 1 with transition_dim={transition_dim}"
    require(rest == 0 and count >= 1, f"{path}: block_size", expected, num_positions)
    return count


def read_sizes(path: Path | str, values: Mapping[str, Any], *names: str) -> list[int]:
    """Positive whole numbers of a foreign config, by name.

    Raises:
        ValueError: one is absent, or no size that a model of this kind has.
    """
    for name in names:
        require_int(f"{path}: {name}", values.get(name), 1, 2**24)
    return [int(values[name]) for name in names]


def dataset_metadata(dataset: str | None) -> dict[str, Any]:
    """What a dataset's name tells, for a checkpoint's metadata."""
    info = None if dataset is None else find_dataset(dataset)
    return {
        "dataset": dataset,
        "env_id": info.env_id if info else None,
        "ref_scores": list(info.ref_scores) if info else None,
    }


def plain_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Numbers, words and None by name; in place of what is nested, and may be endless, its type."""
    kinds = (bool, int, float, str, type(None))
    named = {key: value for key, value in values.items() if isinstance(key, str)}
    return {k: v if isinstance(v, kinds) else f"a {type(v).__name__}" for k, v in named.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_extras(folder: Path, exported: Exported) -> None:
    """Thresholds and metadata, which the format has no place for."""
    (folder / METADATA).write_text(to_json(exported.metadata), encoding="utf-8")
    if exported.discretizer is not None:
        np.savez(folder / THRESHOLDS, **exported.discretizer.arrays())


def read_extras(
    folder: Path, config: ModelConfig, found: dict[str, Any], origin: Mapping[str, Any]
) -> tuple[Discretizer | None, dict[str, Any]]:
    """What `write_extras` left, if anything.

    Args:
        folder: of the foreign checkpoint.
        config: what the discretizer must fit.
        found: metadata from the format's own files, which hold where ours are silent.
        origin: where the checkpoint comes from, for its metadata.

    Raises:
        ValueError: damaged.
    """
    own = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    metadata = {**found, **own, "converted_from": dict(origin)}
    path = folder / THRESHOLDS
    return (read_discretizer(path, config) if path.is_file() else None), metadata


def read_discretizer(path: Path, config: ModelConfig) -> Discretizer:
    """A discretizer's npz file.

    Raises:
        ValueError: damaged, or not one for a model of `config`.
    """
    shape = (config.vocab_size + 1, config.transition_dim)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {"thresholds": _read_array(archive, "thresholds", shape)}
            if "edge_tolerance.npy" in archive.namelist():
                arrays["edge_tolerance"] = _read_array(archive, "edge_tolerance", (2,))
        return Discretizer.from_arrays(arrays)
    except Exception as error:  # a damaged archive can fail in any way
        raise ValueError(f"{path}: damaged, or of another model: {error}") from error


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """An array of an npz file, whose header is looked at before anything is allocated."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        require(version == (1, 0), name, "version (1, 0)", version)
        found, _, dtype = np.lib.format.read_array_header_1_0(file)
        if found != shape or dtype != np.float64:
            raise ValueError(f"expected {name} float64 {shape}, got {dtype} {found}")
        file.seek(0)
        array: NDArray[np.float64] = np.lib.format.read_array(file, allow_pickle=False)
    return array
