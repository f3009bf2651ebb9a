"""D4RL's HDF5 layout: read it, write it, append to it.

observations (num_steps, observation_dim), actions (num_steps, action_dim), rewards, terminals and
timeouts (num_steps,); next_observations, infos/* and metadata/* are optional.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from tt_fast.files import atomic_write
from tt_fast.validate import require

#: Keys that a reader may need; `next_observations` only where nothing says how episodes end.
KEYS = (
    "observations",
    "actions",
    "rewards",
    "terminals",
    "terminations",
    "timeouts",
    "truncations",
)

CHUNK_BYTES = 2**18  # of one dataset's chunk: four of them fit HDF5's default cache

_COMMITTED_ROWS = "committed_rows"


def read_hdf5(path: Path) -> tuple[dict[str, NDArray[Any]], str | None]:
    """The arrays of a file, and the environment its metadata names.

    Only data in the file itself is read: links and storage that lead elsewhere are refused.

    Raises:
        FileNotFoundError, PermissionError: as the system says.
        ValueError: not HDF5, truncated, corrupt, a group or text where numbers belong, or a link.
    """
    with _open(path, "r") as file:
        found = {key: _find(file, key, path) for key in KEYS}
        if found["timeouts"] is None and found["truncations"] is None:
            found["next_observations"] = _find(file, "next_observations", path)
        datasets = {key: dataset for key, dataset in found.items() if dataset is not None}
        _check_rows(datasets, path)
        arrays = {key: _read(dataset, f"{path}: {key}") for key, dataset in datasets.items()}
        return arrays, _read_environment(file, path)


def check_hdf5(path: Path) -> None:
    """Open a file and look at its root.

    Raises:
        ValueError: it is no whole HDF5 file.
    """
    with _open(path, "r") as file, _reading(str(path)):
        list(file)


def write_hdf5(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str | int]
) -> None:
    """Write a whole file: `arrays` of `num_steps` rows by key ("infos/qpos" makes a group)."""
    with atomic_write(path) as temporary, DatasetWriter(temporary, metadata) as writer:
        writer.append(arrays)


class DatasetWriter:
    """Appends rows to a file in D4RL's layout, compressed, never holding more than it is given.

    Rows count once `append` returned: opening the file again drops what an interruption left.

    Raises:
        ValueError: the file is damaged, or its metadata differs.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str | int]) -> None:
        exists = path.exists()
        self._path = path
        self._file = _open(path, "r+" if exists else "x")
        try:
            if exists:
                with _reading(str(path)):
                    self._check_metadata(metadata)
                    self._drop_uncommitted()
            else:
                self._write_metadata(metadata)
        except BaseException:
            self._file.close()
            raise

    @property
    def num_rows(self) -> int:
        """Rows that an interruption cannot take away."""
        return int(self._file.attrs.get(_COMMITTED_ROWS, 0))

    @property
    def num_episodes(self) -> int:
        """Rows that end an episode."""
        if self.num_rows == 0:
            return 0
        return int(np.count_nonzero(self._file["terminals"][:] | self._file["timeouts"][:]))

    def append(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Add rows to every key: the same keys in every call, each array (rows, ...)."""
        start = self.num_rows
        num_rows = len(next(iter(arrays.values())))
        require(num_rows > 0, "arrays", "at least one row", num_rows)
        stop = start + num_rows
        for key, values in arrays.items():
            dataset = self._file[key] if key in self._file else self._create(key, values)
            dataset.resize(stop, axis=0)
            dataset[start:] = values
        self._file.flush()
        # `modify` writes in place; `[]=` would delete it for a moment.
        self._file.attrs.modify(_COMMITTED_ROWS, stop)
        self._file.flush()

    def close(self) -> None:
        """Close the file; without rows it is not kept."""
        is_empty = self.num_rows == 0
        self._file.close()
        if is_empty:
            self._path.unlink()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _create(self, key: str, values: NDArray[Any]) -> Any:
        tail = values.shape[1:]
        row_bytes = values.dtype.itemsize * int(np.prod(tail, dtype=np.int64))
        return self._file.create_dataset(
            key,
            shape=(0, *tail),
            maxshape=(None, *tail),
            chunks=(max(1, CHUNK_BYTES // row_bytes), *tail),
            dtype=values.dtype,
            compression="gzip",
            shuffle=True,
        )

    def _write_metadata(self, metadata: Mapping[str, str | int]) -> None:
        for key, value in metadata.items():
            self._file[f"metadata/{key}"] = value
        self._file.attrs[_COMMITTED_ROWS] = 0
        self._file.flush()

    def _check_metadata(self, metadata: Mapping[str, str | int]) -> None:
        for key, value in metadata.items():
            dataset = self._file.get(f"metadata/{key}")
            found = None if dataset is None else _scalar(dataset)
            if found != value:
                raise ValueError(f"{self._path}: {key}: expected {value!r}, got {found!r}")

    def _drop_uncommitted(self) -> None:
        rows = self.num_rows

        def shrink(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and not key.startswith("metadata/"):
                item.resize(rows, axis=0)

        self._file.visititems(shrink)


def _open(path: Path, mode: str) -> Any:
    """An `h5py.File`, its errors made readable."""
    if mode != "x" and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return h5py.File(path, mode)
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: expected a whole HDF5 file, got: {error}") from error


def _find(file: Any, key: str, path: Path) -> Any:
    """A numeric `h5py.Dataset` that lies in the file itself; None without this key."""
    name = f"{path}: {key}"
    with _reading(name):
        dataset = _own_item(file, key, name)
        if dataset is None:
            return None
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(f"{name}: expected an HDF5 dataset, got a group")
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"{name}: expected data in this file, got a reference to other files")
        if dataset.dtype.kind not in "biuf" or dataset.shape is None:
            raise ValueError(f"{name}: expected numbers, got {dataset.dtype}")
        return dataset


def _check_rows(datasets: Mapping[str, Any], path: Path) -> None:
    """As many rows in each: a file of a few bytes may tell of rows that no memory holds."""
    num_rows = {key: dataset.shape[0] if dataset.shape else 1 for key, dataset in datasets.items()}
    for key, found in num_rows.items():
        first, expected = next(iter(num_rows.items()))
        if found != expected:
            raise ValueError(f"{path}: {key}: expected {expected} rows as {first}, got {found}")


def _read(dataset: Any, name: str) -> NDArray[Any]:
    """All rows."""
    with _reading(name):
        try:
            return np.asarray(dataset[()])
        except MemoryError as error:
            size = f"{dataset.nbytes} bytes, shape {dataset.shape}"
            raise ValueError(f"{name}: expected rows that the memory holds, got {size}") from error


def _read_environment(file: Any, path: Path) -> str | None:
    """`metadata/environment` if it is there and a string."""
    name = f"{path}: metadata"
    with _reading(name):
        metadata = _own_item(file, "metadata", name)
        if not isinstance(metadata, h5py.Group):
            return None
        value = _scalar(_own_item(metadata, "environment", f"{name}/environment"))
        return value if isinstance(value, str) else None


def _own_item(group: Any, key: str, name: str) -> Any:
    """`group[key]`, unless it is a link that may lead out of the file; None without this key."""
    links, link = group.id.links, key.encode()
    if not links.exists(link):  # `key in group` would follow it
        return None
    if links.get_info(link).type != h5py.h5l.TYPE_HARD:
        target = np.ravel(links.get_val(link)).astype(str)  # of a soft link, or file and object
        raise ValueError(f"{name}: expected data in this file, got a link to {':'.join(target)}")
    return group[key]


def _scalar(item: Any) -> Any:
    """The Python value of a scalar dataset (or one of shape (1,)); None of anything else."""
    if not isinstance(item, h5py.Dataset) or item.size != 1:
        return None
    value = np.asarray(item[()]).item()
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever HDF5 raises on a damaged file, as a ValueError that names the key."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{name}: the file is truncated or corrupt: {error}") from error
