"""A run as one HTML page that needs nothing else, and the same numbers as JSON.

report.html      figures and video inside it; no network, light and dark
results.json     what the page says, for programs
figures/*.png    the figures alone
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tt_fast import markup
from tt_fast.checkpoint import Checkpoint
from tt_fast.config import TOKEN_KINDS, config_to_dict
from tt_fast.data.episodes import OfflineDataset
from tt_fast.files import atomic_write, to_json, write_text
from tt_fast.planning.planner import VALUE_PLACEHOLDER
from tt_fast.plots import plot_attention, plot_imagined, plot_losses, plot_returns
from tt_fast.results import EpisodeRecord, EvalResult, mean_text, plan_text

_FIGURE_DPI = 160
#: Transitions of the context whose attention is drawn.
_ATTENTION_TRANSITIONS = 4


@dataclass(frozen=True)
class Report:
    """What a report is about. Everything but the first three may be left out."""

    dataset: OfflineDataset
    checkpoint: Checkpoint
    result: EvalResult
    """With a record, the page shows that episode"""
    metrics_csv: Path | None = None
    """Of the training run"""
    video: Path | None = None
    """MP4 of the recorded episode"""
    video_caption: str = ""
    observation_names: Sequence[str] | None = None
    """One a dimension, with units"""
    notes: Sequence[str] = ()
    """What a reader must know first, a sentence each"""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Name -> seconds"""
    commands: Sequence[str] = ()
    """Shell lines that make all this again"""


