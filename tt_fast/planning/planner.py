"""Act in environments with a trained model: observe, plan, act, remember.

Source: scripts/plan.py:66-110 and trajectory/search/utils.py of the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import DEFAULT_DISCOUNT, PlanConfig
from tt_fast.discretizer import Floats, Tokens
from tt_fast.planning.base import Draws, ImaginedPlan
from tt_fast.planning.search import check_deadline, check_overflow, check_plan, make_backend
from tt_fast.validate import (
    refuse,
    require,
    require_choice,
    require_int,
    require_number,
    require_type,
)

#: Stands for the unknown value of a past transition; no later position sees it (utils.py:8).
VALUE_PLACEHOLDER = 1e6


@dataclass
class _Clock:
    """One environment: where it is in its episode, what the planner remembers of it."""

    seed: int
    history: list[Tokens] = field(default_factory=list)
    """Past transitions, (transition_dim,) each, newest last"""
    step: int = 0
    plan_index: int = 0
    plan: ImaginedPlan | None = None
    plan_age: int = 0
    """Steps taken since it was made"""
    pending: tuple[Floats, Floats] | None = None
    """Observation and action that wait for their reward"""
    ended: bool = False


class Planner:
    """Plans an action for every observation, one environment or a batch of them.

    Call `act`, step the environment, call `observe`, and `reset` before a new episode.

    Args:
        checkpoint: model, discretizer and metadata.
        plan_config: default `PlanConfig()`. A discount of None takes the checkpoint's.
        backend: "auto" or a backend's name.
        seed: environment i draws with seed + i.
        num_envs: None for one environment and unbatched arrays; n for a batch, each environment
            with its own clock.
        plan_freq: steps between two plans; in between the last plan's next actions are taken.
        prefix_context: condition on past transitions, not only on the observation.
        action_bounds: (low, high), arrays that broadcast to (action_dim,); actions are clipped to
            them.
        num_threads: of the cpu backend; None takes every processor this process may use.
        deadline_ms: `act` returns the best plan found in this time, in milliseconds (cpu backend
            only): with fewer steps or beams than asked, see `ImaginedPlan`. Plans then depend on
            the clock. A shorter plan than plan_freq is followed by a new one when it is used up.
            The first plan packs the weights, too, and is late by that: where it matters, act once
            and `reset`.

    Raises:
        ValueError: a checkpoint without discretizer, settings that do not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan_config: PlanConfig | None = None,
        backend: str = "auto",
        seed: int = 0,
        *,
        num_envs: int | None = None,
        plan_freq: int = 1,
        prefix_context: bool = True,
        action_bounds: tuple[ArrayLike, ArrayLike] | None = None,
        num_threads: int | None = None,
        deadline_ms: float | None = None,
    ) -> None:
        require_type("checkpoint", checkpoint, Checkpoint, " (Checkpoint.load reads a folder)")
        config = PlanConfig() if plan_config is None else plan_config
        require_type("plan_config", config, PlanConfig)
        if checkpoint.discretizer is None:
            refuse("checkpoint", "one with a discretizer", "discretizer=None")
        discount = checkpoint.metadata.get("discount")
        discount = DEFAULT_DISCOUNT if discount is None else discount
        require_number("checkpoint.metadata['discount']", discount, 0.0, 1.0)
        self.checkpoint = checkpoint
        self.plan_config = config.with_discount(discount)
        self.discretizer = checkpoint.discretizer
        model = checkpoint.model.config
        check_plan(model, self.plan_config)
        self.seed = require_int("seed", seed, 0)
        self.plan_freq = require_int("plan_freq", plan_freq, 1, self.plan_config.horizon)
        self.num_envs = None if num_envs is None else require_int("num_envs", num_envs, 1)
        require_choice("prefix_context", prefix_context, (False, True))
        self.prefix_context = bool(prefix_context)
        self.num_plans = 0
        self._model_config = model
        self._bounds = _check_bounds(action_bounds, model.action_dim)
        self._max_history = self._history_capacity()
        self.num_threads, self.deadline_ms = num_threads, deadline_ms
        self._backend = make_backend(
            backend, checkpoint.model, self.discretizer, num_threads=num_threads
        )
        check_deadline(self._backend, deadline_ms)
        self._clocks = [_Clock(self.seed + i) for i in range(self.num_envs or 1)]

    @property
    def backend_name(self) -> str:
        """The backend in use."""
        return self._backend.name

    @property
    def last_plan(self) -> ImaginedPlan | list[ImaginedPlan | None] | None:
        """The newest plan as numbers of the environment; a batch has a list of them."""
        plans = [clock.plan for clock in self._clocks]
        return plans[0] if self.num_envs is None else plans

    def replicate(
        self, num_envs: int, action_bounds: tuple[ArrayLike, ArrayLike] | None = None
    ) -> Planner:
        """A batched planner with this one's model and settings, and fresh clocks.

        Args:
            num_envs: of the new one.
            action_bounds: within this one's, which stay where these are wider.

        Raises:
            ValueError: bounds that have no action in common with this one's.
        """
        return type(self)(
            self.checkpoint,
            self.plan_config,
            self.backend_name,
            self.seed,
            num_envs=num_envs,
            plan_freq=self.plan_freq,
            prefix_context=self.prefix_context,
            action_bounds=self._narrowed(action_bounds),
            num_threads=self.num_threads,
            deadline_ms=self.deadline_ms,
        )

    def _narrowed(
        self, bounds: tuple[ArrayLike, ArrayLike] | None
    ) -> tuple[ArrayLike, ArrayLike] | None:
        """These bounds within this planner's own."""
        theirs = _check_bounds(bounds, self._model_config.action_dim)
        if theirs is None or self._bounds is None:
            return self._bounds if theirs is None else theirs
        return np.maximum(theirs[0], self._bounds[0]), np.minimum(theirs[1], self._bounds[1])

    def reset(self, env_idx: int | None = None, *, seed: int | None = None) -> None:
        """Forget an environment's episode, or all of them.

        Args:
            env_idx: which one; None for all.
            seed: the environment draws with this one from now on; of all, environment i with
                seed + i. None keeps the seeds.
        """
        base = None if seed is None else require_int("seed", seed, 0)
        if env_idx is not None:
            env_idx = require_int("env_idx", env_idx, 0, len(self._clocks) - 1)
            self._clocks[env_idx] = _Clock(self._clocks[env_idx].seed if base is None else base)
            return
        for i, clock in enumerate(self._clocks):
            self._clocks[i] = _Clock(clock.seed if base is None else base + i)

    def act(self, observation: ArrayLike, active: ArrayLike | None = None) -> NDArray[np.float32]:
        """Choose actions.

        Args:
            observation: (observation_dim,), or (num_envs, observation_dim) for a batch.
            active: (num_envs,) bool, batches only: the environments that take part; the others are
                left untouched.

        Returns:
            (action_dim,) or (num_envs, action_dim) float32; rows that are not active are zero. A
            bound that float32 does not hold is rounded: a float64 action space may clip it again.

        Raises:
            ValueError: wrong shape, NaN or Inf; nothing has been remembered then.
            RuntimeError: an environment still waits for `observe`, or its episode has ended.
        """
        env_ids = self._active_ids(active)
        rows = self._check_rows("observation", observation, self._model_config.observation_dim)
        _require_finite_rows("observation", rows, env_ids)
        for i in env_ids:
            self._check_may_act(i)
        self._plan([i for i in env_ids if self._needs_plan(self._clocks[i])], rows)

        actions = np.zeros((len(self._clocks), self._model_config.action_dim))
        for i in env_ids:
            clock = self._clocks[i]
            assert clock.plan is not None
            action = clock.plan.actions[clock.plan_age]
            actions[i] = action if self._bounds is None else np.clip(action, *self._bounds)
            clock.pending = (rows[i].copy(), actions[i].copy())
        chosen = actions.astype(np.float32)
        return chosen[0] if self.num_envs is None else chosen

    def observe(self, reward: ArrayLike, terminated: ArrayLike = False) -> None:
        """Remember what the last actions earned.

        Args:
            reward: a number, or (num_envs,) for a batch; rows of environments that did not act are
                ignored.
            terminated: likewise, or one for all; an environment that terminated must be reset
                before it acts.

        Raises:
            ValueError: wrong shape, NaN or Inf; nothing has been remembered then.
            RuntimeError: no action waits for a reward.
        """
        env_ids = [i for i, clock in enumerate(self._clocks) if clock.pending is not None]
        if not env_ids:
            raise RuntimeError("observe: expected after act, got no action that waits for a reward")
        rewards = self._check_rewards(reward)
        ended = self._check_flags(terminated)
        _require_finite_rows("reward", rewards[:, None], env_ids)
        for i in env_ids:
            self._remember(self._clocks[i], rewards[i])
            self._clocks[i].ended = bool(ended[i])

    # ---- planning ----

    def _needs_plan(self, clock: _Clock) -> bool:
        return clock.plan is None or clock.plan_age >= min(self.plan_freq, len(clock.plan.actions))

    def _plan(self, env_ids: Sequence[int], observations: Floats) -> None:
        """New plans for these environments, in one call of the backend."""
        if not env_ids:
            return
        clocks = [self._clocks[i] for i in env_ids]
        width = self._model_config.observation_dim
        now = self.discretizer.encode(observations[list(env_ids)], slice(0, width))
        contexts = [
            np.concatenate([*clock.history, tokens])
            for clock, tokens in zip(clocks, now, strict=True)
        ]
        draws = Draws(tuple(c.seed for c in clocks), tuple(c.plan_index for c in clocks))
        plans = self._backend.plan(contexts, self.plan_config, draws, deadline_ms=self.deadline_ms)
        for i, clock in enumerate(clocks):
            tokens, num_beams = plans.tokens_of(i), plans.num_beams_of(i, self.plan_config)
            score = float(plans.scores[i])
            clock.plan = ImaginedPlan.decode(tokens, score, self.discretizer, width, num_beams)
            clock.plan_age = 0
            clock.plan_index += 1
        self.num_plans += len(clocks)

    def _remember(self, clock: _Clock, reward: float) -> None:
        """Add the pending transition to the history (utils.py:29-47)."""
        assert clock.pending is not None
        observation, action = clock.pending
        row = np.concatenate([observation, action, [reward, VALUE_PLACEHOLDER]])
        clock.history.append(self.discretizer.encode(row[None])[0])
        del clock.history[: max(0, len(clock.history) - self._max_history)]
        clock.pending = None
        clock.step += 1
        clock.plan_age += 1

    def _history_capacity(self) -> int:
        """Past transitions that can ever matter to a plan."""
        config, num_transitions = self.plan_config, self._model_config.num_transitions
        if not self.prefix_context:
            capacity = 0
        elif config.max_context_transitions is not None:
            capacity = config.max_context_transitions
        else:
            room = config.horizon if config.overflow == "grow" else 0
            capacity = max(0, num_transitions - room)
        check_overflow(self._model_config, config, capacity)
        return capacity

    # ---- checks ----

    def _check_may_act(self, env_idx: int) -> None:
        clock = self._clocks[env_idx]
        if clock.pending is not None:
            raise RuntimeError(f"act: expected observe first, environment {env_idx} waits for it")
        if clock.ended:
            raise RuntimeError(f"act: expected reset first, environment {env_idx} has terminated")

    def _active_ids(self, active: ArrayLike | None) -> list[int]:
        if active is None:
            return list(range(len(self._clocks)))
        require(self.num_envs is not None, "active", "None without num_envs", active)
        mask = np.asarray(active)
        shape_ok = mask.shape == (self.num_envs,) and mask.dtype == np.bool_
        require(shape_ok, "active", f"({self.num_envs},) bool", f"{mask.dtype} {mask.shape}")
        return [int(i) for i in np.flatnonzero(mask)]

    def _check_rows(self, name: str, values: Any, width: int) -> Floats:
        """(n, width) float64 from one row or a batch of them."""
        shape = (width,) if self.num_envs is None else (self.num_envs, width)
        return _as_floats(name, values, shape).reshape(-1, width)

    def _check_rewards(self, reward: Any) -> Floats:
        """(n,) float64 from one number or a batch of them."""
        shape = () if self.num_envs is None else (self.num_envs,)
        return _as_floats("reward", reward, shape).reshape(-1)

    def _check_flags(self, terminated: Any) -> NDArray[np.bool_]:
        """(n,) bool from one flag or a batch of them."""
        flags, count = np.asarray(terminated), len(self._clocks)
        shapes = [()] if self.num_envs is None else [(), (count,)]
        fits = flags.dtype.kind in "biu" and flags.shape in shapes
        fits = fits and bool(np.isin(flags, (0, 1)).all())
        require(fits, "terminated", f"bool of shape {shapes[-1]}", terminated)
        return np.broadcast_to(flags.astype(np.bool_), (count,))


