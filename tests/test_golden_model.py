"""Model against the original: logits, loss and gradients (tests/golden/README.md)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import (
    GOLDEN_MODELS,
    build_golden_model,
    golden_model,
    golden_weights,
    load_golden,
)
from numpy.typing import NDArray

SHAPES = ("hopper", "halfcheetah", "ant", "odd")
LOSSES = {
    "loss_hopper_T159_w5-1-1": "hopper",
    "loss_halfcheetah_T24_w5-1-1": "halfcheetah",
    "loss_odd_T89_w5-1-1": "odd",
    "loss_odd_T89_w2-0p5-3": "odd",
    "loss_odd_T26_w1-1-1": "odd",
    "loss_odd_T21_w1-1-1": "odd",
}
WEIGHTED_KINDS = ("action", "reward", "value")


def probe(weights: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """(num_tensors, 10): sum, sum of squares and 8 spread-out entries of each tensor, by name."""
    rows = []
    for _, weight in sorted(weights.items()):
        flat = weight.double().flatten()
        spread = flat[torch.linspace(0, len(flat) - 1, 8).long()]
        rows.append(torch.cat([flat.sum()[None], flat.square().sum()[None], spread]))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_weights_drawn_from_the_seed_are_the_golden_models(name: str) -> None:
    probes = load_golden("model_probes")
    # 1e-5 leaves room for another processor's log and cos, not for another random number
    np.testing.assert_allclose(probe(golden_weights(name)), probes[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("j", range(8))
def test_logits(name: str, j: int) -> None:
    golden = load_golden(f"logits_{name}")
    with torch.no_grad():
        logits = golden_model(name)(torch.from_numpy(golden[f"tokens_{j}"])).numpy()
    # The original's own float32 rounding error at this input sets the scale.
    tolerance = 3 * golden[f"fp64_maxabs_{j}"] + 2e-6
    assert logits.shape == golden[f"logits_{j}"].shape
    assert np.abs(logits - golden[f"logits_{j}"]).max() <= tolerance


@pytest.mark.parametrize("j", range(8))
def test_goal_conditioned_logits(j: int) -> None:
    golden = load_golden("beam_search_goal")
    tokens, goals = (torch.from_numpy(golden[f"{key}_{j}"]) for key in ("tokens", "goals"))
    with torch.no_grad():
        logits = golden_model("odd_goal")(tokens, goals).numpy()
        exact = build_golden_model("odd_goal").double()(tokens, goals).numpy()
    # This file has no error of the original's float32 run; ours, of the same sums, stands in.
    tolerance = 3 * np.abs(logits - exact).max() + 2e-6
    assert np.abs(logits - golden[f"logits_{j}"]).max() <= tolerance


def test_the_correct_goal_mask_is_another_one() -> None:
    golden = load_golden("beam_search_goal")
    model = build_golden_model("odd_goal", goal_value_mask="correct")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["tokens_7"]), torch.from_numpy(golden["goals_7"]))
    assert np.abs(logits.numpy() - golden["logits_7"]).max() > 0.1


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradients(case: str) -> None:
    golden = load_golden(case)
    weights = {f"{kind}_weight": float(golden[f"{kind}_weight"]) for kind in WEIGHTED_KINDS}
    model = build_golden_model(LOSSES[case], **weights)
    batch = (torch.from_numpy(golden[key]) for key in ("tokens", "targets", "mask"))
    loss = model.loss(*batch)
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden["loss"], rtol=2e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        norm, expected = parameter.grad.norm().item(), golden[f"gradnorm/{name}"]
        if name.endswith("key.bias"):  # softmax ignores it: both are rounding errors around zero
            scale = 2e-5 * golden[f"gradnorm/{name[:-4]}weight"]
            assert max(norm, expected) <= scale, name
        else:
            np.testing.assert_allclose(norm, expected, rtol=2e-5, err_msg=name)
    assert_gradient_close(model.tok_emb.weight, golden["grad_tok_emb_weight"])
    query = model.get_parameter("blocks.0.attn.query.weight")
    assert_gradient_close(query, golden["grad_blocks_0_attn_query_weight"])


def assert_gradient_close(parameter: torch.Tensor, golden: NDArray[np.float32]) -> None:
    """Within 2e-5 of the tensor's largest entry: sums of cancelling terms have no finer scale."""
    assert parameter.grad is not None
    error = np.abs(parameter.grad.numpy() - golden).max()
    assert error <= 2e-5 * np.abs(golden).max()