def write_report(folder: str | Path, report: Report) -> Path:
    """Write report.html, results.json and figures/ into a folder, made if absent.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, figure in _draw_figures(report).items():
        figures[name] = folder / "figures" / f"{name}.png"
        with atomic_write(figures[name]) as temporary:
            figure.savefig(temporary, dpi=_FIGURE_DPI)
    write_text(folder / "results.json", to_json(_results(report)))
    page = folder / "report.html"
    write_text(page, _page(report, figures))
    return page


# ---- figures ----


def _draw_figures(report: Report) -> dict[str, Figure]:
    """Name -> figure, for all that there are data for."""
    result, record = report.result, report.result.record
    figures = {
        "returns": plot_returns(
            report.dataset.episode_returns,
            np.array(result.returns),
            ref_scores=result.ref_scores,
            dataset_name=report.dataset.name,
        )
    }
    if report.metrics_csv is not None:
        marginal = report.checkpoint.metadata.get("marginal_losses")
        figures["losses"] = plot_losses(report.metrics_csv, marginal)
    if record is not None:
        figures["imagined"] = plot_imagined(
            record,
            _middle_step(record),
            discretizer=report.checkpoint.discretizer,
            observation_names=report.observation_names,
        )
        if not report.checkpoint.model.config.goal_conditioned:
            tokens = _context_tokens(record, report.checkpoint)
            figures["attention"] = plot_attention(report.checkpoint, tokens)
    return figures


def _middle_step(record: EpisodeRecord) -> int:
    """A step in the middle, early enough for its whole plan to have been executed."""
    num_steps, horizon = len(record.actions), len(record.plans[0].rewards)
    return max(0, min(num_steps // 2, num_steps - horizon))


def _context_tokens(record: EpisodeRecord, checkpoint: Checkpoint) -> NDArray[np.int64]:
    """(context_len,) tokens of transitions in the episode's middle, as a planner holds them."""
    assert checkpoint.discretizer is not None
    count = min(_ATTENTION_TRANSITIONS, checkpoint.model.config.num_transitions)
    first = max(0, len(record.actions) // 2 - count)
    steps = slice(first, min(first + count, len(record.actions)))
    values = np.full(len(record.rewards[steps]), VALUE_PLACEHOLDER)
    done = np.column_stack([record.actions[steps], record.rewards[steps], values])
    tokens = checkpoint.discretizer.encode(np.column_stack([record.observations[steps], done]))
    return tokens.ravel()[:-1]


# ---- numbers ----


def _results(report: Report) -> dict[str, Any]:
    """results.json."""
    metadata = report.checkpoint.metadata
    return {
        "evaluation": report.result.to_dict(),
        "dataset": report.dataset.summary().to_dict(),
        "model": config_to_dict(report.checkpoint.model.config),
        "training": {**metadata, "tokens_per_second": _training_speed(metadata)},
        "phases_seconds": dict(report.phases),
        "notes": list(report.notes),
        "commands": list(report.commands),
        "machine": _machine(),
    }


def _training_speed(metadata: Mapping[str, Any]) -> float | None:
    """Tokens per second of the whole training, None where it is not known."""
    seconds, tokens = metadata.get("seconds"), metadata.get("tokens")
    return tokens / seconds if seconds and tokens else None


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


# ---- the page ----


def _page(report: Report, figures: Mapping[str, Path]) -> str:
    result = report.result
    dataset = result.dataset or "an unnamed dataset"
    subtitle = f"trained on {dataset}, planned by the {result.backend} backend"
    sections = [
        markup.tiles(_key_figures(report)),
        markup.section("Read this first", markup.bullets(report.notes)),
        _returns_section(report, figures),
        _episode_section(report, figures),
        _losses_section(report, figures),
        _attention_section(figures),
        _settings_section(report),
        markup.section("Timing", markup.table(_timing(report))),
        _origin_section(report),
    ]
    return markup.page(f"Trajectory Transformer in {result.env_id}", subtitle, sections)


def _key_figures(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, what it is) of what a reader looks for first."""
    result, metadata = report.result, report.checkpoint.metadata
    summary, speed = report.dataset.summary(), _training_speed(metadata)
    stored = f"mean of {summary.num_episodes:,} episodes, best {summary.returns.max:,.0f}"
    trained = f"tokens, {metadata.get('tokens', 0) / 1e6:,.2f} million in all"
    return [
        ("policy's return", mean_text(result.mean_return, result.std_error), _scored(result)),
        ("dataset's return", f"{summary.returns.mean:,.1f}", stored),
        (
            "planning",
            f"{result.decisions_per_second:,.2f} /s",
            f"decisions, {plan_text(result.plan_config)}",
        ),
        ("training", "unknown" if speed is None else f"{speed:,.0f} /s", trained),
    ]


def _scored(result: EvalResult) -> str:
    count = len(result.returns)
    text = f"{count} episode{'s' if count > 1 else ''}"
    if result.normalized_mean is not None:
        score = mean_text(result.normalized_mean, result.normalized_std_error)
        text += f", normalised {score}"
    return text


def _returns_section(report: Report, figures: Mapping[str, Path]) -> str:
    result = report.result
    scores = result.normalized_scores or (math.nan,) * len(result.returns)
    columns = (result.returns, scores, result.lengths, result.terminated)
    rows = [
        (
            result.seed + index,
            f"{value:,.1f}",
            f"{score:.1f}" if math.isfinite(score) else "-",
            length,
            "termination" if terminated else "limit of steps",
        )
        for index, (value, score, length, terminated) in enumerate(zip(*columns, strict=True))
    ]
    caption = "Grey: the dataset's episodes. Orange: the policy's, one line an episode."
    chart = markup.image(figures["returns"], "Histogram of returns", caption)
    heads = ("seed", "return", "normalised", "steps", "ended by")
    return markup.section("Returns", chart, markup.table(rows, heads))


def _episode_section(report: Report, figures: Mapping[str, Path]) -> str:
    video = plan = ""
    if report.video is not None:
        video = markup.video(report.video, report.video_caption)
    if "imagined" in figures:
        caption = (
            "A plan from the middle of the first episode against what was then executed. Shaded: "
            "the bins of the imagined tokens, the finest that the model can say. Later steps have "
            "plans of their own, so what was executed need not follow this one."
        )
        plan = markup.image(figures["imagined"], "Imagined and executed trajectory", caption)
    return markup.section("One episode, executed and imagined", video, plan)


def _losses_section(report: Report, figures: Mapping[str, Path]) -> str:
    metadata = report.checkpoint.metadata
    marginal = metadata.get("marginal_losses") or {}
    losses = metadata.get("eval_losses") or metadata.get("losses") or {}
    kinds = [kind for kind in TOKEN_KINDS if kind in losses and kind in marginal]
    numbers = [(losses[kind], marginal[kind], marginal[kind] - losses[kind]) for kind in kinds]
    rows = [(kind, *(f"{n:.3f}" for n in row)) for kind, row in zip(kinds, numbers, strict=True)]
    chart = ""
    if "losses" in figures:
        caption = (
            "Cross-entropy of each kind of token while training. Dashed: predicting every "
            "dimension's marginal distribution, which needs no model."
        )
        chart = markup.image(figures["losses"], "Losses by kind of token", caption)
    heads = ("kind of token", "loss at the end", "marginal", "gained (nats per token)")
    return markup.section("Learning", chart, markup.table(rows, heads))


def _attention_section(figures: Mapping[str, Path]) -> str:
    if "attention" not in figures:
        return ""
    caption = (
        "What each token of a context (row) looks at (column); t is the newest transition. Value "
        "tokens are hidden from attention: their columns are black."
    )
    maps = markup.image(figures["attention"], "Attention maps", caption, css_class="map")
    return markup.section("Attention", maps)


def _settings_section(report: Report) -> str:
    result, checkpoint = report.result, report.checkpoint
    acting = {"plan_freq": result.plan_freq, "prefix_context": result.prefix_context}
    plan = {**config_to_dict(result.plan_config), **acting}
    training = checkpoint.metadata.get("train_config") or {}
    tables = [
        ("Dataset", report.dataset.summary().rows()),
        ("Plan", _fields(plan)),
        ("Model", _fields(config_to_dict(checkpoint.model.config))),
        ("Training", _fields(training)),
    ]
    return markup.section("Settings", markup.columns((t, markup.table(rows)) for t, rows in tables))


def _timing(report: Report) -> list[tuple[str, str]]:
    result, speed = report.result, _training_speed(report.checkpoint.metadata)
    rows = [(name, f"{seconds:,.1f} s") for name, seconds in report.phases.items()]
    if speed is not None:
        rows.append(("training speed", f"{speed:,.0f} tokens/s"))
    each = 1000.0 / result.decisions_per_second
    machine = _machine()
    return [
        *rows,
        ("planning speed", f"{result.decisions_per_second:,.2f} decisions/s, {each:,.0f} ms each"),
        ("decisions", f"{result.num_decisions:,}, {result.num_envs} environments side by side"),
        ("planner", f"{result.backend} backend, {plan_text(result.plan_config)}"),
        ("machine", f"{machine['system']}, {machine['cores']} cores"),
    ]


def _origin_section(report: Report) -> str:
    metadata = report.checkpoint.metadata
    versions = {**(metadata.get("versions") or {}), **report.result.versions}
    rows = _fields({**versions, "git commit": metadata.get("git_commit")})
    return markup.section("Make it again", markup.code(report.commands), markup.table(rows))


def _fields(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in values.items()]


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
