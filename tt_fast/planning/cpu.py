"""The C++ backend: whole plans on the processor, equal prefixes computed once, no Python inside.

The core is csrc/, built as `tt_fast._core`; where no compiler was at hand it is missing, and
`is_available` says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.config import PlanConfig, Precision
from tt_fast.discretizer import Discretizer, Tokens
from tt_fast.limits import available_cpus, memory_limit
from tt_fast.model import TrajectoryTransformer, attention_mask
from tt_fast.planning.base import BeamPlan, BeamSequence, Draws, PlanTrace, ValueFn
from tt_fast.planning.fingerprint import fingerprint
from tt_fast.planning.reference import window_len

try:
    import tt_fast._core as _core
except ImportError:
    _core = None  # type: ignore[assignment]


def is_available() -> bool:
    """Whether the package was built with its C++ core."""
    return _core is not None


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and run here, fastest first; [] without the core."""
    return _core.isas() if is_available() else []


@dataclass(frozen=True)
class PlanStats:
    """What plans have cost since `CpuBackend.reset_stats`. Seconds of parts are summed over
    threads."""

    seconds: float
    """Wall time"""
    rows_asked: int
    """Tokens that a cached search runs through the model if beams share nothing"""
    decoded_nodes: int
    """Distinct newest tokens that were computed"""
    reencoded_nodes: int
    """Distinct nodes of windows encoded after a crop"""
    gemm_flops: float
    """Floating point operations of matrix products, padding not counted"""
    attention_flops: float
    gemm_seconds: float
    """Of matrix products; what makes their inputs is not in it"""
    attention_seconds: float
    bytes: int
    """Allocated for keys, values, activations and what is kept of the first layer, whether touched
    or not"""

    @property
    def rows_computed(self) -> int:
        """Rows that went through the model."""
        return self.decoded_nodes + self.reencoded_nodes

    @property
    def flops(self) -> float:
        """Floating point operations of the rows really computed."""
        return self.gemm_flops + self.attention_flops


