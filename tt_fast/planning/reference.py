"""The oracle: the original's search line by line, nothing cached, nothing shared.

Source: trajectory/search/core.py and sampling.py. Every other backend must equal this one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tt_fast.config import PlanConfig
from tt_fast.discretizer import Discretizer, Floats, Tokens
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning.base import BeamPlan, BeamSequence, Draws, PlanTrace, ValueFn
from tt_fast.planning.sampling import draw, heated, truncate

_Module = TypeVar("_Module", bound=nn.Module)


class ReferenceBackend:
    """Plans with a full forward pass per token.

    Args:
        model: any device; plans see it in eval mode, whatever its own.
        discretizer: its thresholds turn probabilities into rewards; `search` needs none.
    """

    name = "reference"
    has_deadline = False

    def __init__(self, model: TrajectoryTransformer, discretizer: Discretizer | None) -> None:
        self.model = model
        self.discretizer = discretizer

    @torch.no_grad()
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
        """See `PlanBackend.plan`; contexts are planned one after another."""
        assert deadline_ms is None  # has_deadline is False
        dims = self.model.config
        num_draws = config.num_draws(dims.observation_dim, dims.action_dim)
        plans = []
        model = _evaluated(self.model, config.dtype)
        decoder = self.make_decoder(model, window_len(model, config))
        for i, context in enumerate(contexts):
            uniforms = draws.uniforms(i, num_draws, config.num_rows)
            plans.append(_BeamPlanner(self, decoder, config, uniforms, value_fn).run(context))
        tokens, scores, rewards, values, traces = zip(*plans, strict=True)
        return BeamPlan(
            np.stack(tokens), np.array(scores), np.stack(rewards), np.stack(values),
            tuple(traces) if trace else None,
        )  # fmt: skip

    def make_decoder(self, model: TrajectoryTransformer, max_len: int) -> Decoder:
        """What turns sequences into logits."""
        return Decoder(model, max_len)

    def select(self, scores: Floats, beam_width: int) -> Tokens:
        """Rows to keep, best first: by score descending, then row ascending."""
        return np.argsort(-scores, kind="stable")[:beam_width]

    def estimate(self, probs: Tensor, estimate: str | float) -> tuple[Tensor, Tensor]:
        """Reward and value of (rows, 2, vocab_size + 1) raw probabilities, as float32.

        The stop token's probability is dropped, not renormalised (discretization.py:145-187).
        """
        assert self.discretizer is not None
        pair = []
        for i, dim in enumerate((-2, -1)):
            bins = probs[:, i, :-1].cpu().numpy()
            if isinstance(estimate, str):
                numbers = self.discretizer.expectation(bins, dim)
            else:
                numbers = self.discretizer.percentile(bins, estimate, dim)
            pair.append(torch.from_numpy(numbers).float())
        return pair[0], pair[1]

    @torch.no_grad()
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
        """See `PlanBackend.search` (core.py:98-131); crops at the model's own window."""
        model = _evaluated(self.model, "float32")
        device = model.pos_emb.device
        x = torch.from_numpy(context)[None].to(device)
        wanted = None if goal is None else torch.from_numpy(goal).to(device)
        total = torch.zeros(1, 1, device=device)
        for _ in range(num_tokens):
            goals = None if wanted is None else wanted.expand(len(x), -1)
            logits = last_logits(model, x, model.config.block_size, goals)
            logits = heated(logits, temperature)
            log_probs = truncate(logits, top_k, cdf).log_softmax(dim=-1)
            candidates = total + log_probs  # (beams, vocab_size + 1)
            kept = min(int((candidates > -math.inf).sum()), beam_width)
            ordered, order = candidates.flatten().sort(descending=True, stable=True)
            num_ids = candidates.shape[1]
            rows, tokens = order[:kept] // num_ids, order[:kept] % num_ids
            x = torch.cat([x[rows], tokens[:, None]], dim=1)
            total = ordered[:kept, None]
        return BeamSequence(x[0].cpu().numpy(), total[:, 0].cpu().numpy())


