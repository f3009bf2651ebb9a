"""GELU, residual branches and masks of training in C++ and in torch: against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from one_isa import OneIsa
from torch import Tensor, nn

from tt_fast.planning.cpu import _core, available_isas
from tt_fast.training import cpu_ops
from tt_fast.training.cpu_ops import DropoutMasks, add_norm, gelu

isas = pytest.mark.parametrize("isa", available_isas())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
needs_core = pytest.mark.skipif(_core is None, reason="built without the C++ core")
EPS = torch.finfo(torch.float32).eps


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact(
    got: Iterable[Tensor], plain: Iterable[Tensor], truth: Iterable[Tensor]
) -> None:
    """Errors are at most twice those of torch in the same types, and some roundings of the largest
    number."""
    for ours, theirs, exact in zip(got, plain, truth, strict=True):
        assert ours.shape == exact.shape
        error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
        assert error <= 2.0 * allowed + 4.0 * EPS * float(exact.abs().max())


# ---- GELU ----


def run_gelu(x: Tensor, out_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient."""
    x = x.clone().requires_grad_()
    out = gelu(x)
    assert out.dtype == x.dtype
    out.backward(out_grad)
    assert x.grad is not None
    return out.detach(), x.grad


@isas
@dtypes
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 33, 257])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_gelu(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, size: int, scale: float
) -> None:
    x, out_grad = (scale * normal(size, 3, size)).to(dtype), normal(9, 3, size).to(dtype)
    core = OneIsa(isa)
    monkeypatch.setattr(cpu_ops, "_core", core)
    got = run_gelu(x, out_grad)
    assert core.calls == {"train_gelu": 1, "train_gelu_grad": 1}
    monkeypatch.setattr(cpu_ops, "_core", None)
    plain, truth = run_gelu(x, out_grad), run_gelu(x.double(), out_grad.double())
    assert_as_exact(got, plain, truth)


