"""Where two backends part, and whether rounding may have decided there.

A plan is a chain of decisions: each draw, and each selection. Two float32 backends may differ in a
decision only where its margin is smaller than what their logits differ by; everything after the
first difference follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tt_fast.config import PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import PlanTrace
from tt_fast.planning.reference import last_logits, window_len

EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Split:
    """The first decision that differs."""

    what: str
    margin: float
    """How far it was from the other outcome"""
    allowed: float
    """What rounding can move it by"""

    @property
    def by_rounding(self) -> bool:
        return self.margin <= self.allowed


@dataclass(frozen=True)
class Case:
    """One context and what was asked of it."""

    model: TrajectoryTransformer
    discretizer: Discretizer
    context: NDArray[np.int64]
    config: PlanConfig
    uniforms: NDArray[np.float64]
    """(num_draws, num_rows)"""


def first_split(case: Case, want: PlanTrace, got: PlanTrace) -> Split | None:
    """Where `got` leaves `want`, the reference's trace; None if it never does.

    Rows of equal tokens may change places in a selection: nothing follows from that.
    """
    dims, config = case.model.config, case.config
    x = np.tile(case.context, (config.beam_width, 1))
    draw_idx = 0
    for t in range(config.horizon):
        x = np.tile(x, (config.n_expand, 1))
        counts = (dims.action_dim + 2, dims.observation_dim if t + 1 < config.horizon else 0)
        for part, count in enumerate(counts):
            for _ in range(count):
                if not np.array_equal(want.drawn[draw_idx], got.drawn[draw_idx]):
                    return _draw_split(case, x, want, got, draw_idx)
                x = np.concatenate([x, want.drawn[draw_idx][:, None]], axis=1)
                draw_idx += 1
            if part == 0:
                if not np.array_equal(x[want.parents[t]], x[got.parents[t]]):
                    return _selection_split(case, x, want, got, t)
                x = x[want.parents[t]]
    return None


def _draw_split(
    case: Case, x: NDArray[np.int64], want: PlanTrace, got: PlanTrace, draw_idx: int
) -> Split:
    """x: (rows, num_tokens) that the draw continues."""
    row = int(np.flatnonzero(want.drawn[draw_idx] != got.drawn[draw_idx])[0])
    prefix = torch.from_numpy(x[row : row + 1])
    max_len = window_len(case.model, case.config)
    with torch.no_grad():
        logits = last_logits(case.model, prefix, max_len)[0].double().numpy()
    error = logit_error(case, prefix) / case.config.temperature
    top_k, cdf = _truncation_of(case, draw_idx)
    u = float(case.uniforms[draw_idx, row])
    margin = draw_margin(logits / case.config.temperature, top_k, cdf, u)
    # cumulative probabilities move by at most expm1(2 error), logits and their ratios by 2 error
    return Split(f"draw {draw_idx} of row {row}", margin, float(np.expm1(2 * error)) + 4 * EPS)


def _selection_split(
    case: Case, x: NDArray[np.int64], want: PlanTrace, got: PlanTrace, t: int
) -> Split:
    """x: (rows, num_tokens) candidates."""
    differs = (x[want.parents[t]] != x[got.parents[t]]).any(axis=1)
    place = int(np.flatnonzero(differs)[0])
    scores = want.candidate_scores[t]
    gap = abs(scores[want.parents[t, place]] - scores[got.parents[t, place]])
    return Split(f"selection {t}, place {place}", float(gap), score_error(case, want))


def draw_margin(
    logits: NDArray[np.float64], top_k: int | None, cdf: float | None, u: float
) -> float:
    """Distance of one draw from another outcome, in probability or difference of logits."""
    margins = []
    if cdf is not None:
        probs = _softmax(logits)
        ordered = np.sort(probs)
        cumulative = ordered.cumsum()
        below = np.flatnonzero(cumulative < cdf)
        threshold = ordered[below[-1] if below.size else 0]
        margins += [np.abs(cumulative - cdf).min(), _gap_around(np.log(probs), np.log(threshold))]
        logits = np.where(probs <= threshold, -1000.0, logits)
    if top_k is not None:
        smallest = np.sort(logits)[-top_k]
        margins.append(_gap_around(logits, smallest))
        logits = np.where(logits < smallest, -np.inf, logits)
    cumulative = _softmax(logits).cumsum()
    margins.append(np.abs(cumulative[:-1] / cumulative[-1] - u).min())
    return float(min(margins))


def _gap_around(values: NDArray[np.float64], value: float) -> float:
    """Distance from `value` to the nearest other one."""
    others = np.abs(np.delete(values, np.abs(values - value).argmin()) - value)
    return float(others.min())


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def logit_error(case: Case, tokens: torch.Tensor) -> float:
    """What two float32 runs may differ by: three times the distance of one from float64.

    One is off by that much, the other may be off by twice as much.
    """
    max_len = window_len(case.model, case.config)
    with torch.no_grad():
        exact = last_logits_double(case.model, tokens, max_len)
        rounded = last_logits(case.model, tokens, max_len).double()
    scale = float(exact.abs().max())
    # one row's rounding can be lucky: no less than a few roundings of numbers of that size
    return 3 * float((exact - rounded).abs().max()) + 16 * EPS * max(1.0, scale)


def last_logits_double(
    model: TrajectoryTransformer, tokens: torch.Tensor, max_len: int
) -> torch.Tensor:
    """`last_logits` in float64."""
    from tt_fast.planning.reference import window_start

    double = TrajectoryTransformer(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    start = window_start(tokens.shape[1], max_len, model.config.transition_dim)
    logits: torch.Tensor = double(tokens[:, start:])[:, -1]
    return logits


def score_error(case: Case, trace: PlanTrace) -> float:
    """What the scores of two float32 runs may differ by: an expectation of each step."""
    error = logit_error(case, torch.from_numpy(trace.beams)) / case.config.temperature
    largest = float(np.abs(case.discretizer.thresholds[:, -2:]).max())
    terms = case.config.horizon + 1
    return terms * largest * (float(np.expm1(2 * error)) + 2 * EPS)


def _truncation_of(case: Case, draw_idx: int) -> tuple[int | None, float | None]:
    dims, config = case.model.config, case.config
    within = draw_idx % dims.transition_dim  # actions, reward and value, then an observation
    if within < dims.action_dim:
        return config.k_act, config.cdf_act
    if within < dims.action_dim + 2:
        return config.k_rew, config.cdf_rew
    return config.k_obs, config.cdf_obs
