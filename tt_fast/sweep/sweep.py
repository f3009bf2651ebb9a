"""Sweeps: every dataset with every seed trained and played, side by side on Ray.

Only Ray's core is needed: a trial's folder can be continued wherever it stopped, which is what
Tune would add, together with pandas and pyarrow. The folder of a sweep holds

    sweep.json                        its settings, and the state of every trial
    sweep.png                         scores by dataset
    <dataset>-seed<k>/                a run folder of `train`
        result.json                   what the trial found
        error.txt                     why its last attempt failed, if it did

On several machines they, and the datasets, must lie on a file system that all of them see.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tt_fast.config import TOKEN_KINDS
from tt_fast.data import OfflineDataset, load_dataset
from tt_fast.files import atomic_write, locked, read_json
from tt_fast.results import ScoredEpisodes, mean_text
from tt_fast.selection import require_playable
from tt_fast.sweep.runner import Cluster, SweepRecord, TrialFailure, TrialRunner, import_ray
from tt_fast.sweep.trial import SweepConfig, Trial, TrialResult, read_result
from tt_fast.tables import Column, head_line, number, row_line
from tt_fast.validate import require, require_int


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; trials in the order of datasets and seeds."""

    output_dir: Path
    trials: tuple[Trial, ...]
    results: tuple[TrialResult, ...]
    failures: tuple[TrialFailure, ...]

    def of_dataset(self, dataset: str) -> list[TrialResult]:
        """Results of one dataset, in the order of the seeds."""
        return [result for result in self.results if result.trial.dataset == dataset]

    def pooled(self) -> dict[str, ScoredEpisodes]:
        """Episodes of all seeds together, by dataset; nothing for one without any."""
        found = {}
        for dataset in dict.fromkeys(trial.dataset for trial in self.trials):
            played = [r.played for r in self.of_dataset(dataset) if r.played is not None]
            if played:
                returns = tuple(value for episodes in played for value in episodes.returns)
                found[dataset] = dataclasses.replace(played[0], returns=returns)
        return found

    def __str__(self) -> str:
        """A table of datasets, and one of the trials that failed."""
        datasets = list(dict.fromkeys(trial.dataset for trial in self.trials))
        columns = self._columns(max(len(name) for name in ("dataset", *datasets)))
        lines = [head_line(columns), *(row_line(columns, dataset) for dataset in datasets)]
        lines += ["", "failed:"] if self.failures else []
        for failure in self.failures:
            where = self.output_dir / failure.trial.folder / "error.txt"
            lines += [f"{failure.trial.folder}, {failure.attempts} x: {failure.error} ({where})"]
        return "\n".join(lines)

    def _columns(self, width: int) -> list[Column]:
        pooled = self.pooled()

        def seeds(dataset: str) -> str:
            wanted = sum(trial.dataset == dataset for trial in self.trials)
            return f"{len(self.of_dataset(dataset))}/{wanted}"

        def returns(dataset: str) -> str:
            found = pooled.get(dataset)
            return "-" if found is None else mean_text(found.mean_return, found.std_error)

        def score(dataset: str) -> str:
            found = pooled.get(dataset)
            if found is None or found.normalized_mean is None:
                return "-"
            return mean_text(found.normalized_mean, found.normalized_std_error)

        columns = [Column("dataset", -width, str), Column("seeds", 7, seeds)]
        if pooled:
            return [*columns, Column("return", 19, returns), Column("score", 15, score)]
        return [*columns, *(self._loss_column(kind) for kind in TOKEN_KINDS)]

    def _loss_column(self, kind: str) -> Column:
        """Mean loss of the seeds, where nothing was played."""

        def mean(dataset: str) -> str:
            losses = [result.losses[kind] for result in self.of_dataset(dataset)]
            return number(sum(losses) / len(losses) if losses else None, 3)

        return Column(f"{kind} loss", len(kind) + 6, mean)


