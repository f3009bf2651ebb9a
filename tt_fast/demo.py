"""The whole product in a few minutes: a small real dataset, training, planning in MuJoCo, a report.

Nothing is prepared: the model is trained here and its returns are whatever they are. Or, for those
in a hurry, the model that comes with the package plans at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from shlex import quote

import torch

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig, PlanConfig, TrainConfig
from tt_fast.data import OfflineDataset, load_dataset
from tt_fast.envs import make_env
from tt_fast.evaluate import evaluate
from tt_fast.files import is_new_or_empty
from tt_fast.planning import Planner
from tt_fast.report import Report, write_report
from tt_fast.results import EvalResult, plan_text
from tt_fast.train import train
from tt_fast.validate import require_int, require_number
from tt_fast.video import observation_names, render_episode

DATASET = "assets/hopper-demo.hdf5"
#: Trained for an hour on two cores; docs/results.md says how, and what it earns.
PRETRAINED = "assets/hopper-pretrained"

#: How long a demo takes if nothing is said: with training, and without.
MINUTES, PRETRAINED_MINUTES = 6.0, 1.0

#: Shares of the time for training and for playing; what is left is for loading and the report.
_TRAINING_SHARE, _PLAYING_SHARE = 0.55, 0.25
#: With nothing to train.
_PRETRAINED_PLAYING_SHARE = 0.6
#: The environment's own limit, steps.
_LONGEST_EPISODE = 1000
#: Decisions after which planning's speed is known well enough.
_REHEARSAL_STEPS = 20
_MAX_FRAMES = 300

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Settings:
    """What fits the time. Windows of 5 transitions are all that the planner ever looks at."""

    model: ModelConfig
    train: TrainConfig
    plan: PlanConfig
    episodes: int
    playing_seconds: float
    max_steps: int
    """Cap of an episode's steps, lowered further where the time asks for it"""


@dataclass
class _Log:
    """Tells the user what happens and remembers how long it took."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the demo."""
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def note(self, text: str) -> None:
        """Say something that the report repeats."""
        self.notes.append(text)
        self.say(text)


def run_demo(
    output_dir: str | Path,
    *,
    minutes: float | None = None,
    seed: int = 0,
    smoke: bool = False,
    pretrained: bool = False,
    progress: bool = True,
    say: Say = lambda _: None,
) -> Path:
    """Train on the hopper data that come with the package, plan in MuJoCo, write a report.

    The folder then holds report.html, results.json, figures/, episode.mp4 (where OpenGL is found)
    and run/ with the checkpoint.

    Args:
        output_dir: a new or empty folder.
        minutes: all of it takes about so long, on any machine; more trains and plays longer. None:
            `MINUTES`, or `PRETRAINED_MINUTES` where nothing is trained.
        seed: of weights, data order, plans and environments.
        smoke: a tiny model and a few steps, only to see that everything runs.
        pretrained: train nothing, take the model that comes with the package.
        progress: show progress bars.
        say: called with a line of text now and then, such as `print`.

    Returns:
        The path of report.html.

    Raises:
        ImportError: gymnasium or MuJoCo is missing.
        FileExistsError: `output_dir` is not empty.
        ValueError: numbers out of range.
        KeyboardInterrupt: Ctrl-C; the checkpoint so far is in run/.
    """
    if minutes is None:
        minutes = PRETRAINED_MINUTES if pretrained else MINUTES
    require_number("minutes", minutes, 1.0)
    require_int("seed", seed, 0)
    folder = _new_folder(Path(output_dir))
    log = _Log(say)
    with log.phase("loading"):
        dataset = load_demo_dataset()
        make_env(str(dataset.env_id)).close()  # without MuJoCo, fail now and not after training
    settings = (_smoke_settings if smoke else _settings)(dataset, minutes, seed)
    if pretrained:
        settings = _without_training(settings, minutes)
    else:
        say(_describe_start(dataset, settings))
    run_folder = folder / "run"
    with _one_thread():
        if pretrained:
            checkpoint = _unpack_pretrained(dataset, settings, run_folder, log)
        else:
            with log.phase("training"):
                checkpoint = train(
                    dataset, settings.model, settings.train, run_folder, progress=progress
                )
        with log.phase("playing"):
            result = _play(checkpoint, settings, seed, progress, log)
    with log.phase("drawing the video"):
        video, caption = _film(result, folder / "episode.mp4", log)
    report = Report(
        dataset,
        checkpoint,
        result,
        metrics_csv=None if pretrained else run_folder / "metrics.csv",
        video=video,
        video_caption=caption,
        observation_names=observation_names(result.env_id),
        notes=log.notes,
        phases=log.seconds,
        commands=_commands(folder, minutes, seed, smoke, pretrained, result),
    )
    return write_report(folder, report)


