"""Checkpoints of other implementations: read without running what they hold, and written.

jannerm      the original: state_N.pt, model_config.pkl, data_config.pkl
faster_tt    faster-trajectory-transformer: config.yaml, discretizer.pt, model_last.pt
huggingface  transformers: config.json, model.safetensors or pytorch_model.bin
"""

from __future__ import annotations

from pathlib import Path

from tt_fast.formats import faster_tt, huggingface, jannerm
from tt_fast.formats.base import (
    Exported,
    Imported,
    Recipe,
    expected_shapes,
    new_model,
    read_discretizer,
    read_json,
)
from tt_fast.formats.torch_file import read_safetensors
from tt_fast.validate import require_choice

_FORMATS = {module.NAME: module for module in (jannerm, faster_tt, huggingface)}

#: Names of the foreign formats.
FORMATS = tuple(_FORMATS)


def find_format(folder: Path) -> str | None:
    """The foreign format that a folder looks like, or None."""
    found = (name for name, module in _FORMATS.items() if module.is_folder(folder))
    return next(found, None)


def read_foreign(folder: Path, name: str, *, epoch: int | None = None) -> Imported:
    """A folder of a foreign format.

    Args:
        folder: of the checkpoint.
        name: one of `FORMATS`.
        epoch: which of the original's state_N.pt; None takes the newest.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: damaged, hostile, or its files do not belong together; nothing of it was run.
    """
    require_choice("format", name, FORMATS)
    if name == jannerm.NAME:
        return jannerm.read(folder, epoch)
    if epoch is not None:
        raise ValueError(f"epoch: expected None for the format {name}, got {epoch}")
    return faster_tt.read(folder) if name == faster_tt.NAME else huggingface.read(folder)


def write_foreign(folder: Path, name: str, exported: Exported, *, epoch: int | None = None) -> None:
    """Write a checkpoint's files in a foreign format into an empty folder.

    Raises:
        ValueError: what the format cannot hold.
    """
    require_choice("format", name, FORMATS)
    if name != jannerm.NAME and epoch is not None:
        raise ValueError(f"epoch: expected None for the format {name}, got {epoch}")
    if name == jannerm.NAME:
        jannerm.write(folder, exported, epoch)
    elif name == faster_tt.NAME:
        faster_tt.write(folder, exported)
    else:
        huggingface.write(folder, exported)


__all__ = [
    "FORMATS",
    "Exported",
    "Imported",
    "Recipe",
    "expected_shapes",
    "find_format",
    "new_model",
    "read_discretizer",
    "read_foreign",
    "read_json",
    "read_safetensors",
    "write_foreign",
]
