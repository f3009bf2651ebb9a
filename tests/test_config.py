"""Settings: defaults, derived values, JSON round trip, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt_fast.config import (
    MAX_BLOCK_SIZE,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)

HOPPER = ModelConfig(observation_dim=11, action_dim=3)


def test_derived_values_of_the_model() -> None:
    assert (HOPPER.transition_dim, HOPPER.block_size, HOPPER.goal_len) == (16, 159, 0)
    with_goal = dataclasses.replace(HOPPER, goal_conditioned=True)
    assert (with_goal.block_size, with_goal.goal_len) == (159, 11)


def test_windows_whose_mask_would_fill_the_memory_are_refused() -> None:
    assert ModelConfig(1, 1, num_transitions=MAX_BLOCK_SIZE // 4).block_size == MAX_BLOCK_SIZE - 1
    message = re.escape("block_size: expected an integer >= 1 and <= 32768, got 32771")
    with pytest.raises(ValueError, match=message):
        ModelConfig(1, 1, num_transitions=MAX_BLOCK_SIZE // 4 + 1)


def test_derived_values_of_a_plan() -> None:
    plan_config = PlanConfig(horizon=4, beam_width=8, n_expand=3)
    assert plan_config.num_rows == 24
    # 4 times (actions, reward, value), 3 times an observation
    assert plan_config.num_draws(observation_dim=11, action_dim=3) == 4 * 5 + 3 * 11


def test_a_discount_fills_in_only_where_none_is_given() -> None:
    assert PlanConfig().with_discount(0.9).discount == 0.9
    assert PlanConfig(discount=0.5).with_discount(0.9).discount == 0.5


@pytest.mark.parametrize("config", [HOPPER, TrainConfig(), PlanConfig()])
def test_configs_are_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


# --- JSON -----------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.builds(ModelConfig, st.integers(1, 50), st.integers(1, 9), st.integers(2, 200)),
        st.builds(
            TrainConfig,
            batch_size=st.integers(1, 999),
            learning_rate=st.floats(1e-9, 1.0),
            betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
            max_minutes=st.none() | st.floats(0.1, 1e3),
            termination_penalty=st.none() | st.floats(-1e3, 1e3),
        ),
        st.builds(
            PlanConfig,
            horizon=st.integers(1, 30),
            discount=st.none() | st.floats(0, 1),
            k_act=st.none() | st.integers(1, 9),
            cdf_obs=st.none() | st.floats(0, 1),
            estimate=st.just("mean") | st.floats(0.01, 0.99),
        ),
    )
)
def test_a_config_survives_json(config: Any) -> None:
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(type(config), values) == config


def test_unknown_and_missing_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PlanConfig: expected keys among .*, got \['beam'\]"):
        config_from_dict(PlanConfig, {"beam": 3})
    message = "ModelConfig: expected keys ['action_dim', 'observation_dim'], got \"none for ["
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_dict(ModelConfig, {"action_dim": 3})


def test_values_of_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match="horizon: expected an integer >= 1 and <= 1048576, got 0"):
        config_from_dict(PlanConfig, {"horizon": 0})


# --- refusals -------------------------------------------------------------------------------------

AT_LEAST_1 = "expected an integer >= 1, got 0"
PROBABILITY = "expected a number in [0.0, 1.0], got 1.5"
PLAN_SIZE = "expected an integer >= 1 and <= 1048576, got "
NON_NEGATIVE = "expected a number in [0.0, inf), got -1.0"
POSITIVE = "expected a number in (0.0, inf), got 0.0"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("observation_dim", 0, AT_LEAST_1),
        ("observation_dim", 1.0, "expected an integer, got 1.0"),
        ("action_dim", 0, AT_LEAST_1),
        ("num_transitions", 0, AT_LEAST_1),
        ("num_layers", 0, AT_LEAST_1),
        ("num_heads", 0, AT_LEAST_1),
        ("vocab_size", 1, "expected an integer >= 2, got 1"),
        ("embed_dim", 0, AT_LEAST_1),
        ("embed_dim", 130, "expected a multiple of num_heads=4, got 130"),
        ("embed_dropout", 1.5, PROBABILITY),
        ("residual_dropout", 1.5, PROBABILITY),
        ("attention_dropout", 1.5, PROBABILITY),
        ("action_weight", -1.0, NON_NEGATIVE),
        ("reward_weight", -1.0, NON_NEGATIVE),
        ("value_weight", -1.0, NON_NEGATIVE),
        ("goal_value_mask", "right", "expected one of 'correct', 'original', got 'right'"),
    ],
)
def test_model_config_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {re.escape(message)}$"):
        dataclasses.replace(HOPPER, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, AT_LEAST_1),
        ("step", 0, AT_LEAST_1),
        ("max_path_length", 0, AT_LEAST_1),
        ("log_steps", 0, AT_LEAST_1),
        ("checkpoint_steps", 0, AT_LEAST_1),
        ("num_bins", 1, "expected an integer >= 2, got 1"),
        ("seed", -1, "expected an integer >= 0 and <= 9223372036854775807, got -1"),
        ("learning_rate", 0.0, POSITIVE),
        ("weight_decay", -1.0, NON_NEGATIVE),
        ("betas", (0.9,), "expected a tuple of two numbers, got (0.9,)"),
        ("betas", None, "expected a tuple of two numbers, got None"),
        ("betas", ("a", "b"), "expected a finite number in [0.0, 1.0], got 'a'"),
        ("step", 1001, "expected at most max_path_length=1000, got 1001"),
        ("betas", (0.9, 1.0), "expected numbers in [0, 1), got (0.9, 1.0)"),
        ("grad_clip", 0.0, POSITIVE),
        ("discount", 1.5, PROBABILITY),
        ("checkpoint_minutes", 0.0, POSITIVE),
        ("termination_penalty", float("nan"), "expected a finite number in (-inf, inf), got nan"),
        ("max_tokens", 0, AT_LEAST_1),
        ("max_windows", 0, AT_LEAST_1),
        ("pass_windows", 0, AT_LEAST_1),
        ("max_epochs", 0.0, POSITIVE),
        ("max_minutes", 0.0, POSITIVE),
        ("strategy", "kmeans", "expected one of 'quantile', 'uniform', got 'kmeans'"),
        ("precision", "float16", "expected one of 'float32', 'bfloat16', got 'float16'"),
        ("ema_decay", 1.0, "expected a number in [0, 1), got 1.0"),
        ("compile", "yes", "expected one of False, True, got 'yes'"),
        ("eval_every", 0, AT_LEAST_1),
        ("patience", 0, AT_LEAST_1),
        ("patience", 2, "expected None, as eval_every is None, got 2"),
        ("token_storage", "disk", "expected one of 'auto', 'memory', 'file', got 'disk'"),
    ],
)
def test_train_config_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {re.escape(message)}$"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, 0, PLAN_SIZE + "0") for name in ("horizon", "beam_width", "n_expand")),
        ("horizon", 2**31, PLAN_SIZE + str(2**31)),
        ("discount", 1.5, PROBABILITY),
        ("max_context_transitions", 0, AT_LEAST_1),
        ("k_obs", 0, AT_LEAST_1),
        ("k_act", 0, AT_LEAST_1),
        ("k_rew", 0, AT_LEAST_1),
        ("cdf_obs", 1.5, PROBABILITY),
        ("cdf_act", 1.5, PROBABILITY),
        ("cdf_rew", 1.5, PROBABILITY),
        ("temperature", 1e-38, "expected a number in [1e-30, 1e+30], got 1e-38"),
        ("estimate", "median", "expected \"mean\" or a percentile in (0, 1), got 'median'"),
        ("estimate", 1.0, 'expected "mean" or a percentile in (0, 1), got 1.0'),
        ("overflow", "slide", "expected one of 'crop', 'grow', got 'slide'"),
        ("dtype", "float16", "expected one of 'float32', 'bfloat16', got 'float16'"),
    ],
)
def test_plan_config_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {re.escape(message)}$"):
        PlanConfig(**{field: value})


@pytest.mark.parametrize(
    ("cls", "test"),
    [
        (ModelConfig, test_model_config_refuses),
        (TrainConfig, test_train_config_refuses),
        (PlanConfig, test_plan_config_refuses),
    ],
)
def test_every_field_has_a_refusal_above(cls: Any, test: Any) -> None:
    refused = {case[0] for mark in test.pytestmark for case in mark.args[1]}
    unchecked = {"goal_conditioned", "device"}  # a flag, and a name that torch checks
    assert {field.name for field in dataclasses.fields(cls)} - unchecked == refused


def test_numpy_numbers_become_pythons() -> None:
    config = ModelConfig(np.int64(3), np.int32(2), embed_dropout=np.float32(0.5))
    assert type(config.observation_dim) is int
    plain = config_to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert config_from_dict(ModelConfig, plain) == config
    betas = config_to_dict(TrainConfig(betas=(np.float32(0.5), np.float32(0.75))))["betas"]
    assert json.dumps(betas) == "[0.5, 0.75]"
    assert PlanConfig(estimate=np.float32(0.9)).estimate == np.float32(0.9)
