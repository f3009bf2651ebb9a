"""From a reader's raw arrays to a checked `OfflineDataset`.

Readers name keys as their format does: D4RL's `terminals` and `timeouts`, or Gymnasium's
`terminations` and `truncations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.data.episodes import Numbers, OfflineDataset
from tt_fast.data.registry import RefScores, trim_observations
from tt_fast.validate import require


@dataclass(frozen=True)
class RawDataset:
    """What a reader found, unchecked."""

    arrays: Mapping[str, Any]
    """Array-likes of `num_steps` rows each; keys that no dataset has are ignored."""
    source: str
    """Where they come from, for error messages: a path, a Minari id."""
    name: str = "unnamed"
    env_id: str | None = None
    ref_scores: RefScores | None = None
    max_episode_steps: int | None = None
    """Time limit in steps, for sources that do not store where it struck."""


def build_dataset(raw: RawDataset) -> OfflineDataset:
    """Check and convert every array.

    Raises:
        ValueError: naming source, key and row: a missing key, no rows, shapes that disagree, a
            dtype that is no number, NaN, infinity, or a flag other than 0 and 1.
    """
    observations = _matrix(raw, _require_key(raw, "observations"))
    num_steps = len(observations)
    actions = _matrix(raw, _require_key(raw, "actions"), num_steps)
    rewards = _vector(raw, _require_key(raw, "rewards"), num_steps)
    terminations = _flags(raw, _require_key(raw, "terminals", "terminations"), num_steps)
    key = _find_key(raw, "timeouts", "truncations")
    if key is not None:
        truncations = _flags(raw, key, num_steps)
    else:
        truncations = _infer_truncations(raw, observations, terminations)
    truncations[-1] |= not terminations[-1]  # the data ends, the episode does not
    return OfflineDataset(
        observations=_trim(raw, observations),
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        env_id=raw.env_id,
        name=raw.name,
        ref_scores=raw.ref_scores,
    )


def _find_key(raw: RawDataset, *names: str) -> str | None:
    """The one of several names of a key that is present."""
    found = [name for name in names if name in raw.arrays]
    require(len(found) <= 1, raw.source, f"one of {' and '.join(names)}", found)
    return found[0] if found else None


def _require_key(raw: RawDataset, *names: str) -> str:
    key = _find_key(raw, *names)
    if key is None:
        present = sorted(raw.arrays)
        raise ValueError(f"{raw.source}: expected the key {' or '.join(names)}, got {present}")
    return key


def _matrix(raw: RawDataset, key: str, num_steps: int | None = None) -> Numbers:
    """Finite (num_steps, width)."""
    name = f"{raw.source}: {key}"
    array = _numbers(name, raw.arrays[key])
    width = "action_dim" if key == "actions" else "observation_dim"
    fits = array.ndim == 2 and array.shape[1] > 0
    require(fits, name, f"shape (num_steps, {width})", array.shape)
    require(len(array) > 0, name, "at least one row", array.shape)
    _require_rows(name, array, num_steps)
    return _finite_floats(name, array)


def _vector(raw: RawDataset, key: str, num_steps: int) -> Numbers:
    """Finite (num_steps,)."""
    name = f"{raw.source}: {key}"
    return _finite_floats(name, _column(name, _numbers(name, raw.arrays[key]), num_steps))


def _flags(raw: RawDataset, key: str, num_steps: int) -> NDArray[np.bool_]:
    """bool (num_steps,), a copy; integers and floats may stand for it."""
    name = f"{raw.source}: {key}"
    array = _column(name, _numbers(name, raw.arrays[key]), num_steps)
    odd = (array != 0) & (array != 1)
    if odd.any():
        row = int(odd.argmax())
        raise ValueError(f"{name}: row {row}: expected 0 or 1, got {array[row]}")
    return array.astype(np.bool_)


def _column(name: str, array: NDArray[Any], num_steps: int) -> NDArray[Any]:
    """(num_steps,) from (num_steps,) or (num_steps, 1)."""
    is_column = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
    require(is_column, name, "shape (num_steps,) or (num_steps, 1)", array.shape)
    _require_rows(name, array, num_steps)
    return array.reshape(num_steps)


def _numbers(name: str, values: Any) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:  # rows of different lengths
        raise ValueError(f"{name}: expected an array, got {error}") from error
    require(array.dtype.kind in "biuf", name, "a numeric dtype", str(array.dtype))
    return array


def _require_rows(name: str, array: NDArray[Any], num_steps: int | None) -> None:
    if num_steps is not None and len(array) != num_steps:
        raise ValueError(f"{name}: expected {num_steps} rows as observations, got {len(array)}")


def _finite_floats(name: str, array: NDArray[Any]) -> Numbers:
    """Finite as float32; kept as float64 where that says more, as the original keeps it."""
    with np.errstate(over="ignore"):  # too large for float32: infinite, found here
        finite = np.isfinite(np.asarray(array, np.float32))
    if not finite.all():
        index = tuple(np.argwhere(~finite)[0].tolist())
        column = f", column {index[1]}" if len(index) > 1 else ""
        got = array[index]
        raise ValueError(f"{name}: row {index[0]}{column}: expected a finite float32, got {got}")
    is_exact = np.can_cast(array.dtype, np.float32)
    return np.ascontiguousarray(array, np.float32 if is_exact else np.float64)


def _infer_truncations(
    raw: RawDataset, observations: Numbers, terminations: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where episodes were cut, in sources that do not say.

    By the best evidence there is: an observation that does not follow from the row before, the
    environment's time limit, or nothing but terminations.
    """
    if "next_observations" in raw.arrays:
        cuts = _find_jumps(raw, observations)
    elif raw.max_episode_steps is not None:
        cuts = _steps_since_termination(terminations) % raw.max_episode_steps == 0
    else:
        cuts = np.zeros_like(terminations)
    return cuts & ~terminations


def _find_jumps(raw: RawDataset, observations: Numbers) -> NDArray[np.bool_]:
    """bool (num_steps,): the next row's observation is not the one that this row led to."""
    key = "next_observations"
    following = _matrix(raw, key, len(observations))
    same_width = following.shape == observations.shape
    require(same_width, f"{raw.source}: {key}", f"shape {observations.shape}", following.shape)
    jumps = np.zeros(len(observations), np.bool_)
    led_to, came = (np.asarray(a, np.float32) for a in (following[:-1], observations[1:]))
    jumps[:-1] = (led_to != came).any(axis=1)  # one of them may have been stored as float32
    return jumps


def _steps_since_termination(terminations: NDArray[np.bool_]) -> NDArray[np.int64]:
    """int64 (num_steps,): 1 in the row after a termination; 1 in the first row."""
    rows = np.arange(len(terminations))
    starts = np.where(np.roll(terminations, 1), rows, 0)
    starts[0] = 0
    return rows - np.maximum.accumulate(starts) + 1


def _trim(raw: RawDataset, observations: Numbers) -> Numbers:
    """The dimensions that the model sees; source: preprocessing.py:3-15."""
    kept = trim_observations(observations, raw.name, raw.env_id)
    if (observations.shape[1], kept.shape[1]) == (60, 30):  # kitchen's goal: must say nothing
        dropped = observations[:, 30:]
        varies = np.flatnonzero((dropped != dropped[0]).any(axis=0))
        name = f"{raw.source}: observations"
        require(varies.size == 0, name, "constant goal columns 30 to 59", (30 + varies).tolist())
    return np.ascontiguousarray(kept)
