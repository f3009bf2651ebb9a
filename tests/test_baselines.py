"""benchmarks/baselines.py without d3rlpy: options, episodes, the clock, playing, JSON, table."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import baselines
import numpy as np
import pytest
from baselines import (
    BaselineResult,
    episode_arrays,
    find_target_return,
    make_policy,
    parse_options,
    play,
    read_result,
    render,
    train,
)
from numpy.typing import NDArray
from raw_data import HOPPER_SCORES, make_arrays
from toy_env import ACTION_DIM, register_toy

from tt_fast.data import load_dataset
from tt_fast.data.hdf5 import write_hdf5
from tt_fast.envs import make_env

RESULT = BaselineResult(
    env_id="Hopper-v4",
    dataset="small",
    returns=(1000.0, 2000.0, 3000.0),
    ref_scores=HOPPER_SCORES,
    algorithm="dt",
    seed=1,
    eval_seed=0,
    lengths=(400, 700, 1000),
    target_return=3600.0,
    num_steps=12_345,
    minutes=60.04,
    cpu_minutes=58.0,
    budget_minutes=60.0,
    max_steps=100_000,
    num_threads=1,
    settings={"batch_size": 64},
    versions={"d3rlpy": "2.8.1"},
    git_commit=None,
    device="some processor",
    date="2026-01-01",
)


def test_episodes_keep_their_ends_and_the_open_last_one(tmp_path: Path) -> None:
    arrays = make_arrays(num_steps=9, terminals=[2], timeouts=[5])
    write_hdf5(tmp_path / "small.hdf5", arrays, {})
    episodes = episode_arrays(load_dataset(tmp_path / "small.hdf5"))
    assert [len(episode.rewards) for episode in episodes] == [3, 3, 3]
    assert [episode.terminated for episode in episodes] == [True, False, False]
    for key in ("observations", "actions", "rewards"):
        joined = np.concatenate([getattr(episode, key) for episode in episodes])
        want = arrays[key] if arrays[key].ndim == 2 else arrays[key][:, None]
        np.testing.assert_array_equal(joined, want)


def clock(
    monkeypatch: pytest.MonkeyPatch, seconds_per_step: float
) -> tuple[Callable[[int], None], list[int]]:
    """A `fit` that takes time on a clock of its own, and the steps that it is asked for."""
    calls: list[int] = []
    ticks = SimpleNamespace(
        perf_counter=lambda: sum(calls) * seconds_per_step,
        process_time=lambda: sum(calls) * seconds_per_step / 2.0,
    )
    monkeypatch.setattr(baselines, "time", ticks)
    return calls.append, calls


def test_training_ends_with_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = clock(monkeypatch, 0.125)
    effort = train(fit, minutes=0.5, max_steps=10_000)
    assert calls[:2] == [1, 8]  # about a second each
    assert effort.num_steps == sum(calls)
    assert 30.0 <= 60.0 * effort.minutes < 31.0
    assert effort.cpu_minutes == effort.minutes / 2.0


def test_training_ends_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = clock(monkeypatch, 2.0)
    assert train(fit, minutes=10.0, max_steps=5).num_steps == 5
    assert calls == [1] * 5


def test_playing_seeds_episodes_and_tells_the_last_reward() -> None:
    env = make_env(register_toy())
    rewards: list[list[float]] = []

    def start_episode() -> Callable[[NDArray[np.float32], float], NDArray[np.float32]]:
        rewards.append([])

        def act(observation: NDArray[np.float32], reward: float) -> NDArray[np.float32]:
            assert observation.dtype == np.float32
            rewards[-1].append(reward)
            return np.zeros(ACTION_DIM, np.float32)

        return act

    returns, lengths = play(start_episode, env, 3, 7)
    again, _ = play(start_episode, env, 2, 8)
    env.close()
    assert again == returns[1:]
    assert list(returns) == [length * (length + 1) / 2.0 for length in lengths]
    assert rewards[0] == [float(step) for step in range(lengths[0])]
    assert len(set(lengths)) > 1


def test_a_policy_acts_on_one_observation() -> None:
    algo = SimpleNamespace(
        predict=lambda observations: 2.0 * observations,
        as_stateful_wrapper=lambda target_return: SimpleNamespace(
            predict=lambda observation, reward: observation + target_return - reward
        ),
    )
    observation = np.ones(2, np.float32)
    np.testing.assert_array_equal(make_policy(algo, None)()(observation, 5.0), [2.0, 2.0])
    np.testing.assert_array_equal(make_policy(algo, 10.0)()(observation, 5.0), [6.0, 6.0])


def test_the_target_is_the_environments_unless_one_is_given() -> None:
    assert find_target_return("Hopper-v4", None) == 3600.0
    assert find_target_return("Hopper-v4", 1800.0) == 1800.0
    with pytest.raises(ValueError, match="--target-return: expected a number for Ant-v4, got none"):
        find_target_return("Ant-v4", None)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    RESULT.save(tmp_path / "new" / "dt.json")
    record = read_result(tmp_path / "new" / "dt.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dt.json"]
    assert next(iter(record)) == "algorithm"
    names = {field.name for field in dataclasses.fields(RESULT)}
    assert names < set(record)
    assert (record["mean_return"], record["lengths"]) == (2000.0, [400, 700, 1000])
    assert record["normalized_mean"] == pytest.approx(62.074, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "expected JSON"),
        ("[]", "expected a JSON object"),
        ('{"algorithm": "bc"}', r"expected a result of baselines\.py, got .*'mean_return'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json: {message}"):
        read_result(tmp_path / "other.json")


def test_the_table_has_a_row_for_each_result() -> None:
    plain = dataclasses.replace(
        RESULT, algorithm="bc", target_return=None, returns=(5.0,), ref_scores=None
    )
    shown = render([json.loads(json.dumps(each.to_dict())) for each in (RESULT, plain)])
    assert shown.splitlines()[2:] == [
        "| small | dt, target 3600 | 1 | 60.0 | 12,345 | 3 | 2,000.0 ± 577.4 | 62.1 ± 17.7 |",
        "| small | bc | 1 | 60.0 | 12,345 | 1 | 5.0 | - |",
    ]
    assert len({line.count("|") for line in shown.splitlines()}) == 1


def test_the_command_line_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RESULT.save(tmp_path / "dt.json")
    monkeypatch.setattr("sys.argv", ["baselines.py", "--table", str(tmp_path / "dt.json")])
    baselines.main()
    assert capsys.readouterr().out == render([RESULT.to_dict()]) + "\n"


BC = ["data.hdf5", "--algorithm", "bc", "--out", "bc.json"]


def test_options_have_defaults() -> None:
    options = parse_options(BC)
    assert (options.minutes, options.episodes, options.threads) == (60.0, 20, 1)
    assert (options.seed, options.eval_seed, options.steps) == (0, 0, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "FILE and --algorithm and --out must be given, or --table"),
        (BC[:3], "--out must be given, or --table"),
        (["data.hdf5", "--table", "bc.json"], "either FILE or --table, not both"),
        ([*BC, "--target-return", "1"], "--target-return is for --algorithm dt"),
        ([*BC, "--minutes", "0"], "--minutes: expected a number above 0, got 0.0"),
        ([*BC, "--minutes", "nan"], "--minutes: expected a number above 0, got nan"),
        ([*BC, "--steps", "0"], "--steps: expected at least 1, got 0"),
        ([*BC, "--eval-seed", "-1"], "--eval-seed: expected at least 0, got -1"),
        (["data.hdf5", "--algorithm", "cql"], "invalid choice: 'cql'"),
    ],
)
def test_wrong_options_are_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_options(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("d3rlpy") is not None, reason="d3rlpy is there")
def test_without_d3rlpy_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r'need d3rlpy: pip install "d3rlpy>=2\.8"'):
        baselines.run(parse_options(BC))
