"""faster-trajectory-transformer's folder: config.yaml, discretizer.pt, model_last.pt.

Source: Howuhh/faster-trajectory-transformer at 213e58d, trajectory/models/gpt/gpt.py and
utils/discretization.py. Its model differs from the original's in three ways, each of which is an
exact special case of ours:

- no stop token: ours gets one whose logit is `NEVER`, so that its probability is 0;
- optionally one head with a bias for all dimensions, where ours has one without bias for each;
- one position more (10 * transition_dim), which a window of ours does not use.

A bias, and a constant logit, need something constant to multiply. The final LayerNorm provides it:
its scale w and shift b go into the head (W (w * x + b) = (W * w) x + W b), and a shift of 1 takes
their place. As the normalised x sums to 0, adding a number c to a whole row of the head changes its
logit by c * E and by nothing else; c is chosen so that the constant comes out.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from tt_fast.config import ModelConfig
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
    write_extras,
)
from tt_fast.formats.pickle_writer import Built, Call, Global, New, PersistentId, write_pickle
from tt_fast.formats.torch_file import read_archive_pickle, read_torch_file
from tt_fast.formats.unpickle import PickledArray, PickledObject
from tt_fast.model import attention_mask
from tt_fast.validate import require

NAME = "faster_tt"
CONFIG, DISCRETIZER, WEIGHTS = "config.yaml", "discretizer.pt", "model_last.pt"

#: Logit of a token that must never be drawn: exp of it is 0, beside -1000 too, which the cdf
#: filter gives to what it removes.
NEVER = -1e5

#: (relative, absolute), as their encode adds to values (discretization.py:45-54).
EDGE_TOLERANCE = (1e-5, 1e-8)

_MAX_YAML_BYTES = 2**20

# parts of a block that differ in name alone: theirs, ours
_SAME_PARTS = (("norm1", "ln1"), ("norm2", "ln2"), ("mlp.0", "mlp.0"), ("mlp.2", "mlp.2"))


def is_folder(folder: Path) -> bool:
    """Whether it looks like one of this format."""
    return (folder / CONFIG).is_file() and any(folder.glob("model_*.pt"))


def read(folder: Path) -> Imported:
    """A folder of faster-trajectory-transformer's.

    Raises:
        FileNotFoundError: no weights.
        ValueError: damaged, hostile, or its files do not belong together.
    """
    values = _read_yaml(folder / CONFIG)
    config, num_positions, has_heads = _model_config(folder / CONFIG, values)
    state = _read_state(folder, config, num_positions, has_heads)
    found = _metadata(values)
    discretizer, metadata = read_extras(folder, config, found, {"format": NAME})
    if discretizer is None and (folder / DISCRETIZER).is_file():
        discretizer = read_discretizer_file(folder / DISCRETIZER, config)
    strategy = values["dataset"].get("strategy", Recipe.strategy)
    recipe = Recipe(config.vocab_size, metadata["discount"], None, strategy=strategy)
    return Imported(config, weights_from(state, config), discretizer, recipe, metadata)


def read_own_weights(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a folder by its own names, nothing converted or left out.

    Returns:
        the config of the model that it becomes, and their state_dict without the masks.

    Raises:
        FileNotFoundError: no weights.
        ValueError: see `read`.
    """
    config, num_positions, has_heads = _model_config(folder / CONFIG, _read_yaml(folder / CONFIG))
    return config, _read_state(folder, config, num_positions, has_heads)


