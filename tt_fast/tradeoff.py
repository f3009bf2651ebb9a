"""Latency against return: one model, several settings, whole episodes, to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_fast.bench import Setting
from tt_fast.checkpoint import Checkpoint
from tt_fast.config import Precision
from tt_fast.discretizer import Discretizer, Tokens
from tt_fast.evaluate import evaluate
from tt_fast.measure import Case, percentile
from tt_fast.planning import Planner
from tt_fast.planning.planner import VALUE_PLACEHOLDER
from tt_fast.results import EpisodeRecord, EvalResult, mean_text
from tt_fast.tables import Column, number, short
from tt_fast.validate import refuse

#: From a quick plan to the original's, and two that plan only now and then.
SETTINGS = (
    "H5-B32x2",
    "H5-B128x2",
    "H5-B128x2-F3",
    "H10-B64x2",
    "H15-B32x2",
    "H15-B128x2",
    "H15-B128x2-F5",
)

#: Steps of the episode that contexts are taken from.
_CONTEXT_STEPS = 50


@dataclass(frozen=True)
class ReturnRow:
    """One setting's decisions and episodes."""

    setting: str
    backend: str
    dtype: str
    num_plans: int
    """Decisions that planned, and were timed"""
    p50_ms: float
    """Of those decisions"""
    p95_ms: float | None
    p99_ms: float | None
    step_ms: float
    """Mean over all environment steps, planned or not"""
    env_id: str
    num_episodes: int
    mean_return: float
    std_error: float | None
    normalized_mean: float | None
    normalized_std_error: float | None
    mean_length: float
    """Environment steps of an episode"""
    max_steps: int | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class TimedPlanner(Planner):
    """A planner that remembers how long its decisions took; its replicas tell it theirs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decision_ms: list[float] = []
        """Of decisions that planned"""

    def act(self, observation: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.float32]:
        """See `Planner.act`."""
        num_plans, start = self.num_plans, perf_counter()
        actions = super().act(observation, active)
        if self.num_plans > num_plans:
            self.decision_ms.append(1000.0 * (perf_counter() - start))
        return actions

    def replicate(
        self, num_envs: int, action_bounds: tuple[ArrayLike, ArrayLike] | None = None
    ) -> TimedPlanner:
        """See `Planner.replicate`; the replica's times are this planner's."""
        replica = super().replicate(num_envs, action_bounds)
        assert isinstance(replica, TimedPlanner)
        replica.decision_ms = self.decision_ms
        return replica


@dataclass(frozen=True)
class PlayOptions:
    """What is played."""

    env_id: str | None = None
    """None takes the one of the model's dataset"""
    episodes: int = 2
    max_steps: int | None = None
    seed: int = 0
    num_threads: int | None = None
    dtype: Precision = "float32"
    """Of the plans, whatever their settings say"""
    progress: bool = True


def play_settings(
    checkpoint: Checkpoint, settings: Sequence[Setting], options: PlayOptions
) -> Iterator[ReturnRow]:
    """Rows of every setting, as they are finished; all play the same episodes.

    Raises:
        ImportError: Gymnasium or MuJoCo is missing.
        ValueError: no such environment, or settings that do not fit the model.
        KeyboardInterrupt: Ctrl-C; a setting that was not finished has no row.
    """
    planners = [
        TimedPlanner(
            checkpoint,
            replace(setting.plan, dtype=options.dtype),
            plan_freq=setting.plan_freq,
            num_threads=options.num_threads,
        )
        for setting in settings
    ]  # all of them first: a setting that does not fit is known before anything is played
    for setting, planner in zip(settings, planners, strict=True):
        result = evaluate(
            planner,
            options.env_id,
            options.episodes,
            seed=options.seed,
            max_steps=options.max_steps,
            progress=options.progress,
        )
        if result.interrupted:
            raise KeyboardInterrupt
        yield _return_row(setting, planner, result)


