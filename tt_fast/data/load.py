"""`load_dataset`: one door for files, D4RL's names, Minari's ids and arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tt_fast.data.arrays import RawDataset, build_dataset
from tt_fast.data.download import fetch_dataset
from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.hdf5 import read_hdf5
from tt_fast.data.minari import PREFIX, read_minari
from tt_fast.data.registry import (
    RefScores,
    find_dataset,
    find_dataset_file,
    find_max_episode_steps,
    find_ref_scores,
    nearest_names,
)
from tt_fast.validate import require, require_number

Source = str | os.PathLike[str] | Mapping[str, Any] | OfflineDataset


def load_dataset(
    source: Source, *, env_id: str | None = None, ref_scores: RefScores | None = None
) -> OfflineDataset:
    """Load a dataset and check all of it.

    Args:
        source: one of
            a path of an HDF5 file in D4RL's layout;
            a D4RL name, "hopper-medium-v2", looked for in `D4RL_DATASET_DIR` or ~/.d4rl/datasets
            and downloaded from D4RL's server when it is not there;
            a Minari id, "minari:mujoco/hopper/medium-v0";
            a dict of array-likes with the same number of rows: observations
            (num_steps, observation_dim), actions (num_steps, action_dim), rewards, terminals or
            terminations, and, optionally, timeouts or truncations, next_observations; `env_id`,
            `name` and `ref_scores` may be in it too;
            an `OfflineDataset`, to give it another `env_id` or `ref_scores`.
        env_id: Gymnasium id of the environment; else what the source says.
        ref_scores: returns (min, max) that count as 0 and 100 in the normalised score; else the
            source's, if they are of this environment, or D4RL's where there are any.

    Without `timeouts`, an episode is cut where next_observations do not lead to the next row; where
    there are none, at the environment's time limit if it is known. The last row ends an episode.

    Raises:
        ValueError: an unknown name, or bad data: the message names file, key and row.
        FileNotFoundError: no file at that path.
        ConnectionError: a download failed; the message says what to do by hand.
        ImportError: a Minari id without the minari package.

    Source: trajectory/datasets/d4rl.py:25-77, whose last row this keeps (see `windows`).
    """
    if ref_scores is not None:
        ref_scores = check_ref_scores(ref_scores)
    raw = source if isinstance(source, OfflineDataset) else _read(source)
    # a source's own are those of its environment
    same_env = env_id is None or raw.env_id in (None, env_id)
    env_id = env_id or raw.env_id
    ref_scores = ref_scores or (raw.ref_scores if same_env else None) or find_ref_scores(env_id)
    if isinstance(raw, OfflineDataset):
        return dataclasses.replace(raw, env_id=env_id, ref_scores=ref_scores)
    return build_dataset(
        dataclasses.replace(
            raw,
            env_id=env_id,
            ref_scores=ref_scores,
            max_episode_steps=raw.max_episode_steps or find_max_episode_steps(env_id),
        )
    )


def _read(source: Any) -> RawDataset:
    if isinstance(source, Mapping):
        return _read_mapping(source)
    is_path = isinstance(source, (str, os.PathLike))
    expected = "a path, a D4RL name, a Minari id or a dict of arrays"
    require(is_path, "source", expected, type(source).__name__)
    text = os.fspath(source)
    if text.startswith(PREFIX):
        return read_minari(text.removeprefix(PREFIX))
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise ValueError(f"source: expected {expected}, got {text!r}: {error}") from error
    info = find_dataset(text)
    if info is not None and not path.is_file():  # a run folder may bear a dataset's name
        path = fetch_dataset(info)
    if not path.is_file():
        _refuse_unknown(source, path)
    return _read_file(path)


def _read_mapping(source: Mapping[str, Any]) -> RawDataset:
    scores = source.get("ref_scores")
    return RawDataset(
        arrays=source,
        source="source",
        name=source.get("name") or "unnamed",
        env_id=source.get("env_id"),
        ref_scores=None if scores is None else check_ref_scores(scores),
    )


def _read_file(path: Path) -> RawDataset:
    """A file; one that is named as D4RL's is D4RL's."""
    arrays, env_id = read_hdf5(path)
    info = find_dataset_file(path.name)
    return RawDataset(
        arrays=arrays,
        source=str(path),
        name=info.name if info else path.stem,
        env_id=env_id or (info.env_id if info else None),
        ref_scores=info.ref_scores if info else None,
        max_episode_steps=info.max_episode_steps if info else None,
    )


def _refuse_unknown(source: str | os.PathLike[str], path: Path) -> None:
    nearest = ", ".join(nearest_names(path.stem))
    if not isinstance(source, str) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"source: no file {path}; D4RL's nearest names: {nearest}")
    raise ValueError(
        f"source: expected an existing file, a name of D4RL's or minari:<id>, got {source!r}; "
        f"nearest names: {nearest}"
    )


def check_ref_scores(ref_scores: Any) -> RefScores:
    """`ref_scores` as floats; ValueError unless they are two different finite ones, in order."""
    name = "ref_scores"
    is_pair = isinstance(ref_scores, (tuple, list)) and len(ref_scores) == 2
    require(is_pair, name, "(min, max)", ref_scores)
    low, high = ref_scores
    for score in ref_scores:
        require_number(name, score)
    require(low < high, name, "(min, max) with min < max", ref_scores)
    return float(low), float(high)
