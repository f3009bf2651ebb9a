"""Small training runs, for the tests of training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dataset, tiny_model_config, tiny_train_config

from tt_fast import Checkpoint, train
from tt_fast.config import ModelConfig
from tt_fast.encoding import tokenize
from tt_fast.training.log import COLUMNS, read_metrics
from tt_fast.training.trainer import Evaluator


def columns(path: Path) -> list[tuple[float, ...]]:
    """metrics.csv without the one column that is a timing."""
    names = [name for name in COLUMNS if name != "tokens_per_second"]
    return [tuple(row[name] for name in names) for row in read_metrics(path / "metrics.csv")]


def run(
    output_dir: Path,
    steps: int,
    model_config: ModelConfig | None = None,
    *,
    resume: bool = False,
    evaluator: Evaluator | None = None,
    **changes: Any,
) -> Checkpoint:
    """`steps` optimiser steps in all."""
    config = tiny_train_config(max_epochs=steps * 8 / num_windows(), **changes)
    model_config = model_config or tiny_model_config()
    return train(
        tiny_dataset(),
        model_config,
        config,
        output_dir,
        resume=resume,
        progress=False,
        evaluator=evaluator,
    )


def num_windows() -> int:
    """Of the tiny dataset."""
    return len(tokenize(tiny_dataset(), tiny_model_config(), tiny_train_config())[1])


def interrupt_in_step(
    number: int, patch: pytest.MonkeyPatch, signum: signal.Signals = signal.SIGINT
) -> None:
    """That signal in the middle of that optimiser step, counted from 1."""
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def interrupting_clip(*args: Any) -> torch.Tensor:
        if next(calls) == number:
            signal.raise_signal(signum)
        return clip(*args)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupting_clip)
