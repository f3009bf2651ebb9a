"""The C++ backend: the reference's plans on every instruction set and any number of threads."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_cases import CONFIG, DRAWS, D, assert_same_plan, context, mean_values, tiny_backend
from fuzz import compare_plans, random_discretizer, random_model
from golden_files import golden_model, load_golden
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast import PlanConfig, TrajectoryTransformer, beam_plan
from tt_fast.planning import BeamPlan, cpu, make_backend
from tt_fast.planning.base import Draws
from tt_fast.planning.cpu import CpuBackend, available_isas

# --- the reference's plans ------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1))
def test_plans_equal_the_reference(seed: int) -> None:
    outcome = compare_plans(seed)  # raises where rounding does not explain a difference
    event(outcome)
    assert outcome in ("equal", "near-tie")


def test_few_plans_are_near_ties() -> None:
    outcomes = [compare_plans(seed) for seed in range(100)]
    assert outcomes.count("equal") >= 90


def test_a_difference_that_is_no_near_tie_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with another discount, or another seed, it does."""
    plan = CpuBackend.plan

    def other_seed(self: Any, contexts: Any, config: Any, draws: Draws, **options: Any) -> BeamPlan:
        shifted = Draws(tuple((s + 1) % 2**63 for s in draws.seeds), draws.plan_indices, None)
        return plan(self, contexts, config, shifted, **options)

    monkeypatch.setattr(CpuBackend, "plan", other_seed)
    with pytest.raises(AssertionError, match="Split"):
        for seed in range(20):
            compare_plans(seed)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", ["hopper", "odd"])
def test_golden_logits(isa: str, name: str) -> None:
    golden = load_golden(f"logits_{name}")
    backend = CpuBackend(golden_model(name), None, num_threads=1, isa=isa)
    for j in range(8):
        tolerance = 3 * golden[f"fp64_maxabs_{j}"] + 2e-6  # as in test_golden_model
        for row, logits in zip(golden[f"tokens_{j}"], golden[f"logits_{j}"], strict=True):
            positions = np.unique(np.linspace(1, len(row), 12).astype(int))
            for length in positions if isa != "scalar" else positions[-1:]:
                got = backend.logits(row[:length])
                assert np.abs(got - logits[length - 1]).max() <= tolerance


def test_golden_logits_with_a_goal() -> None:
    golden = load_golden("beam_search_goal")
    model = golden_model("odd_goal")
    backend = CpuBackend(model, None)
    for j in range(8):
        tokens, goals = golden[f"tokens_{j}"], golden[f"goals_{j}"]
        with torch.no_grad():
            torch_logits = model(torch.from_numpy(tokens), torch.from_numpy(goals)).numpy()
        tolerance = 3 * np.abs(torch_logits - golden[f"logits_{j}"]).max() + 2e-5
        for row in range(len(tokens)):
            got = backend.logits(tokens[row], goals[row])
            assert np.abs(got - golden[f"logits_{j}"][row, -1]).max() <= tolerance


@pytest.mark.parametrize("isa", available_isas())
def test_bfloat16_is_no_worse_than_torch(isa: str) -> None:
    """Error against float64 at most twice that of PyTorch's bfloat16 run (style rule 2)."""
    golden = load_golden("logits_hopper")
    model = golden_model("hopper")
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    low = type(model)(model.config).eval()
    low.load_state_dict(model.state_dict())
    low = low.bfloat16()
    backend = CpuBackend(model, None, isa=isa)
    ours, theirs = [], []
    for j in range(8):
        for row in golden[f"tokens_{j}"]:
            tokens = torch.from_numpy(row)[None]
            with torch.no_grad():
                exact = double(tokens)[0, -1].numpy()
                rounded = low(tokens)[0, -1].float().numpy()
            got = backend.logits(row, dtype="bfloat16")
            ours.append(np.abs(got - exact).max())
            theirs.append(np.abs(rounded - exact).max())
    assert max(ours) <= 2 * max(theirs)
    assert max(ours) > 1e-4  # it is bfloat16 indeed


# --- threads, contexts, sharing -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_same_plan(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    model = random_model(rng, vocab_size=30, num_transitions=4, embed_dim=64, num_heads=2)
    discretizer = random_discretizer(rng, model.config)
    dims = model.config
    length = 3 * dims.transition_dim + dims.observation_dim
    contexts = [rng.integers(0, 30, length), rng.integers(0, 30, dims.observation_dim)]
    config = PlanConfig(6, 40, 2, max_context_transitions=3, discount=0.9, dtype=dtype)
    plans = [
        CpuBackend(model, discretizer, num_threads=n).plan(contexts, config, Draws((1, 2), (0, 3)))
        for n in (1, 2, 7)
    ]
    assert_same_plan(plans[1], plans[0])
    assert_same_plan(plans[2], plans[0])


