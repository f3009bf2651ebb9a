"""Train a model on a dataset: tokens, windows, loss, checkpoints.

Source: scripts/train.py and trajectory/utils/training.py. A run folder holds

    metrics.csv, tensorboard/            what was measured
    scores.csv                           evaluations, where they are asked for
    checkpoints/step_00001000/           the newest two; each one whole, see checkpoint.py
        training_state.safetensors       optimizer, position in the data
    best/                                the checkpoint with the best score

Under torchrun several processes train one model (workers.py); the first one writes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tt_fast.checkpoint import Checkpoint, newest_checkpoint, origin
from tt_fast.config import TOKEN_KINDS, ModelConfig, TrainConfig, config_to_dict
from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import TokenWindows
from tt_fast.discretizer import Discretizer
from tt_fast.encoding import tokenize
from tt_fast.model import TrajectoryTransformer
from tt_fast.training.interrupt import Interrupt, deferred_interrupt
from tt_fast.training.log import LOSS_NAMES, RunLog, start_wandb
from tt_fast.training.losses import evaluate_losses, marginal_losses
from tt_fast.training.optimizer import Budget, WeightAverage, build_optimizer
from tt_fast.training.run_folder import new_best, new_checkpoint, prepare_run_folder
from tt_fast.training.state import Position, RunIdentity, read_state, write_state
from tt_fast.training.step import StepGradients, StepResult
from tt_fast.training.workers import Workers, join_workers
from tt_fast.validate import require, require_number

#: Scores a checkpoint, higher is better; see `tt_fast.selection.EpisodeScore`.
Evaluator = Callable[[Checkpoint], float]


def train(
    dataset: OfflineDataset,
    model_config: ModelConfig,
    train_config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    evaluator: Evaluator | None = None,
    wandb_project: str | None = None,
) -> Checkpoint:
    """Train until the budget is spent; the result is also the newest checkpoint of `output_dir`.

    Ctrl-C or SIGTERM finishes the step, writes a checkpoint and raises KeyboardInterrupt. A killed
    run loses the work since its last checkpoint and nothing else.

    Under torchrun, or in a process group of the caller's, each process takes its share of every
    batch: `batch_size` is the whole job's. All of them must call this with the same arguments and
    see the same `output_dir`.

    Args:
        dataset: what to learn from.
        model_config: its dimensions must be the dataset's, its vocab_size the `num_bins`.
        train_config: how.
        output_dir: run folder; made if absent.
        resume: continue from the newest checkpoint there, bit for bit on the CPU (with a budget in
            minutes the learning rate follows the clock instead). Without one, start.
        progress: show a progress bar.
        evaluator: scores the model every `eval_every` steps and at the end, the higher the better;
            the best one is kept in `output_dir`/best. Its seconds do not count as training.
        wandb_project: log to Weights & Biases as well.

    Returns:
        The trained model in eval mode on the CPU, its discretizer and metadata.

    Raises:
        ValueError: configs that do not fit the dataset or, resuming, the checkpoint; an evaluator
            without `eval_every`, or the reverse.
        FileExistsError: `output_dir` holds checkpoints and `resume` is False.
        FloatingPointError: the loss is no longer finite; the last checkpoint stands.
        ImportError: Weights & Biases is asked for and not installed.
        WorkerLostError: another process of the job has ended; the last checkpoint stands.
    """
    _check_configs(dataset, model_config, train_config)
    _check_evaluator(train_config, evaluator)
    output_dir = Path(output_dir)
    with join_workers(train_config.device) as workers:
        newest = _open_run(output_dir, resume, workers)
        discretizer, windows = tokenize(dataset, model_config, train_config, output_dir)
        device = pick_device(train_config.device)
        # initial weights, and dropout on a GPU, draw from torch's global generators: lend them,
        # then put them back
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(train_config.seed)
            trainer = _Trainer(
                dataset, model_config, train_config, windows, discretizer, device, workers
            )
            if newest is not None:
                trainer.restore(newest)
            trainer.run(output_dir, progress and workers.is_first, evaluator, wandb_project)
            return trainer.checkpoint()


def _open_run(output_dir: Path, resume: bool, workers: Workers) -> Path | None:
    """The checkpoint to go on from, of a folder made ready for all workers."""
    newest = newest_checkpoint(output_dir)
    if newest is not None and not resume:
        raise FileExistsError(
            f"output_dir: expected one without checkpoints or resume=True, got {newest}"
        )
    workers.wait()  # all have looked
    if workers.is_first:
        prepare_run_folder(output_dir)
    workers.wait()
    return newest


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is cuda, else mps, else cpu.

    Raises:
        ValueError: torch does not know it, or it is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected one that torch can use, got {name!r}: {error}"
        ) from error
    return device


class _Trainer:
    """One run: model, optimizer, windows and position."""

    def __init__(
        self,
        dataset: OfflineDataset,
        model_config: ModelConfig,
        config: TrainConfig,
        windows: TokenWindows,
        discretizer: Discretizer,
        device: torch.device,
        workers: Workers,
    ) -> None:
        self.dataset, self.config, self.workers = dataset, config, workers
        self.discretizer = discretizer
        self.model = TrajectoryTransformer(model_config).to(device)
        self.optimizer = build_optimizer(self.model, config)
        decay = config.ema_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        self.budget = Budget(config, len(windows), windows.window_len)
        self.identity = RunIdentity(model_config, config, _digest(windows, discretizer))
        self.at = Position()
        self.stopping = False  # an interrupt that all workers know of
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1
        self.marginal_losses = marginal_losses(windows, model_config)
        self.windows = windows.to(device)  # after what counts their tokens here
        self.gradients = StepGradients(self.model, config, self.windows, workers)
        self.eval_losses: dict[str, float] = {}
        self.origin = origin()  # asks git: once a run, not once a checkpoint

    # ---- the loop ----

    def run(
        self,
        output_dir: Path,
        progress: bool,
        evaluator: Evaluator | None,
        wandb_project: str | None,
    ) -> None:
        """Train until the budget is spent, logging and writing checkpoints on the way."""
        log = self._open_log(output_dir, wandb_project)
        bar = tqdm(
            total=100, disable=not progress, initial=min(100.0, 100 * self.fraction),
            bar_format="train {n:.1f} % |{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip
        self.model.train()
        try:
            with deferred_interrupt() as interrupt:
                self._run_steps(output_dir, log, bar, evaluator, interrupt)
            if self.stopping or interrupt.happened:
                raise KeyboardInterrupt
        finally:
            bar.close()
            log.close()
            self.gradients.close()

    def _run_steps(
        self,
        output_dir: Path,
        log: RunLog,
        bar: Any,
        evaluator: Evaluator | None,
        interrupt: Interrupt,
    ) -> None:
        """Steps, evaluations and checkpoints, the last one at the end."""
        saved_step, saved_at = self.at.step, time.monotonic()
        clock, row_seconds, row_tokens = time.monotonic(), self.at.seconds, self.at.tokens
        self._evaluate_if_due(evaluator, output_dir, log, interrupt)  # one that was cut short
        while self.fraction < 1.0 and not self.stopping:
            self._step()
            now = time.monotonic()
            minutes = self._agree(now - clock, now - saved_at, interrupt) / 60.0
            if self.at.sum_steps == self.config.log_steps or self.fraction >= 1.0:
                elapsed = self.at.seconds - row_seconds
                self._log(log, bar, (self.at.tokens - row_tokens) / max(elapsed, 1e-9))
                row_seconds, row_tokens = self.at.seconds, self.at.tokens
            self._evaluate_if_due(evaluator, output_dir, log, interrupt)
            due = self.at.step % self.config.checkpoint_steps == 0
            if (due or minutes >= self.config.checkpoint_minutes) and self.fraction < 1.0:
                self._save(output_dir)
                saved_step, saved_at = self.at.step, time.monotonic()
            clock = time.monotonic()
        if not self.stopping and not self.eval_losses:
            self.eval_losses = evaluate_losses(self.published, self.windows)
        if self.at.step > saved_step:
            self._save(output_dir)

    @property
    def fraction(self) -> float:
        """Share of the budget used; 1 if evaluations have stopped getting better."""
        patience = self.config.patience
        if patience is not None and self.at.worse_evals >= patience:
            return 1.0
        return self.budget.fraction(self.at.tokens, self.at.windows, self.at.seconds)

    @property
    def published(self) -> TrajectoryTransformer:
        """What checkpoints hold: the average of the weights, if there is one."""
        return self.model if self.average is None else self.average.model

    def _step(self) -> None:
        """One optimiser step on the next batch."""
        window_ids = self._next_window_ids()
        learning_rate = self.budget.learning_rate(self.at.tokens, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        result = self.gradients.run(window_ids, self.at.step)
        self._require_finite(result)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.at.step)
        self.eval_losses = {}
        self._account(result, len(window_ids))

    def _agree(self, seconds: float, unsaved: float, interrupt: Interrupt) -> float:
        """All workers go by the first one's clock, and stop if one of them is told to.

        Args:
            seconds: that the step took.
            unsaved: seconds since the last checkpoint.
            interrupt: of this worker.

        Returns:
            The first one's `unsaved`.
        """
        clock = (seconds, unsaved) if self.workers.is_first else (0.0, 0.0)
        seconds, unsaved, interrupts = self.workers.total(*clock, interrupt.happened)
        self.at.seconds += seconds
        self.stopping = interrupts > 0
        return unsaved

    def _next_window_ids(self) -> Tensor:
        """(batch,) ids; every epoch visits all windows once, in an order of its own."""
        batches = -(-len(self.windows) // self.config.batch_size)
        if self.at.batch == batches:
            self.at.epoch, self.at.batch = self.at.epoch + 1, 0
        start = self.at.batch * self.config.batch_size
        self.at.batch += 1
        return self._epoch_order()[start : start + self.config.batch_size]

    def _epoch_order(self) -> Tensor:
        """(num_windows,) permutation of this epoch, made once."""
        if self._order_epoch != self.at.epoch:
            rng = np.random.default_rng([self.config.seed, self.at.epoch])
            self._order = torch.from_numpy(rng.permutation(len(self.windows)))
            self._order_epoch = self.at.epoch
        return self._order

    def _require_finite(self, result: StepResult) -> None:
        """Stop before weights are spoilt: what is saved stays good."""
        for name, value in (("loss", result.loss), ("gradient norm", result.gradient_norm)):
            if not math.isfinite(value):
                got = f"{value} at step {self.at.step}"
                raise FloatingPointError(f"{name}: expected a finite number, got {got}")

    def _account(self, result: StepResult, num_windows: int) -> None:
        at = self.at
        at.step += 1
        at.windows += num_windows
        at.tokens += result.tokens
        at.sum_steps += 1
        at.sums["loss"] += result.loss
        for kind, loss in result.losses.items():
            at.sums[f"loss_{kind}"] += loss

    def _open_log(self, output_dir: Path, wandb_project: str | None) -> RunLog:
        """Of the first worker; the others write nothing."""
        if not self.workers.is_first:
            return RunLog(None, self.at.step)
        wandb_run = None
        if wandb_project is not None:
            wandb_run = start_wandb(wandb_project, output_dir, self.identity.to_dict())
        return RunLog(output_dir, self.at.step, wandb_run)

    def _log(self, log: RunLog, bar: Any, tokens_per_second: float) -> None:
        at = self.at
        means = {name: total / at.sum_steps for name, total in at.sums.items()}
        at.losses = {kind: means[f"loss_{kind}"] for kind in TOKEN_KINDS}
        at.sums, at.sum_steps = dict.fromkeys(LOSS_NAMES, 0.0), 0
        log.write_metrics(
            {
                "step": at.step,
                "tokens": at.tokens,
                **means,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens_per_second,
            }
        )
        bar.set_postfix(
            obs=f"{at.losses['observation']:.3f}",
            act=f"{at.losses['action']:.3f}",
            rew=f"{at.losses['reward']:.3f}",
            val=f"{at.losses['value']:.3f}",
            tok_s=f"{tokens_per_second:,.0f}",
            refresh=False,
        )
        bar.n = min(100.0, 100 * self.fraction)
        bar.refresh()

    # ---- evaluations ----

    def _evaluate_if_due(
        self, evaluator: Evaluator | None, output_dir: Path, log: RunLog, interrupt: Interrupt
    ) -> None:
        """Every so many steps and at the end of the budget, once a step."""
        every, step = self.config.eval_every, self.at.step
        if evaluator is None or every is None or step == self.at.eval_step:
            return
        if step % every == 0 or self.fraction >= 1.0:
            self._evaluate(evaluator, output_dir, log, interrupt)

    def _evaluate(
        self, evaluator: Evaluator, output_dir: Path, log: RunLog, interrupt: Interrupt
    ) -> None:
        """Score the model, on the first worker; keep it if it is the best one."""
        at, score = self.at, math.nan
        if self.workers.is_first:
            with interrupt.at_once(), contextlib.suppress(KeyboardInterrupt):
                score = evaluator(self.checkpoint())
                require_number("evaluator's score", score)
        score = self.workers.agree(score)
        if math.isnan(score):  # Ctrl-C: the evaluation comes again after resuming
            self.stopping = True
            return
        at.eval_step = at.step
        is_best = at.best_score is None or score > at.best_score
        at.worse_evals = 0 if is_best else at.worse_evals + 1
        at.best_score = score if is_best else at.best_score
        if not self.workers.is_first:
            return
        log.write_score({"step": at.step, "tokens": at.tokens, "score": score})
        if is_best:
            with new_best(output_dir) as folder:
                self.checkpoint().write(folder)

    # ---- checkpoints ----

    def checkpoint(self) -> Checkpoint:
        """The model so far, copied to the CPU in eval mode."""
        model = copy.deepcopy(self.published).cpu().eval()
        dataset, at = self.dataset, self.at
        metadata = {
            "env_id": dataset.env_id,
            "dataset": dataset.name,
            "ref_scores": list(dataset.ref_scores) if dataset.ref_scores else None,
            "discount": self.config.discount,
            "train_config": config_to_dict(self.config),
            "step": at.step,
            "tokens": at.tokens,
            "seconds": at.seconds,
            "losses": at.losses,
            "eval_losses": self.eval_losses,
            "marginal_losses": self.marginal_losses,
            "best_score": at.best_score,
            **self.origin,
        }
        return Checkpoint(model, self.discretizer, metadata)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that this run, or its forerunner, wrote."""
        saved = Checkpoint.load(folder)
        self.at = read_state(folder, self.identity, self.model, self.optimizer)
        self.published.load_state_dict(saved.model.state_dict())
        self.eval_losses = saved.metadata["eval_losses"]

    def _save(self, output_dir: Path) -> None:
        """Write checkpoints/step_N whole; the first worker does."""
        if not self.workers.is_first:
            return
        with new_checkpoint(output_dir, self.at.step) as folder:
            self.checkpoint().write(folder)
            averaged = self.average is not None
            write_state(
                folder, self.identity, self.at, self.model, self.optimizer, with_weights=averaged
            )


