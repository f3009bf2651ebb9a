"""What the GPU benchmarks share: sizes, checks, clocks, rows, and the least a plan can take."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import plan_config
from numpy.typing import NDArray

from tt_fast import Discretizer, ModelConfig, PlanConfig, TrajectoryTransformer
from tt_fast.bench import TASKS, make_case
from tt_fast.measure import Case, percentile, rows_asked
from tt_fast.planning import BeamPlan, PlanBackend
from tt_fast.planning.base import Draws
from tt_fast.planning.cached import TorchBackend
from tt_fast.planning.cuda import CudaBackend, is_interpreted
from tt_fast.planning.reference import ReferenceBackend, window_len, window_start

Dtype = Literal["bf16", "tf32", "fp32"]
DTYPES: tuple[Dtype, ...] = ("bf16", "tf32", "fp32")
ROOT = Path(__file__).resolve().parents[1]

#: Error allowed beside twice that of torch in the same arithmetic, a share of the bins' range.
TINY: dict[Dtype, float] = {"bf16": 1e-3, "tf32": 1e-3, "fp32": 1e-5}


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long."""

    model: Mapping[str, int]
    """Changes of the official model's sizes"""
    settings: tuple[str, ...]
    envs: tuple[int, ...]
    num_plans: int
    """Plans timed per row, at most"""
    max_seconds: float
    """Of a row"""


OFFICIAL = Sizes({}, ("H15-B128x2", "H5-B32x2"), (1, 8, 64, 256), 200, 2.0)
TINY_SIZES = Sizes(
    {
        "observation_dim": 3, "action_dim": 2, "num_layers": 2, "num_heads": 2, "embed_dim": 32,
        "vocab_size": 8,
    },
    ("H2-B2x2",), (1, 2), 1, 1.0,
)  # fmt: skip


def sizes() -> Sizes:
    """Of this process: the interpreter takes the tiny ones."""
    return TINY_SIZES if is_interpreted() else OFFICIAL


@dataclass(frozen=True)
class Row:
    """One measurement. None: not known, or there is no such thing."""

    op: str
    shape: str
    """Of the model, or of what an operation works on"""
    setting: str
    dtype: str
    engine: str
    num_envs: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    p99_ms: float | None
    num_runs: int
    plans_per_s: float | None
    first_plan_s: float | None
    """Compiling included, where other processes compile too"""
    rate: float | None
    """Of a ceiling: GB/s or TFLOP/s"""
    device: str
    torch: str
    triton: str
    commit: str
    date: str


COLUMNS = tuple(field.name for field in fields(Row))


def make_row(
    op: str,
    times_ms: Sequence[float],
    *,
    dtype: str,
    engine: str,
    shape: str = "",
    setting: str = "",
    num_envs: int = 1,
    is_plan: bool = False,
    first_plan_s: float | None = None,
    rate: float | None = None,
) -> Row:
    """A row of this device, these versions and this commit."""
    p20, median, p80 = (float(value) for value in np.percentile(times_ms, (20, 50, 80)))
    return Row(
        op, shape, setting, dtype, engine, num_envs, median, p20, p80,
        percentile(times_ms, 99.0), len(times_ms),
        1000.0 * num_envs / median if is_plan else None,
        first_plan_s, rate, **origin(),
    )  # fmt: skip


