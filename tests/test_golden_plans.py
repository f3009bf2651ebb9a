"""Plans and likelihood searches against the original's (tests/golden/README.md).

Tokens must be equal. Estimates may differ by what float32 logits allow: a logit error of d changes
every probability by at most a factor exp(2 d), and so a mean by expm1(2 d) of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from golden_files import golden_model, load_golden
from numpy.typing import NDArray

from tt_fast.config import PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import BeamPlan, PlanTrace, beam_plan, beam_search
from tt_fast.planning.base import Draws
from tt_fast.planning.reference import ReferenceBackend

Golden = dict[str, NDArray[Any]]
EPS = float(np.finfo(np.float32).eps)

# file -> the model that made it
STOCHASTIC = {
    "plan_stoch_hopper_cdf06_kobs1": "hopper_soft",
    "plan_stoch_hopper_p09_beam2_notie": "hopper_soft",
    "plan_stoch_odd_crop_krewNone": "odd_soft",
}
TIED = "plan_stoch_hopper_kact20_kobsNone_p09"


def logit_error(model_name: str) -> float:
    """What two float32 runs of a model of this shape may differ by, as in test_golden_model."""
    logits = load_golden(f"logits_{model_name.split('_')[0]}")
    return 3 * max(float(logits[f"fp64_maxabs_{j}"]) for j in range(8)) + 2e-6


def mean_error(golden: Golden, model_name: str, dim: int) -> float:
    """Bound on the difference of two float32 runs' expected values of a dimension."""
    largest = np.abs(golden["thresholds"][:, dim]).max()
    return float(largest * (np.expm1(2 * logit_error(model_name)) + EPS))


def score_error(golden: Golden, model_name: str) -> float:
    """The same for a score: horizon rewards and a value, summed in float32 by the original."""
    reward, value = (mean_error(golden, model_name, dim) for dim in (-2, -1))
    num_terms = int(golden["n_steps"]) + 1
    edges = np.abs(golden["thresholds"])
    rounding = num_terms * EPS * float(num_terms * edges[:, -2].max() + edges[:, -1].max())
    return (num_terms - 1) * reward + value + rounding


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["hopper", "odd"])
@pytest.mark.parametrize("num_past", range(7))
def test_greedy_plans(shape: str, num_past: int, backend: str) -> None:
    golden = load_golden(f"plan_greedy_{shape}")
    plan = beam_plan(
        golden_model(shape),
        Discretizer(golden["thresholds"]),
        golden[f"prefix_{num_past}"],
        greedy_config(golden),
        backend=backend,
        trace=True,
    )
    np.testing.assert_array_equal(plan.tokens[0], golden[f"sequence_{num_past}"])
    rewards, values = golden[f"r_{num_past}"], golden[f"V_{num_past}"]
    np.testing.assert_allclose(plan.rewards[0], rewards, atol=mean_error(golden, shape, -2))
    np.testing.assert_allclose(plan.values[0], values, atol=mean_error(golden, shape, -1))
    best = golden[f"values_{num_past}"]  # after each planned step
    atol = score_error(golden, shape)
    np.testing.assert_allclose(only(plan).candidate_scores.max(axis=1), best, atol=atol)
    np.testing.assert_allclose(plan.scores[0], best[-1], atol=atol)


@pytest.mark.usefixtures("quick_interpreter")
def test_a_greedy_plan_of_the_kernels() -> None:
    test_greedy_plans("odd", 6, "cuda")


def greedy_config(golden: Golden) -> PlanConfig:
    return PlanConfig(**shared_settings(golden), k_act=1, k_obs=1, k_rew=1, cdf_act=None)


def shared_settings(golden: Golden) -> dict[str, Any]:
    return {
        "horizon": int(golden["n_steps"]),
        "beam_width": int(golden["beam_width"]),
        "n_expand": int(golden["n_expand"]),
        "discount": float(golden["discount"]),
        "max_context_transitions": int(golden["max_context_transitions"]),
    }


def only(plan: BeamPlan) -> PlanTrace:
    """The trace of a plan of one context."""
    assert plan.trace is not None
    assert len(plan.trace) == 1
    return plan.trace[0]


# --- stochastic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_plans_driven_by_uniforms(name: str, backend: str) -> None:
    golden = load_golden(name)
    plan = beam_plan(
        golden_model(STOCHASTIC[name]),
        Discretizer(golden["thresholds"]),
        golden["prefix"],
        stochastic_config(golden),
        backend=backend,
        uniforms=packed_uniforms(golden),
        trace=True,
    )
    np.testing.assert_array_equal(only(plan).parents, golden["inds"])
    assert_equals_recording(plan, golden, STOCHASTIC[name])


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize(
    "name", ["plan_stoch_odd_crop_krewNone", "plan_stoch_hopper_p09_beam2_notie"]
)
def test_plans_of_the_kernels_driven_by_uniforms(name: str) -> None:
    test_plans_driven_by_uniforms(name, "cuda")


