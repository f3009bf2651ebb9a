"""Attention of the newest tokens over ancestors wherever they lie, against its twin."""

from __future__ import annotations

from typing import Any

import kernel_twins as twins
import pytest
import torch
from kernel_cases import (
    NARROW,
    WIDE,
    Case,
    assert_exact_enough,
    copy_tree,
    fill_slots,
    make_case,
    plan_config,
)
from torch import Tensor

from tt_fast.kernels.decode_attention import decode_attention, key_block
from tt_fast.kernels.layout import Machine

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def fill_visible(case: Case, step: int, dim: int, rows_per_env: int) -> None:
    """Keys and values of tokens that some row sees; all others are NaN."""
    generator, tree = torch.Generator().manual_seed(2), case.tree
    for cache in tree[:2]:
        numbers = torch.randn(cache.shape, generator=generator).to(cache.dtype)
        for env in range(case.num_envs):
            for row in range(rows_per_env):
                places = twins.visible_places(tree, env, row, step, dim, case.shape, case.plan)
                for level, node in places:
                    cache[:, env, level, node] = numbers[:, env, level, node]


def check(case: Case, step: int, dim: int, rows_per_env: int, machine: Machine = NARROW) -> Tensor:
    """Returns what the kernel computes."""
    shape, plan, envs = case.shape, case.plan, case.num_envs
    fill_visible(case, step, dim, rows_per_env)
    rows = envs * rows_per_env
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(rows + 3, shape.width, generator=generator) * 2
    got = torch.full_like(q, torch.nan)
    layer = shape.num_layers - 1
    sizes = (layer, step, dim, envs, rows_per_env)
    decode_attention(q[:rows], got[:rows], case.tree, *sizes, machine, shape, plan)

    def twin(dtype: torch.dtype) -> Tensor:
        out, tree = torch.full(got.shape, torch.nan, dtype=dtype), copy_tree(case.tree, dtype)
        twins.decode_attention(q.to(dtype), out, tree, *sizes, shape, plan)
        return out[:rows]

    assert got[rows:].isnan().all()
    # the kernel's sums are float32 even where keys are bfloat16
    assert_exact_enough(got[:rows], twin(torch.float64), twin(torch.float32))
    return got[:rows]


def sized_case(past: list[int], seed: int = 0, **changes: Any) -> Case:
    case = make_case(num_envs=len(past), **({"num_layers": 2} | changes))
    fill_slots(case, past, seed)
    return case


def test_tiles_of_keys_are_as_the_tests_need_them() -> None:
    shape = make_case().shape
    assert key_block(4, shape, NARROW) == 4
    assert key_block(4, shape, WIDE) == 128


@pytest.mark.parametrize("dim", range(-1, 6))
@pytest.mark.parametrize("step", [2, 3, 5])
def test_every_dimension_before_and_after_levels_wrap(step: int, dim: int) -> None:
    """Three levels; windows of 0, 1 and 2 transitions before the first planned one."""
    case = sized_case([0, 1, 2])
    if dim == -1 and step == case.plan.first_step:
        step += 1  # a value comes from a planned step, or the window holds nothing
    check(case, step, dim, case.plan.num_beams if dim < 3 else case.plan.num_rows)


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(11, 1), (48, 3), (72, 3), (72, 1), (44, 4)])
@pytest.mark.parametrize("machine", [NARROW, Machine(1, 1024, 16), WIDE])
def test_odd_heads_and_tiles(embed_dim: int, num_heads: int, machine: Machine) -> None:
    """Windows of 4, 10 and 16 keys, no multiples of 4 or 8 all of them; rows of no tile of 4."""
    case = sized_case([0, 1, 2], embed_dim=embed_dim, num_heads=num_heads, num_layers=1)
    check(case, case.plan.first_step, 3, case.plan.num_rows, machine)


def test_candidates_see_their_own_action_and_their_beams_past() -> None:
    """Rows r and r + num_beams differ by what lies in their own nodes at the current step."""
    case = sized_case([2, 2])
    plan, shape, step = case.plan, case.shape, case.plan.first_step + 1
    before = twins.visible_places(case.tree, 0, 1, step, 4, shape, plan)
    other = twins.visible_places(case.tree, 0, 1 + plan.num_beams, step, 4, shape, plan)
    assert [a != b for a, b in zip(before, other, strict=True)] == [False] * 15 + [True] * 2
    got = check(case, step, 4, plan.num_rows)
    assert not torch.isclose(got[1], got[1 + plan.num_beams]).any()


def test_beams_with_the_same_ancestors_share_them() -> None:
    """All beams point at one; with the same query they attend alike."""
    case = sized_case([2, 1])
    case.tree.slots.fill_(3)
    step = case.plan.first_step + 2
    fill_visible(case, step, -1, case.plan.num_beams)
    q = torch.ones(2 * case.plan.num_beams, case.shape.width)
    out = torch.full_like(q, torch.nan)
    sizes = (0, step, -1, 2, case.plan.num_beams)
    decode_attention(q, out, case.tree, *sizes, NARROW, case.shape, case.plan)
    assert torch.equal(out[:5], out[:1].expand(5, -1))
    assert torch.equal(out[5:], out[5:6].expand(5, -1))
    assert not torch.isclose(out[0], out[5]).any()


def test_the_context_has_one_row() -> None:
    case = sized_case([2, 0, 1, 2, 1])
    case.tree.slots.zero_()
    check(case, case.plan.first_step, 2, rows_per_env=1)


def test_windows_that_grow() -> None:
    """Every step has its level, and no step is cropped."""
    config = plan_config(horizon=4, overflow="grow")
    case = sized_case([0, 1, 3], plan=config, num_transitions=7)
    assert case.plan.num_levels == 7
    for dim, rows in ((-1, case.plan.num_beams), (4, case.plan.num_rows)):
        check(case, 6, dim, rows)


def test_large_scores() -> None:
    """A later tile's scores are far larger, or smaller, than all before."""
    case = sized_case([2, 2])
    step, rows = case.plan.first_step, case.plan.num_rows
    fill_visible(case, step, 4, rows)
    case.tree.key_cache.mul_(100)
    q = torch.randn(2 * rows, case.shape.width, generator=torch.Generator().manual_seed(0))
    outs = [torch.full((2 * rows, case.shape.width), torch.nan, dtype=d)
            for d in (torch.float32, torch.float64, torch.float32)]  # fmt: skip
    sizes = (0, step, 4, 2, rows)
    decode_attention(q, outs[0], case.tree, *sizes, NARROW, case.shape, case.plan)
    for out in outs[1:]:
        tree = copy_tree(case.tree, out.dtype)
        twins.decode_attention(q.to(out.dtype), out, tree, *sizes, case.shape, case.plan)
    assert_exact_enough(*outs)


@pytest.mark.parametrize("machine", [NARROW, WIDE])
def test_keys_in_bfloat16(machine: Machine) -> None:
    case = sized_case([0, 2], precision="bf16 in float32")
    assert case.tree.key_cache.dtype == torch.bfloat16
    check(case, case.plan.first_step + 1, 4, case.plan.num_rows, machine)
