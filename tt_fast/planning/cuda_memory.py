"""What the GPU planner keeps on the device: sizes, weights in the kernels' layout, buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.kernels.layerwise import Newest
from tt_fast.kernels.layout import ModelShape, PlanShape, Tree, Weights
from tt_fast.kernels.mlp import fits_mlp
from tt_fast.kernels.prefill import Scratch
from tt_fast.kernels.sample import DrawFlags, Draws
from tt_fast.kernels.segment import fits_segment
from tt_fast.kernels.select import Scores
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning.reference import window_len


def model_shape(config: ModelConfig, precision: str) -> ModelShape:
    """A model's sizes, padded to what tiles need.

    Args:
        config: of the model.
        precision: of matrix products, "ieee", "tf32" or "bf16".
    """
    head_dim = config.embed_dim // config.num_heads
    return ModelShape(
        observation_dim=config.observation_dim,
        action_dim=config.action_dim,
        num_layers=config.num_layers,
        embed_dim=config.embed_dim,
        embed=_power_of_two(config.embed_dim),
        num_heads=triton.next_power_of_2(config.num_heads),
        head_dim=_power_of_two(head_dim),
        hidden=-(-4 * config.embed_dim // 64) * 64,
        num_ids=config.vocab_size + 1,
        ids=_power_of_two(config.vocab_size + 1),
        scale=1.0 / math.sqrt(head_dim),
        precision=precision,
    )


def plan_shape(model: TrajectoryTransformer, config: PlanConfig) -> PlanShape:
    """A plan's sizes. With "crop", the context is the part of it that a window holds."""
    dims = model.config
    max_past = (window_len(model, config) + 1) // dims.transition_dim - 1
    crops = config.overflow == "crop"
    nodes = config.beam_width * dims.observation_dim + config.num_rows * (dims.action_dim + 1)
    return PlanShape(
        num_beams=config.beam_width,
        num_rows=config.num_rows,
        horizon=config.horizon,
        first_step=max_past if crops else dims.num_transitions - config.horizon,
        max_past=max_past,
        crops=crops,
        level_nodes=nodes,
        num_draws=config.num_draws(dims.observation_dim, dims.action_dim),
    )


def _power_of_two(n: int) -> int:
    return int(max(16, triton.next_power_of_2(n)))


# ---- weights ----


