"""The original's settings by name, and how the command line mixes them with the user's."""

from __future__ import annotations

from typing import Any

import pytest

from tt_fast.cli import parse
from tt_fast.commands.evaluate import Evaluate
from tt_fast.commands.plan import Plan
from tt_fast.commands.train import Train
from tt_fast.config import PlanConfig, TrainConfig
from tt_fast.presets import PRESETS, check_preset, expand_preset

# config/offline.py of the original, written out: what its scripts end up with
PLANS = {
    "halfcheetah-medium-v2": PlanConfig(horizon=5, beam_width=32),
    "halfcheetah-medium-replay-v2": PlanConfig(horizon=5, beam_width=32),
    "halfcheetah-medium-expert-v2": PlanConfig(horizon=15, beam_width=32),
    "hopper-medium-v2": PlanConfig(horizon=15, beam_width=128),
    "hopper-medium-replay-v2": PlanConfig(horizon=15, beam_width=128),
    "hopper-medium-expert-v2": PlanConfig(horizon=15, beam_width=128),
    "walker2d-medium-v2": PlanConfig(horizon=15, beam_width=128),
    "walker2d-medium-replay-v2": PlanConfig(horizon=20, beam_width=32, k_act=40, cdf_act=None),
    "walker2d-medium-expert-v2": PlanConfig(horizon=5, beam_width=128),
    "ant-medium-v2": PlanConfig(horizon=5, beam_width=128),
    "ant-medium-replay-v2": PlanConfig(horizon=5, beam_width=128),
    "ant-random-v2": PlanConfig(horizon=5, beam_width=128),
}


def test_every_preset_is_tested() -> None:
    assert set(PRESETS) == {f"jannerm/{name}" for name in (*PLANS, "base")}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str) -> None:
    for argv, kind in ((["evaluate", "x"], Evaluate), (["plan", "x", "--observation", "1"], Plan)):
        command = parse([*argv, "--preset", f"jannerm/{name}"])
        assert isinstance(command, (Evaluate, Plan))
        assert isinstance(command, kind)
        assert command.plan == PLANS[name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hopper-medium-v2", {"max_windows": 50_000_000}),
        ("hopper-medium-replay-v2", {"max_windows": 80_000_000}),
        ("walker2d-medium-replay-v2", {"max_windows": 80_000_000}),
        ("ant-medium-v2", {"max_windows": 50_000_000, "batch_size": 128}),
    ],
)
def test_training(name: str, changes: dict[str, Any]) -> None:
    command = parse(["train", "data", "--output-dir", "x", "--preset", f"jannerm/{name}"])
    assert isinstance(command, Train)
    assert command.train == TrainConfig(**changes)


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "x", "--preset", "jannerm/halfcheetah-medium-v2", "--beam-width", "128"],
        ["evaluate", "--beam-width", "128", "x", "--preset=jannerm/halfcheetah-medium-v2"],
    ],
)
def test_given_options_win_wherever_they_stand(argv: list[str]) -> None:
    command = parse(argv)
    assert isinstance(command, Evaluate)
    assert command.plan == PlanConfig(horizon=5, beam_width=128)
    assert command.preset == "jannerm/halfcheetah-medium-v2"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    argv = ["evaluate", "x", "--preset", "jannerm/hopper-medium"]
    assert expand_preset(argv) == argv
    command = parse(argv)
    wanted = "preset: expected one of jannerm/hopper-medium-v2, .*, got 'jannerm/hopper-medium'"
    with pytest.raises(ValueError, match=wanted):
        command.run()
    check_preset(None)


def test_of_two_presets_the_last_one_counts() -> None:
    argv = ["evaluate", "x", "--preset", "jannerm/base"]
    command = parse([*argv, "--preset=jannerm/halfcheetah-medium-v2"])
    assert (command.preset, command.plan.horizon) == ("jannerm/halfcheetah-medium-v2", 5)


def test_without_a_preset_nothing_changes() -> None:
    for argv in ([], ["evaluate"], ["evaluate", "--preset"], ["train", "x"]):
        assert expand_preset(argv) == argv
