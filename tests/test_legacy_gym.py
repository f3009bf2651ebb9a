"""Old interfaces: Gymnasium through gym's and D4RL's, and old environments in `evaluate`."""

from __future__ import annotations

import math
import pickle
import re
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from raw_data import HOPPER_SCORES, make_arrays, without
from toy_env import ACTION_DIM, OBSERVATION_DIM, ScriptedPlanner, ToyEnv, register_toy

from tt_fast.compat.legacy_gym import LegacyEnv, from_legacy_env, make_legacy
from tt_fast.compat.offscreen import OffscreenContext, opengl_problem
from tt_fast.data.hdf5 import write_hdf5
from tt_fast.data.registry import find_dataset
from tt_fast.envs import make_env, wrap_env
from tt_fast.evaluate import evaluate

TOY = register_toy()
NO_ACTION = np.zeros(ACTION_DIM, np.float32)


class OldEnv:
    """Gym's old interface around `ToyEnv`, with a time limit of 8 steps like the registered one."""

    observation_space = ToyEnv.observation_space
    action_space = ToyEnv.action_space

    def __init__(self, max_episode_steps=8):
        self._inner, self._next_seed = ToyEnv(), None
        self.max_episode_steps = max_episode_steps
        self.seeds = []

    def seed(self, seed=None):
        self._next_seed = seed
        self.seeds.append(seed)

    def reset(self):
        self._steps = 0
        return self._inner.reset(seed=self._next_seed)[0]

    def step(self, action):
        observation, reward, done, _, info = self._inner.step(action)
        self._steps += 1
        if self._steps == self.max_episode_steps:
            info["TimeLimit.truncated"] = not done
            done = True
        return observation, reward, done, info


class FiveTuples(OldEnv):
    """Gym 0.26's interface, without gym: a seed for `reset`, five values from `step`."""

    seed = None

    def reset(self, *, seed=None):
        self._next_seed = seed
        return super().reset(), {}

    def step(self, action):
        observation, reward, done, info = super().step(action)
        truncated = info.get("TimeLimit.truncated", False)
        return observation, reward, done and not truncated, truncated, info


class Wrapped(FiveTuples):
    """As gym 0.26's wrappers, which pass on what they do not name."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)


class OldWrapped(OldEnv):
    """As the wrappers of before."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)


def play(env=None, env_id=None, planner=None, **kwargs):
    return evaluate(planner or ScriptedPlanner(), env_id, env=env, progress=False, **kwargs)


def legacy_toy(**kwargs):
    return LegacyEnv(gymnasium.make(TOY), **kwargs)


# --- a Gymnasium environment through the old interface


def test_reset_and_step_have_the_old_form():
    env, plain = legacy_toy(), ToyEnv()
    assert env.seed(5) == [5]
    observation = env.reset()
    np.testing.assert_array_equal(observation, plain.reset(seed=5)[0])
    observation, reward, done, info = env.step(NO_ACTION)
    expected = plain.step(NO_ACTION)
    np.testing.assert_array_equal(observation, expected[0])
    assert (reward, done, info) == (expected[1], False, {})
    assert isinstance(reward, float)
    assert isinstance(done, bool)


def test_seed_is_of_one_reset():
    env = legacy_toy()
    env.seed(5)
    first, second = env.reset(), env.reset()
    assert not np.array_equal(first, second)
    env.seed(5)
    np.testing.assert_array_equal(env.reset(), first)


def length_of_episode(env, seed, limit=100):
    env.seed(seed)
    env.reset()
    for step in range(1, limit):
        *_, done, info = env.step(NO_ACTION)
        if done:
            return step, info
    raise AssertionError("no end")