def _as_floats(name: str, values: Any, shape: tuple[int | None, ...]) -> Floats:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # of torch: a tensor that requires a gradient
        refuse(name, f"numbers of shape {shape}", values)
    require(array.dtype.kind in "biuf", name, f"numbers of shape {shape}", values)
    require(array.shape == shape, name, f"shape {shape}", array.shape)
    return array.astype(np.float64)


def _require_finite_rows(name: str, rows: Floats, env_ids: Sequence[int]) -> None:
    for i in env_ids:
        bad = np.flatnonzero(~np.isfinite(rows[i]))
        if bad.size:
            got = f"{rows[i, bad[0]]} at index {bad[0]} of environment {i}"
            refuse(name, "finite numbers", got)


def _check_bounds(
    bounds: tuple[ArrayLike, ArrayLike] | None, action_dim: int
) -> tuple[Floats, Floats] | None:
    if bounds is None:
        return None
    try:
        low, high = (np.broadcast_to(np.asarray(b, np.float64), (action_dim,)) for b in bounds)
    except (TypeError, ValueError) as error:
        expected = f"(low, high), each a number or ({action_dim},) numbers"
        raise ValueError(f"action_bounds: expected {expected}, got {bounds!r}") from error
    require(bool((low <= high).all()), "action_bounds", "low <= high", (low, high))
    return low, high
