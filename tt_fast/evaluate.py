"""Score a policy: play episodes in Gymnasium, count returns and decisions per second.

Environments run side by side, each at a step of its own: an episode goes to the first one that is
free, and its number seeds both environment and planner. So results do not depend on how many
environments there are.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from tt_fast.checkpoint import origin
from tt_fast.data.registry import find_ref_scores
from tt_fast.envs import ControlEnv, StepResult, check_env, engine_versions, make_env, wrap_env
from tt_fast.files import require_output
from tt_fast.results import EpisodeRecord, EvalResult, EvalSummary, aggregate
from tt_fast.validate import require, require_int

if TYPE_CHECKING:
    from tt_fast.planning import ImaginedPlan, Planner

__all__ = ["EpisodeRecord", "EvalResult", "EvalSummary", "aggregate", "evaluate", "pooled_setting"]


def evaluate(
    planner: Planner,
    env_id: str | None = None,
    episodes: int = 1,
    num_envs: int = 1,
    seed: int = 0,
    video: str | Path | None = None,
    *,
    env: Any = None,
    max_steps: int | None = None,
    record: bool = False,
    progress: bool = True,
    on_episode: Callable[[EvalResult], None] | None = None,
) -> EvalResult:
    """Let a planner play some episodes and score it.

    Episode j has environment and planner seed `seed + j`. The planner given is left as it is; a
    replica acts. Ctrl-C keeps the episodes that are finished.

    Args:
        planner: what acts.
        env_id: Gymnasium id; None takes the one of the checkpoint's dataset.
        episodes: how many.
        num_envs: environments side by side; their plans are made together.
        seed: of the first episode.
        video: MP4 to write of the first episode, its imagined plans beside it.
        env: an environment to play in, where none can be made by id: see `envs.wrap_env`, whose
            `env_id` is the one above. It plays alone (num_envs 1) and is left open.
        max_steps: end every episode after so many steps; needed where there is no time limit.
        record: keep the first episode in the result.
        progress: show a progress bar.
        on_episode: called with the result so far, which says that it is interrupted, when episodes
            have ended and others are still to be played; what it raises ends the evaluation.

    Raises:
        ImportError: Gymnasium, MuJoCo or what a video needs is missing.
        ValueError: no such environment, one that does not fit the model, a number out of range, or
            `env` with a video or num_envs above 1.
        RenderError: a video is asked for and this machine cannot draw it; known before playing.
        KeyboardInterrupt: Ctrl-C before any episode was finished.
    """
    expected = "a tt_fast.Planner, such as Planner(checkpoint)"
    require(hasattr(planner, "replicate"), "planner", expected, type(planner).__name__)
    episodes = require_int("episodes", episodes, 1)
    num_envs = require_int("num_envs", num_envs, 1)
    seed = require_int("seed", seed, 0)
    max_steps = None if max_steps is None else require_int("max_steps", max_steps, 1)
    if video is not None:
        require(Path(video).suffix == ".mp4", "video", "a name that ends in .mp4", str(video))
        require_output("video", video)
    if env is None:
        env_id = _resolve_env_id(planner, env_id)
        if video is not None:
            _rehearse(env_id, Path(video))
        envs = [make_env(env_id) for _ in range(min(num_envs, episodes))]
    else:
        require(num_envs == 1, "num_envs", "1, as there is one env", num_envs)
        require(video is None, "video", "None: only environments made by id are filmed", video)
        envs = [wrap_env(env, env_id)]
        env_id = envs[0].env_id
    try:
        check_env(envs[0], planner.checkpoint.model.config, max_steps)
        setting = pooled_setting(planner, env_id, max_steps)
        rollouts = _Rollouts(planner, envs, seed, setting, record or video is not None)
        rollouts.play(episodes, progress, on_episode)
    finally:
        for control_env in envs if env is None else []:
            control_env.close()
    result = rollouts.result()
    if video is not None and result.record is None:
        warnings.warn("no video was written: its episode was not finished", stacklevel=2)
    elif video is not None and result.record is not None:
        _film(result.record, env_id, seed, video)
    return result


def pooled_setting(
    planner: Planner, env_id: str | None = None, max_steps: int | None = None
) -> dict[str, Any]:
    """What results must have in common for `aggregate`, by their names; nothing is played for it.

    Args:
        planner, env_id, max_steps: as `evaluate` takes them.

    Raises:
        ValueError: no `env_id`, neither here nor in the checkpoint.
    """
    env_id, metadata = _resolve_env_id(planner, env_id), planner.checkpoint.metadata
    return {
        "env_id": env_id,
        "dataset": metadata.get("dataset"),
        "ref_scores": _ref_scores(metadata, env_id),
        "plan_config": planner.plan_config,
        "plan_freq": planner.plan_freq,
        "prefix_context": planner.prefix_context,
        "max_steps": max_steps,
        "deadline_ms": planner.deadline_ms,
    }


@dataclass
class _Episode:
    """One episode, running or finished."""

    idx: int
    observation: NDArray[np.float64]
    """(observation_dim,), the newest"""
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    recorder: _Recorder | None = None


class _Recorder:
    """Collects an `EpisodeRecord`."""

    def __init__(self, env: ControlEnv, observation: NDArray[np.float64]) -> None:
        self._env = env
        self._observations = [observation]
        self._states = [env.mujoco_state()]
        self._actions: list[NDArray[np.float32]] = []
        self._rewards: list[float] = []
        self._plans: list[ImaginedPlan] = []

    def add(self, action: NDArray[np.float32], step: StepResult, plan: ImaginedPlan | None) -> None:
        """One step, after the environment took it."""
        self._actions.append(action)
        self._plans += [] if plan is None else [plan]
        self._rewards.append(step.reward)
        self._observations.append(step.observation)
        self._states.append(self._env.mujoco_state())

    def record(self) -> EpisodeRecord:
        """Everything added so far."""
        states = [state for state in self._states if state is not None]
        return EpisodeRecord(
            observations=np.stack(self._observations),
            actions=np.stack(self._actions),
            rewards=np.array(self._rewards),
            qpos=np.stack([qpos for qpos, _ in states]) if states else None,
            qvel=np.stack([qvel for _, qvel in states]) if states else None,
            plans=tuple(self._plans),
        )


class _Rollouts:
    """Episodes playing in environments, each environment with its own clock."""

    def __init__(
        self,
        planner: Planner,
        envs: Sequence[ControlEnv],
        seed: int,
        setting: dict[str, Any],
        record: bool,
    ) -> None:
        self._checkpoint_step = planner.checkpoint.metadata.get("step")
        self._versions = {**origin()["versions"], **engine_versions()}
        self._planner = planner.replicate(len(envs), envs[0].action_bounds)
        self._envs = envs
        self._seed, self._setting, self._record = seed, setting, record
        # an environment without its wrappers knows its time limit and does not keep it
        limits = (setting["max_steps"], envs[0].max_episode_steps)
        self._step_limit = min(steps for steps in limits if steps is not None)
        self._running: dict[int, _Episode] = {}  # by environment
        self._finished: list[_Episode] = []
        self._num_started = 0
        self._num_decisions = 0
        self._planner_seconds = 0.0
        self._start = self._end = time.perf_counter()
        self._interrupted = True

    def play(
        self,
        episodes: int,
        progress: bool,
        on_episode: Callable[[EvalResult], None] | None,
    ) -> None:
        """Play so many episodes; Ctrl-C ends it early if one is finished."""
        self._start = time.perf_counter()
        try:
            self._play(episodes, progress, on_episode)
            self._interrupted = False
        except KeyboardInterrupt:
            if not self._finished:
                raise
        self._end = time.perf_counter()

    def result(self) -> EvalResult:
        """What was played, in the order of the seeds."""
        finished = sorted(self._finished, key=lambda episode: episode.idx)
        recorder = finished[0].recorder
        return EvalResult(
            **self._setting,
            returns=tuple(math.fsum(episode.rewards) for episode in finished),
            seed=self._seed,
            lengths=tuple(len(episode.rewards) for episode in finished),
            terminated=tuple(episode.terminated for episode in finished),
            backend=self._planner.backend_name,
            num_envs=len(self._envs),
            num_decisions=self._num_decisions,
            seconds=self._planner_seconds,
            wall_seconds=self._end - self._start,
            interrupted=self._interrupted,
            checkpoint_step=self._checkpoint_step,
            versions=self._versions,
            record=None if recorder is None else recorder.record(),
        )

    def _play(
        self,
        episodes: int,
        progress: bool,
        on_episode: Callable[[EvalResult], None] | None,
    ) -> None:
        # miniters=0: the bar also moves within an episode, which can take minutes
        with tqdm(total=episodes, unit="episode", miniters=0, disable=not progress) as bar:
            while len(self._finished) < episodes:
                self._fill(episodes)
                before = len(self._finished)
                self._step()
                num_finished = len(self._finished)
                bar.set_postfix(self._postfix(), refresh=False)
                bar.update(num_finished - before)
                if on_episode is not None and before < num_finished < episodes:
                    self._end = time.perf_counter()
                    on_episode(self.result())

    def _fill(self, episodes: int) -> None:
        """Start episodes in the environments that are free, while there are any to start."""
        for env_idx, env in enumerate(self._envs):
            if env_idx in self._running or self._num_started == episodes:
                continue
            idx = self._num_started
            self._num_started += 1
            observation = env.reset(self._seed + idx)
            self._planner.reset(env_idx, seed=self._seed + idx)
            recorder = _Recorder(env, observation) if self._record and idx == 0 else None
            self._running[env_idx] = _Episode(idx, observation, recorder=recorder)

    def _step(self) -> None:
        """One decision and one step in every environment with an episode."""
        actions = self._act()
        plans = self._planner.last_plan
        assert isinstance(plans, list)  # a replica is batched
        rewards = np.zeros(len(self._envs))
        terminated = np.zeros(len(self._envs), dtype=bool)
        ended = []
        for env_idx, episode in self._running.items():
            step = self._envs[env_idx].step(actions[env_idx])
            rewards[env_idx], terminated[env_idx] = step.reward, step.terminated
            if episode.recorder is not None:
                episode.recorder.add(actions[env_idx], step, plans[env_idx])
            episode.rewards.append(step.reward)
            episode.observation, episode.terminated = step.observation, step.terminated
            if step.terminated or step.truncated or len(episode.rewards) == self._step_limit:
                ended.append(env_idx)
        self._observe(rewards, terminated)
        self._finished.extend(self._running.pop(env_idx) for env_idx in ended)

    def _act(self) -> NDArray[np.float32]:
        """Actions (num_envs, action_dim); rows of environments without an episode mean nothing."""
        observations = np.zeros((len(self._envs), self._envs[0].observation_dim))
        active = np.zeros(len(self._envs), dtype=bool)
        for env_idx, episode in self._running.items():
            observations[env_idx], active[env_idx] = episode.observation, True
        start = time.perf_counter()
        actions = self._planner.act(observations, active)
        self._planner_seconds += time.perf_counter() - start
        self._num_decisions += len(self._running)
        return actions

    def _observe(self, rewards: NDArray[np.float64], terminated: NDArray[np.bool_]) -> None:
        start = time.perf_counter()
        self._planner.observe(rewards, terminated)
        self._planner_seconds += time.perf_counter() - start

    def _postfix(self) -> dict[str, str]:
        returns = [math.fsum(episode.rewards) for episode in self._finished]
        mean = {"mean_return": f"{np.mean(returns):.1f}"} if returns else {}
        return {**mean, "decisions/s": f"{self._num_decisions / self._planner_seconds:.3g}"}


def _rehearse(env_id: str, video: Path) -> None:
    """Film one step, so that a missing OpenGL or encoder shows before hours of planning."""
    from tt_fast.video import render_episode

    env = make_env(env_id)
    try:
        recorder = _Recorder(env, env.reset(seed=0))
        action = np.clip(np.zeros(env.action_dim), *env.action_bounds).astype(np.float32)
        recorder.add(action, env.step(action), None)
    finally:
        env.close()
    with tempfile.TemporaryDirectory() as folder:
        render_episode(recorder.record(), env_id, Path(folder) / video.name, seed=0)


def _film(record: EpisodeRecord, env_id: str, seed: int, video: str | Path) -> None:
    """Write the video; a failure is a warning, for the episodes are worth more."""
    from tt_fast.video import RenderError, render_episode

    try:
        render_episode(record, env_id, video, seed=seed)
    except (RenderError, OSError) as error:
        warnings.warn(f"no video was written: {error}", RuntimeWarning, stacklevel=3)


def _resolve_env_id(planner: Planner, env_id: str | None) -> str:
    found = env_id or planner.checkpoint.metadata.get("env_id")
    require(bool(found), "env_id", "a Gymnasium id, as the checkpoint names none", env_id)
    return str(found)


def _ref_scores(metadata: Mapping[str, Any], env_id: str) -> tuple[float, float] | None:
    """The dataset's own reference scores, if they are of this environment, else D4RL's."""
    stored = metadata.get("ref_scores")
    if stored is not None and metadata.get("env_id") in (None, env_id):
        low, high = stored
        return low, high
    return find_ref_scores(env_id)
