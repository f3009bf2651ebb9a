"""The original's log folder: state_N.pt, model_config.pkl, data_config.pkl.

Source: scripts/train.py, trajectory/utils/config.py and serialization.py of the original. The
pickles hold a class by name and keyword arguments: a recipe of the model, and of the dataset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tt_fast.config import GoalValueMask, ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.formats.base import (
    Exported,
    Imported,
    Recipe,
    dataset_metadata,
    expected_shapes,
    plain_values,
    read_extras,
    read_sizes,
    whole_transitions,
    write_extras,
)
from tt_fast.formats.pickle_writer import Built, Global, New, write_pickle
from tt_fast.formats.torch_file import read_torch_file
from tt_fast.formats.unpickle import PickledArray, PickledObject, read_pickle_file
from tt_fast.model import attention_mask
from tt_fast.validate import require, require_int

NAME = "jannerm"
MODEL, DATA = "model_config.pkl", "data_config.pkl"

_CONFIG_CLASS = Global("trajectory.utils.config", "Config")
_GPT, _CONDITIONAL_GPT = (
    "trajectory.models.transformers.GPT",
    "trajectory.models.transformers.ConditionalGPT",
)


def is_folder(folder: Path) -> bool:
    """Whether it looks like one of this format."""
    return (folder / MODEL).is_file()


def read(folder: Path, epoch: int | None = None) -> Imported:
    """A folder of the original's.

    Args:
        folder: with model_config.pkl and state_N.pt; data_config.pkl may be absent.
        epoch: which N; None takes the highest, as the original's "latest".

    Raises:
        FileNotFoundError: no state, or not that one.
        ValueError: damaged, hostile, or its files do not belong together.
    """
    config = _read_model_config(folder / MODEL)
    path = _state_path(folder, epoch)
    masks = [f"blocks.{i}.attn.mask" for i in range(config.num_layers)]
    size = config.goal_len + config.block_size
    shapes = expected_shapes(path, config) | dict.fromkeys(masks, (1, 1, size, size))
    state = read_torch_file(path, shapes, optional=masks)
    for name in masks:
        _check_mask(path, name, state.pop(name, None), config)
    recipe, found, discretizer = _read_data_config(folder / DATA, config)
    origin = {"format": NAME, "epoch": _epoch(path)}
    own, metadata = read_extras(folder, config, found, origin)
    return Imported(config, state, own or discretizer, recipe, metadata)


def write(folder: Path, exported: Exported, epoch: int | None = None) -> None:
    """Write the original's files into a folder.

    Args:
        folder: an empty one.
        exported: the checkpoint.
        epoch: N of state_N.pt; None takes the one it was read from, else 0.

    Raises:
        ValueError: a goal-conditioned model whose mask the original does not have.
    """
    config = exported.config
    if config.goal_conditioned:
        wanted = '"original", the only mask that its ConditionalGPT has'
        require(config.goal_value_mask == "original", "goal_value_mask", wanted, "correct")
    origin = exported.metadata.get("converted_from") or {}
    number = origin.get("epoch", 0) if epoch is None else epoch
    require_int("epoch", number, 0)
    mask = attention_mask(config).float()[None, None]
    masks = {f"blocks.{i}.attn.mask": mask for i in range(config.num_layers)}
    torch.save(exported.weights() | masks, folder / f"state_{number}.pt")
    (folder / MODEL).write_bytes(_write_config(*_model_recipe(config)))
    (folder / DATA).write_bytes(_write_config(*_data_recipe(exported)))
    write_extras(folder, exported)


def model_config(sizes: Mapping[str, Any], path: Path | str, goal_conditioned: bool) -> ModelConfig:
    """From the keyword arguments of the original's model (train.py:57-69).

    Args:
        sizes: by their names; dropouts and loss weights may be absent.
        path: what errors call it.
        goal_conditioned: of the original's ConditionalGPT.

    Raises:
        ValueError: names the argument.
    """
    names = ("observation_dim", "action_dim", "transition_dim", "vocab_size", "block_size")
    obs, act, width, vocab_size, block = read_sizes(path, sizes, *names)
    require(width == obs + act + 2, f"{path}: transition_dim", f"{obs + act + 2}", width)
    layers, heads, embed = read_sizes(path, sizes, "n_layer", "n_head", "n_embd")
    options = {
        "embed_dropout": "embd_pdrop", "residual_dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop", "action_weight": "action_weight",
        "reward_weight": "reward_weight", "value_weight": "value_weight",
    }  # fmt: skip
    mask: GoalValueMask = "original" if goal_conditioned else "correct"
    try:
        return ModelConfig(
            obs, act, vocab_size, whole_transitions(path, block, width), layers, heads, embed,
            goal_conditioned=goal_conditioned, goal_value_mask=mask,
            **{ours: sizes[theirs] for ours, theirs in options.items() if theirs in sizes},
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_model_config(path: Path) -> ModelConfig:
    name, values = _read_config(path)
    require(name in (_GPT, _CONDITIONAL_GPT), f"{path}: class", f"{_GPT} or ConditionalGPT", name)
    return model_config(values, path, name == _CONDITIONAL_GPT)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The class and keyword arguments of a pickled Config."""
    config = read_pickle_file(path)
    held = config.state if isinstance(config, PickledObject) else {}
    cls, values = held.get("_class"), held.get("_dict")
    if isinstance(cls, type) and issubclass(cls, PickledObject) and isinstance(values, dict):
        return cls.origin, plain_values(values)
    raise ValueError(f"{path}: expected a pickled Config with a class and a dict")


