"""Parameter groups, schedule and budget against the original's rules."""

import math

import pytest
from tiny import tiny_model, tiny_train_config

from tt_fast.training.optimizer import ORIGINAL_WINDOWS, Budget, build_optimizer


def test_only_matrices_decay() -> None:
    model = tiny_model(goal_conditioned=True)
    optimizer = build_optimizer(model, tiny_train_config(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        is_matrix = name == "head.weight" or (
            name.endswith("weight") and (".attn." in name or ".mlp." in name)
        )
        assert decay[id(parameter)] == (0.3 if is_matrix else 0.0), name
    assert len(decay) == len(list(model.parameters()))


def original_multiplier(tokens: float, warmup: float, final: float) -> float:
    """trajectory/utils/training.py:57-66, by its formula."""
    if tokens < warmup:
        return tokens / max(1, warmup)
    progress = (tokens - warmup) / max(1, final - warmup)
    return max(0.1, 0.5 * (1.0 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("epochs", [0.0, 0.3, 1.0, 5.0, 20.0, 35.0])
def test_schedule_of_a_long_run_is_the_originals(epochs: float) -> None:
    budget = Budget(tiny_train_config(max_epochs=50, learning_rate=1e-3), 1000, 10)
    tokens = int(epochs * 10_000)
    fraction = budget.fraction(tokens, int(epochs * 1000), 0.0)
    want = 1.0 if epochs == 0.0 else original_multiplier(tokens, 10_000, 200_000)
    assert budget.learning_rate(tokens, fraction) == pytest.approx(1e-3 * want)


def test_schedule_of_a_short_run_fits_its_budget() -> None:
    budget = Budget(tiny_train_config(max_tokens=1000, learning_rate=1.0), 10_000, 10)
    rates = [budget.learning_rate(t, t / 1000) for t in range(1, 1001)]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates.index(max(rates)) + 1 == pytest.approx(50, abs=1)  # 5 % warm-up
    assert rates[-1] == pytest.approx(0.1)


def test_first_budget_reached_ends_the_run() -> None:
    config = tiny_train_config(max_tokens=1000, max_epochs=2.0, max_minutes=1.0)
    budget = Budget(config, 100, 10)
    assert budget.fraction(500, 20, 6.0) == 0.5
    assert budget.fraction(500, 150, 6.0) == 0.75
    assert budget.fraction(500, 20, 60.0) == 1.0
    windows = Budget(tiny_train_config(max_windows=200, max_epochs=4.0), 100, 10)
    assert windows.fraction(500, 150, 6.0) == 0.75


def test_no_budget_is_the_originals() -> None:
    budget = Budget(tiny_train_config(), 100, 10)
    assert budget.fraction(0, ORIGINAL_WINDOWS, 0.0) == 1.0
