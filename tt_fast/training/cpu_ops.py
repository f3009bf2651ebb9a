"""Operations of a training pass on the processor, with gradients, fused where that saves time.

In C++ where the core was built, else in torch's operations, to the same masks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import tt_fast._core as _core
except ImportError:
    _core = None  # type: ignore[assignment]

_UNIFORM_VALUES = 2**16
_MASK_LANES = 16
"""Generators of a mask, side by side."""


class DropoutMasks:
    """Masks of one pass, drawn one after another.

    A mask takes 16 bits an element from the words of `_MASK_LANES` SFC64 generators in turn. Where
    the C++ core was not built, numpy draws the same.

    Args:
        address: whole numbers that name the pass, such as (seed, step, pass); the same address
            gives the same masks.
    """

    def __init__(self, *address: int) -> None:
        words = np.random.SFC64(list(address)).random_raw(3 * _MASK_LANES)
        self._state: NDArray[np.uint64] = words.reshape(3, _MASK_LANES)
        self._step = 0

    def keep(self, shape: tuple[int, ...], probability: float) -> Tensor:
        """uint8 of that shape: 0 with `probability`, rounded to a multiple of 2^-16, else 1."""
        count = math.prod(shape)
        first_kept = round(probability * _UNIFORM_VALUES) - _UNIFORM_VALUES // 2
        if first_kept == _UNIFORM_VALUES // 2:  # no int16: nothing is kept
            return torch.zeros(shape, dtype=torch.uint8)
        num_steps = math.ceil(count / (4 * _MASK_LANES))
        if _core is not None:
            kept = _core.draw_keep(self._state, self._step, first_kept, count, "auto")
        else:
            words = _mask_words(self._state, self._step, num_steps)
            kept = (words.view(np.int16)[:count] >= first_kept).view(np.uint8)
        self._step += num_steps
        return torch.from_numpy(kept).view(shape)


def _mask_words(state: NDArray[np.uint64], first_step: int, num_steps: int) -> NDArray[np.uint64]:
    """(num_steps * lanes) words, by step and lane; the states (3, lanes) of SFC64 move on."""
    words = np.empty((num_steps, state.shape[1]), np.uint64)
    generator = np.random.SFC64(0)
    for lane in range(state.shape[1]):
        start = np.append(state[:, lane], np.uint64(first_step))
        generator.state = generator.state | {"state": {"state": start}}
        words[:, lane] = generator.random_raw(num_steps)
        state[:, lane] = generator.state["state"]["state"][:3]
    return words.reshape(-1)


# ---- dropout ----


def keep_mask(
    masks: DropoutMasks | None, shape: tuple[int, ...], probability: float
) -> Tensor | None:
    """The next mask; None where nothing is dropped."""
    if masks is None or probability == 0.0:
        return None
    return masks.keep(tuple(shape), probability)


def dropped(x: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """x * keep / (1 - probability)."""
    if keep is None:
        return x
    dropped: Tensor = _Dropout.apply(x, keep, probability)  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    """What is kept for the gradient is bytes."""

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


# ---- rows ----


def add_norm(
    x: Tensor, y: Tensor, keep: Tensor | None, probability: float, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """x + y * keep / (1 - probability), and its LayerNorm; in C++ where that serves.

    Args:
        x: (..., E), the residual stream.
        y: (..., E), a branch of it; under autocast in bfloat16, as the LayerNorm is then in C++.
        keep: uint8, (..., E), or None for no dropout.
        probability: of a number of y to be dropped.
        norm: of E numbers.
    """
    if _core is None or x.dtype != torch.float32 or y.dtype not in _CORE_TYPES or not x.numel():
        x = x + dropped(y, keep, probability)
        return x, norm(x)
    scale = _scale(probability) if keep is not None else 1.0
    both: tuple[Tensor, Tensor] = _CoreAddNorm.apply(  # type: ignore[no-untyped-call]
        x, y, keep, scale, norm.weight, norm.bias, norm.eps
    )
    return both


class _CoreAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        keep: Tensor | None,
        scale: float,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        kept = None if keep is None else _rows(keep)
        total, normed, stats = _core.train_norm(
            _rows(x), _rows(y), kept, scale, _array(gamma), _array(beta), eps, "auto"
        )
        out = _tensor(total, x.dtype).view(x.shape)
        ctx.save_for_backward(out, torch.from_numpy(stats), keep, gamma)
        return out, _tensor(normed, y.dtype).view(x.shape)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor, Tensor, None, None, Tensor, Tensor, None]:
        (total, stats, keep, gamma), (total_grad, normed_grad) = ctx.saved_tensors, gradients
        kept = None if keep is None else _rows(keep)
        dx, dy, dgamma, dbeta = _core.train_norm_grad(
            _rows(total), stats.numpy(), kept, ctx.scale, _array(gamma),
            _rows(total_grad), _rows(normed_grad), "auto",
        )  # fmt: skip
        dx_tensor = _tensor(dx, total.dtype).view(total.shape)
        dy_tensor = _tensor(dy, normed_grad.dtype).view(total.shape)
        of_norm = _tensor(dgamma, gamma.dtype), _tensor(dbeta, gamma.dtype)
        return dx_tensor, dy_tensor, None, None, *of_norm, None


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Phi(x); in C++ where that serves."""
    if _core is None or x.dtype not in _CORE_TYPES or not x.numel():
        return F.gelu(x)
    y: Tensor = _CoreGelu.apply(x)  # type: ignore[no-untyped-call]
    return y


class _CoreGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _tensor(_core.train_gelu(_array(x), "auto"), x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return _tensor(_core.train_gelu_grad(_array(x), _array(gradients[0]), "auto"), x.dtype)


# ---- memory that torch and the core share ----

_CORE_TYPES = (torch.float32, torch.bfloat16)


def _array(x: Tensor) -> NDArray[Any]:
    """Its memory, copied only if it is not contiguous; the bits of bfloat16 as int16."""
    x = x.detach().contiguous()
    array: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _rows(x: Tensor) -> NDArray[Any]:
    """(..., E) -> (rows, E)."""
    return _array(x.flatten(0, -2))


def _tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    tensor: Tensor = torch.from_numpy(array).view(dtype)
    return tensor


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
        and qkv.dtype in _CORE_TYPES
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
    """a b^T + bias of float32 (M, K), (N, K)."""
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
        dx = _product(dy, weight.T).view(x.shape)
        return dx, _weight_gradient(dy, x.flatten(0, -2)), dy.sum(0)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x of (M, O) and (M, I). oneDNN reads a transposed right factor as fast as a plain one,
    but a left one slower, so that the wide one is on the right."""
    if dy.shape[1] > x.shape[1]:
        return _product(x.T.contiguous(), dy.T).T
    return _product(dy.T, x.T)
