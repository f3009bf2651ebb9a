"""The report: complete, self-contained, escaped, and the same numbers in JSON."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import (
    imagine,
    random_record,
    small_checkpoint,
    small_dataset,
    small_result,
    write_metrics,
)

from tt_fast import markup
from tt_fast.config import PlanConfig
from tt_fast.report import Report, write_report

EVIL = '<script>alert("x")</script>&'


class _Page(HTMLParser):
    """Tags, addresses and text of a page; complains about tags that do not match."""

    _VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_fast.report._FIGURE_DPI", 30)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("inputs")
    write_metrics(folder / "metrics.csv")
    (folder / "episode.mp4").write_bytes(b"not really a video")
    record = imagine(random_record())
    return Report(
        small_dataset(record),
        small_checkpoint(record),
        small_result(record),
        metrics_csv=folder / "metrics.csv",
        video=folder / "episode.mp4",
        video_caption="Left: executed.",
        notes=["A small beam."],
        phases={"training": 12.5},
        commands=["tt-fast demo --seed 0"],
    )


def test_the_page_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    path = write_report(tmp_path / "new", report)
    assert path == tmp_path / "new" / "report.html"
    page = _Page(path.read_text(encoding="utf-8"))
    assert len(page.addresses) == 5  # four figures and the video
    assert all(address.startswith("data:") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text
    names = sorted(p.name for p in (tmp_path / "new" / "figures").iterdir())
    assert names == ["attention.png", "imagined.png", "losses.png", "returns.png"]


def test_the_page_says_what_was_found(report: Report, tmp_path: Path) -> None:
    page = _Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    for text in (
        "Trajectory Transformer in Walk-v0",
        "3.5 ± 1.5",  # mean and standard error of 2 and 5
        "2 episodes, normalised 67.5 ± 7.5",
        "2.00 /s",  # 42 decisions in 21 s
        "decisions, horizon 5, beam 4x2",
        "100,000 /s",  # 6 million tokens in 60 s
        "A small beam.",
        "8",  # seed of the second episode
        "termination",
        "limit of steps",
        "Left: executed.",
        "0.750",  # 2.0 - 1.25 nats gained
        "12.5 s",
        "tt-fast demo --seed 0",
    ):
        assert text in page.texts, text


def test_json_holds_the_same_numbers(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["evaluation"] == json.loads(json.dumps(report.result.to_dict()))
    assert results["dataset"]["num_episodes"] == 5
    assert results["training"]["tokens_per_second"] == 100_000.0
    assert results["training"]["eval_losses"]["action"] == 1.25
    assert results["model"]["embed_dim"] == 8
    assert results["phases_seconds"] == {"training": 12.5}
    assert results["notes"] == ["A small beam."]


def test_strings_cannot_become_markup(report: Report, tmp_path: Path) -> None:
    record = report.result.record
    assert record is not None
    evil = dataclasses.replace(
        report,
        dataset=small_dataset(record, name=EVIL, env_id=EVIL),
        result=small_result(record, dataset=EVIL, env_id=EVIL, backend=EVIL),
        video_caption=EVIL,
        notes=[EVIL],
        phases={EVIL: 1.0},
        commands=[EVIL],
        observation_names=[EVIL, "b", "c", "d"],
    )
    text = write_report(tmp_path, evil).read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.texts.count(EVIL) >= 5


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    record = random_record()
    checkpoint = small_checkpoint(record)
    bare = dataclasses.replace(checkpoint, metadata={})
    result = small_result(None, returns=(3.0,), lengths=(4,), terminated=(True,), ref_scores=None)
    page = _Page(
        write_report(tmp_path, Report(small_dataset(record), bare, result)).read_text("utf-8")
    )
    assert {"Returns", "Settings", "Timing", "Make it again"} <= set(page.texts)
    absent = {"Learning", "Attention", "Read this first", "One episode, executed and imagined"}
    assert not absent & set(page.texts)
    assert "unknown" in page.texts  # speed of training
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["returns.png"]


def test_a_goal_conditioned_model_has_no_attention_map(report: Report, tmp_path: Path) -> None:
    record = report.result.record
    assert record is not None
    goals = dataclasses.replace(report, checkpoint=small_checkpoint(record, goal_conditioned=True))
    write_report(tmp_path, goals)
    assert not (tmp_path / "figures" / "attention.png").exists()
    assert (tmp_path / "figures" / "imagined.png").exists()


def test_a_large_video_is_linked_beside_the_page(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markup, "MAX_INLINE_BYTES", 3)
    page = _Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    assert [a for a in page.addresses if not a.startswith("data:")] == ["episode.mp4"]


def test_an_episode_shorter_than_its_plan_is_drawn(report: Report, tmp_path: Path) -> None:
    record = imagine(random_record(num_steps=2), horizon=5)
    result = small_result(record, plan_config=PlanConfig(horizon=5, beam_width=1, n_expand=1))
    short = dataclasses.replace(report, checkpoint=small_checkpoint(record), result=result)
    assert write_report(tmp_path, short).exists()


def test_a_second_report_replaces_the_first(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    write_report(tmp_path, dataclasses.replace(report, notes=["Another note."]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Another note." in text
    assert "A small beam." not in text
