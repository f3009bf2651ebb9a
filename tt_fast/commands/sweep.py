"""`tt-fast sweep`: several datasets and seeds, trained and played side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tt_fast.commands.base import Command
from tt_fast.commands.train import ModelOptions
from tt_fast.config import ModelConfig, PlanConfig, TrainConfig, config_to_dict
from tt_fast.presets import check_preset
from tt_fast.validate import require

if TYPE_CHECKING:
    from tt_fast.sweep.runner import Cluster
    from tt_fast.sweep.trial import SweepConfig


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """A `TrainConfig` without what each trial has of its own, or what a sweep does not do."""

    seed: tyro.conf.Suppress[int] = 0
    eval_every: tyro.conf.Suppress[int | None] = None
    patience: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class PlanOptions(PlanConfig):
    """A `PlanConfig`; --discount is training's, so this one has another name."""

    discount: Annotated[float | None, tyro.conf.arg(name="plan-discount")] = None
    """Discount of the score; None takes --discount."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Train on several datasets with several seeds, play episodes with each model, print a table.

    Trials run side by side on Ray. The same command again skips trials that have a result and
    continues the others from their newest checkpoints, after Ctrl-C too; datasets and seeds may be
    added, budgets raised. Exit status 1: a trial failed, and the last table says which.
    """

    datasets: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="DATASET [...]", help_behavior_hint="(at least one)"),
    ]
    """HDF5 files in D4RL's layout, D4RL names (hopper-medium-v2) or minari:<id>."""
    output_dir: Path
    """Folder of the sweep, made if absent: sweep.json, sweep.png, a run folder per trial."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training; each dataset is trained once with each."""
    env_id: str | None = None
    """Gymnasium id of the environment, if the datasets do not say; module:id where a module
    registers it."""
    ref_scores: tuple[float, float] | None = None
    """Returns that score 0 and 100, if they are not known."""
    episodes: int = 1
    """Episodes that each trained model plays; 0 only trains."""
    episode_seed: int = 0
    """Episode j of every trial has this seed + j."""
    num_envs: int = 1
    """Environments side by side in a trial; results do not depend on it."""
    max_steps: int | None = None
    """End every episode after so many steps."""
    plan_freq: int = 1
    """Steps between two plans."""
    no_prefix_context: bool = False
    """Plan from the observation alone, without past transitions."""
    backend: str = "auto"
    """Planning backend: auto, cpu, cuda, torch or reference."""
    workers: int | None = None
    """Trials side by side; by default as many as there are processors and GPUs for."""
    cpus_per_trial: int = 1
    """Processors of a trial: threads of its training and planning."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial; a share such as 0.5 lets trials use one together. With 0 they train on the
    processor."""
    retries: int = 2
    """Times that a trial which failed, or whose process died, is tried again from its newest
    checkpoint."""
    address: str | None = None
    """A Ray cluster to run on, host:port or auto; its machines must see the same files. By default
    one is started on this machine and ended with the sweep."""
    no_progress: bool = False
    """Show no progress bar."""
    preset: str | None = None
    """The original's settings for a dataset, jannerm/hopper-medium-v2 and the like; options given
    beside it win."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """The model; its dimensions come from each dataset, its vocab_size is --num-bins."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """Without a budget (tokens, epochs, windows, minutes) each trial trains the original's 50
    million windows; with several, the first one reached ends it."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    """The beam search; defaults are the original's. Of --cdf-* and --k-* both apply, cdf first."""

    def run(self) -> None:
        from tt_fast.sweep.sweep import run_sweep

        check_preset(self.preset)
        require(len(self.datasets) > 0, "datasets", "at least one", "none")
        result = run_sweep(
            self.datasets,
            self.seeds,
            self.output_dir,
            self._config(),
            self._cluster(),
            progress=not self.no_progress,
            say=_say,
        )
        print(result)
        print(self.output_dir)
        if result.failures:
            raise SystemExit(1)  # no error of the command line: the table has said what failed

    def saved(self) -> str:
        if not (self.output_dir / "sweep.json").exists():
            return "nothing was written"
        return f"results and checkpoints are in {self.output_dir}; the same command continues"

    def _config(self) -> SweepConfig:
        from tt_fast.sweep.trial import PlayConfig, SweepConfig

        play = PlayConfig(
            episodes=self.episodes,
            episode_seed=self.episode_seed,
            num_envs=self.num_envs,
            max_steps=self.max_steps,
            plan_freq=self.plan_freq,
            prefix_context=not self.no_prefix_context,
            backend=self.backend,
            plan=PlanConfig(**config_to_dict(self.plan)),
        )
        return SweepConfig(
            model=ModelConfig(**config_to_dict(self.model)),
            train=TrainConfig(**config_to_dict(self.train)),
            play=play,
            env_id=self.env_id,
            ref_scores=self.ref_scores,
        )

    def _cluster(self) -> Cluster:
        from tt_fast.sweep.runner import Cluster

        return Cluster(
            workers=self.workers,
            cpus_per_trial=self.cpus_per_trial,
            gpus_per_trial=self.gpus_per_trial,
            retries=self.retries,
            address=self.address,
        )


def _say(line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    from tqdm.auto import tqdm

    tqdm.write(line)
