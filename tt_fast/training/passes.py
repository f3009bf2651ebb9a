"""A training pass on the processor: the model's losses with gradients, made for its caches.

The same mathematics as `TrajectoryTransformer.token_losses` in training mode, with changes that a
profile asked for:

- a step's windows pass through in groups whose activations stay in the cache, each group on one
  thread from beginning to end, so that threads wait for each other once a step;
- dropout masks come from a generator ten times as fast as torch's on a processor (six times with
  the comparison that makes a mask), and are kept as bytes; they are addressed by
  (seed, step, pass), so resuming needs no state of it;
- attention is one autograd node, in C++ where the core was built: a head at a time in its caches,
  without scores that the mask hides, and no weights kept for the gradient;
- float32 matrix products go to oneDNN, twice as fast as torch's default where that is MKL on an
  AMD.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tt_fast.model import Block, TrajectoryTransformer, model_over

try:
    import tt_fast._core as _core
except ImportError:
    _core = None  # type: ignore[assignment]

#: Tokens of one pass, about: near the fastest of 4 to 32 windows with the official models.
CPU_PASS_TOKENS = 2048

_UNIFORM_VALUES = 2**16


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


class DropoutMasks:
    """Masks of one pass, drawn one after another.

    Args:
        address: whole numbers that name the pass, such as (seed, step, pass); the same address
            gives the same masks.
    """

    def __init__(self, *address: int) -> None:
        self._generator = np.random.Generator(np.random.SFC64(list(address)))

    def keep(self, shape: tuple[int, ...], probability: float) -> Tensor:
        """uint8 of that shape: 0 with `probability`, rounded to a multiple of 2^-16, else 1."""
        count = math.prod(shape)
        words = self._generator.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64)
        uniform = torch.from_numpy(words.view(np.int16)[:count]).view(shape)
        first_kept = round(probability * _UNIFORM_VALUES) - _UNIFORM_VALUES // 2
        if first_kept == _UNIFORM_VALUES // 2:  # no int16: nothing is kept
            return torch.zeros(shape, dtype=torch.uint8)
        return uniform.ge(first_kept).view(torch.uint8)


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
    x = model._embedding(tokens, goal)
    x = _dropout(x, masks, config.embed_dropout, start=config.goal_len)
    hidden = ~model._mask[: x.shape[1], : x.shape[1]]
    for block in model.blocks:
        assert isinstance(block, Block)
        x = _block(block, x, hidden, masks)
    logits = model._logits(x[:, config.goal_len :])
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def _block(block: Block, x: Tensor, hidden: Tensor, masks: DropoutMasks | None) -> Tensor:
    """(B, T, E) -> (B, T, E); `hidden` (T, T) is True where a query must not see a key."""
    attn = block.attn
    weight = torch.cat([attn.query.weight, attn.key.weight, attn.value.weight])
    bias = torch.cat([attn.query.bias, attn.key.bias, attn.value.bias])
    qkv = linear(block.ln1(x), weight, bias).unflatten(2, (3, attn.num_heads, -1))
    keep = None
    if masks is not None and attn.dropout > 0.0:
        keep = masks.keep((len(x) * attn.num_heads, *hidden.shape), attn.dropout)
    y = self_attention(qkv, hidden, keep, attn.dropout).flatten(2)
    drop = float(attn.resid_drop.p)
    x = x + _dropout(linear(y, attn.proj.weight, attn.proj.bias), masks, drop)
    up, down = block.mlp[0], block.mlp[2]
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    h = F.gelu(linear(block.ln2(x), up.weight, up.bias))
    return x + _dropout(linear(h, down.weight, down.bias), masks, drop)


# ---- dropout ----


def _dropout(x: Tensor, masks: DropoutMasks | None, probability: float, start: int = 0) -> Tensor:
    """Zero elements with `probability` and scale the others; rows before `start` are left alone."""
    if masks is None or probability == 0.0:
        return x
    if start:
        return torch.cat([x[:, :start], _dropout(x[:, start:], masks, probability)], dim=1)
    dropped: Tensor = _Dropout.apply(x, masks.keep(tuple(x.shape), probability), probability)  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    """x * keep / (1 - probability); what is kept for the gradient is bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = _scale(probability)
        return (x * keep.to(x.dtype)).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (keep,), (gradient,) = ctx.saved_tensors, gradients
        return (gradient * keep.to(gradient.dtype)).mul_(ctx.scale), None, None