def _read_state(
    folder: Path, config: ModelConfig, num_positions: int, has_heads: bool
) -> dict[str, Tensor]:
    """Their state_dict, its masks checked and removed."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected {WEIGHTS}, got none")
    state = read_torch_file(
        path, their_shapes(path, config, num_positions, has_heads),
        optional=[f"blocks.{i}.attn_mask" for i in range(config.num_layers)],
    )  # fmt: skip
    _check_masks(path, state, config, num_positions)
    return state


def write(folder: Path, exported: Exported) -> None:
    """Write faster-trajectory-transformer's files into a folder.

    The format has no stop token: its probability goes to the other tokens in proportion.

    Raises:
        ValueError: a goal-conditioned model, or no discretizer; the format has one always.
    """
    config = exported.config
    plain = not config.goal_conditioned
    require(plain, "model", "one without goal (the format has none)", "goal_conditioned=True")
    edges = exported.discretizer
    if edges is None:
        raise ValueError("discretizer: expected one (the format stores it), got None")
    torch.save(weights_to(exported.weights(), config), folder / WEIGHTS)
    _write_discretizer(folder / DISCRETIZER, edges)
    (folder / CONFIG).write_text(yaml.safe_dump(_config_values(exported), sort_keys=False))
    write_extras(folder, exported)


# ---- weights ----


def weights_from(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights from theirs.

    Args:
        state: their GPT's state_dict; attention masks are not looked at.
        config: of the model that it becomes.

    Returns:
        float32 tensors by the names of a `TrajectoryTransformer`.
    """
    width = config.embed_dim
    weights = {
        "tok_emb.weight": torch.cat([state["tok_emb.weight"], torch.zeros(1, width)]),
        "pos_emb": state["pos_emb"][:, : config.block_size].clone(),
    }
    for i in range(config.num_layers):
        weights |= _block_from(state, f"blocks.{i}.")
    head, scale, shift = (state[k].double() for k in ("head.weight", "norm.weight", "norm.bias"))
    bias = state.get("head.bias", torch.zeros(config.vocab_size)).double()
    rows = head.expand(config.transition_dim, *head.shape[-2:])  # (D, V, E)
    constants = rows @ shift + bias  # (D, V)
    never = torch.full((config.transition_dim, 1), NEVER, dtype=torch.float64)
    rows = torch.cat([rows * scale, torch.zeros(config.transition_dim, 1, width)], dim=1)
    rows += ((torch.cat([constants, never], dim=1) - rows.sum(-1)) / width)[..., None]
    ones = torch.ones(width)
    return weights | {
        "head.weight": rows.float(), "ln_f.weight": ones, "ln_f.bias": ones.clone()
    }  # fmt: skip


