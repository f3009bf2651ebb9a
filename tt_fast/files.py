"""Write files and folders whole or not at all: to a temporary name, then rename. Read JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tt_fast.validate import refuse, require


def to_json(values: Mapping[str, Any]) -> str:
    """Indented JSON of plain values; NaN and infinity, which JSON has not, are refused."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`.

    A reader sees the old file or the new one, never a part. On an exception the temporary file is
    removed and `path` stays as it was. The suffix of `path` is kept, for writers that look at it,
    and so are the permissions of an old file. A link stays one: what it names is written. A device
    or a pipe is yielded itself.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        _flush_to_disk(temporary)
        temporary.replace(path)
    _flush_to_disk(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole, as `atomic_write` does."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file of ours.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def make_output_dir(path: Path) -> None:
    """Make the folder a user named as output_dir, unless it exists.

    Raises:
        ValueError: there can be none: its path names a file, runs through one, or is forbidden.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir: expected a folder or a new name: {error}") from error


def require_output(name: str, path: str | Path | None) -> None:
    """A file can be written at `path`: known before the work that it is for.

    Raises:
        ValueError: `path` is a folder, or the nearest folder that is there takes no file.
    """
    if path is None:
        return
    require(not Path(path).is_dir(), name, "the name of a file", f"the folder {path}")
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe
        return
    folder = next(parent for parent in path.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        refuse(name, "a file that can be written", f"{path} ({error.strerror})")


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """No other `what` is at work in this folder, made if absent; the lock goes with its process.

    On Windows, and in folders whose file system has no locks, nothing is locked.

    Raises:
        BlockingIOError: another one is.
        ValueError: the folder's path names a file, or runs through one.
    """
    make_output_dir(folder)
    with (folder / ".lock").open("w") as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"output_dir: expected no other {what} at work there, got one in {folder}"
            ) from error
        yield


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Of all processes and threads that name this file, which is made if absent; others wait.

    As `locked`, nothing is locked where there are no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        _lock(file, wait=True)
        yield


def _lock(file: IO[str], *, wait: bool) -> None:
    """Until the file is closed.

    Raises:
        BlockingIOError: somebody else has it, and `wait` is False.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        pass


def is_new_or_empty(path: Path) -> bool:
    """Nothing is lost if a folder is made at `path`, or where it leads if it is a link."""
    path = Path(os.path.realpath(path))
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`.

    A link stays one: the folder that it names is made.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, or somebody else made it
            meanwhile.
    """
    path = Path(os.path.realpath(path))
    _require_new_or_empty(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as private:
        temporary = Path(private) / path.name
        temporary.mkdir()
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # of any new file: what the umask leaves
        for file in temporary.rglob("*"):
            if file.is_file():  # some writers make private ones
                file.chmod(mode)
            _flush_to_disk(file)
        _flush_to_disk(temporary)
        try:
            temporary.replace(path)
        except OSError:
            _require_new_or_empty(path)
            raise
    _flush_to_disk(path.parent)


def _require_new_or_empty(path: Path) -> None:
    if not is_new_or_empty(path):
        raise FileExistsError(f"{path}: expected a new or empty folder, got an existing one")


def _flush_to_disk(path: Path) -> None:
    """Wait until `path` is on the disk, so that a rename never outruns the bytes it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        is_refusal = error.errno in (errno.EINVAL, errno.ENOTSUP)
        if not (is_refusal and path.is_dir()):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)
