"""Keys and values of whole transitions, against plain forward passes over their windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kernel_twins as twins
import pytest
import torch
from kernel_cases import (
    NARROW,
    WIDE,
    Case,
    assert_caches,
    assert_exact_enough,
    copy_tree,
    grow_tree,
    make_case,
    node_list,
    plan_config,
)

from tt_fast.kernels.layout import Machine, Tree
from tt_fast.kernels.prefill import Scratch, prefill, tree_attention

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def make_scratch(case: Case, max_nodes: int) -> Scratch:
    """Of no more rows than needed, NaN."""
    shape, rows = case.shape, max_nodes * case.shape.visible
    widths = (shape.embed, shape.width, shape.width, shape.hidden)
    node = torch.full((rows,), -9, dtype=torch.int32)
    return Scratch(*(torch.full((rows, width), torch.nan) for width in widths), node)


def check(case: Case, nodes: Sequence[int], current: int, machine: Machine = NARROW) -> Tree:
    """Nodes that are not listed stay NaN. Returns the kernel's tree."""
    listed, count = node_list(nodes)

    def twin(dtype: torch.dtype) -> Tree:
        tree = copy_tree(case.tree, dtype)
        twins.prefill(listed, count, tree, case.twin(dtype), current, case.shape, case.plan)
        return tree

    exact = twin(torch.float64)
    plain = twin(torch.bfloat16 if case.shape.is_bf16 else torch.float32)
    got = copy_tree(case.tree, case.tree.key_cache.dtype)
    prefill(
        listed, count, got, case.weights, current, case.num_envs, machine, case.shape, case.plan,
        make_scratch(case, len(listed)),
    )  # fmt: skip
    assert_caches(got, exact, plain)
    return got


def grown(past: list[int], planned: int, seed: int = 0, **changes: Any) -> tuple[Case, list[int]]:
    """After so many planned steps."""
    sizes = {"num_layers": 2} | changes
    case = make_case(seed, num_envs=len(past), **sizes)
    return case, grow_tree(case, case.plan.first_step + planned, past, seed)


# --- contexts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [NARROW, WIDE], ids=["rows of 16", "rows of 64"])
@pytest.mark.parametrize("past", [[2], [0, 1, 2], [1, 0]])
def test_contexts(past: list[int], machine: Machine) -> None:
    """Of different lengths, one of them nothing but an observation."""
    case, nodes = grown(past, 0)
    assert len(nodes) == sum(past)
    check(case, nodes, case.plan.first_step, machine)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "num_layers"), [(11, 1, 3), (48, 3, 2), (72, 3, 2), (160, 5, 2)]
)
def test_odd_widths(embed_dim: int, num_heads: int, num_layers: int) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_layers": num_layers}
    case, nodes = grown([1, 2], 0, vocab_size=11, **sizes)
    check(case, nodes, case.plan.first_step)


@pytest.mark.parametrize(
    ("observation_dim", "action_dim"), [(1, 1), (11, 3), (12, 4), (17, 6), (24, 7), (30, 9)]
)
def test_long_transitions(observation_dim: int, action_dim: int) -> None:
    """3 to 40 visible tokens: tiles of 16 or 32, one of them or two."""
    sizes = {"observation_dim": observation_dim, "action_dim": action_dim}
    case, nodes = grown([2, 1], 0, **sizes)
    check(case, nodes, case.plan.first_step)


def test_nothing_to_encode() -> None:
    case, nodes = grown([0, 0], 0)
    assert nodes == []
    listed, count = node_list(nodes)
    prefill(
        listed, count, case.tree, case.weights, case.plan.first_step, 2, NARROW, case.shape,
        case.plan, make_scratch(case, len(listed)),
    )  # fmt: skip
    assert case.tree.key_cache.isnan().all()
    assert case.tree.value_cache.isnan().all()


