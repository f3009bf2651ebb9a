"""The original's planner functions: signatures, types and results (tests/gpt_twin.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import build_golden_model, load_golden
from gpt_twin import GPT, QuantileDiscretizer
from tiny import tiny_discretizer, tiny_model
from torch import Tensor, nn

import tt_fast
from tt_fast import PlanConfig
from tt_fast.compat.jannerm import (
    beam_plan,
    beam_search,
    extract_actions,
    make_prefix,
    update_context,
)
from tt_fast.compat.jannerm.adopt import adopt

THRESHOLDS = tiny_discretizer().thresholds
QUIET = {"verbose": False}


def mean(thresholds: Any = THRESHOLDS) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The original's value_fn as scripts/plan.py makes it."""
    return lambda probs: QuantileDiscretizer(thresholds).value_fn(probs, "mean")


def tiny_plan(model: nn.Module | None = None, **changes: Any) -> Tensor:
    """A plan of the tiny model with the settings of scripts/plan.py."""
    arguments: dict[str, Any] = {
        "x": torch.tensor([[1, 2, 3]]), "value_fn": mean(), "n_steps": 3, "beam_width": 4,
        "n_expand": 2, "observation_dim": 3, "action_dim": 2, "max_context_transitions": 3,
        "k_obs": 1, "cdf_act": 0.3, **QUIET, **changes,
    }  # fmt: skip
    return beam_plan(GPT(tiny_model()) if model is None else model, **arguments)


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["hopper", "odd"])
@pytest.mark.parametrize("num_past", [0, 3, 6])
def test_greedy_plans_are_the_originals(shape: str, num_past: int) -> None:
    golden, ours = load_golden(f"plan_greedy_{shape}"), build_golden_model(shape)
    config = ours.config
    plan = beam_plan(
        GPT(ours), mean(golden["thresholds"]), torch.from_numpy(golden[f"prefix_{num_past}"]),
        15, 2, 1, config.observation_dim, config.action_dim, 0.99, 5, 1, 1, verbose=False,
    )  # fmt: skip
    assert plan.dtype == torch.int64
    np.testing.assert_array_equal(plan.numpy(), golden[f"sequence_{num_past}"])


@pytest.mark.parametrize("percentile", ["mean", "0.9"])
def test_sampled_plans_are_the_native_ones(percentile: str) -> None:
    """The first number of torch's generator is the seed; a value_fn estimates as we do."""
    model = GPT(tiny_model())
    theirs = QuantileDiscretizer(THRESHOLDS)
    config = PlanConfig(
        horizon=3, beam_width=4, max_context_transitions=3, cdf_act=0.3,
        estimate="mean" if percentile == "mean" else 0.9,
    )  # fmt: skip
    different = set()
    for start in range(20):
        torch.manual_seed(start)
        seed = int(torch.randint(2**63 - 1, ()))
        native = tt_fast.beam_plan(
            tiny_model(), tiny_discretizer(), [[1, 2, 3]], config, seed=seed
        ).tokens[0]
        torch.manual_seed(start)
        shim = tiny_plan(model, value_fn=lambda probs: theirs.value_fn(probs, percentile))
        np.testing.assert_array_equal(shim.numpy(), native)
        different.add(tuple(native[0]))
    assert len(different) > 3


def test_the_global_generator_moves_on() -> None:
    torch.manual_seed(0)
    plans = [tiny_plan().tolist() for _ in range(10)]
    torch.manual_seed(0)
    assert [tiny_plan().tolist() for _ in range(10)] == plans
    assert len({str(plan) for plan in plans}) > 1


