"""Gymnasium's environments through the interface of gym 0.18 and D4RL, and the reverse.

The simulation is Gymnasium's: the physics of its -v4 is that of gym's -v2. What each method does is
what gym 0.18.3 (`gym/core.py`, `gym/wrappers/time_limit.py`, `gym/envs/mujoco/mujoco_env.py`) and
D4RL at 89141a6 (`d4rl/offline_env.py`) do.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.compat.offscreen import OffscreenContext, Picture
from tt_fast.data.download import fetch_dataset
from tt_fast.data.hdf5 import read_hdf5
from tt_fast.data.registry import (
    find_dataset,
    find_ref_scores,
    nearest_names,
    normalized_score,
)
from tt_fast.envs import make_env, require_flat_box
from tt_fast.envs import wrap_env as from_legacy_env
from tt_fast.validate import refuse, require, require_int

__all__ = ["LegacyEnv", "Simulation", "from_legacy_env", "make_legacy"]

#: D4RL's name of a key, then Gymnasium's.
_KEYS = {
    "observations": ("observations",),
    "actions": ("actions",),
    "rewards": ("rewards",),
    "terminals": ("terminals", "terminations"),
    "timeouts": ("timeouts", "truncations"),
}

_ANT_STATE_DIM, _ANT_DIM = 27, 111  # with the 84 contact forces


class Simulation:
    """MuJoCo as mujoco_py shows it: `data.qpos`, `data.qvel`, `model`, `forward()`."""

    def __init__(self, model: Any, data: Any) -> None:
        self.model = model
        self.data = data

    def forward(self) -> None:
        """Work out everything that follows from qpos and qvel."""
        import mujoco

        mujoco.mj_forward(self.model, self.data)


class LegacyEnv:
    """One Gymnasium environment, seen through the interface of gym 0.18 and D4RL.

    What is not here is the inner environment's own (`dt`, `frame_skip`, `spec`). Attributes may be
    set, as the original sets `name` and `max_episode_steps` (trajectory/datasets/d4rl.py:83-84).

    An ant of D4RL's has observations of 111 dimensions, Gymnasium's Ant-v4 the first 27 of them.
    The others are contact forces: zero with the mujoco_py that made D4RL's files (Gymnasium's
    `envs/mujoco/ant_v5.py:114`), so that they cost nothing either, and zero here.

    Args:
        env: the `gymnasium.Env`; with a time limit of its own or without.
        name: D4RL's name of a dataset or an environment's; by default the id of the environment.
        max_episode_steps: what `max_episode_steps` says; by default the limit of `env`'s spec.
        dataset_file: what `get_dataset` reads, in place of the file that belongs to `name`.

    Raises:
        ValueError: a discrete, dict, tuple or image space, or no positive `max_episode_steps`.
    """

    metadata: dict[str, Any] = {"render.modes": ["rgb_array"]}  # noqa: RUF012 (gym's own form)

    def __init__(
        self,
        env: Any,
        *,
        name: str | None = None,
        max_episode_steps: int | None = None,
        dataset_file: str | Path | None = None,
    ) -> None:
        self._env = env
        spec = getattr(env, "spec", None)
        self.name = name or (type(env.unwrapped).__name__ if spec is None else spec.id)
        require_flat_box(env.observation_space, "observation_space", self.name)
        require_flat_box(env.action_space, "action_space", self.name)
        if max_episode_steps is not None:
            max_episode_steps = require_int("max_episode_steps", max_episode_steps, 1)
        self.max_episode_steps = max_episode_steps or getattr(spec, "max_episode_steps", None)
        self._dataset_file = None if dataset_file is None else Path(dataset_file)
        self._num_missing = self._count_missing()
        self._seed: int | None = None

    @property
    def unwrapped(self) -> LegacyEnv:
        """The environment without its time limit; itself if it has none."""
        return self if self._env is self._env.unwrapped else self._bare

    @property
    def action_space(self) -> Any:
        """A Box (action_dim,)."""
        return self._env.action_space

    @cached_property
    def observation_space(self) -> Any:
        """A Box (observation_dim,)."""
        if self._num_missing == 0:
            return self._env.observation_space
        from gymnasium.spaces import Box

        return Box(-np.inf, np.inf, (_ANT_DIM,), np.float64)

    @property
    def sim(self) -> Simulation:
        """MuJoCo's model and data, live.

        Raises:
            AttributeError: another engine.
        """
        inner = self._env.unwrapped
        return Simulation(inner.model, inner.data)

    @property
    def _max_episode_steps(self) -> int | None:
        return self.max_episode_steps

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the next `reset`."""
        self._seed = None if seed is None else require_int("seed", seed, 0)
        return [self._seed]

    def reset(self) -> NDArray[np.float64]:
        """Start an episode; its first observation (observation_dim,)."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None
        return self._pad(observation)

    def step(self, action: Any) -> tuple[NDArray[np.float64], float, bool, dict[str, Any]]:
        """Apply an action (action_dim,): next observation, reward, done, info.

        A time limit is `done` too, with info["TimeLimit.truncated"] as gym 0.18 has it.
        """
        observation, reward, terminated, truncated, info = self._env.step(np.asarray(action))
        if truncated:
            info = {**info, "TimeLimit.truncated": not terminated}
        return self._pad(observation), float(reward), bool(terminated or truncated), info

    def state_vector(self) -> NDArray[np.float64]:
        """MuJoCo's qpos, then qvel, (nq + nv,): m and rad, then per second."""
        data = self.sim.data
        return np.concatenate([data.qpos, data.qvel]).astype(np.float64)

    def set_state(self, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> None:
        """Put MuJoCo into a state: qpos (nq,), qvel (nv,)."""
        self._env.unwrapped.set_state(np.asarray(qpos), np.asarray(qvel))

    def render(self, mode: str = "rgb_array", width: int = 500, height: int = 500) -> Picture:
        """A picture (height, width, 3) of the current state, as the model's `track` camera sees it.

        Raises:
            AttributeError: another engine than MuJoCo.
            ValueError: another `mode`, windows are not opened; or a model without this camera.
            RenderError: no OpenGL on this machine.
        """
        require(mode == "rgb_array", "mode", "'rgb_array': no windows are opened", mode)
        sim = self.sim
        camera = [sim.model.camera(i).name for i in range(sim.model.ncam)].index("track")
        context = OffscreenContext(sim)
        try:
            context.render(width, height, camera)
            picture: Picture = context.read_pixels(width, height, depth=False)
            return picture[::-1]
        finally:
            context.close()

    def close(self) -> None:
        """Free the environment."""
        self._env.close()

    def get_dataset(self, h5path: str | Path | None = None) -> dict[str, NDArray[Any]]:
        """The raw arrays of a dataset in D4RL's layout.

        Args:
            h5path: an HDF5 file; by default `dataset_file`, else the file that belongs to `name`,
                downloaded if it is not in D4RL's folder.

        Returns:
            observations (num_steps, observation_dim), actions (num_steps, action_dim), rewards,
            terminals and timeouts (num_steps,), of the file's own dtypes.

        Raises:
            ValueError: no dataset has this name, or the file is not as above.
            FileNotFoundError, ConnectionError: no such file, or it cannot be downloaded.

        Source: d4rl/offline_env.py:62-93.
        """
        path = Path(h5path) if h5path is not None else self._dataset_file or self._fetch()
        found, _ = read_hdf5(path)
        arrays = {key: _find(found, names, path) for key, names in _KEYS.items()}
        num_steps = len(arrays["observations"])
        for key in ("rewards", "terminals", "timeouts"):
            values = arrays[key]
            arrays[key] = values = values[:, 0] if values.shape == (num_steps, 1) else values
            require(values.shape == (num_steps,), f"{path}: {key}", f"({num_steps},)", values.shape)
        self._check_widths(arrays, path)
        return arrays

    def get_normalized_score(self, score: float) -> float:
        """D4RL's score of a return, `(score - min) / (max - min)`: 1.0, not 100, is the expert's.

        Raises:
            ValueError: no reference scores of this name are known.

        Source: d4rl/offline_env.py:49-52.
        """
        ref_scores = find_ref_scores(self.name) or find_ref_scores(self._spec_id)
        if ref_scores is None:
            refuse("name", "a dataset with reference scores", self.name)
        return float(normalized_score(score, ref_scores)) / 100.0

    def _get_obs(self) -> NDArray[np.float64]:
        return self._pad(self._env.unwrapped._get_obs())

    def __getattr__(self, key: str) -> Any:
        if key == "_env":  # not there before __init__, as while unpickling
            raise AttributeError(key)
        return getattr(self._env.unwrapped, key)

    @property
    def _spec_id(self) -> str | None:
        return getattr(getattr(self._env, "spec", None), "id", None)

    @cached_property
    def _bare(self) -> LegacyEnv:
        return LegacyEnv(
            self._env.unwrapped,
            name=self.name,
            max_episode_steps=self.max_episode_steps,
            dataset_file=self._dataset_file,
        )

    def _count_missing(self) -> int:
        """Dimensions that D4RL's observations have and these have not."""
        [width] = self._env.observation_space.shape
        is_ant = self.name.lower().split("-")[0] == "ant" and find_dataset(self.name) is not None
        return _ANT_DIM - _ANT_STATE_DIM if is_ant and width == _ANT_STATE_DIM else 0

    def _pad(self, observation: Any) -> NDArray[np.float64]:
        values = np.asarray(observation, np.float64)
        return np.concatenate([values, np.zeros(self._num_missing)])

    def _fetch(self) -> Path:
        info = find_dataset(self.name)
        if info is None:
            refuse("dataset_file", f"an HDF5 file, as {self.name!r} is no dataset of D4RL's", None)
        return fetch_dataset(info)

    def _check_widths(self, arrays: dict[str, NDArray[Any]], path: Path) -> None:
        num_steps = len(arrays["observations"])
        for key, space in (
            ("observations", self.observation_space),
            ("actions", self.action_space),
        ):
            wanted, got = (num_steps, *space.shape), arrays[key].shape
            require(wanted == got, f"{path}: {key}", f"shape {wanted} for {self.name}", got)


def make_legacy(
    name: str, *, max_episode_steps: int | None = None, dataset_file: str | Path | None = None
) -> LegacyEnv:
    """What gym's `make` returned after `import d4rl`: the environment of a D4RL dataset.

    Args:
        name: D4RL's name of a dataset, "hopper-medium-v2"; gym's -v2 or -v3 id of a MuJoCo
            environment, which becomes Gymnasium's -v4; or any Gymnasium id.
        max_episode_steps: the time limit to report; by default D4RL's or Gymnasium's.
        dataset_file: see `LegacyEnv`.

    Raises:
        ImportError: Gymnasium or MuJoCo is missing.
        ValueError: no such environment, or one whose observations are not flat (kitchen, antmaze).
    """
    info = find_dataset(name)
    env_id = info.env_id if info else name
    old = env_id.removesuffix("-v2").removesuffix("-v3")
    if old != env_id and find_ref_scores(env_id) is not None:
        env_id = f"{old}-v4"
    try:
        env = make_env(env_id).env
    except ValueError as error:
        if info is not None:
            raise
        nearest = ", ".join(nearest_names(name))
        raise ValueError(f"{error} D4RL's nearest names: {nearest}") from error
    own_steps = info.max_episode_steps if info else env.spec.max_episode_steps
    steps = own_steps if max_episode_steps is None else max_episode_steps
    if steps is not None:
        from gymnasium.wrappers import TimeLimit

        env = TimeLimit(env.unwrapped, require_int("max_episode_steps", steps, 1))
    return LegacyEnv(env, name=name, max_episode_steps=steps, dataset_file=dataset_file)


def _find(found: dict[str, NDArray[Any]], names: tuple[str, ...], path: Path) -> NDArray[Any]:
    for name in names:
        if name in found:
            return found[name]
    raise ValueError(f"{path}: {names[0]}: expected in the file, got only {sorted(found)}")
