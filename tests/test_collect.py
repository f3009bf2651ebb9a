"""`collect`: what lands in the file, and that interruptions leave no trace in it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_env import TOY_ENV, InPlaceEnv, register, register_toy

from tt_fast.collect import collect
from tt_fast.data import load_dataset
from tt_fast.data.hdf5 import DatasetWriter
from tt_fast.envs import make_env

register_toy()

# `tt_fast.collect` is the function once the package is imported.
collect_module = sys.modules[collect.__module__]


class NoisyPolicy:
    """Random actions from a generator that only `seed` sets; stops at its `max_calls`-th call."""

    def __init__(self, max_calls=None, error=KeyboardInterrupt):
        self.num_calls, self.max_calls, self.error = 0, max_calls, error
        self.rng = np.random.default_rng()

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, observation):
        self.num_calls += 1
        if self.num_calls == self.max_calls:
            raise self.error
        return np.tanh(observation[:2]) + self.rng.normal(size=2)


def collect_toy(policy, num_transitions, out, **kwargs):
    return collect(TOY_ENV, policy, num_transitions, out, progress=False, **kwargs)


def read(path):
    """Every dataset of a file by its name."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def assert_same_content(path, expected):
    found, wanted = read(path), read(expected)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_array_equal(found[key], values)


def partial_of(path):
    return path.with_name(f"{path.name}.partial")


# --- what is written


def test_random_policy_in_mujoco(tmp_path):
    out = tmp_path / "new" / "hopper.hdf5"
    assert collect("Hopper-v4", "random", 100, out, seed=3, progress=False) == out
    assert [file.name for file in out.parent.iterdir()] == ["hopper.hdf5"]
    content = read(out)
    assert content["metadata/environment"] == b"Hopper-v4"
    assert content["metadata/policy"] == b"random"
    assert content["metadata/seed"] == 3
    dataset = load_dataset(out)
    assert (dataset.env_id, dataset.num_steps, dataset.observation_dim) == ("Hopper-v4", 100, 11)
    # Hopper sees all of its state but the x position; the state is that of before the action.
    qpos, qvel = content["infos/qpos"], content["infos/qvel"]
    assert qpos.dtype == qvel.dtype == np.float64
    np.testing.assert_allclose(content["observations"][:, :5], qpos[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(content["observations"][:, 5:], qvel.clip(-10, 10), rtol=1e-6)


def test_file_replays_in_its_environment(tmp_path):
    content = read(collect("Hopper-v4", "random", 60, tmp_path / "a.hdf5", seed=5, progress=False))
    env = make_env("Hopper-v4")
    episode, observation = 0, env.reset(5)
    for row in range(60):
        np.testing.assert_array_equal(content["observations"][row], observation.astype(np.float32))
        result = env.step(content["actions"][row])
        assert content["rewards"][row] == np.float32(result.reward)
        assert content["terminals"][row] == result.terminated
        observation = result.observation
        if result.terminated:
            episode += 1
            observation = env.reset(5 + episode)
    env.close()
    assert episode > 0


def test_environment_that_reuses_its_arrays(tmp_path):
    env_id = register("TTInPlace-v0", InPlaceEnv, disable_env_checker=True)
    dataset = load_dataset(collect(env_id, "random", 5, tmp_path / "data.hdf5", progress=False))
    np.testing.assert_array_equal(dataset.observations[:, 0], np.arange(5))
    assert (dataset.actions <= 1).all()


def test_time_limits_and_the_cut_last_episode_are_timeouts(tmp_path):
    content = read(collect_toy("random", 200, tmp_path / "a.hdf5"))
    ends = np.flatnonzero(content["terminals"] | content["timeouts"])
    lengths = np.diff(ends, prepend=-1)
    np.testing.assert_array_equal(lengths[content["timeouts"][ends]][:-1], 8)  # the toy's limit
    assert content["timeouts"][:-1].any()
    assert content["terminals"].any()
    assert ends[-1] == 199
    assert "infos/qpos" not in content


def test_terminal_in_the_last_row_is_no_timeout(tmp_path):
    first = read(collect_toy("random", 50, tmp_path / "a.hdf5"))
    stop = int(np.flatnonzero(first["terminals"] & ~first["timeouts"])[0]) + 1
    content = read(collect_toy("random", stop, tmp_path / "b.hdf5"))
    assert content["terminals"][-1]
    assert not content["timeouts"][-1]


def test_callable_and_its_import_give_the_same_file(tmp_path, monkeypatch):
    code = """
        import numpy as np

        def act(observation):
            return np.tanh(observation[:2])
    """
    (tmp_path / "my_policy.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    named = read(collect_toy("my_policy:act", 40, tmp_path / "a.hdf5"))
    direct = read(collect_toy(lambda obs: np.tanh(obs[:2]), 40, tmp_path / "b.hdf5"))
    assert named.pop("metadata/policy") == b"my_policy:act"
    assert b"lambda" in direct.pop("metadata/policy")
    for key, values in named.items():
        np.testing.assert_array_equal(values, direct[key])
    np.testing.assert_allclose(named["actions"], np.tanh(named["observations"][:, :2]), rtol=1e-6)


def test_actions_are_clipped_to_the_space(tmp_path):
    content = read(collect_toy(lambda obs: [2.0, -3.0], 10, tmp_path / "a.hdf5"))
    np.testing.assert_array_equal(content["actions"], [[1.0, -1.0]] * 10)


def test_seeds(tmp_path):
    a, b, c = (tmp_path / f"{name}.hdf5" for name in "abc")
    for path, seed in ((a, 0), (b, 0), (c, 1)):
        collect_toy("random", 30, path, seed=seed)
    assert_same_content(b, a)
    assert not np.array_equal(read(a)["actions"], read(c)["actions"])


def test_bar_counts_steps(tmp_path, capsys):
    collect(TOY_ENV, "random", 30, tmp_path / "a.hdf5")
    assert "30/30" in capsys.readouterr().err


# --- interruptions


@settings(max_examples=20)
@given(st.integers(1, 80), st.integers(1, 30), st.integers(0, 5))
def test_interrupted_and_continued_equals_uninterrupted(max_calls, flush_rows, seed):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_module, "FLUSH_ROWS", flush_rows)
        folder = Path(name)
        out = folder / "a.hdf5"
        with pytest.raises(KeyboardInterrupt):
            collect_toy(NoisyPolicy(max_calls), 80, out, seed=seed)
        assert not out.exists()
        if partial_of(out).exists():
            rows = read(partial_of(out))
            assert len(rows["rewards"]) < max_calls
            assert rows["terminals"][-1] or rows["timeouts"][-1]
        again = NoisyPolicy()
        collect_toy(again, 80, out, seed=seed)
        assert not partial_of(out).exists()
        expected = collect_toy(NoisyPolicy(), 80, folder / "b.hdf5", seed=seed)
        assert_same_content(out, expected)
        if max_calls > flush_rows + 10:  # an episode has at most 8 steps
            assert again.num_calls < 80


def test_ctrl_c_when_rows_are_written_writes_them_once(tmp_path, monkeypatch):
    append, calls = DatasetWriter.append, []

    def interrupted(writer, arrays):
        append(writer, arrays)
        calls.append(writer.num_rows)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(collect_module, "FLUSH_ROWS", 10)
    monkeypatch.setattr(DatasetWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect_toy(NoisyPolicy(), 40, tmp_path / "a.hdf5")
    assert len(calls) == 1
    collect_toy(NoisyPolicy(), 40, tmp_path / "a.hdf5")
    assert_same_content(tmp_path / "a.hdf5", collect_toy(NoisyPolicy(), 40, tmp_path / "b.hdf5"))


def test_rows_are_written_in_time_however_few(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_module, "FLUSH_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        collect_toy(NoisyPolicy(40), 120, tmp_path / "a.hdf5")
    assert len(read(tmp_path / "a.hdf5.partial")["rewards"]) > 30


def test_killed_process_keeps_its_whole_episodes(tmp_path):
    out = tmp_path / "a.hdf5"
    code = f"""
        import os, signal, sys
        sys.path.insert(0, "tests")
        import test_collect

        class Killer(test_collect.NoisyPolicy):
            def __call__(self, observation):
                if self.num_calls == 70:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(observation)

        Killer.__qualname__ = "NoisyPolicy"  # the name that the file remembers
        test_collect.collect_module.FLUSH_ROWS = 10
        test_collect.collect_toy(Killer(), 120, {str(out)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(__file__).parents[1]
    killed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert partial_of(out).exists()
    policy = NoisyPolicy()
    collect_toy(policy, 120, out)
    assert policy.num_calls <= 120 - 40
    assert_same_content(out, collect_toy(NoisyPolicy(), 120, tmp_path / "b.hdf5"))


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The path whose partial file an interruption left."""
    monkeypatch.setattr(collect_module, "FLUSH_ROWS", 1)
    with pytest.raises(KeyboardInterrupt):
        collect_toy(NoisyPolicy(60), 120, tmp_path / "a.hdf5")
    return tmp_path / "a.hdf5"


def test_other_settings_do_not_continue(interrupted):
    advice = "cannot be continued with these settings: delete it to start anew, or choose another"
    with pytest.raises(ValueError, match=rf"partial: seed: expected 1, got 0\..*{advice}"):
        collect_toy(NoisyPolicy(), 120, interrupted, seed=1)
    with pytest.raises(ValueError, match="policy: expected 'random', got 'NoisyPolicy'"):
        collect_toy("random", 120, interrupted)
    with pytest.raises(ValueError, match=f"environment: expected 'Pendulum-v1', got '{TOY_ENV}'"):
        collect("Pendulum-v1", NoisyPolicy(), 120, interrupted, progress=False)


def test_fewer_rows_than_there_are(interrupted):
    message = "num_transitions: expected at least the [0-9]+ rows of the interrupted collection"
    with pytest.raises(ValueError, match=message):
        collect_toy(NoisyPolicy(), 5, interrupted)


def test_damaged_partial_file(interrupted):
    partial = partial_of(interrupted)
    partial.write_bytes(partial.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected a whole HDF5 file.*delete it to start anew"):
        collect_toy(NoisyPolicy(), 120, interrupted)


# --- refusals


def test_existing_file_is_not_overwritten(tmp_path):
    out = tmp_path / "a.hdf5"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="out: expected a new file, got the existing"):
        collect_toy("random", 10, out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("best", ValueError, "policy: expected random, a .zip file or module:callable, got 'best'"),
        ("no_such_module:act", ImportError, "policy: no module 'no_such_module' to import"),
        ("math:no_such", ValueError, "policy: expected a callable 'no_such' in math, got none"),
        ("math:pi", ValueError, "policy: expected a callable 'pi' in math, got none"),
        ("missing.zip", FileNotFoundError, "policy: no file missing.zip"),
    ],
)
def test_unknown_policy(tmp_path, policy, error, message):
    with pytest.raises(error, match=re.escape(message)):
        collect_toy(policy, 10, tmp_path / "a.hdf5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0.0], "action: expected shape (2,), got (1,)"),
        (0.0, "action: expected shape (2,), got ()"),
        ([0.0, np.nan], "action: expected finite numbers, got [0.0, nan]"),
        ([0.0, "left"], "action: expected numbers, got [0.0, 'left']"),
        (None, "action: expected shape (2,), got ()"),
    ],
)
def test_bad_action(tmp_path, action, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        collect_toy(lambda obs: action, 10, tmp_path / "a.hdf5")
    assert list(tmp_path.iterdir()) == []  # an empty partial file is not left either


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_transitions", 0, "num_transitions: expected an integer >= 1"),
        ("num_transitions", 1.5, "num_transitions: expected an integer, got 1.5"),
        ("seed", -1, "seed: expected an integer >= 0"),
    ],
)
def test_numbers(tmp_path, name, value, message):
    settings = {"num_transitions": 10, "seed": 0} | {name: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        collect_toy("random", out=tmp_path / "a.hdf5", **settings)


# --- stable-baselines3


def test_stable_baselines3_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    (tmp_path / "model.zip").touch()
    message = "needs stable-baselines3: pip install stable-baselines3"
    with pytest.raises(ImportError, match=re.escape(message)):
        collect_toy(tmp_path / "model.zip", 10, tmp_path / "a.hdf5")


class StandInPolicy:
    """What `collect` uses of a stable-baselines3 policy: construction, weights, `predict`."""

    def __init__(self, observation_space, action_space, lr_schedule, use_sde=False, scale=None):
        assert (observation_space, action_space, use_sde) == ("observations", "actions", True)
        self.scale = scale

    def load_state_dict(self, state):
        self.bias = state["bias"]

    def predict(self, observation, deterministic):
        import torch

        assert not deterministic
        return self.bias + self.scale * torch.rand(2).numpy(), None


def test_stable_baselines3_policy_is_rebuilt_and_sampled(tmp_path, monkeypatch):
    def load(path, device):
        with ZipFile(path) as file:
            bias = np.float32(json.loads(file.read("bias")))
        data = {
            "policy_class": StandInPolicy,
            "observation_space": "observations",
            "action_space": "actions",
            "policy_kwargs": {"scale": 0.25},
            "use_sde": True,
        }
        return data, {"policy": {"bias": bias}}, {}

    for name in ("stable_baselines3", "stable_baselines3.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    save_util = ModuleType("stable_baselines3.common.save_util")
    save_util.load_from_zip_file = load
    monkeypatch.setitem(sys.modules, save_util.__name__, save_util)
    with ZipFile(tmp_path / "model.zip", "w") as file:
        file.writestr("bias", "[0.5, -0.5]")
    content = read(collect_toy(tmp_path / "model.zip", 50, tmp_path / "a.hdf5"))
    assert content["metadata/policy"] == b"model.zip"
    noise = content["actions"] - [0.5, -0.5]
    assert 0.0 <= noise.min() < 0.05
    assert 0.2 < noise.max() <= 0.25
    again = collect_toy(tmp_path / "model.zip", 50, tmp_path / "b.hdf5")
    assert_same_content(again, tmp_path / "a.hdf5")


@pytest.mark.parametrize("algorithm", ["SAC", "PPO", "TD3"])
def test_stable_baselines3_itself(tmp_path, algorithm):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    model.save(tmp_path / "model.zip")
    out = tmp_path / "a.hdf5"
    collect("Pendulum-v1", tmp_path / "model.zip", 300, out, progress=False)
    content = read(out)
    means, _ = model.predict(content["observations"], deterministic=True)
    is_random = algorithm != "TD3"
    assert (np.abs(means - content["actions"]).max() > 1e-3) == is_random
    again = collect("Pendulum-v1", tmp_path / "model.zip", 300, tmp_path / "b.hdf5", progress=False)
    assert_same_content(again, out)
