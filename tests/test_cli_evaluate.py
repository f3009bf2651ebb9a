"""`tt-fast evaluate`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import BEAM, TOY, collect_toy, ctrl_c, refuse, run, save_model
from toy_env import ToyEnv

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig
from tt_fast.discretizer import Discretizer
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import Planner
from tt_fast.results import EvalResult


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


def test_finished_episodes_outlive_an_error(capsys, tmp_path, model, monkeypatch):
    out = tmp_path / "result.json"
    argv = ["evaluate", model, "--seeds", 0, 9, "--episodes", 9, "--no-progress", *BEAM]
    run(*argv, "--out", tmp_path / "whole.json")
    first, second = json.loads((tmp_path / "whole.json").read_text())["results"]
    step, num_steps = ToyEnv.step, []

    def step_without_end(self, action):
        num_steps.append(1)
        observation, reward, *rest = step(self, action)
        broken = len(num_steps) == sum(first["lengths"]) + sum(second["lengths"][:5]) + 1
        return observation, float("nan") if broken else reward, *rest

    monkeypatch.setattr(ToyEnv, "step", step_without_end)
    capsys.readouterr()
    run(*argv, "--out", out, status=2)
    assert "reward: expected" in capsys.readouterr().err
    kept, part = json.loads(out.read_text())["results"]
    assert (kept["returns"], kept["interrupted"]) == (first["returns"], False)
    assert (part["returns"], part["interrupted"]) == (second["returns"][:5], True)
    assert part["checkpoint"] == str(model)
    num_steps[:] = [0] * (sum(first["lengths"]) + sum(second["lengths"][3:5]))
    run(*argv, "--out", out, "--resume", status=2)  # after the third episode
    capsys.readouterr()
    kept, part = json.loads(out.read_text())["results"]
    assert part["returns"] == second["returns"][:5]
    monkeypatch.undo()
    run(*argv, "--out", out, "--resume")
    results = json.loads(out.read_text())["results"]
    assert [result["returns"] for result in results] == [first["returns"], second["returns"]]


def test_evaluate_interrupted_with_nothing_to_keep(capsys, tmp_path, model, monkeypatch):
    monkeypatch.setattr(Planner, "act", ctrl_c)
    out = tmp_path / "result.json"
    run("evaluate", model, "--out", out, "--no-progress", status=130)
    assert capsys.readouterr().err == "tt-fast: interrupted: no result was written\n"
    assert not out.exists()


def test_evaluate_writes_a_histogram(capsys, tmp_path, model, toy_data):
    argv = ["evaluate", model, "--no-progress", *BEAM, "--histogram", tmp_path / "returns.png"]
    message = "dataset: expected a dataset for the histogram, got None"
    assert refuse(capsys, *argv) == message
    run(*argv, "--dataset", toy_data)
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")
    shown = refuse(capsys, "evaluate", model, "--dataset", toy_data)
    assert shown.startswith("dataset: expected None without --histogram, got ")


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
        shown = refuse(capsys, "evaluate", model, option, "/proc/x.mp4")
        assert shown.startswith(f"{option[2:]}: expected a file that can be written, got '/proc/x")
    shown = refuse(capsys, "evaluate", model, "--histogram", tmp_path / "h.foo")
    assert shown == "histogram: expected .png, .pdf or .svg, got '.foo'"
    shown = refuse(capsys, "evaluate", model, "--video", tmp_path / "h.avi")
    assert shown.startswith("video: expected a name that ends in .mp4, got ")
    out = tmp_path / "result.json"
    out.write_text("of an earlier run")
    shown = refuse(capsys, "evaluate", model, "--out", out)
    assert shown == f"out: expected a new file, or --resume to go on with it, got '{out}'"
    assert out.read_text() == "of an earlier run"


def test_evaluate_refuses_models_that_cannot_be_pooled_before_it_plays(
    capsys, tmp_path, model, monkeypatch
):
    monkeypatch.setattr(Planner, "act", ctrl_c)  # not reached
    others = {"dataset": "more-data", "discount": 0.5, "ref_scores": [1.0, 2.0]}
    for idx, (name, value) in enumerate(others.items()):
        other = save_model(tmp_path / str(idx), **{name: value})
        shown = refuse(capsys, "evaluate", model, other)
        assert shown.startswith("checkpoints: expected one "), name


def test_a_result_is_saved_before_it_is_said(capsys, tmp_path, model, monkeypatch):
    def broken(result):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(EvalResult, "__str__", broken)
    run("evaluate", model, "--out", tmp_path / "r.json", "--no-progress", *BEAM, status=2)
    assert len(played(tmp_path / "r.json")) == 1


def test_evaluate_names_a_missing_environment(capsys, tmp_path):
    folder = save_model(tmp_path / "nowhere", env_id=None)
    shown = refuse(capsys, "evaluate", folder)
    assert shown.startswith("env_id: expected a Gymnasium id, as the checkpoint names none")
    shown = refuse(capsys, "evaluate", folder, "--env-id", "CartPole-v1", "--no-progress")
    assert shown == "action_space of CartPole-v1: expected a 1-D Box, got Discrete(2)"


# ---- going on with a file ----


def played(path):
    """Of every result in a file: checkpoint, seed, returns."""
    results = json.loads(path.read_text())["results"]
    return [(result["checkpoint"], result["seed"], result["returns"]) for result in results]


def test_resume_plays_what_is_missing(capsys, tmp_path, model, monkeypatch):
    other = save_model(tmp_path / "other")
    argv = ["evaluate", model, other, "--episodes", 2, "--no-progress", *BEAM]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    run(*argv, "--seeds", 0, 10, "--out", whole)
    # nothing to go on with; then one of two seeds, by another path of the same model
    first = ["evaluate", model / ".." / model.name, *argv[3:], "--out", parts, "--resume"]
    run(*first, "--seeds", 10)
    capsys.readouterr()
    run(*argv, "--seeds", 0, 10, "--out", parts, "--resume")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(
        f"{model}, seed 10, from {parts}: {TOY}, dataset toy-data, 2 episodes"
    )
    assert [line.split(": ")[0] for line in shown[1:]] == [
        f"{model}, seed 0",
        f"{other}, seed 0",
        f"{other}, seed 10",
        "all",
    ]
    assert sorted(row[1:] for row in played(parts)) == sorted(row[1:] for row in played(whole))
    mean = json.loads(whole.read_text())["mean_return"]
    assert json.loads(parts.read_text())["mean_return"] == pytest.approx(mean)
    # all is there: nothing is played, the file stays as it is
    monkeypatch.setattr(Planner, "act", ctrl_c)
    before = parts.read_bytes()
    run(*argv, "--seeds", 0, 10, "--out", parts, "--resume")
    assert parts.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == shown[-1]


def test_resume_plays_again_what_was_interrupted(tmp_path, model, monkeypatch):
    argv = ["evaluate", model, "--seeds", 0, 5, "--episodes", 3, "--no-progress", *BEAM]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    run(*argv, "--out", whole)
    first, second = json.loads(whole.read_text())["results"]
    in_an_episode = sum(first["lengths"]) + second["lengths"][0] + 1
    with monkeypatch.context() as patch:
        act, calls = Planner.act, []

        def interrupted_act(self, *args):
            calls.append(self)
            if len(calls) == in_an_episode:
                raise KeyboardInterrupt
            return act(self, *args)

        patch.setattr(Planner, "act", interrupted_act)
        run(*argv, "--out", parts, status=130)
    assert json.loads(parts.read_text())["results"][-1]["interrupted"]
    run(*argv, "--out", parts, "--resume")
    assert played(parts) == played(whole)


def test_resume_refuses_what_cannot_be_pooled(capsys, tmp_path, model):
    out, other = tmp_path / "result.json", save_model(tmp_path / "other", step=9)
    argv = ["evaluate", model, "--episodes", 2, "--no-progress", "--out", out, "--resume", *BEAM]
    run(*argv, "--seeds", 4)
    before = out.read_bytes()
    capsys.readouterr()

    def refused(*more):
        return refuse(capsys, *argv, *more).replace(str(out), "OUT")

    assert (
        refused("--seeds", 3) == "seeds: expected one whose episodes are all or none in OUT, got 3"
    )
    assert refused("--plan-freq", 2) == "plan_freq: expected 1, as in OUT, got 2"
    assert refused("--max-steps", 7) == "max_steps: expected None, as in OUT, got 7"
    assert refused("--no-prefix-context") == "prefix_context: expected True, as in OUT, got False"
    shown = refused("--horizon", 1)
    assert shown.startswith("plan_config: expected PlanConfig(horizon=2, ")
    elsewhere = ["evaluate", other, *argv[2:]]
    shown = refuse(capsys, *elsewhere)
    assert shown == f"resume: expected results of {other} in {out}, got 'one of {model}'"
    save_model(tmp_path / "newer", step=9)
    model.rename(tmp_path / "older")
    (tmp_path / "newer").rename(model)  # the run went on
    assert refused("--seeds", 4) == "checkpoint_step: expected 5, as in OUT, got 9"
    assert out.read_bytes() == before


def test_resume_says_that_no_episode_is_left_to_film(capsys, tmp_path, model):
    argv = ["evaluate", model, "--no-progress", "--out", tmp_path / "result.json", "--resume"]
    run(*argv, *BEAM)
    shown = refuse(capsys, *argv, *BEAM, "--video", tmp_path / "a.mp4")
    assert shown.startswith("video: expected None, as no episode is left to play, got ")


def test_resume_needs_a_file_of_results(capsys, tmp_path, model):
    argv = ["evaluate", model, "--no-progress", "--resume", *BEAM]
    message = "out: expected the file to go on with, as --resume is given, got None"
    assert refuse(capsys, *argv) == message
    out = tmp_path / "result.json"
    for text, message in [
        ("{", f"{out}: expected JSON: "),
        ("[]", f"{out}: expected a JSON object, got list"),
        ("{}", f"{out}: expected a list of results, got None"),
        ('{"results": []}', f"{out}: expected results of evaluations: results: expected at least"),
        ('{"results": [3]}', f"{out}: expected results of evaluations: "),
        ('{"results": [{"env_id": "e"}]}', f"{out}: expected results of evaluations: "),
    ]:
        out.write_text(text)
        assert refuse(capsys, *argv, "--out", out).startswith(message)
        assert out.read_text() == text
