"""Three epochs of the original's Trainer, step for step: groups, schedule, clipping, loss."""

from __future__ import annotations

import numpy as np
import torch
from golden_files import load_golden
from tiny import tiny_model_config, tiny_train_config

from tt_fast.model import TrajectoryTransformer
from tt_fast.training.optimizer import Budget, build_optimizer


def test_weights_after_three_epochs_are_the_originals() -> None:
    golden = load_golden("train_steps")
    inputs, targets = (torch.from_numpy(golden[k]).long() for k in ("inputs", "targets"))
    mask = torch.from_numpy(golden["mask"])
    config = tiny_train_config(learning_rate=float(golden["learning_rate"]))
    assert config.batch_size == golden["batch_size"]
    budget = Budget(config, *inputs.shape)
    assert budget.num_windows * budget.window_len == golden["warmup_tokens"]

    model = TrajectoryTransformer(
        tiny_model_config(embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    )
    model.load_state_dict(_part(golden, "initial"))
    optimizer = build_optimizer(model, config)
    tokens = 0
    for _ in range(int(golden["num_epochs"])):
        for batch in torch.arange(len(inputs)).split(config.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate(tokens, tokens * 1e-12)
            optimizer.zero_grad()
            model.loss(inputs[batch], targets[batch], mask[batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            tokens += int((targets[batch] != model.config.vocab_size).sum())

    # AdamW divides by the root of a mean square, so that where a gradient is all rounding (a key's
    # bias) steps of up to the learning rate follow from rounding alone: these are left out
    initial, final, moved = _part(golden, "initial"), _part(golden, "final"), 0.0
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):
            # 36 steps of at most 6e-4, each right to a thousandth
            torch.testing.assert_close(parameter.detach(), final[name], rtol=0.0, atol=2e-5)
            moved = max(moved, float((parameter.detach() - initial[name]).abs().max()))
    assert moved > 1e-2  # a thousand times the tolerance


def _part(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """The weights under a prefix, by name."""
    names = [key for key in golden if key.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): torch.from_numpy(golden[name]) for name in names}