def _digest(windows: TokenWindows, discretizer: Discretizer) -> str:
    """SHA-256 of the data as the model sees them."""
    digest = hashlib.sha256()
    windows.update_digest(digest)
    digest.update(discretizer.thresholds.tobytes())
    return digest.hexdigest()


def _check_configs(dataset: OfflineDataset, model: ModelConfig, config: TrainConfig) -> None:
    for name, value, kind in (
        ("dataset", dataset, OfflineDataset),
        ("model_config", model, ModelConfig),
        ("train_config", config, TrainConfig),
    ):
        require(isinstance(value, kind), name, f"a tt_fast.{kind.__name__}", type(value).__name__)
    for name in ("observation_dim", "action_dim"):
        want, got = getattr(dataset, name), getattr(model, name)
        require(got == want, f"model_config.{name}", f"the dataset's {want}", got)
    bins = config.num_bins
    same = model.vocab_size == bins
    require(same, "model_config.vocab_size", f"train_config.num_bins={bins}", model.vocab_size)


def _check_evaluator(config: TrainConfig, evaluator: Evaluator | None) -> None:
    for name, value in (("eval_every", config.eval_every), ("patience", config.patience)):
        fits = value is None or evaluator is not None
        require(fits, "evaluator", f"a function, as {name} is {value}", evaluator)
    fits = evaluator is None or config.eval_every is not None
    require(fits, "eval_every", "a number of steps, as there is an evaluator", config.eval_every)
