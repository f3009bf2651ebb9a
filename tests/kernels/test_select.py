"""Ranks of candidates, and what their ancestors are from then on, against twins."""

from __future__ import annotations

from typing import Any

import kernel_twins as twins
import numpy as np
import pytest
import torch
from kernel_cases import Case, copy_tree, fill_slots, grow_tree, make_case, plan_config, random_ints
from torch import Tensor

from tt_fast.kernels.select import Scores, advance, rank

pytestmark = pytest.mark.usefixtures("quick_interpreter")

NAN, INF = float("nan"), float("inf")


# --- ranks ----------------------------------------------------------------------------------------


def ranking_case(beam_width: int, n_expand: int, num_envs: int = 2, seed: int = 0) -> Case:
    config = plan_config(beam_width=beam_width, n_expand=n_expand, horizon=3)
    case = make_case(num_envs=num_envs, plan=config)
    rng, buffers = np.random.default_rng(seed), case.buffers
    buffers.scores.factors.copy_(torch.tensor([1.0, 0.97, 0.97**2, 0.97**3]))
    buffers.scores.returns.copy_(torch.from_numpy(rng.normal(size=buffers.scores.returns.shape)))
    estimates = rng.normal(size=buffers.draws.estimates.shape).astype(np.float32)
    buffers.draws.estimates.copy_(torch.from_numpy(estimates))
    return case


def check_rank(case: Case, t: int) -> Scores:
    """All tensors equal the twin's, bit for bit, where it wrote and where it did not."""
    estimates = case.buffers.draws.estimates
    got = case.buffers.scores
    got.parents.fill_(-9)
    want = Scores(*(tensor.clone() for tensor in got))
    twins.rank(want, estimates, t, case.num_envs, case.plan)
    rank(got, estimates, t, case.num_envs, case.plan)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    return got


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize(
    ("beam_width", "n_expand"), [(1, 1), (1, 3), (5, 2), (8, 8), (13, 5), (64, 1), (33, 4)]
)
def test_ranks(beam_width: int, n_expand: int, t: int) -> None:
    """Up to 132 rows: three blocks, the last one partial."""
    check_rank(ranking_case(beam_width, n_expand), t)


@pytest.mark.parametrize(("beam_width", "n_expand"), [(5, 2), (13, 11)])
def test_of_equal_scores_the_lower_row_is_first(beam_width: int, n_expand: int) -> None:
    """Scores are one of three, and rows of a tie lie in different blocks."""
    case = ranking_case(beam_width, n_expand, num_envs=3)
    case.buffers.scores.returns.zero_()
    estimates = case.buffers.draws.estimates
    estimates.copy_(estimates.round().clamp(-1, 1))
    estimates[:, 1] = 0
    check_rank(case, 1)


def test_all_scores_equal() -> None:
    case = ranking_case(50, 3)
    case.buffers.scores.returns.zero_()
    case.buffers.draws.estimates.zero_()
    scores = check_rank(case, 0)
    assert torch.equal(scores.parents[:, 0], torch.arange(50).int().expand(2, -1))


