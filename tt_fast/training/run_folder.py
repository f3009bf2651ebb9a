"""The folder of a training run: which checkpoints lie there, and how they come and go.

    checkpoints/step_00001000/    the newest two
    best/                         the one with the best score, where scores are asked for

Every one appears whole, by renaming, and is renamed before it is deleted. Names on the way:
.NAME.new is whole, .NAME.old is what it replaces, .NAME.gone is being deleted.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tt_fast.files import atomic_folder, make_output_dir

_KEPT_CHECKPOINTS = 2

_STEP = re.compile(r"step_(\d+)")

#: Folders on the way to a checkpoint, and those of `atomic_folder` and `atomic_write`, whose names
#: end in tempfile's eight characters.
_LEFTOVER = re.compile(
    r"\.(best|step_\d+)\.(new|old|gone)"
    r"|\.(\.(best|step_\d+)\.new|metrics\.csv|scores\.csv|wandb_id\.txt)\.[a-z0-9_]{8}"
)


def step_folders(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, fewest steps first; notes, copies and links beside them are not."""
    found = {
        path: int(name[1])
        for path in (run_folder / "checkpoints").glob("step_*")
        if (name := _STEP.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    }
    return sorted(found, key=found.__getitem__)


def prepare_run_folder(run_folder: Path) -> None:
    """Make the folder; drop what a killed run left half-written or half-deleted in it.

    Raises:
        ValueError: its path names a file, or runs through one.
    """
    checkpoints = run_folder / "checkpoints"
    make_output_dir(checkpoints)
    for old in [*checkpoints.glob(".step_*.old"), *run_folder.glob(".best.old")]:
        replaced = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not replaced.exists():
            old.rename(replaced)  # killed between two renames
    for path in [*checkpoints.iterdir(), *run_folder.iterdir()]:
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


@contextmanager
def new_checkpoint(run_folder: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder that becomes checkpoints/step_N; all but the newest ones then go."""
    folder = run_folder / "checkpoints" / f"step_{step:08d}"
    with _new_version(folder) as temporary:
        yield temporary
    for old in step_folders(run_folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.gone")))


@contextmanager
def new_best(run_folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes best/."""
    with _new_version(run_folder / "best") as temporary:
        yield temporary


@contextmanager
def _new_version(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder`, whether that exists or not."""
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    with atomic_folder(new) as temporary:
        yield temporary
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)
