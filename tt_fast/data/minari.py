"""Minari's datasets, through its own package."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.data.arrays import RawDataset
from tt_fast.data.registry import RefScores
from tt_fast.validate import require

PREFIX = "minari:"
_VERSIONED = re.compile(r"-v\d+$")


def read_minari(dataset_id: str) -> RawDataset:
    """Every episode of a dataset, downloaded by Minari if it is not in its folder.

    Args:
        dataset_id: such as "mujoco/hopper/medium-v0", without the prefix "minari:".

    Raises:
        ImportError: the package is missing.
        ValueError: it cannot be had, or its observations or actions are no flat arrays.
    """
    source = f"{PREFIX}{dataset_id}"
    expected = f"an id with its version, such as {PREFIX}mujoco/hopper/medium-v0"
    require(_VERSIONED.search(dataset_id) is not None, "dataset", expected, source)
    dataset = _load(dataset_id, source)
    episodes = [_read_episode(episode, source) for episode in dataset.iterate_episodes()]
    require(len(episodes) > 0, source, "at least one episode", 0)
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    env_spec = dataset.env_spec
    return RawDataset(
        arrays=arrays,
        source=source,
        name=dataset_id,
        env_id=None if env_spec is None else env_spec.id,
        ref_scores=_ref_scores(dataset.storage.metadata),
    )


def _load(dataset_id: str, source: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            f'{source}: needs the minari package: pip install "tt_fast[minari]"'
        ) from error
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # each of its storage services raises its own types
        raise ValueError(
            f"{source}: could not be loaded: {error}. By hand: run `minari download {dataset_id}` "
            "on a machine with network and copy its folder below ~/.minari/datasets here; the "
            "environment variable MINARI_DATASETS_PATH chooses another folder."
        ) from error


def _read_episode(episode: Any, source: str) -> dict[str, NDArray[Any]]:
    """One episode as rows; the observation after the last action has no row."""
    name = f"{source}: episode {episode.id}"
    for key in ("observations", "actions"):
        values = getattr(episode, key)
        is_flat = isinstance(values, np.ndarray) and values.ndim == 2
        got = f"{values.ndim}-D" if isinstance(values, np.ndarray) else type(values).__name__
        require(is_flat, f"{name}: {key}", "an array of flat vectors (a 1-D Box space)", got)
    num_steps = len(episode.rewards)
    require(num_steps > 0, name, "at least one step", 0)
    num_observations = len(episode.observations)
    expected = f"{num_steps + 1} rows, one more than rewards"
    require(num_observations == num_steps + 1, f"{name}: observations", expected, num_observations)
    truncations = np.array(episode.truncations, np.bool_)
    truncations[-1] |= not episode.terminations[-1]  # stored apart, so it ends here
    return {
        "observations": episode.observations[:-1],
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminations": episode.terminations,
        "truncations": truncations,
    }


def _ref_scores(metadata: dict[str, Any]) -> RefScores | None:
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if None in scores else (float(scores[0]), float(scores[1]))  # type: ignore[arg-type]
