"""A whole optimiser step of the original's code beside ours, turn by turn.

    python benchmarks/bench_training.py --original PATH [--task hopper] [--csv FILE]

PATH is a checkout of jannerm/trajectory-transformer. Official sizes, batch 256, dropout: forward,
backward, clipping and AdamW, as its Trainer does them; data loading is left out on both sides. Ours
must first have the original's loss and gradients where nothing is dropped. Each engine runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_original import Original
from common import Row, Work, make_row, write_rows

from tt_fast import ModelConfig, TrainConfig, TrajectoryTransformer
from tt_fast.bench import TASKS
from tt_fast.measure import Ceiling
from tt_fast.optimizer import build_optimizer
from tt_fast.planning.cpu import available_cpus
from tt_fast.tables import Column, head_line, row_line, short
from tt_fast.training_pass import Batch, ParallelPasses, even_passes

ENGINES = (("original", "float32"), ("cpu", "float32"), ("cpu", "bfloat16"))
BATCH = 256
CONFIG = TrainConfig()

COLUMNS = (
    Column("task", -12, lambda pair: pair[0].task),
    Column("engine", -9, lambda pair: pair[0].engine),
    Column("dtype", -9, lambda pair: pair[0].dtype),
    Column("s a step", 9, lambda pair: f"{pair[0].median_ms / 1000:.2f}"),
    Column("tokens/s", 9, lambda pair: f"{pair[1]['tokens_per_second']:,.0f}"),
    Column("times as fast", 13, lambda pair: short(pair[1]["ratio"])),
    Column("% of peak", 9, lambda pair: short(pair[0].percent_of_peak)),
    Column("peak MB", 8, lambda pair: f"{pair[1]['peak_mb']:,.0f}"),
)


def main() -> None:
    """The command line."""
    options = parse()
    if options.engine is not None:
        print(json.dumps(measure(options)))
        return
    rows: list[Row] = []
    print(head_line(COLUMNS))
    for task in options.task:
        check(Original(options.original), task)
        first = 0.0
        for engine, dtype in ENGINES:
            found = run_apart(options, task, engine, dtype)
            names = {"op": "train step", "task": task, "setting": f"batch {BATCH}"}
            work = Work(None, found["tokens"], found["flops"])
            row = make_row(
                {**names, "engine": engine, "dtype": dtype},
                found["step_ms"], work, found["peak_gflops"], options.threads,
            )  # fmt: skip
            first = first or row.median_ms
            about = {
                "ratio": first / row.median_ms, "peak_mb": found["peak_mb"],
                "tokens_per_second": 1000.0 * found["tokens"] / row.median_ms,
            }  # fmt: skip
            rows.append(row)
            print(row_line(COLUMNS, (row, about)), flush=True)
        if options.csv is not None:
            write_rows(options.csv, rows)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--original", type=Path, required=True, help="a checkout of jannerm/trajectory-transformer")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--steps", type=int, default=5, help="steps timed, after one that is not")
    add("--threads", type=int, default=available_cpus())
    add("--csv", type=Path, help="file to write, after every task")
    add("--engine", help=argparse.SUPPRESS)
    add("--dtype", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(options: argparse.Namespace, task: str, engine: str, dtype: str) -> dict[str, Any]:
    """`measure` in a fresh process."""
    words = ["--original", str(options.original), "--task", task, "--steps", str(options.steps)]
    words += ["--threads", str(options.threads), "--engine", engine, "--dtype", dtype]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of whole steps, and what one of them is."""
    torch.set_num_threads(options.threads)
    (task,), engine, dtype = options.task, options.engine, options.dtype
    model, batch = make_model(task), make_batch(task)
    if engine == "original":
        step = original_step(Original(options.original), model, batch)
    else:
        step = our_step(model, batch, options.threads, dtype == "bfloat16")
    peak = Ceiling(dtype, options.threads)
    step()
    step_ms = []
    for _ in range(options.steps):
        peak.sample()
        start = time.perf_counter()
        step()
        step_ms.append(1000.0 * (time.perf_counter() - start))
    return {
        "step_ms": step_ms,
        "tokens": batch.inputs.numel(),
        "flops": count_flops(model, batch),
        "peak_gflops": peak.gflops,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def make_model(task: str, **changes: Any) -> TrajectoryTransformer:
    """Official size, fresh weights, training."""
    torch.manual_seed(0)
    return TrajectoryTransformer(ModelConfig(*TASKS[task], **changes)).train()


def make_batch(task: str, num_windows: int = BATCH) -> Batch:
    """Random tokens; nothing masked."""
    config = ModelConfig(*TASKS[task])
    shape = (num_windows, config.block_size + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(num_windows, config.block_size, dtype=torch.bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, None)


def our_step(
    model: TrajectoryTransformer, batch: Batch, num_threads: int, bfloat16: bool
) -> Callable[[], None]:
    """A step of `tt_fast.train` on the processor."""
    optimizer = build_optimizer(model, CONFIG)
    passes, batches = ParallelPasses(model, num_threads), split(model, batch, num_threads)

    def step() -> None:
        passes.backward(batches, address=(0,), bfloat16=bfloat16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()

    return step


def split(model: TrajectoryTransformer, batch: Batch, num_threads: int) -> list[Batch]:
    """Passes of a step, as `tt_fast.train` cuts them."""
    windows = even_passes(len(batch.inputs), model.config.block_size, num_threads)
    parts = (x.split(windows) for x in (batch.inputs, batch.targets, batch.mask))
    return [Batch(*part, None) for part in zip(*parts, strict=True)]


def original_step(
    original: Original, model: TrajectoryTransformer, batch: Batch
) -> Callable[[], None]:
    """A step of the original's Trainer (trajectory/utils/training.py:43-52)."""
    gpt = original.load(model).train()
    settings = SimpleNamespace(
        weight_decay=CONFIG.weight_decay, learning_rate=CONFIG.learning_rate, betas=CONFIG.betas
    )
    optimizer = gpt.configure_optimizers(settings)

    def step() -> None:
        _, loss = gpt(batch.inputs, batch.targets.contiguous(), batch.mask)
        gpt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), CONFIG.grad_clip)
        optimizer.step()

    return step


def check(original: Original, task: str) -> None:
    """Without dropout, our passes have the original's loss and gradients.

    Raises:
        AssertionError: they have not.
    """
    none = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
    model, batch = make_model(task, **none), make_batch(task, 20)
    gpt = original.load(model).train()
    _, want = gpt(batch.inputs, batch.targets.contiguous(), batch.mask)
    want.backward()
    passes = ParallelPasses(model, 2)
    losses = passes.backward(split(model, batch, 2), address=(0,), bfloat16=False)
    passes.close()
    got = model.weighted_loss(torch.cat(losses), batch.mask)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=0.0)
    theirs = dict(gpt.named_parameters())
    for name, parameter in model.named_parameters():
        grad = theirs[name].grad
        atol = 1e-5 * float(grad.abs().max()) + 1e-7  # a key's bias: its gradient is all rounding
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=atol)


def count_flops(model: TrajectoryTransformer, batch: Batch) -> float:
    """Of matrix products and whole attention squares, forward and backward."""
    config, tokens = model.config, batch.inputs.numel()
    matrices = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2)
    head = (config.vocab_size + 1) * config.embed_dim
    attention = 2 * config.block_size * config.embed_dim * config.num_layers
    return 6.0 * tokens * (matrices + head + attention)


if __name__ == "__main__":
    main()