def test_time_limit_is_done_and_named():
    lengths = {seed: (ToyEnv().reset(seed=seed), 0)[1] for seed in range(40)}
    for seed in lengths:
        plain = ToyEnv()
        plain.reset(seed=seed)
        step, info = length_of_episode(legacy_toy(), seed)
        bare, bare_info = length_of_episode(legacy_toy().unwrapped, seed)
        assert (step, bare) == (min(plain._length, 8), plain._length)
        assert "TimeLimit.truncated" not in bare_info
        # at 8 of 8 it ended by itself too; gym 0.18 says so
        assert info.get("TimeLimit.truncated") == {8: False, 9: True}.get(plain._length)
        lengths[seed] = plain._length
    assert {8, 9} < set(lengths.values())


def test_unwrapped_is_one_object_and_keeps_what_is_set():
    env = legacy_toy(name="toy", max_episode_steps=4)
    bare = env.unwrapped
    bare.name = "other"
    assert env.unwrapped is bare
    assert env.unwrapped.name == "other"
    assert bare.unwrapped is bare
    assert (env._max_episode_steps, bare.max_episode_steps) == (4, 4)
    assert bare is not env


def test_attributes_of_the_inner_environment_show():
    env = legacy_toy()
    env.reset()
    assert env.spec.id == TOY
    assert env._length == env.unwrapped._length
    with pytest.raises(AttributeError, match="no_such"):
        _ = env.no_such
    with pytest.raises(AttributeError, match="_env"):
        _ = LegacyEnv.__new__(LegacyEnv)._env


