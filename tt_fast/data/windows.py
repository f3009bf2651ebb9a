"""From a dataset to what the model trains on: transitions, then windows of tokens.

Source: trajectory/datasets/sequence.py and d4rl.py of the original, design section 3.4.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tt_fast.data.episodes import OfflineDataset
from tt_fast.validate import require, require_int

#: Rows that are looked at together where all of them at once would be too much memory.
CHUNK_ROWS = 2**15


@dataclass(frozen=True)
class Transitions:
    """Rows [observation, action, reward, value] of all paths, one after another.

    Rows and columns are joined, and made float64, when they are asked for.
    """

    parts: tuple[NDArray[np.floating[Any]], ...]
    """(num_steps, width) each: observations and actions as the dataset has them, rewards, values"""
    path_lengths: NDArray[np.int64]
    """(num_paths,), summing to num_steps"""

    @property
    def num_steps(self) -> int:
        """Rows, all paths together."""
        return len(self.parts[0])

    @property
    def values(self) -> NDArray[np.float64]:
        """(num_steps, transition_dim): all of it at once, 8 bytes a number."""
        return self.rows(0, self.num_steps)

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """(stop - start, transition_dim): some rows."""
        return np.concatenate([p[start:stop] for p in self.parts], axis=1, dtype=np.float64)

    def columns(self) -> Iterator[NDArray[np.float64]]:
        """(num_steps,) each: the dimensions, one after another."""
        for part in self.parts:
            for dim in range(part.shape[1]):
                yield part[:, dim].astype(np.float64)


def build_transitions(
    dataset: OfflineDataset,
    *,
    discount: float,
    termination_penalty: float | None,
    max_path_length: int = 1000,
) -> Transitions:
    """Join observation, action, reward and value of every step but the file's last raw row.

    The last raw row is left out as in the original (d4rl.py:49 runs to N - 1). The reward at a real
    termination is replaced by `termination_penalty` unless that is None (sequence.py:87-89). The
    value of step t is the discounted sum of the rewards after t, reward t excluded.

    Raises:
        ValueError: fewer than two rows, or an episode longer than `max_path_length`.
    """
    num_steps = dataset.num_steps - 1
    require(num_steps >= 1, "dataset", "at least 2 rows", dataset.num_steps)
    path_lengths = _path_lengths(dataset, num_steps)
    longest = int(path_lengths.max())
    fits = longest <= max_path_length
    require(fits, "max_path_length", f"at least the longest episode's {longest}", max_path_length)

    rewards = dataset.rewards[:num_steps].astype(np.float64)
    if termination_penalty is not None:
        rewards[dataset.terminations[:num_steps]] = termination_penalty
    values = discounted_values(rewards, path_lengths, discount)
    seen = dataset.observations[:num_steps], dataset.actions[:num_steps]
    return Transitions((*seen, rewards[:, None], values[:, None]), path_lengths)


def _path_lengths(dataset: OfflineDataset, num_steps: int) -> NDArray[np.int64]:
    """Lengths of the episodes within the first `num_steps` rows; the last may be open."""
    ends = np.flatnonzero((dataset.terminations | dataset.truncations)[:num_steps]) + 1
    bounds = np.unique(np.concatenate([[0], ends, [num_steps]]))
    return np.diff(bounds).astype(np.int64)


def discounted_values(
    rewards: NDArray[np.float64], path_lengths: NDArray[np.int64], discount: float
) -> NDArray[np.float64]:
    """Discounted sum of the rewards after each step, within its path.

    Args:
        rewards: (num_steps,).
        path_lengths: (num_paths,), summing to num_steps.
        discount: factor per step; the reward right after a step has weight 1 (sequence.py:106-110).

    Returns:
        (num_steps,) float64; 0 at the last step of a path.
    """
    values = np.empty(len(rewards))
    stops = np.cumsum(path_lengths)
    for start, stop in zip(stops - path_lengths, stops, strict=True):
        later = rewards[start + 1 : stop][::-1].tolist()  # the path's rewards but its first
        sums = accumulate(later, lambda after, reward: reward + discount * after, initial=0.0)
        values[start:stop][::-1] = list(sums)
    return values


class WindowBatch(NamedTuple):
    """Windows as the model takes them; T = num_transitions * transition_dim - 1."""

    inputs: torch.Tensor
    """(batch, T) int64 tokens"""
    targets: torch.Tensor
    """(batch, T) int64 tokens, `inputs` one position on"""
    mask: torch.Tensor
    """(batch, T) bool, False where the input token lies past the maximum path length"""


class TokenWindows:
    """All windows over tokens of paths, gathered by index.

    A window starts at every step of a path but its last (sequence.py:121-126) and takes every
    `step`-th transition; past the path's end all its tokens are the stop token.

    Args:
        tokens: (num_steps, transition_dim) tokens of all paths, kept in the smallest integer type.
        path_lengths: (num_paths,), summing to num_steps.
        num_transitions: transitions of a window.
        stop_token: id that fills a window past its path's end (vocab_size).
        step: environment steps between two transitions of a window.
        max_path_length: windows are masked past it (sequence.py:172-176).
        has_stop_row: `tokens` are (num_steps + 1, transition_dim), their last row stop tokens, and
            of the type that `token_dtype` names: they are then used as they are, without a copy.

    Raises:
        ValueError: shapes or types that do not fit, or no path of two or more steps.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        path_lengths: NDArray[np.int64],
        num_transitions: int,
        stop_token: int,
        *,
        step: int = 1,
        max_path_length: int = 1000,
        has_stop_row: bool = False,
    ) -> None:
        require(tokens.ndim == 2, "tokens", "shape (num_steps, transition_dim)", tokens.shape)
        total, num_steps = int(np.sum(path_lengths)), len(tokens) - has_stop_row
        require(num_steps == total, "tokens", f"{total} rows, as path_lengths sums", num_steps)
        require_int("num_transitions", num_transitions, 1)
        require_int("step", step, 1)
        self.num_transitions, self.stop_token, self.step = num_transitions, stop_token, step
        self.max_path_length = max_path_length
        self.transition_dim = int(tokens.shape[1])
        # every step past a path's end points to the row of stop tokens
        kept = tokens if has_stop_row else _with_stop_row(tokens, stop_token)
        dtype = token_dtype(stop_token)
        require(kept.dtype == dtype, "tokens", f"{dtype}, as they have a stop row", kept.dtype)
        self._tokens = torch.from_numpy(kept)
        self._path_lengths = torch.from_numpy(np.asarray(path_lengths, dtype=np.int64))
        self._path_starts = torch.cumsum(self._path_lengths, 0) - self._path_lengths
        counts = (self._path_lengths - 1).clamp(min=0)
        # (num_paths,): windows of a path and of those before it
        self._window_stops = torch.cumsum(counts, 0)
        self._num_windows = int(counts.sum())
        require(self._num_windows > 0, "path_lengths", "an episode of 2 or more steps", "none")

    def __len__(self) -> int:
        return self._num_windows

    @property
    def indices(self) -> NDArray[np.int64]:
        """(num_windows, 2): path index and first step of every window."""
        window_ids = torch.arange(len(self), device=self.device)
        return torch.stack(self._find(window_ids), dim=1).cpu().numpy()

    @property
    def window_len(self) -> int:
        """Tokens of a window's inputs: num_transitions * transition_dim - 1."""
        return self.num_transitions * self.transition_dim - 1

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed all tokens and lengths to a hash, to tell one dataset from another."""
        for tensor in (self._tokens, self._path_lengths):
            for rows in tensor.split(CHUNK_ROWS):
                digest.update(rows.cpu().numpy().tobytes())

    @property
    def device(self) -> torch.device:
        """Where windows are gathered."""
        return self._tokens.device

    def to(self, device: torch.device) -> TokenWindows:
        """The same windows, gathered on a device: a byte a token there, and no copy a step."""
        moved = copy.copy(self)
        for name in ("_tokens", "_path_lengths", "_path_starts", "_window_stops"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def gather(self, window_ids: torch.Tensor) -> WindowBatch:
        """The windows with these ids (batch,) int64, on `device`."""
        path_idx, start = self._find(window_ids.to(self.device))
        # path_steps: (batch, num_transitions), steps since the path's start
        path_steps = (
            start[:, None] + torch.arange(self.num_transitions, device=self.device) * self.step
        )
        inside = path_steps < self._path_lengths[path_idx, None]
        rows = self._path_starts[path_idx, None] + path_steps
        rows = torch.where(inside, rows, len(self._tokens) - 1)
        tokens = self._tokens[rows].long().flatten(1)
        trained = path_steps <= self.max_path_length - self.step
        mask = trained.repeat_interleave(self.transition_dim, dim=1)
        return WindowBatch(tokens[:, :-1], tokens[:, 1:], mask[:, :-1])

    def goals(self, window_ids: torch.Tensor, observation_dim: int) -> torch.Tensor:
        """(batch, observation_dim) int64: the last observation of each window's path.

        Source: GoalDataset, trajectory/datasets/sequence.py:189-201.
        """
        path_idx, _ = self._find(window_ids.to(self.device))
        last = self._path_starts[path_idx] + self._path_lengths[path_idx] - 1
        return self._tokens[last, :observation_dim].long()

    def _find(self, window_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Path index and first step of windows, (batch,) each."""
        window_ids = window_ids.contiguous()  # torch warns of others
        path_idx = torch.searchsorted(self._window_stops, window_ids, right=True)
        counts = (self._path_lengths[path_idx] - 1).clamp(min=0)
        return path_idx, window_ids - self._window_stops[path_idx] + counts


