"""Heads and cross-entropy in one kernel: against a twin in float64, and the model's own losses.

Errors are held to what rounding can do, number by number. u is half of float32's epsilon; a sum of
n products in any order is off by at most n u / (1 - n u) times the sum of their sizes.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_twins as twins
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from tt_fast import ModelConfig, TrajectoryTransformer
from tt_fast.kernels import head_loss as kernels
from tt_fast.training import fused_loss

pytestmark = pytest.mark.usefixtures("quick_interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = torch.finfo(torch.float32).eps / 2
U_BF16 = torch.finfo(torch.bfloat16).eps / 2
#: What is stored in bfloat16: a GPU rounds to the nearest, the interpreter cuts.
U_STORED = U_BF16 * (2 if DEVICE.type == "cpu" else 1)
#: Relative error of exp and log, in u: a GPU's take their argument times log2(e), rounded.
FUNCTION = 8

#: B, T, D, V, E: T < D; T no multiple of D; one id tile and several; E no power of two.
SIZES = [
    (3, 7, 5, 8, 16),
    (2, 3, 5, 20, 11),
    (2, 9, 4, 300, 24),
    (5, 40, 3, 63, 48),
    (1, 5, 2, 1, 1),
    (2, 5, 2, 17, 300),
]
TESTS = str(Path(__file__).parent)
HOPPER = (2, 159, 16, 100, 128)


@dataclass(frozen=True)
class Case:
    """Inputs, and the gradient that arrives."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    d_losses: Tensor


@dataclass(frozen=True)
class Found:
    """Losses and gradients, or how far off each may be."""

    losses: Tensor
    dx: Tensor
    dw: Tensor


def make_case(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Case:
    """Logits of a spread of some 3 `scale`; a fifth of the tokens are masked."""
    num_windows, num_tokens, num_dims, vocab_size, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, vocab_size + 1, (num_windows, num_tokens), generator=generator)
    kept = torch.rand(num_windows, num_tokens, generator=generator) > 0.2
    return Case(
        normal(num_windows, num_tokens, width).to(DEVICE, dtype),
        (normal(num_dims, vocab_size + 1, width) * 3 * scale / width**0.5).to(DEVICE, dtype),
        ids.to(DEVICE),
        (normal(num_windows, num_tokens) * kept).to(DEVICE),
    )


def run(case: Case, bfloat16: bool = False) -> Found:
    """The kernels'."""
    x, weight = (t.detach().clone().requires_grad_() for t in (case.x, case.weight))
    losses = fused_loss.head_loss(x, weight, case.targets, bfloat16=bfloat16)
    losses.backward(case.d_losses)
    assert x.grad is not None
    assert weight.grad is not None
    return Found(losses.detach(), x.grad, weight.grad)


def run_twin(case: Case) -> Found:
    """In float64."""
    x, weight = (t.double().detach().cpu().requires_grad_() for t in (case.x, case.weight))
    losses = twins.head_loss(x, weight, case.targets.cpu())
    losses.backward(case.d_losses.double().cpu())
    assert x.grad is not None
    assert weight.grad is not None
    return Found(losses.detach(), x.grad, weight.grad)


# ---- what rounding can do ----


def gamma(count: int) -> float:
    """Relative error of a sum of `count` products."""
    return count * U / (1 - count * U)