def test_zeros_of_both_signs_are_equal() -> None:
    case = ranking_case(4, 1, num_envs=1)
    case.buffers.scores.returns.zero_()
    case.buffers.draws.estimates.zero_()
    case.buffers.draws.estimates[0, :, 0] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    assert check_rank(case, 0).parents[0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("special", [NAN, -INF, INF])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_numbers_that_are_none(special: float, count: int) -> None:
    """So many of 10 candidates for 5 beams that some of them must be kept, or none."""
    case = ranking_case(5, 2)
    rows = np.random.default_rng(count).choice(10, count, replace=False)
    case.buffers.draws.estimates[:, 1, 0, rows] = special
    scores = check_rank(case, 0)
    kept = np.isin(scores.parents[0, 0].numpy(), rows).sum()
    assert kept == (min(count, 5) if special == INF else max(0, count - 5))


@pytest.mark.parametrize("seed", range(3))
def test_nan_comes_after_minus_infinity(seed: int) -> None:
    case = ranking_case(6, 1, num_envs=1)
    numbers = np.random.default_rng(seed).permutation([NAN, -INF, 1.0, NAN, -INF, 0.0])
    case.buffers.scores.returns.zero_()
    case.buffers.draws.estimates[0, :, 0] = torch.from_numpy(numbers.astype(np.float32))
    check_rank(case, 0)


def test_sums_round_as_numpys_do() -> None:
    """No contraction: factor * r is rounded before it is added."""
    case = ranking_case(40, 2)
    case.buffers.scores.returns.mul_(1e-3)
    check_rank(case, 2)


# --- ancestors ------------------------------------------------------------------------------------


def select_parents(case: Case, current: int, seed: int = 0, choices: int | None = None) -> None:
    """Random ones; `choices`: from so few rows that many repeat, as no selection does."""
    rng, plan = np.random.default_rng(seed), case.plan
    for env in range(case.num_envs):
        size, repeats = choices or plan.num_rows, choices is not None
        parents = rng.choice(size, plan.num_beams, replace=repeats).astype(np.int32)
        case.buffers.scores.parents[env, current - plan.first_step] = torch.from_numpy(parents)


def check_advance(case: Case, current: int) -> list[int]:
    """Returns the transitions to encode; slots and origins that nobody writes stay."""
    old, tree = case.buffers.trees
    tree.slots.fill_(-9)
    tree.origins.fill_(-9)
    before, want = copy_tree(old, torch.float32), copy_tree(tree, torch.float32)
    nodes = twins.advance(case.buffers.scores, old, want, current, case.num_envs, case.plan)
    listed = torch.full((len(nodes) + 3,), -9, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    advance(case.buffers.scores, old, tree, listed, count, current, case.num_envs, case.plan)
    for ours, theirs in ((tree, want), (old, before)):
        assert torch.equal(ours.slots, theirs.slots)
        assert torch.equal(ours.origins, theirs.origins)
    assert int(count) == len(nodes)
    got = listed.tolist()
    assert sorted(got[: len(nodes)]) == sorted(nodes)  # programs append in any order
    assert got[len(nodes) :] == [-9] * 3
    return got[: len(nodes)]


def advancing_case(past: list[int], current: int, **changes: Any) -> Case:
    """Any slots, and origins with common ancestors."""
    case = make_case(num_envs=len(past), plan=plan_config(**changes))
    grow_tree(case, current, past)
    fill_slots(case, past)
    case.tree.origins[:, current:] = 10**6  # of no step that is known
    select_parents(case, current)
    return case


@pytest.mark.parametrize("current", [2, 3, 4, 6])
@pytest.mark.parametrize("past", [[2, 2], [0, 1, 2], [0]])
def test_crops(past: list[int], current: int) -> None:
    """Environments crop at different times: windows of 0, 1 and 2 transitions at the start."""
    case = advancing_case(past, current)
    nodes = check_advance(case, current)
    full = [p for p in past if p + current - case.plan.first_step >= case.plan.max_past]
    assert bool(nodes) == bool(full)


@pytest.mark.parametrize("current", [1, 2, 3])
def test_windows_that_grow(current: int) -> None:
    """Nothing is encoded anew."""
    case = advancing_case([0, 1, 1], current, overflow="grow", horizon=4)
    assert case.plan.first_step == 1
    assert check_advance(case, current) == []


@pytest.mark.parametrize("beam_width", [1, 3, 8, 17, 130])
def test_any_number_of_beams(beam_width: int) -> None:
    """Blocks of up to 128, the last one partial; 130 beams have owners in the other block."""
    case = advancing_case([2, 1], 3, beam_width=beam_width, horizon=3)
    check_advance(case, 3)


def test_beams_with_one_parent_encode_it_once() -> None:
    case = advancing_case([2, 2], 3, beam_width=130, horizon=3)
    select_parents(case, 3, choices=2)
    nodes = check_advance(case, 3)
    assert len(nodes) <= 2 * 2 * case.plan.max_past
    slots = case.buffers.trees[1].slots[:, :, 3 % case.plan.num_levels]
    assert len(slots.unique()) <= 3


def test_the_context_is_encoded_once_for_all_beams() -> None:
    case = advancing_case([2, 2], 2)
    case.tree.origins.zero_()
    nodes = check_advance(case, 2)
    of_step_1 = [n for n in nodes if n // case.plan.num_beams % case.plan.num_steps == 1]
    assert len(of_step_1) == 2
    assert len(nodes) == 2 * (1 + case.plan.num_beams)


@pytest.mark.parametrize("seed", range(3))
def test_many_selections(seed: int) -> None:
    """Trees change places from step to step, as in a plan; levels wrap twice."""
    case = make_case(num_envs=3, plan=plan_config(horizon=8))
    case.tree.past.copy_(torch.tensor([0, 1, 2]))
    plan, (old, tree) = case.plan, case.buffers.trees
    want_old = copy_tree(old, torch.float32)
    want = copy_tree(tree, torch.float32)
    for current in range(plan.first_step, plan.num_steps):
        select_parents(case, current, seed * 100 + current)
        nodes = twins.advance(case.buffers.scores, want_old, want, current, 3, plan)
        listed, count = no_nodes(case)
        advance(case.buffers.scores, old, tree, listed, count, current, 3, plan)
        assert set(listed[: int(count)].tolist()) == nodes
        assert torch.equal(tree.slots, want.slots)
        assert torch.equal(tree.origins, want.origins)
        old, tree, want_old, want = tree, old, want, want_old


def no_nodes(case: Case) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(case.buffers.nodes), torch.zeros(1, dtype=torch.int32)


def test_origins_follow_the_parents() -> None:
    """By hand: two beams of three candidates each, one step after the context."""
    case = make_case(num_envs=1, plan=plan_config(beam_width=2, n_expand=3, horizon=3))
    case.tree.past.fill_(2)
    case.tree.origins[0, 2] = torch.tensor([4, 1])
    case.tree.slots[0] = random_ints(np.random.default_rng(0), 2, case.tree.slots[0].shape)
    case.buffers.scores.parents[0, 1] = torch.tensor([3, 5])  # both of beam 1
    nodes = check_advance(case, 3)
    tree = case.buffers.trees[1]
    assert tree.origins[0, 2].tolist() == [1, 1]
    assert tree.origins[0, 3].tolist() == [3, 5]
    assert tree.slots[0, :, 2].tolist() == [[0, 0], [0, 0]]
    assert tree.slots[0, :, 0].tolist() == [[0, 1], [0, 1]]
    assert sorted(nodes) == [2 * 2, 3 * 2, 3 * 2 + 1]
