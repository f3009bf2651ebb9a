"""The original's own code beside ours: the same weights, the same context, turn by turn.

    python benchmarks/bench_original.py --original PATH [--task hopper] [--setting H5-B32x2]
    python benchmarks/bench_original.py --original PATH --checkpoint RUN

PATH is a checkout of jannerm/trajectory-transformer; RUN a trained model, whose contexts are those
of an episode in its environment, in place of random weights. Ours must first return the original's
greedy plan, token for token; sampled plans draw from other generators. One plan of the original
takes seconds to minutes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import Row, Work, make_row, plan_config, write_rows
from torch import Tensor

from tt_fast import Checkpoint, ModelConfig, PlanConfig, TrajectoryTransformer, tradeoff
from tt_fast.bench import SETTINGS, TASKS, make_case
from tt_fast.compat.jannerm import beam_plan as compat_beam_plan
from tt_fast.config import DEFAULT_DISCOUNT, Precision
from tt_fast.limits import available_cpus
from tt_fast.measure import Case, Ceiling, RowCount, count_rows, first_norm, rows_asked
from tt_fast.planning.cpu import CpuBackend
from tt_fast.tables import Column, head_line, row_line, short
from tt_fast.tradeoff import PlayOptions

DTYPES: tuple[Precision, ...] = ("float32", "bfloat16")

#: Transitions of the model that plans without a crop: a context of 5 and a horizon of 15.
GROW_TRANSITIONS = 20

COLUMNS = (
    Column("task", -12, lambda pair: pair[0].task),
    Column("setting", -11, lambda pair: pair[0].setting),
    Column("op", -11, lambda pair: pair[0].op),
    Column("engine", -9, lambda pair: pair[0].engine),
    Column("dtype", -8, lambda pair: pair[0].dtype),
    Column("runs", 5, lambda pair: str(pair[0].num_runs)),
    Column("median ms", 9, lambda pair: short(pair[0].median_ms)),
    Column("times as fast", 13, lambda pair: short(pair[1] / pair[0].median_ms)),
)


class Original:
    """The modules of a checkout that plan; its data, training and rendering are left out.

    Raises:
        FileNotFoundError: no such checkout.
    """

    def __init__(self, path: Path) -> None:
        package = path / "trajectory"
        if not (package / "search" / "core.py").is_file():
            raise FileNotFoundError(f"original: expected {package}/search/core.py, got none")
        sys.path.insert(0, str(path.resolve()))
        # its utils import Gym, MuJoCo and git when they are made; the search needs two names
        utils = ModuleType("trajectory.utils")
        utils.__path__ = [str(package.resolve() / "utils")]
        sys.modules["trajectory.utils"] = utils
        progress = importlib.import_module("trajectory.utils.progress")
        vars(utils).update(Progress=progress.Progress, Silent=progress.Silent)
        self._transformers = importlib.import_module("trajectory.models.transformers")
        self._core = importlib.import_module("trajectory.search.core")

    def load(self, model: TrajectoryTransformer) -> Any:
        """Its GPT with the weights of ours, in eval mode."""
        gpt = self._transformers.GPT(_original_config(model.config)).eval()
        found = gpt.load_state_dict(model.state_dict(), strict=False)
        missing = [name for name in found.missing_keys if not name.endswith(".mask")]
        if missing or found.unexpected_keys:
            raise ValueError(f"original: expected our weights' names, got {found}")
        return gpt

    def plan(
        self,
        gpt: Any,
        case: Case,
        config: PlanConfig,
        beam_plan: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """(horizon, transition_dim) tokens of its beam plan, or of another that is called alike."""
        dims = case.model.config
        grows = config.overflow == "grow"
        return (beam_plan or self._core.beam_plan)(
            gpt,
            _value_fn(case),
            torch.from_numpy(case.context(0))[None],
            config.horizon,
            config.beam_width,
            config.n_expand,
            dims.observation_dim,
            dims.action_dim,
            DEFAULT_DISCOUNT,
            None if grows else config.max_context_transitions,
            k_obs=config.k_obs,
            k_act=config.k_act,
            k_rew=config.k_rew,
            cdf_obs=config.cdf_obs,
            cdf_act=config.cdf_act,
            cdf_rew=config.cdf_rew,
            verbose=False,
        )


@dataclass
class Engine:
    """Something that plans, and how long its plans took."""

    names: dict[str, str]
    """op, task, setting, engine"""
    dtype: Precision
    """Arithmetic of its matrix products"""
    plan: Callable[[], object]
    repeats: int
    """Plans a round"""
    count: Callable[[int], Work]
    """What one plan did, given how many were timed"""
    plan_ms: list[float] = field(default_factory=list)

    def run_round(self) -> None:
        """Plan a few times against the clock."""
        for _ in range(self.repeats):
            start = time.perf_counter()
            self.plan()
            self.plan_ms.append(1000.0 * (time.perf_counter() - start))


def main() -> None:
    """The command line."""
    options = parse()
    torch.set_num_threads(options.threads)
    original = Original(options.original)
    rows: list[Row] = []
    print(head_line(COLUMNS))
    for case in cases(options):
        for setting in options.setting:
            for row in bench(original, case, setting, options):
                rows.append(row)
                print(row_line(COLUMNS, (row, rows[_first(rows, row)].median_ms)), flush=True)
            if options.csv is not None:
                write_rows(options.csv, rows)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--original", type=Path, required=True, help="a checkout of jannerm/trajectory-transformer")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--checkpoint", type=Path, help="a run folder or checkpoint in place of the tasks")
    add("--env-id", help="of its contexts (default: the environment of its dataset)")
    add("--setting", nargs="+", default=list(SETTINGS), help="names such as H15-B128x2")
    add("--rounds", type=int, default=3, help="plans of the original; ours run between them")
    add("--repeats", type=int, default=10, help="plans of ours per round and dtype")
    add("--threads", type=int, default=available_cpus())
    add("--csv", type=Path, help="file to write, after every setting")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The trained model, or the tasks' models with random weights."""
    if options.checkpoint is None:
        yield from map(make_case, options.task)
    else:
        checkpoint = Checkpoint.load(options.checkpoint)
        play = PlayOptions(env_id=options.env_id, num_threads=options.threads, progress=False)
        yield tradeoff.make_case(checkpoint, play)


