"""The GPU backend, in Triton's interpreter where there is no GPU: the reference's plans."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import compare_plans, random_discretizer, random_model
from golden_files import golden_model, load_golden
from numpy.typing import NDArray
from tiny import ACTION_DIM, NUM_BINS, OBSERVATION_DIM, tiny_discretizer, tiny_model

from tt_fast import Discretizer, PlanConfig, TrajectoryTransformer, beam_plan
from tt_fast.kernels import segment
from tt_fast.kernels.sample import DrawFlags
from tt_fast.planning import BeamPlan, cuda, make_backend, search
from tt_fast.planning.base import Draws
from tt_fast.planning.cuda import CudaBackend
from tt_fast.planning.cuda_memory import make_buffers, model_shape, plan_bytes, plan_shape
from tt_fast.planning.fingerprint import weighted_sum
from tt_fast.planning.reference import ReferenceBackend

D = OBSERVATION_DIM + ACTION_DIM + 2
CONFIG = PlanConfig(3, 3, 2, max_context_transitions=2, discount=0.9, cdf_act=None, temperature=2.0)

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def model_and_discretizer(
    seed: int = 0, **changes: Any
) -> tuple[TrajectoryTransformer, Discretizer]:
    """So many bins that no two candidates are the same, whose order would be rounding's."""
    rng = np.random.default_rng(seed)
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM, "vocab_size": 30}
    sizes |= {"num_transitions": 4, "num_layers": 2, "num_heads": 2, "embed_dim": 16}
    model = random_model(rng, **(sizes | changes))
    return model, random_discretizer(rng, model.config)


def context(num_past: int = 2, seed: int = 0) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, NUM_BINS, num_past * D + OBSERVATION_DIM)


def draws(count: int = 1) -> Draws:
    return Draws(tuple(range(7, 7 + count)), (0,) * count)


