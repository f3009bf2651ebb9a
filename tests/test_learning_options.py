"""benchmarks/learning_options.py: the weights that it compares, the table that it prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning_options import POLICIES, play, table, train_both
from tiny import ACTION_DIM, OBSERVATION_DIM, tiny_dataset, tiny_train_config

from tt_fast import Checkpoint, ModelConfig, PlanConfig, train


def test_last_weights_are_those_of_a_run_without_an_average(tmp_path: Path) -> None:
    dataset = tiny_dataset(num_episodes=10)
    config = tiny_train_config(max_tokens=20_000, ema_decay=0.5, num_bins=100)
    last, average = train_both(dataset, config, 10, tmp_path / "options")
    plain = train(
        dataset,
        ModelConfig(OBSERVATION_DIM, ACTION_DIM, num_transitions=10),
        replace(config, batch_size=64, ema_decay=None),
        tmp_path / "plain",
        progress=False,
    )
    assert same(last, plain)
    assert not same(average, plain)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether all weights are equal to the bit."""
    weights = b.model.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in a.model.state_dict().items())


def test_the_table_has_losses_and_returns(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    from toy_env import register_toy

    config = tiny_train_config(max_tokens=1, ema_decay=0.5, num_bins=100)
    _, average = train_both(tiny_dataset(num_episodes=10), config, 20, tmp_path)
    plan = PlanConfig(horizon=2, beam_width=2)
    for policy in POLICIES[2:]:
        play(policy, average, plan, register_toy(), 2, tmp_path)
    lines = table(tmp_path).splitlines()
    measured = [line.split("|")[1:4] for line in lines if line.startswith("| 20 | ")]
    assert [[cell.strip() for cell in cells] for cells in measured] == [
        ["20", "average", "10"], ["20", "average", "20"], ["20", "last", "10"],
        ["20", "last", "20"], ["20", "average", "crop"], ["20", "average", "grow"],
    ]  # fmt: skip