def token_dtype(stop_token: int) -> np.dtype[Any]:
    """The type in which tokens up to `stop_token` are kept."""
    return np.dtype(np.uint8 if stop_token <= 255 else np.int32)


def _with_stop_row(tokens: NDArray[np.integer], stop_token: int) -> NDArray[np.integer]:
    """A copy in the smallest type with one more row, of stop tokens."""
    num_steps, transition_dim = tokens.shape
    kept = np.empty((num_steps + 1, transition_dim), token_dtype(stop_token))
    kept[:-1], kept[-1] = tokens, stop_token
    return kept


def spaced_ids(count: int, most: int) -> torch.Tensor:
    """At most `most` evenly spaced ids of `count`, int64."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()


def marginal_entropies(
    windows: TokenWindows, max_windows: int = 100_000
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Loss of the best prediction that knows only a token's dimension.

    Args:
        windows: where targets are counted, the masked ones left out.
        max_windows: at most so many, evenly spaced.

    Returns:
        Entropy of each dimension's target tokens, nats, and how many were counted; both
        (transition_dim,).
    """
    dims, num_ids = windows.transition_dim, windows.stop_token + 1
    target_dims = (torch.arange(windows.window_len) + 1) % dims
    counts = torch.zeros(dims * num_ids, dtype=torch.int64)
    for window_ids in spaced_ids(len(windows), max_windows).split(4096):
        batch = windows.gather(window_ids)
        cells = (batch.targets + target_dims * num_ids)[batch.mask]
        counts += torch.bincount(cells, minlength=dims * num_ids)
    table = counts.view(dims, num_ids).numpy()
    totals = table.sum(axis=1)
    share = table / np.maximum(totals, 1)[:, None]
    entropies = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
    return entropies, totals
