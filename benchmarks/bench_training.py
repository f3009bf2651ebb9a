"""A whole optimiser step of the original's code beside ours, turn by turn.

    python benchmarks/bench_training.py --original PATH [--task hopper] [--csv FILE]
    python benchmarks/bench_training.py --device cuda [--original PATH] [--out FOLDER]

PATH is a checkout of jannerm/trajectory-transformer. Official sizes, batch 256, dropout: forward,
backward, clipping and AdamW, as its Trainer does them; data loading is left out on both sides. Ours
must first have the original's loss and gradients where nothing is dropped. On the processor each
engine runs in a process of its own, so that its peak memory is its own.

On a GPU "torch" is the plain model and "cuda" the same with fused heads
(`tt_fast.training.fused_loss`); without the original's code the plain model in float32 judges and
is compared with. Rows go to FOLDER/training.csv, as the GPU suite's do; under TRITON_INTERPRET=1
sizes are tiny.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_common
import torch
from bench_gpu import Clock, release, run_part
from bench_original import Original
from common import Row, Work, make_row, write_rows
from gpu_common import Dtype, Table, WrongAnswer
from torch import Tensor

from tt_fast import ModelConfig, TrainConfig, TrajectoryTransformer
from tt_fast.bench import TASKS
from tt_fast.limits import available_cpus
from tt_fast.measure import Ceiling
from tt_fast.tables import Column, head_line, row_line, short
from tt_fast.training import fused_loss
from tt_fast.training.optimizer import build_optimizer
from tt_fast.training.passes import Batch, ParallelPasses, add_gradients, even_passes

ENGINES = (("original", "float32"), ("cpu", "float32"), ("cpu", "bfloat16"))
#: In this order; the first is what the others are compared with.
GPU_ENGINES: tuple[tuple[str, Dtype], ...] = (
    ("original", "fp32"), ("torch", "fp32"), ("cuda", "fp32"), ("torch", "bf16"), ("cuda", "bf16"),
)  # fmt: skip
BATCH, TINY_BATCH = 256, 2
CHECKED = 20
CONFIG = TrainConfig()
NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}

TokenLosses = Callable[[TrajectoryTransformer, Tensor, Tensor], Tensor]

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


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    options = parse(arguments)
    if options.engine is not None:
        print(json.dumps(measure(options)))
        return 0
    if options.device == "cuda":
        original = None if options.original is None else Original(options.original)

        def part(table: Table, clock: Clock, folder: Path) -> None:
            for task in options.task:
                time_gpu(table, clock, task, original)

        return run_part("training", part, options.out, options.seconds)
    time_cpu(options)
    return 0


def time_cpu(options: argparse.Namespace) -> None:
    """A row an engine, printed and written."""
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--original", type=Path, help="a checkout of jannerm/trajectory-transformer")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs no --original")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--steps", type=int, default=5, help="steps timed, after one that is not (cpu)")
    add("--threads", type=int, default=available_cpus())
    add("--csv", type=Path, help="file to write, after every task (cpu)")
    add("--out", type=Path, default=Path("gpu_results"), help="folder of results (cuda)")
    add("--seconds", type=float, default=600.0, help="after them no row begins (cuda)")
    add("--engine", help=argparse.SUPPRESS)
    add("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.original is None:
        parser.error("--original is needed but with --device cuda")
    return options


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
    return batch_of(ModelConfig(*TASKS[task]), num_windows)


def batch_of(config: ModelConfig, num_windows: int) -> Batch:
    """The same for any sizes."""
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
        backward(passes, batches, bfloat16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()

    return step


def backward(passes: ParallelPasses, batches: list[Batch], bfloat16: bool) -> list[torch.Tensor]:
    """Gradients of a whole step; its losses."""
    addresses = [(0, 0, pass_idx) for pass_idx in range(len(batches))]
    num_windows = sum(len(batch.inputs) for batch in batches)
    return passes.backward(batches, addresses=addresses, num_windows=num_windows, bfloat16=bfloat16)


def split(model: TrajectoryTransformer, batch: Batch, num_threads: int) -> list[Batch]:
    """Passes of a step, as `tt_fast.train` cuts them."""
    windows = even_passes(len(batch.inputs), model.config.block_size, num_threads)
    parts = (x.split(windows) for x in (batch.inputs, batch.targets, batch.mask))
    return [Batch(*part, None) for part in zip(*parts, strict=True)]


def original_step(
    original: Original, model: TrajectoryTransformer, batch: Batch
) -> Callable[[], None]:
    """A step of the original's Trainer (trajectory/utils/training.py:43-52)."""
    gpt = original.load(model).train().to(batch.inputs.device)
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
    model, batch = make_model(task, **NO_DROPOUT), make_batch(task, CHECKED)
    want = original_gradients(original, model, batch)
    passes = ParallelPasses(model, 2)
    losses = backward(passes, split(model, batch, 2), bfloat16=False)
    passes.close()
    loss = model.weighted_loss(torch.cat(losses), batch.mask)
    compare({"loss": loss, **gradients_of(model)}, want)


def original_gradients(
    original: Original, model: TrajectoryTransformer, batch: Batch
) -> dict[str, Tensor]:
    """The original's gradients by name, and its loss."""
    gpt = original.load(model).train().to(batch.inputs.device)
    _, loss = gpt(batch.inputs, batch.targets.contiguous(), batch.mask)
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(gpt)}


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """By parameter."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same float32 loss and gradients.

    Raises:
        AssertionError: they are not.
    """
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-5, atol=0.0)
    for name in got.keys() - {"loss"}:
        grad = want[name]
        atol = 1e-5 * float(grad.abs().max()) + 1e-7  # a key's bias: its gradient is all rounding
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=atol)


