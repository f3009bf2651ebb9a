"""The folder of a training run: which checkpoints lie there, and how they come and go.

    checkpoints/step_00001000/    the newest two
    best/                         the one with the best score, where scores are asked for

Every one appears whole, by renaming, and is renamed before it is deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tt_fast.files import atomic_folder

_KEPT_CHECKPOINTS = 2
_OLD_BEST = ".best.old"


def prepare_run_folder(run_folder: Path) -> None:
    """Make the folder; drop what a killed run left half-written or half-deleted in it.

    Raises:
        ValueError: its path names a file, or runs through one.
    """
    checkpoints = run_folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output_dir: expected a folder or a new name: {error}") from error
    if (run_folder / _OLD_BEST).exists() and not (run_folder / "best").exists():
        (run_folder / _OLD_BEST).rename(run_folder / "best")  # killed between two renames
    for leftover in [*checkpoints.glob(".step_*"), *run_folder.glob(".best.*")]:
        shutil.rmtree(leftover)


@contextmanager
def new_checkpoint(run_folder: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder that becomes checkpoints/step_N; all but the newest ones then go."""
    folder = run_folder / "checkpoints" / f"step_{step:08d}"
    with atomic_folder(folder) as temporary:
        yield temporary
    for old in sorted(folder.parent.glob("step_*"))[:-_KEPT_CHECKPOINTS]:
        # a half-deleted one must not be found
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))


@contextmanager
def new_best(run_folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of best/."""
    folder, old = run_folder / "best", run_folder / _OLD_BEST
    new = run_folder / ".best.new"
    with atomic_folder(new) as temporary:
        yield temporary
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)
