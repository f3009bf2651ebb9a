"""Minari's datasets: the conversion with a stand-in for the package, and the package if present."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tt_fast.data import load_dataset


def make_episode(episode_id, num_steps, *, ends=None, observation_dim=3):
    rng = np.random.default_rng(episode_id)
    flags = {key: np.zeros(num_steps, bool) for key in ("terminations", "truncations")}
    if ends is not None:
        flags[ends][-1] = True
    return SimpleNamespace(
        id=episode_id,
        observations=rng.standard_normal((num_steps + 1, observation_dim)),
        actions=rng.standard_normal((num_steps, 2)).astype(np.float32),
        rewards=rng.standard_normal(num_steps),
        **flags,
    )


@pytest.fixture
def minari(monkeypatch):
    """A stand-in for the package: `minari.episodes` are what its only dataset holds."""
    module = ModuleType("minari")
    module.episodes = [
        make_episode(0, 4, ends="terminations"),
        make_episode(1, 3, ends="truncations"),
        make_episode(2, 2),
    ]
    module.env_spec = SimpleNamespace(id="Hopper-v5")
    module.metadata = {}
    module.asked = []

    def load(dataset_id, download):
        module.asked.append((dataset_id, download))
        return SimpleNamespace(
            iterate_episodes=lambda: iter(module.episodes),
            env_spec=module.env_spec,
            storage=SimpleNamespace(metadata=module.metadata),
        )

    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "minari", module)
    return module


def test_conversion(minari):
    dataset = load_dataset("minari:mujoco/hopper/medium-v0")
    assert minari.asked == [("mujoco/hopper/medium-v0", True)]
    assert (dataset.name, dataset.env_id) == ("mujoco/hopper/medium-v0", "Hopper-v5")
    assert dataset.ref_scores is None
    assert [(rows.start, rows.stop) for rows in dataset.episodes] == [(0, 4), (4, 7), (7, 9)]
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminations), [3])
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [6, 8])
    for rows, episode in zip(dataset.episodes, minari.episodes, strict=True):
        expected = episode.observations[:-1]  # T rows of T + 1
        np.testing.assert_array_equal(dataset.observations[rows], expected)
        np.testing.assert_array_equal(dataset.actions[rows], episode.actions)
        np.testing.assert_array_equal(dataset.rewards[rows], episode.rewards)


def test_reference_scores_of_minari(minari):
    minari.metadata |= {"ref_min_score": 1, "ref_max_score": 11.0}
    assert load_dataset("minari:x-v0").ref_scores == (1.0, 11.0)
    assert load_dataset("minari:x-v0", ref_scores=(0, 1)).ref_scores == (0.0, 1.0)
    minari.metadata["ref_max_score"] = None
    assert load_dataset("minari:x-v0").ref_scores is None


def test_dataset_without_an_environment(minari):
    minari.env_spec = None
    assert load_dataset("minari:x-v0").env_id is None
    assert load_dataset("minari:x-v0", env_id="Hopper-v4").env_id == "Hopper-v4"


def test_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    message = 'minari:x-v0: needs the minari package: pip install "tt_fast[minari]"'
    with pytest.raises(ImportError, match=re.escape(message)):
        load_dataset("minari:x-v0")


def test_id_without_version():
    with pytest.raises(ValueError, match=r"dataset: expected an id with its version, such as"):
        load_dataset("minari:mujoco/hopper/medium")


def test_dataset_that_cannot_be_had(minari, monkeypatch):
    def fail(dataset_id, download):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(minari, "load_dataset", fail)
    message = (
        "minari:x-v0: could not be loaded: no route to host. By hand: run `minari download x-v0`"
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_dataset("minari:x-v0")
    assert "MINARI_DATASETS_PATH" in str(caught.value)


def test_no_episodes(minari):
    minari.episodes = []
    with pytest.raises(ValueError, match="minari:x-v0: expected at least one episode"):
        load_dataset("minari:x-v0")


def test_empty_episode(minari):
    minari.episodes.append(make_episode(7, 0))
    with pytest.raises(ValueError, match="minari:x-v0: episode 7: expected at least one step"):
        load_dataset("minari:x-v0")


def test_dict_observations(minari):
    minari.episodes[1].observations = {"observation": np.zeros((4, 3))}
    message = "episode 1: observations: expected an array of flat vectors (a 1-D Box space), got"
    with pytest.raises(ValueError, match=re.escape(f"minari:x-v0: {message} 'dict'")):
        load_dataset("minari:x-v0")


def test_discrete_actions(minari):
    minari.episodes[0].actions = np.zeros(4, int)
    message = "episode 0: actions: expected an array of flat vectors (a 1-D Box space), got '1-D'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset("minari:x-v0")


def test_observation_after_the_last_action_is_missing(minari):
    episode = minari.episodes[1]
    episode.observations = episode.observations[:-1]
    message = "episode 1: observations: expected 4 rows, one more than rewards, got 3"
    with pytest.raises(ValueError, match=message):
        load_dataset("minari:x-v0")


def test_real_package(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import gymnasium
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make("Pendulum-v1")
    buffers = [make_buffer(EpisodeBuffer, env, seed) for seed in range(2)]
    minari.create_dataset_from_buffers(
        "tt-fast/pendulum-v0",
        buffers,
        env=env,
        eval_env=env,
        author="Nobody",
        author_email="nobody@example.org",
        code_permalink="https://example.org",
        algorithm_name="random",
        description="Ten steps.",
    )
    dataset = load_dataset("minari:tt-fast/pendulum-v0")
    assert (dataset.env_id, dataset.num_steps, len(dataset.episodes)) == ("Pendulum-v1", 10, 2)
    expected = np.concatenate([buffer.observations[:-1] for buffer in buffers])
    np.testing.assert_array_equal(dataset.observations, expected)
    np.testing.assert_array_equal(np.flatnonzero(dataset.truncations), [4, 9])


def make_buffer(kind, env, seed):
    """Five random steps as Minari's `EpisodeBuffer`."""
    env.action_space.seed(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    for _ in range(5):
        actions.append(env.action_space.sample())
        observation, reward, *_ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(float(reward))
    ends = [False] * 4 + [True]
    return kind(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=[False] * 5,
        truncations=ends,
        infos={},
    )
