"""trajectory/search of the original: its functions, signatures and results, on our backends.

Source: trajectory/search/core.py and utils.py of jannerm/trajectory-transformer at 8834a6e.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tt_fast.compat.jannerm.adopt import adopt
from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.planning import search as planning
from tt_fast.planning.base import Draws, ValueFn
from tt_fast.planning.planner import VALUE_PLACEHOLDER
from tt_fast.planning.search import check_plan
from tt_fast.validate import refuse, require, require_int

#: (rows, 2, vocab_size + 1) raw probabilities of reward and value -> (rows,) each (core.py:64).
TheirValueFn = Callable[[Tensor], tuple[Any, Any]]


@torch.no_grad()
def beam_plan(
    model: nn.Module,
    value_fn: TheirValueFn,
    x: Tensor,
    n_steps: int,
    beam_width: int,
    n_expand: int,
    observation_dim: int,
    action_dim: int,
    discount: float = 0.99,
    max_context_transitions: int | None = None,
    k_obs: int | None = None,
    k_act: int | None = None,
    k_rew: int | None = 1,
    cdf_obs: float | None = None,
    cdf_act: float | None = None,
    cdf_rew: float | None = None,
    verbose: bool = True,
    previous_actions: Any = None,
) -> Tensor:
    """The original's beam_plan (core.py:11-96).

    One random number is drawn from torch's global generator; it seeds all others, so
    `torch.manual_seed` decides the plan as it does in the original. The tokens of a seed are not
    the original's, which draws in another way; their distribution is.

    Args:
        model: the original's GPT, or a `TrajectoryTransformer`. Its weights are taken by name when
            it is first seen, and again when they have changed.
        value_fn: called once a planned step with raw probabilities of the reward's and the value's
            tokens, (beam_width * n_expand, 2, vocab_size + 1) float32 on x's device; returns as
            many rewards and values, tensors or arrays.
        x: (1, context_len) tokens: past transitions, then the current observation.
        n_steps: transitions to plan.
        beam_width: beams kept after each.
        n_expand: children of a beam.
        observation_dim, action_dim: the model's.
        discount: of the score.
        max_context_transitions: the model sees at most so many transitions, less one token; None
            (or 0): its whole window.
        k_obs, k_act, k_rew: keep the k likeliest tokens; None keeps all.
        cdf_obs, cdf_act, cdf_rew: remove this mass of the least likely tokens.
        verbose: print a line when the plan is made.
        previous_actions: not used, as in the original.

    Returns:
        (n_steps, transition_dim) int64 tokens of the best plan, on x's device.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    start = time.perf_counter()
    adopted = adopt(model)
    config = adopted.model.config
    _check_dims(config, observation_dim, action_dim)
    context = _check_prefix(x, config)
    plan_config = PlanConfig(
        horizon=n_steps,
        beam_width=beam_width,
        n_expand=n_expand,
        discount=discount,
        max_context_transitions=max_context_transitions or None,
        k_obs=k_obs,
        k_act=k_act,
        k_rew=k_rew,
        cdf_obs=cdf_obs,
        cdf_act=cdf_act,
        cdf_rew=cdf_rew,
    )
    check_plan(config, plan_config)
    draws = Draws((_random_seed(),), (0,))
    ours = _value_fn(value_fn, x.device)
    plan = adopted.backend.plan([context], plan_config, draws, value_fn=ours)
    if verbose:
        seconds = time.perf_counter() - start
        print(
            f"[ tt_fast ] {n_steps} steps, {beam_width} beams | "
            f"value {plan.scores[0]:.2f} | {seconds:.3f} s"
        )
    return torch.from_numpy(plan.tokens[0]).to(x.device)