def pack_weights(model: TrajectoryTransformer, shape: ModelShape, device: torch.device) -> Weights:
    """Weights as kernels read them: transposed to (in, out), heads and widths padded with zeros."""
    dtype = torch.bfloat16 if shape.is_bf16 else torch.float32
    config = model.config
    heads = (config.num_heads, config.embed_dim // config.num_heads)
    matrices = {name: tensor.detach().float() for name, tensor in model.named_parameters()}

    def pad(tensor: Tensor, *sizes: int) -> Tensor:
        """Zeros behind the last len(sizes) dimensions, up to these sizes."""
        padding = [
            (0, size - n) for size, n in zip(sizes, tensor.shape[-len(sizes) :], strict=True)
        ]
        return F.pad(tensor, [n for pair in reversed(padding) for n in pair])

    def block(i: int, name: str) -> Tensor:
        return matrices[f"blocks.{i}.{name}"]

    def stack(make: Callable[[Tensor], Tensor], *names: str) -> Tensor:
        """(num_layers, len(names), ...), or without the second dimension for one name."""
        layers = [torch.stack([make(block(i, n)) for n in names]) for i in range(shape.num_layers)]
        stacked = torch.stack(layers)
        return stacked[:, 0] if len(names) == 1 else stacked

    def vector(v: Tensor) -> Tensor:
        return pad(v, shape.embed)

    def to_heads(w: Tensor) -> Tensor:
        split = w.T.reshape(-1, *heads) if w.ndim == 2 else w.reshape(1, *heads)
        padded = pad(split, shape.num_heads, shape.head_dim).flatten(1)
        return pad(padded, shape.embed, shape.width) if w.ndim == 2 else padded[0]

    def from_heads(w: Tensor) -> Tensor:
        split = pad(w.T.reshape(*heads, -1), shape.num_heads, shape.head_dim, shape.embed)
        return split.flatten(0, 1)

    qkv = ("attn.query", "attn.key", "attn.value")
    norms = stack(vector, "ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
    packed = {
        "token": vector(matrices["tok_emb.weight"]),
        "position": vector(matrices["pos_emb"][0]),
        "norms": norms,
        "qkv": stack(to_heads, *(f"{name}.weight" for name in qkv)).to(dtype),
        "qkv_bias": stack(to_heads, *(f"{name}.bias" for name in qkv)),
        "proj": stack(from_heads, "attn.proj.weight").to(dtype),
        "up": stack(lambda w: pad(w.T, shape.embed, shape.hidden), "mlp.0.weight").to(dtype),
        "up_bias": stack(lambda b: pad(b, shape.hidden), "mlp.0.bias"),
        "down": stack(lambda w: pad(w.T, shape.hidden, shape.embed), "mlp.2.weight").to(dtype),
        "out_bias": stack(vector, "attn.proj.bias", "mlp.2.bias"),
        "last_norm": torch.stack([vector(matrices["ln_f.weight"]), vector(matrices["ln_f.bias"])]),
        "head": pad(matrices["head.weight"].transpose(1, 2), shape.embed, shape.ids).to(dtype),
    }
    return Weights(**{name: tensor.contiguous().to(device) for name, tensor in packed.items()})


def refresh_weights(weights: Weights, model: TrajectoryTransformer, shape: ModelShape) -> None:
    """The model's weights of now, into the same memory, so that captured graphs see them."""
    packed = pack_weights(model, shape, weights.token.device)
    for old, new in zip(weights, packed, strict=True):
        old.copy_(new)


# ---- buffers ----


@dataclass(frozen=True)
class Buffers:
    """Everything that a plan of `num_envs` contexts reads and writes, allocated once."""

    trees: tuple[Tree, Tree]
    """before and after a selection, in turn: slots and origins differ, all else is the same"""
    draws: Draws
    scores: Scores
    context_nodes: Tensor
    """(num_envs * first_step,) int32, see kernels/prefill.py"""
    nodes: Tensor
    """(num_envs * num_beams * max_past,) int32"""
    counts: Tensor
    """(horizon + 1, 4) int32, the first of four: of context_nodes, then of nodes after each planned
    step. Kernels are compiled once for pointers to 16 bytes, and again for others"""
    scratch: Scratch
    newest: Newest


def make_buffers(
    model: ModelShape, plan: PlanShape, flags: DrawFlags, num_envs: int, device: torch.device
) -> Buffers:
    """Allocates them, zeroed."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def ints(*shape: int) -> Tensor:
        return zeros(*shape, dtype=torch.int32)

    def scratch(rows: int) -> Scratch:
        widths = (model.embed, model.width, model.width)
        hidden = zeros(rows if kept_hidden(model) else 0, model.hidden)
        return Scratch(*(zeros(rows, width) for width in widths), hidden, ints(rows))

    double, rows = torch.float64, num_envs * plan.num_rows
    max_nodes = num_envs * plan.num_beams * plan.max_past if plan.crops else 0
    encoded = num_envs * encoded_rows(model, plan)
    first, second = _make_trees(model, plan, num_envs, zeros)
    draws = Draws(
        settings=zeros(8),
        seeds=zeros(num_envs, dtype=torch.int64),
        plan_indices=ints(num_envs),
        uniforms=zeros(rows if flags.given_uniforms else 0, plan.num_draws, dtype=double),
        thresholds=zeros(2, model.num_ids, dtype=double),
        estimates=zeros(num_envs, 2, plan.horizon, plan.num_rows),
        probs=zeros(rows if flags.keep_probs else 0, 2, model.num_ids),
        broken=ints(1),
    )
    scores = Scores(
        factors=zeros(plan.horizon + 1, dtype=double),
        returns=zeros(plan.horizon + 1, num_envs, plan.num_beams, dtype=double),
        scores=zeros(num_envs, plan.horizon, plan.num_rows, dtype=double),
        parents=ints(num_envs, plan.horizon, plan.num_beams),
    )
    decoded = 0 if fits_segment(model) else rows
    newest = Newest(scratch(decoded), zeros(decoded, model.ids), ints(1) + 1)
    return Buffers(
        (first, second), draws, scores, ints(num_envs * plan.first_step), ints(max_nodes),
        ints(plan.horizon + 1, 4), scratch(encoded), newest,
    )  # fmt: skip


def _make_trees(
    model: ModelShape, plan: PlanShape, num_envs: int, zeros: Callable[..., Tensor]
) -> list[Tree]:
    """Two, with slots and origins of their own."""
    kept = torch.bfloat16 if model.is_bf16 else torch.float32
    cache = (model.num_layers, num_envs, plan.num_levels, plan.level_nodes, model.width)
    tokens = (num_envs, plan.num_steps, plan.num_rows, model.transition_dim)
    shared = {
        "key_cache": zeros(*cache, dtype=kept),
        "value_cache": zeros(*cache, dtype=kept),
        "tokens": zeros(*tokens, dtype=torch.int32),
        "past": zeros(num_envs, dtype=torch.int32),
    }
    slots = (num_envs, 2, plan.num_levels, plan.num_beams)
    origins = (num_envs, plan.num_steps, plan.num_beams)
    return [
        Tree(
            slots=zeros(*slots, dtype=torch.int32),
            origins=zeros(*origins, dtype=torch.int32),
            **shared,
        )
        for _ in range(2)
    ]


def encoded_rows(model: ModelShape, plan: PlanShape) -> int:
    """The most tokens of one context that are encoded at once: its own, or after a crop."""
    nodes = plan.num_beams * plan.max_past if plan.crops else 0
    return int(max(plan.first_step, nodes) * model.visible)


def kept_hidden(model: ModelShape) -> int:
    """Hidden columns of the MLP that a pass keeps in memory."""
    return 0 if fits_mlp(model) else model.hidden


def plan_bytes(model: ModelShape, plan: PlanShape, flags: DrawFlags, num_envs: int) -> int:
    """Device memory that the buffers of so many contexts take, the small ones left out."""
    cache = model.num_layers * plan.num_levels * plan.level_nodes * model.width
    kept = 2 if model.is_bf16 else 4
    decoded = 0 if fits_segment(model) else plan.num_rows
    activations = model.embed + 2 * model.width + kept_hidden(model) + 1
    numbers = (encoded_rows(model, plan) + decoded) * activations + decoded * model.ids
    numbers += plan.num_steps * plan.num_rows * model.transition_dim
    numbers += 2 * plan.num_rows * model.num_ids if flags.keep_probs else 0
    uniforms = plan.num_draws * plan.num_rows if flags.given_uniforms else 0
    return int(num_envs * (2 * kept * cache + 4 * numbers + 8 * uniforms))
