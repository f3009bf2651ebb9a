"""A trial of a sweep: one dataset with one seed, trained, played, and kept as result.json.

The folder of a trial is a run folder of `train`, so a trial goes on wherever it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import TOKEN_KINDS, ModelConfig, PlanConfig, TrainConfig, config_to_dict
from tt_fast.data import OfflineDataset, load_dataset
from tt_fast.evaluate import evaluate
from tt_fast.files import read_json, to_json, write_text
from tt_fast.planning import Planner
from tt_fast.planning.search import BACKENDS, check_backend
from tt_fast.results import EvalResult, ScoredEpisodes, mean_text
from tt_fast.train import train
from tt_fast.training.optimizer import ORIGINAL_WINDOWS
from tt_fast.training.state import RunIdentity
from tt_fast.validate import require, require_choice, require_int

#: Budgets of training; a sweep that is continued may raise them.
_BUDGETS = ("max_tokens", "max_epochs", "max_windows", "max_minutes")
#: What a dataset decides about its model, and a trial about its training.
_PER_TRIAL = {"observation_dim", "action_dim", "vocab_size", "seed"}
#: Errors that another attempt would meet again.
_FINAL_ERRORS = (ValueError, FileNotFoundError, FileExistsError)


@dataclass(frozen=True)
class PlayConfig:
    """How the model of a trial is scored; see `Planner` and `evaluate`."""

    episodes: int = 1
    """Episodes per trial; 0 only trains."""
    episode_seed: int = 0
    """Seed of every trial's first episode; episode j has seed + j."""
    num_envs: int = 1
    """Environments side by side; results do not depend on it."""
    max_steps: int | None = None
    """End every episode after so many steps."""
    plan_freq: int = 1
    """Steps between two plans."""
    prefix_context: bool = True
    """Condition plans on past transitions."""
    backend: str = "auto"
    """Planning backend."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        require(isinstance(self.plan, PlanConfig), "plan", "a PlanConfig", self.plan)
        require_int("episodes", self.episodes, 0)
        require_int("episode_seed", self.episode_seed, 0)
        require_int("num_envs", self.num_envs, 1)
        if self.max_steps is not None:
            require_int("max_steps", self.max_steps, 1)
        require_int("plan_freq", self.plan_freq, 1, self.plan.horizon)
        require_choice("backend", self.backend, ("auto", *BACKENDS))


@dataclass(frozen=True)
class SweepConfig:
    """What every trial of a sweep does."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(1, 1))
    """Its dimensions and vocab_size give way to those of each dataset and of `num_bins`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Its seed gives way to each trial's."""
    play: PlayConfig = field(default_factory=PlayConfig)
    env_id: str | None = None
    """Gymnasium id of the environment, if the datasets do not say."""
    ref_scores: tuple[float, float] | None = None
    """Returns that score 0 and 100, if they are not known."""

    def __post_init__(self) -> None:
        for part, kind in (("model", ModelConfig), ("train", TrainConfig), ("play", PlayConfig)):
            got = getattr(self, part)
            require(isinstance(got, kind), part, f"a {kind.__name__}", got)
        # scored at the end only; `train` would ask for an evaluator
        for name in ("eval_every", "patience"):
            got = getattr(self.train, name)
            require(got is None, f"train.{name}", "None in a sweep", got)

    def model_for(self, dataset: OfflineDataset) -> ModelConfig:
        """The config of a model for this dataset."""
        known = {
            "observation_dim": dataset.observation_dim,
            "action_dim": dataset.action_dim,
            "vocab_size": self.train.num_bins,
        }
        return ModelConfig(**config_to_dict(self.model) | known)

    def settings(self) -> dict[str, Any]:
        """JSON values of what decides the results, budgets left out, by name."""
        parts = RunIdentity(self.model, self.train, "").to_dict()
        found = {
            f"{part}.{name}": value
            for part in ("model_config", "train_config")
            for name, value in parts[part].items()
            if name not in _PER_TRIAL
        }
        for name in ("episode_seed", "max_steps", "plan_freq", "prefix_context", "backend"):
            found[name] = getattr(self.play, name)
        found |= {f"plan.{k}": value for k, value in config_to_dict(self.play.plan).items()}
        found |= {"env_id": self.env_id, "ref_scores": self.ref_scores}
        return as_json(found)

    def budgets(self) -> dict[str, float | None]:
        """What a continued sweep may raise, by name; None is no limit."""
        found = {name: getattr(self.train, name) for name in _BUDGETS}
        if all(value is None for value in found.values()):
            found["max_windows"] = ORIGINAL_WINDOWS
        return {**found, "episodes": int(self.play.episodes)}


