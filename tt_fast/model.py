"""The Trajectory Transformer in plain PyTorch: it trains, and it is the oracle of every backend.

Source: trajectory/models/transformers.py and ein.py; names of the parameters are the original's, so
its weights load by name. Letters in shapes: B batch, T tokens, E embed_dim, H heads, V vocab_size,
D transition_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tt_fast.config import TOKEN_KINDS, ModelConfig
from tt_fast.validate import require


class Attention(nn.Module):
    """Causal self-attention that never looks at the tokens a mask hides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.resid_drop = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # x: (B, T, E), mask: (T, T) bool, True where a query (row) sees a key (column)
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        projected: Tensor = self.resid_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return projected

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, T) attention weights, for looking at."""
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        # (B, T, E) -> (B, H, T, E / H)
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of width 4 E with exact GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.residual_dropout),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), mask)
        y: Tensor = x + self.mlp(self.ln2(x))
        return y


class DimensionHead(nn.Module):
    """One linear map per dimension of a transition, without bias (trajectory/models/ein.py)."""

    def __init__(self, num_dims: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_dims, out_features, in_features))
        bound = 1.0 / math.sqrt(in_features)  # kaiming_uniform_ with a = sqrt(5)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        # x: (N, D, E) -> (N, D, V + 1)
        logits: Tensor = torch.einsum("eoi,bei->beo", self.weight, x)
        return logits


class TrajectoryTransformer(nn.Module):
    """A GPT over the tokens of trajectories (section 3 of the paper; transformers.py:85-327).

    Args:
        config: shape and regularisation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, vocab_size = config.embed_dim, config.vocab_size
        max_len = config.block_size + config.goal_len
        self.tok_emb = nn.Embedding(vocab_size * config.transition_dim + 1, width)
        # a goal has no position; the original still allots it rows (transformers.py:250-255)
        self.pos_emb = nn.Parameter(torch.zeros(1, max_len, width))
        self.drop = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = DimensionHead(config.transition_dim, width, vocab_size + 1)
        if config.goal_conditioned:
            self.goal_emb = nn.Embedding(vocab_size * config.observation_dim, width)
        self.apply(_init_weights)
        self.register_buffer("_mask", attention_mask(config), persistent=False)
        self._mask: Tensor
        # kept where the model is: a copy from the processor would wait for a GPU in every step
        self.register_buffer("_kinds", _target_kinds(config), persistent=False)
        self._kinds: Tensor

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights by name, the original's too.

        It stores every block's mask (transformers.py:25); ours follow from the config.
        """
        weights = {k: v for k, v in state_dict.items() if not k.endswith(".attn.mask")}
        return super().load_state_dict(weights, strict, assign)

    def forward(self, tokens: Tensor, goal: Tensor | None = None) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: (B, T) integers in [0, vocab_size], the first one being dimension 0 of a
                transition; T at most `config.block_size`.
            goal: (B, observation_dim) integers in [0, vocab_size - 1], for a goal-conditioned
                model and only for one.

        Returns:
            (B, T, vocab_size + 1); position p is dimension (p + 1) mod transition_dim's token, by
            the head of p mod transition_dim.

        Raises:
            ValueError: too long, a token out of range, or a goal that is missing or not wanted.
        """
        return self._logits(self._features(tokens, goal))

    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, goal: Tensor | None = None
    ) -> Tensor:
        """Weighted, masked cross-entropy averaged over ALL B * T tokens (transformers.py:220-240).

        Args:
            tokens, targets: (B, T) integers in [0, vocab_size].
            mask: (B, T), zero where a token does not count.
            goal: as in `forward`.

        Returns:
            Scalar, nats per token.
        """
        return self.weighted_loss(self.token_losses(tokens, targets, goal), mask)

    def losses_by_kind(
        self, tokens: Tensor, targets: Tensor, mask: Tensor, goal: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Unweighted cross-entropy per kind of target token, averaged over its unmasked tokens.

        Returns:
            Scalars in nats per token, keys `observation`, `action`, `reward`, `value`.
        """
        return self.mean_by_kind(self.token_losses(tokens, targets, goal), mask)

    def token_losses(self, tokens: Tensor, targets: Tensor, goal: Tensor | None = None) -> Tensor:
        """(B, T) cross-entropy of each target token, nats."""
        self._check_tokens("targets", targets)
        shape = tuple(tokens.shape)
        require(targets.shape == tokens.shape, "targets", f"shape {shape}", tuple(targets.shape))
        logits = self(tokens, goal)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape)

    def weighted_loss(self, token_losses: Tensor, mask: Tensor) -> Tensor:
        """Scalar loss from `token_losses` (B, T) and `mask` (B, T)."""
        shape = tuple(token_losses.shape)
        require(mask.shape == token_losses.shape, "mask", f"shape {shape}", tuple(mask.shape))
        kinds, config = self.target_kinds(token_losses.shape[1]), self.config
        weights = torch.ones_like(kinds, dtype=token_losses.dtype, device=token_losses.device)
        of_kind = (1.0, config.action_weight, config.reward_weight, config.value_weight)
        for kind_idx, weight in enumerate(of_kind):
            weights.masked_fill_(kinds == kind_idx, weight)
        return (token_losses * weights * mask).mean()

    def mean_by_kind(self, token_losses: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Mean of `token_losses` (B, T) over the unmasked targets of each kind."""
        kinds = self.target_kinds(token_losses.shape[1])
        means = {}
        for kind_idx, kind in enumerate(TOKEN_KINDS):
            chosen = mask * (kinds == kind_idx)
            means[kind] = (token_losses * chosen).sum() / chosen.sum().clamp(min=1)
        return means

    def target_kinds(self, num_tokens: int) -> Tensor:
        """(num_tokens,) index into TOKEN_KINDS of the target at each position of a window."""
        return self._kinds[:num_tokens]

    @torch.no_grad()
    def attention_maps(self, tokens: Tensor, goal: Tensor | None = None) -> Tensor:
        """Attention weights (num_layers, B, H, T, T), a goal's tokens first; rows are queries."""
        x = self._embed(tokens, goal)
        mask = self._mask[: x.shape[1], : x.shape[1]]
        maps = []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.weights(block.ln1(x), mask))
            x = block(x, mask)
        return torch.stack(maps)

    def _embed(self, tokens: Tensor, goal: Tensor | None) -> Tensor:
        """`_embedding`, with dropout of the tokens but not of the goal."""
        x = self._embedding(tokens, goal)
        goal_len = self.config.goal_len
        if goal is None:
            dropped: Tensor = self.drop(x)
            return dropped
        return torch.cat([x[:, :goal_len], self.drop(x[:, goal_len:])], dim=1)

    def _embedding(self, tokens: Tensor, goal: Tensor | None) -> Tensor:
        """(B, goal_len + T, E): token plus position; a goal's embedding before them."""
        config = self.config
        self._check_tokens("tokens", tokens)
        shape_ok = tokens.ndim == 2 and 1 <= tokens.shape[1] <= config.block_size
        require(shape_ok, "tokens", f"shape (B, T), T <= {config.block_size}", tuple(tokens.shape))
        self._check_goal(goal, len(tokens))
        x: Tensor = self.tok_emb(self._offset(tokens)) + self.pos_emb[:, : tokens.shape[1]]
        if goal is not None:
            x = torch.cat([self.goal_emb(self._offset(goal)), x], dim=1)
        return x

    def _offset(self, tokens: Tensor) -> Tensor:
        """Embedding index x + d * vocab_size; all stop tokens share the last one."""
        config = self.config
        dims = torch.arange(tokens.shape[1], device=tokens.device) % config.transition_dim
        is_stop = tokens == config.vocab_size
        last = config.vocab_size * config.transition_dim
        return torch.where(is_stop, last, tokens + dims * config.vocab_size)

    def _features(self, tokens: Tensor, goal: Tensor | None) -> Tensor:
        """(B, T, E): what the heads see, after the last LayerNorm, the goal's tokens left out."""
        x = self._embed(tokens, goal)
        mask = self._mask[: x.shape[1], : x.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        features: Tensor = self.ln_f(x[:, self.config.goal_len :])
        return features

    def _logits(self, features: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, V + 1), each position by its dimension's head."""
        num_tokens, transition_dim = features.shape[1], self.config.transition_dim
        x = F.pad(features, (0, 0, 0, -num_tokens % transition_dim))
        logits: Tensor = self.head(x.reshape(-1, transition_dim, x.shape[-1]))
        return logits.reshape(len(x), x.shape[1], -1)[:, :num_tokens]

    def _check_tokens(self, name: str, tokens: Tensor, limit: int | None = None) -> None:
        integers = not tokens.is_floating_point() and not tokens.is_complex()
        require(integers, name, "integers", tokens.dtype)
        if tokens.device.type == "cpu" and tokens.numel():  # elsewhere the check would wait
            low, high = int(tokens.min()), int(tokens.max())
            limit = self.config.vocab_size if limit is None else limit
            require(low >= 0 and high <= limit, name, f"ids in [0, {limit}]", f"{low}..{high}")

    def _check_goal(self, goal: Tensor | None, batch: int) -> None:
        config = self.config
        wanted = config.goal_conditioned
        require((goal is not None) == wanted, "goal", "tokens" if wanted else "None", goal)
        if goal is None:
            return
        shape = (batch, config.observation_dim)
        require(tuple(goal.shape) == shape, "goal", f"shape {shape}", tuple(goal.shape))
        self._check_tokens("goal", goal, config.vocab_size - 1)


def model_over(
    config: ModelConfig, parameters: Mapping[str, nn.Parameter]
) -> TrajectoryTransformer:
    """A model whose parameters are these very objects; torch's generator stays as it was.

    Args:
        config: of the model.
        parameters: all of its parameters, in its shapes, on one device.
    """
    with torch.random.fork_rng([]):  # initial weights draw from the global generator
        model = TrajectoryTransformer(config)
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, parameter)
    model._mask = model._mask.to(model.pos_emb.device)
    model._kinds = model._kinds.to(model.pos_emb.device)
    return model


