"""Many tokens in one launch, and a launch per operation: both against plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import kernel_twins as twins
import pytest
import torch
from kernel_cases import (
    GIVEN,
    NARROW,
    WIDE,
    Case,
    assert_caches,
    assert_exact_enough,
    copy_tree,
    fill_draws,
    grow_tree,
    make_case,
    node_list,
    plan_config,
)

from tt_fast import TrajectoryTransformer
from tt_fast.kernels.layerwise import Newest, run_layerwise
from tt_fast.kernels.layout import Machine, Tree
from tt_fast.kernels.prefill import Scratch
from tt_fast.kernels.sample import DrawFlags, Draws
from tt_fast.kernels.segment import (
    Segment,
    action_segment,
    context_segment,
    fits_segment,
    observation_segment,
    run_segment,
    tile_rows,
)

pytestmark = pytest.mark.usefixtures("quick_interpreter")

Run = Callable[[Case, Segment, Tree, Draws, int, int, Machine], None]
FLAGS = {True: GIVEN, False: DrawFlags(given_uniforms=False, keep_probs=True)}


class Outcome(NamedTuple):
    """What a segment leaves behind."""

    tree: Tree
    draws: Draws


def kind_of(name: str, case: Case) -> tuple[Segment, int]:
    """The segment, and its rows an environment."""
    makes = {"context": context_segment, "observation": observation_segment,
             "action": action_segment}  # fmt: skip
    rows = {"context": 1, "observation": case.plan.num_beams, "action": case.plan.num_rows}
    return makes[name](case.shape), rows[name]


def fused(case: Case, segment: Segment, tree: Tree, draws: Draws, step: int, rows: int,
          machine: Machine) -> None:  # fmt: skip
    run_segment(
        segment, case.weights, tree, draws, step, case.num_envs, rows, machine, case.shape,
        case.plan, FLAGS[bool(draws.uniforms.numel())],
    )  # fmt: skip


def layerwise(case: Case, segment: Segment, tree: Tree, draws: Draws, step: int, rows: int,
              machine: Machine) -> None:  # fmt: skip
    shape, count = case.shape, case.num_envs * case.plan.num_rows
    widths = (shape.embed, shape.width, shape.width, shape.hidden)
    buffers = (torch.full((count, width), torch.nan) for width in widths)
    scratch = Scratch(*buffers, torch.full((count,), -9, dtype=torch.int32))
    logits = torch.full((count, shape.ids), torch.nan)
    newest = Newest(scratch, logits, torch.ones(1, dtype=torch.int32))
    run_layerwise(
        segment, case.weights, tree, draws, step, case.num_envs, rows, machine, newest, shape,
        case.plan, FLAGS[bool(draws.uniforms.numel())],
    )  # fmt: skip


def twin(model: TrajectoryTransformer) -> Run:
    def run(case: Case, segment: Segment, tree: Tree, draws: Draws, step: int, rows: int,
            machine: Machine) -> None:  # fmt: skip
        twins.run_segment(
            segment, model, tree, draws, step, case.num_envs, rows, case.shape, case.plan,
            FLAGS[bool(draws.uniforms.numel())],
        )  # fmt: skip

    return run


def encode_before(case: Case, nodes: list[int], name: str, step: int, dtype: torch.dtype) -> Tree:
    """All that a segment finds: the window's keys, and before actions the observation's."""
    tree, model = copy_tree(case.tree, dtype), case.twin(dtype)
    twins.prefill(*node_list(nodes), tree, model, step, case.shape, case.plan)
    if name != "action":
        return tree
    observed = range(case.shape.observation_dim)
    for env in range(case.num_envs):
        start = step - twins.past_at(tree, env, step, case.plan)
        for beam in range(case.plan.num_beams):
            window = twins.window_tokens(tree, env, beam, start, step)
            tokens = torch.cat([*window, tree.tokens[env, step, beam, : len(observed)].long()])
            twins.write_keys(
                tree, model, tokens, env, step, beam, observed, case.shape, case.plan
            )  # fmt: skip
    return tree


def outcome(case: Case, run: Run, before: Tree, name: str, step: int, dtype: torch.dtype,
            machine: Machine = WIDE) -> Outcome:  # fmt: skip
    tree, draws = copy_tree(before, dtype), case.buffers.draws
    segment, rows = kind_of(name, case)
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    estimates, probs = (
        torch.full(t.shape, torch.nan, dtype=numbers) for t in (draws.estimates, draws.probs)
    )
    draws = draws._replace(estimates=estimates, probs=probs)
    run(case, segment, tree, draws, step, rows, machine)
    return Outcome(tree, draws)


def segment_case(past: list[int], planned: int, seed: int = 0, given: bool = True,
                 truncates: bool = False, **sizes: Any) -> tuple[Case, list[int]]:  # fmt: skip
    """Truncation takes the interpreter long; tests/kernels/test_sample.py has all of it."""
    filters = {"k_obs": None, "k_rew": None, "cdf_act": None}
    if truncates:
        filters = {"k_obs": 4, "k_rew": 1, "cdf_act": 0.3}
    config = plan_config(beam_width=3, n_expand=2, temperature=1.5, **filters)
    values = {"num_layers": 2, "vocab_size": 20} | sizes
    case = make_case(seed, num_envs=len(past), plan=config, flags=FLAGS[given], **values)
    fill_draws(case, config, seed)
    return case, grow_tree(case, case.plan.first_step + planned, past, seed)


def check(case: Case, nodes: list[int], name: str, planned: int, run: Run,
          machine: Machine) -> None:  # fmt: skip
    step = case.plan.first_step + planned
    exact, plain = (
        outcome(case, twin(case.twin(d)), encode_before(case, nodes, name, step, d), name, step, d)
        for d in (torch.float64, torch.float32)
    )
    before = encode_before(case, nodes, name, step, torch.float32)
    got = outcome(case, run, before, name, step, torch.float32, machine)
    assert not torch.equal(got.tree.tokens, case.tree.tokens)
    assert torch.equal(got.tree.tokens, plain.tree.tokens)
    assert torch.equal(exact.tree.tokens, plain.tree.tokens)
    assert_caches(got.tree, exact.tree, plain.tree)
    for field in ("estimates", "probs"):
        ours, theirs, torchs = (getattr(o.draws, field) for o in (got, exact, plain))
        written = ~theirs.isnan()
        assert bool(written.any()) == (name == "action")
        assert torch.equal(~ours.isnan(), written)
        if name == "action":
            assert_exact_enough(ours[written], theirs[written], torchs[written])


# --- both ways of running one ---------------------------------------------------------------------


@pytest.mark.parametrize("run", [fused, layerwise])
@pytest.mark.parametrize(
    ("name", "planned"),
    [("context", 0), ("action", 0), ("observation", 1), ("action", 1), ("observation", 3)],
)
def test_segments(name: str, planned: int, run: Run) -> None:
    """Three environments at different times; 3, 9 and 18 rows fill no tile of 16."""
    case, nodes = segment_case([0, 1, 2], planned)
    check(case, nodes, name, planned, run, WIDE)


@pytest.mark.parametrize("run", [fused, layerwise])
@pytest.mark.parametrize(("name", "planned"), [("context", 0), ("action", 1), ("observation", 3)])
def test_small_tiles(name: str, planned: int, run: Run) -> None:
    """Of 4 rows, repeated to 16, and of 4 keys; with truncation."""
    case, nodes = segment_case([1], planned, vocab_size=8, truncates=True)
    check(case, nodes, name, planned, run, NARROW)


@pytest.mark.parametrize("run", [fused, layerwise])
@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "vocab_size"), [(11, 1, 8), (48, 3, 40), (72, 3, 100)]
)
@pytest.mark.parametrize(("name", "planned"), [("action", 2), ("observation", 2)])
def test_odd_widths(
    name: str, planned: int, embed_dim: int, num_heads: int, vocab_size: int, run: Run
) -> None:
    """100 bins are four blocks of logits; 72 columns are tiles of 128."""
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "vocab_size": vocab_size}
    case, nodes = segment_case([2], planned, num_layers=1, **sizes)
    check(case, nodes, name, planned, run, WIDE)


@pytest.mark.parametrize("run", [fused, layerwise])
@pytest.mark.parametrize(("name", "planned"), [("context", 0), ("observation", 1), ("action", 1)])
def test_draws_of_the_generator(name: str, planned: int, run: Run) -> None:
    case, nodes = segment_case([1, 2], planned, given=False, num_layers=1)
    check(case, nodes, name, planned, run, WIDE)


@pytest.mark.parametrize(("name", "planned"), [("context", 0), ("observation", 1)])
def test_a_model_that_only_layerwise_can_run(name: str, planned: int) -> None:
    sizes = {"embed_dim": 160, "num_heads": 5, "vocab_size": 300, "num_layers": 1}
    case, nodes = segment_case([2], planned, **sizes)
    assert not fits_segment(case.shape)
    check(case, nodes, name, planned, layerwise, WIDE)


@pytest.mark.parametrize(("name", "planned"), [("context", 0), ("action", 1), ("observation", 3)])
def test_both_give_the_same(name: str, planned: int) -> None:
    """The same tokens, and keys within what float32 is from float64."""
    case, nodes = segment_case([0, 2], planned, seed=3)
    step = case.plan.first_step + planned
    before = encode_before(case, nodes, name, step, torch.float32)
    one, other = (
        outcome(case, run, before, name, step, torch.float32) for run in (fused, layerwise)
    )
    assert torch.equal(one.tree.tokens, other.tree.tokens)
    double = encode_before(case, nodes, name, step, torch.float64)
    exact = outcome(case, twin(case.twin(torch.float64)), double, name, step, torch.float64)
    assert_caches(one.tree, exact.tree, other.tree)
    assert_caches(other.tree, exact.tree, one.tree)


# --- bfloat16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [fused, layerwise])
@pytest.mark.parametrize("embed_dim", [16, 72])
def test_keys_in_bfloat16(embed_dim: int, run: Run) -> None:
    """Of given tokens, so that no draw can differ."""
    case, nodes = segment_case([1, 2, 0], 0, precision="bf16 in float32", embed_dim=embed_dim)
    step = case.plan.first_step
    exact, plain = (
        outcome(case, twin(case.twin(d)), encode_before(case, nodes, "context", step, d),
                "context", step, d)
        for d in (torch.float64, torch.bfloat16)
    )  # fmt: skip
    before = encode_before(case, nodes, "context", step, torch.bfloat16)
    got = outcome(case, run, before, "context", step, torch.bfloat16)
    assert_caches(got.tree, exact.tree, plain.tree)


@pytest.mark.parametrize(("name", "planned"), [("action", 1), ("observation", 2)])
def test_both_draw_the_same_in_bfloat16(name: str, planned: int) -> None:
    case, nodes = segment_case([1, 2, 0], planned, precision="bf16 in float32")
    step = case.plan.first_step + planned
    before = encode_before(case, nodes, name, step, torch.bfloat16)
    one, other = (
        outcome(case, run, before, name, step, torch.bfloat16) for run in (fused, layerwise)
    )
    assert not torch.equal(one.tree.tokens, before.tokens)
    assert torch.equal(one.tree.tokens, other.tree.tokens)


# --- sizes ----------------------------------------------------------------------------------------


def test_segments_are_the_tokens_between_selections() -> None:
    shape = make_case().shape
    assert context_segment(shape) == Segment(0, 2, True)
    assert observation_segment(shape) == Segment(-1, 2, False)
    assert action_segment(shape) == Segment(3, 5, False)


@pytest.mark.parametrize(("num_rows", "expected"), [(4, 4), (9, 8), (500, 16)])
def test_rows_of_a_program(num_rows: int, expected: int) -> None:
    """A single multiprocessor takes as many as its registers hold."""
    machine = Machine(num_programs=1 if num_rows != 9 else 2, key_tile=64, row_tile=16)
    assert tile_rows(num_rows, machine) == expected
