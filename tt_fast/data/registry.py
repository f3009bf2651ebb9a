"""D4RL's datasets by name: where each file is, its environment, its reference scores.

Source: D4RL's `d4rl/infos.py` (addresses, reference scores) and the `__init__.py` of its families
(time limits), at 89141a6.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"

RefScores = tuple[float, float]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of one of D4RL's datasets before its file is read."""

    name: str
    """D4RL's name, such as `hopper-medium-v2`."""
    url: str
    """Its file on D4RL's server."""
    env_id: str
    """The Gymnasium environment nearest to D4RL's."""
    ref_scores: RefScores
    """Returns that count as 0 and 100 in the normalised score."""
    max_episode_steps: int
    """D4RL's time limit, in environment steps."""

    @property
    def file_name(self) -> str:
        """The file's name in D4RL's dataset folder."""
        return self.url.rsplit("/", 1)[-1]


_MUJOCO_ENVS = {  # name: (Gymnasium's name, reference scores)
    "halfcheetah": ("HalfCheetah", (-280.178953, 12135.0)),
    "hopper": ("Hopper", (-20.272305, 3234.3)),
    "walker2d": ("Walker2d", (1.629008, 4592.3)),
    "ant": ("Ant", (-325.6, 3879.7)),
}
_MUJOCO_KINDS = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
_MUJOCO_STEPS = 1000

_ANTMAZES = {  # name: (maze, multistart and multigoal, Gymnasium-Robotics id, time limit)
    "umaze": ("u-maze", (False, False), "AntMaze_UMaze-v4", 700),
    "umaze-diverse": ("u-maze", (True, True), "AntMaze_UMaze-v4", 700),
    "medium-play": ("big-maze", (True, False), "AntMaze_Medium-v4", 1000),
    "medium-diverse": ("big-maze", (True, True), "AntMaze_Medium_Diverse_GR-v4", 1000),
    "large-play": ("hardest-maze", (True, False), "AntMaze_Large-v4", 1000),
    "large-diverse": ("hardest-maze", (True, True), "AntMaze_Large_Diverse_GR-v4", 1000),
}

_MAZE2DS = {  # name: (Gymnasium-Robotics name, time limit, sparse and dense reference scores)
    "umaze": ("UMaze", 300, (23.85, 161.86), (68.537689, 193.66285642381482)),
    "medium": ("Medium", 600, (13.13, 277.39), (44.264742, 297.4552547777125)),
    "large": ("Large", 800, (6.7, 273.99), (30.569041, 303.4857382709002)),
}

_ADROITS = {  # name: (Gymnasium-Robotics name, time limit, reference scores)
    "pen": ("Pen", 100, (96.262799, 3076.8331017826877)),
    "hammer": ("Hammer", 200, (-274.856578, 12794.134825156867)),
    "door": ("Door", 200, (-56.512833, 2880.5693087298737)),
    "relocate": ("Relocate", 200, (-6.425911, 4233.877797728884)),
}
_ADROIT_V0_FILES = {
    "human": "{}-v0_demos_clipped.hdf5",
    "cloned": "{}-demos-v0-bc-combined.hdf5",
    "expert": "{}-v0_expert_clipped.hdf5",
}

_KITCHEN_FILES = {
    "complete": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "partial": "kitchen_microwave_kettle_light_slider-v0.hdf5",
    "mixed": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
}


def _mujoco() -> Iterator[DatasetInfo]:
    for env, (gym_name, ref_scores) in _MUJOCO_ENVS.items():
        for kind in _MUJOCO_KINDS:
            url = f"{SERVER}/gym_mujoco_v2/{env}_{kind.replace('-', '_')}-v2.hdf5"
            name = f"{env}-{kind}-v2"
            yield DatasetInfo(name, url, f"{gym_name}-v4", ref_scores, _MUJOCO_STEPS)


def _antmaze() -> Iterator[DatasetInfo]:
    for version, folder, ending in (("v0", "ant_maze_new", ""), ("v2", "ant_maze_v2", "_fixed")):
        for kind, (maze, (starts, goals), env_id, steps) in _ANTMAZES.items():
            url = (
                f"{SERVER}/{folder}/Ant_maze_{maze}_noisy_multistart_{starts}"
                f"_multigoal_{goals}_sparse{ending}.hdf5"
            )
            yield DatasetInfo(f"antmaze-{kind}-{version}", url, env_id, (0.0, 1.0), steps)


