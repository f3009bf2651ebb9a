"""Hugging Face's folder: config.json and model.safetensors or pytorch_model.bin.

Source: transformers 4.46.3, models/deprecated/trajectory_transformer. Its weights are the
original's by other names; it stores no discretizer. Its uncached logits are the original's, its
cached ones are not (it counts positions from 0 again), so only the former are reproduced.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tt_fast.config import ModelConfig
from tt_fast.files import to_json
from tt_fast.formats.base import (
    Exported,
    Imported,
    Recipe,
    expected_shapes,
    plain_values,
    read_extras,
    read_json,
    write_extras,
)
from tt_fast.formats.jannerm import model_config
from tt_fast.formats.torch_file import read_safetensors, read_torch_file
from tt_fast.validate import require

NAME = "huggingface"
MODEL_TYPE = "trajectory_transformer"
CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"


def is_folder(folder: Path) -> bool:
    """Whether it looks like one of this format: other models have a config.json too."""
    path = folder / CONFIG
    return path.is_file() and "model_type" in read_json(path)


def read(folder: Path) -> Imported:
    """A folder of Hugging Face's.

    Raises:
        FileNotFoundError: no weights.
        ValueError: damaged, hostile, another model, or its files do not belong together.
    """
    values = plain_values(read_json(folder / CONFIG))
    kind = values.get("model_type")
    require(kind == MODEL_TYPE, f"{folder / CONFIG}: model_type", repr(MODEL_TYPE), kind)
    config = model_config(values, folder / CONFIG, goal_conditioned=False)
    path = folder / (SAFETENSORS if (folder / SAFETENSORS).is_file() else BIN)
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected {SAFETENSORS} or {BIN}, got neither")
    shapes = {their_name(k): shape for k, shape in expected_shapes(path, config).items()}
    is_safe = path.name == SAFETENSORS
    state = read_safetensors(path, shapes) if is_safe else read_torch_file(path, shapes)
    discretizer, metadata = read_extras(folder, config, {}, {"format": NAME})
    weights = {our_name(name): tensor for name, tensor in state.items()}
    recipe = Recipe.of_metadata(config.vocab_size, metadata)
    return Imported(config, weights, discretizer, recipe, metadata)


def write(folder: Path, exported: Exported) -> None:
    """Write Hugging Face's files into a folder.

    Raises:
        ValueError: a goal-conditioned model, which this format does not have.
    """
    config = exported.config
    plain = not config.goal_conditioned
    require(plain, "model", "one without goal (the format has none)", "goal_conditioned=True")
    weights = {their_name(name): weight for name, weight in exported.weights().items()}
    save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(to_json(config_values(config)), encoding="utf-8")
    write_extras(folder, exported)


def config_values(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, by Hugging Face's names."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["TrajectoryTransformerModel"],
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "observation_dim": config.observation_dim,
        "action_dim": config.action_dim,
        "transition_dim": config.transition_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "embd_pdrop": config.embed_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "action_weight": config.action_weight,
        "reward_weight": config.reward_weight,
        "value_weight": config.value_weight,
    }


def their_name(name: str) -> str:
    """blocks.0.mlp.0.weight -> blocks.0.l1.weight."""
    return re.sub(r"\.mlp\.([02])\.", lambda m: ".l1." if m[1] == "0" else ".l2.", name)


def our_name(name: str) -> str:
    """blocks.0.l1.weight -> blocks.0.mlp.0.weight."""
    return re.sub(r"\.l([12])\.", lambda m: ".mlp.0." if m[1] == "1" else ".mlp.2.", name)
