"""Train a model on a dataset: tokens, windows, loss, checkpoints.

Source: scripts/train.py and trajectory/utils/training.py. A run folder holds

    metrics.csv, tensorboard/            what was measured
    scores.csv                           evaluations, where they are asked for
    checkpoints/step_00001000/           the newest two; each one whole, see checkpoint.py
        training_state.safetensors       optimizer, position in the data
    best/                                the checkpoint with the best score

Under torchrun several processes train one model (training/workers.py); the first one writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from tt_fast.checkpoint import Checkpoint, newest_checkpoint
from tt_fast.config import ModelConfig, TrainConfig
from tt_fast.data.episodes import OfflineDataset
from tt_fast.encoding import tokenize
from tt_fast.files import locked
from tt_fast.training.run_folder import prepare_run_folder
from tt_fast.training.step import seed_device
from tt_fast.training.trainer import CheckedEvaluator, Evaluator, Trainer
from tt_fast.training.workers import Workers, join_workers
from tt_fast.validate import refuse, require, require_type


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
        resume: continue from the newest checkpoint there; bit for bit on the CPU with as many
            threads (with a budget in minutes the learning rate follows the clock instead). Without
            one, start.
        progress: show a progress bar.
        evaluator: scores the model every `eval_every` steps and at the end, the higher the better;
            the best one is kept in `output_dir`/best. Its seconds do not count as training. If it
            has a method `check(dataset, model_config)`, as `EpisodeScore` does, that is called
            before anything is written. On a GPU, that one is current.
        wandb_project: log to Weights & Biases as well.

    Returns:
        The trained model in eval mode on the CPU, its discretizer and metadata: the last one, also
        with an evaluator, whose best one is `Checkpoint.load(output_dir / "best")`.

    Raises:
        ValueError: configs that do not fit the dataset or, resuming, the checkpoint; an evaluator
            without `eval_every`, or the reverse.
        FileExistsError: `output_dir` holds checkpoints and `resume` is False.
        BlockingIOError: another run is at work in `output_dir`.
        FloatingPointError: the loss is no longer finite; the last checkpoint stands.
        ImportError: Weights & Biases is asked for and not installed.
        WorkerLostError: another process of the job has ended; the last checkpoint stands.
    """
    _check_configs(dataset, model_config, train_config)
    _check_evaluator(train_config, evaluator)
    output_dir = Path(output_dir)
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(join_workers(train_config.device))
        device = pick_device(train_config.device)
        if device.type == "cuda":  # "cuda" is this one, for evaluators too
            stack.enter_context(torch.cuda.device(device))
        if isinstance(evaluator, CheckedEvaluator):
            evaluator.check(dataset, model_config)
        if workers.is_first:
            stack.enter_context(locked(output_dir, "run"))
        newest = _open_run(output_dir, resume, workers)
        discretizer, windows = tokenize(
            dataset, model_config, train_config, output_dir, num_processes=workers.count
        )
        stack.enter_context(_lent_generators(device, train_config.seed))
        trainer = Trainer(
            dataset, model_config, train_config, windows, discretizer, device, workers, evaluator
        )
        if newest is not None:
            trainer.restore(newest)
        trainer.require_one_run()
        trainer.run(output_dir, progress and workers.is_first, wandb_project)
        return trainer.checkpoint()


@contextlib.contextmanager
def _lent_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators, seeded, and put back at the end (an Apple GPU's stays seeded).

    Initial weights draw from them, and so does dropout on a GPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for lent in {torch.device("cpu"), device}:
            seed_device(lent, seed)
        yield


def _open_run(output_dir: Path, resume: bool, workers: Workers) -> Path | None:
    """The checkpoint to go on from, of a folder made ready for all workers."""
    if workers.is_first:
        prepare_run_folder(output_dir)
    workers.wait()
    newest = newest_checkpoint(output_dir)
    if newest is not None and not resume:
        raise FileExistsError(
            f"output_dir: expected one without checkpoints or resume=True, got {newest}"
        )
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


def _check_configs(dataset: OfflineDataset, model: ModelConfig, config: TrainConfig) -> None:
    for name, value, kind in (
        ("dataset", dataset, OfflineDataset),
        ("model_config", model, ModelConfig),
        ("train_config", config, TrainConfig),
    ):
        require_type(name, value, kind)
    for name in ("observation_dim", "action_dim"):
        want, got = getattr(dataset, name), getattr(model, name)
        require(got == want, f"model_config.{name}", f"the dataset's {want}", got)
    bins = config.num_bins
    same = model.vocab_size == bins
    require(same, "model_config.vocab_size", f"train_config.num_bins={bins}", model.vocab_size)


def _check_evaluator(config: TrainConfig, evaluator: Evaluator | None) -> None:
    every = config.eval_every
    if every is not None:
        require(
            callable(evaluator), "evaluator", f"a function, as eval_every is {every}", evaluator
        )
    elif evaluator is not None:
        refuse("eval_every", "a number of steps, as there is an evaluator", every)
