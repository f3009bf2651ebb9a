"""Losses with the heads fused into the cross-entropy: what a GPU trains with.

The plain model stores logits, their softmax and the gradients of both, each of them (B, T, V + 1);
here they live in registers only (`kernels/head_loss.py`). Everything before the heads is the
model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tt_fast.kernels.machine import MIN_CAPABILITY, is_interpreted
from tt_fast.model import TrajectoryTransformer
from tt_fast.validate import require

if TYPE_CHECKING:
    from tt_fast.kernels.head_loss import HeadShape

_FLOATS = (torch.float32, torch.bfloat16)


def token_losses(
    model: TrajectoryTransformer, tokens: Tensor, targets: Tensor, goal: Tensor | None = None
) -> Tensor:
    """(B, T) cross-entropy of each target token, nats: `TrajectoryTransformer.token_losses`.

    Fused where `why_not` finds nothing against it, else the model's own. Under
    torch.autocast(bfloat16) the heads' products round to bfloat16 and nothing else does; gradients
    arrive in float32.

    Args:
        model: any.
        tokens, targets, goal: as the model takes them; targets of any integer type.

    Returns:
        float32 if fused. On a GPU the loss of a target that is no token is NaN.

    Raises:
        ValueError: as the model's own.
    """
    if why_not(model) is not None:
        return model.token_losses(tokens, targets, goal)
    model._check_tokens("targets", targets)
    shape = tuple(tokens.shape)
    require(targets.shape == tokens.shape, "targets", f"shape {shape}", tuple(targets.shape))
    x = model._features(tokens, goal)
    device = x.device.type
    rounds = torch.is_autocast_enabled(device) and (
        torch.get_autocast_dtype(device) == torch.bfloat16
    )
    return head_loss(x, model.head.weight, targets, bfloat16=rounds)


def why_not(model: TrajectoryTransformer) -> str | None:
    """Why a model's losses are not fused; None if they are."""
    device, kept = model.head.weight.device, model.head.weight.dtype
    reason = _why_not_on(device)
    if reason is not None:
        return reason
    from tt_fast.kernels.head_loss import MAX_EMBED

    if kept not in _FLOATS:
        return f"its weights are {kept}, and float32 or bfloat16 is needed"
    width = model.config.embed_dim
    return f"its width is {width}, and at most {MAX_EMBED} fits" if width > MAX_EMBED else None


def _why_not_on(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'tt_fast[cuda]')"
    if is_interpreted():
        return None if device.type == "cpu" else f"the interpreter cannot reach {device}"
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability}, and 8.0 is needed"
    return None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Cross-entropy of each target by the head of its position, with gradients.

    Args:
        x: (B, T, E) float32 or bfloat16, where kernels run.
        weight: (D, V + 1, E) float32 or bfloat16, E at most `MAX_EMBED`; position p has head p mod
            D.
        targets: (B, T) integers in [0, V].
        bfloat16: round what is multiplied to bfloat16, which a bfloat16 x or weight asks for too.
            All sums are float32.

    Returns:
        (B, T) float32, nats.

    Raises:
        ValueError: a wrong shape, type or device.
    """
    reason = _why_not_on(x.device)
    require(reason is None, "x", "on a device that runs kernels", reason)
    _check(x, weight, targets)
    rounds = bfloat16 or torch.bfloat16 in (x.dtype, weight.dtype)
    losses: Tensor = _HeadLoss.apply(x, weight, targets, rounds)  # type: ignore[no-untyped-call]
    return losses


def _check(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    from tt_fast.kernels.head_loss import MAX_EMBED

    for name, tensor, letters in (("x", x, "B, T, E"), ("weight", weight, "D, V + 1, E")):
        require(tensor.ndim == 3, name, f"shape ({letters})", tuple(tensor.shape))
        require(tensor.dtype in _FLOATS, name, "float32 or bfloat16", tensor.dtype)
    width, shape = x.shape[2], tuple(x.shape[:2])
    require(1 <= width <= MAX_EMBED, "x", f"1 <= E <= {MAX_EMBED}", width)
    got = tuple(weight.shape)
    require(weight.shape[2] == width, "weight", f"shape (D, V + 1, {width})", got)
    require(targets.shape == shape, "targets", f"shape {shape}", tuple(targets.shape))
    integers = not targets.is_floating_point() and not targets.is_complex()
    require(integers and targets.dtype != torch.bool, "targets", "integers", targets.dtype)
    for name, tensor in (("weight", weight), ("targets", targets)):
        require(tensor.device == x.device, name, f"on {x.device}", tensor.device)


def _head_shape(x: Tensor, weight: Tensor, rounds: bool) -> HeadShape:
    from tt_fast.kernels.head_loss import HeadShape

    precision = "ieee"
    if rounds:
        precision = "bf16 in float32" if is_interpreted() else "bf16"
    return HeadShape(*weight.shape, precision)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rounds: bool) -> Tensor:
        from tt_fast.kernels import head_loss as kernels

        x, weight = x if x.stride(2) == 1 else x.contiguous(), weight.contiguous()
        ctx.shape = _head_shape(x, weight, rounds)
        losses: Tensor
        with torch.cuda.device_of(x):  # kernels run on the current device, whatever x is on
            losses, log_sums = kernels.head_loss(x, weight, targets, ctx.shape)
        ctx.save_for_backward(x, weight, targets, log_sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        from tt_fast.kernels import head_loss as kernels

        dx = dweight = None
        given = (*ctx.saved_tensors, gradients[0].contiguous(), ctx.shape)
        with torch.cuda.device_of(gradients[0]):
            if ctx.needs_input_grad[0]:
                dx = kernels.head_loss_dx(*given)
            if ctx.needs_input_grad[1]:
                dweight = kernels.head_loss_dw(*given)
        return dx, dweight, None, None
