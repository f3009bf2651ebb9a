"""What a training run logs: CSV, TensorBoard, W&B if asked; a resumed run continues them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from tt_fast.config import TOKEN_KINDS
from tt_fast.files import atomic_write, write_text

LOSS_NAMES = ("loss", *(f"loss_{kind}" for kind in TOKEN_KINDS))
COLUMNS = ("step", "tokens", *LOSS_NAMES, "learning_rate", "tokens_per_second")
SCORE_COLUMNS = ("step", "tokens", "score")


class RunLog:
    """Appends rows to metrics.csv and scores.csv, events to tensorboard/ and a W&B run.

    Args:
        run_folder: an existing folder; None writes nothing.
        step: rows after this step are dropped first: a resumed run writes them again.
        eval_step: the same of scores.csv.
        wandb_run: what `start_wandb` returned.
    """

    def __init__(
        self, run_folder: Path | None, step: int, eval_step: int, wandb_run: Any = None
    ) -> None:
        self._wandb_run = wandb_run
        self._metrics: _CsvLog | None = None
        self._scores: _CsvLog | None = None
        self._events: Any = None
        if run_folder is not None:
            self._metrics = _CsvLog(run_folder / "metrics.csv", COLUMNS, step)
            self._scores = _CsvLog(run_folder / "scores.csv", SCORE_COLUMNS, eval_step)
            self._events = SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)

    def write_metrics(self, row: Mapping[str, float]) -> None:
        """Add a row of metrics.csv; keys are `COLUMNS`."""
        self._write(self._metrics, row)

    def write_score(self, row: Mapping[str, float]) -> None:
        """Add a row of scores.csv, which the first one makes; keys are `SCORE_COLUMNS`."""
        self._write(self._scores, row)

    def close(self) -> None:
        """Flush and close all."""
        for sink in (self._metrics, self._scores, self._events):
            if sink is not None:
                sink.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def _write(self, csv_log: _CsvLog | None, row: Mapping[str, float]) -> None:
        if csv_log is None:
            return
        csv_log.write(row)
        step, values = int(row["step"]), {k: v for k, v in row.items() if k != "step"}
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb_run is not None:
            self._wandb_run.log(values, step=step)


class _CsvLog:
    """Rows of one file, which is made with the first of them."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self._path, self._columns = path, columns
        self._file: TextIO | None = None
        if path.exists():
            self._open([row for row in read_metrics(path) if row["step"] <= step])

    def write(self, row: Mapping[str, float]) -> None:
        if self._file is None:
            self._open([])
        assert self._file is not None
        csv.DictWriter(self._file, self._columns).writerow(_as_text(row))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, kept: list[dict[str, float]]) -> None:
        with atomic_write(self._path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(_as_text(row) for row in kept)
        self._file = self._path.open("a", newline="")


def start_wandb(project: str, run_folder: Path, config: Mapping[str, Any], *, resume: bool) -> Any:
    """Start a run of Weights & Biases.

    Args:
        project: its project.
        run_folder: keeps the run's id in wandb_id.txt and what W&B writes in wandb/.
        config: shown beside the curves.
        resume: go on with the run that the folder names, if it does.

    Raises:
        ImportError: W&B is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            'Weights & Biases needs wandb: pip install "tt_fast[wandb]" (or drop wandb_project)'
        ) from error
    id_file = run_folder / "wandb_id.txt"
    known = resume and id_file.exists()
    run_id = id_file.read_text(encoding="utf-8").strip() if known else None
    run = wandb.init(
        project=project, name=run_folder.name, dir=str(run_folder), config=dict(config),
        id=run_id, resume="allow",
    )  # fmt: skip
    write_text(id_file, f"{run.id}\n")
    return run


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv or scores.csv; none without the file.

    A half-written last line is left out.

    Raises:
        ValueError: something in it is not a number.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(whole.splitlines())
    try:
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a number in every column: {error}") from error


def _as_text(row: Mapping[str, float]) -> dict[str, str]:
    whole = ("step", "tokens")
    return {k: str(int(v)) if k in whole else f"{v:.8g}" for k, v in row.items()}