def test_contexts_together_equal_one_by_one() -> None:
    backend = tiny_backend()
    contexts = [context(n, seed=n) for n in range(12)]  # at different clocks
    seeds, plan_indices = tuple(range(12)), tuple(range(5, 17))
    together = backend.plan(contexts, CONFIG, Draws(seeds, plan_indices))
    for i, one in enumerate(contexts):
        alone = backend.plan([one], CONFIG, Draws((seeds[i],), (plan_indices[i],)))
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        assert together.scores[i] == alone.scores[0]


def test_many_contexts_are_planned_wave_by_wave() -> None:
    """More than fit one wave's memory: the same plans as of each alone."""
    model = tiny_model(num_layers=1, embed_dim=16, num_transitions=4)
    backend = CpuBackend(model, tiny_discretizer())
    config = replace(CONFIG, beam_width=300, n_expand=2, horizon=3)
    contexts = [context(2, seed=i) for i in range(80)]
    plans = backend.plan(contexts, config, Draws(tuple(range(80)), (0,) * 80))
    for i in (0, 41, 79):
        alone = backend.plan([contexts[i]], config, Draws((i,), (0,)))
        np.testing.assert_array_equal(plans.tokens[i], alone.tokens[0])


def test_equal_prefixes_are_computed_once() -> None:
    """A greedy plan of many beams costs what one beam costs."""
    computed = []
    for beam_width in (1, 8):
        backend = tiny_backend()
        config = replace(CONFIG, beam_width=beam_width, k_act=1, cdf_act=None)
        backend.plan([context()], config, DRAWS)
        computed.append(backend.stats().rows_computed)
    assert computed[0] == computed[1] > 0


def test_every_distinct_prefix_counts_once() -> None:
    """Nodes computed are the distinct visible prefixes of the windows, counted here with sets."""
    backend = tiny_backend()
    past = context(1)
    plan = backend.plan([past], CONFIG, DRAWS, trace=True)
    assert plan.trace is not None
    stats = backend.stats()
    decoded, reencoded = count_prefixes(past, plan.trace[0])
    assert (stats.decoded_nodes, stats.reencoded_nodes) == (decoded, reencoded)
    assert stats.rows_computed < stats.rows_asked