def test_spaces_must_be_flat():
    kind = type("Odd", (ToyEnv,), {"action_space": Discrete(2)})
    with pytest.raises(ValueError, match="action_space of Odd: expected a 1-D Box, got Discrete"):
        LegacyEnv(kind())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_episode_steps": 0}, "max_episode_steps: expected an integer >= 1, got 0"),
        ({"max_episode_steps": 1.5}, "max_episode_steps: expected an integer, got 1.5"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        legacy_toy(**kwargs)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        legacy_toy().seed(-1)


def test_pictures_open_no_window():
    with pytest.raises(ValueError, match="mode: expected 'rgb_array': no windows are opened"):
        legacy_toy().render("human")
    with pytest.raises(AttributeError, match="sim"):
        legacy_toy().render()


# --- D4RL's part


def write_toy(folder, arrays=None, **changes):
    path = folder / "toy.hdf5"
    data = (arrays or make_arrays(20, OBSERVATION_DIM, ACTION_DIM, (3,), (9,))) | changes
    write_hdf5(path, data, {})
    return path


def test_dataset_is_the_file_bit_for_bit(tmp_path):
    arrays = make_arrays(20, OBSERVATION_DIM, ACTION_DIM, (3,), (9,))
    path = write_toy(tmp_path, arrays)
    by_option = legacy_toy(dataset_file=path).unwrapped.get_dataset()
    by_argument = legacy_toy().get_dataset(h5path=str(path))
    for found in (by_option, by_argument):
        assert set(found) == set(arrays)
        for key, values in arrays.items():
            assert found[key].dtype == values.dtype
            np.testing.assert_array_equal(found[key], values)


def test_columns_become_vectors_and_new_names_old_ones(tmp_path):
    arrays = make_arrays(20, OBSERVATION_DIM, ACTION_DIM, (3,), (9,))
    renamed = without(arrays, "terminals", "timeouts")
    renamed |= {"terminations": arrays["terminals"][:, None], "truncations": arrays["timeouts"]}
    path = write_toy(tmp_path, renamed, rewards=arrays["rewards"][:, None])
    found = legacy_toy().get_dataset(path)
    for key, values in arrays.items():
        np.testing.assert_array_equal(found[key], values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((20, 5))}, "actions: expected shape (20, 2) for toy, got (20, 5)"),
        ({"observations": np.zeros((20, 4))}, "observations: expected shape (20, 3) for toy, got"),
        ({"rewards": np.zeros((20, 2))}, "rewards: expected (20,), got (20, 2)"),
    ],
)
def test_dataset_of_other_shapes(tmp_path, changes, message):
    path = write_toy(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        legacy_toy(name="toy").get_dataset(path)


def test_dataset_without_timeouts(tmp_path):
    arrays = without(make_arrays(20, OBSERVATION_DIM, ACTION_DIM), "timeouts")
    path = write_toy(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"timeouts: expected in the file, got only \['actions'"):
        legacy_toy().get_dataset(path)


def test_no_dataset_of_this_name(tmp_path):
    with pytest.raises(ValueError, match=f"dataset_file: expected .* '{TOY}' is no dataset of"):
        legacy_toy().get_dataset()
    with pytest.raises(FileNotFoundError, match=r"gone\.hdf5: no such file"):
        legacy_toy(dataset_file=tmp_path / "gone.hdf5").get_dataset()


def test_dataset_is_found_by_name(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    arrays = make_arrays(20, 11, 3)
    write_hdf5(tmp_path / find_dataset("hopper-medium-v2").file_name, arrays, {})
    found = make_legacy("hopper-medium-v2").get_dataset()
    np.testing.assert_array_equal(found["observations"], arrays["observations"])


def test_score_has_no_factor_of_100():
    env = legacy_toy(name="hopper-medium-v2")
    low, high = HOPPER_SCORES
    assert env.get_normalized_score(low) == 0.0
    assert env.get_normalized_score(high) == pytest.approx(1.0)
    assert env.get_normalized_score(1000.0) == pytest.approx((1000.0 - low) / (high - low))
    with pytest.raises(ValueError, match="name: expected a dataset with reference scores, got"):
        legacy_toy(name="toy").get_normalized_score(1.0)


# --- MuJoCo


@pytest.fixture
def hopper():
    pytest.importorskip("mujoco")
    env = make_legacy("hopper-medium-v2").unwrapped
    env.seed(0)
    env.reset()
    yield env
    env.close()


def test_dataset_name_is_its_environment(hopper):
    assert (hopper.name, hopper.spec.id) == ("hopper-medium-v2", "Hopper-v4")
    assert hopper.max_episode_steps == 1000
    assert (hopper.observation_space.shape, hopper.action_space.shape) == ((11,), (3,))


def test_steps_are_those_of_gymnasium(hopper):
    plain = make_env("Hopper-v4")
    hopper.seed(7)
    np.testing.assert_array_equal(hopper.reset(), plain.reset(7))
    action = np.array([0.5, -0.2, 0.9])
    observation, reward, done, _ = hopper.step(action)
    expected = plain.step(action)
    np.testing.assert_array_equal(observation, expected.observation)
    assert (reward, done) == (expected.reward, False)


def test_state_can_be_read_and_set(hopper):
    start = hopper.state_vector()
    assert start.shape == (12,)
    hopper.step(np.ones(3))
    assert not np.array_equal(hopper.state_vector(), start)
    assert not np.shares_memory(hopper.state_vector(), hopper.sim.data.qpos)
    hopper.set_state(start[:6], start[6:])
    np.testing.assert_array_equal(hopper.sim.data.qpos, start[:6])
    np.testing.assert_array_equal(hopper.sim.data.qvel, start[6:])
    np.testing.assert_array_equal(hopper._get_obs()[:5], start[1:6])
    height = hopper.sim.data.body("torso").xpos[2]
    hopper.sim.data.qpos[1] += 1.0
    hopper.sim.forward()
    assert hopper.sim.data.body("torso").xpos[2] == pytest.approx(height + 1.0)


def test_picture_stands_upright(hopper):
    if (problem := opengl_problem()) is not None:
        pytest.skip(problem)
    picture = hopper.render(width=120, height=100)
    assert picture.shape == (100, 120, 3)
    sky, floor = picture[:20].astype(int), picture[-20:].astype(int)
    assert floor.std() > 2 * sky.std()  # the floor is a chess board


def test_free_camera_sees_the_whole_body(hopper):
    if (problem := opengl_problem()) is not None:
        pytest.skip(problem)
    context = OffscreenContext(hopper.sim)
    np.testing.assert_allclose(context.cam.lookat, np.median(hopper.sim.data.geom_xpos, axis=0))
    assert context.cam.distance == hopper.sim.model.stat.extent
    context.render(64, 48)
    free = context.read_pixels(64, 48, depth=False)
    context.render(64, 48, camera_id=0)
    assert not np.array_equal(context.read_pixels(64, 48, depth=False), free)
    context.render(64, 48, camera_id=-1)
    picture, depth = context.read_pixels(64, 48)
    np.testing.assert_array_equal(picture, free)
    assert 0.0 < depth.min() < depth.max() <= 1.0
    with pytest.raises(ValueError, match="width: expected an integer >= 1 and <= 4096, got 0"):
        context.render(0, 48)
    context.close()


def test_time_limit_of_our_own():
    pytest.importorskip("mujoco")
    env = make_legacy("hopper-medium-v2", max_episode_steps=3)
    env.reset()
    infos = [env.step(np.zeros(3))[2:] for _ in range(3)]
    assert [done for done, _ in infos] == [False, False, True]
    assert infos[-1][1]["TimeLimit.truncated"]
    assert (env._max_episode_steps, env.unwrapped.max_episode_steps) == (3, 3)


@pytest.mark.parametrize(
    ("name", "env_id"),
    [("Hopper-v2", "Hopper-v4"), ("Walker2d-v3", "Walker2d-v4"), ("Hopper-v4", "Hopper-v4")],
)
def test_old_ids_become_v4(name, env_id):
    pytest.importorskip("mujoco")
    env = make_legacy(name)
    assert (env.name, env.spec.id, env.max_episode_steps) == (name, env_id, 1000)
    assert env.get_normalized_score(4592.3) > 0.9


def test_typing_error_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'hoper-medium-v2'.* nearest .*hopper-medium-v2"):
        make_legacy("hoper-medium-v2")


def test_ant_has_the_width_of_its_dataset():
    pytest.importorskip("mujoco")
    env, plain = make_legacy("ant-medium-v2").unwrapped, make_env("Ant-v4")
    env.seed(3)
    for observation, expected in (
        (env.reset(), plain.reset(3)),
        (env.step(np.ones(8))[0], plain.step(np.ones(8)).observation),
        (env._get_obs(), plain.env.unwrapped._get_obs()),
    ):
        assert observation.shape == env.observation_space.shape == (111,)
        np.testing.assert_array_equal(observation[:27], expected)
        assert not observation[27:].any()
    # trimmed again where tt_fast plans, and not padded under a Gymnasium name
    assert wrap_env(env).observation_dim == 27
    assert make_legacy("Ant-v4").observation_space.shape == (27,)


# --- environment objects where an id is expected


@pytest.mark.parametrize(
    "make",
    [
        OldEnv,
        FiveTuples,
        Wrapped,
        OldWrapped,
        lambda: gymnasium.make(TOY),
        lambda: legacy_toy(),
        lambda: legacy_toy().unwrapped,
    ],
)
def test_object_plays_as_the_registered_environment(make):
    by_id = play(env_id=TOY, episodes=20, seed=3)
    by_object = play(make(), episodes=20, seed=3)
    assert by_object.returns == by_id.returns
    assert by_object.lengths == by_id.lengths
    assert {7, 8} <= set(by_id.lengths)


def test_truncation_is_not_a_termination():
    by_id = play(env_id=TOY, episodes=20)
    for env in (OldEnv(), FiveTuples(), legacy_toy()):
        assert play(env, episodes=20).terminated == by_id.terminated
    assert not all(by_id.terminated)


def test_object_is_seeded_and_left_open(monkeypatch):
    env = OldEnv()
    env.close = lambda: pytest.fail("closed")
    result = play(env, episodes=3, seed=11)
    assert env.seeds == [11, 12, 13]
    assert result.env_id == "OldEnv"


def test_object_without_a_seed_plays():
    env = OldEnv()
    env.seed = None
    assert len(play(env, episodes=2).returns) == 2


def test_name_of_an_object():
    assert play(gymnasium.make(TOY)).env_id == TOY
    assert play(ToyEnv(), max_steps=3).env_id == "ToyEnv"
    result = play(OldEnv(), env_id="Hopper-v4")
    assert (result.env_id, result.ref_scores) == ("Hopper-v4", HOPPER_SCORES)
    assert math.isfinite(result.normalized_mean)


def test_object_without_a_limit_needs_a_cap():
    with pytest.raises(ValueError, match="max_steps: expected a number of steps, as ToyEnv has no"):
        play(ToyEnv())
    assert max(play(ToyEnv(), episodes=5, max_steps=4).lengths) <= 4


def test_gyms_own_box_is_a_box():
    """Gym's class is not Gymnasium's, and has its name."""
    names = {"Box": ("low", "high", "shape"), "Discrete": ("n",)}
    kinds = {name: type(name, (), dict.fromkeys(keys)) for name, keys in names.items()}
    env = OldEnv()
    box = kinds["Box"]()
    box.low, box.high, box.shape = -np.ones(ACTION_DIM), np.ones(ACTION_DIM), (ACTION_DIM,)
    env.action_space = box
    wrapped = from_legacy_env(env)
    np.testing.assert_array_equal(wrapped.action_bounds[0], [-1.0, -1.0])
    assert wrapped.action_dim == ACTION_DIM
    env.action_space = kinds["Discrete"]()
    with pytest.raises(ValueError, match="action_space of OldEnv: expected a 1-D Box, got"):
        from_legacy_env(env)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 2, "episodes": 2}, "num_envs: expected 1, as there is one env, got 2"),
        ({"video": "a.mp4"}, "video: expected None: only environments made by id are filmed"),
    ],
)
def test_what_an_object_cannot_do(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        play(OldEnv(), **kwargs)


@pytest.mark.parametrize("env", [3, "Hopper-v4", OldEnv, object()])
def test_what_is_no_environment(env):
    message = r"env: expected an environment with reset\(\) and step\(action\), got"
    with pytest.raises(ValueError, match=message):
        play(env)


def test_object_without_spaces():
    env = OldEnv()
    env.observation_space = None
    with pytest.raises(ValueError, match="observation_space of OldEnv: expected a 1-D Box, got"):
        wrap_env(env)
    env.observation_space = Box(0, 255, (8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="images are not supported"):
        wrap_env(env)


def test_step_of_another_length():
    env = OldEnv()
    env.step = lambda action: (np.zeros(3), 0.0, False)
    with pytest.raises(ValueError, match=re.escape("env.step: expected (observation, reward, do")):
        play(env)


def test_missing_gymnasium_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=re.escape('pip install "tt_fast[mujoco]"')):
        wrap_env(OldEnv())


def test_state_of_an_old_mujoco_environment(hopper):
    wrapped = wrap_env(hopper)
    qpos, qvel = wrapped.mujoco_state()
    np.testing.assert_array_equal(np.concatenate([qpos, qvel]), hopper.state_vector())
    wrapped.step(np.ones(3, np.float32))
    wrapped.set_mujoco_state(qpos, qvel)
    np.testing.assert_array_equal(hopper.state_vector(), np.concatenate([qpos, qvel]))
    assert wrapped.env_id == "Hopper-v4"


def test_wrapper_survives_a_look_before_it_is_filled():
    blank = type(wrap_env(OldEnv()).env)
    with pytest.raises(AttributeError, match="_env"):
        _ = blank.__new__(blank)._env
    assert pickle.loads(pickle.dumps(wrap_env(OldEnv()).env)).max_episode_steps == 8
