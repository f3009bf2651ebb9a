"""`load_dataset`: its sources, its conversions, its refusals."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_data import HOPPER_SCORES, make_arrays, rows, without

from tt_fast.data import load_dataset
from tt_fast.data.hdf5 import write_hdf5
from tt_fast.data.windows import build_transitions
from tt_fast.discretizer import Discretizer

DEMO = Path(__file__).parents[1] / "tt_fast" / "assets" / "hopper-demo.hdf5"


# --- what a dataset is


def test_arrays_and_flags_of_a_dict():
    arrays = make_arrays(terminals=[1], timeouts=[3])
    dataset = load_dataset(arrays)
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(dataset, key), arrays[key])
        assert getattr(dataset, key).dtype == np.float32
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminations), [1])
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [3, 5])
    assert rows(dataset) == [(0, 2), (2, 4), (4, 6)]
    assert (dataset.num_steps, dataset.observation_dim, dataset.action_dim) == (6, 3, 2)
    assert (dataset.name, dataset.env_id, dataset.ref_scores) == ("unnamed", None, None)


def test_open_last_episode_is_kept_as_a_truncation_and_the_source_is_untouched():
    arrays = make_arrays(terminals=[1])
    dataset = load_dataset(arrays)
    assert dataset.truncations[-1]
    assert not arrays["timeouts"].any()
    assert dataset.num_steps == 6


def test_last_row_that_terminates_is_no_truncation():
    dataset = load_dataset(make_arrays(terminals=[5]))
    assert not dataset.truncations.any()
    assert rows(dataset) == [(0, 6)]


def test_row_with_both_ends_keeps_both():
    dataset = load_dataset(make_arrays(terminals=[2, 5], timeouts=[2, 5]))
    np.testing.assert_array_equal(dataset.terminations, dataset.truncations)
    assert rows(dataset) == [(0, 3), (3, 6)]


def test_gymnasium_words_equal_d4rl_words():
    arrays = make_arrays(terminals=[1], timeouts=[3])
    renamed = without(arrays, "terminals", "timeouts") | {
        "terminations": arrays["terminals"],
        "truncations": arrays["timeouts"],
    }
    assert rows(load_dataset(renamed)) == rows(load_dataset(arrays))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.float16, np.float32),
        (np.uint8, np.float32),
        (np.dtype(">f4"), np.float32),
        (np.int32, np.float64),
        (np.float64, np.float64),
        (np.longdouble, np.float64),
    ],
)
def test_numbers_become_the_smaller_float_that_holds_them(dtype, kept):
    arrays = make_arrays()
    arrays["observations"] = (arrays["observations"] * 10).astype(np.int8).clip(0).astype(dtype)
    dataset = load_dataset(arrays)
    assert dataset.observations.dtype == kept
    np.testing.assert_array_equal(dataset.observations, arrays["observations"])


def test_float64_is_not_rounded():
    arrays = make_arrays() | {"rewards": np.full(6, 0.1)}  # float32(0.1) > 0.1
    dataset = load_dataset(arrays)
    assert dataset.observations.dtype == np.float32
    np.testing.assert_array_equal(dataset.rewards, np.full(6, 0.1))


def test_live_numbers_get_the_tokens_of_training():
    # float32 puts a bin's edge above each of these
    arrays = make_arrays(50) | {"rewards": np.tile([0.0, 0.1, 0.2, 0.7, 1.3], 10)}
    arrays["observations"] = np.column_stack([np.full(50, 0.1), arrays["rewards"]])
    transitions = build_transitions(
        load_dataset(arrays), discount=0.99, termination_penalty=None, max_path_length=50
    )
    discretizer = Discretizer.fit(transitions.values, num_bins=10)
    live = np.column_stack([arrays["observations"], arrays["actions"], arrays["rewards"]])[:-1]
    trained = discretizer.encode(transitions.values)[:, :-1]
    np.testing.assert_array_equal(discretizer.encode(live, slice(0, 5)), trained)


def test_jumps_are_found_where_next_observations_are_stored_in_less_precision():
    arrays = without(make_arrays(), "timeouts")
    arrays["observations"] = np.random.default_rng(0).standard_normal((6, 3))
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0).astype(np.float32)
    arrays["next_observations"][2] += 1
    assert rows(load_dataset(arrays)) == [(0, 3), (3, 6)]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32])
def test_flags_and_rewards_as_columns_of_numbers(dtype):
    arrays = make_arrays(terminals=[1], timeouts=[3])
    columns = arrays | {
        "terminals": arrays["terminals"].astype(dtype)[:, None],
        "timeouts": arrays["timeouts"].astype(dtype),
        "rewards": arrays["rewards"][:, None],
    }
    dataset = load_dataset(columns)
    assert rows(dataset) == rows(load_dataset(arrays))
    assert dataset.rewards.shape == (6,)
    assert dataset.terminations.dtype == dataset.truncations.dtype == np.bool_


def test_dict_may_say_what_it_is():
    extra = {"env_id": "Hopper-v4", "name": "mine", "ref_scores": (0, 10), "infos/qpos": None}
    dataset = load_dataset(make_arrays() | extra)
    assert (dataset.env_id, dataset.name, dataset.ref_scores) == ("Hopper-v4", "mine", (0.0, 10.0))


def test_arguments_win_over_the_source():
    extra = {"env_id": "Hopper-v4", "ref_scores": (0, 10)}
    dataset = load_dataset(make_arrays() | extra, env_id="Ant-v4", ref_scores=(1, 2))
    assert (dataset.env_id, dataset.ref_scores) == ("Ant-v4", (1.0, 2.0))


def test_dataset_as_source_gets_another_environment():
    dataset = load_dataset(make_arrays())
    again = load_dataset(dataset, env_id="Hopper-v4", ref_scores=(0, 1))
    assert (again.env_id, again.ref_scores) == ("Hopper-v4", (0.0, 1.0))
    assert again.observations is dataset.observations
    assert load_dataset(again).ref_scores == (0.0, 1.0)
    # of Hopper-v4, and of no other environment
    assert load_dataset(again, env_id="Hopper-v5").ref_scores is None
    assert load_dataset(again, env_id="Hopper-v4").ref_scores == (0.0, 1.0)
    own = make_arrays() | {"env_id": "Hopper-v4", "ref_scores": (0, 10)}
    assert load_dataset(own, env_id="Hopper-v5").ref_scores is None


def test_environment_brings_its_reference_scores():
    assert load_dataset(make_arrays(), env_id="Hopper-v4").ref_scores == HOPPER_SCORES
    assert load_dataset(make_arrays(), env_id="Hopper-v5").ref_scores is None


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
)
def test_episodes_partition_the_rows(flags, seed):
    terminals, timeouts = (np.array(column) for column in zip(*flags, strict=True))
    arrays = make_arrays(len(flags), seed=seed) | {"terminals": terminals, "timeouts": timeouts}
    dataset = load_dataset(arrays)
    ends = dataset.terminations | dataset.truncations
    assert ends[-1]
    bounds = rows(dataset)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == dataset.num_steps
    assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
    for (start, stop), length, total in zip(
        bounds, dataset.episode_lengths, dataset.episode_returns, strict=True
    ):
        assert length == stop - start > 0
        np.testing.assert_array_equal(np.flatnonzero(ends[start:stop]), [length - 1])
        np.testing.assert_allclose(total, arrays["rewards"][start:stop].sum(dtype=np.float64))


# --- ends that nobody stored


def test_missing_timeouts_from_next_observations():
    arrays = make_arrays(10, terminals=[2], timeouts=[6])
    following = np.roll(arrays["observations"], -1, axis=0)
    following[[2, 6, 9]] += 1
    dataset = load_dataset(without(arrays, "timeouts") | {"next_observations": following})
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [6, 9])


def test_missing_timeouts_from_the_time_limit():
    arrays = make_arrays(4500, terminals=[499, 2499])
    dataset = load_dataset(without(arrays, "timeouts"), env_id="Hopper-v4")
    # 1000 steps after row 499: row 1499; row 2499 reaches the limit by terminating.
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [1499, 3499, 4499])


def test_missing_timeouts_without_any_evidence():
    arrays = make_arrays(2500, terminals=[1200])
    dataset = load_dataset(without(arrays, "timeouts"), env_id="Mine-v0")
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [2499])


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_next_observations_tell_what_timeouts_told(flags, data):
    num_steps = len(flags)
    timeouts = np.array(data.draw(st.lists(st.booleans(), min_size=num_steps, max_size=num_steps)))
    arrays = make_arrays(num_steps) | {"terminals": np.array(flags), "timeouts": timeouts}
    following = np.roll(arrays["observations"], -1, axis=0)
    following[arrays["terminals"] | timeouts] += 1
    told = load_dataset(arrays)
    found = load_dataset(without(arrays, "timeouts") | {"next_observations": following})
    assert rows(found) == rows(told)
    np.testing.assert_array_equal(found.terminations, told.terminations)


# --- refusals


def test_missing_key_is_named_with_those_present():
    arrays = without(make_arrays(), "actions")
    message = "source: expected the key actions, got ['observations', 'rewards', 'terminals',"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(arrays)
    with pytest.raises(ValueError, match="expected the key terminals or terminations"):
        load_dataset(without(make_arrays(), "terminals"))


def test_both_words_for_one_key():
    arrays = make_arrays() | {"terminations": np.zeros(6, bool)}
    with pytest.raises(ValueError, match="source: expected one of terminals and terminations"):
        load_dataset(arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_row_and_column(bad):
    arrays = make_arrays()
    arrays["observations"][4, 1] = bad
    message = f"source: observations: row 4, column 1: expected a finite float32, got {bad}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(arrays)


def test_not_finite_reward_names_its_row():
    arrays = make_arrays()
    arrays["rewards"][3] = np.nan
    with pytest.raises(ValueError, match="rewards: row 3: expected a finite float32, got nan"):
        load_dataset(arrays)


def test_too_large_for_float32():
    arrays = make_arrays()
    arrays["actions"] = arrays["actions"].astype(np.float64)
    arrays["actions"][5, 0] = 1e300
    with pytest.raises(ValueError, match=re.escape("row 5, column 0: expected a finite float32")):
        load_dataset(arrays)


@pytest.mark.parametrize("key", ["actions", "rewards", "terminals", "timeouts"])
def test_rows_that_disagree(key):
    arrays = make_arrays()
    arrays[key] = arrays[key][:-1]
    with pytest.raises(ValueError, match=f"source: {key}: expected 6 rows as observations, got 5"):
        load_dataset(arrays)


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("observations", (6,), "(num_steps, observation_dim), got (6,)"),
        ("observations", (6, 8, 8), "(num_steps, observation_dim), got (6, 8, 8)"),
        ("observations", (6, 0), "(num_steps, observation_dim), got (6, 0)"),
        ("actions", (6,), "(num_steps, action_dim), got (6,)"),
        ("rewards", (6, 2), "(num_steps,) or (num_steps, 1), got (6, 2)"),
        ("terminals", (), "(num_steps,) or (num_steps, 1), got ()"),
    ],
)
def test_shape(key, shape, expected):
    arrays = make_arrays() | {key: np.zeros(shape)}
    message = f"source: {key}: expected shape {expected}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(arrays)


def test_next_observations_of_another_width():
    arrays = without(make_arrays(), "timeouts") | {"next_observations": np.zeros((6, 4))}
    message = "next_observations: expected shape (6, 3), got (6, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(arrays)


def test_no_rows():
    with pytest.raises(ValueError, match="source: observations: expected at least one row"):
        load_dataset(make_arrays(0))


@pytest.mark.parametrize("values", [["a"] * 6, [None] * 6, np.zeros(6, complex)])
def test_no_numbers(values):
    with pytest.raises(ValueError, match="source: rewards: expected a numeric dtype, got"):
        load_dataset(make_arrays() | {"rewards": values})


def test_ragged_rows():
    with pytest.raises(ValueError, match="source: actions: expected an array, got"):
        load_dataset(make_arrays() | {"actions": [[1.0, 2.0]] * 5 + [[1.0]]})


def test_flag_that_is_no_flag():
    arrays = make_arrays() | {"terminals": [0, 0, 1, 2, 0, 0]}
    with pytest.raises(ValueError, match="source: terminals: row 3: expected 0 or 1, got 2"):
        load_dataset(arrays)


@pytest.mark.parametrize("ref_scores", [(1, 1), (2, 1), (0,), 3, (0, np.nan), ("a", "b")])
def test_reference_scores(ref_scores):
    with pytest.raises(ValueError, match="ref_scores: expected"):
        load_dataset(make_arrays(), ref_scores=ref_scores)


@pytest.mark.parametrize("source", [None, 3, [1, 2]])
def test_source_of_another_type(source):
    with pytest.raises(ValueError, match="source: expected a path, a D4RL name, a Minari id or"):
        load_dataset(source)


def test_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"got 'hoper-medium-v2'; nearest names: hopper-medium-v2"):
        load_dataset("hoper-medium-v2")


@pytest.mark.parametrize("as_path", [str, Path])
def test_missing_file(tmp_path, as_path):
    path = tmp_path / "hopper_medium.hdf5"
    message = f"source: no file {path}; D4RL's nearest names: hopper-medium"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_dataset(as_path(path))


# --- files


def test_file_takes_environment_from_its_metadata(tmp_path):
    arrays = make_arrays(terminals=[1])
    write_hdf5(tmp_path / "mine.hdf5", arrays, {"environment": "Hopper-v4"})
    dataset = load_dataset(str(tmp_path / "mine.hdf5"))
    assert (dataset.name, dataset.env_id) == ("mine", "Hopper-v4")
    assert dataset.ref_scores == HOPPER_SCORES
    assert load_dataset(tmp_path / "mine.hdf5", env_id="Ant-v4").env_id == "Ant-v4"


def test_file_named_as_one_of_d4rls_is_d4rls(tmp_path):
    path = tmp_path / "hopper_medium_expert-v2.hdf5"
    write_hdf5(path, without(make_arrays(2200, terminals=[99]), "timeouts"), {})
    dataset = load_dataset(path)
    assert (dataset.name, dataset.env_id) == ("hopper-medium-expert-v2", "Hopper-v4")
    assert dataset.ref_scores == HOPPER_SCORES
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [1099, 2099, 2199])


def test_name_is_found_in_the_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    arrays = make_arrays(observation_dim=60, terminals=[2])
    arrays["observations"][:, 30:] = 1.0
    write_hdf5(tmp_path / "kitchen_microwave_kettle_light_slider-v0.hdf5", arrays, {})
    dataset = load_dataset("kitchen-partial-v0")
    assert (dataset.name, dataset.env_id) == ("kitchen-partial-v0", "FrankaKitchen-v1")
    np.testing.assert_array_equal(dataset.observations, arrays["observations"][:, :30])
    assert dataset.ref_scores == (0.0, 4.0)


def test_home_is_the_default_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_hdf5(tmp_path / ".d4rl" / "datasets" / "pen-human-v1.hdf5", make_arrays(), {})
    assert load_dataset("pen-human-v1").env_id == "AdroitHandPen-v1"


def test_demo_dataset_is_what_its_readme_says():
    assert DEMO.stat().st_size < 3_000_000
    dataset = load_dataset(DEMO)
    summary = dataset.summary()
    assert (dataset.env_id, dataset.name) == ("Hopper-v4", "hopper-demo")
    assert (summary.num_transitions, summary.num_episodes) == (57_615, 97)
    assert (summary.num_terminations, summary.num_truncations) == (80, 17)
    assert str(summary.returns) == "1020.9 / 1979.6 / 3292.7"
    assert str(summary.normalized) == "32.0 / 61.4 / 101.8"
    assert np.abs(dataset.actions).max() <= 1.0
