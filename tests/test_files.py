"""Files and folders appear whole or not at all."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tt_fast.files import (
    atomic_folder,
    atomic_write,
    make_output_dir,
    require_output,
    write_text,
)


def test_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="boom"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("boom")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "x.txt"
    path.write_text("old")
    link.symlink_to(path)
    write_text(link, "new")
    assert (link.is_symlink(), path.read_text()) == (True, "new")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.touch(mode=0o600)
    write_text(path, "secret")
    assert (mode_of(path), path.read_text()) == (0o600, "secret")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_written_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write_text(pipe, "said")
        assert read.result(timeout=10) == "said"
    assert pipe.is_fifo()


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("1")
        assert not folder.exists()
    assert (folder / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_never_replaces_files(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    with atomic_folder(folder) as temporary:  # an empty one may be filled
        (temporary / "a").write_text("1")
    refused = pytest.raises(FileExistsError, match="expected a new or empty folder")
    with refused, atomic_folder(folder):
        pass
    assert (folder / "a").read_text() == "1"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        link = tmp_path / f"to_{name}"
        link.symlink_to(name)
        with atomic_folder(link) as temporary:
            (temporary / "a").write_text("1")
        assert link.is_symlink()
        assert (tmp_path / name / "a").read_text() == "1"


def test_a_link_to_itself_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    refused = pytest.raises(FileExistsError, match="loop: expected a new or empty folder")
    with refused, atomic_folder(tmp_path / "loop"):
        pytest.fail("it yields")


@pytest.mark.parametrize("is_folder", [True, False])
def test_of_two_writers_one_is_refused(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / "f"
    refused = pytest.raises(FileExistsError, match="f: expected a new or empty folder")
    with refused, atomic_folder(path) as temporary:
        (temporary / "a").write_text("second")
        made = path / "a" if is_folder else path
        made.parent.mkdir(exist_ok=True)
        made.write_text("first")
    assert made.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folders_files_are_as_readable_as_any(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "private").touch(mode=0o600)
        assert mode_of(temporary.parent) == 0o700
    (tmp_path / "ordinary").touch()
    (tmp_path / "folder").mkdir()
    assert mode_of(tmp_path / "f" / "private") == mode_of(tmp_path / "ordinary")
    assert mode_of(tmp_path / "f") == mode_of(tmp_path / "folder")


def test_outputs_are_refused_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for good in (None, file, tmp_path / "new", str(tmp_path / "a" / "b" / "new"), "/dev/null"):
        require_output("out", good)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="out: expected the name of a file, got 'the folder"):
        require_output("out", tmp_path)
    for bad in (file / "x.json", "/proc/x.json"):
        with pytest.raises(ValueError, match=r"out: expected a file that can be written, got .*x"):
            require_output("out", bad)


def test_an_output_dir_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ValueError, match="output_dir: expected a folder or a new name"):
            make_output_dir(bad)


def test_the_umask_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's files would get the one that is set for a moment."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("it is set"))
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("1")


def refuse_to_flush_folders(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "refused")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_some_file_systems_flush_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_to_flush_folders(code, monkeypatch)
    write_text(tmp_path / "x.txt", "said")
    with atomic_folder(tmp_path / "f"):
        pass
    assert (tmp_path / "f").is_dir()


def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_flush_folders(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="refused"):
        write_text(tmp_path / "x.txt", "said")
