"""Evaluation: seeds, staggered environments, statistics, records, JSON, interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from toy_env import (
    ACTION_DIM,
    OBSERVATION_DIM,
    InPlaceEnv,
    ScriptedPlanner,
    ToyEnv,
    register,
    register_toy,
)

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.evaluate import EvalResult, aggregate, evaluate
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import Planner
from tt_fast.results import EvalSummary
from tt_fast.video import RenderError

TOY = register_toy()


def result_of(returns, **changes):
    count = len(returns)
    fields = {"env_id": "Hopper-v4", "dataset": "d", "ref_scores": (0.0, 200.0), "seed": 0}
    fields |= {"returns": tuple(returns), "lengths": (3,) * count, "terminated": (True,) * count}
    fields |= {
        "plan_config": PlanConfig(),
        "plan_freq": 1,
        "prefix_context": True,
        "backend": "reference",
        "num_envs": 1,
    }
    fields |= {"num_decisions": 10, "seconds": 4.0, "wall_seconds": 5.0}
    return EvalResult(**fields | changes)


def play(planner=None, **kwargs):
    kwargs = {"env_id": TOY, "progress": False, **kwargs}
    return evaluate(planner or ScriptedPlanner(), **kwargs)


def expected_episode(seed):
    """Return and length of one episode, played by hand."""
    env, planner = ToyEnv(), ScriptedPlanner(num_envs=1)
    observation, _ = env.reset(seed=seed)
    planner.reset(0, seed=seed)
    rewards, terminated = [], False
    while not terminated and len(rewards) < 8:
        action = planner.act(observation[None], np.array([True]))[0]
        observation, reward, terminated, _, _ = env.step(action)
        planner.observe(np.array([reward]), np.array([terminated]))
        rewards.append(reward)
    return math.fsum(rewards), len(rewards)


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 20])
def test_episodes_do_not_depend_on_the_number_of_environments(num_envs):
    result = play(episodes=7, num_envs=num_envs, seed=30)
    expected = [expected_episode(30 + j) for j in range(7)]
    assert result.returns == tuple(episode_return for episode_return, _ in expected)
    assert result.lengths == tuple(length for _, length in expected)
    assert len(set(result.lengths)) > 1
    assert result.num_decisions == sum(result.lengths)
    assert result.num_envs == min(num_envs, 7)


def test_environments_are_at_different_steps():
    planner = ScriptedPlanner()
    play(planner, episodes=12, num_envs=3)
    clocks = planner.replicas[0].clocks_seen
    assert any(len(set(row)) == 3 for row in clocks)
    # at the end, fewer environments than slots have an episode
    assert {len(row) for row in clocks} == {1, 2, 3}


def test_next_episode_starts_when_an_environment_is_free():
    lengths = play(episodes=4, num_envs=1, seed=5).lengths
    planner = ScriptedPlanner()
    play(planner, episodes=4, num_envs=2, seed=5)
    free = min(lengths[:2])
    expected = tuple(0 if length == free else free for length in lengths[:2])
    assert planner.replicas[0].clocks_seen[free] == expected


def test_planner_given_is_untouched_and_its_replica_knows_the_bounds():
    planner = ScriptedPlanner()
    play(planner)
    assert (planner.clocks, planner.seeds) == ([0], [0])
    low, high = planner.replicas[0].action_bounds
    np.testing.assert_array_equal((low, high), [[-1.0, -1.0], [1.0, 1.0]])


def test_time_limit_is_not_a_termination():
    result = play(episodes=20, num_envs=4)
    env = ToyEnv()
    own_lengths = [env.reset(seed=seed) and env._length for seed in range(20)]
    # the limit is 8 steps; an episode of exactly 8 terminates and is truncated at once
    assert {8, 9} < set(own_lengths)
    assert result.terminated == tuple(length <= 8 for length in own_lengths)
    capped = play(episodes=20, num_envs=4, max_steps=2)
    assert set(capped.lengths) == {2}
    assert not any(capped.terminated)
    assert capped.max_steps == 2


def test_record_of_the_first_episode():
    result = play(episodes=3, num_envs=2, seed=9, record=True)
    record, length = result.record, result.lengths[0]
    assert record.observations.shape == (length + 1, OBSERVATION_DIM)
    assert record.actions.shape == (length, ACTION_DIM)
    assert record.actions.dtype == np.float32
    assert math.fsum(record.rewards) == result.returns[0]
    assert record.plans == tuple(("plan", 9, t) for t in range(length))
    assert record.qpos is None
    assert record.qvel is None
    assert play().record is None


def test_record_replays_in_the_environment():
    record = play(seed=9, record=True).record
    env = ToyEnv()
    observations = [env.reset(seed=9)[0]] + [env.step(action)[0] for action in record.actions]
    np.testing.assert_array_equal(record.observations, observations)


def test_record_of_an_environment_that_reuses_its_arrays():
    record = play(env_id=None, env=InPlaceEnv(), max_steps=9, record=True).record
    np.testing.assert_array_equal(record.observations[:, 0], np.arange(6))
    assert (record.actions <= 1).all()


def test_mujoco_states_are_recorded():
    class HopperPlanner(ScriptedPlanner):
        def act(self, observation, active):
            assert observation.shape == (1, 11)
            self._acting = np.flatnonzero(active)
            return np.full((1, 3), 0.5, np.float32)

    planner = HopperPlanner()
    config = planner.checkpoint.model.config
    planner.checkpoint.model.config = dataclasses.replace(config, observation_dim=11, action_dim=3)
    result = evaluate(planner, "Hopper-v4", max_steps=5, record=True, progress=False)
    record = result.record
    assert (record.qpos.shape, record.qvel.shape) == ((6, 6), (6, 6))
    # hopper's observation is qpos without x, then qvel clipped to 10
    np.testing.assert_array_equal(record.observations[:, :5], record.qpos[:, 1:])
    np.testing.assert_array_equal(record.observations[:, 5:], np.clip(record.qvel, -10, 10))
    assert result.versions["mujoco"] is not None


def test_environment_of_the_checkpoint_is_the_default():
    assert play(ScriptedPlanner(env_id=TOY), env_id=None).env_id == TOY
    with pytest.raises(ValueError, match="env_id: expected a Gymnasium id, as the"):
        play(env_id=None)


def test_reference_scores():
    own = {"ref_scores": [1.0, 5.0]}
    assert play(ScriptedPlanner(env_id=TOY, **own)).ref_scores == (1.0, 5.0)
    assert play(ScriptedPlanner(**own)).ref_scores == (1.0, 5.0)
    # of another environment, and this one has none
    assert play(ScriptedPlanner(env_id="Other-v0", **own)).ref_scores is None
    assert play().normalized_mean is None


def test_dataset_and_step_come_from_the_checkpoint():
    result = play(ScriptedPlanner(dataset="toy-data", step=12))
    assert (result.dataset, result.checkpoint_step) == ("toy-data", 12)
    assert result.backend == "scripted"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"episodes": 0}, "episodes: expected an integer >= 1, got 0"),
        ({"num_envs": 0}, "num_envs: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1, got 0"),
    ],
)
def test_numbers_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        play(**kwargs)


def test_endless_environment_needs_a_cap():
    env_id = register("ToyEndless-v0", ToyEnv)
    message = f"max_steps: expected a number of steps, as {env_id} has no time limit, got None"
    with pytest.raises(ValueError, match=re.escape(message)):
        play(env_id=env_id)
    assert play(env_id=env_id, max_steps=4).lengths[0] <= 4


def test_planner_of_another_type():
    with pytest.raises(ValueError, match=r"planner: expected a tt_fast.Planner, such as .* 'str'"):
        evaluate("runs/hopper", TOY)


def test_environment_must_fit_the_model():
    message = "observation_dim of Hopper-v4: expected the model's 3, got 11"
    with pytest.raises(ValueError, match=message):
        play(env_id="Hopper-v4")
    planner = ScriptedPlanner()
    config = planner.checkpoint.model.config
    planner.checkpoint.model.config = dataclasses.replace(config, action_dim=5)
    with pytest.raises(ValueError, match=f"action_dim of {TOY}: expected the model's 5, got 2"):
        play(planner)


def real_planner(**settings):
    """A small model with random weights that knows the toy environment's dimensions."""
    model_config = ModelConfig(OBSERVATION_DIM, ACTION_DIM, 10, 4, 2, 2, 16)
    edges = np.linspace(-3.0, 3.0, 11)[:, None] * np.ones(model_config.transition_dim)
    model = TrajectoryTransformer(model_config).eval()
    checkpoint = Checkpoint(model, Discretizer(edges), {"discount": 0.9, "env_id": TOY})
    plan_config = PlanConfig(horizon=3, beam_width=4, k_act=3, cdf_act=None)
    return Planner(checkpoint, plan_config, seed=1, **settings)


