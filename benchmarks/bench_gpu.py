"""Plans on a GPU: `python benchmarks/bench_gpu.py PART --out FOLDER`; gpu_suite.sh runs all parts.

Parts: parity (answers alone), first (first plans, each compiled from nothing, several processes at
a time), ceilings (copies and products), plans (latency and throughput, PyTorch's too), decode (a
token of a static cache, through torch.compile). Every row's answer is checked before it is timed.
Under TRITON_INTERPRET=1 sizes are tiny and what needs a device is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gpu_common import (
    DTYPES,
    Dtype,
    Row,
    Table,
    WrongAnswer,
    arithmetic,
    check_plans,
    config_of,
    cuda_backend,
    device,
    device_ms,
    event_ms,
    gpu_case,
    make_row,
    on_device,
    plan_all,
    shape_name,
    sizes,
    tasks,
    torch_backend,
    wall_ms,
    write_environment,
)
from quick_interpreter import hurry_interpreter
from torch import Tensor, nn
from torch.nn import functional as F

from tt_fast import TrajectoryTransformer
from tt_fast.measure import Case
from tt_fast.planning.base import Draws, PlanBackend
from tt_fast.planning.cuda import CudaBackend, is_interpreted
from tt_fast.planning.reference import ReferenceBackend

#: Processes that compile at the same time.
MAX_COMPILERS = 8
#: Of a first plan: several share the memory, and more environments run the same kernels.
MAX_FIRST_ENVS = 64
#: Where random numbers are given, a probability may round to the other side of one of them.
GIVEN_PLANS = 2
#: A token that compiles takes about as long, and is not begun with less.
COMPILE_SECONDS = 25.0
#: In this order.
PARITY: tuple[Dtype, ...] = ("fp32", "bf16", "tf32")


class Job(NamedTuple):
    """What one row measures."""

    task: str
    setting: str
    dtype: Dtype
    num_envs: int

    @property
    def key(self) -> str:
        """For JSON."""
        return " ".join(map(str, self))


class Clock:
    """Says when a part must come to its end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())


def jobs() -> list[Job]:
    """What matters most first."""
    models = tasks()[:1] if is_interpreted() else tasks()
    found = product(sizes().settings, sizes().envs, DTYPES, models)
    return [Job(task, setting, dtype, envs) for setting, envs, dtype, task in found]


# ---- parity ----


def parity(table: Table, clock: Clock, folder: Path) -> None:
    """A few beams of each task in each precision; in fp32 with given random numbers too."""
    setting = sizes().settings[0] if is_interpreted() else "H3-B8x2"
    for dtype, task in product(PARITY, tasks()):
        if clock.left == 0.0:
            print(f"  left out: {task} {dtype}", flush=True)
            continue
        case, config = gpu_case(task, 2), config_of(setting, dtype)
        check_plans(cuda_backend(case, dtype), case, config, dtype)
        text = "estimates of plans"
        if dtype == "fp32":
            check_given(case, setting)
            text = "greedy plans, plans of given numbers, estimates"
        print(f"  {task} {setting} {dtype}: {text} are right", flush=True)


def check_given(case: Case, setting: str) -> None:
    """Tokens of plans with given random numbers are the reference's, in one of two plans.

    Raises:
        WrongAnswer: else.
    """
    config, dims = config_of(setting, "fp32"), case.model.config
    num_draws = config.num_draws(dims.observation_dim, dims.action_dim)
    ours = cuda_backend(case, "fp32")
    reference = ReferenceBackend(on_device(case.model), case.discretizer)
    shares = []
    for seed in range(GIVEN_PLANS):
        uniforms = np.random.default_rng(seed).random((1, num_draws, config.num_rows))
        draws = Draws((0,), (0,), uniforms)
        got, want = (b.plan([case.context(0)], config, draws) for b in (ours, reference))
        shares.append(float((got.tokens == want.tokens).mean()))
        if shares[-1] == 1.0:
            return
    told = " and ".join(f"{share:.0%}" for share in shares)
    raise WrongAnswer(f"{case.name} {setting} fp32: expected the reference's tokens, got {told}")


# ---- first plans ----


