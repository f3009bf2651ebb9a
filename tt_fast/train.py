"""Train a model on a dataset: tokens, windows, loss, checkpoints.

Source: scripts/train.py and trajectory/utils/training.py. A run folder holds

    metrics.csv, tensorboard/            what was measured
    checkpoints/step_00001000/           the newest two; each one whole, see checkpoint.py
        training_state.safetensors       optimizer, random state, position in the data
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tt_fast.checkpoint import Checkpoint, newest_checkpoint, origin
from tt_fast.config import TOKEN_KINDS, ModelConfig, TrainConfig, config_to_dict
from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import TokenWindows, build_transitions
from tt_fast.discretizer import Discretizer
from tt_fast.files import atomic_folder
from tt_fast.losses import evaluate_losses, marginal_losses, model_batch
from tt_fast.metrics import LOSS_NAMES, MetricsLog
from tt_fast.model import TrajectoryTransformer
from tt_fast.optimizer import Budget, build_optimizer
from tt_fast.training_pass import Batch, ParallelPasses, add_gradients, even_passes
from tt_fast.training_state import Position, RunIdentity, read_state, write_state
from tt_fast.validate import require

_KEPT_CHECKPOINTS = 2


def train(
    dataset: OfflineDataset,
    model_config: ModelConfig,
    train_config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """Train until the budget is spent; the result is also the newest checkpoint of `output_dir`.

    Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt. A killed run loses
    the work since its last checkpoint and nothing else.

    Args:
        dataset: what to learn from.
        model_config: its dimensions must be the dataset's, its vocab_size the `num_bins`.
        train_config: how.
        output_dir: run folder; made if absent.
        resume: continue from the newest checkpoint there, bit for bit on the CPU (with a budget in
            minutes the learning rate follows the clock instead). Without one, start.
        progress: show a progress bar.

    Returns:
        The trained model in eval mode on the CPU, its discretizer and metadata.

    Raises:
        ValueError: configs that do not fit the dataset or, resuming, the checkpoint.
        FileExistsError: `output_dir` holds checkpoints and `resume` is False.
        FloatingPointError: the loss is no longer finite; the last checkpoint stands.
    """
    _check_configs(dataset, model_config, train_config)
    output_dir = Path(output_dir)
    newest = newest_checkpoint(output_dir)
    if newest is not None and not resume:
        raise FileExistsError(
            f"output_dir: expected one without checkpoints or resume=True, got {newest}"
        )
    _prepare_folder(output_dir / "checkpoints")

    discretizer, windows = tokenize(dataset, model_config, train_config)
    device = pick_device(train_config.device)
    # dropout and initial weights draw from torch's global generators: lend them, then put them back
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(train_config.seed)
        trainer = _Trainer(dataset, model_config, train_config, windows, discretizer, device)
        if newest is not None:
            trainer.restore(newest)
        trainer.run(output_dir, progress)
        return trainer.checkpoint()


def tokenize(
    dataset: OfflineDataset, model_config: ModelConfig, train_config: TrainConfig
) -> tuple[Discretizer, TokenWindows]:
    """Fit the discretizer to a dataset's transitions and cut their tokens into windows."""
    transitions = build_transitions(
        dataset,
        discount=train_config.discount,
        termination_penalty=train_config.termination_penalty,
        max_path_length=train_config.max_path_length,
    )
    discretizer = Discretizer.fit(transitions.values, train_config.num_bins, train_config.strategy)
    windows = TokenWindows(
        discretizer.encode(transitions.values),
        transitions.path_lengths,
        model_config.num_transitions,
        model_config.vocab_size,
        step=train_config.step,
        max_path_length=train_config.max_path_length,
    )
    return discretizer, windows


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
    ) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.windows, self.discretizer = windows, discretizer
        self.model = TrajectoryTransformer(model_config).to(device)
        self.optimizer = build_optimizer(self.model, config)
        self.pass_windows = _pass_windows(config, windows, device)
        on_cpu = device.type == "cpu"
        self.passes = ParallelPasses(self.model, torch.get_num_threads()) if on_cpu else None
        self.budget = Budget(config, len(windows), windows.window_len)
        self.identity = RunIdentity(model_config, config, _digest(windows, discretizer))
        self.at = Position()
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1
        self.marginal_losses = marginal_losses(windows, model_config)
        self.windows = windows.to(device)  # after what counts their tokens here
        self.eval_losses: dict[str, float] = {}
        self.origin = origin()  # asks git: once a run, not once a checkpoint

    # ---- the loop ----

    def run(self, output_dir: Path, progress: bool) -> None:
        """Train until the budget is spent, logging and writing checkpoints on the way."""
        log = MetricsLog(output_dir, self.at.step)
        bar = tqdm(
            total=100, disable=not progress, initial=min(100.0, 100 * self.fraction),
            bar_format="train {n:.1f} % |{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip
        self.model.train()
        try:
            with _deferred_interrupt() as interrupted:
                saved_step = self._run_steps(output_dir, log, bar, interrupted)
                if not interrupted.is_set() and not self.eval_losses:
                    self.eval_losses = evaluate_losses(self.model, self.windows)
                if self.at.step > saved_step:
                    self._save(output_dir)
            if interrupted.is_set():
                raise KeyboardInterrupt
        finally:
            bar.close()
            log.close()
            if self.passes is not None:
                self.passes.close()

    def _run_steps(
        self, output_dir: Path, log: MetricsLog, bar: Any, interrupted: threading.Event
    ) -> int:
        """Steps and the checkpoints between them; returns the step of the newest one."""
        saved_step, saved_at = self.at.step, time.monotonic()
        clock, row_seconds, row_tokens = time.monotonic(), self.at.seconds, self.at.tokens
        while self.fraction < 1.0 and not interrupted.is_set():
            self._step()
            now = time.monotonic()
            self.at.seconds += now - clock
            clock = now
            if self.at.sum_steps == self.config.log_steps or self.fraction >= 1.0:
                elapsed = self.at.seconds - row_seconds
                self._log(log, bar, (self.at.tokens - row_tokens) / max(elapsed, 1e-9))
                row_seconds, row_tokens = self.at.seconds, self.at.tokens
            minutes = (now - saved_at) / 60.0
            due = self.at.step % self.config.checkpoint_steps == 0
            if (due or minutes >= self.config.checkpoint_minutes) and self.fraction < 1.0:
                self._save(output_dir)
                saved_step, saved_at = self.at.step, time.monotonic()
        return saved_step

    @property
    def fraction(self) -> float:
        """Share of the budget used."""
        return self.budget.fraction(self.at.tokens, self.at.windows, self.at.seconds)

    def _step(self) -> None:
        """One optimiser step on the next batch."""
        window_ids = self._next_window_ids()
        learning_rate = self.budget.learning_rate(self.at.tokens, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batches = [
            Batch(*model_batch(self.model, self.windows, ids))
            for ids in window_ids.split(self.pass_windows)
        ]
        token_losses = torch.cat(self._backward(batches))
        targets = torch.cat([batch.targets for batch in batches])
        mask = torch.cat([batch.mask for batch in batches])
        loss = self.model.weighted_loss(token_losses, mask)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self._require_finite(loss, norm)
        self.optimizer.step()
        self.eval_losses = {}
        self._account(loss, token_losses, targets, mask)

    def _backward(self, batches: list[Batch]) -> list[Tensor]:
        """Gradients of a step; the losses of each batch's tokens, (B, T)."""
        bfloat16 = self.config.precision == "bfloat16"
        if self.passes is not None:
            address = (self.config.seed, self.at.step)
            return self.passes.backward(batches, address=address, bfloat16=bfloat16)
        self.optimizer.zero_grad(set_to_none=True)
        num_windows, found = sum(len(batch.inputs) for batch in batches), []
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                losses = self.model.token_losses(batch.inputs, batch.targets, batch.goal)
            found.append(add_gradients(self.model, losses, batch.mask, num_windows))
        return found

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

    def _require_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Stop before weights are spoilt: what is saved stays good."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not torch.isfinite(value):
                got = f"{value.item()} at step {self.at.step}"
                raise FloatingPointError(f"{name}: expected a finite number, got {got}")

    def _account(self, loss: Tensor, token_losses: Tensor, targets: Tensor, mask: Tensor) -> None:
        at = self.at
        at.step += 1
        at.windows += len(targets)
        at.tokens += int((targets != self.model.config.vocab_size).sum())
        at.sum_steps += 1
        at.sums["loss"] += loss.item()
        for kind, mean in self.model.mean_by_kind(token_losses, mask).items():
            at.sums[f"loss_{kind}"] += mean.item()

    def _log(self, log: MetricsLog, bar: Any, tokens_per_second: float) -> None:
        at = self.at
        means = {name: total / at.sum_steps for name, total in at.sums.items()}
        at.losses = {kind: means[f"loss_{kind}"] for kind in TOKEN_KINDS}
        at.sums, at.sum_steps = dict.fromkeys(LOSS_NAMES, 0.0), 0
        log.write(
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

    # ---- checkpoints ----

    def checkpoint(self) -> Checkpoint:
        """The model so far, copied to the CPU in eval mode."""
        model = copy.deepcopy(self.model).cpu().eval()
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
            **self.origin,
        }
        return Checkpoint(model, self.discretizer, metadata)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that this run, or its forerunner, wrote."""
        saved = Checkpoint.load(folder)
        self.at = read_state(folder, self.identity, self.model, self.optimizer)
        self.model.load_state_dict(saved.model.state_dict())
        self.eval_losses = saved.metadata["eval_losses"]

    def _save(self, output_dir: Path) -> None:
        """Write checkpoints/step_N whole, then drop all but the newest ones."""
        folder = output_dir / "checkpoints" / f"step_{self.at.step:08d}"
        with atomic_folder(folder) as temporary:
            self.checkpoint().write(temporary)
            write_state(temporary, self.identity, self.at, self.model, self.optimizer)
        for old in sorted(folder.parent.glob("step_*"))[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(_hide(old))


def _pass_windows(config: TrainConfig, windows: TokenWindows, device: torch.device) -> int:
    """Windows of one pass: what fits a processor's caches, a whole batch elsewhere."""
    if config.pass_windows is not None:
        return config.pass_windows
    if device.type != "cpu":
        return config.batch_size
    return even_passes(config.batch_size, windows.window_len, torch.get_num_threads())


def _digest(windows: TokenWindows, discretizer: Discretizer) -> str:
    """SHA-256 of the data as the model sees them."""
    return hashlib.sha256(windows.token_bytes() + discretizer.thresholds.tobytes()).hexdigest()


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


def _prepare_folder(checkpoints: Path) -> None:
    """Make the folder; drop what a killed run left half-written or half-deleted in it."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output_dir: expected a folder or a new name: {error}") from error
    for leftover in checkpoints.glob(".step_*"):
        shutil.rmtree(leftover)


def _hide(folder: Path) -> Path:
    """Rename a checkpoint that is about to be deleted: a half-deleted one must not be found."""
    return folder.rename(folder.with_name(f".{folder.name}.old"))


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, so that a step is never cut in half.

    Outside the main thread Python delivers no signals: the event then stays unset.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
