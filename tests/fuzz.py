"""Random models, contexts and settings: does a backend plan what the reference plans?

`python tests/fuzz.py --cases 2000` runs many and counts; tests/test_cpu.py runs a few hundred.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from near_ties import Case, first_split, score_error

from tt_fast import Discretizer, ModelConfig, PlanConfig, TrajectoryTransformer
from tt_fast.planning.base import BeamPlan, Draws, PlanBackend
from tt_fast.planning.cpu import CpuBackend, available_isas
from tt_fast.planning.reference import ReferenceBackend

Generator = np.random.Generator
MakeBackend = Callable[[TrajectoryTransformer, Discretizer, Generator], PlanBackend]


def compare_plans(seed: int, make_backend: MakeBackend | None = None, **changes: Any) -> str:
    """One random case on the cpu backend, or another one: "equal" or "near-tie".

    Args:
        seed: of the case.
        make_backend: from a model, a discretizer and a generator; None: `random_cpu_backend`.
        changes: sizes of the model.

    Raises:
        AssertionError: a difference that rounding does not explain.
    """
    rng = np.random.default_rng(seed)
    model = random_model(rng, **changes)
    discretizer = random_discretizer(rng, model.config)
    config = random_plan_config(rng, model.config)
    contexts = random_contexts(rng, model.config, config)
    draws = random_draws(rng, model.config, config, len(contexts))
    backend = (make_backend or random_cpu_backend)(model, discretizer, rng)
    want = ReferenceBackend(model, discretizer).plan(contexts, config, draws, trace=True)
    got = backend.plan(contexts, config, draws, trace=True)
    outcomes = [
        _compare_context(model, discretizer, config, draws, i, context, want, got)
        for i, context in enumerate(contexts)
    ]
    return "near-tie" if "near-tie" in outcomes else "equal"


def _compare_context(
    model: TrajectoryTransformer,
    discretizer: Discretizer,
    config: PlanConfig,
    draws: Draws,
    i: int,
    context: Any,
    want: BeamPlan,
    got: BeamPlan,
) -> str:
    assert want.trace is not None
    assert got.trace is not None
    dims = model.config
    num_draws = config.num_draws(dims.observation_dim, dims.action_dim)
    uniforms = draws.uniforms(i, num_draws, config.num_rows)
    case = Case(model, discretizer, context, config, uniforms)
    split = first_split(case, want.trace[i], got.trace[i])
    if split is not None:
        assert split.by_rounding, f"context {i}: {split}"
        return "near-tie"
    np.testing.assert_array_equal(got.tokens[i], want.tokens[i])
    np.testing.assert_array_equal(got.trace[i].beams, want.trace[i].beams)
    if config.estimate == "mean":  # a percentile jumps by a bin where a probability passes it
        atol = score_error(case, want.trace[i])
        np.testing.assert_allclose(got.scores[i], want.scores[i], atol=atol)
        np.testing.assert_allclose(got.rewards[i], want.rewards[i], atol=atol)
        np.testing.assert_allclose(got.values[i], want.values[i], atol=atol)
    return "equal"


def random_cpu_backend(
    model: TrajectoryTransformer, discretizer: Discretizer, rng: Generator
) -> PlanBackend:
    """Any number of threads, any instruction set."""
    num_threads, isa = int(rng.choice([1, 2, 7])), str(rng.choice(available_isas()))
    return CpuBackend(model, discretizer, num_threads=num_threads, isa=isa)


# --- what is random -------------------------------------------------------------------------------


def random_model(rng: Generator, **changes: Any) -> TrajectoryTransformer:
    """Any small shape; weights large enough that distributions are not flat."""
    num_heads = int(rng.integers(1, 5))
    values: dict[str, Any] = {
        "observation_dim": int(rng.integers(1, 6)),
        "action_dim": int(rng.integers(1, 4)),
        "vocab_size": int(rng.integers(2, 40)),
        "num_transitions": int(rng.integers(2, 6)),
        "num_layers": int(rng.integers(1, 4)),
        "num_heads": num_heads,
        "embed_dim": num_heads * int(rng.integers(3, 36)),
    }
    model = TrajectoryTransformer(ModelConfig(**(values | changes)))
    std = 0.4 * (16 / model.config.embed_dim) ** 0.5
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def random_discretizer(rng: Generator, dims: ModelConfig) -> Discretizer:
    rows = rng.normal(size=(40 * dims.vocab_size, dims.transition_dim))
    rows[:, -2] = np.round(rows[:, -2])  # sparse rewards: duplicate thresholds
    return Discretizer.fit(rows, dims.vocab_size)


def random_plan_config(rng: Generator, dims: ModelConfig) -> PlanConfig:
    def top_k() -> int | None:
        return [None, 1, int(rng.integers(1, dims.vocab_size + 2))][rng.integers(3)]

    def cdf() -> float | None:
        return [None, None, float(rng.choice([0.0, 0.3, 0.6, 0.95]))][rng.integers(3)]

    horizon = int(rng.integers(1, 6))
    grow = horizon <= dims.num_transitions and rng.random() < 0.3
    return PlanConfig(
        horizon=horizon,
        beam_width=int(rng.integers(1, 8)),
        n_expand=int(rng.integers(1, 4)),
        discount=float(rng.choice([0.0, 0.9, 0.99, 1.0])),
        max_context_transitions=[None, 2, 3, 9][rng.integers(4)],
        k_obs=top_k(),
        k_act=top_k(),
        k_rew=top_k(),
        cdf_obs=cdf(),
        cdf_act=cdf(),
        cdf_rew=cdf(),
        estimate="mean" if rng.random() < 0.7 else float(rng.uniform(0.1, 0.9)),
        temperature=float(rng.choice([0.5, 1.0, 2.0])),
        overflow="grow" if grow else "crop",
    )


def random_contexts(rng: Generator, dims: ModelConfig, config: PlanConfig) -> list[Any]:
    """One to three contexts of different lengths, stop tokens among them."""
    longest = dims.num_transitions - config.horizon if config.overflow == "grow" else 7
    contexts = []
    for _ in range(rng.integers(1, 4)):
        num_past = int(rng.integers(0, longest + 1))
        length = num_past * dims.transition_dim + dims.observation_dim
        contexts.append(rng.integers(0, dims.vocab_size + 1, length))
    return contexts


def random_draws(rng: Generator, dims: ModelConfig, config: PlanConfig, count: int) -> Draws:
    """Given uniforms or the generator's."""
    seeds = tuple(int(rng.integers(0, 2**63)) for _ in range(count))
    indices = tuple(int(rng.integers(0, 2**32)) for _ in range(count))
    num_draws = config.num_draws(dims.observation_dim, dims.action_dim)
    given = rng.random((count, num_draws, config.num_rows)) if rng.random() < 0.5 else None
    return Draws(seeds, indices, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=1_000_000)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(options.first_seed, options.first_seed + options.cases):
        try:
            counts[compare_plans(seed)] += 1
        except AssertionError as error:
            counts["DIFFERENT"] += 1
            print(f"seed {seed}: {error}")
    print(dict(counts))


if __name__ == "__main__":
    main()
