"""Small random models, plans and trees for the kernels' tests, and how results are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tt_fast import Discretizer, ModelConfig, PlanConfig, TrajectoryTransformer
from tt_fast.kernels.layout import Machine, ModelShape, PlanShape, Tree, Weights
from tt_fast.kernels.sample import DrawFlags, Draws
from tt_fast.planning.cuda_memory import (
    Buffers,
    make_buffers,
    model_shape,
    pack_weights,
    plan_shape,
)

Generator = np.random.Generator
GIVEN = DrawFlags(given_uniforms=True, keep_probs=True)
CPU = torch.device("cpu")
#: Key tiles of these: 4 tokens, the fewest, and so many that one tile holds a window.
NARROW = Machine(num_programs=100, key_tile=0, row_tile=16)
WIDE = Machine(num_programs=1, key_tile=65536, row_tile=64)
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """A model, and memory for a plan of `num_envs` contexts; keys and values are NaN."""

    model: TrajectoryTransformer
    shape: ModelShape
    plan: PlanShape
    weights: Weights
    buffers: Buffers
    num_envs: int

    @property
    def tree(self) -> Tree:
        """Before the first selection."""
        return self.buffers.trees[0]

    def twin(self, dtype: torch.dtype) -> TrajectoryTransformer:
        """The model in plain PyTorch, in any arithmetic."""
        return copy.deepcopy(self.model).to(dtype)


def make_case(
    seed: int = 0,
    *,
    num_envs: int = 2,
    precision: str = "ieee",
    flags: DrawFlags = GIVEN,
    plan: PlanConfig | None = None,
    **sizes: Any,
) -> Case:
    """Weights are large enough that distributions are not flat."""
    values: dict[str, Any] = {
        "observation_dim": 3, "action_dim": 2, "vocab_size": 8, "num_transitions": 5,
        "num_layers": 1, "num_heads": 2, "embed_dim": 16,
    }  # fmt: skip
    model = TrajectoryTransformer(ModelConfig(**(values | sizes))).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=0.4 * math.sqrt(16 / model.config.embed_dim), generator=generator)
    shape = model_shape(model.config, precision)
    plan_sizes = plan_shape(model, plan or plan_config())
    buffers = make_buffers(shape, plan_sizes, flags, num_envs, CPU)
    for cache in buffers.trees[0][:2]:
        cache.fill_(math.nan)
    weights = pack_weights(model, shape, CPU)
    return Case(model, shape, plan_sizes, weights, buffers, num_envs)


def plan_config(**changes: Any) -> PlanConfig:
    """Windows of two transitions and the current one: a crop comes soon."""
    values = {"horizon": 5, "beam_width": 5, "n_expand": 2, "max_context_transitions": 3}
    return PlanConfig(**(values | {"discount": 0.9} | changes))


# --- trees ----------------------------------------------------------------------------------------


def copy_tree(tree: Tree, dtype: torch.dtype) -> Tree:
    """In memory of its own, keys and values in another arithmetic."""
    caches = (tree.key_cache.to(dtype, copy=True), tree.value_cache.to(dtype, copy=True))
    return Tree(*caches, *(tensor.clone() for tensor in tree[2:]))


def random_ints(rng: Generator, high: int, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.integers(0, high, tuple(shape)).astype(np.int32))


def fill_slots(case: Case, past: Sequence[int], seed: int = 0) -> None:
    """Any slots: observations and actions of several beams at the same places, or not."""
    rng, tree, plan = np.random.default_rng(seed), case.tree, case.plan
    tree.past.copy_(torch.tensor(past))
    slots = tree.slots[:, 0].shape
    tree.slots[:, 0] = random_ints(rng, plan.num_beams, slots)
    tree.slots[:, 1] = random_ints(rng, plan.num_rows, slots)


def grow_tree(case: Case, current: int, past: Sequence[int], seed: int = 0) -> list[int]:
    """Random tokens, and beams that descend from random parents, up to step `current`.

    Returns:
        Transitions of all windows as `prefill` lists them, one for each distinct ancestor; slots
        point at these.
    """
    rng, tree, plan, shape = np.random.default_rng(seed), case.tree, case.plan, case.shape
    tree.past.copy_(torch.tensor(past))
    tree.tokens.copy_(random_ints(rng, shape.num_ids, tree.tokens.shape))
    beam_of = torch.arange(plan.num_rows) % plan.num_beams
    observed = slice(0, shape.observation_dim)  # children share it
    tree.tokens[..., observed] = tree.tokens[:, :, beam_of][..., observed]
    tree.tokens[:, : plan.first_step] = tree.tokens[:, : plan.first_step, :1]
    given = tree.tokens[:, plan.first_step]
    given[..., observed] = given[:, :1, observed]
    for env in range(case.num_envs):
        for step in range(plan.first_step, current):
            parents = torch.from_numpy(rng.choice(plan.num_rows, plan.num_beams, replace=False))
            before = tree.origins[env, :step]
            tree.origins[env, :step] = before[:, parents % plan.num_beams]
            tree.origins[env, step] = parents.int()
    return [node for env in range(case.num_envs) for node in _share_ancestors(case, env, current)]


def _share_ancestors(case: Case, env: int, current: int) -> list[int]:
    """Slots of one environment: the first beam with the same ancestor; and the nodes."""
    tree, plan = case.tree, case.plan
    past = min(int(tree.past[env]) + current - plan.first_step, plan.max_past)
    nodes = []
    for step in range(current - past, current):
        origins = tree.origins[env, step].tolist()
        owners = [origins.index(origin) for origin in origins]
        tree.slots[env, :, step % plan.num_levels] = torch.tensor(owners, dtype=torch.int32)
        nodes += [(env * plan.num_steps + step) * plan.num_beams + o for o in sorted(set(owners))]
    if current > plan.first_step:
        tree.slots[env, 0, current % plan.num_levels] = torch.arange(plan.num_beams).int()
    return nodes


def node_list(nodes: Sequence[int], max_nodes: int | None = None) -> tuple[Tensor, Tensor]:
    """`nodes` and `count` as kernels take them; places past the end are not transitions."""
    listed = torch.full((max_nodes or len(nodes) + 2,), 2**30, dtype=torch.int32)
    listed[: len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
    return listed, torch.tensor([len(nodes)], dtype=torch.int32)


# --- draws ----------------------------------------------------------------------------------------


def fill_draws(case: Case, config: PlanConfig, seed: int = 0) -> Draws:
    """Settings of a plan, random numbers and thresholds."""
    rng, draws, shape = np.random.default_rng(seed), case.buffers.draws, case.shape
    cdfs = [-1.0 if c is None else c for c in (config.cdf_obs, config.cdf_act, config.cdf_rew)]
    top_ks = [k or 0 for k in (config.k_obs, config.k_act, config.k_rew)]
    percentile = -1.0 if isinstance(config.estimate, str) else config.estimate
    draws.settings.copy_(torch.tensor([*cdfs, *top_ks, config.temperature, percentile]))
    num_bins = shape.num_ids - 1
    discretizer = Discretizer.fit(rng.normal(size=(20 * num_bins, 2)), num_bins)
    draws.thresholds.copy_(torch.from_numpy(discretizer.thresholds.T.copy()))
    draws.uniforms.copy_(torch.from_numpy(rng.random(draws.uniforms.shape)))
    draws.seeds.copy_(torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, case.num_envs)))
    draws.plan_indices.copy_(torch.from_numpy(rng.integers(-(2**31), 2**31 - 1, case.num_envs)))
    return draws


# --- comparisons ----------------------------------------------------------------------------------


def assert_exact_enough(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice as far from float64 as plain PyTorch is in the same arithmetic.

    Args:
        got: the kernel's.
        exact: in float64.
        plain: PyTorch's.
    """
    exact, allowance = exact.double(), 4 * EPS * exact.double().abs().max()
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * allowed + allowance, f"{error} > 2 * {allowed} + {allowance}"


def assert_caches(got: Tree, exact: Tree, plain: Tree) -> None:
    """The same nodes are written, with the same keys and values; NaN marks the others."""
    for ours, theirs, torchs in zip(got[:2], exact[:2], plain[:2], strict=True):
        written = ~theirs.isnan()
        assert written.any()
        assert torch.equal(~ours.isnan(), written)
        assert_exact_enough(ours[written], theirs[written], torchs[written])
