"""What every planning backend takes and returns: the package's narrow waist is a whole plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_fast.config import PlanConfig
from tt_fast.discretizer import Discretizer, Floats, Tokens
from tt_fast.planning.philox import philox_uniforms

#: Raw probabilities (rows, 2, vocab_size + 1) float32 of reward and value tokens -> (rows,)
#: rewards and (rows,) values (the original's value_fn, core.py:64).
ValueFn = Callable[[NDArray[np.float32]], tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True)
class Draws:
    """Where the random numbers of one call come from: an address per context, or given numbers."""

    seeds: tuple[int, ...]
    """One a context"""
    plan_indices: tuple[int, ...]
    """One a context"""
    given: Floats | None = None
    """(num_contexts, num_draws, num_rows), instead of the generator's"""

    def uniforms(self, context_idx: int, num_draws: int, num_rows: int) -> Floats:
        """(num_draws, num_rows) in [0, 1) for one context."""
        if self.given is not None:
            given: Floats = self.given[context_idx]
            return given
        seed, plan_index = self.seeds[context_idx], self.plan_indices[context_idx]
        return philox_uniforms(seed, plan_index, num_draws, num_rows)


@dataclass(frozen=True)
class PlanTrace:
    """Everything a plan of one context decided. R = beam_width * n_expand rows, B = beam_width."""

    drawn: tuple[Tokens, ...]
    """Per sampled token, in order: (R,), or (B,) for an observation token"""
    rewards: NDArray[np.float32]
    """(horizon, R) estimated reward of each candidate"""
    values: NDArray[np.float32]
    """(horizon, R) estimated value after it"""
    candidate_scores: Floats
    """(horizon, R)"""
    parents: Tokens
    """(horizon, B) rows kept, best first"""
    beams: Tokens
    """(B, context_len + ...) tokens of the beams at the end, best first"""


@dataclass(frozen=True)
class BeamPlan:
    """The best plan of each context."""

    tokens: Tokens
    """(num_contexts, horizon, transition_dim)"""
    scores: Floats
    """(num_contexts,) discounted rewards plus the discounted last value"""
    rewards: NDArray[np.float32]
    """(num_contexts, horizon) estimated rewards along the plan"""
    values: NDArray[np.float32]
    """(num_contexts, horizon) estimated value after each step"""
    trace: tuple[PlanTrace, ...] | None = None
    """One a context, if asked for"""
    num_steps: Tokens | None = None
    """(num_contexts,) steps planned; None: all. Where a deadline made it fewer than the arrays
    hold, the rest is stop tokens and NaN"""
    num_rows: Tokens | None = None
    """(num_contexts,) beams kept after the first step, fewer than asked under a very short
    deadline; None: as asked"""


@dataclass(frozen=True)
class BeamSequence:
    """The likeliest continuation that a beam search found."""

    tokens: Tokens
    """(context_len + num_tokens,) context included"""
    log_probs: NDArray[np.float32]
    """(beam_width,), or fewer where fewer candidates exist; best first, nats"""


@dataclass(frozen=True)
class ImaginedPlan:
    """A plan as numbers of the environment. Row 0 is now: its action is the one to take."""

    observations: Floats
    """(horizon, observation_dim)"""
    actions: Floats
    """(horizon, action_dim)"""
    rewards: Floats
    """(horizon,)"""
    values: Floats
    """(horizon,)"""
    score: float
    tokens: Tokens
    """(horizon, transition_dim)"""

    @classmethod
    def decode(
        cls, tokens: Tokens, score: float, discretizer: Discretizer, observation_dim: int
    ) -> ImaginedPlan:
        """From the tokens (horizon, transition_dim) of a plan."""
        rows = discretizer.decode(tokens)
        observations, actions = rows[:, :observation_dim], rows[:, observation_dim:-2]
        return cls(observations, actions, rows[:, -2], rows[:, -1], score, tokens)


class PlanBackend(Protocol):
    """Makes whole plans; nothing above it sees a token step. Arguments are already checked."""

    name: str
    has_deadline: bool
    """Whether `plan` takes `deadline_ms`"""

    def plan(
        self,
        contexts: Sequence[Tokens],
        config: PlanConfig,
        draws: Draws,
        *,
        trace: bool = False,
        value_fn: ValueFn | None = None,
        deadline_ms: float | None = None,
    ) -> BeamPlan:
        """Plan from each context (1-D: past transitions, then the current observation).

        `value_fn` replaces the estimate of rewards and values; it is called once a planned step
        and context. With a deadline (only where `has_deadline`), the best plan found in that time.
        """
        ...

    def search(
        self,
        context: Tokens,
        num_tokens: int,
        *,
        beam_width: int,
        goal: Tokens | None,
        top_k: int | None,
        cdf: float | None,
        temperature: float,
    ) -> BeamSequence:
        """Likelihood beam search from one context (1-D)."""
        ...
