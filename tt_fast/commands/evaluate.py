"""`tt-fast evaluate`: play episodes with one or more models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tt_fast.commands.base import Command
from tt_fast.config import PlanConfig
from tt_fast.files import atomic_write, require_output
from tt_fast.presets import check_preset
from tt_fast.validate import refuse, require

if TYPE_CHECKING:
    from tt_fast.data import OfflineDataset
    from tt_fast.evaluate import EvalResult
    from tt_fast.planning import Planner


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Play episodes with one or more models and print returns and normalised scores.

    The episodes of all checkpoints and seeds are pooled: mean ± standard error over all of them.
    """

    checkpoints: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CHECKPOINT [...]", help_behavior_hint="(at least one)"),
    ]
    """Run folders, which stand for their newest checkpoints, or checkpoints, such as RUN/best."""
    env_id: str | None = None
    """Gymnasium id; by default the environment of the model's dataset."""
    episodes: int = 1
    """Episodes per checkpoint and seed."""
    num_envs: int = 1
    """Environments side by side; results do not depend on it."""
    seeds: tuple[int, ...] = (0,)
    """Episode j of seed s has seed s + j, so seeds must lie at least --episodes apart."""
    max_steps: int | None = None
    """End every episode after so many steps."""
    plan_freq: int = 1
    """Steps between two plans."""
    no_prefix_context: bool = False
    """Plan from the observation alone, without past transitions."""
    backend: str = "auto"
    """Planning backend: cpu, cuda, torch, reference; auto: cpu, or torch if it was not built."""
    threads: int | None = None
    """Threads of the cpu backend; by default as many as this process, or its container, may use."""
    deadline_ms: float | None = None
    """Milliseconds for one decision: the best plan found in this time (cpu backend)."""
    out: Path | None = None
    """JSON file to write, after every episode."""
    resume: bool = False
    """Keep the finished results in --out, which must be of these models and settings, and play what
    is missing; a seed that was ended early is played anew."""
    video: Path | None = None
    """MP4 to write of the very first episode."""
    histogram: Path | None = None
    """Picture (.png, .pdf, .svg) to write of the returns against those of --dataset."""
    dataset: str | None = None
    """Dataset of --histogram, as `tt-fast train` takes it."""
    no_progress: bool = False
    """Show no progress bar."""
    preset: str | None = None
    """The original's settings for a dataset, jannerm/hopper-medium-v2 and the like; options given
    beside it win."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The beam search; defaults are the original's. Of --cdf-* and --k-* both apply, cdf first."""
    results: list[Any] = field(default_factory=list, init=False)
    unfinished: list[Any] = field(default_factory=list, init=False)

    def run(self) -> None:
        from tt_fast.results import aggregate

        self._check()
        dataset = self._load_dataset()
        planners = {folder: self._make_planner(folder) for folder in self.checkpoints}
        self._check_pooled(planners)
        self._keep_finished(planners)
        missing, video = self._missing(), self.video
        filmed = video is None or len(missing) > 0
        require(filmed, "video", "None, as no episode is left to play", str(video))
        for folder, seed in missing:
            result = self._evaluate(planners[folder], folder, seed, video)
            video = None
            self.results.append(result)
            self._save(self.results)
            print(f"{folder}, seed {seed}: {result}")
            if result.interrupted:
                raise KeyboardInterrupt
        summary = aggregate(self.results)
        if len(self.results) > 1:
            print(f"all: {summary}")
        if dataset is not None and self.histogram is not None:
            _save_histogram(self.histogram, dataset, summary.returns)

    def saved(self) -> str:
        if self.out is None or not self.out.exists():
            return "no result was written"
        return f"finished episodes are in {self.out}"

    def _check(self) -> None:
        check_preset(self.preset)
        require(len(self.checkpoints) > 0, "checkpoints", "at least one folder", "none")
        from tt_fast.checkpoint import resolve

        unique = len({resolve(p).resolve() for p in self.checkpoints}) == len(self.checkpoints)
        require(unique, "checkpoints", "different models", [str(p) for p in self.checkpoints])
        for name in ("out", "video", "histogram"):
            require_output(name, getattr(self, name))
        if self.histogram is not None:
            suffix = self.histogram.suffix
            require(suffix in (".png", ".pdf", ".svg"), "histogram", ".png, .pdf or .svg", suffix)
        if self.out is not None and self.out.is_file() and not self.resume:
            refuse("out", "a new file, or --resume to go on with it", str(self.out))
        out_known = self.out is not None or not self.resume
        require(out_known, "out", "the file to go on with, as --resume is given", self.out)
        seeds = sorted(self.seeds)
        apart = all(b - a >= self.episodes for a, b in pairwise(seeds))
        wanted = f"numbers at least episodes={self.episodes} apart, as episode j has seed + j"
        require(len(seeds) > 0 and apart, "seeds", wanted, self.seeds)

    def _check_pooled(self, planners: Mapping[Path, Planner]) -> None:
        """All models' results can be pooled, which is known before any is played."""
        from tt_fast.evaluate import pooled_setting

        settings = [pooled_setting(p, self.env_id, self.max_steps) for p in planners.values()]
        for setting, (name, first) in product(settings[1:], settings[0].items()):
            require(setting[name] == first, "checkpoints", f"one {name}, {first!r}", setting[name])

    def _keep_finished(self, planners: Mapping[Path, Planner]) -> None:
        """Take over what --out holds; what was ended early lacks long episodes, and only stays in
        the file until there is more."""
        if not self.resume or self.out is None or not self.out.exists():
            return
        from tt_fast.results import EvalSummary

        for result in EvalSummary.load(self.out).results:
            folder = next((path for path in planners if _is_of(result, path)), None)
            wanted = f"results of {', '.join(map(str, planners))} in {self.out}"
            if folder is None:
                refuse("resume", wanted, f"one of {result.checkpoint}")
            self._check_setting(result, planners[folder])
            if result.interrupted:
                self.unfinished.append(result)
            else:
                self.results.append(result)
                print(f"{folder}, seed {result.seed}, from {self.out}: {result}")

    def _check_setting(self, result: EvalResult, planner: Planner) -> None:
        """What was played before can be pooled with what is to be played."""
        from tt_fast.evaluate import pooled_setting

        setting = {
            "checkpoint_step": planner.checkpoint.metadata.get("step"),
            **pooled_setting(planner, self.env_id, self.max_steps),
        }
        for name, value in setting.items():
            before = getattr(result, name)
            require(value == before, name, f"{before!r}, as in {self.out}", value)

    def _missing(self) -> list[tuple[Path, int]]:
        """Checkpoints and seeds that are still to be played."""
        missing = []
        for folder, seed in product(self.checkpoints, self.seeds):
            mine = [result for result in self.results if _is_of(result, folder)]
            if any((r.seed, len(r.returns)) == (seed, self.episodes) for r in mine):
                continue
            wanted_seeds = range(seed, seed + self.episodes)
            is_new = all(_seeds_of(result).isdisjoint(wanted_seeds) for result in mine)
            wanted = f"one whose episodes are all or none in {self.out}"
            require(is_new, "seeds", wanted, seed)
            missing.append((folder, seed))
        return missing

    def _load_dataset(self) -> OfflineDataset | None:
        if self.histogram is None:
            require(self.dataset is None, "dataset", "None without --histogram", self.dataset)
            return None
        from tt_fast.data import load_dataset

        if self.dataset is None:
            raise ValueError("dataset: expected a dataset for the histogram, got None")
        return load_dataset(self.dataset)

    def _make_planner(self, folder: Path) -> Planner:
        from tt_fast.checkpoint import Checkpoint
        from tt_fast.planning import Planner

        return Planner(
            Checkpoint.load(folder),
            self.plan,
            self.backend,
            plan_freq=self.plan_freq,
            prefix_context=not self.no_prefix_context,
            num_threads=self.threads,
            deadline_ms=self.deadline_ms,
        )

    def _evaluate(
        self, planner: Planner, folder: Path, seed: int, video: Path | None
    ) -> EvalResult:
        from tt_fast.evaluate import evaluate

        def keep(so_far: EvalResult) -> None:
            self._save([*self.results, _named(so_far, folder)])

        result = evaluate(
            planner,
            self.env_id,
            self.episodes,
            self.num_envs,
            seed,
            video,
            max_steps=self.max_steps,
            progress=not self.no_progress,
            on_episode=None if self.out is None else keep,
        )
        return _named(result, folder)

    def _save(self, results: Sequence[EvalResult]) -> None:
        from tt_fast.results import aggregate

        if self.out is None:
            return
        kept = list(results)
        for part in self.unfinished:  # each episode once: of two results the one that has more
            others = [result for result in kept if _overlap(result, part)]
            if all(len(result.returns) < len(part.returns) for result in others):
                kept = [result for result in kept if not _overlap(result, part)] + [part]
        aggregate(kept).save(self.out)


def _overlap(a: EvalResult, b: EvalResult) -> bool:
    """Both have an episode of the same checkpoint and seed."""
    same = b.checkpoint is not None and _is_of(a, Path(b.checkpoint))
    return same and not _seeds_of(a).isdisjoint(_seeds_of(b))


def _seeds_of(result: EvalResult) -> set[int]:
    """Of its episodes, those of the first if it was ended early."""
    return set(range(result.seed, result.seed + len(result.returns)))


def _named(result: EvalResult, checkpoint: Path) -> EvalResult:
    return dataclasses.replace(result, checkpoint=str(checkpoint))


def _is_of(result: EvalResult, checkpoint: Path) -> bool:
    """The result names this checkpoint, by whichever path."""
    return (
        result.checkpoint is not None and Path(result.checkpoint).resolve() == checkpoint.resolve()
    )


def _save_histogram(path: Path, dataset: OfflineDataset, returns: Sequence[float]) -> None:
    from tt_fast.plots import plot_returns

    figure = plot_returns(
        dataset.episode_returns,
        returns,
        ref_scores=dataset.ref_scores,
        dataset_name=dataset.name,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
