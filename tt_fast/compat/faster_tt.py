"""The planner of faster-trajectory-transformer by its own names and signatures.

    from tt_fast.compat.faster_tt import beam_plan, batch_beam_plan, vec_rollout

in place of `from trajectory.planning.beam import ...` and `from trajectory.utils.env import ...`.

Source: Howuhh/faster-trajectory-transformer at 213e58d. Its cached decoding attends to value
tokens, which its training hides, so its plans are not those of the model that was trained.
`semantics` chooses:

- "correct": the model as it was trained. Value tokens stay hidden, and a window that overflows is
  encoded again from position 0. Where context and plan fit into the window this is their search
  with their values hidden, and nothing else differs; the window is one token shorter than theirs.
  Random numbers are ours, seeded by one number of torch's global generator a call.
- "published": their own, token for token under the same seed of torch, so that published
  checkpoints behave as they were published.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_fast.checkpoint import Checkpoint
from tt_fast.compat.faster_tt_models import PublishedGPT, adopt, as_discretizer, config_of
from tt_fast.compat.faster_tt_published import PublishedPlan
from tt_fast.compat.faster_tt_published import plan as published_plan
from tt_fast.config import TEMPERATURES, ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.planning.base import Draws, ValueFn
from tt_fast.planning.search import check_context, check_plan
from tt_fast.validate import require, require_choice, require_int, require_number

Semantics: TypeAlias = Literal["correct", "published"]

#: One number of torch's global generator seeds a call; context i adds i.
_MAX_SEED = 2**62


@torch.no_grad()
def beam_plan(
    model: Any,
    discretizer: Any,
    context: Tensor,
    steps: int,
    beam_width: int,
    sample_expand: int,
    discount: float = 0.99,
    context_size: int | None = None,
    k_obs: int | None = 1,
    k_reward: int | None = 1,
    k_act: int | None = None,
    temperature: float = 1.0,
    *,
    semantics: Semantics = "correct",
) -> Tensor:
    """Their beam_plan (planning/beam.py:8-62).

    Args:
        model: their GPT, a `Checkpoint` or `TrajectoryTransformer` of ours, or a `PublishedGPT`.
            Weights are taken by name, once for each object, and again when they have changed.
            Dropout is off, whatever mode the model is in.
        discretizer: their KBinsDiscretizer, or a `Discretizer`; None takes a Checkpoint's.
        context: (1, context_len) tokens: past transitions, then the current observation.
        steps: transitions to plan.
        beam_width: beams kept after each.
        sample_expand: children of a beam.
        discount: of the score.
        context_size: crop the context to so many whole transitions, the current one counted;
            None: no crop.
        k_obs, k_reward, k_act: keep the k likeliest tokens; None keeps all.
        temperature: divides the logits of what is drawn, not of the estimates.
        semantics: see the module.

    Returns:
        (steps * transition_dim - observation_dim,) int64 tokens of the best plan, on the context's
        device: action, reward, value, next observation, action, and so on.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    is_one = isinstance(context, Tensor) and context.ndim == 2 and len(context) == 1
    require(is_one, "context", "a tensor (1, context_len)", _shape(context))
    settings = PublishedPlan(
        steps, beam_width, sample_expand, discount, k_obs, k_reward, k_act, temperature
    )
    return _plan(model, discretizer, context, context_size, settings, semantics)[0]