def test_plan_with_tied_scores() -> None:
    # Percentiles are bin midpoints, so candidates tie, and the original keeps them in the order of
    # torch.topk, which is none in particular. With its choice given, everything else must follow.
    golden = load_golden(TIED)
    model, discretizer = golden_model("hopper_soft"), Discretizer(golden["thresholds"])
    forced = RecordedParents(model, discretizer, golden["inds"])
    draws = Draws(seeds=(0,), plan_indices=(0,), given=packed_uniforms(golden))
    plan = forced.plan([golden["prefix"][0]], stochastic_config(golden), draws, trace=True)
    assert_equals_recording(plan, golden, "hopper_soft")

    # ... and the choice was a legal one: the best scores, in descending order
    scores = only(plan).candidate_scores
    for t, parents in enumerate(golden["inds"]):
        kept = scores[t, ReferenceBackend(model, discretizer).select(scores[t], len(parents))]
        np.testing.assert_array_equal(
            scores[t, parents].astype(np.float32), kept.astype(np.float32)
        )


class RecordedParents(ReferenceBackend):
    """Keeps the rows that a recording kept, instead of choosing them by score."""

    def __init__(
        self, model: TrajectoryTransformer, discretizer: Discretizer, parents: NDArray[np.int64]
    ) -> None:
        super().__init__(model, discretizer)
        self.parents: Iterator[NDArray[np.int64]] = iter(parents)

    def select(self, scores: NDArray[np.float64], beam_width: int) -> NDArray[np.int64]:
        return next(self.parents)


def stochastic_config(golden: Golden) -> PlanConfig:
    """The recorded sampling arguments; -1 stands for None, or for the mean."""
    values = {key[3:]: float(value) for key, value in golden.items() if key.startswith("kw_")}
    kept = {key: None if value < 0 else value for key, value in values.items()}
    ks = {k: None if v is None else int(v) for k, v in kept.items() if k.startswith("k_")}
    percentile = float(golden["percentile"])
    estimate = "mean" if percentile < 0 else percentile
    return PlanConfig(**shared_settings(golden), **(kept | ks), estimate=estimate)


def packed_uniforms(golden: Golden) -> NDArray[np.float64]:
    """The flat recording as (1, num_draws, beam_width * n_expand), a call a row.

    A call for an observation token draws for beam_width rows only: its row's end stays unused.
    """
    num_rows = int(golden["beam_width"] * golden["n_expand"])
    packed = np.zeros((1, len(golden["rows_per_call"]), num_rows))
    starts = np.cumsum(golden["rows_per_call"]) - golden["rows_per_call"]
    for call, (start, count) in enumerate(zip(starts, golden["rows_per_call"], strict=True)):
        packed[0, call, :count] = golden["uniforms"][start : start + count]
    return packed


def assert_equals_recording(plan: BeamPlan, golden: Golden, model_name: str) -> None:
    """All tokens are equal; estimates and scores within the bounds above."""
    trace = only(plan)
    np.testing.assert_array_equal(plan.tokens[0], golden["sequence"])
    np.testing.assert_array_equal(trace.beams, golden["final_x"])
    assert [len(tokens) for tokens in trace.drawn] == golden["rows_per_call"].tolist()
    np.testing.assert_array_equal(np.concatenate(trace.drawn), golden["drawn"])

    is_mean = golden["percentile"] < 0
    for numbers, key, dim in ((trace.rewards, "r", -2), (trace.values, "V", -1)):
        # a percentile is a midpoint of thresholds: nothing but its rounding to float32
        atol = mean_error(golden, model_name, dim) if is_mean else 0.0
        np.testing.assert_allclose(numbers, golden[key], rtol=EPS, atol=atol)
    atol = score_error(golden, model_name)
    np.testing.assert_allclose(trace.candidate_scores, golden["candidate_values"], atol=atol)
    kept = np.take_along_axis(trace.candidate_scores, trace.parents, axis=1)
    np.testing.assert_allclose(kept, golden["values"], atol=atol)
    np.testing.assert_allclose(plan.scores[0], golden["values"][-1, 0], atol=atol)


# --- likelihood search ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_name"), [("beam_search", "odd_bs"), ("beam_search_goal", "odd_goal")]
)
@pytest.mark.parametrize("j", range(3))
def test_beam_search(name: str, model_name: str, j: int, backend: str) -> None:
    golden = load_golden(name)
    context, sequence = golden[f"bs_x_{j}"][0], golden[f"bs_seq_{j}"]
    found = beam_search(
        golden_model(model_name),
        context,
        len(sequence) - len(context),
        beam_width=8,
        goal=golden["goal"][0] if model_name == "odd_goal" else None,
        backend=backend,
    )
    np.testing.assert_array_equal(found.tokens, sequence)
    # each of the tokens adds a log-probability, which moves by twice what logits may move by
    num_tokens = len(sequence) - len(context)
    expected = golden[f"bs_logp_{j}"]
    rounding = num_tokens * EPS * np.abs(expected).max()
    atol = num_tokens * 2 * logit_error("odd") + rounding
    np.testing.assert_allclose(found.log_probs, expected, atol=atol)
