"""`tt-fast bench`: how fast this machine plans, and what return that buys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tt_fast.commands.base import Command
from tt_fast.files import atomic_write, require_output, to_json, write_text
from tt_fast.validate import require, require_choice, require_int, require_number

if TYPE_CHECKING:
    from tt_fast.bench import BackendRow, BenchOptions, Setting
    from tt_fast.checkpoint import Checkpoint
    from tt_fast.measure import Case
    from tt_fast.tradeoff import PlayOptions, ReturnRow

Row = TypeVar("Row", "BackendRow", "ReturnRow")


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Time planning on this machine: every backend but cuda, after it has planned rightly.

    With --checkpoint, plans are those of a trained model in its environment, and a second table has
    latency against return.
    """

    task: tuple[Literal["hopper", "halfcheetah"], ...] = ("hopper", "halfcheetah")
    """What a model of the official size with random weights stands for, without --checkpoint."""
    setting: tuple[str, ...] = ()
    """Plans, such as H5-B32x2: horizon 5, 32 beams, 2 children each; with --checkpoint also
    H5-B32x2-F3: a plan every 3 steps. By default the original's small and large one, and some
    between for the returns."""
    plans: int = 200
    """Plans to time per row."""
    seconds: float = 20.0
    """Seconds after which a row ends with fewer plans; it always has one."""
    all: bool = False
    """Time the reference at large settings too: minutes for one plan."""
    threads: int | None = None
    """Threads; by default as many as this process, or its container, may use."""
    checkpoint: Path | None = None
    """Run folder, which stands for its newest checkpoint, or a checkpoint, such as RUN/best."""
    env_id: str | None = None
    """Gymnasium id; by default the environment of the model's dataset."""
    episodes: int = 2
    """Episodes per setting, with --checkpoint."""
    max_steps: int | None = None
    """End every episode after so many steps."""
    seed: int = 0
    """Seed of the first episode; episode j has seed + j."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the episodes' plans, with --checkpoint; the table of backends
    has both."""
    json: Path | None = None
    """JSON file to write, after every row."""
    csv: Path | None = None
    """CSV file to write, after every row; column `table` tells the two tables apart."""
    plot: Path | None = None
    """Picture (.png, .pdf, .svg) to write of latency against return, with --checkpoint."""
    no_progress: bool = False
    """Show no progress bar."""
    machine: dict[str, Any] = field(default_factory=dict, init=False)
    backend_rows: list[Any] = field(default_factory=list, init=False)
    return_rows: list[Any] = field(default_factory=list, init=False)

    def run(self) -> None:
        from tt_fast.checkpoint import Checkpoint
        from tt_fast.measure import describe_machine, machine_lines

        self._check()
        checkpoint = None if self.checkpoint is None else Checkpoint.load(self.checkpoint)
        options = self._options()
        self.machine.update(describe_machine(options.num_threads))
        print(machine_lines(self.machine))
        cases = self._cases(checkpoint)
        print(self._model_line(cases))
        self._bench_backends(cases, options)
        if checkpoint is not None:
            self._play_settings(checkpoint)

    def saved(self) -> str:
        count = len(self.backend_rows) + len(self.return_rows)
        files = [str(path) for path in (self.json, self.csv) if path is not None]
        if not files or count == 0:
            return "nothing was written"
        return f"the finished rows ({count}) are in {' and '.join(files)}"

    # ---- checks and options ----

    def _check(self) -> None:
        require_int("plans", self.plans, 1)
        require_number("seconds", self.seconds, 0.0, open_low=True)
        require_int("episodes", self.episodes, 1)
        require_int("seed", self.seed, 0)
        for name in ("threads", "max_steps"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        for name in ("json", "csv", "plot"):
            require_output(name, getattr(self, name))
        if self.plot is not None:
            require_choice("suffix of plot", self.plot.suffix, (".png", ".pdf", ".svg"))
        if self.checkpoint is None:
            for name in ("plot", "env_id"):
                wanted = "None without --checkpoint"
                require(getattr(self, name) is None, name, wanted, str(getattr(self, name)))
            for name in ("episodes", "max_steps", "seed", "dtype"):
                value, default = getattr(self, name), getattr(Bench, name)
                require(value == default, name, f"{default}, without --checkpoint", value)
            wanted = "a plan at every step (no -F) without --checkpoint"
            for setting in self._settings(()):
                require(setting.plan_freq == 1, "setting", wanted, setting.name)
        else:
            require(self.task == Bench.task, "task", "none with --checkpoint", self.task)

    def _settings(self, default: Sequence[str]) -> list[Setting]:
        from tt_fast.bench import Setting

        return [Setting.parse(text) for text in self.setting or default]

    def _options(self) -> BenchOptions:
        from tt_fast.bench import BenchOptions
        from tt_fast.limits import available_cpus

        return BenchOptions(
            num_threads=self.threads or available_cpus(),
            num_plans=self.plans,
            max_seconds=self.seconds,
            all_rows=self.all,
        )

    def _play_options(self) -> PlayOptions:
        from tt_fast.tradeoff import PlayOptions

        return PlayOptions(
            env_id=self.env_id,
            episodes=self.episodes,
            max_steps=self.max_steps,
            seed=self.seed,
            num_threads=self.threads,
            dtype=self.dtype,
            progress=not self.no_progress,
        )

    # ---- the two tables ----

    def _cases(self, checkpoint: Checkpoint | None) -> list[Case]:
        from tt_fast import bench, tradeoff

        if checkpoint is None:
            return [bench.make_case(task) for task in dict.fromkeys(self.task)]
        return [tradeoff.make_case(checkpoint, self._play_options())]

    def _model_line(self, cases: Sequence[Case]) -> str:
        from tt_fast.measure import describe_model

        size = describe_model(cases[0].model.config)
        if self.checkpoint is None:
            return f"models of {size}, random weights, one context of 5 transitions each"
        return f"{self.checkpoint}: {size}; contexts of an episode in {cases[0].name}"

    def _bench_backends(self, cases: Sequence[Case], options: BenchOptions) -> None:
        from tt_fast import bench
        from tt_fast.tables import head_line, row_line

        plans = dict.fromkeys(setting.plan for setting in self._settings(bench.SETTINGS))
        settings = [bench.Setting(plan) for plan in plans]
        rows = bench.bench_backends(cases, settings, options, progress=not self.no_progress)
        _say(f"\n{head_line(bench.BACKEND_COLUMNS)}")
        heading = ""
        for row in self._collect(rows, self.backend_rows):
            if heading != f"{row.task} {row.setting}":
                heading = f"{row.task} {row.setting}"
                _say(heading)
            _say(row_line(bench.BACKEND_COLUMNS, row))
        print(bench.notes(self.backend_rows, options))

    def _play_settings(self, checkpoint: Checkpoint) -> None:
        from tt_fast import tradeoff
        from tt_fast.tables import head_line, row_line

        settings = self._settings(tradeoff.SETTINGS)
        rows = tradeoff.play_settings(checkpoint, settings, self._play_options())
        _say(f"\n{head_line(tradeoff.RETURN_COLUMNS)}")
        for row in self._collect(rows, self.return_rows):
            _say(row_line(tradeoff.RETURN_COLUMNS, row))
        print(tradeoff.notes(self.return_rows))
        if self.plot is not None:
            _save_plot(self.plot, self.return_rows)

    def _collect(self, rows: Iterator[Row], found: list[Row]) -> Iterator[Row]:
        """Pass rows on as they come; keep them, and write the files anew after each."""
        for row in rows:
            found.append(row)
            self._save()
            yield row

    def _save(self) -> None:
        tables = {"backends": self.backend_rows, "returns": self.return_rows}
        values = {name: [row.to_dict() for row in rows] for name, rows in tables.items()}
        if self.json is not None:
            write_text(self.json, to_json({"machine": self.machine, **values}))
        if self.csv is not None:
            from tt_fast.tables import csv_text

            where = {key: self.machine[key] for key in ("processor", "num_threads", "isa")}
            rows = [{"table": name, **row, **where} for name in values for row in values[name]]
            write_text(self.csv, csv_text(rows))


def _say(line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    from tqdm.auto import tqdm

    tqdm.write(line)


def _save_plot(path: Path, rows: Sequence[ReturnRow]) -> None:
    from tt_fast.plots import plot_latency

    figure = plot_latency(
        [row.p50_ms for row in rows],
        [row.mean_return for row in rows],
        [row.std_error for row in rows],
        names=[row.setting for row in rows],
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
