"""beam_plan and beam_search: properties of a plan, and every refusal."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast import PlanConfig, beam_plan, beam_search
from tt_fast.planning.philox import philox_uniforms
from tt_fast.planning.reference import ReferenceBackend, last_logits

D = OBSERVATION_DIM + ACTION_DIM + 2


def context(num_transitions: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, NUM_BINS, num_transitions * D + OBSERVATION_DIM)


def plan_config(**changes: Any) -> PlanConfig:
    values = {"horizon": 3, "beam_width": 4, "n_expand": 2, "max_context_transitions": 3}
    return PlanConfig(**(values | changes))


def plan(contexts: Any, backend: str = "auto", **changes: Any) -> Any:
    keys = ("seed", "plan_index", "uniforms", "trace")
    options = {key: changes.pop(key) for key in keys if key in changes}
    model, discretizer = tiny_model(), tiny_discretizer()
    config = plan_config(**changes)
    return beam_plan(model, discretizer, contexts, config, backend=backend, **options)


def test_shapes_and_types(backend: str) -> None:
    result = plan([context(0), context(2)], backend)
    assert result.tokens.shape == (2, 3, D)
    assert result.tokens.dtype == np.int64
    assert result.scores.shape == (2,)
    assert result.rewards.shape == result.values.shape == (2, 3)
    assert result.trace is None


def test_plan_starts_with_the_observation(backend: str) -> None:
    for past in range(4):
        tokens = context(past)
        result = plan(tokens[None], backend)
        np.testing.assert_array_equal(
            result.tokens[0, 0, :OBSERVATION_DIM], tokens[-OBSERVATION_DIM:]
        )


def test_score_is_the_discounted_sum_of_its_rows(backend: str) -> None:
    result = plan(context()[None], backend, discount=0.9)
    factors = 0.9 ** np.arange(3)
    want = (factors * result.rewards[0]).sum() + 0.9**3 * float(result.values[0, -1])
    assert result.scores[0] == pytest.approx(want, rel=1e-12)


def test_discount_none_is_the_originals(backend: str) -> None:
    np.testing.assert_array_equal(
        plan(context()[None], backend).scores, plan(context()[None], backend, discount=0.99).scores
    )


def test_trace_holds_every_decision(backend: str) -> None:
    result = plan(context()[None], backend, trace=True)
    (trace,) = result.trace
    rows = [len(tokens) for tokens in trace.drawn]
    per_step = [8] * (ACTION_DIM + 2) + [4] * OBSERVATION_DIM
    assert rows == (per_step * 3)[:-OBSERVATION_DIM]
    for t in range(3):
        want = np.lexsort((np.arange(8), -trace.candidate_scores[t]))[:4]
        np.testing.assert_array_equal(trace.parents[t], want)
    assert result.scores[0] == trace.candidate_scores[-1].max()
    np.testing.assert_array_equal(trace.beams[0, -3 * D :].reshape(3, D), result.tokens[0])


@settings(max_examples=10)
@given(st.integers(0, 3), st.integers(0, 2**64), st.integers(0, 1000))
def test_seed_context_and_plan_index_address_the_draws(
    past: int, seed: int, plan_index: int
) -> None:
    """Context i of a batch equals it alone with seed + i, and with those uniforms given."""
    contexts = [context(past, seed=i) for i in range(2)]
    batch = plan(contexts, seed=seed, plan_index=plan_index, cdf_act=None)
    alone = plan(contexts[1:], seed=seed + 1, plan_index=plan_index, cdf_act=None)
    num_draws = plan_config().num_draws(OBSERVATION_DIM, ACTION_DIM)
    uniforms = philox_uniforms(seed + 1, plan_index, num_draws, 8)[None]
    fed = plan(contexts[1:], uniforms=uniforms, cdf_act=None)
    np.testing.assert_array_equal(batch.tokens[1], alone.tokens[0])
    np.testing.assert_array_equal(fed.tokens, alone.tokens)
    assert batch.scores[1] == alone.scores[0] == fed.scores[0]


def test_seeds_and_plan_indices_differ(backend: str) -> None:
    loose = {"k_obs": None, "k_rew": None, "cdf_act": None, "horizon": 6}
    plans = [
        plan(context()[None], backend, seed=seed, plan_index=index, **loose).tokens.tobytes()
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(plans)) == 4


def test_ties_keep_the_lower_row() -> None:
    kept = ReferenceBackend(tiny_model(), None).select(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 4)
    assert kept.tolist() == [1, 2, 4, 3]


def test_crop_drops_whole_transitions_and_restarts_positions() -> None:
    model = tiny_model()
    tokens = torch.from_numpy(np.stack([context(3, seed=s) for s in range(2)]))
    for max_len in (2 * D - 1, 3 * D - 1):
        kept = tokens.shape[1] - D * -(-(tokens.shape[1] - max_len) // D)
        want = model(tokens[:, -kept:])[:, -1]
        assert torch.equal(last_logits(model, tokens, max_len), want)
    assert torch.equal(last_logits(model, tokens, 4 * D - 1), model(tokens)[:, -1])


def test_grow_equals_crop_where_nothing_overflows(backend: str) -> None:
    for past in (0, 1):
        crop = plan(context(past)[None], backend, max_context_transitions=None)
        grow = plan(context(past)[None], backend, overflow="grow")
        np.testing.assert_array_equal(crop.tokens, grow.tokens)
        np.testing.assert_array_equal(crop.scores, grow.scores)


def test_bfloat16_is_near_float32(backend: str) -> None:
    full, low = plan(context()[None], backend), plan(context()[None], backend, dtype="bfloat16")
    assert low.scores[0] != full.scores[0]
    # bfloat16 keeps 8 bits: logits of std 3 move by some 1e-2, expectations over bins likewise
    spread = np.ptp(tiny_discretizer().thresholds[:, -2:])
    assert low.scores[0] == pytest.approx(full.scores[0], abs=0.2 * spread)


@pytest.mark.parametrize("mode", [False, True])
def test_plans_neither_change_nor_follow_the_models_mode(backend: str, mode: bool) -> None:
    """Another thread may plan with it, or train it."""
    model = tiny_model().train(mode)
    modes = []

    def toggle(probs: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        modes.append(model.training)
        model.train(not model.training)
        return np.zeros(len(probs)), np.zeros(len(probs))

    def zeros(probs: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        return np.zeros(len(probs)), np.zeros(len(probs))

    def plan_with(value_fn: Any) -> Any:
        contexts, config = context()[None], plan_config()
        return beam_plan(
            model, tiny_discretizer(), contexts, config, backend=backend, value_fn=value_fn
        )

    toggled = plan_with(toggle)
    assert modes == [mode, not mode, mode]
    assert model.training is not mode
    np.testing.assert_array_equal(toggled.tokens, plan_with(zeros).tokens)


def test_training_mode_is_left_alone(backend: str) -> None:
    model = tiny_model().train()
    first = beam_plan(model, tiny_discretizer(), context()[None], plan_config(), backend=backend)
    assert model.training
    model.eval()
    again = beam_plan(model, tiny_discretizer(), context()[None], plan_config(), backend=backend)
    np.testing.assert_array_equal(first.tokens, again.tokens)


@pytest.mark.parametrize("bad", ["contexts", "uniforms", "config", "model"])
def test_nothing_else_is_accepted(bad: str) -> None:
    cases: dict[str, list[tuple[dict[str, Any], str]]] = {
        "contexts": [
            ({"contexts": context()}, r"contexts: expected \(num_contexts, context_len\)"),
            ({"contexts": []}, r"contexts: expected \(num_contexts, context_len\)"),
            ({"contexts": 3}, r"contexts: expected \(num_contexts, context_len\)"),
            ({"contexts": [context()[:-1]]}, r"contexts\[0\]: expected a length of k \* 7 \+ 3"),
            ({"contexts": [context(), context() + 9]}, r"contexts\[1\]: expected ids in \[0, 8\]"),
            ({"contexts": [context() - 9]}, r"contexts\[0\]: expected ids in \[0, 8\], got"),
            ({"contexts": [context() * 1.0]}, r"contexts\[0\]: expected integers, got 'float64'"),
            ({"contexts": [context()[None]]}, r"contexts\[0\]: expected a 1-D array"),
        ],
        "uniforms": [
            ({"uniforms": np.zeros((1, 3, 8))}, r"uniforms: expected shape \(1, 18, 8\), got"),
            ({"uniforms": np.ones((1, 18, 8))}, r"uniforms: expected numbers in \[0, 1\)"),
            ({"uniforms": np.full((1, 18, 8), np.nan)}, r"uniforms: expected numbers in \[0, 1\)"),
            ({"seed": -1}, r"seed: expected an integer >= 0, got -1"),
            ({"plan_index": 0.5}, r"plan_index: expected an integer, got 0.5"),
        ],
        "config": [
            ({"k_act": 10}, r"k_act: expected an integer >= 1 and <= 9, got 10"),
            ({"max_context_transitions": 1}, r"max_context_transitions: expected at least 2"),
            ({"overflow": "grow", "horizon": 4}, r"overflow: expected context \+ horizon <= .*=4"),
            (
                {"backend": "abacus"},
                r"backend: expected one of 'auto', 'reference', .*, 'cpu', 'cuda', got 'abacus'",
            ),
        ],
        "model": [],
    }
    for changes, message in cases[bad]:
        arguments = {"contexts": context()[None]} | changes
        with pytest.raises(ValueError, match=message):
            plan(**arguments)
    if bad == "model":
        with pytest.raises(ValueError, match=r"model: expected one without goal"):
            beam_plan(tiny_model(goal_conditioned=True), tiny_discretizer(), context()[None])
        with pytest.raises(ValueError, match=r"discretizer: expected .* = \(9, 7\), got \(8, 7\)"):
            beam_plan(tiny_model(vocab_size=9), tiny_discretizer(), context()[None], plan_config())


def test_tensors_are_contexts_too(backend: str) -> None:
    tokens = context()[None]
    np.testing.assert_array_equal(
        plan(torch.from_numpy(tokens), backend).tokens, plan(tokens, backend).tokens
    )


# ---- likelihood search ----


def test_search_of_width_one_is_greedy(backend: str) -> None:
    model, tokens = tiny_model(), context(2)
    result = beam_search(model, tokens, 10, beam_width=1, backend=backend)
    x, total = torch.from_numpy(tokens)[None], 0.0
    for _ in range(10):
        log_probs = last_logits(model, x, model.config.block_size).log_softmax(-1)
        total += log_probs.max().item()
        x = torch.cat([x, log_probs.argmax(-1, keepdim=True)], dim=1)
    np.testing.assert_array_equal(result.tokens, x[0].numpy())
    assert result.log_probs[0] == pytest.approx(total, rel=1e-5)


def test_exhaustive_search_finds_the_likeliest(backend: str) -> None:
    model, tokens = tiny_model(), context()
    result = beam_search(model, tokens, 2, beam_width=(NUM_BINS + 1) ** 2, backend=backend)
    pairs = torch.cartesian_prod(torch.arange(NUM_BINS + 1), torch.arange(NUM_BINS + 1))
    x = torch.cat([torch.from_numpy(tokens).expand(len(pairs), -1), pairs], dim=1)
    log_probs = model(x).log_softmax(-1)
    ids = torch.arange(len(x))
    total = log_probs[ids, -3, pairs[:, 0]] + log_probs[ids, -2, pairs[:, 1]]
    np.testing.assert_array_equal(result.tokens[-2:], pairs[total.argmax()].numpy())
    np.testing.assert_allclose(
        result.log_probs, total.sort(descending=True).values.detach().numpy(), rtol=1e-5, atol=1e-5
    )


def test_search_keeps_no_more_than_there_are(backend: str) -> None:
    result = beam_search(tiny_model(), context(), 3, beam_width=50, top_k=1, backend=backend)
    assert result.log_probs.shape == (1,)


def test_search_with_a_goal(backend: str) -> None:
    model = tiny_model(goal_conditioned=True)
    near = beam_search(model, context(), 6, beam_width=3, goal=[0, 0, 0], backend=backend)
    far = beam_search(model, context(), 6, beam_width=3, goal=[7, 7, 7], backend=backend)
    assert not np.array_equal(near.log_probs, far.log_probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"model: expected a tt_fast.TrajectoryTransformer, such as checkpoint"),
        ({"context": []}, r"context: expected"),
        ({"context": [[1]]}, r"context: expected a 1-D array"),
        ({"context": [9]}, r"context: expected ids in \[0, 8\]"),
        ({"num_tokens": 0}, r"num_tokens: expected an integer >= 1"),
        ({"beam_width": 0}, r"beam_width: expected an integer >= 1"),
        ({"goal": [1, 1, 1]}, r"goal: expected tokens for a goal-conditioned model and None"),
        ({"top_k": 0}, r"top_k: expected an integer >= 1"),
        ({"cdf": 1.5}, r"cdf: expected a number in \[0.0, 1.0\]"),
        ({"temperature": 0.0}, r"temperature: expected a number in \[1e-30"),
    ],
)
def test_search_refusals(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": tiny_model(), "context": context(), "num_tokens": 2, "beam_width": 2}
    with pytest.raises(ValueError, match=message):
        beam_search(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, r"model: expected a tt_fast.TrajectoryTransformer, such as checkpoint.mo"),
        ({"discretizer": None}, r"discretizer: expected a tt_fast.Discretizer, such as checkpoint"),
        ({"plan_config": {"horizon": 3}}, r"plan_config: expected a tt_fast.PlanConfig, got 'dict"),
        ({"value_fn": 3}, r"value_fn: expected a function or None, got 'int'"),
    ],
)
def test_plan_refuses_other_types(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": tiny_model(), "discretizer": tiny_discretizer(), "contexts": [context()]}
    with pytest.raises(ValueError, match=message):
        beam_plan(**arguments | changes)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (None, r"goal: expected tokens for a goal-conditioned model"),
        ([1, 1], r"goal: expected shape \(3,\), got \(2,\)"),
        ([1, 1, 8], r"goal: expected ids in \[0, 7\]"),
    ],
)
def test_goal_refusals(goal: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(tiny_model(goal_conditioned=True), context(), 2, beam_width=2, goal=goal)