@dataclass(frozen=True)
class Trial:
    """One dataset with one seed."""

    dataset: str
    """Name of the dataset"""
    source: str
    """Where it is, as `load_dataset` takes it"""
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder, and of the trial."""
        return f"{_file_name(self.dataset)}-seed{self.seed}"


@dataclass(frozen=True)
class TrialResult:
    """What a trial found."""

    trial: Trial
    step: int
    """Optimiser steps that its model was trained for"""
    losses: dict[str, float]
    """Nats per token, by kind of token"""
    played: ScoredEpisodes | None
    """Its episodes; None if it only trained"""

    def __str__(self) -> str:
        if self.played is None:
            losses = ", ".join(f"{kind} {self.losses[kind]:.3f}" for kind in TOKEN_KINDS)
            return f"{self.trial.folder}: loss {losses}"
        text = f"return {mean_text(self.played.mean_return, self.played.std_error)}"
        if self.played.normalized_mean is not None:
            score = mean_text(self.played.normalized_mean, self.played.normalized_std_error)
            text += f", score {score}"
        return f"{self.trial.folder}: {text}"


def read_result(output_dir: Path, trial: Trial, config: SweepConfig) -> TrialResult | None:
    """The result of a trial; None if there is none, or one with smaller budgets.

    Raises:
        ValueError: its result.json is damaged.
    """
    path = output_dir / trial.folder / "result.json"
    if not path.exists():
        return None
    values = read_json(path)
    try:
        if values["budgets"] != as_json(config.budgets()):
            return None
        played = values["played"]
        scored = None if played is None else ScoredEpisodes.from_dict(played)
        return TrialResult(trial, values["step"], values["losses"], scored)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the result of a trial, got none: {error!r}") from error


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt that raised, or whose process died."""

    error: str
    """Last line of the error"""
    again: bool
    """Another attempt may help"""


def attempt(
    trial: Trial, config: SweepConfig, folder: Path, num_threads: int, import_paths: Sequence[str]
) -> FailedAttempt | None:
    """Train and play, in a process of its own, into the trial's folder.

    Args:
        trial: what to train on.
        config: how.
        folder: the trial's; error.txt in it tells all about an attempt that failed.
        num_threads: of training and planning.
        import_paths: where modules that register environments may lie.
    """
    # Ray ends a trial as Ctrl-C would; a sweep in the background may have this signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(num_threads)
    sys.path.extend(path for path in import_paths if path not in sys.path)
    try:
        _run_trial(trial, config, folder, num_threads)
    except Exception as error:
        write_error(folder, traceback.format_exc())
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        return FailedAttempt(last_line, not isinstance(error, _FINAL_ERRORS))
    return None


def _run_trial(trial: Trial, config: SweepConfig, folder: Path, num_threads: int) -> None:
    if config.play.episodes:
        check_backend(config.play.backend)  # here, not where the sweep was started; before training
    dataset = load_dataset(trial.source, env_id=config.env_id, ref_scores=config.ref_scores)
    train_config = dataclasses.replace(config.train, seed=trial.seed)
    model_config = config.model_for(dataset)
    checkpoint = train(dataset, model_config, train_config, folder, resume=True, progress=False)
    played = _play(checkpoint, config.play, num_threads) if config.play.episodes else None
    metadata = checkpoint.metadata
    values = {
        "dataset": trial.dataset,
        "seed": trial.seed,
        "budgets": config.budgets(),
        "step": metadata["step"],
        "tokens": metadata["tokens"],
        "seconds": metadata["seconds"],
        "losses": metadata["eval_losses"],
        "marginal_losses": metadata["marginal_losses"],
        "played": None if played is None else played.to_dict() | {"checkpoint": str(folder)},
    }
    write_text(folder / "result.json", to_json(values))
    (folder / "error.txt").unlink(missing_ok=True)


def _play(checkpoint: Checkpoint, play: PlayConfig, num_threads: int) -> EvalResult:
    planner = Planner(
        checkpoint,
        play.plan,
        play.backend,
        plan_freq=play.plan_freq,
        prefix_context=play.prefix_context,
        num_threads=num_threads,
    )
    result = evaluate(
        planner,
        episodes=play.episodes,
        num_envs=play.num_envs,
        seed=play.episode_seed,
        max_steps=play.max_steps,
        progress=False,
    )
    if result.interrupted:  # the episodes that are missing would be the long ones
        raise KeyboardInterrupt
    return result


def write_error(folder: Path, text: str) -> None:
    """Keep why an attempt failed."""
    write_text(folder / "error.txt", text)


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from a file: JSON has no tuples."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _file_name(dataset: str) -> str:
    """A dataset's name as that of a folder: minari's have slashes."""
    return re.sub(r"[^\w.+-]+", "-", dataset).lstrip(".-") or "dataset"