class Decoder:
    """Sequences that grow a token at a time, and the logits of their next tokens.

    Args:
        model: in eval mode.
        max_len: most tokens that a forward pass sees.
    """

    def __init__(self, model: TrajectoryTransformer, max_len: int) -> None:
        self.model, self.max_len = model, max_len
        self.device = model.pos_emb.device
        self.x = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        """(rows, T) tokens"""

    def begin(self, context: Tensor, num_rows: int) -> None:
        """Start with `num_rows` copies of a context (T,)."""
        self.x = context.to(self.device).repeat(num_rows, 1)

    def expand(self, n_expand: int) -> None:
        """Copies as blocks: row i and row i + num_rows share a parent (core.py:54)."""
        self.x = self.x.repeat(n_expand, 1)

    def logits(self) -> Tensor:
        """(rows, vocab_size + 1) float32 logits of the next token."""
        return last_logits(self.model, self.x, self.max_len)

    def append(self, tokens: Tensor) -> None:
        """Add a token (rows,) to every row."""
        self.x = torch.cat([self.x, tokens[:, None]], dim=1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.x = self.x[rows]


class _BeamPlanner:
    """One plan of one context (core.py:11-96). R = beam_width * n_expand."""

    def __init__(
        self,
        backend: ReferenceBackend,
        decoder: Decoder,
        config: PlanConfig,
        uniforms: Floats,
        value_fn: ValueFn | None,
    ) -> None:
        self.backend, self.decoder, self.config = backend, decoder, config
        self.value_fn = value_fn
        self.uniforms = torch.from_numpy(uniforms).to(decoder.device)
        self.drawn: list[Tokens] = []

    def run(self, context: Tokens) -> tuple[Tokens, float, Tokens, Tokens, PlanTrace]:
        """Tokens (horizon, transition_dim), score, rewards, values (horizon,) and the trace."""
        config, decoder, dims = self.config, self.decoder, self.decoder.model.config
        assert config.discount is not None  # `beam_plan` and `Planner` fill it in
        decoder.begin(torch.from_numpy(context), config.beam_width)
        returns = np.zeros(config.beam_width)  # discounted rewards so far, float64
        path = np.zeros((config.beam_width, 2, 0), np.float32)  # rewards and values so far
        factor = 1.0  # discount ** t, a running product: the same on every backend
        steps = []
        for t in range(config.horizon):
            decoder.expand(config.n_expand)
            self._sample_n(dims.action_dim, config.k_act, config.cdf_act)
            probs = self._sample_n(2, config.k_rew, config.cdf_rew)
            rewards, values = self._estimate(probs)

            returns = np.tile(returns, config.n_expand) + factor * rewards.astype(np.float64)
            factor *= config.discount
            scores = returns + factor * values.astype(np.float64)
            parents = self.backend.select(scores, config.beam_width)
            steps.append((rewards, values, scores, parents))

            returns = returns[parents]
            path = np.tile(path, (config.n_expand, 1, 1))
            path = np.dstack([path, np.stack([rewards, values], axis=1)])[parents]
            decoder.keep(torch.from_numpy(parents).to(decoder.device))
            if t < config.horizon - 1:
                self._sample_n(dims.observation_dim, config.k_obs, config.cdf_obs)
        beams = decoder.x.cpu().numpy()
        plan = beams[0].reshape(-1, dims.transition_dim)[-config.horizon :]
        stacked = (np.stack(column) for column in zip(*steps, strict=True))
        trace = PlanTrace(tuple(self.drawn), *stacked, beams)  # type: ignore[call-arg]
        return plan, float(scores[parents[0]]), path[0, 0], path[0, 1], trace

    def _estimate(self, probs: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(R,) rewards and values from raw probabilities (R, 2, vocab_size + 1)."""
        if self.value_fn is None:
            pair: tuple[Any, Any] = self.backend.estimate(probs, self.config.estimate)
        else:
            pair = self.value_fn(probs.float().cpu().numpy())
        rewards, values = (np.asarray(numbers, np.float32) for numbers in pair)
        return rewards, values

    def _sample_n(self, count: int, top_k: int | None, cdf: float | None) -> Tensor:
        """Append `count` sampled tokens; their raw probs (rows, count, vocab_size + 1)."""
        raw = []
        for _ in range(count):
            logits = heated(self.decoder.logits(), self.config.temperature)
            raw.append(logits.softmax(dim=-1))
            probs = truncate(logits, top_k, cdf).softmax(dim=-1)
            tokens = draw(probs, self.uniforms[len(self.drawn), : len(probs)])
            self.drawn.append(tokens.cpu().numpy())
            self.decoder.append(tokens)
        return torch.stack(raw, dim=1)


def window_len(model: TrajectoryTransformer, config: PlanConfig) -> int:
    """Most tokens that a forward pass of this plan sees (core.py:30, sampling.py:60)."""
    block_size = model.config.block_size
    if config.overflow == "grow" or config.max_context_transitions is None:
        return block_size
    return min(block_size, config.max_context_transitions * model.config.transition_dim - 1)


def last_logits(
    model: TrajectoryTransformer, x: Tensor, max_len: int, goal: Tensor | None = None
) -> Tensor:
    """(rows, vocab_size + 1) float32 logits of the token after x (rows, T).

    A longer x loses whole transitions from the left, and positions count from 0 again
    (sampling.py:51-75).
    """
    start = window_start(x.shape[1], max_len, model.config.transition_dim)
    logits: Tensor = model(x[:, start:], goal)[:, -1]
    return logits.float()


def window_start(num_tokens: int, max_len: int, transition_dim: int) -> int:
    """First token of the window that a sequence of `num_tokens` is cropped to."""
    return -(-max(0, num_tokens - max_len) // transition_dim) * transition_dim


def _evaluated(model: TrajectoryTransformer, dtype: str) -> TrajectoryTransformer:
    """A copy in eval mode, in `dtype`; in float32 it shares the weights.

    The model's own mode stays as it is: other threads may plan with it, or train it.
    """
    if dtype == "bfloat16":
        return copy.deepcopy(model).to(torch.bfloat16).eval()
    return _twin(model)


def _twin(module: _Module) -> _Module:
    """The same parameters, buffers and hooks in another module, which is in eval mode."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        name: None if child is None else _twin(child) for name, child in module._modules.items()
    }
    return twin
