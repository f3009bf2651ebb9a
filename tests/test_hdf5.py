"""Files in D4RL's layout: round trips, links and damage, appending after an interruption."""

from __future__ import annotations

import re
import string
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as hypothesis_arrays

from tt_fast.data import load_dataset
from tt_fast.data.hdf5 import DatasetWriter, check_hdf5, read_hdf5, write_hdf5

FLOATS = st.floats(-1e6, 1e6, width=32)


@st.composite
def datasets(draw):
    """Arrays of a D4RL file, in any of the dtypes and shapes that such files have."""
    num_steps = draw(st.integers(1, 30))
    wide = st.integers(1, 4)
    flags = hypothesis_arrays(np.bool_, num_steps)
    rewards_shape = draw(st.sampled_from([(num_steps,), (num_steps, 1)]))
    arrays = {
        "observations": draw(
            hypothesis_arrays(np.float32, (num_steps, draw(wide)), elements=FLOATS)
        ),
        "actions": draw(hypothesis_arrays(np.float32, (num_steps, draw(wide)), elements=FLOATS)),
        "rewards": draw(hypothesis_arrays(np.float32, rewards_shape, elements=FLOATS)),
        "terminals": draw(flags).astype(draw(st.sampled_from([np.bool_, np.uint8, np.int64]))),
    }
    if draw(st.booleans()):
        arrays["timeouts"] = draw(flags)
    return arrays


def make_arrays(num_steps=8, terminals=(3,)):
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((num_steps, 3)).astype(np.float32),
        "actions": rng.standard_normal((num_steps, 2)).astype(np.float32),
        "rewards": rng.standard_normal(num_steps).astype(np.float32),
        "terminals": np.isin(np.arange(num_steps), terminals),
        "timeouts": np.arange(num_steps) == num_steps - 1,
    }


@pytest.fixture
def path(tmp_path):
    """A good file."""
    write_hdf5(tmp_path / "data.hdf5", make_arrays(), {"environment": "Hopper-v4"})
    return tmp_path / "data.hdf5"


def replace(path, key, value):
    with h5py.File(path, "r+") as file:
        del file[key]
        file[key] = value


def assert_refused(path, message):
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_dataset(path)


# --- round trips


@given(datasets(), st.text(string.ascii_letters, min_size=1))
def test_what_is_written_is_what_is_loaded(arrays, environment):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.hdf5"
        write_hdf5(path, arrays, {"environment": environment})
        loaded = load_dataset(path)
    expected = load_dataset(arrays, env_id=environment)
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(loaded, key), getattr(expected, key))
        assert getattr(loaded, key).dtype == getattr(expected, key).dtype
    assert loaded.env_id == environment
    np.testing.assert_array_equal(loaded.observations, arrays["observations"])
    np.testing.assert_array_equal(loaded.terminations, arrays["terminals"] == 1)


@given(st.integers(2, 40), st.data())
def test_appending_equals_writing_at_once(num_steps, data):
    arrays = make_arrays(num_steps)
    cuts = data.draw(st.sets(st.integers(1, num_steps - 1), max_size=4))
    bounds = [0, *sorted(cuts), num_steps]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.hdf5"
        for start, stop in pairwise(bounds):
            with DatasetWriter(path, {"seed": 3}) as writer:  # a new process each time
                assert writer.num_rows == start
                writer.append({key: values[start:stop] for key, values in arrays.items()})
        found, _ = read_hdf5(path)
    for key, values in arrays.items():
        np.testing.assert_array_equal(found[key], values)


def test_groups_and_metadata(tmp_path):
    path = tmp_path / "data.hdf5"
    qpos = np.arange(16.0).reshape(8, 2)
    write_hdf5(path, make_arrays() | {"infos/qpos": qpos}, {"environment": "A-v0", "seed": 7})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["infos"]["qpos"][:], qpos)
        assert file["metadata/seed"][()] == 7
        assert file["observations"].compression == "gzip"
        assert file["observations"].shuffle


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "data.hdf5"
    with pytest.raises(TypeError):
        write_hdf5(path, {"observations": np.array([object()])}, {})
    with pytest.raises(ValueError, match="arrays: expected at least one row, got 0"):
        write_hdf5(path, make_arrays(0), {})
    assert list(tmp_path.iterdir()) == []


def test_next_observations_are_read_only_where_they_are_needed(path):
    with h5py.File(path, "r+") as file:
        file["next_observations"] = np.zeros((8, 3))
    assert "next_observations" not in read_hdf5(path)[0]
    with h5py.File(path, "r+") as file:
        del file["timeouts"]
    assert "next_observations" in read_hdf5(path)[0]


@pytest.mark.parametrize("value", ["Ant-v4", b"Ant-v4", np.array(["Ant-v4"], dtype=object)])
def test_environment_as_files_store_it(path, value):
    replace(path, "metadata/environment", value)
    assert read_hdf5(path)[1] == "Ant-v4"


@pytest.mark.parametrize("value", [3, np.zeros(2), h5py.Empty("f")])
def test_environment_that_is_no_text_is_unknown(path, value):
    replace(path, "metadata/environment", value)
    assert read_hdf5(path)[1] is None


def test_metadata_is_optional(path):
    replace(path, "metadata", 3)
    assert read_hdf5(path)[1] is None
    with h5py.File(path, "r+") as file:
        del file["metadata"]
    assert read_hdf5(path)[1] is None


# --- refusals


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: no such file")):
        check_hdf5(tmp_path)