def origin() -> dict[str, str]:
    """Device, versions, commit and day."""
    import triton

    return {
        "device": "interpreter" if is_interpreted() else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit() -> str:
    """Of the checkout, "-dirty" if it was changed since; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude", "*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


class Table:
    """A CSV file that has every row as soon as it is known, whatever ends the process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def add(self, row: Row) -> None:
        """Write a row, and say what it says."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(asdict(row))
        what = " ".join(x for x in (row.op, row.shape, row.setting, row.dtype, row.engine) if x)
        rate = "" if row.rate is None else f", {row.rate:.4g}"
        print(f"  {what}, {row.num_envs} envs: {row.median_ms:.4g} ms{rate}", flush=True)


def write_environment(path: Path, missing: Mapping[str, object]) -> None:
    """Everything about this machine that a row has no room for, as JSON."""
    found: dict[str, Any] = {"python": platform.python_version(), **origin(), **missing}
    found |= {"system": f"{platform.system()} {platform.machine()}", "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# ---- what is planned ----


def gpu_case(task: str, num_envs: int = 1) -> Case:
    """A model with random weights on the CPU, and a context of five transitions a plan."""
    case = make_case(task, **sizes().model)
    dims, rng = case.model.config, np.random.default_rng(1)
    more = rng.integers(0, dims.vocab_size, (num_envs - 1, len(case.context(0))))
    return replace(case, contexts=(case.context(0), *more))


def config_of(setting: str, dtype: Dtype) -> PlanConfig:
    """The original's plan at a setting."""
    return plan_config(setting, "bfloat16" if dtype == "bf16" else "float32")


def greedy(config: PlanConfig) -> PlanConfig:
    """The same sizes, nothing drawn."""
    return replace(config, k_act=1, k_obs=1, k_rew=1, cdf_act=None)


def cuda_backend(case: Case, dtype: Dtype) -> CudaBackend:
    """Ours."""
    return CudaBackend(case.model, case.discretizer, tf32=dtype == "tf32")


def torch_backend(case: Case) -> TorchBackend:
    """PyTorch's cached search on the same device; its tf32 is `arithmetic`'s."""
    return TorchBackend(on_device(case.model), case.discretizer)


def plan_all(backend: PlanBackend, case: Case, config: PlanConfig, plan_idx: int) -> BeamPlan:
    """A plan from every context of a case."""
    count = len(case.contexts)
    draws = Draws(tuple(range(count)), (plan_idx,) * count)
    return backend.plan(list(case.contexts), config, draws)


def on_device(model: TrajectoryTransformer) -> TrajectoryTransformer:
    """A copy where kernels run."""
    twin = TrajectoryTransformer(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin.to(device())


def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if is_interpreted() else "cuda")


@contextmanager
def arithmetic(dtype: Dtype) -> Iterator[None]:
    """float32 products of torch are tf32 meanwhile, or are not."""
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old)


# ---- answers ----


class WrongAnswer(AssertionError):
    """What was about to be timed computes something else."""


def check_plans(backend: PlanBackend, case: Case, config: PlanConfig, dtype: Dtype) -> None:
    """Plans of every context are right, as far as can be told without planning them otherwise.

    The estimates along a plan, against float64, have at most twice the error of torch in the same
    arithmetic. In fp32 a greedy plan, where nothing is drawn, is the reference's.

    Raises:
        WrongAnswer: else.
    """
    plan = plan_all(backend, case, config, 0)
    check_estimates(plan, case, config, dtype)
    if dtype == "fp32":
        check_greedy(backend, case, greedy(config))


def check_greedy(backend: PlanBackend, case: Case, config: PlanConfig) -> None:
    """Tokens are the reference's: its beams are all equal then, so one does."""
    few = replace(case, contexts=case.contexts[:2])
    got = plan_all(backend, case, config, 0)
    reference = ReferenceBackend(on_device(case.model), case.discretizer)
    want = plan_all(reference, few, replace(config, beam_width=1, n_expand=1), 0)
    same = [np.array_equal(a, b) for a, b in zip(got.tokens, want.tokens, strict=False)]
    if not any(same):  # rounding may have decided in one of them
        raise WrongAnswer(f"{case.name} fp32: expected the reference's greedy plan, got another")


def check_estimates(plan: BeamPlan, case: Case, config: PlanConfig, dtype: Dtype) -> None:
    """Rewards and values along the plans of a few contexts, computed anew by torch."""
    for i, context in enumerate(case.contexts[:2]):
        exact = estimates(case, context, plan.tokens[i], config, torch.float64)
        kept = torch.bfloat16 if dtype == "bf16" else torch.float32
        with arithmetic(dtype):
            theirs = estimates(case, context, plan.tokens[i], config, kept)
        allowed = 2.0 * float(np.abs(theirs - exact).max()) + TINY[dtype]
        ours = np.stack([plan.rewards[i], plan.values[i]], axis=-1) / ranges(case.discretizer)
        error = float(np.abs(ours - exact).max())
        if not error <= allowed:
            raise WrongAnswer(
                f"{case.name} {dtype}: expected estimates within {allowed:.2g} of the bins' "
                f"range, got an error of {error:.2g}"
            )