def _block_from(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        q, k, v = state[f"{prefix}attention.in_proj_{kind}"].chunk(3)
        proj = state[f"{prefix}attention.out_proj.{kind}"]
        named = {"query": q, "key": k, "value": v, "proj": proj}
        out |= {f"{prefix}attn.{name}.{kind}": tensor.clone() for name, tensor in named.items()}
        for theirs, ours in _SAME_PARTS:
            out[f"{prefix}{ours}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]
    return out


def weights_to(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their state_dict from our weights, masks included; its seq_len is `config.block_size`.

    Each dimension has a head, and the stop token is left out.
    """
    state = {
        "tok_emb.weight": weights["tok_emb.weight"][:-1].clone(),
        "pos_emb": weights["pos_emb"],
        "norm.weight": weights["ln_f.weight"],
        "norm.bias": weights["ln_f.bias"],
        "head.weight": weights["head.weight"][:, :-1].clone(),
    }
    mask = ~attention_mask(config)
    for i in range(config.num_layers):
        ours = f"blocks.{i}."
        state[f"{ours}attn_mask"] = mask
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}attn.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{ours}attention.in_proj_{kind}"] = torch.cat(parts)
            state[f"{ours}attention.out_proj.{kind}"] = weights[f"{ours}attn.proj.{kind}"]
            for theirs, name in _SAME_PARTS:
                state[f"{ours}{theirs}.{kind}"] = weights[f"{ours}{name}.{kind}"]
    return state


def their_shapes(
    path: Path | str, config: ModelConfig, num_positions: int, has_heads: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of their state_dict, masks included; num_positions is their seq_len.

    Raises:
        ValueError: sizes that no tensor can have.
    """
    ours = expected_shapes(path, config)
    width, vocab_size, dims = config.embed_dim, config.vocab_size, config.transition_dim
    head: dict[str, tuple[int, ...]] = {"head.weight": (dims, vocab_size, width)}
    if not has_heads:
        head = {"head.weight": (vocab_size, width), "head.bias": (vocab_size,)}
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (vocab_size * dims, width), "pos_emb": (1, num_positions, width),
        "norm.weight": (width,), "norm.bias": (width,), **head,
    }  # fmt: skip
    for i in range(config.num_layers):
        prefix = f"blocks.{i}."
        shapes |= {
            f"{prefix}attn_mask": (num_positions, num_positions),
            f"{prefix}attention.in_proj_weight": (3 * width, width),
            f"{prefix}attention.in_proj_bias": (3 * width,),
            f"{prefix}attention.out_proj.weight": (width, width),
            f"{prefix}attention.out_proj.bias": (width,),
        }
        for theirs, name in _SAME_PARTS:
            for kind in ("weight", "bias"):
                shapes[f"{prefix}{theirs}.{kind}"] = ours[f"{prefix}{name}.{kind}"]
    return shapes


def _check_masks(
    path: Path, state: dict[str, Tensor], config: ModelConfig, num_positions: int
) -> None:
    """Remove the stored masks; each must be the one that our model computes."""
    size = min(num_positions, config.block_size)
    hidden = ~attention_mask(config)[:size, :size]
    for i in range(config.num_layers):
        name = f"blocks.{i}.attn_mask"
        mask = state.pop(name, None)
        same = mask is None or torch.equal(mask[:size, :size] != 0, hidden)
        require(same, f"{path}: {name}", "a causal mask that hides values", "another one")


# ---- config.yaml ----


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of config.yaml, plain values alone."""
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_YAML_BYTES} bytes")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: expected plain YAML, got: {line}; nothing was run") from error
    found = values if isinstance(values, dict) else {}
    sections = {k: plain_values(v) for k, v in found.items() if isinstance(v, dict)}
    for name in ("model", "dataset"):
        require(name in sections, f"{path}: {name}", "a section", type(found.get(name)).__name__)
    return sections


def _model_config(path: Path, values: Mapping[str, Any]) -> tuple[ModelConfig, int, bool]:
    """The model, its positions, and whether each dimension has a head of its own."""
    trainer = values.get("trainer")
    weights = {
        name: trainer.get(name, 1.0) if isinstance(trainer, dict) else 1.0
        for name in ("action_weight", "reward_weight", "value_weight")
    }
    model = values["model"]
    config = model_config(path, model, weights)
    return config, int(model["seq_len"]), bool(model.get("use_sep_heads", False))


def model_config(
    path: Path | str, model: Mapping[str, Any], loss_weights: Mapping[str, Any]
) -> ModelConfig:
    """From the keyword arguments of their GPT (gpt.py:75-88).

    Args:
        path: what errors call it.
        model: the keyword arguments.
        loss_weights: action_weight, reward_weight and value_weight, or some of them.

    Raises:
        ValueError: names the argument.
    """
    obs, act, width, vocab_size, length = read_sizes(
        path, model, "observation_dim", "action_dim", "transition_dim", "vocab_size", "seq_len"
    )
    defaults = {"embedding_dim": 32, "num_layers": 4, "num_heads": 4} | dict(model)
    embed, layers, heads = read_sizes(path, defaults, "embedding_dim", "num_layers", "num_heads")
    require(width == obs + act + 2, f"{path}: transition_dim", f"{obs + act + 2}", width)
    num_transitions = (length + 1) // width
    fits = num_transitions >= 1
    require(fits, f"{path}: seq_len", f"at least transition_dim - 1 = {width - 1}", length)
    has_heads = model.get("use_sep_heads", False)
    require(isinstance(has_heads, bool), f"{path}: use_sep_heads", "true or false", has_heads)
    options = {
        "embed_dropout": "embedding_dropout", "residual_dropout": "residual_dropout",
        "attention_dropout": "attention_dropout",
    }  # fmt: skip
    given = {ours: model[theirs] for ours, theirs in options.items() if theirs in model}
    try:
        return ModelConfig(
            obs, act, vocab_size, num_transitions, layers, heads, embed, **given, **loss_weights
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    dataset = values["dataset"]
    name, discount = dataset.get("env_name"), dataset.get("discount", 0.99)
    is_number = isinstance(discount, (int, float)) and not isinstance(discount, bool)
    require(is_number, f"{CONFIG}: dataset.discount", "a number", discount)
    return {
        **dataset_metadata(name if isinstance(name, str) else None),
        "discount": discount,
        "train_config": {"termination_penalty": None},  # it has none
    }


def _config_values(exported: Exported) -> dict[str, Any]:
    config, metadata = exported.config, exported.metadata
    return {
        "dataset": {
            "env_name": metadata.get("dataset") or metadata.get("env_id"),
            "seq_len": config.num_transitions,
            "num_bins": config.vocab_size,
            "discount": metadata.get("discount", 0.99),
            "strategy": exported.setting("strategy", "quantile"),
        },
        "model": {
            "vocab_size": config.vocab_size, "transition_dim": config.transition_dim,
            "observation_dim": config.observation_dim, "action_dim": config.action_dim,
            "seq_len": config.block_size, "embedding_dim": config.embed_dim,
            "num_layers": config.num_layers, "num_heads": config.num_heads,
            "embedding_dropout": config.embed_dropout,
            "residual_dropout": config.residual_dropout,
            "attention_dropout": config.attention_dropout, "use_sep_heads": True,
        },
        "trainer": {
            "action_weight": config.action_weight, "reward_weight": config.reward_weight,
            "value_weight": config.value_weight,
        },
    }  # fmt: skip


# ---- discretizer.pt ----


def read_discretizer_file(path: Path, config: ModelConfig) -> Discretizer:
    """The bins of a pickled KBinsDiscretizer.

    Raises:
        ValueError: damaged, hostile, or not one for a model of `config`.
    """
    held = read_archive_pickle(path)
    edges = held.state.get("bin_edges") if isinstance(held, PickledObject) else None
    if not isinstance(edges, PickledArray):
        raise ValueError(f"{path}: expected a KBinsDiscretizer with bin_edges")
    shape = (config.transition_dim, config.vocab_size + 1)
    require(edges.value.shape == shape, f"{path}: bin_edges", f"shape {shape}", edges.value.shape)
    try:
        return Discretizer(edges.value.T, EDGE_TOLERANCE)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _write_discretizer(path: Path, discretizer: Discretizer) -> None:
    """As `torch.save` writes their KBinsDiscretizer: a pickle, and a tensor beside it."""
    edges = np.ascontiguousarray(discretizer.thresholds.T)
    centers = (edges[:, 1:] + edges[:, :-1]) * 0.5  # (D, V)
    storage = PersistentId(("storage", Global("torch", "DoubleStorage"), "0", "cpu", centers.size))
    hooks = Call(Global("collections", "OrderedDict"), ())
    size, stride = centers.shape, (centers.shape[1], 1)
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    state = {
        "strategy": "quantile",
        "n_bins": discretizer.num_bins,
        "feature_dim": discretizer.transition_dim,
        "bin_edges": edges,
        "bin_centers": centers,
        "bin_centers_torch": Call(rebuild, (storage, 0, size, stride, False, hooks)),
    }
    cls = Global("trajectory.utils.discretization", "KBinsDiscretizer")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("discretizer/data.pkl", write_pickle(Built(New(cls), state)))
        archive.writestr("discretizer/byteorder", "little")
        archive.writestr("discretizer/data/0", centers.astype("<f8").tobytes())
        archive.writestr("discretizer/version", "3\n")