def _scale(probability: float) -> float:
    return 1.0 / (1.0 - probability) if probability < 1.0 else 0.0


# ---- attention ----


def self_attention(qkv: Tensor, hidden: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """`attention` of all heads of some windows, in C++ where that serves.

    Args:
        qkv: (B, T, 3, H, d) queries, keys and values.
        hidden, keep, probability: as `attention` takes them, N = B * H. In C++ every query must see
            a key.

    Returns:
        (B, T, H, d).
    """
    if _core_serves(qkv):
        y: Tensor = _CoreAttention.apply(qkv, hidden, keep, probability)  # type: ignore[no-untyped-call]
        return y
    query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
    y = attention(query, key, value, hidden, keep, probability)
    return y.reshape(len(qkv), qkv.shape[3], *y.shape[1:]).transpose(1, 2)


def _core_serves(qkv: Tensor) -> bool:
    return (
        _core is not None
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.numel() > 0
        and qkv.shape[1] <= _core.MAX_TRAIN_LEN
        and qkv.shape[4] <= _core.MAX_TRAIN_HEAD_DIM
    )


class _CoreAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, hidden: Tensor, keep: Tensor | None, probability: float
    ) -> Tensor:
        ctx.keep_scale = _scale(probability) if keep is not None else 1.0
        kept = None if keep is None else _array(keep)
        y, stats = _core.train_attention(_array(qkv), _array(hidden), kept, ctx.keep_scale, "auto")
        ctx.save_for_backward(qkv, hidden, keep, torch.from_numpy(stats))
        return _tensor(y, qkv.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        qkv, hidden, keep, stats = ctx.saved_tensors
        kept = None if keep is None else _array(keep)
        dqkv = _core.train_attention_grad(
            _array(qkv), _array(hidden), kept, ctx.keep_scale, stats.numpy(), _array(gradients[0]),
            "auto",
        )  # fmt: skip
        return _tensor(dqkv, qkv.dtype), None, None, None


def _array(x: Tensor) -> NDArray[Any]:
    """Its memory, copied only if it is not contiguous; the bits of bfloat16 as int16."""
    x = x.detach().contiguous()
    array: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    tensor: Tensor = torch.from_numpy(array).view(dtype)
    return tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    keep: Tensor | None,
    probability: float,
) -> Tensor:
    """Softmax attention whose weights are dropped where `keep` is 0.

    Args:
        query, key, value: (N, T, d), N sequences times heads.
        hidden: (T, T) bool, True where a query (row) must not see a key (column).
        keep: (N, T, T) uint8, or None for no dropout.
        probability: of a weight to be dropped; the others are scaled by 1 / (1 - probability).

    Returns:
        (N, T, d).
    """
    y: Tensor = _Attention.apply(query, key, value, hidden, keep, probability)  # type: ignore[no-untyped-call]
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        keep: Tensor | None,
        probability: float,
    ) -> Tensor:
        ctx.scale = 1.0 / math.sqrt(query.shape[-1])
        ctx.drop_scale = _scale(probability) if keep is not None else 1.0
        bias = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -math.inf)[None]
        weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=ctx.scale).softmax(-1)
        ctx.save_for_backward(query, key, value, weights, keep)
        return torch.bmm(_kept(weights, keep), value).mul_(ctx.drop_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, weights, keep = ctx.saved_tensors
        # y = s (W * M) v, W = softmax(z): dv = s (W * M)^T dy, dW = s M * (dy v^T),
        # dz = W * (dW - sum_k W dW)
        dy = gradients[0] * ctx.drop_scale
        dvalue = torch.bmm(_kept(weights, keep).transpose(1, 2), dy)
        dweights = _kept(torch.bmm(dy, value.transpose(1, 2)), keep)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dscores *= ctx.scale
        dquery, dkey = torch.bmm(dscores, key), torch.bmm(dscores.transpose(1, 2), query)
        return dquery, dkey, dvalue, None, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype)


# ---- matrix products ----


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, (..., I) -> (..., O), by the fastest product for its type.

    In float32 that is oneDNN's where this torch has it; under autocast torch's own.
    """
    if not _ONEDNN or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias of contiguous float32 (M, K), (N, K)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return y


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].reshape(-1, len(weight))
        dx = _product(dy, weight.T.contiguous()).view(x.shape)
        dweight = _product(dy.T.contiguous(), x.flatten(0, -2).T.contiguous())
        return dx, dweight, dy.sum(0)
