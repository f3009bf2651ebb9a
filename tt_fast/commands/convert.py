"""`tt-fast convert`: a checkpoint from one implementation's format to another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tt_fast.commands.base import Command

if TYPE_CHECKING:
    from tt_fast.checkpoint import Checkpoint

Format = Literal["tt_fast", "jannerm", "faster_tt", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert a checkpoint between tt_fast and the formats of other implementations.

    Formats: tt_fast; jannerm, the original's (state_N.pt, model_config.pkl, data_config.pkl);
    faster_tt, faster-trajectory-transformer's (config.yaml, discretizer.pt, model_last.pt);
    huggingface (config.json, model.safetensors or pytorch_model.bin). Nothing that a file holds is
    run: pickles may name the few classes of these formats and nothing else.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of the checkpoint, or a run folder; its format is recognised by its files."""
    output_dir: Path
    """New or empty folder."""
    to: Format = "tt_fast"
    """Format to write."""
    dataset: str | None = None
    """Fit the discretizer on this dataset (as `tt-fast train` takes it), where SOURCE has only its
    recipe, as the original's folders, or nothing, as Hugging Face's."""
    epoch: int | None = None
    """Which state_N.pt of the original's; the newest by default."""

    def run(self) -> None:
        from tt_fast.checkpoint import Checkpoint
        from tt_fast.files import is_new_or_empty

        if not is_new_or_empty(self.output_dir):
            raise FileExistsError(f"output-dir: expected a new or empty folder: {self.output_dir}")
        checkpoint = Checkpoint.load(self.source, dataset=self.dataset, epoch=self.epoch)
        if self.to == "tt_fast":
            checkpoint.save(self.output_dir)
        else:
            checkpoint.save_foreign(self.output_dir, self.to)
        print(f"{self.output_dir}: {describe(checkpoint)}")
        for note in _notes(checkpoint, self.to):
            print(f"note: {note}")


def describe(checkpoint: Checkpoint) -> str:
    """One line: sizes and discretizer."""
    model = checkpoint.model.config
    dims = f"observation {model.observation_dim}, action {model.action_dim}"
    sizes = f"{model.num_layers} layers, {model.num_heads} heads, width {model.embed_dim}"
    edges = checkpoint.discretizer
    bins = "no discretizer" if edges is None else f"discretizer with {edges.num_bins} bins"
    return f"{dims}, {model.num_transitions} transitions, {sizes}, {bins}"


def _notes(checkpoint: Checkpoint, to: str) -> list[str]:
    """What the user should know of the result."""
    notes = []
    if checkpoint.discretizer is None:
        notes.append("a planner needs a discretizer: convert again with --dataset")
    origin = checkpoint.metadata.get("converted_from") or {}
    if to == "faster_tt" and origin.get("format") != "faster_tt":
        notes.append("this format has no stop token: its probability goes to the other tokens")
    return notes