def allowed(case: Case, rounds: bool) -> Found:
    """Largest errors of the formulas at the top of kernels/head_loss.py, in their order.

    Args:
        rounds: dz is rounded to bfloat16 before its products; x and weight hold bfloat16 numbers.
    """
    x, weight = case.x.double().cpu(), case.weight.double().cpu()
    num_windows, num_tokens, width = x.shape
    num_dims, num_ids = weight.shape[:2]
    w = weight[torch.arange(num_tokens) % num_dims]  # (T, V + 1, E)
    z = torch.einsum("bte,tve->btv", x, w)
    # one more than E: the kernel adds its partial sums to zero
    of_z = gamma(width + 1) * torch.einsum("bte,tve->btv", x.abs(), w.abs())
    of_sum = _of_log_sum(z, of_z)
    target = case.targets.cpu()[..., None]
    log_sum, picked = z.logsumexp(-1), z.gather(-1, target)[..., 0]
    of_loss = of_sum + of_z.gather(-1, target)[..., 0] + U * (log_sum - picked).abs()
    probs = z.softmax(-1)
    exponent = of_z + of_sum[..., None] + U * (z - log_sum[..., None]).abs() * 2
    of_probs = probs * (torch.expm1(exponent) + FUNCTION * U)
    onehot = torch.zeros_like(z).scatter(-1, target, 1.0)
    d_loss = case.d_losses.double().cpu()[..., None]
    dz = (probs - onehot) * d_loss
    of_dz = d_loss.abs() * of_probs + dz.abs() * (2 * U + (U_BF16 if rounds else 0.0))
    size = dz.abs() + of_dz
    return Found(
        of_loss * 1.01,
        _of_product(of_dz, size, w.abs(), "btv,tve->bte", num_ids) * 1.01 + _tiny(case.x),
        _sum_by_dim(
            _of_product(of_dz, size, x.abs(), "btv,bte->tve", num_windows * num_tokens), num_dims
        )
        * 1.01
        + _tiny(case.weight),
    )


def _of_log_sum(z: Tensor, of_z: Tensor) -> Tensor:
    """Error of log(sum(exp)): of its terms, of their sum and of adding the largest again."""
    largest = z.amax(-1)
    spread = largest - z.amin(-1)
    terms = FUNCTION + 2 * spread + 2 * z.shape[-1]  # online: each is scaled again and added
    log_total = z.logsumexp(-1) - largest
    return of_z.amax(-1) + U * (terms + FUNCTION * log_total + z.logsumexp(-1).abs())


def _of_product(of_dz: Tensor, size: Tensor, factor: Tensor, how: str, count: int) -> Tensor:
    """Error of dz, carried through a sum of `count` products, and that of the sum itself."""
    return torch.einsum(how, of_dz + gamma(count + 1) * size, factor)


def _sum_by_dim(of_position: Tensor, num_dims: int) -> Tensor:
    """(T, V + 1, E) -> (D, V + 1, E)."""
    dims = torch.arange(len(of_position)) % num_dims
    zeros = torch.zeros(num_dims, *of_position.shape[1:], dtype=of_position.dtype)
    return zeros.index_add(0, dims, of_position)


def _tiny(tensor: Tensor) -> float:
    """Where the result is stored: gradients of this size are zero to anyone."""
    return float(torch.finfo(tensor.dtype).tiny)


def assert_within(got: Found, exact: Found, bound: Found, stored: torch.dtype) -> None:
    """Number by number; gradients are rounded once more where they are stored."""
    u = U_STORED if stored == torch.bfloat16 else U
    for name in ("losses", "dx", "dw"):
        ours, theirs = getattr(got, name).double().cpu(), getattr(exact, name)
        most = getattr(bound, name)
        if name != "losses":
            most = most + u * (theirs.abs() + most)
        error = (ours - theirs).abs()
        assert (error <= most).all(), f"{name}: {(error / most).max()} times what is allowed"


# ---- against the twin ----


@pytest.mark.parametrize("sizes", [*SIZES, HOPPER])
def test_head_loss_float32(sizes: tuple[int, ...]) -> None:
    case = make_case(sizes)
    exact, bound = run_twin(case), allowed(case, rounds=False)
    assert_within(run(case), exact, bound, torch.float32)
    # the bounds are worth something: a thousandth of the numbers that they are about
    for name in ("losses", "dx", "dw"):
        assert getattr(bound, name).mean() < 1e-3 * getattr(exact, name).abs().mean() + 1e-5


@pytest.mark.parametrize("sizes", [*SIZES, HOPPER])
def test_head_loss_bfloat16(sizes: tuple[int, ...]) -> None:
    case = make_case(sizes, torch.bfloat16)
    got = run(case)
    assert (got.losses.dtype, got.dx.dtype) == (torch.float32, torch.bfloat16)
    assert_within(got, run_twin(case), allowed(case, rounds=True), torch.bfloat16)


