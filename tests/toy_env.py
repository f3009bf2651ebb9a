"""A small environment and a scripted planner, for tests of what surrounds the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from tt_fast.config import ModelConfig, PlanConfig

TOY_ENV = "TTToy-v0"
OBSERVATION_DIM, ACTION_DIM = 3, 2


class ToyEnv(gymnasium.Env[Any, Any]):
    """Episodes of 3 to 9 steps, their length, noise and rewards a function of the reset's seed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (Gymnasium's own form)
    observation_space = Box(-10.0, 10.0, (OBSERVATION_DIM,), np.float64)
    action_space = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._length = int(self.np_random.integers(3, 10))
        self._step = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        reward = float(np.sum(action) + self._step)
        return self._observe(), reward, self._step == self._length, False, {}

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)

    def _observe(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, OBSERVATION_DIM)


class InPlaceEnv(gymnasium.Env[Any, Any]):
    """Reuses the array of its observation, which counts steps, and writes to the actions given."""

    observation_space = Box(-10.0, 10.0, (OBSERVATION_DIM,), np.float64)
    action_space = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self._observation = np.zeros(OBSERVATION_DIM)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._observation[:] = 0
        return self._observation, {}

    def step(self, action: Any) -> Any:
        action[:] = 7
        self._observation += 1
        return self._observation, 0.0, self._observation[0] == 5, False, {}


def register(env_id: str, entry_point: Any, **kwargs: Any) -> str:
    """Register an environment once; its id."""
    if env_id not in gymnasium.registry:
        gymnasium.register(id=env_id, entry_point=entry_point, **kwargs)
    return env_id


def register_toy() -> str:
    """Register `ToyEnv` with a time limit of 8 steps."""
    return register(TOY_ENV, ToyEnv, max_episode_steps=8)


class ScriptedPlanner:
    """The planner's interface; actions depend on seed, clock, observation and last reward."""

    backend_name = "scripted"
    plan_freq = 1
    prefix_context = True
    deadline_ms = None

    def __init__(self, num_envs: int | None = None, **metadata: Any) -> None:
        config = ModelConfig(OBSERVATION_DIM, ACTION_DIM)
        self.checkpoint = SimpleNamespace(metadata=metadata, model=SimpleNamespace(config=config))
        self.plan_config = PlanConfig(discount=0.99)
        self.num_envs = num_envs
        self.replicas: list[ScriptedPlanner] = []
        count = num_envs or 1
        self.clocks, self.seeds = [0] * count, [0] * count
        self.reward = np.zeros(count)
        self.terminated = np.zeros(count, dtype=bool)
        self.last_plan: list[Any] = [None] * count
        self.action_bounds: Any = None
        self.clocks_seen: list[tuple[int, ...]] = []

    def replicate(self, num_envs: int, action_bounds: Any = None) -> ScriptedPlanner:
        replica = type(self)(num_envs, **self.checkpoint.metadata)
        replica.action_bounds = action_bounds
        self.replicas.append(replica)
        return replica

    def reset(self, env_idx: int, *, seed: int) -> None:
        self.clocks[env_idx], self.seeds[env_idx] = 0, seed
        self.reward[env_idx], self.terminated[env_idx] = 0.0, False

    def act(self, observation: Any, active: Any) -> Any:
        assert observation.shape == (self.num_envs, OBSERVATION_DIM)
        self._acting = np.flatnonzero(active)
        actions = np.zeros((self.num_envs, ACTION_DIM), np.float32)
        for i in self._acting:
            assert not self.terminated[i], "acted after a termination without a reset"
            noise = np.random.default_rng([self.seeds[i], self.clocks[i]]).uniform(-1, 1, 2)
            drive = noise + observation[i, :2] + self.reward[i]
            actions[i] = np.tanh(drive)
            self.last_plan[i] = ("plan", self.seeds[i], self.clocks[i])
        self.clocks_seen.append(tuple(self.clocks[i] for i in self._acting))
        return actions

    def observe(self, reward: Any, terminated: Any) -> None:
        for i in self._acting:
            self.clocks[i] += 1
            self.reward[i], self.terminated[i] = reward[i], terminated[i]