def test_no_hdf5(tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_text("<html>404</html>")
    assert_refused(path, "expected a whole HDF5 file, got: ")


@given(st.floats(0.0, 0.999))
def test_truncated_file_is_refused(fraction):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.hdf5"
        write_hdf5(path, make_arrays(200), {})
        whole = path.read_bytes()
        path.write_bytes(whole[: int(fraction * len(whole))])
        assert_refused(path, "expected a whole HDF5 file, got: ")


def test_corrupt_rows_are_refused_by_key(path):
    with h5py.File(path) as file:
        chunk = file["rewards"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    assert_refused(path, "rewards: the file is truncated or corrupt: ")


def test_corrupt_header_is_refused_by_key(path):
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["rewards"].id).addr
    content = bytearray(path.read_bytes())
    content[address : address + 64] = b"\xff" * 64
    path.write_bytes(content)
    assert_refused(path, "rewards: the file is truncated or corrupt: ")


def test_group_instead_of_rows(path):
    with h5py.File(path, "r+") as file:
        del file["actions"]
        file.create_group("actions")
    assert_refused(path, "actions: expected an HDF5 dataset, got a group")


@pytest.mark.parametrize("value", ["text", np.array([b"a", b"b"]), h5py.Empty("f")])
def test_no_numbers(path, value):
    replace(path, "actions", value)
    assert_refused(path, "actions: expected numbers, got ")


def grow(path, key, num_rows, row=()):
    """Make `key` a dataset of rows that were never written: they take no room in the file."""
    with h5py.File(path, "r+") as file:
        del file[key]
        file.create_dataset(key, (num_rows, *row), np.float32, chunks=(1000, *row))


def test_other_numbers_of_rows_are_refused_unread(path):
    grow(path, "actions", 2**24, (2,))
    tracemalloc.start()
    assert_refused(path, "actions: expected 8 rows as observations, got 16777216")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    replace(path, "actions", 3.0)
    assert_refused(path, "actions: expected 8 rows as observations, got 1")


def test_rows_that_no_memory_holds(path):
    for key in make_arrays():
        grow(path, key, 10**12, (1000,))
    size = "got 4000000000000000 bytes, shape (1000000000000, 1000)"
    assert_refused(path, f"observations: expected rows that the memory holds, {size}")


def test_missing_key(path):
    with h5py.File(path, "r+") as file:
        del file["rewards"]
    assert_refused(path, "expected the key rewards, got ['actions', 'observations', ")


def test_row_is_named_with_the_file(path):
    values = make_arrays()["observations"]
    values[5, 2] = np.nan
    replace(path, "observations", values)
    assert_refused(path, "observations: row 5, column 2: expected a finite float32, got nan")


def test_external_link_is_not_followed(path, tmp_path):
    write_hdf5(tmp_path / "secret.hdf5", make_arrays(), {})
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink("secret.hdf5", "/rewards")
    message = "rewards: expected data in this file, got a link to secret.hdf5:/rewards"
    assert_refused(path, message)
    (tmp_path / "secret.hdf5").unlink()
    assert_refused(path, message)  # a dangling one neither counts as missing


def test_soft_link_is_not_followed(path):
    with h5py.File(path, "r+") as file:
        file["elsewhere"] = h5py.ExternalLink("secret.hdf5", "/")
        del file["rewards"]
        file["rewards"] = h5py.SoftLink("/elsewhere/rewards")
    message = "rewards: expected data in this file, got a link to /elsewhere/rewards"
    assert_refused(path, message)


def test_metadata_link_is_not_followed(path):
    with h5py.File(path, "r+") as file:
        del file["metadata"]
        file["metadata"] = h5py.ExternalLink("secret.hdf5", "/metadata")
    assert_refused(
        path, "metadata: expected data in this file, got a link to secret.hdf5:/metadata"
    )


def test_virtual_rows_are_not_followed(path, tmp_path):
    layout = h5py.VirtualLayout(shape=(8,), dtype=np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "rewards", shape=(8,))
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file.create_virtual_dataset("rewards", layout)
    assert_refused(path, "rewards: expected data in this file, got a reference to other files")


def test_external_storage_is_not_followed(path, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(32))
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        external = [(str(tmp_path / "secret.bin"), 0, 32)]
        file.create_dataset("rewards", shape=(8,), dtype=np.float32, external=external)
    assert_refused(path, "rewards: expected data in this file, got a reference to other files")


# --- appending after an interruption


def test_rows_of_an_interrupted_append_are_dropped(tmp_path):
    path = tmp_path / "data.hdf5"
    arrays = make_arrays()
    with DatasetWriter(path, {}) as writer:
        writer.append(arrays)
        with pytest.raises(OSError, match="no appropriate function"):  # two keys grew before
            writer.append(arrays | {"rewards": np.array([object()] * 8)})
    with DatasetWriter(path, {}) as writer:
        assert (writer.num_rows, writer.num_episodes) == (8, 2)
        writer.append(arrays)
        assert (writer.num_rows, writer.num_episodes) == (16, 4)
    found, _ = read_hdf5(path)
    for key, values in arrays.items():
        np.testing.assert_array_equal(found[key], np.concatenate([values, values]))


def test_other_metadata_is_refused(path):
    with pytest.raises(ValueError, match=r"data.hdf5: seed: expected 1, got None"):
        DatasetWriter(path, {"seed": 1})
    with pytest.raises(ValueError, match=r"environment: expected 'Ant-v4', got 'Hopper-v4'"):
        DatasetWriter(path, {"environment": "Ant-v4"})
    assert load_dataset(path).num_steps == 8


def test_file_without_rows_is_not_kept(tmp_path):
    with DatasetWriter(tmp_path / "data.hdf5", {}) as writer:
        assert (writer.num_rows, writer.num_episodes) == (0, 0)
    assert list(tmp_path.iterdir()) == []
