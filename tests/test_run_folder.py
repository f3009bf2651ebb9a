"""Checkpoints of a run are told from what else lies beside them, and ordered by their steps."""

from __future__ import annotations

from pathlib import Path

from tt_fast.checkpoint import newest_checkpoint
from tt_fast.training.run_folder import new_checkpoint, step_folders


def save(run_folder: Path, *steps: int) -> None:
    for step in steps:
        with new_checkpoint(run_folder, step) as folder:
            (folder / "x").write_text(str(step))


def names(run_folder: Path) -> list[str]:
    return [path.name for path in step_folders(run_folder)]


def test_the_newest_two_stay(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 500, 1000, 1500)
    assert names(tmp_path) == ["step_00001000", "step_00001500"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00001500"


def test_what_a_user_puts_beside_them_stays_and_counts_as_none(tmp_path: Path) -> None:
    save(tmp_path, 500, 1000)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000500.bak").mkdir()
    (folder / "step_00001000.txt").write_text("a note")
    (folder / "step_00009999").write_text("a file")
    (folder / "step_00000001").symlink_to("step_00000500.bak")
    (folder / "step_99999999").symlink_to("step_00001000")
    assert newest_checkpoint(tmp_path) == folder / "step_00001000"
    save(tmp_path, 1500, 2000)
    assert names(tmp_path) == ["step_00001500", "step_00002000"]
    assert len(list(folder.iterdir())) == 7


def test_more_steps_than_a_name_has_digits(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 100_000_001)
    assert names(tmp_path) == ["step_100000000", "step_100000001"]
