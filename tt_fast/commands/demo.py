"""`tt-fast demo`: data, training, planning and a report in a few minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tt_fast.commands.base import Command


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train on a small real dataset, plan in MuJoCo and write a report: all in a few minutes.

    The dataset comes with the package, so nothing is downloaded. With --pretrained the model does,
    too, and plans at once.
    """

    output_dir: Path = Path("tt-fast-demo")
    """Folder to write, new or empty: report.html, results.json, episode.mp4, figures, run."""
    minutes: float | None = None
    """Minutes that all of it takes, 6 if not given and 1 with --pretrained; more trains and plays
    longer."""
    pretrained: bool = False
    """Train nothing: take the model that comes with the package."""
    seed: int = 0
    """Seed of weights, data order, plans and environments."""
    smoke: bool = False
    """A tiny model and a few steps, only to see that everything runs."""
    no_progress: bool = False
    """Show no progress bar."""

    def run(self) -> None:
        from tt_fast.demo import run_demo

        report = run_demo(
            self.output_dir,
            minutes=self.minutes,
            seed=self.seed,
            smoke=self.smoke,
            pretrained=self.pretrained,
            progress=not self.no_progress,
            say=print,
        )
        print(f"report: {report}")

    def saved(self) -> str:
        from tt_fast.checkpoint import newest_checkpoint

        newest = newest_checkpoint(self.output_dir / "run")
        if newest is None:
            return f"no checkpoint was written yet in {self.output_dir}"
        return f"the model is {newest}; there is no report yet"
