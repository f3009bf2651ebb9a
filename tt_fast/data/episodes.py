"""A dataset in memory: one row a step, episodes as slices of rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_fast.data.registry import RefScores, normalized_score
from tt_fast.validate import require

#: float32 or float64, as the source has them: rounded, they would get other tokens than live ones.
Numbers = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest of some numbers."""

    min: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Spread:
        """The spread of `values`, any shape, at least one element."""
        return cls(float(values.min()), float(values.mean()), float(values.max()))

    def __str__(self) -> str:
        return f"{self.min:.1f} / {self.mean:.1f} / {self.max:.1f}"


@dataclass(frozen=True)
class DatasetSummary:
    """A dataset in a few numbers; `str()` prints them as a table."""

    name: str
    env_id: str | None
    observation_dim: int
    action_dim: int
    num_episodes: int
    num_transitions: int
    returns: Spread
    """Undiscounted returns of whole episodes."""
    normalized: Spread | None
    """The returns as D4RL's score; None without reference scores."""
    lengths: Spread
    """Episode lengths, in steps."""
    num_terminations: int
    num_truncations: int
    num_nans: int
    """NaN entries of observations, actions and rewards."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values, as people read them."""
        return [
            ("dataset", self.name),
            ("environment", self.env_id or "unknown"),
            ("observation, action dim", f"{self.observation_dim}, {self.action_dim}"),
            ("episodes", f"{self.num_episodes:,}"),
            ("transitions", f"{self.num_transitions:,}"),
            ("return min / mean / max", str(self.returns)),
            ("normalised min / mean / max", str(self.normalized or "no reference scores")),
            ("length min / mean / max", str(self.lengths)),
            ("terminations, truncations", f"{self.num_terminations:,}, {self.num_truncations:,}"),
            ("NaN", f"{self.num_nans:,}"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Episodes one after the other, every row that the source holds.

    An episode ends at a termination or a truncation; the last row always ends one.

    Raises:
        ValueError: shapes or dtypes other than below, no rows, or an open last episode.
    """

    observations: Numbers
    """(num_steps, observation_dim): seen before the action."""
    actions: Numbers
    """(num_steps, action_dim)."""
    rewards: Numbers
    """(num_steps,): paid for the action."""
    terminations: NDArray[np.bool_]
    """bool (num_steps,): the environment ended here."""
    truncations: NDArray[np.bool_]
    """bool (num_steps,): the episode was cut here, by a time limit or the end of the data."""
    env_id: str | None = None
    """Gymnasium's id of the environment, such as "Hopper-v4"."""
    name: str = "unnamed"
    """What results call this dataset."""
    ref_scores: RefScores | None = None
    """Returns that count as 0 and 100 in the normalised score."""

    def __post_init__(self) -> None:
        steps = len(self.observations)
        require(steps > 0, "observations", "at least one row", self.observations.shape)
        numbers, flags = ("float32", "float64"), ("bool",)
        for key, dtypes, ndim in (
            ("observations", numbers, 2),
            ("actions", numbers, 2),
            ("rewards", numbers, 1),
            ("terminations", flags, 1),
            ("truncations", flags, 1),
        ):
            array = getattr(self, key)
            fits = array.dtype in dtypes and array.ndim == ndim and len(array) == steps
            got = f"{array.dtype} of shape {array.shape}"
            require(fits, key, f"{' or '.join(dtypes)}, {ndim}-D, {steps} rows", got)
        ends = bool(self.terminations[-1] or self.truncations[-1])
        require(ends, "truncations", "True in the last row, or a termination there", False)

    @property
    def num_steps(self) -> int:
        """Rows, all episodes together."""
        return len(self.observations)

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return int(self.actions.shape[1])

    @cached_property
    def episodes(self) -> tuple[slice, ...]:
        """The rows of each episode."""
        stops = np.flatnonzero(self.terminations | self.truncations) + 1
        starts = np.concatenate(([0], stops[:-1]))
        return tuple(map(slice, starts.tolist(), stops.tolist()))

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """int64 (num_episodes,), in steps."""
        return np.array([rows.stop - rows.start for rows in self.episodes], np.int64)

    @property
    def episode_returns(self) -> NDArray[np.float64]:
        """float64 (num_episodes,): undiscounted sum of the rewards."""
        starts = [rows.start for rows in self.episodes]
        returns: NDArray[np.float64] = np.add.reduceat(self.rewards.astype(np.float64), starts)
        return returns

    def normalized_score(self, returns: ArrayLike) -> NDArray[np.float64] | None:
        """D4RL's score of `returns`, elementwise; None without reference scores."""
        return None if self.ref_scores is None else normalized_score(returns, self.ref_scores)

    def summary(self) -> DatasetSummary:
        """Counts, returns and lengths."""
        returns = self.episode_returns
        scores = self.normalized_score(returns)
        arrays = (self.observations, self.actions, self.rewards)
        return DatasetSummary(
            name=self.name,
            env_id=self.env_id,
            observation_dim=self.observation_dim,
            action_dim=self.action_dim,
            num_episodes=len(self.episodes),
            num_transitions=self.num_steps,
            returns=Spread.of(returns),
            normalized=None if scores is None else Spread.of(scores),
            lengths=Spread.of(self.episode_lengths),
            num_terminations=int(self.terminations.sum()),
            num_truncations=int(self.truncations.sum()),
            num_nans=sum(int(np.isnan(array).sum()) for array in arrays),
        )
