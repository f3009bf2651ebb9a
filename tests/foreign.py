"""Golden checkpoints of other implementations, and what it takes to equal them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_files import GOLDEN_DIR
from numpy.typing import NDArray

from tt_fast.model import TrajectoryTransformer

#: Folders under tests/golden by format; each holds check.npz beside the checkpoint.
FOLDERS = {
    "jannerm": ("jannerm/gpt", "jannerm/conditional"),
    "faster_tt": ("faster_tt/sep_heads", "faster_tt/shared_head"),
    "huggingface": ("huggingface/safetensors", "huggingface/bin"),
}
ALL_FOLDERS = [(name, folder) for name, folders in FOLDERS.items() for folder in folders]


def golden_folder(name: str) -> tuple[Path, dict[str, NDArray[Any]]]:
    """A folder, and the arrays of its check.npz."""
    folder = GOLDEN_DIR / name
    with np.load(folder / "check.npz", allow_pickle=False) as arrays:
        return folder, dict(arrays)


def assert_as_exact(ours: Any, theirs: Any, truth: Any) -> None:
    """Our error is at most twice theirs, against their own run in float64."""
    ours, theirs, truth = (np.asarray(x, dtype=np.float64) for x in (ours, theirs, truth))
    assert ours.shape == truth.shape
    allowed = 2.0 * np.abs(theirs - truth).max() + np.finfo(np.float32).eps
    assert np.abs(ours - truth).max() <= allowed


@torch.no_grad()
def assert_logits(model: TrajectoryTransformer, check: dict[str, NDArray[Any]]) -> None:
    """A model has the logits of check.npz, of as many tokens as its window holds.

    The stop token's are left out where they have none.
    """
    goals, count = check.get("goals"), model.config.block_size
    goal = None if goals is None else torch.from_numpy(goals)
    logits = model(torch.from_numpy(check["tokens"][:, :count]), goal).numpy()
    theirs, truth = check["logits"][:, :count], check["logits64"][:, :count]
    assert_as_exact(logits[..., : theirs.shape[-1]], theirs, truth)
