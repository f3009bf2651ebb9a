"""Small synthetic runs for the tests of plots, video, report and demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import TOKEN_KINDS, ModelConfig, PlanConfig
from tt_fast.data import OfflineDataset
from tt_fast.discretizer import Discretizer
from tt_fast.envs import make_env
from tt_fast.model import TrajectoryTransformer
from tt_fast.planning import ImaginedPlan
from tt_fast.results import EpisodeRecord, EvalResult
from tt_fast.training.log import COLUMNS

NUM_BINS = 10


def random_record(
    num_steps: int = 30, observation_dim: int = 4, action_dim: int = 2
) -> EpisodeRecord:
    """A random walk outside MuJoCo, without plans."""
    rng = np.random.default_rng(1)
    return EpisodeRecord(
        observations=rng.standard_normal((num_steps + 1, observation_dim)).cumsum(axis=0),
        actions=rng.uniform(-1, 1, (num_steps, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(num_steps),
        qpos=None,
        qvel=None,
        plans=(),
    )


def roll_out(env_id: str, num_steps: int = 40) -> EpisodeRecord:
    """Random actions in a MuJoCo environment, seed 0, without plans."""
    env = make_env(env_id)
    rng = np.random.default_rng(0)
    observations, states = [env.reset(0)], [env.mujoco_state()]
    actions, rewards = [], []
    for _ in range(num_steps):
        actions.append(rng.uniform(-1, 1, env.action_dim).astype(np.float32))
        step = env.step(actions[-1])
        observations.append(step.observation)
        rewards.append(step.reward)
        states.append(env.mujoco_state())
    env.close()
    qpos, qvel = (np.stack(part) for part in zip(*filter(None, states), strict=True))
    return EpisodeRecord(
        np.stack(observations), np.stack(actions), np.array(rewards), qpos, qvel, ()
    )


def fit_discretizer(record: EpisodeRecord) -> Discretizer:
    """Uniform bins over a record's transitions; its values are the rewards again."""
    return Discretizer.fit(_transitions(record), NUM_BINS, "uniform")


def imagine(record: EpisodeRecord, horizon: int = 5, plan_freq: int = 1) -> EpisodeRecord:
    """`record` with plans: what was then executed, as far as bins can say it."""
    discretizer = fit_discretizer(record)
    rows = discretizer.encode(_transitions(record))
    plans: list[ImaginedPlan] = []
    for step in range(len(rows)):
        if step % plan_freq:
            plans.append(plans[-1])
            continue
        tokens = rows[np.minimum(np.arange(step, step + horizon), len(rows) - 1)]
        plans.append(ImaginedPlan.decode(tokens, 1.0, discretizer, record.observations.shape[1], 1))
    return dataclasses.replace(record, plans=tuple(plans))


def _transitions(record: EpisodeRecord) -> np.ndarray[Any, Any]:
    rewards = record.rewards
    return np.column_stack([record.observations[:-1], record.actions, rewards, rewards])


def write_metrics(path: Path, num_rows: int = 6) -> None:
    """A metrics.csv whose columns are told apart by their values."""
    lines = [",".join(COLUMNS)]
    for row in range(1, num_rows + 1):
        losses = [5.0 / row, *(kind + 4.0 / row for kind in range(len(TOKEN_KINDS)))]
        lines.append(",".join(map(str, [row * 10, row * 1_000_000, *losses, 1e-3, 5000.0])))
    path.write_text("\n".join(lines) + "\n")


def small_checkpoint(record: EpisodeRecord, **config: Any) -> Checkpoint:
    """An untrained model for the record's transitions, in eval mode."""
    torch.manual_seed(0)
    size = {"vocab_size": NUM_BINS, "num_layers": 2, "num_heads": 2, "embed_dim": 8}
    dims = (record.observations.shape[1], record.actions.shape[1])
    model = TrajectoryTransformer(ModelConfig(*dims, **{**size, **config})).eval()
    metadata = {
        "dataset": "walks",
        "step": 60,
        "tokens": 6_000_000,
        "seconds": 60.0,
        "eval_losses": dict.fromkeys(TOKEN_KINDS, 1.25),
        "marginal_losses": dict.fromkeys(TOKEN_KINDS, 2.0),
        "train_config": {"batch_size": 64},
        "versions": {"torch": torch.__version__},
        "git_commit": None,
    }
    return Checkpoint(model, fit_discretizer(record), metadata)


def small_dataset(record: EpisodeRecord, num_episodes: int = 5, **fields: Any) -> OfflineDataset:
    """The record's episode several times over."""
    num_steps = len(record.actions)
    truncations = np.zeros(num_steps, dtype=bool)
    truncations[-1] = True

    def repeat(rows: Any) -> Any:
        return np.concatenate([rows] * num_episodes)

    return OfflineDataset(
        repeat(record.observations[:-1].astype(np.float32)),
        repeat(record.actions),
        repeat(record.rewards.astype(np.float32)),
        repeat(np.zeros(num_steps, dtype=bool)),
        repeat(truncations),
        **{"env_id": "Walk-v0", "name": "walks", "ref_scores": (-10.0, 10.0), **fields},
    )


def small_result(record: EpisodeRecord | None, **fields: Any) -> EvalResult:
    """Two scored episodes; the first one's record is kept."""
    values = {
        "env_id": "Walk-v0",
        "dataset": "walks",
        "returns": (2.0, 5.0),
        "ref_scores": (-10.0, 10.0),
        "seed": 7,
        "lengths": (30, 12),
        "terminated": (False, True),
        "plan_config": PlanConfig(horizon=5, beam_width=4, n_expand=2, discount=0.99),
        "plan_freq": 1,
        "prefix_context": True,
        "backend": "reference",
        "num_envs": 2,
        "num_decisions": 42,
        "seconds": 21.0,
        "wall_seconds": 22.0,
        "record": record,
    }
    return EvalResult(**{**values, **fields})
