"""Attention's projection and the MLP, in place, against their twin."""

from __future__ import annotations

import kernel_twins as twins
import pytest
import torch
from kernel_cases import Case, assert_exact_enough, make_case
from torch import Tensor

from tt_fast.kernels.mlp import fits_mlp, mlp

pytestmark = pytest.mark.usefixtures("quick_interpreter")

MAX_ROWS = 45


def random_rows(case: Case) -> tuple[Tensor, Tensor]:
    """h and attended, zero in their padding."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(MAX_ROWS, case.shape.embed, generator=generator) * 3 + 1
    h[:, case.shape.embed_dim :] = 0
    attended = torch.randn(MAX_ROWS, case.model.config.embed_dim, generator=generator)
    return h, twins.pad_heads(attended, case.model, case.shape)


def make_hidden(case: Case) -> Tensor:
    """As a session has it."""
    rows = 0 if fits_mlp(case.shape) else MAX_ROWS
    return torch.full((rows, case.shape.hidden), torch.nan)


def check(case: Case, count: int, per_count: int = 1, M: int = 16) -> None:
    h, attended = random_rows(case)
    counts, last = torch.tensor([count], dtype=torch.int32), case.shape.num_layers - 1

    def twin(dtype: torch.dtype) -> Tensor:
        out = h.to(dtype, copy=True)
        twins.mlp(out, attended.to(dtype), case.twin(dtype), last, counts, per_count, case.shape)
        return out

    exact = twin(torch.float64)
    plain = twin(torch.bfloat16 if case.shape.is_bf16 else torch.float32)
    got = h.clone()
    mlp(got, attended, make_hidden(case), case.weights, last, counts, per_count, case.shape, M)
    live = count * per_count
    assert torch.equal(got[live:], h[live:])
    assert torch.equal(got[:, case.shape.embed_dim :], h[:, case.shape.embed_dim :])
    assert_exact_enough(got[:live], exact[:live], plain[:live])
    assert not torch.isclose(got[:live, 0], h[:live, 0]).all()


@pytest.mark.parametrize(
    ("embed_dim", "num_heads"), [(11, 1), (33, 3), (48, 3), (72, 3), (72, 1), (160, 5)]
)
def test_odd_widths(embed_dim: int, num_heads: int) -> None:
    check(make_case(embed_dim=embed_dim, num_heads=num_heads, num_layers=2), count=37)


@pytest.mark.parametrize(("count", "per_count"), [(1, 1), (16, 1), (17, 2), (9, 5)])
def test_rows_past_the_count_stay(count: int, per_count: int) -> None:
    check(make_case(num_layers=2), count, per_count)


def test_no_rows() -> None:
    case = make_case()
    h, attended = random_rows(case)
    got = h.clone()
    mlp(
        got,
        attended,
        make_hidden(case),
        case.weights,
        0,
        torch.zeros(1, dtype=torch.int32),
        5,
        case.shape,
    )
    assert torch.equal(got, h)


@pytest.mark.parametrize("precision", ["ieee", "bf16 in float32"])
def test_a_launch_per_product(precision: str) -> None:
    """Width, hidden columns and heads are all padded."""
    case = make_case(embed_dim=270, num_heads=5, precision=precision)
    assert not fits_mlp(case.shape)
    check(case, count=9, per_count=2)


@pytest.mark.parametrize("M", [16, 32, 64])
def test_any_tile_of_rows(M: int) -> None:
    check(make_case(embed_dim=24), count=40, M=M)


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(11, 1), (48, 3), (72, 3)])
def test_bfloat16(embed_dim: int, num_heads: int) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
    check(make_case(precision="bf16 in float32", **sizes), count=37)
