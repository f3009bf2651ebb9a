"""Attention of training in C++ and in torch: outputs and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from one_isa import OneIsa
from tiny import tiny_model, tiny_model_config
from torch import Tensor

from tt_fast.model import attention_mask
from tt_fast.planning.cpu import _core, available_isas
from tt_fast.training import cpu_ops
from tt_fast.training.cpu_ops import DropoutMasks, self_attention
from tt_fast.training.passes import pass_losses

isas = pytest.mark.parametrize("isa", available_isas())
needs_core = pytest.mark.skipif(_core is None, reason="built without the C++ core")
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(length: int, every: int = 0) -> Tensor:
    """Hidden keys: later ones, and each `every`th as value tokens are."""
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    if every:
        hidden[:, every - 1 :: every] = True
    return hidden


def run(
    qkv: Tensor, out_grad: Tensor, hidden: Tensor, keep: Tensor | None, probability: float
) -> tuple[Tensor, ...]:
    """Output, and gradients of queries, keys and values."""
    qkv = qkv.clone().requires_grad_()
    out = self_attention(qkv, hidden, keep, probability)
    out.backward(out_grad)
    assert qkv.grad is not None
    assert out.dtype == qkv.dtype
    return out.detach(), *qkv.grad.unbind(2)


def check(
    monkeypatch: pytest.MonkeyPatch,
    isa: str,
    qkv: Tensor,
    hidden: Tensor,
    keep: Tensor | None = None,
    probability: float = 0.0,
) -> tuple[Tensor, ...]:
    """The core's error is at most twice that of torch's formulation in the same type, and some
    roundings of the largest number; what it found."""
    out_grad = normal(9, *qkv.shape[:2], *qkv.shape[3:]).to(qkv.dtype)
    core = OneIsa(isa)
    monkeypatch.setattr(cpu_ops, "_core", core)
    got = run(qkv, out_grad, hidden, keep, probability)
    assert core.calls == {"train_attention": 1, "train_attention_grad": 1}
    monkeypatch.setattr(cpu_ops, "_core", None)
    plain = run(qkv, out_grad, hidden, keep, probability)
    truth = run(qkv.double(), out_grad.double(), hidden, keep, probability)
    for ours, theirs, exact in zip(got, plain, truth, strict=True):
        assert ours.shape == exact.shape
        error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
        assert error <= 2.0 * allowed + 4.0 * EPS[torch.float32] * float(exact.abs().max())
    return got


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 79])
def test_lengths(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, dropout: bool, length: int
) -> None:
    qkv = normal(length, 2, length, 3, 3, 8).to(dtype)
    keep = DropoutMasks(length).keep((6, length, length), 0.3) if dropout else None
    check(monkeypatch, isa, qkv, causal(length, every=5 if length > 4 else 0), keep, 0.3)


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 8, 16, 20, 32, 64, 100, 128])
def test_head_widths(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, dim: int
) -> None:
    keep = DropoutMasks(dim).keep((2, 37, 37), 0.1)
    check(monkeypatch, isa, normal(dim, 1, 37, 3, 2, dim).to(dtype), causal(37, 6), keep, 0.1)


@pytest.mark.parametrize("isa", [isa for isa in available_isas() if isa != "scalar"])
@pytest.mark.parametrize(("length", "every"), [(159, 16), (249, 25)])
def test_official_sizes(monkeypatch: pytest.MonkeyPatch, isa: str, length: int, every: int) -> None:
    keep = DropoutMasks(0).keep((2, length, length), 0.1)
    check(monkeypatch, isa, normal(0, 1, length, 3, 2, 32), causal(length, every), keep, 0.1)


@isas
@pytest.mark.parametrize("goal_value_mask", ["correct", "original"])
def test_masks_with_a_goal(monkeypatch: pytest.MonkeyPatch, isa: str, goal_value_mask: Any) -> None:
    config = tiny_model_config(goal_conditioned=True, goal_value_mask=goal_value_mask)
    hidden = ~attention_mask(config)
    keep = DropoutMasks(0).keep((4, *hidden.shape), 0.3)
    check(monkeypatch, isa, normal(0, 2, len(hidden), 3, 2, 8), hidden, keep, 0.3)


@isas
def test_any_mask(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """No order in what is seen; one row sees the last key alone, one column nobody sees."""
    hidden = normal(1, 45, 45) > 0.3
    hidden[:, 7] = True
    hidden[3, :-1], hidden[:, -1] = True, False
    check(monkeypatch, isa, normal(0, 1, 45, 3, 2, 16), hidden)
    check(monkeypatch, isa, normal(0, 1, 45, 3, 2, 16), torch.zeros(45, 45, dtype=torch.bool))


@isas
def test_everything_or_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    qkv, hidden = normal(0, 1, 20, 3, 2, 8), causal(20)
    everything = torch.zeros(2, 20, 20, dtype=torch.uint8)
    assert not any(x.any() for x in check(monkeypatch, isa, qkv, hidden, everything, 1.0))
    kept = check(monkeypatch, isa, qkv, hidden, torch.ones_like(everything), 0.0)
    plain = check(monkeypatch, isa, qkv, hidden)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@isas
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_flat_and_sharp_weights(monkeypatch: pytest.MonkeyPatch, isa: str, scale: float) -> None:
    check(monkeypatch, isa, scale * normal(0, 1, 33, 3, 1, 16), causal(33))


@isas
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_comes_through(monkeypatch: pytest.MonkeyPatch, isa: str, part: int) -> None:
    """Of token 5, to all outputs that see it; as in torch, others may catch it too."""
    monkeypatch.setattr(cpu_ops, "_core", OneIsa(isa))
    qkv = normal(0, 1, 40, 3, 1, 8)
    qkv[0, 5, part, 0, 2] = torch.nan
    out = self_attention(qkv, causal(40), None, 0.0)[0, :, 0]
    seen = [5] if part == 0 else range(5, 40)
    assert set(seen) <= {t for t in range(40) if out[t].isnan().any()}


@needs_core
def test_memory_behind_the_arrays_is_not_read_or_written() -> None:
    """A window gives the same bits wherever it is in a batch."""
    qkv, hidden = normal(0, 3, 21, 3, 2, 20).numpy(), causal(21).numpy()
    keep = DropoutMasks(1).keep((6, 21, 21), 0.2).numpy()
    together, _ = _core.train_attention(qkv, hidden, keep, 1.25, "auto")
    for i in range(3):
        alone, _ = _core.train_attention(
            qkv[i : i + 1], hidden, keep[2 * i : 2 * i + 2], 1.25, "auto"
        )
        assert np.array_equal(alone[0], together[i])


# ---- in a training pass ----


def losses_and_gradients(bfloat16: bool) -> dict[str, Tensor]:
    model = tiny_model(attention_dropout=0.3).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8, (5, model.config.block_size + 1), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = pass_losses(model, tokens[:, :-1], tokens[:, 1:], None, DropoutMasks(3))
    losses.mean().backward()
    return {"losses": losses.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@needs_core
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_pass_drops_the_same_weights_with_and_without_the_core(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    core = OneIsa("auto")
    monkeypatch.setattr(cpu_ops, "_core", core)
    fast, again = losses_and_gradients(bfloat16), losses_and_gradients(bfloat16)
    for kernel, count in (
        ("attention", 2),
        ("gelu", 2),
        ("norm", 4),
    ):  # of two layers, in two passes
        assert core.calls[f"train_{kernel}"] == core.calls[f"train_{kernel}_grad"] == 2 * count
    monkeypatch.setattr(cpu_ops, "_core", None)
    plain = losses_and_gradients(bfloat16)
    size = max(float(x.abs().max()) for x in plain.values())
    for name, x in fast.items():
        assert torch.equal(x, again[name])
        eps = EPS[torch.bfloat16 if bfloat16 else torch.float32]
        assert float((x - plain[name]).abs().max()) <= 16.0 * eps * size


def test_what_the_core_does_not_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    core = OneIsa("auto") if _core is not None else None
    monkeypatch.setattr(cpu_ops, "_core", core)
    for qkv in (
        normal(0, 1, 9, 3, 2, 8).double(),
        normal(0, 1, 9, 3, 2, 129),
        normal(0, 1, 1025, 3, 1, 1),
        normal(0, 0, 9, 3, 2, 8),
    ):
        out = self_attention(qkv, causal(qkv.shape[1]), None, 0.0)
        assert out.shape == (*qkv.shape[:2], *qkv.shape[3:])
    assert core is None or not core.calls


# ---- refused ----

QKV, HIDDEN = np.zeros((2, 5, 3, 2, 4), np.float32), np.zeros((5, 5), bool)
KEEP = np.ones((4, 5, 5), np.uint8)
STATS, OUT_GRAD = np.zeros((2, 2, 5, 2), np.float32), np.zeros((2, 5, 2, 4), np.float32)
BLIND = np.repeat(np.arange(5) == 3, 5).reshape(5, 5)


def forward(qkv: Any = QKV, hidden: Any = HIDDEN, keep: Any = KEEP, isa: str = "auto") -> None:
    _core.train_attention(qkv, hidden, keep, 1.0, isa)


def backward(stats: Any = STATS, out_grad: Any = OUT_GRAD, **others: Any) -> None:
    arrays = {"qkv": QKV, "hidden": HIDDEN, "keep": KEEP} | others
    _core.train_attention_grad(**arrays, keep_scale=1.0, stats=stats, out_grad=out_grad, isa="auto")


@needs_core
@pytest.mark.parametrize("function", [forward, backward])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv: expected shape \(windows, tokens, 3, heads, head_dim\)"),
        ({"qkv": QKV[:, :, :2]}, "qkv: expected shape"),
        ({"qkv": QKV.astype(np.float64)}, "qkv: expected float32 or .* got float64"),
        ({"qkv": QKV.astype(np.uint16)}, "qkv: expected float32 or .* got uint16"),
        ({"qkv": np.repeat(QKV, 2, 4)[..., ::2]}, "qkv: expected contiguous"),
        ({"qkv": QKV[:0]}, "windows: expected"),
        ({"qkv": np.zeros((1, 1025, 3, 1, 1), np.float32)}, "tokens: expected"),
        ({"qkv": np.zeros((1, 5, 3, 1, 129), np.float32)}, "head_dim: expected"),
        ({"hidden": HIDDEN[:4]}, r"hidden: expected shape \(5, 5\), got \(4, 5\)"),
        ({"hidden": HIDDEN.astype(np.float32)}, "hidden: expected bool or uint8, got float32"),
        ({"hidden": np.asfortranarray(np.tri(5) < 0)}, "hidden: expected contiguous"),
        ({"hidden": BLIND}, "hidden: expected a key in sight of every query, got none of 3"),
        ({"keep": KEEP[:2]}, r"keep: expected shape \(4, 5, 5\)"),
        ({"keep": KEEP.astype(np.int64)}, "keep: expected uint8, got int64"),
        ({"keep": KEEP.transpose(0, 2, 1)}, "keep: expected contiguous"),
    ],
)
def test_wrong_arrays_are_refused(
    function: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(**changes)


@needs_core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stats": STATS[..., :1]}, r"stats: expected shape \(2, 2, 5, 2\)"),
        ({"stats": STATS.astype(np.float64)}, "stats: expected float32"),
        ({"out_grad": OUT_GRAD[:1]}, r"out_grad: expected shape \(2, 5, 2, 4\)"),
        ({"out_grad": OUT_GRAD.astype(np.int16)}, "out_grad: expected the type of qkv, float32"),
        ({"out_grad": np.asfortranarray(OUT_GRAD)}, "out_grad: expected contiguous"),
    ],
)
def test_wrong_gradients_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backward(**changes)


@needs_core
def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="isa: expected one of auto"):
        forward(isa="vax")
    with pytest.raises(TypeError):
        forward(qkv=None)