def test_head_loss_rounds_float32_where_it_is_asked_to() -> None:
    """The same products as of bfloat16 tensors, and gradients in float32."""
    kept = make_case((3, 11, 4, 20, 24), torch.bfloat16)
    case = Case(kept.x.float(), kept.weight.float(), kept.targets, kept.d_losses)
    got, same = run(case, bfloat16=True), run(kept)
    assert torch.equal(got.losses, same.losses)
    assert torch.equal(got.dw.bfloat16(), same.dw)
    assert got.dx.dtype == got.dw.dtype == torch.float32
    assert_within(got, run_twin(case), allowed(case, rounds=True), torch.float32)
    off = Case(case.x * (1 + 2**-10), case.weight, case.targets, case.d_losses)
    assert torch.equal(run(off, bfloat16=True).losses, same.losses)  # to the nearest
    assert not torch.equal(run(off).losses, same.losses)


def test_head_loss_of_large_logits() -> None:
    """A softmax that is all but one-hot; nothing overflows."""
    case = make_case((2, 9, 4, 70, 16), scale=60.0)
    assert float(run_twin(case).losses.max()) > 200
    assert_within(run(case), run_twin(case), allowed(case, rounds=False), torch.float32)


def test_head_loss_gradients_are_slopes() -> None:
    """Along a random direction, as gradcheck does: central differences of the twin's losses."""
    case, step = make_case((2, 7, 3, 10, 12)), 1e-5
    got = run(case)
    directions = [torch.randn(t.shape, dtype=torch.float64) for t in (case.x, case.weight)]

    def total(sign: int) -> float:
        x, w = (
            t.double().cpu() + sign * step * d
            for t, d in zip((case.x, case.weight), directions, strict=True)
        )
        losses = twins.head_loss(x, w, case.targets.cpu())
        return float((losses * case.d_losses.double().cpu()).sum())

    slope = (total(1) - total(-1)) / (2 * step)
    pairs = zip((got.dx, got.dw), directions, strict=True)
    bounds = allowed(case, rounds=False)
    most = sum(
        float((b * d.abs()).sum()) for b, d in zip((bounds.dx, bounds.dw), directions, strict=True)
    )
    found = sum(float((g.double().cpu() * d).sum()) for g, d in pairs)
    # the differences' own error: a third derivative of some tens times step squared
    assert abs(found - slope) <= most + 100 * step**2 + 1e-9


# ---- tiles, strides, types ----


def test_head_loss_is_the_same_in_every_run() -> None:
    case = make_case((8, 33, 2, 40, 16))
    head = kernels.HeadShape(2, 41, 16, "ieee")
    assert kernels.num_splits(case.x, head) > 1  # sums that could be added in another order
    first, second = run(case), run(case)
    for name in ("losses", "dx", "dw"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_head_loss_tiles() -> None:
    """What sizes take: one split of the sum or several, tiles of 16 to 64."""

    def blocks(width: int, precision: str) -> tuple[int, int]:
        head = kernels.HeadShape(16, 101, width, precision)
        return head.block, kernels.num_splits(torch.empty(256, 159, width, device="meta"), head)

    assert blocks(128, "bf16") == (64, 8)
    assert blocks(128, "ieee") == (32, 4)
    assert blocks(512, "ieee") == (16, 2)
    assert blocks(16, "ieee") == (64, 8)
    many = kernels.HeadShape(120, 301, 512, "ieee")
    assert kernels.num_splits(torch.empty(4, 1000, 512, device="meta"), many) == 1


def test_head_loss_takes_any_strides_and_types() -> None:
    case = make_case((3, 11, 4, 20, 24))
    want = run(case)
    tokens = torch.cat([case.targets[:, :1], case.targets], dim=1)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        shifted = tokens.to(dtype)[:, 1:]
        assert not shifted.is_contiguous()
        wide = torch.cat([case.x, case.x], dim=1)[:, 11:]
        turned = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
        got = run(Case(wide, turned, shifted, case.d_losses.T.contiguous().T))
        for name in ("losses", "dx", "dw"):
            assert torch.equal(getattr(got, name), getattr(want, name))
    steep = case.x.transpose(1, 2).contiguous().transpose(1, 2)
    assert steep.stride(2) != 1
    losses = fused_loss.head_loss(steep, case.weight, case.targets)
    assert torch.equal(losses, want.losses)


def test_head_loss_computes_what_is_asked_for() -> None:
    case = make_case((2, 7, 3, 10, 12))
    want, x, weight = run(case), case.x.clone(), case.weight.clone().requires_grad_()
    losses = fused_loss.head_loss(x, weight, case.targets)
    losses.backward(case.d_losses)
    assert x.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, want.dw)
    x, weight = case.x.clone().requires_grad_(), case.weight.clone()
    fused_loss.head_loss(x, weight, case.targets).sum().backward()  # one number for all tokens
    ones = Case(case.x, case.weight, case.targets, torch.ones_like(case.d_losses))
    assert x.grad is not None
    assert torch.equal(x.grad, run(ones).dx)


