"""The public search functions: check the arguments, pick a backend, plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from tt_fast.config import DEFAULT_DISCOUNT, TEMPERATURES, ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer, Floats, Tokens
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import cpu, cuda
from tt_fast.planning.base import BeamPlan, BeamSequence, Draws, PlanBackend, ValueFn
from tt_fast.planning.cached import TorchBackend
from tt_fast.planning.reference import ReferenceBackend
from tt_fast.validate import require, require_choice, require_int, require_number, require_type

#: Names of the backends; "auto" stands for one of them, see `make_backend`.
BACKENDS = ("reference", "torch", "cpu", "cuda")


def make_backend(
    name: str,
    model: TrajectoryTransformer,
    discretizer: Discretizer | None,
    *,
    num_threads: int | None = None,
) -> PlanBackend:
    """The planning backend of that name.

    "auto" takes `cpu` for a model on the processor, `cuda` for one on a GPU that can run it, and
    `torch` elsewhere. It warns where a GPU cannot, or where the C++ core was not built.

    Args:
        num_threads: of the cpu backend; None takes every processor this process may use. The
            others follow `torch.set_num_threads`.

    Raises:
        ValueError: an unknown name, "cuda" without a GPU that can run it or without triton, or a
            discretizer that does not fit the model.
        ImportError: "cpu" without the C++ core.
    """
    require_choice("backend", name, ("auto", *BACKENDS))
    if num_threads is not None:
        require_int("num_threads", num_threads, 1, 1024)
    if discretizer is not None:
        shape = (model.config.vocab_size, model.config.transition_dim)
        got = (discretizer.num_bins, discretizer.transition_dim)
        require(got == shape, "discretizer", f"(num_bins, transition_dim) = {shape}", got)
    if name == "auto":
        name = _fastest_backend(model)
    if name == "cpu":
        return cpu.CpuBackend(model, discretizer, num_threads=num_threads)
    backends = {"cuda": cuda.CudaBackend, "torch": TorchBackend, "reference": ReferenceBackend}
    return backends[name](model, discretizer)


def check_backend(name: str) -> None:
    """This machine can run the backend of that name.

    Raises:
        ValueError: it cannot, or there is no such backend.
    """
    require_choice("backend", name, ("auto", *BACKENDS))
    if name == "cpu":
        wanted = 'one that was built; reinstall with a compiler, or use "torch"'
        require(cpu.is_available(), "backend", wanted, name)
    if name == "cuda":
        cuda.require_available()


def _fastest_backend(model: TrajectoryTransformer) -> str:
    if model.pos_emb.device.type == "cuda":
        reason = cuda.why_unavailable(model)
        if reason is None:
            return "cuda"
        warnings.warn(
            f"the GPU planner cannot run: {reason}; planning with PyTorch, which is slower",
            RuntimeWarning,
            stacklevel=3,
        )
    if model.pos_emb.device.type != "cpu":
        return "torch"
    if not cpu.is_available():
        warnings.warn(
            "tt_fast was installed without its C++ planner (no compiler?); planning with PyTorch, "
            "which is several times slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return "torch"
    return "cpu"


def beam_plan(
    model: TrajectoryTransformer,
    discretizer: Discretizer,
    contexts: ArrayLike | Sequence[ArrayLike],
    plan_config: PlanConfig | None = None,
    *,
    backend: str = "auto",
    seed: int = 0,
    plan_index: int = 0,
    uniforms: ArrayLike | None = None,
    trace: bool = False,
    value_fn: ValueFn | None = None,
    deadline_ms: float | None = None,
    num_threads: int | None = None,
) -> BeamPlan:
    """Search for action sequences of high predicted return (trajectory/search/core.py:11-96).

    Args:
        model: not goal-conditioned.
        discretizer: the one its tokens were made with.
        contexts: (num_contexts, context_len) tokens, or a sequence of 1-D arrays of different
            lengths; each is past transitions, then the current observation.
        plan_config: default `PlanConfig()`; a discount of None means 0.99.
        backend: "reference", "torch", "cpu", "cuda" or "auto", see `make_backend`.
        seed: context i draws with seed + i.
        plan_index: index of the plan among those of a seed.
        uniforms: (num_contexts, num_draws, beam_width * n_expand) in [0, 1), used instead of the
            generator; an observation draw uses the first beam_width columns.
        trace: also return every candidate, parent and draw.
        value_fn: called once a planned step and context with the raw probabilities of reward and
            value, (rows, 2, vocab_size + 1) float32; returns (rows,) rewards and (rows,) values
            that replace the plan_config's estimate (core.py:64).
        deadline_ms: return the best plan found in this time, in milliseconds (cpu backend only):
            fewer steps, or in the extreme fewer beams; `num_steps` and `num_beams` of the result
            tell. Such a plan depends on the clock, and cannot be traced.
        num_threads: see `make_backend`.

    Returns:
        numpy arrays, see `BeamPlan`.

    Raises:
        ValueError: an argument of the wrong shape, type or range; `overflow="grow"` with more
            transitions than the model's window.
    """
    require_type("model", model, TrajectoryTransformer, ", such as checkpoint.model")
    require_type("discretizer", discretizer, Discretizer, ", such as checkpoint.discretizer")
    config = PlanConfig() if plan_config is None else plan_config
    require_type("plan_config", config, PlanConfig)
    config = config.with_discount(DEFAULT_DISCOUNT)
    check_plan(model.config, config)
    callable_or_none = value_fn is None or callable(value_fn)
    require(callable_or_none, "value_fn", "a function or None", type(value_fn).__name__)
    arrays = _check_contexts(contexts, model.config, config)
    seed, plan_index = require_int("seed", seed, 0), require_int("plan_index", plan_index, 0)
    count = len(arrays)
    given = None
    if uniforms is not None:
        num_draws = config.num_draws(model.config.observation_dim, model.config.action_dim)
        given = _check_uniforms(uniforms, (count, num_draws, config.num_rows))
    draws = Draws(tuple(seed + i for i in range(count)), (plan_index,) * count, given)
    planner = make_backend(backend, model, discretizer, num_threads=num_threads)
    check_deadline(planner, deadline_ms)
    require(not (trace and deadline_ms), "trace", "False with a deadline", trace)
    return planner.plan(
        arrays, config, draws, trace=trace, value_fn=value_fn, deadline_ms=deadline_ms
    )


def beam_search(
    model: TrajectoryTransformer,
    context: ArrayLike,
    num_tokens: int,
    *,
    beam_width: int,
    goal: ArrayLike | None = None,
    top_k: int | None = None,
    cdf: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    num_threads: int | None = None,
) -> BeamSequence:
    """The likeliest continuation (trajectory/search/core.py:98-131): imitation, goal-reaching.

    Args:
        model: goal-conditioned if and only if `goal` is given.
        context: (context_len,) tokens; cropped at the model's own window.
        num_tokens: how many to append.
        beam_width: sequences kept after each token.
        goal: (observation_dim,) tokens.
        top_k: keep only so many candidates of each distribution.
        cdf: remove this mass of the least likely candidates.
        temperature: divides the logits.
        backend: "reference", "torch", "cpu", "cuda" or "auto", see `make_backend`.
        num_threads: see `make_backend`.

    Raises:
        ValueError: an argument of the wrong shape, type or range.
    """
    require_type("model", model, TrajectoryTransformer, ", such as checkpoint.model")
    options = check_search(
        model.config, context, num_tokens, beam_width=beam_width, goal=goal,
        top_k=top_k, cdf=cdf, temperature=temperature,
    )  # fmt: skip
    return make_backend(backend, model, None, num_threads=num_threads).search(**options)


def check_search(
    dims: ModelConfig,
    context: ArrayLike,
    num_tokens: int,
    *,
    beam_width: int,
    goal: ArrayLike | None,
    top_k: int | None,
    cdf: float | None,
    temperature: float,
) -> dict[str, Any]:
    """The arguments of `PlanBackend.search` from those of `beam_search`, checked.

    Raises:
        ValueError: an argument of the wrong shape, type or range.
    """
    tokens = _check_tokens("context", context, dims.vocab_size)
    require(len(tokens) >= 1, "context", "at least 1 token", len(tokens))
    require_int("num_tokens", num_tokens, 1)
    require_int("beam_width", beam_width, 1)
    if top_k is not None:
        require_int("top_k", top_k, 1, dims.vocab_size + 1)
    if cdf is not None:
        require_number("cdf", cdf, 0.0, 1.0)
    require_number("temperature", temperature, *TEMPERATURES)
    require(
        (goal is not None) == dims.goal_conditioned,
        "goal", "tokens for a goal-conditioned model and None for another", goal,
    )  # fmt: skip
    goal_tokens = None if goal is None else _check_tokens("goal", goal, dims.vocab_size - 1)
    if goal_tokens is not None:
        shape = (dims.observation_dim,)
        require(goal_tokens.shape == shape, "goal", f"shape {shape}", goal_tokens.shape)
    return {
        "context": tokens, "num_tokens": num_tokens, "beam_width": beam_width,
        "goal": goal_tokens, "top_k": top_k, "cdf": cdf, "temperature": temperature,
    }  # fmt: skip


def check_plan(model: ModelConfig, config: PlanConfig) -> None:
    """Refuse a plan that this model cannot make, whatever the context.

    Raises:
        ValueError: names the setting.
    """
    plain = not model.goal_conditioned
    require(plain, "model", "one without goal (use beam_search for it)", "goal_conditioned=True")
    for name in ("k_obs", "k_act", "k_rew"):
        k = getattr(config, name)
        if k is not None:
            require_int(name, k, 1, model.vocab_size + 1)
    if config.overflow == "crop" and config.horizon > 1:
        # one transition less one token: after its value token nothing is left to predict from
        window = min(config.max_context_transitions or model.num_transitions, model.num_transitions)
        expected = "at least 2 (also the model's num_transitions) for a horizon > 1"
        require(window >= 2, "max_context_transitions", expected, window)


def check_overflow(model: ModelConfig, config: PlanConfig, context_transitions: int) -> None:
    """`overflow="grow"` needs room for context and plan in the model's window.

    Raises:
        ValueError: too little; names both remedies.
    """
    total = context_transitions + config.horizon
    if config.overflow == "grow":
        expected = (
            f"context + horizon <= the model's num_transitions={model.num_transitions}; use "
            'overflow="crop", or a model trained on longer windows'
        )
        require(
            total <= model.num_transitions, "overflow", expected,
            f"{context_transitions} + {config.horizon} = {total}",
        )  # fmt: skip


def check_deadline(backend: PlanBackend, deadline_ms: float | None) -> None:
    """Refuse a deadline that is no time, or that this backend cannot keep.

    Raises:
        ValueError: says which.
    """
    if deadline_ms is None:
        return
    require_number("deadline_ms", deadline_ms, 0.0, open_low=True)
    expected = f"None with the {backend.name} backend, which always plans to the end"
    require(backend.has_deadline, "deadline_ms", expected, deadline_ms)


def _check_contexts(contexts: Any, model: ModelConfig, config: PlanConfig) -> list[Tokens]:
    is_one = isinstance(contexts, (np.ndarray, torch.Tensor)) and contexts.ndim != 2
    expected = "(num_contexts, context_len) tokens or a sequence of 1-D arrays"
    require(not is_one, "contexts", expected, f"shape {tuple(getattr(contexts, 'shape', ()))}")
    require(hasattr(contexts, "__len__") and len(contexts) > 0, "contexts", expected, contexts)
    arrays = []
    for i, context in enumerate(contexts):
        tokens = check_context(f"contexts[{i}]", context, model)
        check_overflow(model, config, len(tokens) // model.transition_dim)
        arrays.append(tokens)
    return arrays


def check_context(name: str, context: Any, model: ModelConfig) -> Tokens:
    """(context_len,) int64: past transitions, then an observation.

    Raises:
        ValueError: wrong shape, type, length or range; `name` says of what.
    """
    tokens = _check_tokens(name, context, model.vocab_size)
    width, rest = model.transition_dim, len(tokens) % model.transition_dim
    expected = f"a length of k * {width} + {model.observation_dim}"
    require(rest == model.observation_dim, name, expected, len(tokens))
    return tokens


def _check_tokens(name: str, tokens: Any, highest: int) -> Tokens:
    """1-D int64 tokens in [0, highest]."""
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    array = np.asarray(tokens)
    require(array.ndim == 1, name, "a 1-D array of tokens", f"shape {array.shape}")
    require(np.issubdtype(array.dtype, np.integer), name, "integers", str(array.dtype))
    if array.size:
        low, high = int(array.min()), int(array.max())
        require(low >= 0 and high <= highest, name, f"ids in [0, {highest}]", f"{low}..{high}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_uniforms(uniforms: ArrayLike, shape: tuple[int, int, int]) -> Floats:
    array = np.asarray(uniforms, dtype=np.float64)
    require(array.shape == shape, "uniforms", f"shape {shape}", array.shape)
    inside = bool(((array >= 0.0) & (array < 1.0)).all())
    require(inside, "uniforms", "numbers in [0, 1)", f"{array.min()}..{array.max()}")
    return array