def run_sweep(
    datasets: Sequence[str | Path],
    seeds: Sequence[int],
    output_dir: str | Path,
    config: SweepConfig | None = None,
    cluster: Cluster | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Run every trial that has no result yet; a trial that was begun goes on from its checkpoint.

    A trial that raises, or whose process dies, is tried again, unless its settings are at fault;
    one that is given up stops no other. Ctrl-C lets every trial write a checkpoint, then raises
    KeyboardInterrupt; a second one waits no longer. A Ray that this process has already started is
    used as it is.

    Args:
        datasets: files, D4RL names or Minari ids, as `load_dataset` takes them.
        seeds: of weights, window order and dropout, one trial each.
        output_dir: folder of the sweep; made if absent. One that holds a sweep is continued: its
            settings must be the same, datasets and seeds may be new, budgets and episodes more.
        config: what every trial does.
        cluster: where they run.
        progress: show a progress bar.
        say: takes a line about every attempt that ends.

    Raises:
        ImportError: Ray, or what an environment needs, is missing.
        ValueError: arguments or datasets that do not fit, or a folder whose settings are others.
        BlockingIOError: another sweep is at work in `output_dir`.
    """
    config, cluster = config or SweepConfig(), cluster or Cluster()
    ray = import_ray()
    config = _place_training(config, cluster)
    output_dir = Path(output_dir).resolve()
    sources = _load_all(datasets, config)
    seeds = _check_seeds(seeds)
    trials = [Trial(name, s.source, seed) for name, s in sources.items() for seed in seeds]
    with locked(output_dir, "sweep"):
        record = _open_record(output_dir, config, {name: s.sha256 for name, s in sources.items()})
        runner = TrialRunner(ray, config, cluster, record, say or (lambda _: None))
        runner.run(trials, progress)
        results = [read_result(output_dir, trial, config) for trial in trials]
        done = tuple(result for result in results if result is not None)
        found = SweepResult(output_dir, tuple(trials), done, tuple(runner.failures))
        _save_plot(found)
    return found


# ---- checks ----


@dataclass(frozen=True)
class _Source:
    """A dataset, looked at once before any trial starts."""

    source: str
    sha256: str
    """Of its rows"""


def _load_all(datasets: Sequence[str | Path], config: SweepConfig) -> dict[str, _Source]:
    """Every dataset by its name; what does not fit shows before hours of training."""
    is_list = isinstance(datasets, Sequence) and not isinstance(datasets, str) and len(datasets) > 0
    require(is_list, "datasets", "a list of at least one", datasets)
    found: dict[str, _Source] = {}
    folders: set[str] = set()
    for source in datasets:
        path = Path(source).expanduser()
        # a trial's process may have another working directory
        text = str(path.resolve()) if path.is_file() else str(source)
        dataset = load_dataset(text, env_id=config.env_id, ref_scores=config.ref_scores)
        if config.play.episodes > 0:
            play = config.play
            require_playable(dataset, config.model_for(dataset), play.plan, None, play.max_steps)
        folder = Trial(dataset.name, text, 0).folder
        require(folder not in folders, "datasets", "different names", f"two of {dataset.name}")
        folders.add(folder)
        found[dataset.name] = _Source(text, _digest(dataset))
    return found


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    found = tuple(require_int("seeds", seed, 0, 2**63 - 1) for seed in seeds)
    different = len(found) > 0 and len(set(found)) == len(found)
    require(different, "seeds", "at least one, all different", found)
    return found


def _place_training(config: SweepConfig, cluster: Cluster) -> SweepConfig:
    """`device` "auto" is what a trial was given, not what its machine has."""
    device, gpus = config.train.device, cluster.gpus_per_trial
    if device == "auto":
        device = "cuda" if gpus > 0.0 else "cpu"
    apart = gpus > 0.0 or not device.startswith("cuda")
    require(apart, "gpus_per_trial", f"a number above 0 with device={device!r}", gpus)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device=device))


def _open_record(output_dir: Path, config: SweepConfig, digests: Mapping[str, str]) -> SweepRecord:
    """Write sweep.json, unless a sweep that is there already is another."""
    path = output_dir / "sweep.json"
    before = read_json(path) if path.exists() else {}
    if before:
        _check_continued(path, before, config, digests)
    values = {
        "settings": config.settings(),
        "budgets": config.budgets(),
        "datasets": {**before.get("datasets", {}), **digests},
        "trials": before.get("trials", {}),
    }
    return SweepRecord(output_dir, values)


def _check_continued(
    path: Path, before: Mapping[str, Any], config: SweepConfig, digests: Mapping[str, str]
) -> None:
    """Refuse to continue a sweep with other settings, less budget or other data."""
    for key in ("settings", "budgets", "datasets", "trials"):
        require(isinstance(before.get(key), dict), str(path), f"a sweep's {key}", before.get(key))
    # a setting that is younger than the file had its default then
    defaults, had = SweepConfig().settings(), f"as {path} has it"
    for name, value in config.settings().items():
        was = before["settings"].get(name, defaults[name])
        require(was == value, name, f"{was!r}, {had}", value)
    for name, budget in config.budgets().items():
        was = before["budgets"].get(name)
        grown = budget is None or (was is not None and budget >= was)
        require(grown, name, "None" if was is None else f"at least {was}, {had}", budget)
    for name, digest in digests.items():
        was = before["datasets"].get(name, digest)
        require(was == digest, f"dataset {name}", f"rows of SHA-256 {was}, {had}", digest)


def _digest(dataset: OfflineDataset) -> str:
    """SHA-256 of all rows."""
    digest = hashlib.sha256()
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        digest.update(np.ascontiguousarray(getattr(dataset, key)).data)  # without a copy
    return digest.hexdigest()


def _save_plot(result: SweepResult) -> None:
    """sweep.png, if anything was played: scores where all datasets have them, else returns."""
    from tt_fast.plots import plot_sweep

    pooled = result.pooled()
    if not pooled:
        return
    scored = all(episodes.normalized_mean is not None for episodes in pooled.values())
    mean, error = (
        ("normalized_mean", "normalized_std_error") if scored else ("mean_return", "std_error")
    )
    figure = plot_sweep(
        list(pooled),
        [getattr(episodes, mean) for episodes in pooled.values()],
        [getattr(episodes, error) for episodes in pooled.values()],
        [[getattr(r.played, mean) for r in result.of_dataset(name) if r.played] for name in pooled],
        label="normalised score" if scored else "return of an episode",
    )
    with atomic_write(result.output_dir / "sweep.png") as temporary:
        figure.savefig(temporary, dpi=150)