def test_head_loss_of_no_windows() -> None:
    case = make_case((0, 7, 3, 10, 12))
    got = run(case)
    assert got.losses.shape == (0, 7)
    assert not got.dw.any()


def test_head_loss_of_a_target_that_is_no_id_is_nan() -> None:
    case = make_case((2, 7, 3, 10, 12))
    case.targets[0, 1], case.targets[1, 2] = 11, -1
    losses = fused_loss.head_loss(case.x, case.weight, case.targets)
    assert losses.isnan().nonzero().tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"x: expected shape \(B, T, E\), got \(7, 12\)"),
        ("x", lambda t: t.double(), "x: expected float32 or bfloat16, got torch.float64"),
        ("x", lambda t: t[..., :5], r"weight: expected shape \(D, V \+ 1, 5\), got \(3, 11, 12\)"),
        ("x", lambda t: t.new_zeros(2, 7, 513), r"x: expected 1 <= E <= 512, got 513"),
        ("x", lambda t: t.to("meta"), "x: expected on a device that runs kernels, got "),
        ("weight", lambda t: t[0], r"weight: expected shape \(D, V \+ 1, E\), got \(11, 12\)"),
        ("weight", lambda t: t.half(), "weight: expected float32 or bfloat16, got torch.float16"),
        ("targets", lambda t: t[:, 1:], r"targets: expected shape \(2, 7\), got \(2, 6\)"),
        ("targets", lambda t: t.float(), "targets: expected integers, got torch.float32"),
        ("targets", lambda t: t > 3, "targets: expected integers, got torch.bool"),
        ("targets", lambda t: t.to("meta"), "targets: expected on "),
    ],
)
def test_head_loss_refuses(name: str, change: Any, message: str) -> None:
    case = make_case((2, 7, 3, 10, 12))
    arguments = {"x": case.x, "weight": case.weight, "targets": case.targets}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        fused_loss.head_loss(**arguments)


# ---- the model's losses ----


def batch_of(
    model: TrajectoryTransformer, num_windows: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, targets with a stop token among them, and a goal if the model wants one."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    shape = (num_windows, config.block_size + 1)
    tokens = torch.randint(0, config.vocab_size + 1, shape, generator=generator).to(DEVICE)
    goal = None
    if config.goal_conditioned:
        shape = (num_windows, config.observation_dim)
        goal = torch.randint(0, config.vocab_size, shape, generator=generator).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:], goal