def load_demo_dataset() -> OfflineDataset:
    """The hopper episodes that come with the package."""
    with resources.as_file(resources.files("tt_fast").joinpath(DATASET)) as path:
        return load_dataset(path)


def load_pretrained() -> Checkpoint:
    """The hopper model that comes with the package."""
    with resources.as_file(resources.files("tt_fast").joinpath(PRETRAINED)) as folder:
        return Checkpoint.load(folder)


def _new_folder(folder: Path) -> Path:
    if not is_new_or_empty(folder):
        raise FileExistsError(f"output_dir: expected a new or empty folder, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread, then as before.

    This model's matrices are too small to share out, and where the machine is busy, or a container
    shows more cores than it has, threads that wait for each other make it many times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settings(dataset: OfflineDataset, minutes: float, seed: int) -> _Settings:
    # dropout only slows down a model that sees every window a few times
    return _Settings(
        model=ModelConfig(
            dataset.observation_dim,
            dataset.action_dim,
            num_transitions=5,
            num_layers=2,
            embed_dim=64,
            embed_dropout=0.0,
            residual_dropout=0.0,
            attention_dropout=0.0,
        ),
        train=TrainConfig(
            batch_size=32,
            learning_rate=6e-3,
            max_minutes=_TRAINING_SHARE * minutes,
            seed=seed,
        ),
        plan=PlanConfig(),  # the original's own setting for hopper
        episodes=4,
        playing_seconds=60.0 * _PLAYING_SHARE * minutes,
        max_steps=_LONGEST_EPISODE,
    )


def _without_training(settings: _Settings, minutes: float) -> _Settings:
    """All of the time is for playing, with plans that leave time for many steps."""
    return replace(
        settings,
        episodes=2,
        plan=replace(settings.plan, horizon=min(5, settings.plan.horizon), beam_width=32),
        playing_seconds=60.0 * _PRETRAINED_PLAYING_SHARE * minutes,
    )


def _unpack_pretrained(
    dataset: OfflineDataset, settings: _Settings, run_folder: Path, log: _Log
) -> Checkpoint:
    """The model that comes with the package, copied to the run folder; it shows its first plan."""
    with log.phase("first plan"):
        checkpoint = load_pretrained()
        checkpoint.save(run_folder)
        planner = Planner(checkpoint, settings.plan, seed=settings.train.seed)
        env = make_env(str(checkpoint.metadata["env_id"]))
        planner.act(env.reset(settings.train.seed))
        env.close()
    about = checkpoint.metadata
    log.note(
        f"The model comes with the package: {about['seconds'] / 60:.0f} minutes of training on "
        f"{about['dataset']}, {about['tokens'] / 1e6:.0f} million tokens. The returns beside its "
        f"own are those of {dataset.name}, of better policies than most of those data."
    )
    log.say(f"The first plan was there after {log.seconds['first plan']:.1f} s.")
    return checkpoint


def _smoke_settings(dataset: OfflineDataset, minutes: float, seed: int) -> _Settings:
    full = _settings(dataset, minutes, seed)
    return _Settings(
        model=replace(full.model, num_transitions=3, num_heads=2, embed_dim=16),
        train=replace(full.train, max_minutes=None, max_tokens=60_000, log_steps=2),
        plan=PlanConfig(horizon=3, beam_width=2, n_expand=2, max_context_transitions=3),
        episodes=2,
        playing_seconds=full.playing_seconds,
        max_steps=12,
    )


def _describe_start(dataset: OfflineDataset, settings: _Settings) -> str:
    summary, model = dataset.summary(), settings.model
    budget = settings.train.max_minutes
    length = f"{budget:.1f} minutes" if budget else f"{settings.train.max_tokens:,} tokens"
    return (
        f"Training for {length} on {summary.name}: {summary.num_transitions:,} transitions of "
        f"{dataset.env_id}, {summary.num_episodes} episodes with returns of "
        f"{summary.returns.min:.0f} to {summary.returns.max:.0f}. "
        f"Model: {model.num_layers} layers, width {model.embed_dim}."
    )


def _play(
    checkpoint: Checkpoint, settings: _Settings, seed: int, progress: bool, log: _Log
) -> EvalResult:
    """Play episodes, capped in steps where the time would not do for whole ones."""
    planner = Planner(checkpoint, settings.plan, seed=seed)
    # seeds of the rehearsal lie apart from those of the episodes
    rehearsal = evaluate(planner, seed=seed + 1_000_000, max_steps=_REHEARSAL_STEPS, progress=False)
    decisions = rehearsal.decisions_per_second * settings.playing_seconds
    max_steps = max(_REHEARSAL_STEPS, int(decisions / settings.episodes))
    max_steps = min(max_steps, settings.max_steps)
    _note_plan(planner, settings.plan, log)
    result = evaluate(
        planner,
        episodes=settings.episodes,
        num_envs=settings.episodes,
        seed=seed,
        max_steps=max_steps,
        record=True,
        progress=progress,
    )
    if result.interrupted:  # some episodes ended first, but they are not what was asked for
        raise KeyboardInterrupt
    _note_returns(result, max_steps, log)
    return result


def _note_plan(planner: Planner, plan: PlanConfig, log: _Log) -> None:
    full = PlanConfig()
    same = plan == full
    aside = "" if same else f"; the original's setting is {plan_text(full)}"
    setting = f"{plan_text(plan)}, the original's setting" if same else plan_text(plan)
    log.note(f"Plans have {setting}, made by the {planner.backend_name} backend{aside}.")


def _note_returns(result: EvalResult, max_steps: int, log: _Log) -> None:
    cut = sum(1 for n, ended in zip(result.lengths, result.terminated, strict=True)
              if n == max_steps < _LONGEST_EPISODE and not ended)  # fmt: skip
    if cut:
        log.note(
            f"{cut} of {len(result.lengths)} episodes were stopped at {max_steps} steps to fit the "
            f"time; the dataset's run for up to {_LONGEST_EPISODE}, so their returns can be higher."
        )
    returns = ", ".join(f"{value:.0f}" for value in result.returns)
    log.note(f"Returns: {returns}. They are what this training earns.")


def _film(result: EvalResult, path: Path, log: _Log) -> tuple[Path | None, str]:
    """The video of the first episode and its caption; None where this machine cannot draw."""
    assert result.record is not None
    stride = math.ceil(len(result.record.actions) / _MAX_FRAMES)
    try:
        caption = render_episode(result.record, result.env_id, path, stride=stride)
    except (OSError, ImportError) as error:  # a RenderError is an OSError, and so is a full disk
        log.note(f"There is no video: {error}.")
        return None, ""
    return path, caption


def _commands(
    folder: Path, minutes: float, seed: int, smoke: bool, pretrained: bool, result: EvalResult
) -> list[str]:
    plan = result.plan_config
    settings = f"--horizon {plan.horizon} --beam-width {plan.beam_width} --n-expand {plan.n_expand}"
    context = f"--max-context-transitions {plan.max_context_transitions}"
    short = (" --smoke" if smoke else "") + (" --pretrained" if pretrained else "")
    output_dir = quote(str(folder))
    return [
        "# all of it",
        f"tt-fast demo --output-dir {output_dir} --minutes {minutes:g} --seed {seed}{short}",
        "# only the episodes, with the checkpoint of this report",
        f"tt-fast evaluate {quote(str(folder / 'run'))} {settings} {context} "
        f"--episodes {len(result.returns)} --seeds {seed} --max-steps {result.max_steps}",
    ]
