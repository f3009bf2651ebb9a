"""Gradients of a step: however it is cut, and whichever way a device takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_train_config
from torch import Tensor

from tt_fast.config import TrainConfig
from tt_fast.data.windows import TokenWindows
from tt_fast.encoding import tokenize
from tt_fast.model import TrajectoryTransformer
from tt_fast.training.losses import model_batch
from tt_fast.training.step import StepGradients, StepResult, _address_seed, seed_device
from tt_fast.training.workers import Workers

NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
IDS = torch.tensor([3, 40, 7, 93, 18])  # the last but one ends in stop tokens


def make_windows(model: TrajectoryTransformer, config: TrainConfig) -> TokenWindows:
    return tokenize(tiny_dataset(), model.config, config)[1]


def run_step(
    model: TrajectoryTransformer, config: TrainConfig, *, elsewhere: bool = False, step: int = 0
) -> tuple[StepResult, dict[str, Tensor]]:
    """A step's result and gradients; `elsewhere` takes the way of a GPU."""
    gradients = StepGradients(model, config, make_windows(model, config), Workers())
    if elsewhere:
        gradients.close()
        gradients._passes = None
    with torch.random.fork_rng():
        result = gradients.run(IDS, step)
    gradients.close()
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def step_config(**changes: Any) -> TrainConfig:
    return tiny_train_config(**({"grad_clip": 1e9} | changes))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("pass_windows", [1, 2, 5])
@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_a_step_is_that_of_the_model(
    elsewhere: bool, pass_windows: int, goal_conditioned: bool
) -> None:
    model = tiny_model(goal_conditioned=goal_conditioned, **NO_DROPOUT).double().train()
    config = step_config(pass_windows=pass_windows)
    result, found = run_step(model, config, elsewhere=elsewhere)
    inputs, targets, mask, goal = model_batch(model, make_windows(model, config), IDS)
    model.zero_grad()
    loss = model.loss(inputs, targets, mask, goal)
    loss.backward()
    # float64 on both sides: what is left is the order of additions
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    by_kind = model.losses_by_kind(inputs, targets, mask, goal)
    assert result.losses == pytest.approx({k: v.item() for k, v in by_kind.items()}, rel=1e-12)
    assert result.tokens == int((targets != model.config.vocab_size).sum())
    assert result.tokens < targets.numel()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_gradients_are_clipped() -> None:
    model = tiny_model(**NO_DROPOUT).train()
    result, found = run_step(model, step_config(grad_clip=0.5))
    assert result.gradient_norm > 0.5
    norm = torch.stack([grad.norm() for grad in found.values()]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_dropout_is_addressed_by_seed_step_and_pass(elsewhere: bool) -> None:
    model = tiny_model(attention_dropout=0.3).train()

    def losses(step: int, **changes: int) -> float:
        config = step_config(pass_windows=2, **changes)
        return run_step(model, config, elsewhere=elsewhere, step=step)[0].loss

    assert losses(4) == losses(4)
    assert len({losses(4), losses(5), losses(4, seed=1)}) == 3


class _Worker:
    """One of several workers, whose sums are made afterwards."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.summed = rank, count, []

    def sum(self, tensor: Tensor) -> None:
        self.summed.append(tensor.clone())

    def total(self, *values: float) -> list[float]:
        self.sum(torch.tensor(values, dtype=torch.float64))
        return list(values)

    def agree(self, value: float) -> float:
        return value


def workers_parts(model: TrajectoryTransformer, count: int) -> tuple[Tensor, Tensor]:
    """What each of so many workers gives away in one step of three passes: counts, gradients."""
    config = step_config(pass_windows=2)
    windows = make_windows(model, config)
    parts = []
    for rank in range(count):
        worker = _Worker(rank, count)
        gradients = StepGradients(model, config, windows, worker)  # type: ignore[arg-type]
        gradients.run(IDS, step=2)
        gradients.close()
        parts.append(worker.summed)
    counts, together = (torch.stack([part[i].double() for part in parts]) for i in (0, 1))
    return counts, together


@pytest.mark.parametrize("count", [2, 3, 7])  # of seven some have no pass
def test_workers_parts_add_up(count: int) -> None:
    model = tiny_model(attention_dropout=0.3).train()
    counts, gradients = workers_parts(model, count)
    _, pass_by_pass = workers_parts(model, 3)
    result, found = run_step(model, step_config(pass_windows=2), step=2)
    assert counts.sum(0)[0].item() == pytest.approx(result.loss, rel=1e-6)
    assert counts.sum(0)[1].item() == result.tokens
    want = torch.cat([grad.flatten() for grad in found.values()]).double()
    # three float32 passes added in another order: two roundings of sums no larger than these
    bound = 2 * torch.finfo(torch.float32).eps * pass_by_pass.abs().sum(0)
    assert ((gradients.sum(0) - want).abs() <= bound).all()


def test_a_processor_is_not_compiled() -> None:
    model = tiny_model()
    config = step_config(compile=True)
    with pytest.raises(ValueError, match="compile: expected False, as the model trains on a proc"):
        StepGradients(model, config, make_windows(model, config), Workers())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_steps_on_a_gpu(precision: str) -> None:
    model = tiny_model(**NO_DROPOUT).cuda().train()
    results = []
    for compiled in (False, True):
        config = step_config(pass_windows=2, precision=precision, compile=compiled)
        windows = make_windows(model, config).to(torch.device("cuda"))
        gradients = StepGradients(model, config, windows, Workers())
        results += [[gradients.run(IDS, step).loss for step in range(4)]]
        gradients.close()
    tolerance = 1e-5 if precision == "float32" else 2e-2  # a unit in the last place, some times
    assert results[1] == pytest.approx(results[0], rel=tolerance)


def test_seeds_of_addresses_are_apart_and_fit_torch() -> None:
    seeds = {_address_seed((seed, step, 0)) for seed in range(2) for step in range(50)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeding_a_device_gives_what_torch_gives() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        want = torch.rand(3)
        seed_device(torch.device("cpu"), 7)
        assert torch.equal(torch.rand(3), want)
