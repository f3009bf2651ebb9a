"""The training loop: steps, evaluations, rows of the log, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tt_fast.checkpoint import Checkpoint, origin
from tt_fast.config import TOKEN_KINDS, ModelConfig, TrainConfig, config_to_dict
from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import TokenWindows
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer
from tt_fast.training.interrupt import Interrupt, deferred_interrupt
from tt_fast.training.log import LOSS_NAMES, RunLog, start_wandb
from tt_fast.training.losses import evaluate_losses, marginal_losses
from tt_fast.training.optimizer import Budget, WeightAverage, build_optimizer
from tt_fast.training.run_folder import new_best, new_checkpoint
from tt_fast.training.state import Position, RunIdentity, read_state, write_state
from tt_fast.training.step import StepGradients, StepResult
from tt_fast.training.workers import Workers
from tt_fast.validate import require, require_number

#: Scores a checkpoint, higher is better; see `tt_fast.selection.EpisodeScore`.
Evaluator = Callable[[Checkpoint], float]


@runtime_checkable
class CheckedEvaluator(Protocol):
    """An evaluator that can tell before training whether it will work."""

    def __call__(self, checkpoint: Checkpoint, /) -> float:
        """The score."""

    def check(self, dataset: OfflineDataset, model: ModelConfig, /) -> None:
        """Raise what a call would raise."""


class Trainer:
    """One run: model, optimizer, windows and position.

    Args:
        dataset: what the windows are of.
        model_config, config: checked to fit it.
        windows, discretizer: its tokens, and what made them.
        device: where the model trains.
        workers: this process among those of the job.
        evaluator: see `train`.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        model_config: ModelConfig,
        config: TrainConfig,
        windows: TokenWindows,
        discretizer: Discretizer,
        device: torch.device,
        workers: Workers,
        evaluator: Evaluator | None,
    ) -> None:
        self.dataset, self.config, self.workers = dataset, config, workers
        self.evaluator = evaluator
        self.discretizer = discretizer
        self.model = TrajectoryTransformer(model_config).to(device)
        self.optimizer = build_optimizer(self.model, config)
        decay = config.ema_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        self.budget = Budget(config, len(windows), windows.window_len)
        self.identity = RunIdentity(model_config, config, _digest(windows, discretizer))
        self.at = Position()
        self.stopping = False  # an interrupt that all workers know of
        self.unsaved = False  # the newest checkpoint lacks something
        self.saved_at = time.monotonic()
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1
        self.marginal_losses = marginal_losses(windows, model_config)
        self.windows = windows.to(device)  # after what counts their tokens here
        self.gradients = StepGradients(self.model, config, self.windows, workers)
        self.eval_losses: dict[str, float] = {}
        self.row_seconds, self.row_tokens = 0.0, 0  # of the last row of metrics.csv
        self.origin = origin()  # asks git: once a run, not once a checkpoint

    # ---- the loop ----

    def run(self, output_dir: Path, progress: bool, wandb_project: str | None) -> None:
        """Train until the budget is spent, logging and writing checkpoints on the way."""
        bar = tqdm(
            total=100, disable=not progress, initial=min(100.0, 100 * self.fraction),
            bar_format="train {n:.1f} % |{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip
        self.model.train()
        with contextlib.ExitStack() as ending:
            # left last: what ended the run is told even if a signal comes while files are closed
            interrupt = ending.enter_context(deferred_interrupt())
            ending.callback(self.gradients.close)
            ending.callback(bar.close)
            with interrupt.at_once():
                log = self._open_log(output_dir, wandb_project)
            ending.callback(log.close)
            self._run_steps(output_dir, log, bar, interrupt)
            if self.stopping or interrupt.happened:
                raise KeyboardInterrupt

    def _run_steps(self, output_dir: Path, log: RunLog, bar: Any, interrupt: Interrupt) -> None:
        """Steps, evaluations and checkpoints, the last one at the end."""
        self.saved_at = clock = time.monotonic()
        self._evaluate_if_due(output_dir, log, interrupt)  # one that was cut short
        while self.fraction < 1.0 and not self.stopping:
            self._step()
            now = time.monotonic()
            minutes = self._agree(now - clock, now - self.saved_at, interrupt) / 60.0
            if self.at.sum_steps >= self.config.log_steps:
                self._log(log, bar)
            due = self.at.step % self.config.checkpoint_steps == 0
            if (due or minutes >= self.config.checkpoint_minutes) and self.fraction < 1.0:
                self._save(output_dir)
            self._evaluate_if_due(output_dir, log, interrupt)
            clock = time.monotonic()
        if not self.stopping:
            self._finish(log, bar)
        if self.unsaved:
            self._save(output_dir)

    def _finish(self, log: RunLog, bar: Any) -> None:
        """What is left when the budget is spent."""
        if self.at.sum_steps:
            self._log(log, bar)
        if not self.eval_losses:
            self.eval_losses = evaluate_losses(self.published, self.windows)
            self.unsaved = True

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
        self.eval_losses, self.unsaved = {}, True
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
        at = self.at
        if not self.workers.is_first:
            return RunLog(None, at.step, at.eval_step)
        wandb_run = None
        if wandb_project is not None:
            config, resumed = self.identity.to_dict(), at.step > 0
            wandb_run = start_wandb(wandb_project, output_dir, config, resume=resumed)
        return RunLog(output_dir, at.step, at.eval_step, wandb_run)

    def _log(self, log: RunLog, bar: Any) -> None:
        """A row of means over the steps since the last one."""
        at = self.at
        elapsed = max(at.seconds - self.row_seconds, 1e-9)
        tokens_per_second = (at.tokens - self.row_tokens) / elapsed
        self.row_seconds, self.row_tokens = at.seconds, at.tokens
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

    def _evaluate_if_due(self, output_dir: Path, log: RunLog, interrupt: Interrupt) -> None:
        """Every so many steps and at the end of the budget, once a step."""
        every, at = self.config.eval_every, self.at
        if self.evaluator is None or every is None or at.step == at.eval_step or self.stopping:
            return
        if at.step % every == 0 or self.fraction >= 1.0:
            self._evaluate(self.evaluator, output_dir, log, interrupt)

    def _evaluate(
        self, evaluator: Evaluator, output_dir: Path, log: RunLog, interrupt: Interrupt
    ) -> None:
        """Score the model, on the first worker; keep it if it is the best one.

        A checkpoint before it: an evaluator's failure must not cost training. One after it: `best/`
        and the position agree.
        """
        if self.unsaved:
            self._save(output_dir)
        at, score = self.at, math.nan
        if self.workers.is_first and not interrupt.happened:
            with contextlib.suppress(KeyboardInterrupt), interrupt.at_once():
                found = evaluator(self.checkpoint())
                require_number("evaluator's score", found)
                score = float(found)
            if interrupt.happened:  # the evaluator may have made do with what it had
                score = math.nan
        score = self.workers.agree(score)
        if math.isnan(score):  # interrupted: the evaluation comes again after resuming
            self.stopping = True
            return
        at.eval_step = at.step
        is_best = at.best_score is None or score > at.best_score
        at.worse_evals = 0 if is_best else at.worse_evals + 1
        at.best_score = score if is_best else at.best_score
        log.write_score({"step": at.step, "tokens": at.tokens, "score": score})
        if is_best and self.workers.is_first:
            with new_best(output_dir) as folder:
                self.checkpoint().write(folder)
        self._save(output_dir)

    # ---- checkpoints ----

    def checkpoint(self) -> Checkpoint:
        """The model so far, copied to the CPU in eval mode."""
        model = copy.deepcopy(self.published).cpu().eval()
        dataset, at = self.dataset, self.at
        metadata = {
            "env_id": dataset.env_id,
            "dataset": dataset.name,
            "ref_scores": [*map(float, dataset.ref_scores)] if dataset.ref_scores else None,
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
        self.row_seconds, self.row_tokens = self.at.seconds, self.at.tokens

    def require_one_run(self) -> None:
        """All workers stand where the first one stands, on the same data.

        Raises:
            ValueError: some do not.
        """
        digest = int(self.identity.data_sha256[:12], 16)  # as many bits as a float64 holds
        same_step = self.workers.agree(self.at.step) == self.at.step
        same_data = self.workers.agree(digest) == digest
        steps_apart, data_apart = self.workers.total(not same_step, not same_data)
        workers = f"{self.workers.count} workers"
        one = "one folder that all of them see"
        require(steps_apart == 0, "output_dir", one, f"other checkpoints for some of {workers}")
        require(data_apart == 0, "dataset", "the same for all", f"others for some of {workers}")

    def _save(self, output_dir: Path) -> None:
        """Write checkpoints/step_N whole; the first worker does."""
        self.unsaved, self.saved_at = False, time.monotonic()
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