def count_flops(model: TrajectoryTransformer, batch: Batch) -> float:
    """Of matrix products and whole attention squares, forward and backward."""
    config, tokens = model.config, batch.inputs.numel()
    matrices = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2)
    head = (config.vocab_size + 1) * config.embed_dim
    attention = 2 * config.block_size * config.embed_dim * config.num_layers
    return 6.0 * tokens * (matrices + head + attention)


# ---- on a GPU ----


def time_gpu(table: Table, clock: Clock, task: str, original: Original | None) -> None:
    """Check, then a row an engine and precision."""
    if clock.left == 0.0:
        print(f"  left out: {task}", flush=True)
        return
    check_gpu(task, original)
    for engine, dtype in GPU_ENGINES:
        if engine == "original" and original is None:
            continue
        if clock.left == 0.0:
            print(f"  left out: {task} {engine} {dtype}", flush=True)
            continue
        release()
        table.add(gpu_row(task, engine, dtype, original))


def gpu_row(task: str, engine: str, dtype: Dtype, original: Original | None) -> gpu_common.Row:
    """Whole steps, each until the device has done it."""
    model, batch = gpu_model(task), gpu_batch(task)
    if engine == "original":
        assert original is not None
        step = original_step(original, model, batch)
    else:
        step = gpu_step(model, batch, LOSSES[engine], dtype == "bf16")
    on_gpu = gpu_common.device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with gpu_common.arithmetic(dtype):
        step()
        times = gpu_common.wall_ms(lambda _: step(), gpu_common.sizes())
    if on_gpu:
        peak_mb = torch.cuda.max_memory_allocated() / 2**20
        print(f"  {task} {engine} {dtype}: {peak_mb:,.0f} MB at most", flush=True)
    shape = f"{task} {gpu_common.shape_name(model.config)}"
    setting = f"batch {len(batch.inputs)}"
    return gpu_common.make_row(
        "train step", times, dtype=dtype, engine=engine, shape=shape, setting=setting
    )


def gpu_model(task: str, **changes: Any) -> TrajectoryTransformer:
    """As `make_model`, where kernels run; tiny in the interpreter."""
    changes = {**gpu_common.sizes().model, **changes}
    torch.manual_seed(0)
    config = replace(ModelConfig(*TASKS[task]), **changes)
    return TrajectoryTransformer(config).train().to(gpu_common.device())


def gpu_batch(task: str, num_windows: int | None = None) -> Batch:
    """As `make_batch`, likewise."""
    is_tiny = gpu_common.device().type == "cpu"
    most = TINY_BATCH if is_tiny else BATCH
    config = replace(ModelConfig(*TASKS[task]), **gpu_common.sizes().model)
    batch = batch_of(config, min(most, num_windows or most))
    inputs, targets, mask = (x.to(gpu_common.device()) for x in batch[:3])
    return Batch(inputs, targets, mask, None)


def plain_losses(model: TrajectoryTransformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """The plain model's."""
    return model.token_losses(inputs, targets)


def fused_losses(model: TrajectoryTransformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Ours.

    Raises:
        RuntimeError: they would not be fused.
    """
    reason = fused_loss.why_not(model)
    if reason is not None:
        raise RuntimeError(f"expected fused losses, but {reason}")
    return fused_loss.token_losses(model, inputs, targets)


LOSSES: dict[str, TokenLosses] = {"torch": plain_losses, "cuda": fused_losses}


def gpu_step(
    model: TrajectoryTransformer, batch: Batch, losses_of: TokenLosses, bfloat16: bool
) -> Callable[[], None]:
    """A step of `tt_fast.train` there."""
    optimizer = build_optimizer(model, CONFIG)

    def step() -> None:
        gpu_backward(model, batch, losses_of, bfloat16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()

    return step


def gpu_backward(
    model: TrajectoryTransformer, batch: Batch, losses_of: TokenLosses, bfloat16: bool
) -> Tensor:
    """Set the model's gradients; its losses."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bfloat16):
        losses = losses_of(model, batch.inputs, batch.targets)
    return add_gradients(model, losses, batch.mask, len(batch.inputs))


def check_gpu(task: str, original: Original | None) -> None:
    """Without dropout: in float32 the original's loss and gradients, or the plain model's; in
    bfloat16 at most twice as far from float64 as the plain model's in bfloat16.

    Raises:
        WrongAnswer: else.
    """
    model, batch = gpu_model(task, **NO_DROPOUT), gpu_batch(task, CHECKED)

    def found(losses_of: TokenLosses, dtype: Dtype, of: TrajectoryTransformer) -> dict[str, Tensor]:
        with gpu_common.arithmetic(dtype):
            losses = gpu_backward(of, batch, losses_of, dtype == "bf16")
        return {"loss": of.weighted_loss(losses, batch.mask), **gradients_of(of)}

    want = found(plain_losses, "fp32", model)
    if original is not None:
        want = original_gradients(original, model, batch)
    try:
        compare(found(fused_losses, "fp32", model), want)
    except AssertionError as error:
        raise WrongAnswer(f"{task} fp32: {error}") from error
    exact = found(plain_losses, "fp32", copy.deepcopy(model).double())
    ours, theirs = (found(f, "bf16", model) for f in (fused_losses, plain_losses))
    size = distance(exact, {name: torch.zeros_like(x) for name, x in exact.items()})
    allowed = 2.0 * distance(theirs, exact) + gpu_common.TINY["bf16"] * size
    error = distance(ours, exact)
    if not error <= allowed:
        raise WrongAnswer(
            f"{task} bf16: expected an error of loss and gradients up to {allowed:.2g}, "
            f"got {error:.2g}"
        )
    print(f"  {task}: loss and gradients are right in float32 and bfloat16", flush=True)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Euclidean, over all numbers."""
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in b) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
