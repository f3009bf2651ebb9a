"""D4RL's files: where they lie on this machine, and how they get there."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from tqdm.auto import tqdm

from tt_fast.data.hdf5 import check_hdf5
from tt_fast.data.registry import DatasetInfo
from tt_fast.files import one_at_a_time

SOCKET_SECONDS = 30.0  # without a byte, after which a server counts as dead
_BLOCK_BYTES = 2**20
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


def dataset_dir() -> Path:
    """D4RL's dataset folder: `D4RL_DATASET_DIR`, or ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR")
    return Path(folder).expanduser() if folder else Path.home() / ".d4rl" / "datasets"


def fetch_dataset(info: DatasetInfo, *, progress: bool = True) -> Path:
    """The file of a dataset in D4RL's folder, downloaded if it is not there.

    Raises:
        ConnectionError: it could not be downloaded whole; says what to do by hand.
    """
    path = dataset_dir() / info.file_name
    if not path.exists():
        with one_at_a_time(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # nobody else got it meanwhile
                download(info.url, path, progress=progress)
    return path


def download(
    url: str, path: Path, *, progress: bool = True, timeout: float = SOCKET_SECONDS
) -> None:
    """Download an HDF5 file to `path`, continuing `<path>.part` if an earlier try left one.

    One at a time: see `fetch_dataset`.

    Args:
        timeout: seconds without a byte after which the server counts as dead.

    Raises:
        ConnectionError: no network, a dead link, or not the whole file; says what to do by hand.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        expected_bytes = _receive(url, part, progress, timeout)
    except _NETWORK_ERRORS as error:
        raise ConnectionError(_advice(url, path, _reason(error))) from error
    num_bytes = part.stat().st_size
    if expected_bytes is not None and num_bytes != expected_bytes:
        if num_bytes > expected_bytes:
            part.unlink()
        raise ConnectionError(
            _advice(url, path, f"{num_bytes:,} of {expected_bytes:,} bytes arrived")
        )
    try:
        check_hdf5(part)
    except ValueError as error:
        part.unlink()
        raise ConnectionError(_advice(url, path, "what arrived is no HDF5 file")) from error
    part.replace(path)


def _receive(url: str, part: Path, progress: bool, timeout: float) -> int | None:
    """Append what `part` lacks; the size of the whole file in bytes, if the server tells it."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            total = _total_bytes(error)
        if total == start:  # an earlier try got everything
            return total
        part.unlink()
        return _receive(url, part, progress, timeout)
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        done = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, done, total, progress)
    return total


def _total_bytes(error: urllib.error.HTTPError) -> int | None:
    # of "Content-Range: bytes */<total>"
    total = error.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _copy(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    done: int,
    total: int | None,
    progress: bool,
) -> None:
    """Stream the body to `file`, with a bar that starts at `done` of `total` bytes."""
    name = Path(file.name).stem
    with tqdm(
        desc=name,
        initial=done,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    ) as bar:
        while block := response.read(_BLOCK_BYTES):
            file.write(block)
            bar.update(len(block))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"the server cannot be reached ({error.reason})"
    return f"the connection broke ({error or type(error).__name__})"


def _advice(url: str, path: Path, reason: str) -> str:
    part = path.with_name(f"{path.name}.part")
    again = " Trying again continues where it stopped." if part.exists() else ""
    return (
        f"{url} could not be downloaded: {reason}.{again} By hand: get that file with a browser or "
        f"on another machine, and save it as {path}; the environment variable D4RL_DATASET_DIR "
        f"chooses another folder than {path.parent}."
    )