def _maze2d() -> Iterator[DatasetInfo]:
    for maze, (gym_name, steps, sparse, dense) in _MAZE2DS.items():
        url = f"{SERVER}/maze2d/maze2d-{maze}"
        env_id = f"PointMaze_{gym_name}"
        yield DatasetInfo(
            f"maze2d-{maze}-v1", f"{url}-sparse-v1.hdf5", f"{env_id}-v3", sparse, steps
        )
        yield DatasetInfo(
            f"maze2d-{maze}-dense-v1", f"{url}-dense-v1.hdf5", f"{env_id}Dense-v3", dense, steps
        )


def _adroit() -> Iterator[DatasetInfo]:
    for task, (gym_name, steps, ref_scores) in _ADROITS.items():
        for kind, v0_file in _ADROIT_V0_FILES.items():
            urls = {
                "v0": f"{SERVER}/hand_dapg/{v0_file.format(task)}",
                "v1": f"{SERVER}/hand_dapg_v1/{task}-{kind}-v1.hdf5",
            }
            for version, url in urls.items():
                name, env_id = f"{task}-{kind}-{version}", f"AdroitHand{gym_name}-v1"
                yield DatasetInfo(name, url, env_id, ref_scores, steps)


def _kitchen() -> Iterator[DatasetInfo]:
    for kind, file in _KITCHEN_FILES.items():
        url = f"{SERVER}/kitchen/{file}"
        yield DatasetInfo(f"kitchen-{kind}-v0", url, "FrankaKitchen-v1", (0.0, 4.0), 280)


#: Every dataset that is known by name.
DATASETS = MappingProxyType(
    {
        info.name: info
        for family in (_mujoco, _antmaze, _maze2d, _adroit, _kitchen)
        for info in family()
    }
)

_FILES = {info.file_name: info for info in DATASETS.values()}

# D4RL's scores belong to the physics of gym's -v2, which -v3 and -v4 keep and -v5 changes.
_ENV_REF_SCORES = {
    f"{gym_name}-{version}": ref_scores
    for gym_name, ref_scores in _MUJOCO_ENVS.values()
    for version in ("v2", "v3", "v4")
}
_ENV_STEPS = {
    f"{gym_name}-{version}": _MUJOCO_STEPS
    for gym_name, _ in _MUJOCO_ENVS.values()
    for version in ("v2", "v3", "v4", "v5")
}


def find_dataset(name: str) -> DatasetInfo | None:
    """The dataset of this name, if it is one of D4RL's."""
    return DATASETS.get(name)


def find_dataset_file(file_name: str) -> DatasetInfo | None:
    """The dataset whose file has this name, if it is one of D4RL's."""
    return _FILES.get(file_name)


def nearest_names(name: str, count: int = 3) -> list[str]:
    """The known dataset names most like `name`, best first; at least one."""
    return difflib.get_close_matches(name, DATASETS, n=count, cutoff=0.0)


def find_ref_scores(env_or_dataset_name: str | None) -> RefScores | None:
    """D4RL's reference scores (min, max) of a dataset name or a MuJoCo environment id.

    Environments -v5 have none: their physics or rewards differ from those of the scores.
    """
    if env_or_dataset_name is None:
        return None
    info = find_dataset(env_or_dataset_name)
    return info.ref_scores if info else _ENV_REF_SCORES.get(env_or_dataset_name)


def find_max_episode_steps(env_or_dataset_name: str | None) -> int | None:
    """The time limit, in steps, of a dataset name or a MuJoCo environment id."""
    if env_or_dataset_name is None:
        return None
    info = find_dataset(env_or_dataset_name)
    return info.max_episode_steps if info else _ENV_STEPS.get(env_or_dataset_name)


def normalized_score(returns: ArrayLike, ref_scores: RefScores) -> NDArray[np.float64]:
    """D4RL's score, `100 * (return - min) / (max - min)`, elementwise in float64."""
    low, high = ref_scores
    return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)


def trim_observations(observations: NDArray[Scalar], *names: str | None) -> NDArray[Scalar]:
    """The dimensions that the model sees: 27 of ant's 111, 30 of kitchen's 60, else all.

    Args:
        observations: (..., observation_dim).
        names: of the dataset, of the environment; either may tell the family.

    Source: trajectory/datasets/preprocessing.py:3-15.
    """
    families = {(name or "").lower().split("-")[0] for name in names}
    width = observations.shape[-1]
    if width == 111 and "ant" in families:  # contact forces removed
        return observations[..., :27]
    if width == 60 and families & {"kitchen", "frankakitchen"}:  # the goal removed
        return observations[..., :30]
    return observations
