"""Time plans of one backend at one setting, beside what the machine can do.

A measurement runs in a process of its own, so that its memory is its own and no measurement
disturbs the next. The ceiling of arithmetic is measured too, in the same run.
"""

from __future__ import annotations

import importlib
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tt_fast.checkpoint import origin
from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer, Tokens
from tt_fast.limits import available_cpus
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import BeamPlan, PlanBackend, make_backend
from tt_fast.planning.base import Draws
from tt_fast.planning.cpu import CpuBackend, available_isas, is_available
from tt_fast.planning.reference import window_len, window_start

_SEED = 1
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CHILD = "from tt_fast.measure import serve; serve()"

#: Samples of the ceiling before a measurement and after it, and the length of one, seconds.
_CEILING_SAMPLES, _CEILING_SECONDS = 5, 0.05

#: Load per processor, averaged over the last minute, from which times are not to be trusted.
_BUSY = 0.5


@dataclass(frozen=True)
class Case:
    """A model, and contexts to plan from."""

    name: str
    model: TrajectoryTransformer
    """In eval mode, on the CPU"""
    discretizer: Discretizer
    contexts: tuple[Tokens, ...]
    """Each (k * transition_dim + observation_dim,): past transitions, the current observation"""

    def context(self, plan_idx: int) -> Tokens:
        """The context of a plan; they take turns."""
        return self.contexts[plan_idx % len(self.contexts)]

    def plan(
        self, backend: PlanBackend, config: PlanConfig, plan_idx: int, *, trace: bool = False
    ) -> BeamPlan:
        """Plan number `plan_idx`, its random numbers its own."""
        draws = Draws((_SEED,), (plan_idx,))
        return backend.plan([self.context(plan_idx)], config, draws, trace=trace)


@dataclass(frozen=True)
class Job:
    """What to measure."""

    case: Case
    backend: str
    config: PlanConfig
    """Its discount is filled in"""
    num_plans: int
    """Plans to time, fewer where they take longer than `max_seconds`"""
    max_seconds: float
    num_threads: int


@dataclass(frozen=True)
class Measurement:
    """What plans cost."""

    plan_ms: tuple[float, ...]
    """Wall time of each plan, after one that was not timed"""
    rows_asked: float
    """Tokens of a plan that a cached search without any sharing runs through the model"""
    rows_computed: float
    """Tokens of a plan that went through the model"""
    flops: float
    """Floating point operations of a plan: matrix products and attention of the rows computed"""
    gemm_gflops: float | None
    """GFLOP/s inside matrix products, all threads together; None where it is not known"""
    extra_bytes: int | None
    """Resident memory that the first plan added at its peak; None where it cannot be read"""

    @property
    def p50_ms(self) -> float:
        """Median of `plan_ms`."""
        return statistics.median(self.plan_ms)

    @property
    def gflops(self) -> float:
        """GFLOP/s of a whole plan of median length."""
        return self.flops / self.p50_ms * 1e-6


def measure_apart(job: Job) -> Measurement:
    """`measure` in a fresh process. Both ends of the pipe are ours: no file is unpickled.

    Raises:
        ChildProcessError: it failed; the message has its last words.
    """
    status, output, errors = _run_apart(pickle.dumps(job))
    if status != 0:
        words = errors.decode(errors="replace").strip().splitlines() or ["no message"]
        what = f"measurement of the {job.backend} backend ({job.config.dtype})"
        raise ChildProcessError(f"{what}: exit status {status}: {words[-1]}")
    result: Measurement = pickle.loads(output)
    return result


def serve() -> None:
    """The other side of `measure_apart`: a job comes in, its measurement goes out."""
    job: Job = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(job.num_threads)
    sys.stdout.buffer.write(pickle.dumps(measure(job)))


def measure(job: Job) -> Measurement:
    """Plan once to warm up, count and weigh, then against the clock."""
    case, config = job.case, job.config
    threads = job.num_threads if job.backend == "cpu" else None
    backend = make_backend(job.backend, case.model, case.discretizer, num_threads=threads)
    with count_work(case.model), torch.no_grad():  # first-time costs of torch are no backend's
        case.model(torch.from_numpy(case.context(0)[None, : case.model.config.block_size]))
    with count_work(case.model) as (rows, flops):
        extra_bytes = _extra_bytes(lambda: case.plan(backend, config, 0))
    if isinstance(backend, CpuBackend):
        backend.reset_stats()
    plan_ms = _time_plans(job, backend)
    if not isinstance(backend, CpuBackend):
        asked = rows_asked(case.model, config, len(case.context(0)))
        return Measurement(plan_ms, asked, rows.rows, flops.flops, None, extra_bytes)
    stats, count = backend.stats(), len(plan_ms)
    busy_seconds = stats.gemm_seconds / backend.num_threads
    return Measurement(
        plan_ms,
        stats.rows_asked / count,
        stats.rows_computed / count,
        stats.flops / count,
        stats.gemm_flops / busy_seconds * 1e-9 if busy_seconds > 0.0 else None,
        extra_bytes,
    )


