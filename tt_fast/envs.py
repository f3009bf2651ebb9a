"""Gymnasium environments as the planner needs them: flat observations, bounded continuous actions.

Gymnasium and MuJoCo are imported inside functions: training needs neither.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tt_fast.config import ModelConfig
from tt_fast.data.registry import trim_observations
from tt_fast.validate import require

MUJOCO_EXTRA = 'pip install "tt_fast[mujoco]"'


class StepResult(NamedTuple):
    """What an environment answers to an action."""

    observation: NDArray[np.float64]
    """(observation_dim,)"""
    reward: float
    terminated: bool
    """The task ended."""
    truncated: bool
    """A time limit ended the episode."""


@dataclass(frozen=True)
class ControlEnv:
    """One Gymnasium environment whose observations are trimmed as its dataset's are."""

    env: Any
    """The `gymnasium.Env`."""
    env_id: str
    observation_dim: int
    """Width of an observation after trimming (ant 27, kitchen 30)."""
    action_bounds: tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
    """Lowest and highest action, (action_dim,) each, float64 where the action space is; infinite
    where there is no bound."""

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return len(self.action_bounds[0])

    @property
    def max_episode_steps(self) -> int | None:
        """Steps that an episode may have; None without a time limit."""
        own: int | None = getattr(self.env, "max_episode_steps", None)  # of D4RL's wrappers
        return own or getattr(self.env.spec, "max_episode_steps", None)

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Start the episode of this seed; its first observation, (observation_dim,)."""
        observation, _ = self.env.reset(seed=seed)
        return self._trim(observation)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Apply an action (action_dim,), clipped to the bounds."""
        # a float32 next to a float64 bound may lie outside; a copy, as environments may write to it
        inside = np.clip(action, *self.action_bounds)
        observation, reward, terminated, truncated, _ = self.env.step(inside)
        return StepResult(self._trim(observation), float(reward), bool(terminated), bool(truncated))

    def mujoco_state(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Copies of MuJoCo's qpos (nq,) and qvel (nv,); None in another engine."""
        data: Any = getattr(self.env.unwrapped, "data", None)
        if not (hasattr(data, "qpos") and hasattr(data, "qvel")):
            return None
        return np.array(data.qpos, dtype=np.float64), np.array(data.qvel, dtype=np.float64)

    def set_mujoco_state(self, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> None:
        """Put MuJoCo's simulation into a state: qpos (nq,) in m and rad, qvel (nv,) per s."""
        self.env.unwrapped.set_state(qpos, qvel)

    def render(self) -> NDArray[np.uint8]:
        """The current picture, (height, width, 3); needs `make_env(..., render=True)`."""
        return np.asarray(self.env.render(), dtype=np.uint8)

    def close(self) -> None:
        """Free the environment and its renderer."""
        self.env.close()

    def _trim(self, observation: Any) -> NDArray[np.float64]:
        return _trimmed(observation, self.env_id)


def check_env(
    env: ControlEnv, model: ModelConfig, max_steps: int | None, owner: str = "the model"
) -> None:
    """A model of this shape can act in the environment, and its episodes end.

    Args:
        max_steps: what ends them where there is no time limit.
        owner: whose shape it is, for the message.

    Raises:
        ValueError: it cannot, or they do not.
    """
    for name in ("observation_dim", "action_dim"):
        wanted, got = getattr(model, name), getattr(env, name)
        require(wanted == got, f"{name} of {env.env_id}", f"{owner}'s {wanted}", got)
    limited = max_steps is not None or env.max_episode_steps is not None
    wanted = f"a number of steps, as {env.env_id} has no time limit"
    require(limited, "max_steps", wanted, max_steps)


def make_env(env_id: str, *, render: bool = False) -> ControlEnv:
    """Make an environment and check that a planner can act in it.

    Args:
        env_id: Gymnasium id, e.g. "Hopper-v4", or "module:id" where a module registers it.
        render: make pictures off-screen; see `choose_opengl`.

    Raises:
        ImportError: Gymnasium, MuJoCo or the module of `env_id` is missing.
        ValueError: no such environment, or a discrete, dict, tuple or image space.
    """
    if render:
        choose_opengl()
    env = _make_gymnasium(env_id, "rgb_array" if render else None)
    try:
        return _check_spaces(env, env_id)
    except ValueError:
        env.close()
        raise


def wrap_env(env: Any, env_id: str | None = None) -> ControlEnv:
    """An environment object, not a registered id, as the planner needs it.

    Args:
        env: a `gymnasium.Env`, or any object with gym's old interface: `reset() -> observation`,
            `step(action) -> (observation, reward, done, info)`, observation_space, action_space;
            `seed(n)` if it has one. `done` with info["TimeLimit.truncated"] is a truncation.
        env_id: what to call it; it tells how observations are trimmed, and D4RL's scores. By
            default the id of its spec, else the name of its class.

    Raises:
        ImportError: Gymnasium is missing.
        ValueError: no `reset` and `step`, or a discrete, dict, tuple or image space.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(f"environments need gymnasium: {MUJOCO_EXTRA}") from error
    acts = not isinstance(env, type) and all(
        callable(getattr(env, key, None)) for key in ("reset", "step")
    )
    require(acts, "env", "an environment with reset() and step(action)", env)
    if env_id is None:
        spec_id = getattr(getattr(env, "spec", None), "id", None)
        env_id = str(spec_id or type(env).__name__)
    modern = isinstance(env, gymnasium.Env)
    return _check_spaces(env if modern else _FourTupleEnv(env), env_id)


def require_flat_box(space: Any, name: str, env_id: str) -> None:
    """`space` is a one-dimensional Box, Gymnasium's or gym's.

    Raises:
        ValueError: it is discrete, a dict, a tuple or an image; the message shows it.
    """
    from gymnasium.spaces import Box

    is_box = isinstance(space, Box) or type(space).__name__ == "Box"
    label = f"{name} of {env_id}"
    is_image = is_box and len(space.shape) >= 2
    require(not is_image, label, "a 1-D Box (images are not supported)", space)
    require(is_box and len(space.shape) == 1, label, "a 1-D Box", space)


def choose_opengl() -> None:
    """Let MuJoCo draw without a display on Linux, unless MUJOCO_GL already says how.

    MuJoCo reads this variable when it makes a renderer, and offers no argument for it; its own
    default, GLFW, needs a running X server. EGL comes with the graphics driver or Mesa.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")


def engine_versions() -> dict[str, str | None]:
    """Versions of Gymnasium and, where an environment has loaded it, MuJoCo."""
    loaded = {name: sys.modules.get(name) for name in ("gymnasium", "mujoco")}
    return {name: getattr(module, "__version__", None) for name, module in loaded.items()}


class _FourTupleEnv:
    """An object with gym's old interface, seen through Gymnasium's."""

    def __init__(self, env: Any) -> None:
        self._env = env
        # gym 0.26, whose wrappers take anything and pass it on; those of older ones have `seed`
        parameters = inspect.signature(env.reset).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._has_seed = callable(getattr(env, "seed", None))
        self._seeds_reset = "seed" in parameters or (takes_any and not self._has_seed)

    @property
    def spec(self) -> Any:
        """The registration, if the object knows its own."""
        return getattr(self._env, "spec", None)

    @property
    def unwrapped(self) -> Any:
        """The object inside all wrappers."""
        return getattr(self._env, "unwrapped", self._env)

    def reset(self, *, seed: int) -> tuple[Any, dict[str, Any]]:
        """First observation (observation_dim,) of the seed's episode, if the object takes seeds."""
        if self._seeds_reset:
            found = self._env.reset(seed=seed)
        else:
            if self._has_seed:
                self._env.seed(seed)
            found = self._env.reset()
        return (found[0] if isinstance(found, tuple) else found), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        result = self._env.step(action)
        if len(result) == 5:
            return tuple(result)
        require(len(result) == 4, "env.step", "(observation, reward, done, info)", result)
        observation, reward, done, info = result
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        return observation, float(reward), bool(done) and not truncated, truncated, info

    def __getattr__(self, key: str) -> Any:
        if key == "_env":  # not there before __init__
            raise AttributeError(key)
        return getattr(self._env, key)


def _check_spaces(env: Any, env_id: str) -> ControlEnv:
    """A planner can act in `env`."""
    for name in ("observation_space", "action_space"):
        require_flat_box(getattr(env, name, None), name, env_id)
    width = len(_trimmed(np.zeros(env.observation_space.shape), env_id))
    space = env.action_space
    is_double = np.asarray(space.low).dtype == np.float64
    dtype: type[np.floating[Any]] = np.float64 if is_double else np.float32
    bounds = (np.asarray(space.low, dtype), np.asarray(space.high, dtype))
    return ControlEnv(env, env_id, width, bounds)


def _make_gymnasium(env_id: str, render_mode: str | None) -> Any:
    """`gymnasium.make`, its failures told apart."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(f"environments need gymnasium: {MUJOCO_EXTRA}") from error
    try:
        with warnings.catch_warnings():
            # D4RL's scores belong to the physics of -v4, "out of date" to Gymnasium
            warnings.filterwarnings("ignore", message=".*is out of date")
            return gymnasium.make(env_id, render_mode=render_mode)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        missing = importlib.util.find_spec("mujoco") is None
        hint = f"; MuJoCo's environments need {MUJOCO_EXTRA}" if missing else ""
        raise ImportError(f"env_id {env_id!r} cannot be made: {error}{hint}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"env_id: expected a Gymnasium id, got {env_id!r}: {error}") from error


def _trimmed(observation: Any, env_id: str) -> NDArray[np.float64]:
    # (width of the environment's,) -> (observation_dim,), a copy: environments may reuse theirs
    return np.array(trim_observations(np.asarray(observation), env_id), dtype=np.float64)
