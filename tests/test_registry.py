"""D4RL's names, scores and limits, and what is trimmed of an observation."""

from __future__ import annotations

import re

import numpy as np
import pytest
from raw_data import HOPPER_SCORES, make_arrays

from tt_fast.data import load_dataset
from tt_fast.data.registry import (
    DATASETS,
    find_max_episode_steps,
    find_ref_scores,
    nearest_names,
    normalized_score,
    trim_observations,
)

# --- trimming


@pytest.mark.parametrize(
    ("width", "names", "kept"),
    [
        (111, ("ant-medium-v2", None), 27),
        (111, ("mine", "Ant-v4"), 27),
        (111, ("antmaze-umaze-v2", "AntMaze_UMaze-v4"), 111),
        (27, ("ant-medium-v2", "Ant-v4"), 27),
        (105, ("mine", "Ant-v5"), 105),
        (60, ("kitchen-mixed-v0", None), 30),
        (60, ("mine", "FrankaKitchen-v1"), 30),
        (59, ("mine", "FrankaKitchen-v1"), 59),
        (60, ("mine", None), 60),
    ],
)
def test_trim_observations(width, names, kept):
    observations = np.arange(2 * width).reshape(2, width)
    np.testing.assert_array_equal(trim_observations(observations, *names), observations[:, :kept])
    assert trim_observations(observations[0], *names).shape == (kept,)


def test_ant_is_trimmed_on_loading():
    arrays = make_arrays(observation_dim=111)
    dataset = load_dataset(arrays, env_id="Ant-v4")
    np.testing.assert_array_equal(dataset.observations, arrays["observations"][:, :27])


def test_kitchen_whose_goal_varies():
    arrays = make_arrays(observation_dim=60)
    arrays["observations"][:, 30:] = 1.0
    arrays["observations"][3, [31, 59]] = 2.0
    message = "source: observations: expected constant goal columns 30 to 59, got [31, 59]"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(arrays, env_id="FrankaKitchen-v1")


# --- registry


def test_registry_holds_every_family():
    counts = {"halfcheetah": 6, "hopper": 6, "walker2d": 6, "ant": 6, "antmaze": 12, "maze2d": 6}
    counts |= {"pen": 6, "hammer": 6, "door": 6, "relocate": 6, "kitchen": 3}
    families = [name.split("-")[0] for name in DATASETS]
    assert {family: families.count(family) for family in families} == counts
    files = [info.file_name for info in DATASETS.values()]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize(
    ("name", "path", "env_id", "scores", "steps"),
    [
        (
            "walker2d-medium-replay-v2",
            "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
            "Walker2d-v4",
            (1.629008, 4592.3),
            1000,
        ),
        (
            "antmaze-large-play-v0",
            "ant_maze_new/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse.hdf5",
            "AntMaze_Large-v4",
            (0.0, 1.0),
            1000,
        ),
        (
            "antmaze-umaze-v2",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
            "AntMaze_UMaze-v4",
            (0.0, 1.0),
            700,
        ),
        (
            "maze2d-medium-v1",
            "maze2d/maze2d-medium-sparse-v1.hdf5",
            "PointMaze_Medium-v3",
            (13.13, 277.39),
            600,
        ),
        (
            "maze2d-large-dense-v1",
            "maze2d/maze2d-large-dense-v1.hdf5",
            "PointMaze_LargeDense-v3",
            (30.569041, 303.4857382709002),
            800,
        ),
        (
            "door-cloned-v0",
            "hand_dapg/door-demos-v0-bc-combined.hdf5",
            "AdroitHandDoor-v1",
            (-56.512833, 2880.5693087298737),
            200,
        ),
        (
            "hammer-expert-v1",
            "hand_dapg_v1/hammer-expert-v1.hdf5",
            "AdroitHandHammer-v1",
            (-274.856578, 12794.134825156867),
            200,
        ),
        (
            "kitchen-complete-v0",
            "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
            "FrankaKitchen-v1",
            (0.0, 4.0),
            280,
        ),
    ],
)
def test_registry_entry(name, path, env_id, scores, steps):
    info = DATASETS[name]
    assert info.url == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}"
    assert (info.env_id, info.ref_scores, info.max_episode_steps) == (env_id, scores, steps)
    assert find_ref_scores(name) == scores
    assert find_max_episode_steps(name) == steps


@pytest.mark.parametrize("version", ["v2", "v3", "v4"])
def test_scores_belong_to_the_physics_of_v2(version):
    assert find_ref_scores(f"HalfCheetah-{version}") == (-280.178953, 12135.0)


def test_other_environments_have_no_scores():
    assert find_ref_scores("HalfCheetah-v5") is None
    assert find_ref_scores(None) is None
    assert find_max_episode_steps("HalfCheetah-v5") == 1000
    assert find_max_episode_steps("Mine-v0") is None
    assert find_max_episode_steps(None) is None


def test_nearest_names():
    assert nearest_names("halfcheetah_medium_expert")[0] == "halfcheetah-medium-expert-v2"
    assert len(nearest_names("?")) >= 1


def test_normalized_score():
    np.testing.assert_allclose(normalized_score([-20.272305, 3234.3], HOPPER_SCORES), [0.0, 100.0])
    dataset = load_dataset(make_arrays(), ref_scores=(10, 30))
    np.testing.assert_array_equal(dataset.normalized_score([10, 20]), [0.0, 50.0])
    assert load_dataset(make_arrays()).normalized_score([1.0]) is None
