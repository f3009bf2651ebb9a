"""The model against its naive twin, what it may and may not see, and every refusal."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, weights_equal

from tt_fast.config import TOKEN_KINDS, ModelConfig
from tt_fast.model import TrajectoryTransformer, attention_mask

SMALL = ModelConfig(
    observation_dim=3,
    action_dim=2,
    vocab_size=5,
    num_transitions=4,
    num_layers=2,
    num_heads=2,
    embed_dim=8,
)
OBSERVATION, ACTION, REWARD, VALUE = range(4)


def random_model(config: ModelConfig, seed: int = 0) -> TrajectoryTransformer:
    """In float64 and eval mode, with weights large enough that everything matters."""
    torch.manual_seed(seed)
    model = TrajectoryTransformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model


def random_tokens(config: ModelConfig, batch: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Stop tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size + 1, (batch, num_tokens), generator=generator)


def random_goal(config: ModelConfig, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.observation_dim)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def goal_config(goal_value_mask: str = "correct") -> ModelConfig:
    settings: dict[str, Any] = {"goal_conditioned": True, "goal_value_mask": goal_value_mask}
    return ModelConfig(3, 2, 5, 4, 2, 2, 8, **settings)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_heads = draw(st.integers(1, 3))
    return ModelConfig(
        observation_dim=draw(st.integers(1, 3)),
        action_dim=draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(2, 5)),
        num_transitions=draw(st.integers(1, 3)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=num_heads,
        embed_dim=num_heads * draw(st.integers(1, 4)),
    )


# --- forward --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(configs(), st.data())
def test_logits_equal_the_naive_twin(config: ModelConfig, data: st.DataObject) -> None:
    model = random_model(config)
    num_tokens = data.draw(st.integers(1, config.block_size))
    tokens = random_tokens(config, 2, num_tokens, seed=num_tokens)
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = model(tokens).numpy()
    assert logits.shape == (2, num_tokens, config.vocab_size + 1)
    for row in range(2):
        expected = reference.logits(weights, config, tokens[row].numpy())
        # float64 throughout: a dozen layers of sums stay far below 1e-10 of the largest logit
        np.testing.assert_allclose(logits[row], expected, atol=1e-10 * np.abs(expected).max())


@given(st.integers(1, SMALL.block_size - 1))
def test_a_token_moves_no_logits_before_it(position: int) -> None:
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 1, SMALL.block_size)
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1) % SMALL.vocab_size
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert moved[:position].max() < 1e-12
    assert moved[position] > 1e-6


@pytest.mark.parametrize("config", [SMALL, goal_config()])
def test_a_value_token_moves_the_next_observation_and_nothing_later(config: ModelConfig) -> None:
    model = random_model(config)
    tokens = random_tokens(config, 1, config.block_size)
    goal = random_goal(config, 1) if config.goal_conditioned else None
    value = 2 * config.transition_dim - 1
    changed = tokens.clone()
    changed[0, value] = (changed[0, value] + 1) % config.vocab_size
    with torch.no_grad():
        moved = (model(tokens, goal) - model(changed, goal)).abs().amax(dim=(0, 2))
    assert (moved > 1e-12).nonzero().flatten().tolist() == [value]


def test_the_originals_goal_mask_hides_observations_and_shows_values() -> None:
    config = goal_config("original")
    mask = attention_mask(config)
    last = mask[-1]  # sees every column that is not hidden
    goal_len, dims = config.goal_len, config.transition_dim
    hidden = (~last).nonzero().flatten() - goal_len
    assert hidden.tolist() == [k * dims - 1 - goal_len for k in range(1, 5)]
    assert last[goal_len + dims - 1 :: dims].all()


def test_every_goal_dimension_moves_the_logits() -> None:
    config = goal_config()
    model, tokens = random_model(config), random_tokens(config, 1, 4)
    goal = random_goal(config, 1)
    for dim in range(config.observation_dim):
        other = goal.clone()
        other[0, dim] = (other[0, dim] + 1) % config.vocab_size
        with torch.no_grad():
            assert (model(tokens, goal) - model(tokens, other)).abs().max() > 1e-6


def test_stop_tokens_of_all_dimensions_share_an_embedding() -> None:
    model = random_model(SMALL)
    tokens = torch.full((1, SMALL.block_size), SMALL.vocab_size)
    model(tokens).sum().backward()
    gradient = model.tok_emb.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [
        SMALL.vocab_size * SMALL.transition_dim
    ]


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model = TrajectoryTransformer(SMALL)
    tokens = random_tokens(SMALL, 1, 9)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kind", ["embed_dropout", "residual_dropout", "attention_dropout"])
def test_each_dropout_is_used(kind: str) -> None:
    none: dict[str, Any] = dict.fromkeys(
        ("embed_dropout", "residual_dropout", "attention_dropout"), 0.0
    )
    tokens = random_tokens(SMALL, 1, 9)
    silent = TrajectoryTransformer(ModelConfig(3, 2, 5, 4, 2, 2, 8, **none))
    assert torch.equal(silent(tokens), silent(tokens))
    noisy = TrajectoryTransformer(ModelConfig(3, 2, 5, 4, 2, 2, 8, **(none | {kind: 0.5})))
    assert not torch.equal(noisy(tokens), noisy(tokens))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    weights = TrajectoryTransformer(ModelConfig(3, 2, embed_dim=64)).state_dict()
    assert weights["tok_emb.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.0.mlp.0.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["head.weight"].abs().max() == pytest.approx(1 / math.sqrt(64), rel=0.01)
    assert weights["pos_emb"].abs().max() == 0
    assert all(w.abs().max() == 0 for name, w in weights.items() if name.endswith("bias"))


# --- losses ---------------------------------------------------------------------------------------


def naive_losses(model: TrajectoryTransformer, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
    """(B, T) cross-entropies by their definition."""
    with torch.no_grad():
        logits = model(tokens).numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets.numpy()[..., None], axis=-1)[..., 0]


def kind_of(position: int, config: ModelConfig) -> int:
    """Index in TOKEN_KINDS of the target at an input position."""
    dim = (position + 1) % config.transition_dim
    if dim < config.observation_dim:
        return OBSERVATION
    if dim < config.observation_dim + config.action_dim:
        return ACTION
    return REWARD if dim == config.transition_dim - 2 else VALUE


@given(st.integers(1, SMALL.block_size), st.integers(0, 99))
def test_losses_equal_their_definition(num_tokens: int, seed: int) -> None:
    weights: dict[str, Any] = {"action_weight": 5.0, "reward_weight": 0.5, "value_weight": 3.0}
    config = ModelConfig(3, 2, 5, 4, 2, 2, 8, **weights)
    model = random_model(config)
    tokens, targets = (random_tokens(config, 2, num_tokens, seed + i) for i in range(2))
    mask = random_tokens(config, 2, num_tokens, seed + 2) > 1
    each = naive_losses(model, tokens, targets)
    kinds = [kind_of(p, config) for p in range(num_tokens)]

    weighted = each * np.array([1.0, 5.0, 0.5, 3.0])[kinds] * mask.numpy()
    loss = model.loss(tokens, targets, mask)
    assert loss.item() == pytest.approx(weighted.sum() / weighted.size, rel=1e-10)
    by_kind = model.losses_by_kind(tokens, targets, mask)
    assert tuple(by_kind) == TOKEN_KINDS
    for kind, name in enumerate(TOKEN_KINDS):
        chosen = mask.numpy() & (np.array(kinds) == kind)
        expected = each[chosen].mean() if chosen.any() else 0.0
        assert by_kind[name].item() == pytest.approx(expected, rel=1e-10)


def test_the_goal_reaches_the_losses() -> None:
    config = goal_config()
    model, tokens, goal = random_model(config), random_tokens(config, 2, 9), random_goal(config, 2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    other = (goal + 1) % config.vocab_size
    assert model.loss(tokens, tokens, mask, goal) != model.loss(tokens, tokens, mask, other)
    by_kind = model.losses_by_kind(tokens, tokens, mask, goal)
    assert by_kind["value"] != model.losses_by_kind(tokens, tokens, mask, other)["value"]


# --- attention maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, goal_config()])
def test_attention_maps(config: ModelConfig) -> None:
    goal = random_goal(config, 2) if config.goal_conditioned else None
    maps = random_model(config).attention_maps(random_tokens(config, 2, 10), goal)
    size = 10 + config.goal_len
    assert maps.shape == (2, 2, 2, size, size)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones_like(maps[..., 0]))
    seen = attention_mask(config)[:size, :size]
    assert (maps[..., ~seen] == 0).all()
    assert (maps[..., seen] > 0).all()


def test_attention_maps_are_the_weights_that_the_model_uses() -> None:
    model = random_model(ModelConfig(3, 2, 5, 4, num_layers=1, num_heads=2, embed_dim=8))
    tokens = random_tokens(SMALL, 1, 10)
    block: Any = model.blocks[0]
    seen = {}
    block.attn.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], out=out))
    with torch.no_grad():
        model(tokens)
        maps = model.attention_maps(tokens)[0, 0]  # (num_heads, T, T)
        values = block.attn.value(seen["x"])[0].unflatten(-1, (2, 4))  # (T, num_heads, 4)
        mixed = torch.einsum("hts,shd->thd", maps, values).flatten(1)
        torch.testing.assert_close(block.attn.proj(mixed), seen["out"][0])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "tokens: expected shape (B, T), T <= 27, got (4,)"),
        (
            torch.zeros(1, 28, dtype=torch.int64),
            "tokens: expected shape (B, T), T <= 27, got (1, 28)",
        ),
        (
            torch.zeros(1, 0, dtype=torch.int64),
            "tokens: expected shape (B, T), T <= 27, got (1, 0)",
        ),
        (torch.zeros(1, 4), "tokens: expected integers, got torch.float32"),
        (torch.tensor([[0, 6]]), "tokens: expected ids in [0, 5], got '0..6'"),
        (torch.tensor([[-1, 5]]), "tokens: expected ids in [0, 5], got '-1..5'"),
    ],
)
def test_bad_tokens(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model(SMALL)(tokens)


def test_bad_targets() -> None:
    tokens = random_tokens(SMALL, 1, 4)
    with pytest.raises(ValueError, match=re.escape("targets: expected ids in [0, 5], got")):
        random_model(SMALL).loss(tokens, tokens + 3, torch.ones(1, 4))


@pytest.mark.parametrize(
    ("config", "goal", "message"),
    [
        (SMALL, torch.zeros(1, 3, dtype=torch.int64), "goal: expected None, got tensor"),
        (goal_config(), None, "goal: expected tokens, got None"),
        (
            goal_config(),
            torch.zeros(1, 2, dtype=torch.int64),
            "goal: expected shape (1, 3), got (1, 2)",
        ),
        (goal_config(), torch.tensor([[0, 0, 5]]), "goal: expected ids in [0, 4], got '0..5'"),
    ],
)
def test_bad_goals(config: ModelConfig, goal: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model(config)(random_tokens(config, 1, 4), goal)


def test_the_originals_stored_masks_are_ignored() -> None:
    """Its state_dict holds blocks.i.attn.mask, [1, 1, block, block] (transformers.py:25)."""
    model = tiny_model()
    stored = {f"blocks.{i}.attn.mask": torch.ones(1, 1, 27, 27) for i in range(2)}
    copy = TrajectoryTransformer(model.config)
    copy.load_state_dict(model.state_dict() | stored)
    assert weights_equal(model, copy)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        copy.load_state_dict(model.state_dict() | {"blocks.0.attn.bias": torch.ones(1)})


def test_loss_refuses_shapes_that_differ() -> None:
    model, tokens = tiny_model(), torch.zeros(3, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets: expected shape \(3, 6\), got \(6, 3\)"):
        model.loss(tokens, tokens.T, torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"mask: expected shape \(3, 6\), got \(3, 1\)"):
        model.loss(tokens, tokens, torch.ones(3, 1))
