"""What a run logs, and what a resumed run reads back."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_dataset, tiny_model_config, tiny_train_config

from tt_fast import train
from tt_fast.training.log import COLUMNS, RunLog, read_metrics, start_wandb


def _row(step: int) -> dict[str, float]:
    return {name: step + i / 8 for i, name in enumerate(COLUMNS)} | {"step": step, "tokens": 9}


def test_rows_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 0)
    for step in (3, 6, 9):
        log.write_metrics(_row(step))
    log.close()
    again = RunLog(tmp_path, 6, 6)
    again.write_metrics(_row(12))
    again.close()
    assert read_metrics(tmp_path / "metrics.csv") == [_row(3), _row(6), _row(12)]


@pytest.mark.parametrize("cut", range(2, 40, 3))
def test_a_half_written_line_is_left_out(tmp_path: Path, cut: int) -> None:
    log = RunLog(tmp_path, 0, 0)
    log.write_metrics(_row(3))
    log.write_metrics(_row(6))
    log.close()
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_metrics(path) == [_row(3)]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []


# ---- Weights & Biases ----


class _FakeWandb(ModuleType):
    """As much of wandb as a run uses; remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return SimpleNamespace(
            id=options["id"] or "abc",
            log=lambda values, step: self.rows.append((step, values)),
            finish=self._finish,
        )

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> _FakeWandb:
    module = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_row_and_a_resumed_run_goes_on(
    tmp_path: Path, fake_wandb: _FakeWandb
) -> None:
    def run(windows: int) -> None:
        config = tiny_train_config(max_windows=windows, pass_windows=8)
        train(
            tiny_dataset(), tiny_model_config(), config, tmp_path,
            resume=True, progress=False, wandb_project="walks",
        )  # fmt: skip

    run(24)
    run(48)
    first, second = fake_wandb.started
    assert (first["project"], first["name"], first["id"]) == ("walks", tmp_path.name, None)
    assert first["config"]["model_config"]["embed_dim"] == 16
    assert second["id"] == "abc"
    assert fake_wandb.finished == 2
    rows = [{"step": step, **values} for step, values in fake_wandb.rows]
    logged = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [row["step"] for row in logged] == [3, 6]
    assert rows[0]["loss"] == pytest.approx(logged[0]["loss"])


def test_wandb_is_not_touched_unless_asked(tmp_path: Path, fake_wandb: _FakeWandb) -> None:
    config = tiny_train_config(max_windows=8)
    train(tiny_dataset(), tiny_model_config(), config, tmp_path, progress=False)
    assert fake_wandb.started == []


def test_without_wandb_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "tt_fast\[wandb\]"'):
        start_wandb("walks", tmp_path, {}, resume=False)


@pytest.mark.parametrize("text", ["step,tokens\n1,a\n", "step,tokens\n1\n"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: expected a number in every column: "):
        read_metrics(path)
