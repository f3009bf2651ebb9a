"""`tt-fast train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tt_fast.commands.base import Command
from tt_fast.config import TOKEN_KINDS, ModelConfig, PlanConfig, TrainConfig, config_to_dict
from tt_fast.presets import check_preset
from tt_fast.validate import require

if TYPE_CHECKING:
    from tt_fast.checkpoint import Checkpoint
    from tt_fast.data import OfflineDataset
    from tt_fast.selection import EpisodeScore


@dataclass(frozen=True)
class ModelOptions(ModelConfig):
    """A `ModelConfig` without what the dataset decides."""

    observation_dim: tyro.conf.Suppress[int] = 1
    action_dim: tyro.conf.Suppress[int] = 1
    vocab_size: tyro.conf.Suppress[int] = 100

    def complete(self, dataset: OfflineDataset, num_bins: int) -> ModelConfig:
        """The config of a model for this dataset."""
        known = {
            "observation_dim": dataset.observation_dim,
            "action_dim": dataset.action_dim,
            "vocab_size": num_bins,
        }
        return ModelConfig(**config_to_dict(self) | known)


@dataclass(frozen=True)
class EvalOptions:
    """How a model is scored while it trains."""

    eval_episodes: int = 8
    """Episodes of an evaluation."""
    eval_horizon: int = 5
    """Transitions planned."""
    eval_beam_width: int = 32
    """Beams kept after each planned transition."""
    eval_plan_freq: int = 1
    """Environment steps between two plans."""
    eval_max_steps: int | None = None
    """Ends every episode after so many steps."""

    def evaluator(self, config: TrainConfig) -> EpisodeScore | None:
        """What `train` calls; None if it is not to evaluate.

        Raises:
            ValueError: options of evaluations, and none asked for.
        """
        if config.eval_every is None:
            idle = "a number of steps, as there are other options of evaluations"
            require(self == EvalOptions(), "eval_every", idle, None)
            return None
        import torch

        from tt_fast.selection import EpisodeScore

        # by name: a process that torchrun started does not yet know which GPU is its own
        name = config.device.partition(":")[0]
        on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return EpisodeScore(
            device="cuda" if on_gpu else "cpu",
            episodes=self.eval_episodes,
            plan=PlanConfig(horizon=self.eval_horizon, beam_width=self.eval_beam_width),
            plan_freq=self.eval_plan_freq,
            max_steps=self.eval_max_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a model on a dataset, into a run folder with checkpoints, metrics.csv and TensorBoard.

    Ctrl-C saves a checkpoint and ends; --resume continues from the newest one. With --eval-every
    the model plays episodes now and then, and the best checkpoint so far is kept in best/. Under
    torchrun (`torchrun --nproc-per-node 2 -m tt_fast train ...`) several processes train one model.
    """

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """An HDF5 file in D4RL's layout, a D4RL name (hopper-medium-v2) or minari:<id>."""
    output_dir: Path
    """Run folder, made if absent."""
    env_id: str | None = None
    """Gymnasium id of the environment, if the dataset does not say."""
    ref_scores: tuple[float, float] | None = None
    """Returns that score 0 and 100, if they are not known."""
    resume: bool = False
    """Continue from the newest checkpoint of the run folder."""
    preset: str | None = None
    """The original's settings for a dataset, jannerm/hopper-medium-v2 and the like; options given
    beside it win."""
    no_progress: bool = False
    """Show no progress bar."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """The model; its dimensions come from the dataset, its vocab_size is --num-bins."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Without a budget (tokens, epochs, windows, minutes) training runs the original's 50 million
    windows; with several, the first one reached ends it."""
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    """What is played every --eval-every steps."""

    def run(self) -> None:
        from tt_fast.checkpoint import newest_checkpoint
        from tt_fast.data import load_dataset
        from tt_fast.train import train
        from tt_fast.training.workers import is_first_process

        check_preset(self.preset)
        dataset = load_dataset(self.dataset, env_id=self.env_id, ref_scores=self.ref_scores)
        model_config = self.model.complete(dataset, self.train.num_bins)
        checkpoint = train(
            dataset,
            model_config,
            self.train,
            self.output_dir,
            resume=self.resume,
            progress=not self.no_progress,
            evaluator=self.evaluation.evaluator(self.train),
            wandb_project=self.wandb,
        )
        if not is_first_process():
            return
        print(_loss_table(checkpoint))
        print(newest_checkpoint(self.output_dir))
        if self.train.eval_every is not None:
            print(f"{self.output_dir / 'best'}: best score {checkpoint.metadata['best_score']:.1f}")

    def saved(self) -> str:
        from tt_fast.checkpoint import newest_checkpoint

        newest = newest_checkpoint(self.output_dir)
        if newest is None:
            return "no checkpoint was written yet"
        return f"the newest checkpoint is {newest}, and --resume continues from it"


def _loss_table(checkpoint: Checkpoint) -> str:
    """Loss per token kind beside that of predicting each dimension's marginal."""
    lines = [f"{'loss, nats per token':<22}{'model':>8}{'marginal':>10}"]
    losses, marginal = (checkpoint.metadata[key] for key in ("eval_losses", "marginal_losses"))
    lines += [f"{kind:<22}{losses[kind]:8.3f}{marginal[kind]:10.3f}" for kind in TOKEN_KINDS]
    return "\n".join(lines)
