"""Collect a dataset: a policy acts in an environment, every step becomes a row of a D4RL file."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from tt_fast.data.hdf5 import DatasetWriter
from tt_fast.envs import ControlEnv, make_env
from tt_fast.files import require_output
from tt_fast.validate import require, require_int

# Whole episodes are written when they come to so much; an interruption loses what is not written.
FLUSH_ROWS = 4096
FLUSH_SECONDS = 10.0

Rows = dict[str, NDArray[Any]]


class _Policy(Protocol):
    """Acts in one environment, with randomness of its own."""

    name: str

    def seed(self, seed: int) -> None:
        """Start an episode: the same seed, the same actions."""

    def act(self, observation: NDArray[np.float64]) -> Any:
        """An action (action_dim,) for an observation (observation_dim,)."""


def collect(
    env_id: str,
    policy: str | os.PathLike[str] | Callable[[NDArray[np.float64]], Any],
    num_transitions: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write `num_transitions` steps of a policy to an HDF5 file in D4RL's layout.

    Keys: observations, actions (float32), rewards (float32), terminals, timeouts (bool), for MuJoCo
    environments infos/qpos and infos/qvel (float64, before the action), and metadata/{environment,
    policy, seed}. The last episode is cut at the last row, which counts as a timeout.

    Rows go to `<out>.partial`, renamed when all are there. After an interruption, the next call
    with the same environment, policy and seed continues after the whole episodes written so far;
    the file holds what an uninterrupted call writes, because episode j always uses `seed + j`.

    Args:
        env_id: Gymnasium id, e.g. "Hopper-v4".
        policy: "random"; a .zip of stable-baselines3, whose policy is sampled (its pickles can run
            code: only open files that you trust); "module:callable"; or a callable. A callable maps
            observations, float64 (observation_dim,), to actions (action_dim,), which are clipped to
            the action space; if it is random it needs a method `seed(int)`, called every episode.
        num_transitions: rows of the file.
        out: path of a file that does not exist yet.
        seed: of the first episode.
        progress: show a bar.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: `out` exists.
        ValueError: an unknown policy, a partial file of other settings, an action that is no finite
            vector of the right width, or an environment without flat spaces.
        ImportError: gymnasium, stable-baselines3 or the policy's module is missing.
    """
    require_int("num_transitions", num_transitions, 1)
    require_int("seed", seed, 0, 2**31 - 1)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out: expected a new file, got the existing {out}")
    require_output("out", out)
    env = make_env(env_id)
    try:
        actor = _find_policy(policy, env)
        partial = out.with_name(f"{out.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _open_partial(partial, env_id, actor.name, seed) as writer:
            _fill(writer, env, actor, num_transitions, seed, progress)
    finally:
        env.close()
    partial.replace(out)
    return out


def _open_partial(partial: Path, env_id: str, policy: str, seed: int) -> DatasetWriter:
    try:
        return DatasetWriter(partial, {"environment": env_id, "policy": policy, "seed": seed})
    except ValueError as error:
        raise ValueError(
            f"{error}. It is left from an interrupted collection that cannot be continued with "
            "these settings: delete it to start anew, or choose another out."
        ) from error


def _fill(
    writer: DatasetWriter,
    env: ControlEnv,
    policy: _Policy,
    num_transitions: int,
    seed: int,
    progress: bool,
) -> None:
    """Append whole episodes until the file has `num_transitions` rows; the last one may be cut."""
    num_rows, episode = writer.num_rows, writer.num_episodes
    expected = f"at least the {num_rows} rows of the interrupted collection"
    require(num_rows <= num_transitions, "num_transitions", expected, num_transitions)
    pending: list[Rows] = []
    flushed_at = time.monotonic()
    try:
        with tqdm(
            total=num_transitions, initial=num_rows, unit="step", disable=not progress
        ) as bar:
            while num_rows < num_transitions:
                rows = _run_episode(env, policy, seed + episode, num_transitions - num_rows, bar)
                pending.append(rows)
                num_rows += len(rows["rewards"])
                episode += 1
                is_full = num_rows - writer.num_rows >= FLUSH_ROWS
                if is_full or time.monotonic() - flushed_at >= FLUSH_SECONDS:
                    _flush(writer, pending)
                    flushed_at = time.monotonic()
    finally:
        _flush(writer, pending)


def _flush(writer: DatasetWriter, pending: list[Rows]) -> None:
    """Write the whole episodes that wait, once: Ctrl-C may come when they are written."""
    if not pending:
        return
    num_rows = writer.num_rows
    try:
        writer.append({key: np.concatenate([r[key] for r in pending]) for key in pending[0]})
    finally:
        if writer.num_rows > num_rows:
            pending.clear()


def _run_episode(env: ControlEnv, policy: _Policy, seed: int, max_steps: int, bar: Any) -> Rows:
    """One episode as rows; its last one is a timeout if `max_steps` cut it."""
    steps: list[dict[str, Any]] = []
    observation = env.reset(seed)
    policy.seed(seed)
    done = False
    while not done:
        action = _check_action(policy.act(observation), env)
        state = env.mujoco_state()
        result = env.step(action)
        timeout = result.truncated or (len(steps) + 1 == max_steps and not result.terminated)
        done = result.terminated or timeout
        step = {
            "observations": observation.astype(np.float32),
            "actions": action,
            "rewards": np.float32(result.reward),
            "terminals": result.terminated,
            "timeouts": timeout,
        }
        if state is not None:
            step["infos/qpos"], step["infos/qvel"] = state
        steps.append(step)
        observation = result.observation
        bar.update()
    return {key: np.array([step[key] for step in steps]) for key in steps[0]}


def _check_action(action: Any, env: ControlEnv) -> NDArray[np.float32]:
    """float32 (action_dim,), within the bounds of the action space."""
    try:
        array = np.asarray(action, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"action: expected numbers, got {action!r}") from error
    require(array.shape == (env.action_dim,), "action", f"shape ({env.action_dim},)", array.shape)
    require(bool(np.isfinite(array).all()), "action", "finite numbers", array.tolist())
    low, high = env.action_bounds
    return np.clip(array, low, high).astype(np.float32)


def _find_policy(policy: Any, env: ControlEnv) -> _Policy:
    if callable(policy):
        return _CallablePolicy(getattr(policy, "__qualname__", type(policy).__qualname__), policy)
    text = os.fspath(policy)
    if text == "random":
        return _RandomPolicy(env)
    if text.endswith(".zip"):
        return _StableBaselinesPolicy(Path(text))
    if ":" in text:
        return _CallablePolicy(text, _import_callable(text))
    raise ValueError(f"policy: expected random, a .zip file or module:callable, got {text!r}")


def _import_callable(text: str) -> Callable[[NDArray[np.float64]], Any]:
    module_name, _, attribute = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"policy: no module {module_name!r} to import ({error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"policy: expected a callable {attribute!r} in {module_name}, got none")
    return function  # type: ignore[no-any-return]


class _RandomPolicy:
    """Uniform actions from the action space."""

    name = "random"

    def __init__(self, env: ControlEnv) -> None:
        self._space = env.env.action_space

    def seed(self, seed: int) -> None:
        self._space.seed(seed)

    def act(self, observation: NDArray[np.float64]) -> Any:
        return self._space.sample()


class _CallablePolicy:
    """A function of the observation, seeded if it can be."""

    def __init__(self, name: str, function: Callable[[NDArray[np.float64]], Any]) -> None:
        self.name = name
        self._function = function

    def seed(self, seed: int) -> None:
        seed_function = getattr(self._function, "seed", None)
        if callable(seed_function):
            seed_function(seed)

    def act(self, observation: NDArray[np.float64]) -> Any:
        return self._function(observation)


class _StableBaselinesPolicy:
    """The policy network of a stable-baselines3 .zip, whatever algorithm trained it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"policy: no file {path}")
        try:
            from stable_baselines3.common.save_util import load_from_zip_file
        except ImportError as error:
            raise ImportError(
                f"policy {path}: needs stable-baselines3: pip install stable-baselines3"
            ) from error
        self.name = path.name
        data, parameters, _ = load_from_zip_file(path, device="cpu")
        if data is None:
            raise ValueError(f"policy: expected a saved stable-baselines3 policy, got {path}")
        kwargs = dict(data["policy_kwargs"])
        if data.get("use_sde"):
            kwargs["use_sde"] = True
        # The learning rate, the third argument, plays no part in acting.
        self._policy = data["policy_class"](
            data["observation_space"], data["action_space"], lambda _: 0.0, **kwargs
        )
        self._policy.load_state_dict(parameters["policy"])

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)  # its policies draw from the global generator only

    def act(self, observation: NDArray[np.float64]) -> Any:
        return self._policy.predict(observation, deterministic=False)[0]