def first(table: Table, clock: Clock, folder: Path) -> None:
    """Seconds of each first plan, several processes at a time; also leaves Triton's cache warm."""
    found: dict[str, float] = {}
    for job, seconds in first_plans(clock):
        found[job.key] = seconds
        (folder / "first_plans.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        shape = shape_name(gpu_case(job.task).model.config)
        names = {"dtype": job.dtype, "setting": job.setting, "shape": f"{job.task} {shape}"}
        row = make_row(
            "first plan", [1000 * seconds], engine="cuda", num_envs=job.num_envs,
            first_plan_s=seconds, **names,
        )  # fmt: skip
        table.add(row)
    for job in first_jobs():
        if job.key not in found:
            print(f"  left out: {job.key}", flush=True)


def first_jobs() -> list[Job]:
    """Those whose first plan is timed."""
    return [job for job in jobs() if job.num_envs <= MAX_FIRST_ENVS]


def first_plans(clock: Clock) -> Iterator[tuple[Job, float]]:
    """As they are done, until the time is up."""
    workers = max(1, min(MAX_COMPILERS, (os.cpu_count() or 1) // 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(first_plan, job, clock.left): job for job in first_jobs()}
        try:
            for done in as_completed(running, timeout=clock.left):
                yield running[done], done.result()
        except TimeoutError:
            print("  time is up", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_workers(pool)


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """Ours; a compiler that is at work would be waited for."""
    for process in (getattr(pool, "_processes", None) or {}).values():
        process.terminate()


def first_plan(job: Job, seconds_left: float) -> float:
    """Seconds of a backend's first plan; runs in a process of its own."""
    case, config = gpu_case(job.task, job.num_envs), config_of(job.setting, job.dtype)
    torch.zeros(1, device=device())  # the device itself takes a while
    backend = cuda_backend(case, job.dtype)
    start = time.perf_counter()
    plan_all(backend, case, config, 0)
    seconds = time.perf_counter() - start
    del backend
    release()
    return seconds


# ---- ceilings ----


def ceilings(table: Table, clock: Clock, folder: Path) -> None:
    """What the device can do, in the same run."""
    if is_interpreted():
        print("  left out: there is no device", flush=True)
        return
    for row in ceiling_rows(2**28, 8192, 2**23):
        table.add(row)


def ceiling_rows(copied: int, size: int, resident: int) -> Iterator[Row]:
    """Copies of so many floats, square products, reads of so few floats that a cache holds them.

    Raises:
        WrongAnswer: a copy or a product is wrong.
    """
    source, target = (torch.ones(copied, device=device()) for _ in range(2))
    target.zero_()
    yield _rate("copy", 8e-6 * copied, "fp32", lambda: target.copy_(source), f"{copied} floats", 2)
    if not torch.equal(source, target):
        raise WrongAnswer("copy: expected the source, got something else")
    small = torch.ones(resident, device=device())
    if small.sum().item() != resident:
        raise WrongAnswer("sum: expected the number of ones, got another")
    yield _rate("resident read", 4e-6 * resident, "fp32", lambda: small.sum(), f"{resident} floats")
    for dtype in DTYPES:
        n = size // 2 if dtype == "fp32" else size
        kept = torch.bfloat16 if dtype == "bf16" else torch.float32
        a, b = (torch.full((n, n), 0.5, device=device(), dtype=kept) for _ in range(2))
        with arithmetic(dtype):
            if not bool(((a @ b).float() == n / 4).all()):
                raise WrongAnswer(f"product, {dtype}: expected {n / 4}, got something else")
            yield _rate("product", 2e-9 * n**3, dtype, lambda a=a, b=b: a @ b, f"{n}^3", 4)


def _rate(
    op: str, work: float, dtype: str, run: Callable[[], object], shape: str, per_sample: int = 20
) -> Row:
    """Work of a run over its milliseconds: 10^6 bytes -> GB/s, 10^9 operations -> TFLOP/s."""
    times = device_ms(run, per_sample)
    rate = work / float(np.median(times))
    return make_row(op, times, dtype=dtype, engine="torch", shape=shape, rate=rate)


# ---- plans ----


def plans(table: Table, clock: Clock, folder: Path) -> None:
    """Ours at every size, then PyTorch's, one environment at a time."""
    path = folder / "first_plans.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for job in jobs():
        if job.num_envs == 1:
            _add_plans(table, clock, job, known, with_torch=True)
    for job in jobs():
        if job.num_envs > 1:
            _add_plans(table, clock, job, known, with_torch=False)


def _add_plans(
    table: Table, clock: Clock, job: Job, known: dict[str, float], *, with_torch: bool
) -> None:
    if clock.left == 0.0:
        print(f"  left out: {job.key}", flush=True)
        return
    release()
    for row in plan_rows(job, known.get(job.key)):
        table.add(row)
    release()
    if with_torch:
        table.add(torch_row(job))


def plan_rows(job: Job, first_plan_s: float | None) -> Iterator[Row]:
    """As the caller sees them, and the device's part alone."""
    case, config = gpu_case(job.task, job.num_envs), config_of(job.setting, job.dtype)
    backend = cuda_backend(case, job.dtype)
    start = time.perf_counter()
    plan_all(backend, case, config, 0)
    if first_plan_s is None and job.num_envs <= MAX_FIRST_ENVS:
        first_plan_s = time.perf_counter() - start
    yield _timed(backend, case, job, "cuda", first_plan_s)
    graph = graph_of(backend)
    if graph is not None:
        times = event_ms(graph.replay, 10)
        yield _plan_row("plan, device alone", times, case, job, "cuda", None)


def torch_row(job: Job) -> Row:
    """PyTorch's cached search of the same plans."""
    case = gpu_case(job.task, job.num_envs)
    with arithmetic(job.dtype):
        return _timed(torch_backend(case), case, job, "torch", None)


def _timed(
    backend: PlanBackend, case: Case, job: Job, engine: str, first_plan_s: float | None
) -> Row:
    config = config_of(job.setting, job.dtype)
    check_plans(backend, case, config, job.dtype)
    plan_all(backend, case, config, 0)  # records the graph, at the latest
    times = wall_ms(lambda i: plan_all(backend, case, config, i), sizes())
    return _plan_row("plan", times, case, job, engine, first_plan_s)


def _plan_row(
    op: str, times: list[float], case: Case, job: Job, engine: str, first_plan_s: float | None
) -> Row:
    return make_row(
        op, times, dtype=job.dtype, engine=engine, setting=job.setting, num_envs=job.num_envs,
        shape=f"{job.task} {shape_name(case.model.config)}", is_plan=True,
        first_plan_s=first_plan_s,
    )  # fmt: skip


def release() -> None:
    """Give the memory of backends that are gone back to the device: the next one asks for it."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def graph_of(backend: CudaBackend) -> torch.cuda.CUDAGraph | None:
    """The recorded launches of its plan, if all contexts fit one session."""
    sessions = list(backend._sessions.values())
    return sessions[0]._graph if len(sessions) == 1 else None


# ---- one token, compiled ----


class StaticDecoder(nn.Module):
    """The model with keys and values in memory of one size, so that a token is a graph."""

    def __init__(self, model: TrajectoryTransformer, num_rows: int, num_tokens: int) -> None:
        super().__init__()
        self.model, dims = model, model.config
        shape = (num_rows, dims.num_heads, num_tokens, dims.embed_dim // dims.num_heads)
        for i, kind in product(range(dims.num_layers), ("keys", "values")):
            self.register_buffer(f"{kind}{i}", torch.zeros(shape).to(model.pos_emb))
        places = torch.arange(num_tokens, device=model.pos_emb.device)
        self.register_buffer("places", places)
        self.register_buffer("seen", places % dims.transition_dim != dims.transition_dim - 1)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """(rows,) tokens at a position (1,) -> (rows, vocab_size + 1) logits."""
        model, dims = self.model, self.model.config
        dim = position % dims.transition_dim
        h = model.tok_emb(tokens + dim * dims.vocab_size) + model.pos_emb[0, position]
        mask = ((self.places <= position) & self.seen)[None, None, None]
        for i, block in enumerate(model.blocks):
            h = h + self._attend(i, block, block.ln1(h), position, mask)
            h = h + block.mlp(block.ln2(h))
        return F.linear(model.ln_f(h), model.head.weight[dim][0])

    def _attend(
        self, i: int, block: nn.Module, x: Tensor, position: Tensor, mask: Tensor
    ) -> Tensor:
        attn = block.attn
        parts = (attn.query(x), attn.key(x), attn.value(x))
        q, k, v = (part.view(len(x), self.model.config.num_heads, 1, -1) for part in parts)
        keys, values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        out = F.scaled_dot_product_attention(q, keys, values, mask)
        attended: Tensor = attn.proj(out.flatten(1))
        return attended


@torch.no_grad()
def decode(table: Table, clock: Clock, folder: Path) -> None:
    """PyTorch's best for one token of all candidates: compiled into a CUDA graph, and eager."""
    for engine, dtype in product(("torch.compile", "torch"), DTYPES):
        compiles = engine == "torch.compile"
        if compiles and is_interpreted():
            continue
        if clock.left <= (COMPILE_SECONDS if compiles else 0.0):
            print(f"  left out: {dtype} {engine}", flush=True)
            continue
        with arithmetic(dtype):
            table.add(decode_row(dtype, engine))


def decode_row(dtype: Dtype, engine: str) -> Row:
    """A token of every candidate of the first setting, at the end of a window."""
    case, setting = gpu_case(tasks()[0]), sizes().settings[0]
    config, dims = config_of(setting, dtype), case.model.config
    assert config.max_context_transitions is not None
    num_tokens = config.max_context_transitions * dims.transition_dim - 1
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = on_device(case.model).to(kept)
    decoder: nn.Module = StaticDecoder(model, config.num_rows, num_tokens).eval()
    start = time.perf_counter()
    if engine == "torch.compile":
        decoder = torch.compile(decoder, mode="reduce-overhead", fullgraph=True)  # type: ignore
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(dims.vocab_size, (config.num_rows, num_tokens), generator=rng)
    tokens = tokens.to(device())
    places = torch.arange(num_tokens, device=device())[:, None]
    for i in range(num_tokens):
        logits = decoder(tokens[:, i].contiguous(), places[i])
    check_logits(case.model, tokens, logits, kept, dtype)
    first_s = time.perf_counter() - start
    newest = tokens[:, -1].contiguous()
    times = wall_ms(lambda _: decoder(newest, places[-1]), sizes())
    return make_row(
        "decode a token", times, dtype=dtype, engine=engine, setting=setting,
        shape=f"{config.num_rows} rows, {num_tokens} tokens", first_plan_s=first_s,
    )  # fmt: skip


def check_logits(
    model: TrajectoryTransformer, tokens: Tensor, got: Tensor, kept: torch.dtype, dtype: Dtype
) -> None:
    """Against float64: at most twice the error of the whole model in the same arithmetic.

    Raises:
        WrongAnswer: else.
    """
    exact = on_device(model).double()(tokens)[:, -1]
    theirs = on_device(model).to(kept)(tokens)[:, -1].double()
    allowed = 2.0 * float((theirs - exact).abs().max()) + 1e-5 * float(exact.abs().max())
    error = float((got.double() - exact).abs().max())
    if not error <= allowed:
        raise WrongAnswer(f"decode {dtype}: expected logits to {allowed:.2g}, got {error:.2g}")


# ---- command line ----

PARTS = {
    "parity": parity, "first": first, "ceilings": ceilings, "plans": plans, "decode": decode,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--seconds", type=float, default=600.0, help="after them no row begins")
    options = parser.parse_args(arguments)
    return run_part(options.part, PARTS[options.part], options.out, options.seconds)


def run_part(
    name: str, part: Callable[[Table, Clock, Path], None], folder: Path, seconds: float
) -> int:
    """0, or 1 where an answer is wrong."""
    if is_interpreted():
        hurry_interpreter()
    table = Table(folder / f"{name}.csv")
    write_environment(folder / "environment.json", missing_modules())
    try:
        part(table, Clock(seconds), folder)
    except WrongAnswer as error:
        print(f"  wrong answer: {error}", flush=True)
        return 1
    return 0


def missing_modules() -> dict[str, object]:
    """What gpu_path.py had to stand in for."""
    path = Path(os.environ.get("GPU_PATH_FOLDER", "")) / "missing.json"
    found: dict[str, object] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