# --- trees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [1, 2, 4])
def test_windows_after_crops(planned: int) -> None:
    """Levels wrap; beams share what `origins` says they share. The first context is not full."""
    case, nodes = grown([0, 1, 2], planned)
    beams = case.plan.num_beams
    assert len(nodes) < 3 * beams * case.plan.max_past
    tree, current = check(case, nodes, case.plan.first_step + planned), case.plan.first_step
    check_every_beam(case, tree, current + planned)


def check_every_beam(case: Case, tree: Tree, current: int) -> None:
    """Each beam finds its own window's keys by its slots, whichever beam encoded them."""
    shape, plan = case.shape, case.plan
    models = [case.twin(torch.float64), case.twin(torch.float32)]
    last = shape.num_layers - 1
    for env in range(case.num_envs):
        start = current - twins.past_at(tree, env, current, plan)
        for beam in range(plan.num_beams):
            places = twins.visible_places(tree, env, beam, current, -1, shape, plan)
            levels, nodes = zip(*places, strict=True)
            got = tree.key_cache[last, env, list(levels), list(nodes)]
            tokens = torch.cat(twins.window_tokens(tree, env, beam, start, current))
            is_visible = torch.arange(len(tokens)) % shape.transition_dim != shape.visible
            keys = [twins.keys_and_values(m, tokens)[last][0][is_visible] for m in models]
            assert_exact_enough(got, *(twins.pad_heads(k, case.model, shape) for k in keys))


def test_only_listed_contexts_are_encoded() -> None:
    """One that is not full yet keeps its keys, whatever they are."""
    case, nodes = grown([0, 2], 1)
    per_env = case.plan.num_steps * case.plan.num_beams
    tree = check(case, [n for n in nodes if n >= per_env], case.plan.first_step + 1)
    assert tree.key_cache[:, 0].isnan().all()
    assert tree.value_cache[:, 0].isnan().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_any_order(reverse: bool) -> None:
    """A pass is dense: later steps may come first."""
    case, nodes = grown([2, 2], 3, seed=1)
    check(case, sorted(nodes, reverse=reverse), case.plan.first_step + 3)


def test_longer_windows() -> None:
    """Seven transitions of 6 visible tokens: more than a tile of 32 keys."""
    config = plan_config(beam_width=3, max_context_transitions=8, horizon=3)
    case, nodes = grown([7, 6], 1, plan=config, num_transitions=8)
    assert case.plan.max_past * case.shape.visible > 32
    check(case, nodes, case.plan.first_step + 1)


def test_windows_that_grow() -> None:
    """Only their contexts are encoded, at the left end of a sequence."""
    case, nodes = grown([2, 1], 0, plan=plan_config(horizon=3, overflow="grow"))
    assert not case.plan.crops
    assert case.plan.first_step == 2
    check(case, nodes, 2)


def test_bfloat16() -> None:
    case, nodes = grown([2, 1], 1, precision="bf16 in float32", embed_dim=48, num_heads=3)
    check(case, nodes, case.plan.first_step + 1)


def test_a_token_sees_nothing_later() -> None:
    """Attention alone: another key of a last token changes what it and later ones attend to."""
    case, nodes = grown([2], 0, num_layers=1)
    shape, plan, current = case.shape, case.plan, case.plan.first_step
    listed, count = node_list(nodes, len(nodes))
    scratch = make_scratch(case, len(nodes))
    for cache in case.tree[:2]:
        cache[:] = torch.randn(cache.shape, generator=torch.Generator().manual_seed(0))
    scratch.q[:] = 1.0

    def attend() -> torch.Tensor:
        out = torch.full_like(scratch.attended, torch.nan)
        tree_attention(listed, count, scratch.q, out, case.tree, 0, current, 1, shape, plan)
        return out

    before = attend()
    level, node = twins.place_of(current - 1, 0, 4, shape, plan)
    case.tree.key_cache[0, 0, level, node] += 1.0
    is_same = (attend() == before).all(dim=1)
    assert is_same.tolist() == [True] * (shape.visible + 4) + [False] * 2
