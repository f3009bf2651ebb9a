"""metrics.csv: what a resumed run reads back."""

from pathlib import Path

import pytest

from tt_fast.metrics import COLUMNS, MetricsLog, read_metrics


def _row(step: int) -> dict[str, float]:
    return {name: step + i / 8 for i, name in enumerate(COLUMNS)} | {"step": step, "tokens": 9}


def test_rows_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (3, 6, 9):
        log.write(_row(step))
    log.close()
    again = MetricsLog(tmp_path, 6)
    again.write(_row(12))
    again.close()
    assert read_metrics(tmp_path / "metrics.csv") == [_row(3), _row(6), _row(12)]


@pytest.mark.parametrize("cut", range(2, 40, 3))
def test_a_half_written_line_is_left_out(tmp_path: Path, cut: int) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(_row(3))
    log.write(_row(6))
    log.close()
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_metrics(path) == [_row(3)]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []
