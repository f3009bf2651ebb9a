"""Environments: what is refused and how, trimming, bounds, MuJoCo's state, rendering."""

from __future__ import annotations

import os
import re
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from toy_env import ToyEnv, register

from tt_fast.data.registry import trim_observations
from tt_fast.envs import choose_opengl, engine_versions, make_env, wrap_env

IMAGE = Box(0, 255, (8, 8, 3), np.uint8)


def register_with(name: str, **spaces: gymnasium.Space) -> str:
    kind = type(name, (ToyEnv,), spaces)
    return register(f"{name}-v0", kind, max_episode_steps=5)


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("ToyDiscrete", Discrete(2)),
        ("ToyMultiDiscrete", MultiDiscrete([2, 3])),
        ("ToyDict", Dict({"x": Box(-1.0, 1.0, (2,))})),
        ("ToyTuple", Tuple((Discrete(2), Discrete(3)))),
        ("ToyScalar", Box(-1.0, 1.0, ())),
    ],
)
@pytest.mark.parametrize("which", ["action_space", "observation_space"])
def test_space_is_refused_by_name(name, space, which):
    env_id = register_with(f"{name}{which[0]}", **{which: space})
    message = f"{which} of {env_id}: expected a 1-D Box, got {space!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_env(env_id)


def test_image_is_refused_by_name():
    env_id = register_with("ToyImage", observation_space=IMAGE)
    message = f"observation_space of {env_id}: expected a 1-D Box (images are not supported), got "
    with pytest.raises(ValueError, match=re.escape(message)):
        make_env(env_id)


def test_refused_environment_is_closed(monkeypatch):
    closed = []
    monkeypatch.setattr(ToyEnv, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError, match="Discrete"):
        make_env(register_with("ToyClosed", action_space=Discrete(2)))
    assert len(closed) == 1


def test_unknown_environment_is_named():
    with pytest.raises(ValueError, match=r"env_id: expected .*, got 'Hoper-v4'.*Hopper"):
        make_env("Hoper-v4")


def test_missing_module_of_an_environment():
    with pytest.raises(ImportError, match="env_id 'no_such_module:X-v0' cannot be made"):
        make_env("no_such_module:X-v0")


def test_missing_gymnasium_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=re.escape('pip install "tt_fast[mujoco]"')):
        make_env("Hopper-v4")


def test_missing_mujoco_names_the_extra(monkeypatch):
    def make(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make", make)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('need pip install "tt_fast[mujoco]"')):
        make_env("Hopper-v4")


def test_hopper_v4_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_env("Hopper-v4")
    assert (env.observation_dim, env.action_dim, env.max_episode_steps) == (11, 3, 1000)
    low, high = env.action_bounds
    np.testing.assert_array_equal(low, [-1.0, -1.0, -1.0])
    np.testing.assert_array_equal(high, [1.0, 1.0, 1.0])
    assert low.dtype == np.float32
    env.close()


def test_steps_are_those_of_gymnasium():
    env, plain = make_env("Hopper-v4"), gymnasium.make("Hopper-v5", healthy_reward=1.0)
    plain_observation, _ = plain.reset(seed=7)
    np.testing.assert_array_equal(env.reset(seed=7), plain_observation)
    action = np.array([0.3, -0.2, 0.9], np.float32)
    step, expected = env.step(action), plain.step(action)
    np.testing.assert_array_equal(step.observation, expected[0])
    assert step[1:] == (pytest.approx(expected[1]), expected[2], expected[3])
    env.close(), plain.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_lie_inside_their_space(dtype):
    toy, given = ToyEnv(), []
    toy.action_space = Box(-0.1, 0.1, (2,), dtype)  # 0.1 is larger as float32 than as float64
    toy.step = lambda action: (given.append(action), (np.zeros(3), 0.0, False, False, {}))[1]
    env = wrap_env(toy)
    for bound in env.action_bounds:
        env.step(bound.astype(np.float32))
    assert all(action in toy.action_space for action in given)
    np.testing.assert_array_equal(given, env.action_bounds)


def test_mujoco_state_is_a_copy_and_can_be_set():
    env = make_env("Hopper-v4")
    env.reset(seed=0)
    qpos, qvel = env.mujoco_state()
    assert (qpos.shape, qvel.shape) == ((6,), (6,))
    env.step(np.ones(3, np.float32))
    moved, _ = env.mujoco_state()
    assert not np.array_equal(moved, qpos)
    env.set_mujoco_state(qpos, qvel)
    np.testing.assert_array_equal(env.mujoco_state()[0], qpos)
    env.close()


def test_other_engines_have_no_mujoco_state():
    env = make_env("Pendulum-v1")
    env.reset(seed=0)
    assert env.mujoco_state() is None
    env.close()


def test_contact_forces_of_ant_are_trimmed():
    space = Box(-np.inf, np.inf, (111,), np.float64)
    kind = type(
        "Ant", (ToyEnv,), {"observation_space": space, "_observe": lambda s: np.arange(111.0)}
    )
    env = make_env(register("Ant-v99", kind))
    assert env.observation_dim == 27
    np.testing.assert_array_equal(env.reset(seed=0), np.arange(27.0))
    np.testing.assert_array_equal(env.step(np.zeros(2, np.float32)).observation, np.arange(27.0))
    assert trim_observations(np.zeros((2, 111), np.float32), "Ant-v99").shape == (2, 27)


def test_no_time_limit_is_none():
    assert make_env(register("ToyEndless-v0", ToyEnv)).max_episode_steps is None


def test_opengl_choice_respects_the_user(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    choose_opengl()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    choose_opengl()
    assert os.environ["MUJOCO_GL"] == "egl"


def test_opengl_is_left_alone_off_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    choose_opengl()
    assert "MUJOCO_GL" not in os.environ


def test_versions_of_the_engines():
    make_env("Hopper-v4").close()
    versions = engine_versions()
    assert versions["gymnasium"] == gymnasium.__version__
    assert versions["mujoco"] == sys.modules["mujoco"].__version__