def make_case(checkpoint: Checkpoint, options: PlayOptions) -> Case:
    """The checkpoint's model with contexts of an episode that a small plan has played.

    Raises:
        ImportError, ValueError, KeyboardInterrupt: as in `play_settings`.
    """
    if checkpoint.discretizer is None:
        refuse("checkpoint", "one with a discretizer", "discretizer=None")
    setting = Setting.parse(SETTINGS[0])
    planner = Planner(checkpoint, setting.plan, num_threads=options.num_threads)
    max_steps = min(options.max_steps or _CONTEXT_STEPS, _CONTEXT_STEPS)
    result = evaluate(
        planner,
        options.env_id,
        seed=options.seed,
        max_steps=max_steps,
        record=True,
        progress=False,
    )
    assert result.record is not None
    length = setting.plan.max_context_transitions or checkpoint.model.config.num_transitions
    contexts = recorded_contexts(result.record, checkpoint.discretizer, length)
    return Case(result.env_id, checkpoint.model, checkpoint.discretizer, contexts)


def recorded_contexts(
    record: EpisodeRecord, discretizer: Discretizer, num_transitions: int
) -> tuple[Tokens, ...]:
    """Contexts that a planner saw in an episode, each (k * transition_dim + observation_dim,).

    Of full length, k = num_transitions, or the longest one if the episode was too short.
    """
    seen, num_steps = record.observations[:-1], len(record.actions)
    values = np.full(num_steps, VALUE_PLACEHOLDER)
    past = discretizer.encode(np.column_stack([seen, record.actions, record.rewards, values]))
    now = discretizer.encode(seen, slice(0, seen.shape[1]))
    length = min(num_transitions, num_steps - 1)
    return tuple(
        np.concatenate([past[step - length : step].ravel(), now[step]])
        for step in range(length, num_steps)
    )


RETURN_COLUMNS = (
    Column("setting", -13, lambda row: row.setting),
    Column("plans", 6, lambda row: str(row.num_plans)),
    Column("p50 ms", 7, lambda row: short(row.p50_ms)),
    Column("p95", 6, lambda row: short(row.p95_ms)),
    Column("p99", 6, lambda row: short(row.p99_ms)),
    Column("ms/step", 7, lambda row: short(row.step_ms)),
    Column("return", 18, lambda row: mean_text(row.mean_return, row.std_error)),
    Column("score", 14, lambda row: _score_text(row)),
    Column("length", 6, lambda row: number(row.mean_length)),
)

_LEGEND = """\
p50, p95, p99: milliseconds of a decision that planned, - where there are too few; ms/step: mean
over all environment steps, planned or not; -F3: a plan every 3 steps. return and score: mean ±
standard error; length: steps of an episode."""


def notes(rows: Sequence[ReturnRow]) -> str:
    """What was played, and what the columns mean."""
    if not rows:
        return _LEGEND
    row = rows[0]
    cut = "" if row.max_steps is None else f", ended after {row.max_steps} steps"
    played = f"{row.env_id}, {row.num_episodes} episodes a setting from seed {row.seed}{cut}"
    return f"{played}; {row.backend} backend, {row.dtype}\n{_LEGEND}"


def _return_row(setting: Setting, planner: TimedPlanner, result: EvalResult) -> ReturnRow:
    # the first decision packs the weights and allocates
    decision_ms = planner.decision_ms[1:] or planner.decision_ms
    return ReturnRow(
        setting=setting.name,
        backend=result.backend,
        dtype=result.plan_config.dtype,
        num_plans=len(decision_ms),
        p50_ms=median(decision_ms),
        p95_ms=percentile(decision_ms, 95.0),
        p99_ms=percentile(decision_ms, 99.0),
        step_ms=1000.0 * result.seconds / result.num_decisions,
        env_id=result.env_id,
        num_episodes=len(result.returns),
        mean_return=result.mean_return,
        std_error=result.std_error,
        normalized_mean=result.normalized_mean,
        normalized_std_error=result.normalized_std_error,
        mean_length=float(np.mean(result.lengths)),
        max_steps=result.max_steps,
        seed=result.seed,
    )


def _score_text(row: ReturnRow) -> str:
    if row.normalized_mean is None:
        return "-"
    return mean_text(row.normalized_mean, row.normalized_std_error)
