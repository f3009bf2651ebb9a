"""metrics.csv and TensorBoard of a training run, both continued by a resumed one."""

from __future__ import annotations

import csv
from pathlib import Path

from tensorboardX import SummaryWriter

from tt_fast.config import TOKEN_KINDS
from tt_fast.files import atomic_write

LOSS_NAMES = ("loss", *(f"loss_{kind}" for kind in TOKEN_KINDS))
COLUMNS = ("step", "tokens", *LOSS_NAMES, "learning_rate", "tokens_per_second")


class MetricsLog:
    """Appends rows to ``metrics.csv`` and events to ``tensorboard/``.

    Args:
        run_folder: an existing folder.
        step: rows after this step are dropped first: a resumed run writes them again.
    """

    def __init__(self, run_folder: Path, step: int) -> None:
        self._path = run_folder / "metrics.csv"
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        with atomic_write(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(_as_text(row) for row in kept)
        self._file = self._path.open("a", newline="")
        self._events = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, float]) -> None:
        """Add one row; keys are `COLUMNS`."""
        csv.DictWriter(self._file, COLUMNS).writerow(_as_text(row))
        self._file.flush()
        for name in COLUMNS[1:]:
            self._events.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv; empty if there is none. A half-written last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(whole.splitlines())]


def _as_text(row: dict[str, float]) -> dict[str, str]:
    whole = ("step", "tokens")
    return {k: str(int(v)) if k in whole else f"{v:.8g}" for k, v in row.items()}