def gradients(model: TrajectoryTransformer, losses: Tensor) -> dict[str, Tensor]:
    """Of the weighted loss of all tokens, by name."""
    model.zero_grad()
    model.weighted_loss(losses, torch.ones_like(losses)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_fused_losses_are_the_models(goal_conditioned: bool) -> None:
    """At most twice as far from float64 as the model's own, whose layers they share."""
    model = tiny_model(goal_conditioned=goal_conditioned).to(DEVICE)
    exact_model = copy.deepcopy(model).double()
    batch = batch_of(model)
    assert fused_loss.why_not(model) is None
    got, plain = fused_loss.token_losses(model, *batch), model.token_losses(*batch)
    exact = exact_model.token_losses(*batch)
    assert_as_exact(got, exact, plain)
    ours, theirs = gradients(model, got), gradients(model, plain)
    wanted = gradients(exact_model, exact)
    assert ours.keys() == theirs.keys() == wanted.keys()
    for name in wanted:
        assert_as_exact(ours[name], wanted[name], theirs[name])


def assert_as_exact(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Style rule 2; beside it a few roundings of the largest number."""
    error, theirs = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * theirs + 8 * U * exact.abs().max() + 1e-9


def test_fused_losses_of_the_official_model() -> None:
    model = TrajectoryTransformer(ModelConfig(11, 3, num_layers=1)).to(DEVICE).eval()
    batch = batch_of(model, num_windows=1)
    with torch.no_grad():
        got, plain = fused_loss.token_losses(model, *batch), model.token_losses(*batch)
        exact = copy.deepcopy(model).double().token_losses(*batch)
    assert got.shape == (1, 159)
    assert_as_exact(got, exact, plain)


def test_autocast_rounds_the_products_and_nothing_else() -> None:
    """Losses are exact for what was multiplied; gradients no further off than the model's own."""
    model = tiny_model().to(DEVICE)
    batch = batch_of(model, num_windows=8)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, plain = fused_loss.token_losses(model, *batch), model.token_losses(*batch)
        x = model._features(batch[0], batch[2])
    rounded = Case(
        x.detach().bfloat16(), model.head.weight.detach().bfloat16(), batch[1],
        torch.ones(batch[1].shape, device=DEVICE),
    )  # fmt: skip
    exact = run_twin(rounded).losses
    assert ((got.double().cpu() - exact).abs() <= allowed(rounded, rounds=True).losses).all()
    assert got.dtype == torch.float32
    ours, theirs = gradients(model, got), gradients(model, plain)
    assert ours["head.weight"].dtype == torch.float32
    exact_model = copy.deepcopy(model).double()
    wanted = gradients(exact_model, exact_model.token_losses(*batch))
    for name in wanted:
        assert (ours[name] - wanted[name]).norm() <= 2 * (theirs[name] - wanted[name]).norm() + 1e-6


def test_a_bfloat16_model_has_float32_losses() -> None:
    model = tiny_model().to(DEVICE, torch.bfloat16)
    batch = batch_of(model)
    assert fused_loss.why_not(model) is None
    losses = fused_loss.token_losses(model, *batch)
    assert losses.dtype == torch.float32
    assert gradients(model, losses)["head.weight"].dtype == torch.bfloat16


def test_what_is_not_fused_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tiny_model(embed_dim=520).to(DEVICE)
    double = tiny_model().to(DEVICE).double()
    monkeypatch.setattr(fused_loss, "head_loss", None)
    for model, reason in ((wide, "its width is 520"), (double, "its weights are torch.float64")):
        assert reason in str(fused_loss.why_not(model))
        batch = batch_of(model)
        assert torch.equal(fused_loss.token_losses(model, *batch), model.token_losses(*batch))


def test_reasons_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(DEVICE)
    monkeypatch.setattr(fused_loss, "is_interpreted", lambda: True)
    assert "cannot reach meta" in str(fused_loss.why_not(copy.deepcopy(model).to("meta")))
    monkeypatch.setattr(fused_loss, "is_interpreted", lambda: False)
    assert "cpu is no CUDA device" in str(fused_loss.why_not(copy.deepcopy(model).cpu()))
    old = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert fused_loss._why_not_on(old) == "the GPU has compute capability (7, 5), and 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fused_loss._why_not_on(old) is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed" in str(fused_loss.why_not(model))


def test_importing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import tt_fast, tt_fast.training.fused_loss as fused\n"
        "from tiny import tiny_model\n"
        "import torch; tokens = torch.zeros(1, 4, dtype=torch.int64)\n"
        "print(fused.token_losses(tiny_model(), tokens, tokens).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {TESTS!r})\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (lambda t: t[:, 1:], r"targets: expected shape \(3, 27\), got \(3, 26\)"),
        (lambda t: t.float(), "targets: expected integers, got torch.float32"),
    ],
)
def test_fused_losses_refuse(targets: Any, message: str) -> None:
    model = tiny_model().to(DEVICE)
    tokens, right, goal = batch_of(model)
    with pytest.raises(ValueError, match=message):
        fused_loss.token_losses(model, tokens, targets(right), goal)
    with pytest.raises(ValueError, match="goal: expected None"):
        fused_loss.token_losses(model, tokens, right, tokens)
