"""Plans of faster-trajectory-transformer as it publishes them, its cache's quirks included.

Source: Howuhh/faster-trajectory-transformer at 213e58d. Its model is trained with values hidden,
but its cached decoding shows them (models/gpt/gpt.py:33-39), and a cache that outgrows the window
keeps the old position embeddings (planning/sample.py:39-47). Plans made that way are another
model's than the trained one's; here they are reproduced, token for token under the same seed of
torch. Keys and values are cached, where the source caches the inputs that it makes them from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tt_fast.compat.faster_tt_models import PublishedGPT
from tt_fast.validate import require


class CachedDecoder:
    """Rows of tokens, and what their model remembers of them.

    Letters in shapes: R rows, T tokens, E embedding_dim, H heads, V vocab_size.

    Args:
        model: theirs.
        contexts: (R, T) int64 tokens, T at most its seq_len.
    """

    def __init__(self, model: PublishedGPT, contexts: Tensor) -> None:
        self.model = model
        self.length = contexts.shape[1]
        """Tokens in the cache; the next one's position"""
        self.tokens = contexts[:, :0]
        """(R, drawn) tokens drawn since"""
        config = model.config
        rows, heads = len(contexts), config.num_heads
        shape = (config.num_layers, 2, rows, heads, model.seq_len, config.embed_dim // heads)
        self._cache = torch.zeros(shape, device=contexts.device)  # keys, then values
        self._pending: Tensor | None = self._prefill(contexts)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; some may repeat, others may be left out."""
        cache = self._cache
        self._cache = cache.new_empty(*cache.shape[:2], len(rows), *cache.shape[3:])
        self._cache[..., : self.length, :] = cache[:, :, rows, :, : self.length]
        self.tokens = self.tokens[rows]
        self._pending = None if self._pending is None else self._pending[rows]

    def draw(self, num_tokens: int, top_k: int | None, temperature: float) -> Tensor:
        """Draw and append tokens of every row (sample.py:10-57).

        Returns:
            (R, num_tokens, V) logits before temperature and truncation.
        """
        found = []
        for _ in range(num_tokens):
            logits = self.next_logits()
            found.append(logits)
            drawn = torch.multinomial(_probs(logits / temperature, top_k), num_samples=1)
            self.tokens = torch.cat([self.tokens, drawn], dim=1)
        return torch.stack(found, dim=1)

    def next_logits(self) -> Tensor:
        """(R, V) logits of the next token."""
        if self._pending is None:
            return self.step(self.tokens[:, -1])
        logits, self._pending = self._pending, None
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token a row, (R,), and return the logits of the one after it, (R, V)."""
        weights, position = self.model.weights, self._make_room()
        dim = position % self.model.config.transition_dim
        x = weights["tok_emb.weight"][tokens + dim * self.model.config.vocab_size]
        x = (x + weights["pos_emb"][0, position])[:, None]
        self.length += 1
        for layer in range(self.model.config.num_layers):
            # no mask: old values are seen (gpt.py:37)
            x = self._block(layer, x, slice(position, position + 1), None)
        return self._logits(x[:, 0], dim)

    def _make_room(self) -> int:
        """Drop the oldest transitions if the next token would not fit; where it goes."""
        width = self.model.config.transition_dim
        excess = max(0, self.length + 1 - self.model.seq_len)
        dropped = -(-excess // width) * width
        if dropped:
            kept = self._cache[..., dropped : self.length, :].clone()
            self.length -= dropped
            self._cache[..., : self.length, :] = kept
        return self.length

    def _prefill(self, contexts: Tensor) -> Tensor:
        """(R, V) logits after the contexts, values hidden (gpt.py:25-32)."""
        config, weights, count = self.model.config, self.model.weights, contexts.shape[1]
        dims = torch.arange(count, device=contexts.device) % config.transition_dim
        x = weights["tok_emb.weight"][contexts + dims * config.vocab_size]
        x = x + weights["pos_emb"][:, :count]
        mask = torch.ones(count, count, dtype=torch.bool, device=contexts.device).tril()
        mask[:, config.transition_dim - 1 :: config.transition_dim] = False
        for layer in range(config.num_layers):
            x = self._block(layer, x, slice(0, count), mask)
        return self._logits(x[:, -1], (count - 1) % config.transition_dim)

    def _block(self, layer: int, x: Tensor, where: slice, mask: Tensor | None) -> Tensor:
        """One block; (R, T, E) of the tokens that go to the cache at `where`."""
        prefix = f"blocks.{layer}."
        projected = self._linear(self._norm(x, f"{prefix}norm1"), f"{prefix}attention.in_proj_")
        heads = projected.unflatten(2, (3, self.model.config.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (R, H, T, E / H) each
        cache = self._cache[layer]
        cache[0, :, :, where], cache[1, :, :, where] = key, value
        seen = cache[:, :, :, : where.stop]
        y = F.scaled_dot_product_attention(query, seen[0], seen[1], attn_mask=mask)
        y = y.transpose(1, 2).flatten(2)
        x = x + self._linear(y, f"{prefix}attention.out_proj.")
        hidden = F.gelu(self._linear(self._norm(x, f"{prefix}norm2"), f"{prefix}mlp.0."))
        return x + self._linear(hidden, f"{prefix}mlp.2.")

    def _linear(self, x: Tensor, prefix: str) -> Tensor:
        weights = self.model.weights
        return F.linear(x, weights[f"{prefix}weight"], weights[f"{prefix}bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weights = self.model.weights
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def _logits(self, x: Tensor, dim: int) -> Tensor:
        """(R, E) -> (R, V), by the head of a dimension if each has its own."""
        head = self.model.weights["head.weight"]
        matrix = head[dim] if head.ndim == 3 else head
        return F.linear(self._norm(x, "norm"), matrix, self.model.weights.get("head.bias"))


def _probs(logits: Tensor, top_k: int | None) -> Tensor:
    """Probabilities after truncation (sample.py:10-22, utils/common.py:71-74)."""
    if top_k is not None:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    return logits.softmax(dim=-1)


@dataclass(frozen=True)
class PublishedPlan:
    """The settings of one of their plans; meanings and defaults are theirs (beam.py:9-11)."""

    steps: int
    beam_width: int
    sample_expand: int
    discount: float = 0.99
    k_obs: int | None = 1
    k_reward: int | None = 1
    k_act: int | None = None
    temperature: float = 1.0


def plan(
    model: PublishedGPT, bin_centers: Tensor, contexts: Tensor, config: PublishedPlan
) -> Tensor:
    """Beam search as they do it (beam.py:65-147; of one context also beam.py:8-62).

    Args:
        model: theirs.
        bin_centers: (transition_dim, vocab_size) of the discretizer, on the model's device.
        contexts: (num_contexts, context_len) int64 tokens on the model's device, cropped already.
        config: settings.

    Returns:
        (num_contexts, steps * transition_dim - observation_dim) int64 tokens of the best plans:
        action, reward, value, then the next observation, and so on.

    Raises:
        ValueError: a context that is longer than the model's window.
    """
    count, dims = len(contexts), model.config
    fits = contexts.shape[1] <= model.seq_len
    require(fits, "context", f"at most {model.seq_len} tokens", contexts.shape[1])
    width, expand = config.beam_width, config.sample_expand
    decoder = CachedDecoder(model, contexts)
    discounts = config.discount ** torch.arange(config.steps + 1, device=contexts.device)
    firsts = torch.arange(count, device=contexts.device)[:, None]
    rows = firsts.expand(-1, width)  # (num_contexts, beam_width), into the decoder's rows
    rewards = torch.zeros(count, config.steps + 1, device=contexts.device)
    for t in range(config.steps):
        tiled = rows.repeat(1, expand).flatten()  # copies lie as blocks (beam.py:90)
        decoder.take(tiled)
        rewards = rewards[tiled]
        decoder.draw(dims.action_dim, config.k_act, config.temperature)
        logits = decoder.draw(2, config.k_reward, config.temperature)
        rewards[:, t : t + 2] = (logits.softmax(dim=-1) * bin_centers[-2:]).sum(dim=-1)
        values, kept = (rewards * discounts).sum(dim=-1).view(count, -1).topk(width)
        rows = kept + firsts * width * expand
        decoder.take(rows.flatten())
        rewards = rewards[rows.flatten()]
        rows = torch.arange(count * width, device=contexts.device).view(count, width)
        if t < config.steps - 1:
            decoder.draw(dims.observation_dim, config.k_obs, config.temperature)
    return decoder.tokens[rows.gather(1, values.argmax(dim=-1, keepdim=True))[:, 0]]