def assert_same_tokens(got: BeamPlan, want: BeamPlan) -> None:
    """Every draw, parent and beam."""
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.trace is not None
    assert want.trace is not None
    for ours, theirs in zip(got.trace, want.trace, strict=True):
        for a, b in zip(ours.drawn, theirs.drawn, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(ours.parents, theirs.parents)
        np.testing.assert_array_equal(ours.beams, theirs.beams)


# --- the reference's plans ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(13))
def test_plans_equal_the_reference(seed: int) -> None:
    small = {"num_layers": 1 + seed % 2, "vocab_size": 6 + seed}
    outcome = compare_plans(
        seed, lambda model, discretizer, _: CudaBackend(model, discretizer), **small
    )
    assert outcome in ("equal", "near-tie")


def test_environments_at_different_times() -> None:
    """Each has its own crops, both sides of them."""
    contexts = [context(n, seed=n) for n in (0, 1, 4)]
    model, discretizer = model_and_discretizer()
    config = replace(CONFIG, max_context_transitions=3)
    want = ReferenceBackend(model, discretizer).plan(contexts, config, draws(3), trace=True)
    got = CudaBackend(model, discretizer).plan(contexts, config, draws(3), trace=True)
    assert_same_tokens(got, want)


def test_a_model_too_wide_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run_layerwise = cuda_session_module().run_layerwise
    monkeypatch.setattr(
        cuda_session_module(), "run_layerwise", lambda *a: calls.append(1) or run_layerwise(*a)
    )
    model, discretizer = model_and_discretizer(num_layers=1, embed_dim=160, num_heads=5)
    config = replace(CONFIG, horizon=2)
    want = ReferenceBackend(model, discretizer).plan([context()], config, draws(), trace=True)
    got = CudaBackend(model, discretizer).plan([context()], config, draws(), trace=True)
    assert_same_tokens(got, want)
    assert calls


def cuda_session_module() -> Any:
    from tt_fast.planning import cuda_session

    return cuda_session


def test_which_models_fit_one_program() -> None:
    from tt_fast.planning.cuda_memory import model_shape

    assert segment.fits_segment(model_shape(tiny_model().config, "ieee"))
    wide = replace(tiny_model().config, embed_dim=160, num_heads=5)
    assert not segment.fits_segment(model_shape(wide, "ieee"))
    many_bins = replace(tiny_model().config, vocab_size=300)
    assert not segment.fits_segment(model_shape(many_bins, "ieee"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("embed_dim", [16, 160])
def test_logits_that_overflow_are_refused(embed_dim: int) -> None:
    """The weights are finite; the next plan is as ever."""
    sizes = {"num_layers": 1, "embed_dim": embed_dim, "num_heads": 5 if embed_dim == 160 else 2}
    model, discretizer = model_and_discretizer(**sizes)
    backend, config = CudaBackend(model, discretizer), replace(CONFIG, horizon=1)
    want = backend.plan([context()], config, draws())
    with torch.no_grad():
        kept = model.head.weight.clone()
        model.head.weight.mul_(3e38 / kept.abs().max())
    with pytest.raises(ValueError, match="model: expected finite logits"):
        backend.plan([context()], config, draws())
    with torch.no_grad():
        model.head.weight.copy_(kept)
    np.testing.assert_array_equal(backend.plan([context()], config, draws()).tokens, want.tokens)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_value_fn_never_sees_logits_that_overflow() -> None:
    model, discretizer = model_and_discretizer(num_layers=1)
    with torch.no_grad():
        model.head.weight.mul_(3e38 / model.head.weight.abs().max())

    def value_fn(probs: NDArray[np.float32]) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match="model: expected finite logits"):
        CudaBackend(model, discretizer).plan([context()], CONFIG, draws(), value_fn=value_fn)


# --- options --------------------------------------------------------------------------------------


def test_value_fn_gets_raw_probabilities_and_decides() -> None:
    seen: dict[str, list[Any]] = {"reference": [], "cuda": []}

    def plan(backend: Any) -> BeamPlan:
        def value_fn(probs: NDArray[np.float32]) -> Any:
            seen[backend.name].append(probs)
            return -probs[:, 0, :-1].argmax(-1), probs[:, 1].max(-1)

        return backend.plan([context()], CONFIG, draws(), trace=True, value_fn=value_fn)

    model, discretizer = model_and_discretizer()
    want, got = (plan(make(model, discretizer)) for make in (ReferenceBackend, CudaBackend))
    assert_same_tokens(got, want)
    assert len(seen["cuda"]) == CONFIG.horizon
    for ours, theirs in zip(seen["cuda"], seen["reference"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda n: None, "a pair of arrays"),
        (lambda n: (np.zeros(n), np.zeros(n + 1)), r"got 'shape \(7,\)'"),
        (lambda n: (np.zeros(n), np.full(n, np.nan)), "finite numbers, got 'NaN or Inf'"),
    ],
)
def test_what_value_fn_returns_is_checked(wrong: Any, message: str) -> None:
    backend = CudaBackend(tiny_model(), tiny_discretizer())
    config = replace(CONFIG, horizon=1)
    with pytest.raises(ValueError, match=f"value_fn: expected .*{message}"):
        backend.plan([context(0)], config, draws(), value_fn=lambda probs: wrong(len(probs)))


def test_changed_weights_are_seen() -> None:
    model, discretizer = model_and_discretizer()
    backend = CudaBackend(model, discretizer)
    before = backend.plan([context()], CONFIG, draws(), trace=True)
    model.load_state_dict(model_and_discretizer(1)[0].state_dict())
    got = backend.plan([context()], CONFIG, draws(), trace=True)
    want = ReferenceBackend(model, discretizer).plan([context()], CONFIG, draws(), trace=True)
    assert_same_tokens(got, want)
    assert not np.array_equal(before.tokens, got.tokens)


def test_what_does_not_fit_is_planned_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, discretizer = model_and_discretizer()
    contexts, backend = [context(1, seed) for seed in range(3)], CudaBackend(model, discretizer)
    together = backend.plan(contexts, CONFIG, draws(3), trace=True)
    monkeypatch.setattr(CudaBackend, "_wave_size", lambda self, *sizes: 2)
    apart = backend.plan(contexts, CONFIG, draws(3), trace=True)
    assert_same_tokens(apart, together)


def test_memory_decides_how_many_are_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, discretizer = model_and_discretizer()
    backend = CudaBackend(model, discretizer)
    shape = model_shape(model.config, backend._precision(CONFIG))
    each = plan_bytes(shape, plan_shape(model, CONFIG), DrawFlags(False, False), 1)
    together = backend.plan([context(1, s) for s in range(4)], CONFIG, draws(4))
    monkeypatch.setattr(CudaBackend, "_usable_bytes", lambda self: int(3.5 * each))
    apart = backend.plan([context(1, s) for s in range(4)], CONFIG, draws(4))
    np.testing.assert_array_equal(apart.tokens, together.tokens)
    # two waves of two, of one size; that of four had to go
    assert [session.num_envs for session in backend._sessions.values()] == [2]
    for count in (1, 3, 2, 1, 3):
        backend.plan([context(1, s) for s in range(count)], CONFIG, draws(count))
        assert backend._held_bytes() <= 3.5 * each


@pytest.mark.parametrize("overflow", ["crop", "grow"])
@pytest.mark.parametrize("flags", [DrawFlags(False, False), DrawFlags(True, True)])
@pytest.mark.parametrize(("embed_dim", "vocab_size"), [(128, 100), (128, 1000), (512, 1000)])
def test_memory_is_counted(
    embed_dim: int, vocab_size: int, flags: DrawFlags, overflow: Any
) -> None:
    """All but the small tensors."""
    sizes = {"num_transitions": 24, "embed_dim": embed_dim, "vocab_size": vocab_size}
    model, _ = model_and_discretizer(**sizes)
    config = PlanConfig(4, 32, 4, overflow=overflow, discount=0.9)
    shape, plan = model_shape(model.config, "bf16"), plan_shape(model, config)
    buffers = make_buffers(shape, plan, flags, 3, torch.device("meta"))
    parts = (*buffers.trees, buffers.draws, buffers.newest.scratch, buffers.scratch)
    tensors = {id(t): t for part in parts for t in part} | {0: buffers.newest.logits}
    taken = sum(t.numel() * t.element_size() for t in tensors.values())
    assert 0.98 * taken <= plan_bytes(shape, plan, flags, 3) <= taken


def test_a_first_plan_in_inference_mode_spoils_none() -> None:
    backend = CudaBackend(*model_and_discretizer())
    with torch.inference_mode():
        first = backend.plan([context()], CONFIG, draws())
    again = backend.plan([context()], CONFIG, draws())
    np.testing.assert_array_equal(again.tokens, first.tokens)


def test_a_flipped_sign_and_swaps_show_on_a_gpu() -> None:
    weights = [torch.tensor([1.0, -2.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bfloat16)]
    first, other = weights
    changed = [first * torch.tensor([1.0, 1.0, 1.0, -1.0]), first[[0, 2, 1, 3]], first.flip(0)]
    found = [weighted_sum(w) for w in (weights, *([c, other] for c in changed), [other, first])]
    assert len(set(found)) == 5


def test_a_search_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_INDEX", 100)
    with pytest.raises(ValueError, match=r"beam_width: expected a search that fits the GPU, got"):
        CudaBackend(tiny_model(), tiny_discretizer()).plan([context()], CONFIG, draws())


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_SESSIONS", 1)
    backend = CudaBackend(tiny_model(), tiny_discretizer())
    for horizon in (1, 2):
        backend.plan([context(0)], replace(CONFIG, horizon=horizon), draws())
    assert len(backend._sessions) == 1


@pytest.mark.parametrize(
    ("dtype", "tf32"), [("float32", False), ("float32", True), ("bfloat16", False)]
)
def test_precision(dtype: Any, tf32: bool) -> None:
    """Probabilities against float64: at most twice the error of PyTorch in the same arithmetic.

    PyTorch has no tf32 on the processor: bfloat16, whose mantissa is shorter, bounds it.
    """
    model, config = tiny_model(), replace(CONFIG, horizon=1, k_act=1, temperature=1.0, dtype=dtype)
    seen = []

    def value_fn(probs: NDArray[np.float32]) -> Any:
        seen.append(probs[0, 0])
        return np.zeros(len(probs)), np.zeros(len(probs))

    backend = CudaBackend(model, tiny_discretizer(), tf32=tf32)
    plan = backend.plan([context()], config, draws(), value_fn=value_fn)
    tokens = torch.from_numpy(np.concatenate([context(), plan.tokens[0, 0, OBSERVATION_DIM:-2]]))
    tokens = tokens[-(D + OBSERVATION_DIM + ACTION_DIM) :]  # the window

    def probs(arithmetic: torch.dtype) -> NDArray[np.float64]:
        twin = tiny_model()
        with torch.no_grad():
            return twin.to(arithmetic)(tokens[None])[0, -1].double().softmax(-1).numpy()

    exact = probs(torch.float64)
    theirs = probs(torch.bfloat16 if dtype == "bfloat16" or tf32 else torch.float32)
    tiny = 4 * np.finfo(np.float32).eps
    assert np.abs(seen[0] - exact).max() <= 2 * np.abs(theirs - exact).max() + tiny


def test_bfloat16_logits_of_a_golden_model() -> None:
    """The original's tokens, official size: at most twice the error of PyTorch's bfloat16 run."""
    golden, model = load_golden("logits_hopper"), golden_model("hopper")
    dims = model.config
    config = replace(CONFIG, horizon=1, beam_width=1, n_expand=1, k_act=1, temperature=1.0)
    config = replace(config, max_context_transitions=None, dtype="bfloat16")
    seen = []

    def value_fn(probs: NDArray[np.float32]) -> Any:
        seen.append(probs[0, 0])
        return np.zeros(1), np.zeros(1)

    ours, theirs = [], []
    for j in (5, 6, 7):
        row = golden[f"tokens_{j}"][0]
        past = (len(row) - dims.observation_dim) // dims.transition_dim
        prefix = row[: past * dims.transition_dim + dims.observation_dim]
        discretizer = random_discretizer(np.random.default_rng(j), dims)
        plan = CudaBackend(model, discretizer).plan([prefix], config, draws(), value_fn=value_fn)
        action = plan.tokens[0, 0, dims.observation_dim : -2]
        window = torch.from_numpy(np.concatenate([prefix, action]))[None]
        double, low = (copy.deepcopy(model).to(dtype) for dtype in (torch.float64, torch.bfloat16))
        with torch.no_grad():
            exact = double(window)[0, -1].log_softmax(-1)
            rounded = low(window)[0, -1].double().log_softmax(-1)
        theirs.append(float((rounded - exact).abs().max()))
        ours.append(float((torch.from_numpy(seen[-1]).double().log() - exact).abs().max()))
    assert max(ours) <= 2 * max(theirs)
    assert max(ours) > 1e-4  # it is bfloat16 indeed


# --- who may use it -------------------------------------------------------------------------------


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = 'expected a GPU for "cuda", torch finds no CUDA device'
    with pytest.raises(ValueError, match=message):
        make_backend("cuda", tiny_model(), tiny_discretizer())
    with pytest.raises(ValueError, match=message):
        search.check_backend("cuda")


def test_an_old_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\), and 8\.0 is needed"):
        make_backend("cuda", tiny_model(), tiny_discretizer())


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "message"),
    [
        (2048, 8, None),
        (2064, 8, "embed_dim is 2064, and at most 2048 is served"),
        (520, 2, "embed_dim / num_heads is 260, and at most 256 is served"),
    ],
)
def test_too_wide_a_model_is_said(
    embed_dim: int, num_heads: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sizes = replace(tiny_model().config, embed_dim=embed_dim, num_heads=num_heads)
    model = SimpleNamespace(pos_emb=torch.zeros(1), config=sizes)
    assert cuda.why_unavailable(model) == message


def test_no_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install"):
        make_backend("cuda", tiny_model(), tiny_discretizer())


def test_a_deadline_is_refused() -> None:
    with pytest.raises(ValueError, match="None with the cuda backend"):
        beam_plan(
            tiny_model(), tiny_discretizer(), [context()], CONFIG, backend="cuda", deadline_ms=5.0
        )


def test_auto_says_why_a_gpu_does_not_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a GPU that cannot run kernels: PyTorch plans, and says so."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(pos_emb=on_gpu)
    assert search._fastest_backend(model) == "cuda"
    monkeypatch.setattr(cuda, "why_unavailable", lambda model=None: "it is too old")
    with pytest.warns(RuntimeWarning, match="the GPU planner cannot run: it is too old; planning"):
        assert search._fastest_backend(model) == "torch"