def bench(
    original: Original, case: Case, setting: str, options: argparse.Namespace
) -> Iterator[Row]:
    """Rows of one model and setting: the original, ours, and for hopper ours without a crop."""
    config = plan_config(setting)
    check_greedy(original, case, config, options.threads)
    names = {"op": "plan", "task": case.name, "setting": setting}
    gpt = original.load(case.model)
    with count_rows(first_norm(gpt)) as count:
        engines = [original_engine(original, gpt, case, config, names, count)]
        engines += [our_engine(case, config, dtype, names, options) for dtype in DTYPES]
        if options.threads == available_cpus():  # all that its signature knows
            engines.append(compat_engine(original, gpt, case, config, names, options))
        if case.name == "hopper" and _context_len(case) + config.horizon <= GROW_TRANSITIONS:
            engines += grow_engines(original, config, names, options)
        peaks = {dtype: Ceiling(dtype, options.threads) for dtype in DTYPES}
        for _ in range(options.rounds):
            for engine in engines:
                peaks[engine.dtype].sample()
                engine.run_round()
    for engine in engines:
        work, peak = engine.count(len(engine.plan_ms)), peaks[engine.dtype].gflops
        names = {**engine.names, "dtype": engine.dtype}
        yield make_row(names, engine.plan_ms, work, peak, options.threads)


def original_engine(
    original: Original,
    gpt: Any,
    case: Case,
    config: PlanConfig,
    names: dict[str, str],
    count: RowCount,
) -> Engine:
    """The original's code; `count` looks at its model."""
    asked = rows_asked(case.model, config, len(case.context(0)))
    return Engine(
        names={**names, "engine": "original"},
        dtype="float32",
        plan=lambda: original.plan(gpt, case, config),
        repeats=1,
        count=lambda runs: Work(asked, count.rows / runs),
    )


