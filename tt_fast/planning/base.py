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
    """(num_contexts,) steps planned, fewer than the horizon if a deadline ended the plan; what the
    arrays hold beyond is stop tokens and NaN. None: all"""
    num_beams: Tokens | None = None
    """(num_contexts,) beams kept, fewer than asked under a very short deadline. None: all"""

    def tokens_of(self, context_idx: int) -> Tokens:
        """(num_steps, transition_dim) tokens of one context's plan."""
        tokens: Tokens = self.tokens[context_idx]
        return tokens if self.num_steps is None else tokens[: self.num_steps[context_idx]]

    def num_beams_of(self, context_idx: int, config: PlanConfig) -> int:
        """Beams that one context's plan kept."""
        return config.beam_width if self.num_beams is None else int(self.num_beams[context_idx])


@dataclass(frozen=True)
class BeamSequence:
    """The likeliest continuation that a beam search found."""

    tokens: Tokens
    """(context_len + num_tokens,) context included"""
    log_probs: NDArray[np.float32]
    """(beam_width,), or fewer where fewer candidates exist; best first, nats"""


@dataclass(frozen=True)
class ImaginedPlan:
    """A plan as numbers of the environment. Row 0 is now: its action is the one to take.

    S steps were planned: the horizon, or fewer if a deadline ended the plan.
    """

    observations: Floats
    """(S, observation_dim)"""
    actions: Floats
    """(S, action_dim)"""
    rewards: Floats
    """(S,)"""
    values: Floats
    """(S,)"""
    score: float
    tokens: Tokens
    """(S, transition_dim)"""
    num_beams: int
    """Beams that were kept: the beam_width, or fewer under a very short deadline"""

    @classmethod
    def decode(
        cls,
        tokens: Tokens,
        score: float,
        discretizer: Discretizer,
        observation_dim: int,
        num_beams: int,
    ) -> ImaginedPlan:
        """From the tokens (S, transition_dim) of a plan."""
        rows = discretizer.decode(tokens)
        observations, actions = rows[:, :observation_dim], rows[:, observation_dim:-2]
        return cls(observations, actions, rows[:, -2], rows[:, -1], score, tokens, num_beams)


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