def test_value_fn_is_called_once_a_step_with_raw_probabilities() -> None:
    seen: list[Tensor] = []

    def value_fn(probs: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(probs.clone())
        return mean()(probs)

    tiny_plan(value_fn=value_fn, k_rew=1)
    assert [tuple(probs.shape) for probs in seen] == [(8, 2, 9)] * 3
    assert all(probs.dtype == torch.float32 for probs in seen)
    for probs in seen:
        torch.testing.assert_close(probs.sum(-1), torch.ones(8, 2))
        assert (probs > 0).sum() > 16  # not what top_k leaves


@pytest.mark.parametrize("best", range(8))
def test_any_value_fn_decides(best: int) -> None:
    """The candidate that it rewards is the plan; arrays serve as well as tensors."""
    rewards = np.zeros(8)
    rewards[best] = 1.0
    options = {"n_steps": 1, "beam_width": 1, "n_expand": 8, "cdf_act": None, "k_act": None}
    torch.manual_seed(best)
    plan = tiny_plan(value_fn=lambda probs: (rewards, np.zeros(len(probs))), **options)
    torch.manual_seed(best)
    config = PlanConfig(horizon=1, beam_width=1, n_expand=8, cdf_act=None)
    trace = tt_fast.beam_plan(
        tiny_model(), tiny_discretizer(), [[1, 2, 3]], config,
        seed=int(torch.randint(2**63 - 1, ())), trace=True,
    ).trace  # fmt: skip
    assert trace is not None
    drawn = [int(tokens[best]) for tokens in trace[0].drawn]
    assert plan[0].tolist() == [1, 2, 3, *drawn]


def test_errors_of_a_value_fn_come_through() -> None:
    def broken(probs: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tiny_plan(value_fn=broken)
    with pytest.raises(ValueError, match="value_fn: expected finite numbers"):
        tiny_plan(value_fn=lambda p: (p[:, 0, 0] * torch.nan, p[:, 0, 0]))


def test_verbose_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_plan()
    assert capsys.readouterr().out == ""
    tiny_plan(verbose=True)
    assert capsys.readouterr().out.startswith("[ tt_fast ] 3 steps, 4 beams | value ")


def test_zero_context_means_the_whole_window() -> None:
    """`if max_context_transitions` (core.py:26): 0 and None are the same."""
    torch.manual_seed(0)
    zero = tiny_plan(max_context_transitions=0)
    torch.manual_seed(0)
    assert torch.equal(tiny_plan(max_context_transitions=None), zero)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.long)}, r"x: expected shape \(1, context_len\)"),
        ({"x": torch.zeros(3, dtype=torch.long)}, r"x: expected shape \(1, context_len\)"),
        ({"x": np.zeros((1, 3), int)}, "x: expected a tensor of tokens, got 'ndarray'"),
        ({"x": torch.zeros(1, 4, dtype=torch.long)}, r"x: expected a length of k \* 7 \+ 3"),
        ({"x": torch.zeros(1, 3)}, "x: expected integers"),
        ({"x": torch.full((1, 3), 9)}, r"x: expected ids in \[0, 8\], got '9..9'"),
        ({"observation_dim": 4}, "observation_dim: expected the model's 3, got 4"),
        ({"action_dim": 1}, "action_dim: expected the model's 2, got 1"),
        ({"n_steps": 0}, "horizon: expected an integer >= 1"),
        ({"k_act": 10}, "k_act: expected an integer >= 1 and <= 9, got 10"),
        ({"max_context_transitions": 1}, "max_context_transitions: expected at least 2"),
        ({"model": "gpt"}, "model: expected the original's GPT or a TrajectoryTransformer"),
        ({"model": nn.Linear(2, 2)}, "model: expected the original's GPT .*, got Linear"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_plan(**changes)


# --- models ---------------------------------------------------------------------------------------


def test_weights_are_taken_once_and_again_when_they_change() -> None:
    model = GPT(tiny_model())
    plan = partial(tiny_plan, model, cdf_act=None, k_act=1)
    before, adopted = plan(), adopt(model)
    assert adopt(model) is adopted
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)  # in place
    changed = plan()
    assert adopt(model) is adopted
    assert not torch.equal(before, changed)
    model.pos_emb = nn.Parameter(-model.pos_emb.detach())  # another object
    assert adopt(model) is not adopted
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_emb":
                parameter.mul_(-1.0)
    assert torch.equal(plan(), before)


def test_no_model_is_kept_alive() -> None:
    model = GPT(tiny_model())
    tiny_plan(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_the_model_is_left_as_it_was() -> None:
    model = GPT(tiny_model()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    adopt(model)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), drawn)  # adopting draws nothing
    tiny_plan(model)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_of_ours_serves_too() -> None:
    torch.manual_seed(0)
    theirs = tiny_plan(GPT(tiny_model()))
    torch.manual_seed(0)
    assert torch.equal(tiny_plan(tiny_model()), theirs)


def test_a_model_of_another_kind_is_refused() -> None:
    model = GPT(tiny_model())
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model: extra.bias: expected shape None, got \(2,\)"):
        tiny_plan(model)


# --- likelihood search ----------------------------------------------------------------------------


def golden_search(name: str, file: str, case: int, **options: Any) -> tuple[Tensor, Tensor]:
    model, golden = GPT(build_golden_model(name)), load_golden(file)
    goal = torch.from_numpy(golden["goal"]) if name == "odd_goal" else None
    x = torch.from_numpy(golden[f"bs_x_{case}"])
    options = {"crop_increment": model.transition_dim, **options}
    return beam_search(model, x, 20, beam_width=8, goal=goal, **options)