def count_prefixes(past: NDArray[np.int64], trace: Any) -> tuple[int, int]:
    """Distinct prefixes decoded, and encoded for the first window or after a crop."""
    assert CONFIG.max_context_transitions is not None
    max_len = CONFIG.max_context_transitions * D - 1
    decoded, encoded, start = 0, 0, -1
    x, drawn = np.tile(past, (CONFIG.beam_width, 1)), iter(trace.drawn)

    def forward() -> None:
        nonlocal decoded, encoded, start
        new_start = -(-max(0, x.shape[1] - max_len) // D) * D
        windows = x[:, new_start:]
        # values are hidden: they count only as the newest token
        visible = [i for i in range(windows.shape[1]) if (i + 1) % D != 0]
        last = windows.shape[1] - 1
        newest = {(*row[[i for i in visible if i < last]], row[last]) for row in windows}
        if new_start == start:
            decoded += len(newest)
            return
        start = new_start
        inner = {(i, *row[visible][: k + 1]) for row in windows
                 for k, i in enumerate(visible) if i < last}  # fmt: skip
        encoded += len(inner) + len(newest)

    fresh = False
    for t in range(CONFIG.horizon):
        for count in (ACTION_DIM + 2, OBSERVATION_DIM if t + 1 < CONFIG.horizon else 0):
            for _ in range(count):
                if not fresh:
                    forward()
                tokens = next(drawn)
                if len(tokens) > len(x):
                    x = np.tile(x, (CONFIG.n_expand, 1))
                x, fresh = np.concatenate([x, tokens[:, None]], axis=1), False
            if count == ACTION_DIM + 2:
                x = x[trace.parents[t]]
    return decoded, encoded


# --- the model's weights --------------------------------------------------------------------------


def test_changed_weights_are_used() -> None:
    backend = tiny_backend()
    before = backend.plan([context()], CONFIG, DRAWS)
    with torch.no_grad():
        backend.model.head.weight.mul_(0.5)
    after = backend.plan([context()], CONFIG, DRAWS)
    assert before.scores[0] != after.scores[0]
    fresh = CpuBackend(backend.model, tiny_discretizer()).plan([context()], CONFIG, DRAWS)
    assert_same_plan(after, fresh)


@pytest.mark.parametrize("how", ["fused", "data", "order"])
def test_weights_changed_behind_autograds_back_are_used(how: str) -> None:
    """Neither raises a tensor's version."""
    backend = tiny_backend()
    before = backend.plan([context()], CONFIG, DRAWS)
    head = backend.model.head.weight
    version = head._version
    if how == "fused":
        head.grad = torch.ones_like(head)
        torch.optim.AdamW([head], lr=0.1, fused=True).step()
    elif how == "data":
        head.data.mul_(0.5)
    else:
        head.data.copy_(head.data.flip(1))
    assert head._version == version
    after = backend.plan([context()], CONFIG, DRAWS)
    assert before.scores[0] != after.scores[0]
    fresh = CpuBackend(backend.model, tiny_discretizer()).plan([context()], CONFIG, DRAWS)
    assert_same_plan(after, fresh)


def test_models_of_inference_mode_plan() -> None:
    want = tiny_backend().plan([context()], CONFIG, DRAWS)
    with torch.inference_mode():
        backend = tiny_backend()
    assert_same_plan(backend.plan([context()], CONFIG, DRAWS), want)


def test_copies_plan_the_same() -> None:
    backend = tiny_backend()
    want = backend.plan([context()], CONFIG, DRAWS)
    for copied in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert_same_plan(copied.plan([context()], CONFIG, DRAWS), want)
    assert backend.stats().rows_computed > 0


_LITTLE_MEMORY = """
import resource
import numpy as np
from dataclasses import replace
from cpu_cases import CONFIG, DRAWS, context, tiny_backend

backend, small = tiny_backend(num_threads=1), replace(CONFIG, beam_width=2)
want = backend.plan([context()], small, DRAWS)
in_use = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, resource.RLIM_INFINITY))
for problem, backend_of, config in (
    (MemoryError, lambda: backend, replace(CONFIG, beam_width=30_000, horizon=20)),
    (RuntimeError, lambda: tiny_backend(num_threads=500), small),
):
    try:
        backend_of().plan([context()], config, DRAWS)
    except problem as error:
        print(type(error).__name__, error)
    again = backend.plan([context()], small, DRAWS)
    np.testing.assert_array_equal(again.tokens, want.tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and its limits are Linux's")
def test_too_little_memory_is_an_error_and_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LITTLE_MEMORY], capture_output=True, text=True,
        cwd=Path(__file__).parent, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    memory, threads = done.stdout.splitlines()
    assert memory.startswith("MemoryError")
    assert threads.startswith("RuntimeError num_threads: expected as many as can be started, ")


def test_weights_that_are_no_numbers_are_refused() -> None:
    backend = tiny_backend()
    with torch.no_grad():
        backend.model.blocks[1].mlp[0].bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"weights\[blocks\.1\.mlp\.0\.bias\]: expected finite"):
        backend.plan([context()], CONFIG, DRAWS)


def head_times(factor: float) -> TrajectoryTransformer:
    """A model of more ids than the sampler sorts at once, its head's weights multiplied."""
    model = tiny_model(vocab_size=20)
    with torch.no_grad():
        model.head.weight.mul_(factor / model.head.weight.abs().max())
    return model


@pytest.mark.parametrize("cdf", [None, 0.6])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_logits_that_overflow_are_refused(backend: str, cdf: float | None) -> None:
    """The weights are finite; plans and searches end, and the next ones are as ever."""
    discretizer, config = tiny_discretizer(num_bins=20), replace(CONFIG, cdf_act=cdf)
    wild = make_backend(backend, head_times(3.2e38), discretizer)
    with pytest.raises(ValueError, match="model: expected finite logits"):
        wild.plan([context()], config, DRAWS)
    options: Any = {"beam_width": 2, "goal": None, "top_k": None, "cdf": cdf, "temperature": 1.0}
    with pytest.raises(ValueError, match="model: expected finite logits"):
        wild.search(context(), 3, **options)
    with torch.no_grad():
        wild.model.head.weight.mul_(1e-37)
    tamed = make_backend(backend, copy.deepcopy(wild.model), discretizer)
    want = tamed.plan([context()], config, DRAWS)
    assert_same_plan(wild.plan([context()], config, DRAWS), want)


# --- a value function of the caller's -------------------------------------------------------------


def test_value_fn_is_called_once_a_step(backend: str) -> None:
    shapes = []

    def value_fn(probs: NDArray[np.float32]) -> tuple[Any, Any]:
        shapes.append(probs.shape)
        np.testing.assert_allclose(probs.sum(axis=-1), 1.0, rtol=1e-5)
        return mean_values(probs)

    arguments = (tiny_model(), tiny_discretizer(), context()[None], CONFIG)
    want = beam_plan(*arguments, backend=backend)
    got = beam_plan(*arguments, backend=backend, value_fn=value_fn)
    assert shapes == [(CONFIG.num_rows, 2, NUM_BINS + 1)] * CONFIG.horizon
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-6)