def rows_asked(model: TrajectoryTransformer, config: PlanConfig, context_len: int) -> int:
    """Tokens that a search with a cache per beam runs through the model if beams share nothing.

    One a row and drawn token; where the window moved, and at the start, the whole window.
    """
    dims = model.config
    candidates = [config.num_rows] * (dims.action_dim + 2)
    per_draw = (candidates + [config.beam_width] * dims.observation_dim) * config.horizon
    num_draws = config.num_draws(dims.observation_dim, dims.action_dim)
    total, old_start = 0, -1
    for draw_idx, rows in enumerate(per_draw[:num_draws]):
        num_tokens = context_len + draw_idx
        start = window_start(num_tokens, window_len(model, config), dims.transition_dim)
        total += rows * (1 if start == old_start else num_tokens - start)
        old_start = start
    return total


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile; None where fewer than one value in the sample would lie beyond it."""
    if len(values) * (100.0 - q) < 100.0:
        return None
    return float(np.percentile(values, q))


class Ceiling:
    """What all threads together can do: multiply-adds in registers, GFLOP/s, sampled now and then.

    Samples of 0.05 s; other work on the machine, or its clock, may change between two of them.
    """

    def __init__(self, dtype: str, num_threads: int) -> None:
        self._dtype, self._num_threads = dtype, num_threads
        self._samples: list[float] = []

    def sample(self) -> None:
        """Look again; does nothing without the C++ core."""
        if not is_available():
            return
        core, isa = importlib.import_module("tt_fast._core"), available_isas()[0]
        for _ in range(_CEILING_SAMPLES):
            rate = core.peak_gflops(self._dtype, self._num_threads, _CEILING_SECONDS, isa)
            self._samples.append(rate)

    @property
    def gflops(self) -> float | None:
        """Median of the samples; None without the C++ core."""
        return statistics.median(self._samples) if self._samples else None


def describe_machine(num_threads: int) -> dict[str, Any]:
    """Processor, threads, instruction set, load and versions: JSON values."""
    isas = available_isas()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor_name(),
        "num_processors": available_cpus(),
        "num_threads": num_threads,
        "isa": isas[0] if isas else None,
        "load_average": load,
        "system": f"{platform.system()} {platform.machine()}",
        **origin(),
    }


def machine_lines(machine: Mapping[str, Any]) -> str:
    """What `describe_machine` found, as text, with a warning where others are at work."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    core = f"instruction set {machine['isa']}" if machine["isa"] else "no C++ core was built"
    load, processors = machine["load_average"] or 0.0, machine["num_processors"]
    busy = f"\nwarning: other work runs here (load {load:.1f}); times will be too long"
    return (
        f"{machine['processor']}, {processors} processors, {machine['num_threads']} threads, "
        f"{core}, {machine['system']}\n{versions}{busy if load > _BUSY * processors else ''}"
    )


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def describe_model(config: ModelConfig) -> str:
    """A model's size in words."""
    return (
        f"{config.num_layers} layers, {config.num_heads} heads, width {config.embed_dim}, "
        f"{config.vocab_size} bins"
    )


def _run_apart(job: bytes) -> tuple[int, bytes, bytes]:
    """Exit status, output and errors of `serve` in a fresh process, which does not outlive this."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone
    ) as process:
        try:
            output, errors = process.communicate(job)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, output, errors


def _time_plans(job: Job, backend: PlanBackend) -> tuple[float, ...]:
    """Milliseconds of plans 1, 2, ..., at least one, until there are enough or time is up."""
    plan_ms: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        job.case.plan(backend, job.config, len(plan_ms) + 1)
        end = time.perf_counter()
        plan_ms.append(1000.0 * (end - start))
        if len(plan_ms) >= job.num_plans or end - begin >= job.max_seconds:
            return tuple(plan_ms)


class FlopCount(TorchDispatchMode):
    """Counts floating point operations of torch's matrix products and attention meanwhile."""

    flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.flops += _op_flops(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


class RowCount:
    """Tokens that went through a layer."""

    rows: int = 0

    def add(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook; the layer takes (..., width)."""
        self.rows += args[0].numel() // args[0].shape[-1]


def first_norm(model: nn.Module) -> nn.Module:
    """The layer that every token goes through first, by its name in ours and the original."""
    return model.get_submodule("blocks.0.ln1")


@contextmanager
def count_rows(layer: nn.Module) -> Iterator[RowCount]:
    """Count the tokens that go through `layer` meanwhile."""
    count = RowCount()
    hook = layer.register_forward_pre_hook(count.add)
    try:
        yield count
    finally:
        hook.remove()


@contextmanager
def count_work(model: nn.Module) -> Iterator[tuple[RowCount, FlopCount]]:
    """Count what torch computes with a model meanwhile; of the C++ core nothing is seen."""
    flops = FlopCount()  # type: ignore[no-untyped-call]  # torch's own constructor has no types
    with count_rows(first_norm(model)) as rows, flops:
        yield rows, flops


def _op_flops(name: str, args: Sequence[Any]) -> int:
    """Floating point operations of one of torch's operators; 0 of all but products."""
    if name in ("mm", "bmm"):
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2 * int(args[1].numel()) * int(args[2].shape[-1])
    if name.startswith("_scaled_dot_product"):  # (B, H, T, F) queries, (B, H, S, F) keys
        return 4 * int(args[0].numel()) * int(args[1].shape[-2])
    return 0


def _extra_bytes(run: Callable[[], object]) -> int | None:
    """Growth of the resident set while `run` runs, at its peak; None where Linux does not tell."""
    try:
        _CLEAR_REFS.write_text("5")  # the peak starts again at what is resident now
        before = _status_bytes("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text("utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS}: expected {key}")
