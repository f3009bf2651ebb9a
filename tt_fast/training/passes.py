"""A training pass on the processor: the model's losses with gradients, made for its caches.

The same mathematics as `TrajectoryTransformer.token_losses` in training mode, with changes that a
profile asked for:

- a step's windows pass through in groups small enough for the larger caches, each group on one
  thread from beginning to end, so that threads wait for each other once a step;
- dropout masks come from generators side by side, made into bytes as they are drawn; they are
  addressed by (seed, step, pass), so resuming needs no state of them;
- attention is one autograd node, in C++ where the core was built: a head at a time in its caches,
  without scores that the mask hides, and no weights kept for the gradient;
- a residual branch's dropout, its addition and the LayerNorm behind it are another one, and GELU is
  a third;
- float32 matrix products go to oneDNN, twice as fast as torch's default where that is MKL on an
  AMD.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tt_fast.model import Block, TrajectoryTransformer, model_over
from tt_fast.training.cpu_ops import (
    DropoutMasks,
    add_norm,
    dropped,
    gelu,
    keep_mask,
    linear,
    self_attention,
)

#: Tokens of one pass, about. Each pass has a cost of its own, some 20 ms with the official models
#: (gradients are added up, in bfloat16 weights are cast); long ones leave the caches and take more
#: memory.
CPU_PASS_TOKENS = 4096


class Batch(NamedTuple):
    """Windows of one pass."""

    inputs: Tensor
    """(B, T) tokens"""
    targets: Tensor
    """(B, T) tokens"""
    mask: Tensor
    """(B, T), zero where an input does not count"""
    goal: Tensor | None
    """(B, observation_dim) tokens"""


def even_passes(num_windows: int, window_len: int, num_threads: int) -> int:
    """Windows of a pass of some `CPU_PASS_TOKENS`, such that every thread has as many passes."""
    count = math.ceil(num_windows * window_len / CPU_PASS_TOKENS)
    count = min(num_windows, math.ceil(count / num_threads) * num_threads)
    return math.ceil(num_windows / count)


class ParallelPasses:
    """A step's gradients from passes side by side, one thread each.

    Every thread has a model of its own over the same weights, and adds up gradients of its own;
    passes go to threads in turn and the sums are added in order, so that a number of threads has
    one result.

    Args:
        model: on the CPU.
        num_threads: passes at a time.
    """

    def __init__(self, model: TrajectoryTransformer, num_threads: int) -> None:
        self.model = model
        self._workers = [_twin(model) for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    def backward(
        self,
        batches: Sequence[Batch],
        *,
        addresses: Sequence[tuple[int, ...]],
        num_windows: int,
        bfloat16: bool,
    ) -> list[Tensor]:
        """Set the model's gradients to the part of a step's that these batches have.

        Args:
            batches: of a step, or some of them, in order.
            addresses: where each batch draws its dropout.
            num_windows: of the whole step, whose loss is the mean over all of them.
            bfloat16: arithmetic under autocast.

        Returns:
            Losses of each batch's tokens, (B, T), nats.
        """

        def run(worker_idx: int) -> list[Tensor]:
            model, found = self._workers[worker_idx], []
            model.zero_grad(set_to_none=True)
            for pass_idx in range(worker_idx, len(batches), len(self._workers)):
                batch, masks = batches[pass_idx], DropoutMasks(*addresses[pass_idx])
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    losses = pass_losses(model, batch.inputs, batch.targets, batch.goal, masks)
                found.append(add_gradients(model, losses, batch.mask, num_windows))
            return found

        with _one_thread_an_operation():
            by_worker = list(self._pool.map(run, range(len(self._workers))))
        self._add_gradients()
        count = len(self._workers)
        return [by_worker[i % count][i // count] for i in range(len(batches))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _add_gradients(self) -> None:
        each = zip(*(worker.parameters() for worker in self._workers), strict=True)
        for parameter, theirs in zip(self.model.parameters(), each, strict=True):
            parts = [p.grad for p in theirs if p.grad is not None]  # a worker may have had no pass
            parameter.grad = functools.reduce(torch.add, parts) if parts else None


def add_gradients(
    model: TrajectoryTransformer, losses: Tensor, mask: Tensor, num_windows: int
) -> Tensor:
    """Add the gradients of some of a step's windows to the model's.

    Args:
        losses: (B, T) of their tokens.
        mask: (B, T).
        num_windows: of the whole step, whose loss is the mean over all of them.

    Returns:
        The losses without their graph.
    """
    (len(losses) / num_windows * model.weighted_loss(losses, mask)).backward()
    return losses.detach()


def _twin(model: TrajectoryTransformer) -> TrajectoryTransformer:
    """A model over the same weights whose gradients are its own."""
    weights = {name: nn.Parameter(p.detach()) for name, p in model.named_parameters()}
    return model_over(model.config, weights).train()


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Torch's operations use one thread each; what it was is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pass_losses(
    model: TrajectoryTransformer,
    tokens: Tensor,
    targets: Tensor,
    goal: Tensor | None,
    masks: DropoutMasks | None,
) -> Tensor:
    """(B, T) cross-entropy of each target token, nats, with gradients.

    Args:
        model: on the CPU; its dropout modules are not asked, only its config.
        tokens, targets, goal: as `TrajectoryTransformer.token_losses` takes them.
        masks: where dropout comes from; None: no dropout.
    """
    config = model.config
    x = _embedding(model, tokens, goal, masks)
    hidden = ~model._mask[: x.shape[1], : x.shape[1]]
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    normed = blocks[0].ln1(x)
    for block, norm in zip(blocks, [*(b.ln1 for b in blocks[1:]), model.ln_f], strict=True):
        x, normed = _block(block, x, normed, hidden, masks, norm)
    logits = model._logits(normed[:, config.goal_len :])
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def _embedding(
    model: TrajectoryTransformer, tokens: Tensor, goal: Tensor | None, masks: DropoutMasks | None
) -> Tensor:
    """(B, goal_len + T, E), with dropout of the tokens but not of the goal."""
    x, start = model._embedding(tokens, goal), model.config.goal_len
    drop = model.config.embed_dropout
    keep = keep_mask(masks, (len(x), x.shape[1] - start, x.shape[2]), drop)
    if start:
        return torch.cat([x[:, :start], dropped(x[:, start:], keep, drop)], dim=1)
    return dropped(x, keep, drop)


def _block(
    block: Block,
    x: Tensor,
    normed: Tensor,
    hidden: Tensor,
    masks: DropoutMasks | None,
    next_norm: nn.LayerNorm,
) -> tuple[Tensor, Tensor]:
    """What the block makes of x (B, T, E), and `next_norm` of that.

    Args:
        normed: x after the block's first LayerNorm.
        hidden: (T, T), True where a query must not see a key.
        next_norm: the LayerNorm behind the block.
    """
    attn, drop = block.attn, float(block.attn.resid_drop.p)
    weight = torch.cat([attn.query.weight, attn.key.weight, attn.value.weight])
    bias = torch.cat([attn.query.bias, attn.key.bias, attn.value.bias])
    qkv = linear(normed, weight, bias).unflatten(2, (3, attn.num_heads, -1))
    keep = keep_mask(masks, (len(x) * attn.num_heads, *hidden.shape), attn.dropout)
    y = self_attention(qkv, hidden, keep, attn.dropout).flatten(2)
    y = linear(y, attn.proj.weight, attn.proj.bias)
    x, normed = add_norm(x, y, keep_mask(masks, x.shape, drop), drop, block.ln2)
    up, down = block.mlp[0], block.mlp[2]
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    y = linear(gelu(linear(normed, up.weight, up.bias)), down.weight, down.bias)
    return add_norm(x, y, keep_mask(masks, x.shape, drop), drop, next_norm)