class CpuBackend:
    """Plans in C++.

    Weights are packed on first use, and again after they have changed.

    Args:
        model: its weights are copied to the processor.
        discretizer: its thresholds turn probabilities into rewards; `search` needs none.
        num_threads: None takes every processor that this process, or its container, may use.
        isa: an instruction set of `available_isas`, or "auto".

    Raises:
        ImportError: the package was built without a compiler.
        ValueError: a model with NaN or infinite weights (when it plans), an unknown isa.
    """

    name = "cpu"
    has_deadline = True

    def __init__(
        self,
        model: TrajectoryTransformer,
        discretizer: Discretizer | None,
        *,
        num_threads: int | None = None,
        isa: str = "auto",
    ) -> None:
        if not is_available():
            raise ImportError(
                "backend: the C++ planner was not built (no compiler at installation?); "
                'reinstall with one, or use backend="torch"'
            )
        self.model = model
        self.discretizer = discretizer
        self.num_threads = available_cpus() if num_threads is None else num_threads
        self.isa = isa
        hidden = ~attention_mask(model.config)[-1].numpy()
        self._hidden: NDArray[np.uint8] = hidden.astype(np.uint8)
        self._searches: dict[str, Any] = {}  # by dtype, of this process
        self._process = os.getpid()
        self._packed_weights: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its weights itself."""
        return {**self.__dict__, "_searches": {}, "_packed_weights": ()}

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
        """See `PlanBackend.plan`; all contexts share passes."""
        assert self.discretizer is not None
        plans = self._search(config.dtype).plan(
            list(contexts),
            horizon=config.horizon,
            beam_width=config.beam_width,
            n_expand=config.n_expand,
            discount=config.discount,
            max_len=window_len(self.model, config),
            temperature=config.temperature,
            k_obs=config.k_obs,
            k_act=config.k_act,
            k_rew=config.k_rew,
            cdf_obs=config.cdf_obs,
            cdf_act=config.cdf_act,
            cdf_rew=config.cdf_rew,
            percentile=None if isinstance(config.estimate, str) else float(config.estimate),
            thresholds=np.ascontiguousarray(self.discretizer.thresholds[:, -2:].T),
            seeds=[seed % 2**64 for seed in draws.seeds],
            plan_indices=[index % 2**32 for index in draws.plan_indices],
            uniforms=None if draws.given is None else np.ascontiguousarray(draws.given),
            trace=trace,
            value_fn=value_fn,
            deadline_seconds=None if deadline_ms is None else deadline_ms / 1000.0,
        )
        num_steps = np.array([len(plan["tokens"]) for plan in plans], np.int64)
        traces = zip(contexts, plans, strict=True)
        return BeamPlan(
            _stack([plan["tokens"] for plan in plans], self.model.config.vocab_size),
            np.array([plan["score"] for plan in plans]),
            _stack([plan["rewards"] for plan in plans], np.nan),
            _stack([plan["values"] for plan in plans], np.nan),
            tuple(self._trace(context, plan) for context, plan in traces) if trace else None,
            num_steps,
            np.array([plan["num_beams"] for plan in plans], np.int64),
        )

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
        """See `PlanBackend.search`."""
        tokens, log_probs = self._search("float32").search(
            context,
            num_tokens=num_tokens,
            beam_width=beam_width,
            goal=goal,
            top_k=top_k,
            cdf=cdf,
            temperature=temperature,
        )
        return BeamSequence(np.concatenate([context, tokens]), log_probs)

    def logits(
        self, context: Tokens, goal: Tokens | None = None, dtype: Precision = "float32"
    ) -> NDArray[np.float32]:
        """(vocab_size + 1,) logits of the token after a context, (context_len,) int64.

        A context longer than the model's window is cropped as in `search`.
        """
        logits: NDArray[np.float32] = self._search(dtype).logits(context, goal)
        return logits

    def stats(self) -> PlanStats:
        """What plans and searches have cost so far, all dtypes together."""
        totals: dict[str, Any] = dict.fromkeys(PlanStats.__dataclass_fields__, 0)
        for search in self._own_searches().values():
            totals = {key: totals[key] + value for key, value in search.stats().items()}
        return PlanStats(**totals)

    def reset_stats(self) -> None:
        """Count from zero again."""
        for search in self._own_searches().values():
            search.reset_stats()

    def _trace(self, context: Tokens, plan: dict[str, Any]) -> PlanTrace:
        # the core's beams begin with the current observation, the context's last tokens
        past = context[: len(context) - self.model.config.observation_dim]
        beams = np.concatenate([np.tile(past, (len(plan["beams"]), 1)), plan["beams"]], axis=1)
        return PlanTrace(
            plan["drawn"],
            plan["candidate_rewards"],
            plan["candidate_values"],
            plan["candidate_scores"],
            plan["parents"],
            beams,
        )

    def _search(self, dtype: str) -> Any:
        """The core's search for a dtype, with the model's weights as they are now."""
        searches = self._own_searches()
        weights = fingerprint(self.model.parameters())
        if weights != self._packed_weights:
            searches.clear()
            self._packed_weights = weights
        if dtype not in searches:
            searches[dtype] = _core.BeamSearch(
                self._pack(dtype), self._hidden, self.num_threads, memory_limit() or math.inf
            )
        return searches[dtype]

    def _own_searches(self) -> dict[str, Any]:
        """A forked child has none: its parent's may have been in the middle of a plan."""
        if self._process != os.getpid():
            self._searches.clear()
            self._process = os.getpid()
        return self._searches

    def _pack(self, dtype: str) -> Any:
        config = self.model.config
        weights = {
            name: np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            for name, tensor in self.model.state_dict().items()
        }
        return _core.Model(
            observation_dim=config.observation_dim,
            action_dim=config.action_dim,
            vocab_size=config.vocab_size,
            num_transitions=config.num_transitions,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            embed_dim=config.embed_dim,
            goal_len=config.goal_len,
            weights=weights,
            dtype=dtype,
            isa=self.isa,
        )


def _stack(rows: Sequence[NDArray[Any]], padding: float) -> NDArray[Any]:
    """Arrays of different lengths as one, `padding` after the short ones."""
    longest = max(len(row) for row in rows)
    out = np.full((len(rows), longest, *rows[0].shape[1:]), padding, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