@pytest.mark.parametrize(
    ("name", "file"), [("odd_bs", "beam_search"), ("odd_goal", "beam_search_goal")]
)
@pytest.mark.parametrize("case", range(3))
def test_searches_are_the_originals(name: str, file: str, case: int) -> None:
    golden = load_golden(file)
    tokens, log_probs = golden_search(name, file, case)
    np.testing.assert_array_equal(tokens.numpy(), golden[f"bs_seq_{case}"])
    np.testing.assert_allclose(log_probs.numpy(), golden[f"bs_logp_{case}"], atol=1e-4)


def test_searches_share_the_backend_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(tiny_model())
    first, _ = beam_search(model, torch.tensor([[1, 2, 3]]), 4, beam_width=2)
    monkeypatch.setattr("tt_fast.planning.search.make_backend", None)  # none is made again
    again, _ = beam_search(model, torch.tensor([[1, 2, 3]]), 4, beam_width=2)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match=r"x: expected shape \(1, context_len\), got \(3,\)"):
        beam_search(model, torch.tensor([1, 2, 3]), 4)


def test_one_beam_has_a_log_probability_without_dimensions() -> None:
    tokens, log_prob = beam_search(GPT(tiny_model()), torch.tensor([[1, 2, 3]]), 4, beam_width=1)
    assert (tuple(tokens.shape), tuple(log_prob.shape)) == ((7,), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_increment": None}, "crop_increment: expected the transition_dim, 9, got None"),
        ({"allow_crop": False}, "allow_crop: expected True for more tokens than .* 89"),
        ({"max_block": 44}, "max_block: expected None or at least the model's window of 89"),
        ({"colour": 1}, r"sample_kwargs: expected names among .*, got \['colour'\]"),
        ({"topk": 0}, "top_k: expected an integer >= 1"),
    ],
)
def test_search_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        golden_search("odd_bs", "beam_search", 2, **options)


# --- context --------------------------------------------------------------------------------------


@pytest.mark.parametrize("discretizer", [QuantileDiscretizer(THRESHOLDS), tiny_discretizer()])
def test_a_context_is_what_a_planner_remembers(discretizer: Any) -> None:
    checkpoint = tt_fast.Checkpoint(tiny_model(), tiny_discretizer(), {"discount": 0.99})
    planner = tt_fast.Planner(checkpoint, PlanConfig(horizon=2, max_context_transitions=3))
    rng, context = np.random.default_rng(0), []
    for step in range(5):
        observation, reward = rng.normal(size=3), float(rng.normal())
        prefix = make_prefix(discretizer, context, observation)
        assert prefix.dtype == torch.int64
        assert tuple(prefix.shape) == (1, 7 * min(step, 3) + 3)
        action = planner.act(observation)
        planner.observe(reward)
        context = update_context(context, discretizer, observation, action, reward, 3)
        history = np.stack(planner._clocks[0].history)
        np.testing.assert_array_equal(torch.cat(context).numpy(), history)
    assert tuple(make_prefix(discretizer, context, observation, False).shape) == (1, 3)


def test_tensors_are_where_the_caller_wants_them() -> None:
    discretizer = tiny_discretizer()
    meta = make_prefix(discretizer, [], np.zeros(3), device="meta")
    context = update_context([], discretizer, np.zeros(3), np.zeros(2), 0.0, 2, device="meta")
    assert meta.device.type == context[0].device.type == "meta"
    assert make_prefix(discretizer, context, np.zeros(3)).device.type == "meta"  # its context's


def test_update_context_appends_to_what_it_got() -> None:
    """As the original does, whose callers may hold on to the list (search/utils.py:42)."""
    context: list[Tensor] = []
    for length in (1, 2, 3):
        newest = update_context(context, tiny_discretizer(), np.zeros(3), np.zeros(2), 0.0, 2)
        assert (len(context), len(newest)) == (length, min(length, 2))
    with pytest.raises(ValueError, match="max_context_transitions: expected an integer >= 1"):
        update_context(context, tiny_discretizer(), np.zeros(3), np.zeros(2), 0.0, 0)


def test_actions_of_a_plan() -> None:
    plan = np.arange(21).reshape(3, 7)
    np.testing.assert_array_equal(extract_actions(plan, 3, 2), plan[:, 3:5])
    np.testing.assert_array_equal(extract_actions(plan, 3, 2, t=1), plan[1, 3:5])
    assert torch.equal(extract_actions(torch.from_numpy(plan), 3, 2, 0), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"x: expected shape \(horizon, 8\), got \(3, 7\)"):
        extract_actions(plan, 4, 2)