@torch.no_grad()
def batch_beam_plan(
    model: Any,
    discretizer: Any,
    context: Tensor,
    steps: int,
    beam_width: int,
    sample_expand: int,
    discount: float = 0.99,
    context_size: int | None = None,
    k_obs: int | None = 1,
    k_reward: int | None = 1,
    k_act: int | None = None,
    temperature: float = 1.0,
    *,
    semantics: Semantics = "correct",
) -> Tensor:
    """Their batch_beam_plan (planning/beam.py:65-147): contexts of one length, planned together.

    Args:
        context: (batch, context_len) tokens.
        model, discretizer, steps, beam_width, sample_expand, discount, context_size, k_obs,
            k_reward, k_act, temperature, semantics: as in `beam_plan`.

    Returns:
        (batch, steps * transition_dim - observation_dim) int64, on the context's device.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    settings = PublishedPlan(
        steps, beam_width, sample_expand, discount, k_obs, k_reward, k_act, temperature
    )
    return _plan(model, discretizer, context, context_size, settings, semantics)


@torch.no_grad()
def vec_rollout(
    vec_env: Any,
    model: Any,
    discretizer: Any,
    beam_context_size: int | None,
    beam_steps: int,
    beam_width: int,
    sample_expand: int = 1,
    k_reward: int | None = 1,
    k_act: int | None = None,
    k_obs: int | None = None,
    temperature: float = 1,
    discount: float = 0.99,
    plan_every: int = 1,
    max_steps: int = 1000,
    value_placeholder: float = 1e6,
    device: str | torch.device = "cpu",
    *,
    semantics: Semantics = "correct",
) -> NDArray[np.float64]:
    """Their vec_rollout (utils/env.py:115-193): one episode in each environment.

    Args:
        vec_env: as stable-baselines3's: num_envs; reset() -> observations (num_envs,
            observation_dim); step(actions) -> observations, rewards, dones, infos; an environment
            that is done resets itself.
        model, discretizer: as in `beam_plan`.
        beam_context_size, beam_steps: its context_size and steps.
        beam_width, sample_expand, k_reward, k_act, k_obs, temperature, discount, semantics: its.
        plan_every: steps between two plans.
        max_steps: longest episode, in steps.
        value_placeholder: stands for the unknown value of a past transition.
        device: of the contexts.

    Returns:
        (num_envs,) float64 rewards summed until each environment was first done. Environments that
        are done are stepped on with the lowest bin's action, as in the source, and not counted.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    require_int("beam_steps", beam_steps, 1)
    require_int("plan_every", plan_every, 1, beam_steps)
    require_int("max_steps", max_steps, 1)
    config, bins = config_of(model), as_discretizer(discretizer, model)
    episodes = _Episodes(config, bins, vec_env.reset(), max_steps, device, value_placeholder)
    for step in range(max_steps):
        if step % plan_every == 0:
            ahead = episodes.no_plans(beam_steps)
            ahead[torch.from_numpy(episodes.active)] = batch_beam_plan(
                model, bins, episodes.contexts(step), beam_steps, beam_width, sample_expand,
                discount, beam_context_size, k_obs, k_reward, k_act, temperature,
                semantics=semantics,
            )  # fmt: skip
        else:
            ahead = ahead[:, config.transition_dim :]
        tokens = ahead[:, : config.action_dim]
        observations, rewards, dones, _ = vec_env.step(episodes.decode(tokens))
        episodes.remember(step, tokens, observations, rewards, dones)
        if not episodes.active.any():
            break
    return episodes.returns


class _Episodes:
    """What vec_rollout knows of its environments."""

    def __init__(
        self,
        config: ModelConfig,
        discretizer: Discretizer,
        observations: NDArray[Any],
        max_steps: int,
        device: str | torch.device,
        value_placeholder: float,
    ) -> None:
        self.config, self.discretizer, self.placeholder = config, discretizer, value_placeholder
        count, obs = len(observations), config.observation_dim
        # one transition more: the last step's next observation (env.py:142)
        shape = (count, config.transition_dim * (max_steps + 1))
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.tokens[:, :obs] = self._encode(observations, slice(0, obs))
        self.active = np.ones(count, dtype=np.bool_)
        """(num_envs,) not done yet"""
        self.returns = np.zeros(count)

    def no_plans(self, steps: int) -> Tensor:
        """(num_envs, plan_len) zeros, what environments follow that are done."""
        length = steps * self.config.transition_dim - self.config.observation_dim
        return torch.zeros(len(self.tokens), length, dtype=torch.long, device=self.tokens.device)

    def contexts(self, step: int) -> Tensor:
        """(num_active, context_len) tokens up to this step's observation."""
        end = self.config.transition_dim * step + self.config.observation_dim
        return self.tokens[torch.from_numpy(self.active), :end]

    def decode(self, tokens: Tensor) -> NDArray[np.float64]:
        """(num_envs, action_dim) actions."""
        obs, act = self.config.observation_dim, self.config.action_dim
        return self.discretizer.decode(tokens.cpu().numpy(), slice(obs, obs + act))

    def remember(
        self,
        step: int,
        actions: Tensor,
        observations: NDArray[Any],
        rewards: NDArray[Any],
        dones: NDArray[Any],
    ) -> None:
        """Add a step to the contexts and returns of the environments that take part."""
        who, width, obs = self.active, self.config.transition_dim, self.config.observation_dim
        earned = np.column_stack([rewards, np.full(len(rewards), self.placeholder)])
        parts = [
            actions[torch.from_numpy(who)].to(self.tokens.device),
            self._encode(earned[who], slice(width - 2, width)),
            self._encode(np.asarray(observations)[who], slice(0, obs)),
        ]
        start = step * width + obs
        self.tokens[torch.from_numpy(who), start : start + width] = torch.cat(parts, dim=1)
        self.returns[who] += np.asarray(rewards)[who]
        self.active = who & ~np.asarray(dones, dtype=np.bool_)

    def _encode(self, values: NDArray[Any], dims: slice) -> Tensor:
        tokens = torch.from_numpy(self.discretizer.encode(values, dims))
        return tokens.to(self.tokens.device)