def _read_data_config(
    path: Path, config: ModelConfig
) -> tuple[Recipe, dict[str, Any], Discretizer | None]:
    """The recipe, metadata, and the discretizer if the pickle holds one."""
    recipe = Recipe(config.vocab_size)
    if not path.is_file():
        return recipe, {}, None
    pickled = read_pickle_file(path)
    discretizer = _find_discretizer(path, pickled, config)
    if discretizer is not None:
        return recipe, {}, discretizer
    name, values = _read_config(path)
    expected = "trajectory.datasets.sequence.DiscretizedDataset or GoalDataset"
    require(name.startswith("trajectory.datasets.sequence."), f"{path}: class", expected, name)
    kind = values.get("discretizer", "QuantileDiscretizer")
    require(kind == "QuantileDiscretizer", f"{path}: discretizer", "'QuantileDiscretizer'", kind)
    bins = values.get("N", 50)  # sequence.py:150
    require(bins == config.vocab_size, f"{path}: N", f"the model's {config.vocab_size}", bins)
    return _recipe(path, values, bins), _metadata(values), None


def _recipe(path: Path, values: Mapping[str, Any], bins: int) -> Recipe:
    discount, penalty = values.get("discount", 0.99), values.get("penalty")
    longest = values.get("max_path_length", 1000)
    for name, number in (("discount", discount), ("penalty", penalty)):
        is_number = isinstance(number, (int, float)) or (name == "penalty" and number is None)
        require(is_number, f"{path}: {name}", "a number", number)
    require_int(f"{path}: max_path_length", longest, 1)
    return Recipe(bins, float(discount), None if penalty is None else float(penalty), longest)


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe of a dataset says in our words."""
    env = values.get("env")
    about = dataset_metadata(env if isinstance(env, str) else None)
    settings = {
        "num_bins": values.get("N"), "discount": values.get("discount"),
        "termination_penalty": values.get("penalty"), "step": values.get("step"),
    }  # fmt: skip
    return {**about, "discount": values.get("discount", 0.99), "train_config": settings}


def _find_discretizer(path: Path, pickled: Any, config: ModelConfig) -> Discretizer | None:
    """A QuantileDiscretizer that was pickled itself, or within its dataset."""
    held = pickled.state.get("discretizer") if isinstance(pickled, PickledObject) else None
    for found in (pickled, held):
        thresholds = found.state.get("thresholds") if isinstance(found, PickledObject) else None
        if isinstance(thresholds, PickledArray):
            shape = (config.vocab_size + 1, config.transition_dim)
            got = thresholds.value.shape
            require(got == shape, f"{path}: thresholds", f"shape {shape} by {MODEL}", got)
            return Discretizer(thresholds.value)
    return None


def _check_mask(path: Path, name: str, mask: Tensor | None, config: ModelConfig) -> None:
    """A stored mask must be the one that our model computes, or plans would differ."""
    same = mask is None or torch.equal(mask[0, 0] != 0, attention_mask(config))
    require(same, f"{path}: {name}", "the original's mask of values", "another one")


def _state_path(folder: Path, epoch: int | None) -> Path:
    epochs = sorted(n for n in map(_epoch, folder.glob("state_*.pt")) if n is not None)
    if not epochs or (epoch is not None and epoch not in epochs):
        wanted = "state_N.pt" if epoch is None else f"state_{epoch}.pt"
        raise FileNotFoundError(f"{folder}: expected {wanted}, got epochs {epochs}")
    return folder / f"state_{epochs[-1] if epoch is None else epoch}.pt"


def _epoch(path: Path) -> int | None:
    found = re.fullmatch(r"state_(\d+)", path.stem)
    return int(found[1]) if found else None


def _model_recipe(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    name = "ConditionalGPT" if config.goal_conditioned else "GPT"
    return f"trajectory.models.transformers.{name}", {
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "observation_dim": config.observation_dim,
        "action_dim": config.action_dim,
        "transition_dim": config.transition_dim,
        "action_weight": config.action_weight,
        "reward_weight": config.reward_weight,
        "value_weight": config.value_weight,
        "embd_pdrop": config.embed_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _data_recipe(exported: Exported) -> tuple[str, dict[str, Any]]:
    config, metadata = exported.config, exported.metadata
    step, strategy = exported.setting("step", 1), exported.setting("strategy", "quantile")
    wanted = '"quantile": bins are fitted again from what this format says, which knows no other'
    require(strategy == "quantile", "strategy", wanted, strategy)
    return "trajectory.datasets.sequence.DiscretizedDataset", {
        "env": metadata.get("dataset") or metadata.get("env_id"),
        "N": config.vocab_size,
        "penalty": (metadata.get("train_config") or {}).get("termination_penalty", -100.0),
        "sequence_length": config.num_transitions * step,
        "step": step,
        "discount": metadata.get("discount", 0.99),
        "discretizer": "QuantileDiscretizer",
    }


def _write_config(cls: str, values: dict[str, Any]) -> bytes:
    """As the original's Config pickles itself (config.py:20-22)."""
    module, _, name = cls.rpartition(".")
    state = {"_class": Global(module, name), "_dict": values}
    return write_pickle(Built(New(_CONFIG_CLASS), state))
