"""What an evaluation found: episodes, their statistics, their JSON form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tt_fast.config import PlanConfig, config_from_dict, config_to_dict
from tt_fast.data.registry import normalized_score
from tt_fast.files import read_json, to_json, write_text
from tt_fast.validate import require

if TYPE_CHECKING:
    from tt_fast.planning import ImaginedPlan

Scored = TypeVar("Scored", bound="ScoredEpisodes")

#: What all results of an `EvalSummary` have in common.
_SETTING = (
    "env_id",
    "dataset",
    "ref_scores",
    "plan_config",
    "plan_freq",
    "prefix_context",
    "max_steps",
    "deadline_ms",
)


@dataclass(frozen=True)
class EpisodeRecord:
    """Everything that happened in one episode of T steps, and what the planner imagined."""

    observations: NDArray[np.float64]
    """(T + 1, observation_dim), trimmed as the planner saw them; the last is the final one"""
    actions: NDArray[np.float32]
    """(T, action_dim)"""
    rewards: NDArray[np.float64]
    """(T,)"""
    qpos: NDArray[np.float64] | None
    """(T + 1, nq) MuJoCo positions; None in another engine"""
    qvel: NDArray[np.float64] | None
    """(T + 1, nv) MuJoCo velocities"""
    plans: tuple[ImaginedPlan, ...]
    """The plan held at each step; the same object for several where plan_freq > 1"""


@dataclass(frozen=True)
class ScoredEpisodes:
    """Returns of episodes and their statistics."""

    env_id: str
    """Gymnasium id of the environment that was run"""
    dataset: str | None
    """Name of the dataset that the model was trained on"""
    returns: tuple[float, ...]
    """Undiscounted return of each episode"""
    ref_scores: tuple[float, float] | None
    """Returns that score 0 and 100"""

    @property
    def mean_return(self) -> float:
        """Mean of `returns`."""
        return float(np.mean(self.returns))

    @property
    def std_error(self) -> float | None:
        """Standard error of `mean_return`; None for one episode."""
        return standard_error(self.returns)

    @property
    def normalized_scores(self) -> tuple[float, ...] | None:
        """Each return on the scale of `ref_scores`; None without them."""
        if self.ref_scores is None:
            return None
        return tuple(normalized_score(np.array(self.returns), self.ref_scores).tolist())

    @property
    def normalized_mean(self) -> float | None:
        """Mean of `normalized_scores`."""
        scores = self.normalized_scores
        return None if scores is None else float(np.mean(scores))

    @property
    def normalized_std_error(self) -> float | None:
        """Standard error of `normalized_mean`; None for one episode."""
        scores = self.normalized_scores
        return None if scores is None else standard_error(scores)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields and properties above."""
        return {
            "env_id": self.env_id,
            "dataset": self.dataset,
            "num_episodes": len(self.returns),
            "mean_return": self.mean_return,
            "std_error": self.std_error,
            "normalized_mean": self.normalized_mean,
            "normalized_std_error": self.normalized_std_error,
            "returns": list(self.returns),
            "normalized_scores": self.normalized_scores and list(self.normalized_scores),
            "ref_scores": self.ref_scores and list(self.ref_scores),
        }

    @classmethod
    def from_dict(cls: type[Scored], values: Mapping[str, Any]) -> Scored:
        """The inverse of `to_dict`.

        Raises:
            ValueError: something is missing, or is not what `to_dict` writes.
        """
        names = {field.name for field in dataclasses.fields(cls)} & set(values)
        given = {name: _from_json(name, values[name]) for name in names}
        try:
            found = cls(**given)
        except TypeError as error:  # its message names what is missing
            raise ValueError(f"{cls.__name__}: expected all of its values: {error}") from error
        is_number = [isinstance(value, (int, float)) for value in found.returns]
        require(any(is_number) and all(is_number), "returns", "numbers", values["returns"])
        return found

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as a JSON file, whole or not at all."""
        write_text(path, to_json(self.to_dict()))

    def __str__(self) -> str:
        count = f"{len(self.returns)} episode{'s' if len(self.returns) > 1 else ''}"
        text = f"{self.env_id}, dataset {self.dataset}, {count}: return "
        text += mean_text(self.mean_return, self.std_error)
        if self.normalized_mean is not None:
            text += f", score {mean_text(self.normalized_mean, self.normalized_std_error)}"
        return text


@dataclass(frozen=True)
class EvalResult(ScoredEpisodes):
    """One planner's episodes in one environment, in the order of their seeds."""

    seed: int
    """Episode j had seed + j"""
    lengths: tuple[int, ...]
    """Steps of each episode"""
    terminated: tuple[bool, ...]
    """The task ended the episode; False: a time limit or `max_steps` did"""
    plan_config: PlanConfig
    plan_freq: int
    """Steps between two plans"""
    prefix_context: bool
    """Plans were conditioned on past transitions"""
    backend: str
    """Planning backend that ran"""
    num_envs: int
    """Environments side by side, at most one an episode"""
    num_decisions: int
    """Actions chosen, those of unfinished episodes included"""
    seconds: float
    """Time inside the planner"""
    wall_seconds: float
    """Time of planner and environments"""
    max_steps: int | None = None
    """Cap of an episode's steps, if one was set"""
    deadline_ms: float | None = None
    """Time for a decision, if one was set; plans then depend on the clock"""
    interrupted: bool = False
    """Ended early: only the finished episodes are here, so short ones are over-represented"""
    checkpoint: str | None = None
    """Where the model lies, if that is known"""
    checkpoint_step: int | None = None
    """Optimiser steps that the model was trained for"""
    versions: dict[str, str | None] = field(default_factory=dict)
    """Packages that ran"""
    record: EpisodeRecord | None = None
    """The first episode, if it was asked for"""

    @property
    def decisions_per_second(self) -> float:
        """Actions chosen per second inside the planner."""
        return self.num_decisions / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON values of everything but `record`."""
        return {
            **super().to_dict(),
            "seed": self.seed,
            "lengths": list(self.lengths),
            "terminated": list(self.terminated),
            "max_steps": self.max_steps,
            "deadline_ms": self.deadline_ms,
            "interrupted": self.interrupted,
            "plan_config": config_to_dict(self.plan_config),
            "plan_freq": self.plan_freq,
            "prefix_context": self.prefix_context,
            "backend": self.backend,
            "num_envs": self.num_envs,
            "num_decisions": self.num_decisions,
            "decisions_per_second": self.decisions_per_second,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "checkpoint": self.checkpoint,
            "checkpoint_step": self.checkpoint_step,
            "versions": self.versions,
        }

    def __str__(self) -> str:
        note = " (interrupted)" if self.interrupted else ""
        return f"{super().__str__()}, {self.decisions_per_second:.3g} decisions/s{note}"


@dataclass(frozen=True)
class EvalSummary(ScoredEpisodes):
    """Results of one setting, models x episodes, pooled as in the paper's tables."""

    results: tuple[EvalResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the pooled statistics, then every result's own."""
        results = [result.to_dict() for result in self.results]
        return {**super().to_dict(), "num_results": len(results), "results": results}

    @classmethod
    def load(cls, path: str | Path) -> EvalSummary:
        """A file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another file.
        """
        results = read_json(path).get("results")
        require(isinstance(results, list), str(path), "a list of results", results)
        try:
            return aggregate([EvalResult.from_dict(values) for values in results or []])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected results of evaluations: {error}") from error


def aggregate(results: Sequence[EvalResult]) -> EvalSummary:
    """Pool the episodes of several models and seeds: mean +- standard error over all of them.

    The same model must not appear with overlapping seeds: the episodes would be the same. The
    standard error divides by n - 1, the original's by n (plotting/read_results.py:35-36).

    Raises:
        ValueError: no results, or of different environments, datasets or plan settings.
    """
    require(len(results) > 0, "results", "at least one EvalResult", "none")
    first = results[0]
    for result in results[1:]:
        for name in _SETTING:
            same = getattr(result, name) == getattr(first, name)
            wanted = f"one {name}, {getattr(first, name)!r}"
            require(same, "results", wanted, getattr(result, name))
    returns = tuple(value for result in results for value in result.returns)
    return EvalSummary(first.env_id, first.dataset, returns, first.ref_scores, tuple(results))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, n - 1 in its variance; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def plan_text(plan: PlanConfig) -> str:
    """A plan's size in words."""
    return f"horizon {plan.horizon}, beam {plan.beam_width}x{plan.n_expand}"


def mean_text(mean: float, std_error: float | None) -> str:
    """A mean and, if there is one, its standard error."""
    return f"{mean:,.1f}" if std_error is None else f"{mean:,.1f} ± {std_error:,.1f}"


def _from_json(name: str, value: Any) -> Any:
    """A field of a result: JSON has no tuples and no configs."""
    if name == "plan_config":
        return config_from_dict(PlanConfig, value)
    return tuple(value) if isinstance(value, list) else value