@isas
def test_gelu_far_out(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setattr(cpu_ops, "_core", OneIsa(isa))
    x, cdf = torch.tensor([-1e18, -40.0, 40.0, 1e18]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    out, grad = run_gelu(x, torch.ones(4))
    for found in (out / x, grad):
        assert float((found - cdf).abs().max()) <= 2.0 * EPS
    for found in run_gelu(torch.tensor([torch.nan]), torch.ones(1)):
        assert found.isnan().all()


# ---- residual, dropout, LayerNorm ----


def run_add_norm(
    x: Tensor, y: Tensor, keep: Tensor | None, norm: nn.LayerNorm, grads: list[Tensor]
) -> tuple[Tensor, ...]:
    """The sum, its LayerNorm, and gradients of x, y, gamma and beta; `grads` of the first two."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    norm.zero_grad()
    total, normed = add_norm(x, y, keep, 0.3, norm)
    assert total.dtype == x.dtype
    torch.autograd.backward([total, normed], [grads[0], grads[1].to(normed.dtype)])
    assert x.grad is not None
    assert y.grad is not None
    assert y.grad.dtype == y.dtype
    of_norm = [norm.weight.grad, norm.bias.grad]
    return total.detach(), normed.detach(), x.grad, y.grad, *(g.clone() for g in of_norm)


@isas
@dtypes
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), (1, 2), (3, 15), (2, 16), (7, 17), (33, 31), (65, 32), (97, 128), (5, 300)],
)
def test_a_branch_and_its_norm(
    monkeypatch: pytest.MonkeyPatch,
    isa: str,
    dtype: torch.dtype,
    dropout: bool,
    rows: int,
    width: int,
) -> None:
    x, y = 3.0 + normal(0, 2, rows, width), normal(1, 2, rows, width).to(dtype)
    grads = [normal(2, 2, rows, width), normal(3, 2, rows, width).to(dtype)]
    norm = nn.LayerNorm(width, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(normal(4, width))
        norm.bias.copy_(normal(5, width))
    keep = DropoutMasks(6).keep((2, rows, width), 0.3) if dropout else None
    core = OneIsa(isa)
    monkeypatch.setattr(cpu_ops, "_core", core)
    got = run_add_norm(x, y, keep, norm, grads)
    assert core.calls == {"train_norm": 1, "train_norm_grad": 1}
    monkeypatch.setattr(cpu_ops, "_core", None)
    plain = run_add_norm(x, y, keep, norm, grads)
    truth = run_add_norm(x.double(), y.double(), keep, norm.double(), [g.double() for g in grads])
    assert got[1].dtype == dtype  # as the product behind it takes it under autocast
    plain = (plain[0], plain[1].to(dtype), *plain[2:])
    assert_as_exact(got, plain, truth)


@isas
def test_one_of_the_outputs_may_go_unused(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    norm, x, y = nn.LayerNorm(9), normal(0, 4, 9), normal(1, 4, 9)
    for used in (0, 1):
        found = []
        for core in (OneIsa(isa), None):
            monkeypatch.setattr(cpu_ops, "_core", core)
            left, right = x.clone().requires_grad_(), y.clone().requires_grad_()
            (add_norm(left, right, None, 0.0, norm)[used] * normal(2, 4, 9)).sum().backward()
            found.append((left.grad, right.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_what_the_core_does_not_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    core = OneIsa("auto") if _core is not None else None
    monkeypatch.setattr(cpu_ops, "_core", core)
    for x in (normal(0, 2, 4).double(), normal(0, 0, 4)):
        assert torch.equal(gelu(x), nn.functional.gelu(x))
        norm = nn.LayerNorm(4).to(x.dtype)
        assert torch.equal(add_norm(x, x, None, 0.0, norm)[1], norm(x + x))
    assert core is None or not core.calls


# ---- masks ----


@isas
@pytest.mark.parametrize("probability", [0.0, 2.0**-16, 0.1, 0.5, 1.0 - 2.0**-16, 1.0])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_masks_are_numpys(
    monkeypatch: pytest.MonkeyPatch, isa: str, probability: float, size: int
) -> None:
    """One after another, in turn with and without the core."""

    def draw(cores: list[Any]) -> list[Tensor]:
        masks, drawn = DropoutMasks(1, 2, 3), []
        for core in cores:
            monkeypatch.setattr(cpu_ops, "_core", core)
            drawn.append(masks.keep((size,), probability))
        return drawn

    core = OneIsa(isa)
    plain = draw([None, None, None])
    for cores in ([core, core, core], [core, None, core], [None, core, None]):
        assert all(torch.equal(a, b) for a, b in zip(draw(cores), plain, strict=True))


def test_masks_are_sfc64() -> None:
    """Number by number: 16 bits of a word, words lane by lane."""
    state = np.random.SFC64([5]).random_raw(48).reshape(3, 16)
    lanes = []
    for lane in range(16):
        generator = np.random.SFC64(0)
        start = np.append(state[:, lane], np.uint64(0))
        generator.state = generator.state | {"state": {"state": start}}
        lanes.append([int(word) for word in generator.random_raw(4)])
    keep = DropoutMasks(5).keep((200,), 0.3)
    for i in range(200):
        number = lanes[i // 4 % 16][i // 64] >> 16 * (i % 4) & 0xFFFF
        signed = number - 2**16 if number >= 2**15 else number
        assert bool(keep[i]) == (signed >= round(0.3 * 2**16) - 2**15)


# ---- refused ----

X, HALVES = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.int16)
KEEP, WIDE = np.ones((4, 6), np.uint8), np.ones(6, np.float32)
STATS, STATE = np.zeros((4, 2), np.float32), np.zeros((3, 16), np.uint64)


def norm_forward(**changes: Any) -> None:
    arguments = {"x": X, "y": HALVES, "keep": KEEP, "gamma": WIDE, "beta": WIDE} | changes
    _core.train_norm(**arguments, keep_scale=1.0, eps=1e-5, isa="auto")


def norm_backward(**changes: Any) -> None:
    arguments = {"sum": X, "stats": STATS, "keep": KEEP, "gamma": WIDE, "sum_grad": X}
    arguments |= {"normed_grad": HALVES} | changes
    _core.train_norm_grad(**arguments, keep_scale=1.0, isa="auto")


def gelu_forward(x: Any) -> None:
    _core.train_gelu(x, "auto")


def gelu_backward(x: Any = X, out_grad: Any = X) -> None:
    _core.train_gelu_grad(x, out_grad, "auto")


def draw_keep(state: Any = STATE, first_kept: int = 0, size: int = 5) -> None:
    _core.draw_keep(state, 0, first_kept, size, "auto")


READ_ONLY = STATE.copy()
READ_ONLY.flags.writeable = False


@needs_core
@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (norm_forward, {"x": X[0]}, r"x: expected shape \(rows, width\)"),
        (norm_forward, {"x": X[:, :0]}, "width: expected"),
        (norm_forward, {"x": X.astype(np.float64)}, "x: expected float32, got float64"),
        (norm_forward, {"x": np.asfortranarray(X)}, "x: expected contiguous"),
        (norm_forward, {"y": X[:3]}, r"y: expected shape \(4, 6\), got \(3, 6\)"),
        (norm_forward, {"y": X.astype(np.uint16)}, "y: expected float32 or .* got uint16"),
        (norm_forward, {"keep": KEEP[:, :5]}, r"keep: expected shape \(4, 6\)"),
        (norm_forward, {"keep": KEEP.astype(bool)}, "keep: expected uint8, got bool"),
        (norm_forward, {"gamma": WIDE[:5]}, r"gamma: expected shape \(6,\)"),
        (norm_forward, {"beta": WIDE[:5]}, r"beta: expected shape \(6,\)"),
        (norm_forward, {"beta": WIDE.astype(np.float64)}, "beta: expected float32"),
        (norm_backward, {"sum": X[0]}, "sum: expected shape"),
        (norm_backward, {"stats": STATS[:3]}, r"stats: expected shape \(4, 2\)"),
        (norm_backward, {"keep": KEEP[:3]}, "keep: expected shape"),
        (norm_backward, {"gamma": WIDE[:5]}, "gamma: expected shape"),
        (norm_backward, {"sum_grad": HALVES}, "sum_grad: expected float32, got int16"),
        (norm_backward, {"normed_grad": X[:3]}, "normed_grad: expected shape"),
        (gelu_forward, {"x": X.astype(np.float64)}, "x: expected float32 or .* got float64"),
        (gelu_forward, {"x": np.asfortranarray(X)}, "x: expected contiguous"),
        (gelu_backward, {"out_grad": HALVES}, "out_grad: expected the type of x, float32"),
        (gelu_backward, {"out_grad": X[:3]}, r"out_grad: expected shape \(4, 6\)"),
        (draw_keep, {"state": STATE[:2]}, r"state: expected shape \(3, 16\)"),
        (draw_keep, {"state": STATE.astype(np.int64)}, "state: expected uint64, got int64"),
        (draw_keep, {"state": READ_ONLY}, "state: expected an array to write to"),
        (draw_keep, {"first_kept": 2**15}, "first_kept: expected a number in"),
        (draw_keep, {"size": -1}, "size: expected a number in"),
    ],
)
def test_wrong_arrays_are_refused(
    function: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(**changes)


@needs_core
@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.train_gelu(X, "vax"),
        lambda: _core.train_norm(X, X, None, 1.0, WIDE, WIDE, 1e-5, "vax"),
        lambda: _core.draw_keep(STATE, 0, 0, 5, "vax"),
    ],
)
def test_other_instruction_sets_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="isa: expected one of auto"):
        call()