def estimates(
    case: Case, context: Any, tokens: Any, config: PlanConfig, kept: torch.dtype
) -> NDArray[np.float64]:
    """(horizon, 2: reward and value) along a plan, in shares of the bins' range."""
    model = on_device(case.model).to(kept)
    max_len, dims = window_len(model, config), model.config
    sequence = torch.from_numpy(np.concatenate([context[: -dims.observation_dim], tokens.ravel()]))
    past = len(context) - dims.observation_dim
    found = np.zeros((len(tokens), 2))
    for t in range(len(tokens)):
        for which in range(2):
            end = past + (t + 1) * dims.transition_dim - 2 + which
            start = window_start(end, max_len, dims.transition_dim)
            with torch.no_grad():
                window = sequence[None, start:end].to(device())
                probs = model(window)[0, -1].double().softmax(-1).cpu().numpy()
            found[t, which] = case.discretizer.expectation(probs[None, :-1], which - 2)[0]
    return found / ranges(case.discretizer)


def ranges(discretizer: Discretizer) -> NDArray[np.float64]:
    """(2,) of the bins of reward and value."""
    edges = discretizer.thresholds[:, -2:]
    return np.maximum(edges[-1] - edges[0], 1e-12)


# ---- clocks ----


def wall_ms(run: Callable[[int], object], limits: Sizes) -> list[float]:
    """Milliseconds of runs 1, 2, ...; each ends when its results are on the host."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < limits.num_plans and time.perf_counter() - begin < limits.max_seconds:
        synchronize()
        start = time.perf_counter()
        run(len(times) + 1)
        synchronize()
        times.append(1000.0 * (time.perf_counter() - start))
    return times


def device_ms(run: Callable[[], object], per_sample: int = 20, samples: int = 20) -> list[float]:
    """Milliseconds of a run on the device alone: many in a CUDA graph, between two events."""
    if device().type == "cpu":
        return wall_ms(lambda _: run(), sizes())
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(per_sample):
            run()
    graph.replay()
    return [ms / per_sample for ms in event_ms(graph.replay, samples)]


def event_ms(run: Callable[[], object], samples: int) -> list[float]:
    """Milliseconds between two events around each run."""
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def synchronize() -> None:
    """Wait for the device."""
    if device().type == "cuda":
        torch.cuda.synchronize()


# ---- the floor ----


@dataclass(frozen=True)
class Floor:
    """The least that a plan of one context asks of a machine, if its beams share nothing."""

    tokens: int
    """that follow one another: each needs all weights again"""
    rows: int
    """tokens of all beams, run through the model: one a drawn token, windows not encoded anew"""
    rows_asked: int
    """the same with the windows that crops encode anew, a window a beam"""
    flops: float
    """of `rows`, attention left out"""
    weight_bytes: float
    """`tokens` times a model's matrices"""

    def milliseconds(self, tflops: float, gigabytes_per_s: float) -> float:
        """At the ceilings of a run: products or weights, whichever takes longer."""
        return max(self.flops / tflops * 1e-9, self.weight_bytes / gigabytes_per_s * 1e-6)


def plan_floor(model: TrajectoryTransformer, config: PlanConfig, context_len: int) -> Floor:
    """See `Floor`; bytes are of the precision of `config`."""
    dims = model.config
    drawn = config.num_rows * (dims.action_dim + 2) * config.horizon
    drawn += config.beam_width * dims.observation_dim * (config.horizon - 1)
    tokens = config.num_draws(dims.observation_dim, dims.action_dim)
    matrices = matrix_weights(dims)
    kept = 2 if config.dtype == "bfloat16" else 4
    asked = rows_asked(model, config, context_len)
    return Floor(tokens, drawn, asked, 2.0 * drawn * matrices, float(tokens * kept * matrices))


def matrix_weights(dims: ModelConfig) -> int:
    """Numbers of a model's matrices that one token meets: projections, MLP, its own head."""
    block = 12 * dims.embed_dim**2
    return dims.num_layers * block + dims.embed_dim * (dims.vocab_size + 1)


def shape_name(dims: ModelConfig) -> str:
    """A model in words."""
    sizes_of = f"{dims.num_layers}x{dims.embed_dim}, {dims.vocab_size} bins"
    return f"{dims.observation_dim}+{dims.action_dim}, {sizes_of}"


def tasks() -> tuple[str, ...]:
    """Models that are measured."""
    return tuple(TASKS)