@pytest.mark.parametrize("settings", [{}, {"plan_freq": 2}, {"prefix_context": False}])
def test_staggered_environments_plan_as_one_does(settings):
    planner = real_planner(**settings)
    alone = play(planner, episodes=6, num_envs=1, seed=4, record=True)
    together = play(planner, episodes=6, num_envs=3, seed=4, record=True)
    assert together.returns == alone.returns
    assert together.lengths == alone.lengths
    assert len(set(alone.lengths)) > 1
    assert together.plan_config.discount == 0.9
    np.testing.assert_array_equal(together.record.actions, alone.record.actions)
    for a, b in zip(together.record.plans, alone.record.plans, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert planner.num_plans == 0


def test_plan_held_for_two_steps_is_one_object():
    plans = play(real_planner(plan_freq=2), seed=4, record=True).record.plans
    assert [a is b for a, b in pairwise(plans)] == [i % 2 == 0 for i in range(len(plans) - 1)]


class InterruptedPlanner(ScriptedPlanner):
    """Ctrl-C at the decision of this number."""

    interrupt_at = 0

    def act(self, observation, active):
        if len(self.clocks_seen) == self.interrupt_at:
            raise KeyboardInterrupt
        return super().act(observation, active)


def test_interruption_keeps_finished_episodes(monkeypatch):
    whole = play(episodes=6, num_envs=2)
    monkeypatch.setattr(InterruptedPlanner, "interrupt_at", 12)
    part = play(InterruptedPlanner(), episodes=6, num_envs=2)
    assert part.interrupted
    assert not whole.interrupted
    assert 0 < len(part.returns) < 6
    assert set(part.returns) < set(whole.returns)
    assert part.num_decisions > sum(part.lengths)
    assert "(interrupted)" in str(part)


def test_interruption_before_the_first_end_is_raised(monkeypatch):
    monkeypatch.setattr(InterruptedPlanner, "interrupt_at", 1)
    with pytest.raises(KeyboardInterrupt):
        play(InterruptedPlanner(), episodes=6, num_envs=2)


def test_results_so_far_are_handed_out_as_episodes_end():
    parts = []
    whole = play(episodes=6, num_envs=2, record=True, on_episode=parts.append)
    assert not whole.interrupted
    assert all(part.interrupted for part in parts)
    sizes = [len(part.returns) for part in parts]
    assert sizes == sorted(set(sizes)) and sizes[0] < 3 and sizes[-1] < 6  # noqa: PT018
    for part in parts:
        assert set(part.returns) <= set(whole.returns)
        assert part.num_decisions >= sum(part.lengths)
        assert part.wall_seconds <= whole.wall_seconds
    alone = []
    play(episodes=1, on_episode=alone.append)
    assert alone == []


def test_environments_are_closed_when_a_step_fails(monkeypatch):
    closed = []
    monkeypatch.setattr(ToyEnv, "close", lambda self: closed.append(self))
    monkeypatch.setattr(ToyEnv, "step", lambda self, action: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play(episodes=3, num_envs=3)
    assert len(closed) == 3


def test_progress_bar_shows_mean_return_and_speed(capsys):
    play(episodes=3, num_envs=2, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "mean_return" in shown
    assert "decisions/s" in shown
    play(episodes=3)
    assert capsys.readouterr().err == ""


def test_seconds_are_the_planners(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    result = play(max_steps=3)
    # each of 3 steps has one act and one observe, each between two readings of the clock
    assert result.seconds == 6.0
    assert result.decisions_per_second == 0.5
    assert result.wall_seconds == 13.0


def test_statistics():
    result = result_of([100.0, 130.0, 160.0])
    assert result.mean_return == 130.0
    assert result.std_error == pytest.approx(30.0 / math.sqrt(3))
    assert result.normalized_scores == (50.0, 65.0, 80.0)
    assert result.normalized_mean == 65.0
    assert result.normalized_std_error == pytest.approx(15.0 / math.sqrt(3))
    assert result.decisions_per_second == 2.5
    assert str(result) == (
        "Hopper-v4, dataset d, 3 episodes: return 130.0 ± 17.3, score 65.0 ± 8.7, 2.5 decisions/s"
    )


def test_one_episode_has_no_standard_error(tmp_path):
    result = result_of([100.0], ref_scores=None)
    assert result.std_error is None
    assert result.normalized_std_error is None
    result.save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert '"std_error": null' in text
    assert '"normalized_scores": null' in text
    assert str(result) == "Hopper-v4, dataset d, 1 episode: return 100.0, 2.5 decisions/s"


def test_json_names_what_ran(tmp_path):
    result = play(ScriptedPlanner(dataset="toy-data", step=7), episodes=2, seed=3, record=True)
    result.save(tmp_path / "deep" / "result.json")
    saved = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert saved["env_id"] == TOY
    assert saved["dataset"] == "toy-data"
    assert (saved["seed"], saved["checkpoint_step"], saved["num_episodes"]) == (3, 7, 2)
    assert saved["returns"] == list(result.returns)
    assert saved["plan_config"]["horizon"] == 15
    assert saved["plan_config"]["discount"] == 0.99
    assert {"gymnasium", "mujoco", "torch", "tt_fast", "numpy"} <= set(saved["versions"])
    assert saved["decisions_per_second"] == result.decisions_per_second
    assert "record" not in saved


def test_aggregate_pools_all_episodes(tmp_path):
    first, second = result_of([100.0, 130.0], seed=0), result_of([160.0], seed=10)
    summary = aggregate([first, second])
    assert isinstance(summary, EvalSummary)
    assert summary.returns == (100.0, 130.0, 160.0)
    assert summary.std_error == pytest.approx(30.0 / math.sqrt(3))
    assert summary.normalized_mean == 65.0
    assert summary.results == (first, second)
    summary.save(tmp_path / "summary.json")
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["num_results"] == 2
    assert [result["seed"] for result in saved["results"]] == [0, 10]
    assert EvalSummary.load(tmp_path / "summary.json") == summary
    assert str(summary) == "Hopper-v4, dataset d, 3 episodes: return 130.0 ± 17.3, score 65.0 ± 8.7"


@pytest.mark.parametrize(
    "change",
    [
        {"env_id": "Hopper-v5"},
        {"dataset": "e"},
        {"ref_scores": None},
        {"plan_config": PlanConfig(horizon=5)},
        {"plan_freq": 2},
        {"max_steps": 100},
        {"deadline_ms": 50.0},
    ],
)
def test_aggregate_refuses_different_settings(change):
    [name] = change
    with pytest.raises(ValueError, match=f"results: expected one {name}, "):
        aggregate([result_of([1.0]), result_of([1.0], **change)])


def test_aggregate_refuses_nothing():
    with pytest.raises(ValueError, match="results: expected at least one EvalResult, got 'none'"):
        aggregate([])


def test_video_that_cannot_be_drawn_is_refused_before_playing(monkeypatch, tmp_path):
    monkeypatch.setattr(ToyEnv, "render", lambda self: 1 / 0)
    monkeypatch.setattr(ScriptedPlanner, "replicate", lambda *args: pytest.fail("played"))
    with pytest.raises(RenderError, match=f"{TOY} cannot be drawn on this machine"):
        play(video=tmp_path / "episode.mp4")
    with pytest.raises(ValueError, match=r"ends in \.mp4"):
        play(video=tmp_path / "episode.avi")
    assert list(tmp_path.iterdir()) == []


def test_video_of_the_first_episode(monkeypatch, tmp_path):
    filmed = []
    monkeypatch.setattr(
        "tt_fast.video.render_episode", lambda *args, **kwargs: filmed.append((args, kwargs))
    )
    path = tmp_path / "episode.mp4"
    result = play(episodes=2, seed=5, video=path)
    rehearsal, final = filmed
    assert len(rehearsal[0][0].actions) == 1
    assert rehearsal[0][2] != path
    assert final == ((result.record, TOY, path), {"seed": 5})


def test_video_that_fails_at_the_end_is_a_warning(monkeypatch, tmp_path):
    outcomes = iter([None, OSError("disk is full")])

    def render(*args, **kwargs):
        if (error := next(outcomes)) is not None:
            raise error

    monkeypatch.setattr("tt_fast.video.render_episode", render)
    with pytest.warns(RuntimeWarning, match="no video was written: disk is full"):
        result = play(video=tmp_path / "episode.mp4")
    assert len(result.returns) == 1
