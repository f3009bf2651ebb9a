"""`tt-fast evaluate`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import BEAM, TOY, collect_toy, ctrl_c, refuse, run, save_model

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import Planner


@pytest.fixture
def toy_data(tmp_path):
    return collect_toy(tmp_path)


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def test_evaluate_pools_checkpoints_and_seeds(capsys, tmp_path, model):
    other = save_model(tmp_path / "other")
    out = tmp_path / "result.json"
    argv = ["evaluate", model, other, "--seeds", 0, 10, "--episodes", 2, "--out", out, *BEAM]
    run(*argv, "--num-envs", 2, "--no-progress")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in shown] == [
        f"{model}, seed 0",
        f"{model}, seed 10",
        f"{other}, seed 0",
        f"{other}, seed 10",
        "all",
    ]
    assert f"{TOY}, dataset toy-data, 8 episodes: return " in shown[-1]
    saved = json.loads(out.read_text())
    assert (saved["num_results"], saved["num_episodes"]) == (4, 8)
    runs = [(result["checkpoint"], result["seed"]) for result in saved["results"]]
    assert runs == [(str(folder), seed) for folder in (model, other) for seed in (0, 10)]
    assert saved["results"][0]["plan_config"]["beam_width"] == 3
    assert saved["results"][0]["num_envs"] == 2


def test_evaluate_in_hopper(capsys, tmp_path):
    config = ModelConfig(11, 3, 10, 4, 1, 2, 8)
    edges = np.linspace(-3.0, 3.0, 11)[:, None] * np.ones(config.transition_dim)
    model = TrajectoryTransformer(config).eval()
    folder = Checkpoint(model, Discretizer(edges), {"dataset": "d"}).save(tmp_path / "model")
    argv = ["evaluate", folder, "--env-id", "Hopper-v4", "--max-steps", 4, "--no-progress", *BEAM]
    run(*argv, "--plan-freq", 2, "--no-prefix-context", "--out", tmp_path / "result.json")
    assert "Hopper-v4, dataset d, 1 episode: return" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "result.json").read_text())["results"]
    assert result["lengths"] == [4]
    assert result["plan_freq"] == 2
    assert result["normalized_mean"] == pytest.approx(
        100.0 * (result["mean_return"] + 20.272305) / (3234.3 + 20.272305)
    )


def test_evaluate_interrupted(capsys, tmp_path, model, monkeypatch):
    out = tmp_path / "result.json"
    act, calls = Planner.act, []

    def interrupted_act(self, *args):
        calls.append(self)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return act(self, *args)

    monkeypatch.setattr(Planner, "act", interrupted_act)
    argv = ["evaluate", model, "--episodes", 9, "--out", out, "--no-progress", *BEAM]
    run(*argv, status=130)
    shown = capsys.readouterr()
    assert "(interrupted)" in shown.out
    assert shown.err == f"tt-fast: interrupted: finished episodes are in {out}\n"
    [result] = json.loads(out.read_text())["results"]
    assert result["interrupted"] is True
    assert 1 < len(result["returns"]) < 9


def test_evaluate_interrupted_with_nothing_to_keep(capsys, tmp_path, model, monkeypatch):
    monkeypatch.setattr(Planner, "act", ctrl_c)
    out = tmp_path / "result.json"
    out.write_text("of an earlier run")
    run("evaluate", model, "--out", out, "--no-progress", status=130)
    assert capsys.readouterr().err == "tt-fast: interrupted: no result was written\n"
    assert out.read_text() == "of an earlier run"


def test_evaluate_writes_a_histogram(capsys, tmp_path, model, toy_data):
    argv = ["evaluate", model, "--no-progress", *BEAM, "--histogram", tmp_path / "returns.png"]
    message = "dataset: expected a dataset for the histogram, got None"
    assert refuse(capsys, *argv) == message
    run(*argv, "--dataset", toy_data)
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_films_the_first_episode_only(tmp_path, model, monkeypatch):
    filmed = []
    monkeypatch.setattr(
        "tt_fast.video.render_episode", lambda record, env_id, path, seed: filmed.append(path)
    )
    path = tmp_path / "episode.mp4"
    run("evaluate", model, "--seeds", 0, 5, "--video", path, "--no-progress", *BEAM)
    assert filmed.count(path) == 1


def test_evaluate_refuses_what_would_count_twice(capsys, model):
    shown = refuse(capsys, "evaluate", model, "--seeds", 0, 3, "--episodes", 4)
    expected = "seeds: expected numbers at least episodes=4 apart, as episode j has seed + j, got"
    assert shown.startswith(expected)
    shown = refuse(capsys, "evaluate", model, model / ".." / model.name)
    assert shown.startswith("checkpoints: expected different models, got")
    assert refuse(capsys, "evaluate").startswith("checkpoints: expected at least one folder")


def test_evaluate_refuses_bad_outputs_before_it_plays(capsys, model, tmp_path):
    for option in ("--out", "--video", "--histogram"):
        shown = refuse(capsys, "evaluate", model, option, tmp_path)
        assert shown.startswith(f"{option[2:]}: expected the name of a file, got 'the folder")
    shown = refuse(capsys, "evaluate", model, "--histogram", tmp_path / "h.foo")
    assert shown == "histogram: expected .png, .pdf or .svg, got '.foo'"


def test_evaluate_names_a_missing_environment(capsys, tmp_path):
    folder = save_model(tmp_path / "nowhere", env_id=None)
    shown = refuse(capsys, "evaluate", folder)
    assert shown.startswith("env_id: expected a Gymnasium id, as the checkpoint names none")
    shown = refuse(capsys, "evaluate", folder, "--env-id", "CartPole-v1", "--no-progress")
    assert shown == "action_space of CartPole-v1: expected a 1-D Box, got Discrete(2)"