@torch.no_grad()
def beam_search(
    model: nn.Module,
    x: Tensor,
    n_steps: int,
    beam_width: int = 512,
    goal: Tensor | None = None,
    **sample_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The original's beam_search (core.py:98-131): the likeliest continuation.

    Args:
        model: as in `beam_plan`; the original's ConditionalGPT if and only if `goal` is given.
        x: (1, context_len) tokens.
        n_steps: tokens to append.
        beam_width: sequences kept after each token.
        goal: (1, observation_dim) or (observation_dim,) tokens.
        sample_kwargs: temperature, topk and cdf as in the original's get_logp; crop_increment, the
            model's transition_dim, without which a sequence longer than its window is an error.

    Returns:
        (context_len + n_steps,) int64 tokens, and (beam_width,) float32 log probabilities in nats,
        best first, both on x's device; one log probability has no dimensions.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    adopted = adopt(model)
    config, context = adopted.model.config, _only_row(x)
    options = _search_options(config, len(context) + n_steps - 1, sample_kwargs)
    tokens = None if goal is None else _numpy(goal.reshape(-1))
    checked = planning.check_search(
        config, context, n_steps, beam_width=beam_width, goal=tokens, **options
    )
    found = adopted.backend.search(**checked)
    log_probs = torch.from_numpy(found.log_probs).to(x.device)
    return torch.from_numpy(found.tokens).to(x.device), log_probs.squeeze()


def make_prefix(
    discretizer: Any,
    context: list[Tensor],
    obs: NDArray[Any],
    prefix_context: bool = True,
    *,
    device: str | torch.device | None = None,
) -> Tensor:
    """Tokens of past transitions and of the current observation (search/utils.py:10-20).

    Args:
        discretizer: the original's, or a `tt_fast.Discretizer`.
        context: (1, transition_dim) tokens of each past transition, from `update_context`.
        obs: (observation_dim,) current observation.
        prefix_context: False leaves the past out.
        device: of the result; None takes the context's, and without one the processor (the
            original always took its DEVICE, "cuda:0").

    Returns:
        (1, len(context) * transition_dim + observation_dim) int64.
    """
    now = _discretize(discretizer, np.asarray(obs), slice(0, np.size(obs)))
    tokens = now.to(device or (context[0].device if context else "cpu"))
    return torch.cat([*context, tokens], dim=-1) if prefix_context else tokens


def extract_actions(x: Any, observation_dim: int, action_dim: int, t: int | None = None) -> Any:
    """The actions of a plan (search/utils.py:22-28).

    Args:
        x: (horizon, transition_dim) array or tensor.
        observation_dim, action_dim: the model's.
        t: which step; None for all.

    Returns:
        (horizon, action_dim), or (action_dim,) of step `t`.
    """
    width = observation_dim + action_dim + 2
    fits = x.ndim == 2 and x.shape[1] == width
    require(fits, "x", f"shape (horizon, {width})", tuple(x.shape))
    actions = x[:, observation_dim : observation_dim + action_dim]
    return actions if t is None else actions[t]


def update_context(
    context: list[Tensor],
    discretizer: Any,
    observation: NDArray[Any],
    action: NDArray[Any],
    reward: float,
    max_context_transitions: int,
    *,
    device: str | torch.device | None = None,
) -> list[Tensor]:
    """Add a transition to the context, dropping what is too old (search/utils.py:30-47).

    Args:
        context: what this function returned before; it is appended to, as in the original.
        discretizer: the original's, or a `tt_fast.Discretizer`.
        observation: (observation_dim,).
        action: (action_dim,).
        reward: of the step.
        max_context_transitions: how many transitions to keep.
        device: as in `make_prefix`.

    Returns:
        The newest transitions, (1, transition_dim) int64 tokens each.
    """
    require_int("max_context_transitions", max_context_transitions, 1)
    row = np.concatenate([observation, action, [reward, VALUE_PLACEHOLDER]])
    tokens = _discretize(discretizer, row, slice(None))
    context.append(tokens.to(device or (context[0].device if context else "cpu")))
    return context[-max_context_transitions:]


def _discretize(discretizer: Any, row: NDArray[Any], dims: slice) -> Tensor:
    """(n,) numbers -> (1, n) int64 tokens."""
    if isinstance(discretizer, Discretizer):
        return torch.from_numpy(discretizer.encode(row[None], dims))
    indices = discretizer.discretize(row, subslice=[dims.start, dims.stop])
    return torch.as_tensor(indices, dtype=torch.long)


def _value_fn(value_fn: TheirValueFn, device: torch.device) -> ValueFn:
    """Theirs takes tensors on the caller's device, ours arrays."""

    def ours(probs: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        rewards, values = value_fn(torch.from_numpy(probs).to(device))
        return _numpy(rewards), _numpy(values)

    return ours


def _numpy(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _random_seed() -> int:
    """From torch's global generator, as the original's torch.multinomial."""
    return int(torch.randint(2**63 - 1, ()))


def _check_dims(config: ModelConfig, observation_dim: int, action_dim: int) -> None:
    for name, value in (("observation_dim", observation_dim), ("action_dim", action_dim)):
        wanted = getattr(config, name)
        require(value == wanted, name, f"the model's {wanted}", value)


def _check_prefix(x: Any, config: ModelConfig) -> NDArray[np.int64]:
    """(context_len,) tokens of (1, context_len)."""
    return planning.check_context("x", _only_row(x), config)


def _only_row(x: Any) -> Tensor:
    """(context_len,) of (1, context_len)."""
    if not isinstance(x, Tensor):
        refuse("x", "a tensor of tokens", type(x).__name__)
    require(x.ndim == 2 and len(x) == 1, "x", "shape (1, context_len)", tuple(x.shape))
    row: Tensor = x[0]
    return row


def _search_options(
    config: ModelConfig, longest: int, sample_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Our names of the original's sampling arguments."""
    names = {"temperature": "temperature", "topk": "top_k", "cdf": "cdf"}
    cropping = ("max_block", "allow_crop", "crop_increment")
    unknown = sorted(set(sample_kwargs) - names.keys() - set(cropping))
    require(not unknown, "sample_kwargs", f"names among {[*names, *cropping]}", unknown)
    max_block, allow_crop, increment = (sample_kwargs.get(name) for name in cropping)
    block = config.block_size
    whole = max_block is None or max_block >= block
    require(whole, "max_block", f"None or at least the model's window of {block}", max_block)
    if longest > block:
        expected = f"True for more tokens than the model's window of {block}"
        require(allow_crop in (None, True), "allow_crop", expected, allow_crop)
        width = config.transition_dim
        require(increment == width, "crop_increment", f"the transition_dim, {width}", increment)
    defaults = {"temperature": 1.0, "top_k": None, "cdf": None}  # get_logp's, sampling.py:80
    given = {ours: sample_kwargs[name] for name, ours in names.items() if name in sample_kwargs}
    return {**defaults, **given}
