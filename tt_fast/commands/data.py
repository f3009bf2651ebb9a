"""`tt-fast data`: look at a dataset, download or collect one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tt_fast.commands.base import Command
from tt_fast.files import to_json


@dataclass(frozen=True, kw_only=True)
class DataInfo(Command):
    """Check a dataset and print its episodes, returns and lengths."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """An HDF5 file in D4RL's layout, a D4RL name (hopper-medium-v2) or minari:<id>."""
    env_id: str | None = None
    """Gymnasium id of the environment, if the source does not say."""
    ref_scores: tuple[float, float] | None = None
    """Returns that score 0 and 100, if they are not known."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        from tt_fast.data import load_dataset

        dataset = load_dataset(self.source, env_id=self.env_id, ref_scores=self.ref_scores)
        summary = dataset.summary()
        print(to_json(summary.to_dict()), end="") if self.json else print(summary)


@dataclass(frozen=True, kw_only=True)
class DataDownload(Command):
    """Download a file of D4RL's to D4RL_DATASET_DIR, or ~/.d4rl/datasets."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A D4RL name, such as hopper-medium-v2."""
    no_progress: bool = False
    """Show no progress bar."""

    def run(self) -> None:
        from tt_fast.data.download import fetch_dataset
        from tt_fast.data.registry import find_dataset, nearest_names

        info = find_dataset(self.name)
        if info is None:
            nearest = ", ".join(nearest_names(self.name))
            raise ValueError(f"name: expected one of D4RL's ({nearest}, ...), got {self.name!r}")
        print(fetch_dataset(info, progress=not self.no_progress))

    def saved(self) -> str:
        return "the part that arrived is kept, and the same command continues after it"


@dataclass(frozen=True, kw_only=True)
class DataCollect(Command):
    """Let a policy act in an environment and write every step to an HDF5 file, D4RL's layout."""

    env_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV-ID")]
    """Gymnasium id, such as Hopper-v4."""
    out: Path
    """The file to write; it must not exist."""
    num_transitions: int
    """Environment steps to collect."""
    policy: str = "random"
    """random, module:callable, or a stable-baselines3 .zip, which can run code: only one that you
    trust."""
    seed: int = 0
    """Seed of the first episode; episode j has seed + j."""
    no_progress: bool = False
    """Show no progress bar."""

    def run(self) -> None:
        from tt_fast.collect import collect

        out = collect(
            self.env_id,
            self.policy,
            self.num_transitions,
            self.out,
            seed=self.seed,
            progress=not self.no_progress,
        )
        print(out)

    def saved(self) -> str:
        return f"whole episodes are kept in {self.out}.partial, and the same command continues them"
