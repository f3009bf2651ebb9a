"""LayerNorm and projections to queries, keys and values, against their twin."""

from __future__ import annotations

import kernel_twins as twins
import pytest
import torch
from kernel_cases import Case, assert_caches, assert_exact_enough, copy_tree, make_case
from torch import Tensor

from tt_fast.kernels.layer_norm_qkv import layer_norm_qkv
from tt_fast.kernels.layout import Tree

pytestmark = pytest.mark.usefixtures("quick_interpreter")

#: Rows of the buffer; those past `count * per_count` are nobody's.
MAX_ROWS = 45


def random_rows(case: Case) -> tuple[Tensor, Tensor]:
    """h, zero in its padding, and distinct nodes, some of them -1."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(MAX_ROWS, case.shape.embed, generator=generator) * 3 + 1
    h[:, case.shape.embed_dim :] = 0
    num_nodes = case.tree.key_cache[0].numel() // case.shape.width
    node = torch.randperm(num_nodes, generator=generator)[:MAX_ROWS].int()
    node[3::7] = -1
    return h, node


def run_twin(case: Case, h: Tensor, node: Tensor, count: int, per_count: int,
             dtype: torch.dtype) -> tuple[Tensor, Tree]:  # fmt: skip
    q = torch.full((MAX_ROWS, case.shape.width), torch.nan, dtype=dtype)
    tree, last = copy_tree(case.tree, dtype), case.shape.num_layers - 1
    twins.layer_norm_qkv(
        h.to(dtype), node, q, tree, case.twin(dtype), last, torch.tensor([count]), per_count,
        case.shape,
    )  # fmt: skip
    return q, tree


def check(case: Case, count: int, per_count: int, M: int = 16) -> None:
    h, node = random_rows(case)
    q = torch.full((MAX_ROWS, case.shape.width), torch.nan)
    counts = torch.tensor([count], dtype=torch.int32)
    arithmetic = torch.bfloat16 if case.shape.is_bf16 else torch.float32
    exact_q, exact = run_twin(case, h, node, count, per_count, torch.float64)
    plain_q, plain = run_twin(case, h, node, count, per_count, arithmetic)
    last = case.shape.num_layers - 1
    layer_norm_qkv(h, node, q, case.tree, case.weights, last, counts, per_count, case.shape, M)
    live = count * per_count
    assert q[live:].isnan().all()
    assert_exact_enough(q[:live], exact_q[:live], plain_q[:live])
    assert_caches(case.tree, exact, plain)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads"), [(11, 1), (33, 3), (48, 3), (72, 3), (72, 1), (160, 5), (270, 5)]
)
def test_odd_widths(embed_dim: int, num_heads: int) -> None:
    case = make_case(embed_dim=embed_dim, num_heads=num_heads, num_layers=2)
    check(case, count=37, per_count=1)


@pytest.mark.parametrize(("count", "per_count"), [(0, 5), (1, 1), (16, 1), (17, 2), (9, 5)])
def test_rows_past_the_count_keep_what_they_have(count: int, per_count: int) -> None:
    case = make_case(num_layers=2)
    if count == 0:
        h, node = random_rows(case)
        q = torch.full((MAX_ROWS, case.shape.width), torch.nan)
        counts = torch.zeros(1, dtype=torch.int32)
        layer_norm_qkv(h, node, q, case.tree, case.weights, 0, counts, per_count, case.shape)
        assert q.isnan().all()
        assert case.tree.key_cache.isnan().all()
        assert case.tree.value_cache.isnan().all()
    else:
        check(case, count, per_count)


@pytest.mark.parametrize("M", [16, 32, 64])
def test_any_tile_of_rows(M: int) -> None:
    check(make_case(embed_dim=24), count=40, per_count=1, M=M)


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(11, 1), (48, 3)])
def test_bfloat16(embed_dim: int, num_heads: int) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
    check(make_case(precision="bf16 in float32", **sizes), count=37, per_count=1)


def test_rows_without_a_node_keep_only_their_query() -> None:
    case = make_case()
    h, node = random_rows(case)
    node[:] = -1
    q = torch.full((MAX_ROWS, case.shape.width), torch.nan)
    counts = torch.tensor([MAX_ROWS], dtype=torch.int32)
    layer_norm_qkv(h, node, q, case.tree, case.weights, 0, counts, 1, case.shape)
    assert not q.isnan().any()
    assert case.tree.key_cache.isnan().all()
    assert case.tree.value_cache.isnan().all()