def test_value_fn_of_several_contexts() -> None:
    """Each context's rows are its own."""
    contexts = [context(n) for n in (0, 2, 5)]
    backend, draws = tiny_backend(), Draws((1, 2, 3), (0, 0, 0))
    want = backend.plan(contexts, CONFIG, draws)
    got = backend.plan(contexts, CONFIG, draws, value_fn=mean_values)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def zeros(probs: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.zeros(len(probs))


@pytest.mark.parametrize(
    ("value_fn", "error", "message"),
    [
        (lambda p: zeros(p), ValueError, "value_fn: expected a pair of arrays"),
        (lambda p: None, ValueError, "value_fn: expected a pair of arrays"),
        (lambda p: (zeros(p)[1:], zeros(p)), ValueError, r"value_fn: .* got shape \(17,\)"),
        (lambda p: (zeros(p) * np.nan, zeros(p)), ValueError, "value_fn: expected finite"),
        (lambda p: ("one", "two"), ValueError, "could not convert"),
        (lambda p: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_a_bad_value_fn_is_an_error(value_fn: Any, error: type[Exception], message: str) -> None:
    backend = tiny_backend()
    with pytest.raises(error, match=message):
        backend.plan([context()], CONFIG, DRAWS, value_fn=value_fn)
    # and the backend goes on to work
    assert_same_plan(
        backend.plan([context()], CONFIG, DRAWS), tiny_backend().plan([context()], CONFIG, DRAWS)
    )


def test_value_fn_cannot_plan_with_its_own_backend() -> None:
    backend = tiny_backend()

    def value_fn(probs: NDArray[np.float32]) -> tuple[Any, Any]:
        backend.plan([context()], CONFIG, DRAWS)
        return zeros(probs), zeros(probs)

    with pytest.raises(RuntimeError, match="called from its own value_fn"):
        backend.plan([context()], CONFIG, DRAWS, value_fn=value_fn)


# --- what is refused ------------------------------------------------------------------------------


def core_arguments() -> dict[str, Any]:
    return {
        "contexts": [context()], "horizon": 2, "beam_width": 3, "n_expand": 2, "discount": 0.9,
        "max_len": 3 * D - 1, "temperature": 1.0, "k_obs": 1, "k_act": None, "k_rew": 1,
        "cdf_obs": None, "cdf_act": 0.6, "cdf_rew": None, "percentile": None,
        "thresholds": np.ascontiguousarray(tiny_discretizer().thresholds[:, -2:].T),
        "seeds": [0], "plan_indices": [0], "uniforms": None, "trace": False, "value_fn": None,
        "deadline_seconds": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": []}, "contexts: expected at least one"),
        ({"contexts": [context().astype(np.float32)]}, r"contexts\[0\]: expected .* int64"),
        ({"contexts": [context().astype(np.int32)]}, r"contexts\[0\]: expected .* int64"),
        ({"contexts": [np.repeat(context(), 2)[::2]]}, r"contexts\[0\]: expected a contiguous"),
        ({"contexts": [context()[None]]}, r"contexts\[0\]: expected 1 dimension"),
        ({"contexts": [context()[:-1]]}, r"contexts\[0\]: expected k \* 7 \+ 3 tokens"),
        ({"contexts": [context() + NUM_BINS]}, r"contexts\[0\]: expected ids in \[0, 8\]"),
        ({"contexts": [context() - 10]}, r"contexts\[0\]: expected ids in \[0, 8\]"),
        ({"contexts": [None]}, r"contexts\[0\]: expected"),
        ({"horizon": 0}, "horizon: expected"),
        ({"horizon": 2**30}, "horizon: expected"),
        ({"beam_width": 0}, "beam_width: expected"),
        ({"beam_width": -5}, "beam_width: expected"),
        ({"beam_width": 2**19, "n_expand": 2**19}, r"beam_width \* n_expand: expected"),
        ({"beam_width": 2**19, "horizon": 2**18}, "expected a search that fits in memory"),
        ({"n_expand": 0}, "n_expand: expected"),
        ({"discount": float("nan")}, "discount: expected"),
        ({"max_len": 3 * D}, "max_len: expected"),
        ({"max_len": 100 * D - 1}, "max_len: expected"),
        ({"max_len": D - 1}, "max_len: expected at least 2 transitions"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"k_obs": 0}, "k_obs: expected"),
        ({"k_act": NUM_BINS + 2}, "k_act: expected"),
        ({"cdf_rew": 1.5}, "cdf_rew: expected"),
        ({"percentile": -0.1}, "percentile: expected"),
        ({"thresholds": np.zeros((2, 3))}, r"thresholds: expected .*\(2, 9\)"),
        ({"thresholds": np.full((2, 9), np.inf)}, "thresholds: expected finite"),
        ({"thresholds": np.zeros((9, 2)).T}, "thresholds: expected a contiguous"),
        ({"thresholds": np.zeros((2, 9), np.float32)}, "thresholds: expected .* float64"),
        ({"seeds": []}, "seeds: expected 1"),
        ({"plan_indices": [1, 2]}, "plan_indices: expected 1"),
        ({"uniforms": np.zeros((1, 2, 6))}, r"uniforms: expected .*\(1, 11, 6\)"),
        ({"uniforms": np.ones((1, 11, 6))}, r"uniforms: expected numbers in \[0, 1\)"),
        ({"uniforms": [0.5]}, "uniforms: expected"),
        ({"deadline_seconds": 0.0}, "deadline: expected"),
        ({"deadline_seconds": 1.0, "trace": True}, "trace: expected False"),
    ],
)  # fmt: skip
def test_the_core_refuses(changes: dict[str, Any], message: str) -> None:
    search = tiny_backend()._search("float32")
    assert len(search.plan(**core_arguments())) == 1
    with pytest.raises(ValueError, match=message):
        search.plan(**(core_arguments() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 17}, "embed_dim: expected a multiple"),
        ({"num_heads": 0}, "num_heads: expected"),
        ({"num_layers": 2**31 - 1}, "num_layers: expected"),
        ({"vocab_size": 1}, "vocab_size: expected"),
        ({"observation_dim": 4}, r"weights\[tok_emb.weight\]: expected"),
        ({"weights": {}}, "weights: expected an array named"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16"),
        ({"isa": "mmx"}, "isa: expected one of auto"),
    ],
)
def test_the_core_refuses_models(changes: dict[str, Any], message: str) -> None:
    model = tiny_model()
    arguments = {
        "observation_dim": 3, "action_dim": 2, "vocab_size": NUM_BINS, "num_transitions": 4,
        "num_layers": 2, "num_heads": 2, "embed_dim": 16, "goal_len": 0, "dtype": "float32",
        "isa": "auto", "weights": {k: v.numpy() for k, v in model.state_dict().items()},
    }  # fmt: skip
    assert cpu._core.Model(**arguments).isa == available_isas()[0]
    with pytest.raises(ValueError, match=message):
        cpu._core.Model(**(arguments | changes))


def test_arguments_of_the_wrong_type_are_refused() -> None:
    search = tiny_backend()._search("float32")
    for changes in ({"horizon": "two"}, {"contexts": 5}, {"seeds": [-1]}, {"trace": "yes"}):
        with pytest.raises((TypeError, ValueError)):
            search.plan(**(core_arguments() | changes))


# --- choosing it ----------------------------------------------------------------------------------


def test_auto_is_the_cpu_backend() -> None:
    assert make_backend("auto", tiny_model(), None).name == "cpu"


def test_without_the_core_torch_plans_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_core", None)
    assert available_isas() == []
    with pytest.warns(RuntimeWarning, match=r"without its C\+\+ planner"):
        assert make_backend("auto", tiny_model(), None).name == "torch"
    with pytest.raises(ImportError, match=r"backend: the C\+\+ planner was not built"):
        make_backend("cpu", tiny_model(), None)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_other_backends_have_no_deadline(name: str) -> None:
    arguments = (tiny_model(), tiny_discretizer(), context()[None], CONFIG)
    with pytest.raises(ValueError, match=f"deadline_ms: expected None with the {name} backend"):
        beam_plan(*arguments, backend=name, deadline_ms=5)


def test_bad_threads_and_deadlines_are_refused() -> None:
    arguments = (tiny_model(), tiny_discretizer(), context()[None], CONFIG)
    for changes, message in (
        ({"num_threads": 0}, "num_threads: expected an integer >= 1"),
        ({"num_threads": 1.5}, "num_threads: expected an integer"),
        ({"deadline_ms": 0}, "deadline_ms: expected"),
        ({"deadline_ms": "soon"}, "deadline_ms: expected"),
        ({"deadline_ms": 5, "trace": True}, "trace: expected False with a deadline"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_plan(*arguments, backend="cpu", **changes)  # type: ignore[arg-type]
