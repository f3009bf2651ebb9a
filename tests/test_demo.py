"""The demo from end to end, once, with a tiny model; and what it does where things are missing."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from synthetic import random_record, small_result
from tiny import weights_equal

from tt_fast import Checkpoint, demo
from tt_fast.config import TOKEN_KINDS, ModelConfig, PlanConfig
from tt_fast.data.windows import TokenWindows, build_transitions
from tt_fast.demo import load_demo_dataset, load_pretrained, run_demo
from tt_fast.encoding import encode_transitions
from tt_fast.training.losses import evaluate_losses, marginal_losses
from tt_fast.video import RenderError

pytest.importorskip("mujoco")


class Run(NamedTuple):
    folder: Path
    report: Path
    said: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole demo, made once for all tests here."""
    folder = tmp_path_factory.mktemp("demo")
    said: list[str] = []
    report = run_demo(folder, smoke=True, seed=3, progress=False, say=said.append)
    return Run(folder, report, said)


def test_it_writes_a_report_folder(run: Run) -> None:
    assert run.report == run.folder / "report.html"
    names = {path.name for path in run.folder.iterdir()} - {"episode.mp4"}
    assert names == {"report.html", "results.json", "figures", "run"}
    figures = {path.stem for path in (run.folder / "figures").iterdir()}
    assert figures == {"attention", "imagined", "losses", "returns"}
    video = run.folder / "episode.mp4"
    assert video.exists() != any(text.startswith("There is no video") for text in run.said)


def test_its_numbers_are_real(run: Run) -> None:
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    evaluation = results["evaluation"]
    assert evaluation["env_id"] == "Hopper-v4"
    assert evaluation["seed"] == 3
    assert evaluation["lengths"] == [12, 12]  # no hopper falls within 12 steps of 8 ms
    assert all(5.0 < value < 25.0 for value in evaluation["returns"])  # about 1 a step
    assert results["dataset"]["num_transitions"] == load_demo_dataset().num_steps
    assert set(results["phases_seconds"]) == {
        "loading", "training", "playing", "drawing the video",
    }  # fmt: skip
    assert set(results["training"]["eval_losses"]) == set(TOKEN_KINDS)
    assert results["training"]["train_config"]["seed"] == 3


def test_it_says_what_it_used(run: Run) -> None:
    said = "\n".join(run.said)
    assert "on hopper-demo: 57,615 transitions of Hopper-v4" in said
    assert "horizon 3, beam 2x2, made by the cpu backend" in said
    assert "the original's setting is horizon 15, beam 128x2" in said
    assert "2 of 2 episodes were stopped at 12 steps" in said
    assert "They are what this training earns." in said
    page = run.report.read_text(encoding="utf-8")
    assert f"tt-fast demo --output-dir {run.folder} --minutes 6 --seed 3 --smoke" in page
    assert f"tt-fast evaluate {run.folder / 'run'} --horizon 3 --beam-width 2" in page


def test_its_checkpoint_can_be_used_again(run: Run) -> None:
    checkpoint = Checkpoint.load(run.folder / "run")
    assert checkpoint.metadata["env_id"] == "Hopper-v4"
    assert checkpoint.discretizer is not None


def test_the_model_that_comes_along_plans_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    report = run_demo(tmp_path, pretrained=True, smoke=True, progress=False, say=said.append)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["evaluation"]["lengths"] == [12, 12]
    assert set(results["phases_seconds"]) == {
        "loading", "first plan", "playing", "drawing the video",
    }  # fmt: skip
    assert any(text.startswith("The first plan was there after") for text in said)
    assert "60 minutes of training on hopper_medium_replay, 129 million tokens" in said[0]
    assert f"tt-fast demo --output-dir {tmp_path} --minutes 1 --seed 0 --smoke --pretrained" in (
        report.read_text(encoding="utf-8")
    )
    kept = Checkpoint.load(tmp_path / "run")
    assert weights_equal(kept.model, load_pretrained().model)


def test_the_model_that_comes_along_has_learnt() -> None:
    checkpoint, dataset = load_pretrained(), load_demo_dataset()
    config = checkpoint.model.config
    assert config == ModelConfig(11, 3)  # the original's sizes
    assert checkpoint.discretizer is not None
    transitions = build_transitions(dataset, discount=0.99, termination_penalty=-100.0)
    tokens = encode_transitions(transitions, checkpoint.discretizer, config.vocab_size)
    windows = TokenWindows(tokens, transitions.path_lengths, 10, 100, has_stop_row=True)
    # episodes that it never saw
    losses = evaluate_losses(checkpoint.model, windows, max_windows=64)
    marginals = marginal_losses(windows, config)
    assert all(losses[kind] < 0.95 * marginals[kind] for kind in TOKEN_KINDS), losses
    folder = Path(str(files("tt_fast"))) / "assets" / "hopper-pretrained"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="output_dir: expected a new or empty folder"):
        run_demo(tmp_path, smoke=True)
    with pytest.raises(FileExistsError, match="output_dir: expected a new or empty folder"):
        run_demo(tmp_path / "thesis.txt", smoke=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_bad_numbers_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes: expected a number"):
        run_demo(tmp_path / "new", minutes=0.5)
    with pytest.raises(ValueError, match="seed: expected an integer"):
        run_demo(tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [RenderError("no OpenGL here"), ImportError("no imageio")])
def test_without_opengl_it_goes_on_and_says_so(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(demo, "render_episode", fail)
    said: list[str] = []
    log = demo._Log(said.append)
    result = small_result(random_record())
    assert demo._film(result, tmp_path / "episode.mp4", log) == (None, "")
    assert said == log.notes == [f"There is no video: {error}."]


def test_ctrl_c_while_playing_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: small_result(None, interrupted=True))
    settings = demo._smoke_settings(load_demo_dataset(), 6.0, 0)
    with pytest.raises(KeyboardInterrupt):
        demo._play(Checkpoint.load(run.folder / "run"), settings, 0, False, demo._Log(print))


def test_the_full_settings_fit_the_minutes() -> None:
    dataset = load_demo_dataset()
    settings = demo._settings(dataset, minutes=6.0, seed=5)
    assert settings.train.max_minutes is not None
    assert settings.train.max_minutes * 60 + settings.playing_seconds < 0.85 * 360
    assert settings.train.seed == 5
    # windows hold exactly the context that plans look at
    assert settings.model.num_transitions == settings.plan.max_context_transitions
    assert settings.plan == PlanConfig()  # the original's setting


def test_the_dataset_that_is_shipped_has_whole_episodes() -> None:
    dataset = load_demo_dataset()
    assert (dataset.name, dataset.env_id) == ("hopper-demo", "Hopper-v4")
    assert dataset.ref_scores is not None
    assert np.isfinite(dataset.observations).all()
    ends = dataset.terminations | dataset.truncations
    whole = [
        rows.stop - rows.start
        for rows in dataset.episodes
        if not dataset.terminations[rows.stop - 1]
    ]
    assert set(whole) == {1000}  # an episode that did not end by itself ran to the limit
    assert ends[-1]