def is_over(model: TrajectoryTransformer, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a model has these very parameters, still on the device of its mask."""
    own = dict(model.named_parameters())
    same = own.keys() == parameters.keys() and all(own[k] is parameters[k] for k in own)
    return same and model._mask.device == model.pos_emb.device


def attention_mask(config: ModelConfig) -> Tensor:
    """(goal_len + block_size,) squared, bool: which key (column) each query (row) sees.

    Causal, and every value token is hidden as a key from every query, its own included
    (transformers.py:24-29). With a goal, "original" hides the columns that the original's unshifted
    mask hides, which are observations.
    """
    size = config.goal_len + config.block_size
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    shift = config.goal_len if config.goal_value_mask == "correct" else 0
    mask[:, shift + config.transition_dim - 1 :: config.transition_dim] = False
    return mask


def _target_kinds(config: ModelConfig) -> Tensor:
    """(block_size,) index into TOKEN_KINDS of the target at each position."""
    counts = torch.tensor([config.observation_dim, config.action_dim, 1, 1])
    of_dim = torch.repeat_interleave(torch.arange(len(TOKEN_KINDS)), counts)
    return of_dim[(torch.arange(config.block_size) + 1) % config.transition_dim]


def _init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) matrices and embeddings, zero biases (transformers.py:119-127)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