def _plan(
    model: Any,
    discretizer: Any,
    context: Any,
    context_size: int | None,
    settings: PublishedPlan,
    semantics: Semantics,
) -> Tensor:
    """(batch, plan_len) best plans; everything is checked here."""
    require_choice("semantics", semantics, ("correct", "published"))
    config, bins = config_of(model), as_discretizer(discretizer, model)
    inner = model.model if isinstance(model, Checkpoint) else model
    ours = _plan_config(settings, config, bins)
    is_batch = isinstance(context, Tensor) and context.ndim == 2 and len(context) >= 1
    require(is_batch, "context", "a tensor (batch, context_len)", _shape(context))
    cropped = _crop(context, context_size, config)
    rows = [check_context(f"context[{i}]", row, config) for i, row in enumerate(cropped)]
    highest = max(int(row.max()) for row in rows)
    fits = highest < config.vocab_size  # they have no stop token
    require(fits, "context", f"ids in [0, {config.vocab_size - 1}]", highest)
    if semantics == "correct":
        check_plan(config, ours)
        found = _correct(inner, bins, rows, ours)
    else:
        theirs = PublishedGPT.of(inner)
        centers = torch.from_numpy((bins.thresholds[1:] + bins.thresholds[:-1]) * 0.5).T
        tokens = cropped.long().to(theirs.device)
        found = published_plan(theirs, centers.to(theirs.device), tokens, settings)
    return found.to(context.device)


def _correct(
    model: Any, bins: Discretizer, contexts: list[NDArray[np.int64]], config: PlanConfig
) -> Tensor:
    backend, count = adopt(model, bins), len(contexts)
    seed = int(torch.randint(_MAX_SEED, ()))
    draws = Draws(tuple(seed + i for i in range(count)), (0,) * count)
    plan = backend.plan(contexts, config, draws, value_fn=_value_fn(config.temperature, bins))
    tokens = plan.tokens.reshape(count, -1)[:, config_of(model).observation_dim :]
    return torch.from_numpy(np.ascontiguousarray(tokens))


def _plan_config(settings: PublishedPlan, config: ModelConfig, bins: Discretizer) -> PlanConfig:
    """Their settings in our words; the cdf filter they do not have."""
    shape = (config.vocab_size, config.transition_dim)
    got = (bins.num_bins, bins.transition_dim)
    require(got == shape, "discretizer", f"(num_bins, transition_dim) = {shape}", got)
    names = {"steps": "horizon", "sample_expand": "n_expand", "k_reward": "k_rew"}
    require_int("steps", settings.steps, 1)
    require_int("sample_expand", settings.sample_expand, 1)
    for name in ("k_obs", "k_reward", "k_act"):
        if getattr(settings, name) is not None:
            require_int(name, getattr(settings, name), 1, config.vocab_size)
    require_number("temperature", settings.temperature, *TEMPERATURES)
    values = {names.get(name, name): value for name, value in vars(settings).items()}
    return PlanConfig(max_context_transitions=None, cdf_act=None, overflow="crop", **values)


def _value_fn(temperature: float, bins: Discretizer) -> ValueFn | None:
    """Their estimates are taken at temperature 1 (sample.py:55), ours at that of the draws."""
    if temperature == 1.0:
        return None

    def estimate(probs: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # softmax(x / t) ** t is softmax(x) but for a factor
        raw = probs[..., :-1].astype(np.float64) ** temperature
        raw /= raw.sum(axis=-1, keepdims=True)
        return bins.expectation(raw[:, 0], -2), bins.expectation(raw[:, 1], -1)

    return estimate


def _crop(context: Tensor, context_size: int | None, config: ModelConfig) -> Tensor:
    """Whole transitions off the left until at most `context_size` are left (beam.py:15-19)."""
    if context_size is None:
        return context
    width = config.transition_dim
    require_int("context_size", context_size, 1)
    excess = max(0, context.shape[1] - context_size * width)
    return context[:, -(-excess // width) * width :]


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