def grow_engines(
    original: Original, config: PlanConfig, names: dict[str, str], options: argparse.Namespace
) -> list[Engine]:
    """Ours with overflow="grow" and a longer model; timed against the original's cropped plan."""
    case = make_case(names["task"], num_transitions=GROW_TRANSITIONS)
    grown = replace(config, overflow="grow")
    check_greedy(original, case, grown, options.threads)
    names = {**names, "op": "plan, grow"}
    return [our_engine(case, grown, dtype, names, options) for dtype in DTYPES]


def our_engine(
    case: Case,
    config: PlanConfig,
    dtype: Precision,
    names: dict[str, str],
    options: argparse.Namespace,
) -> Engine:
    """The C++ backend, warmed up."""
    backend = CpuBackend(case.model, case.discretizer, num_threads=options.threads)
    config = replace(config, dtype=dtype)
    case.plan(backend, config, 0)
    backend.reset_stats()
    return Engine(
        names={**names, "engine": "cpu"},
        dtype=dtype,
        plan=lambda: case.plan(backend, config, 0),
        repeats=options.repeats,
        count=lambda runs: Work.of_cpu(backend, runs),
    )


def compat_engine(
    original: Original,
    gpt: Any,
    case: Case,
    config: PlanConfig,
    names: dict[str, str],
    options: argparse.Namespace,
) -> Engine:
    """The original's call and objects, planned by ours; its first plan is checked and warms up."""
    greedy = replace(config, k_act=1, cdf_act=None, beam_width=2, n_expand=1)
    want = original.plan(original.load(case.model), case, greedy)  # `gpt` counts its rows
    got = original.plan(gpt, case, greedy, compat_beam_plan)
    if not torch.equal(got, want):
        raise ValueError("compat: expected the original's greedy plan, got another")
    return Engine(
        names={**names, "engine": "compat"},
        dtype="float32",
        plan=lambda: original.plan(gpt, case, config, compat_beam_plan),
        repeats=options.repeats,
        count=lambda runs: Work(),
    )


def check_greedy(original: Original, case: Case, config: PlanConfig, num_threads: int) -> None:
    """Our plan equals the original's where nothing is drawn: every token the likeliest.

    Raises:
        ValueError: it does not.
    """
    greedy = replace(config, k_act=1, cdf_act=None, beam_width=2, n_expand=1)
    want = original.plan(original.load(case.model), case, greedy).numpy()
    backend = CpuBackend(case.model, case.discretizer, num_threads=num_threads)
    got = case.plan(backend, greedy, 0).tokens[0]
    if not np.array_equal(got, want):
        share = float(np.mean(got == want))
        raise ValueError(f"greedy plan: expected the original's tokens, got {share:.0%} of them")


def _original_config(config: ModelConfig) -> SimpleNamespace:
    return SimpleNamespace(
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.embed_dim,
        observation_dim=config.observation_dim,
        action_dim=config.action_dim,
        transition_dim=config.transition_dim,
        embd_pdrop=config.embed_dropout,
        resid_pdrop=config.residual_dropout,
        attn_pdrop=config.attention_dropout,
        action_weight=config.action_weight,
        reward_weight=config.reward_weight,
        value_weight=config.value_weight,
    )


def _value_fn(case: Case) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """(rows, 2, vocab_size + 1) probabilities -> mean rewards and values, (rows,) each."""

    def estimate(probs: Tensor) -> tuple[Tensor, Tensor]:
        bins = probs[:, :, :-1].numpy()
        rewards, values = (case.discretizer.expectation(bins[:, i], i - 2) for i in range(2))
        return torch.from_numpy(rewards).float(), torch.from_numpy(values).float()

    return estimate


def _context_len(case: Case) -> int:
    """Past transitions of the context."""
    return len(case.context(0)) // case.model.config.transition_dim


def _first(rows: list[Row], row: Row) -> int:
    """Index of the first row of the same task and setting: the original's."""
    keys = [(other.task, other.setting) for other in rows]
    return keys.index((row.task, row.setting))


if __name__ == "__main__":
    main()
