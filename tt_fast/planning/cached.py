"""The portable fast backend: keys and values kept, equal prefixes computed once, in PyTorch.

Shapes: R rows, U distinct prefixes among them, W tokens of a window, C of them that are not values,
H heads, F = embed_dim / H. No position ever sees a value token, so none is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tt_fast.model import Block, TrajectoryTransformer
from tt_fast.planning.reference import Decoder, ReferenceBackend, window_start


class TorchBackend(ReferenceBackend):
    """Plans with a KV cache on any torch device; `search` is the reference's."""

    name = "torch"

    def make_decoder(self, model: TrajectoryTransformer, max_len: int) -> Decoder:
        """A decoder with a cache."""
        return CachedDecoder(model, max_len)


@dataclass(frozen=True)
class _Layer:
    """A block with its three projections as one matrix."""

    block: Block
    qkv_weight: Tensor
    qkv_bias: Tensor

    @classmethod
    def fuse(cls, block: Block) -> _Layer:
        parts = (block.attn.query, block.attn.key, block.attn.value)
        weight = torch.cat([part.weight for part in parts])
        return cls(block, weight, torch.cat([part.bias for part in parts]))

    def qkv(self, h: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """h (U, embed_dim) -> three of (U, H, F)."""
        joint = F.linear(self.block.ln1(h), self.qkv_weight, self.qkv_bias)
        q, k, v = joint.view(len(h), 3, num_heads, -1).unbind(1)
        return q, k, v

    def finish(self, h: Tensor, attended: Tensor) -> Tensor:
        """Residuals of attention, (U, H, F), and MLP."""
        h = h + self.block.attn.proj(attended.flatten(1))
        out: Tensor = h + self.block.mlp(self.block.ln2(h))
        return out


class CachedDecoder(Decoder):
    """Decodes a token at a time; after a crop, encodes the new windows in one pass.

    Matrix products run once per distinct prefix: rows that are equal so far are one group. Between
    `expand` and `keep` the copies of a beam share its cache and keep only their own tokens apart.
    """

    def __init__(self, model: TrajectoryTransformer, max_len: int) -> None:
        super().__init__(model, max_len)
        self._layers = [_Layer.fuse(block) for block in model.blocks]  # type: ignore[arg-type]
        self._num_heads = model.config.num_heads
        self._start = self._encoded = 0  # first token of the window, tokens encoded in all
        self._n_expand = 1
        self._groups = torch.empty(0, dtype=torch.int64)  # (R,) equal ids: equal prefixes
        self._logits = torch.empty(0)  # (R, vocab_size + 1)
        # per layer, keys and values: (beams, H, C, F) of the beams, (R, H, C, F) of copies' own
        self._beam: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []

    def begin(self, context: Tensor, num_rows: int) -> None:
        super().begin(context, 1)
        self._encode()
        super().begin(context, num_rows)
        self._beam = [(_repeat(k, num_rows), _repeat(v, num_rows)) for k, v in self._beam]
        self._logits = self._logits.expand(num_rows, -1)
        self._groups = self._groups.expand(num_rows)

    def expand(self, n_expand: int) -> None:
        super().expand(n_expand)
        self._n_expand = n_expand
        self._logits, self._groups = self._logits.repeat(n_expand, 1), self._groups.repeat(n_expand)
        empty = self._beam[0][0].new_empty(len(self.x), self._num_heads, 0, self._head_dim)
        self._own = [(empty, empty) for _ in self._layers]

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self._groups = self._groups[rows]
        if self._next_start() == self._start:  # else the cache is about to be made anew
            beams = rows % (len(self._beam[0][0]))
            self._beam = [
                (torch.cat([k[beams], own_k[rows]], 2), torch.cat([v[beams], own_v[rows]], 2))
                for (k, v), (own_k, own_v) in zip(self._beam, self._own, strict=True)
            ]
        self._n_expand, self._own = 1, []

    def logits(self) -> Tensor:
        if self._encoded < self.x.shape[1]:
            if self._next_start() == self._start:
                self._decode()
            else:
                self._encode()
        return self._logits

    # ---- forward passes ----

    def _encode(self) -> None:
        """All tokens of every row's window, (R, W): new cache, new logits."""
        self._start = self._next_start()
        windows = self.x[:, self._start :]
        nodes, tokens, positions = _distinct_prefixes(windows, self.model.config.vocab_size + 1)
        first_row, first_position = _first_places(nodes, len(tokens))
        leaves = nodes[:, -1]
        kept = self._visible(windows.shape[1])
        places = nodes[:, kept]  # (R, C)
        mask = torch.arange(windows.shape[1], device=self.device)[:, None] >= kept
        h = self._embed(tokens, positions)
        self._beam = []
        for layer in self._layers[:-1]:
            q, k, v = layer.qkv(h, self._num_heads)
            keys, values = self._add_cache(k[places], v[places])
            rows = F.scaled_dot_product_attention(q[nodes].transpose(1, 2), keys, values, mask)
            h = layer.finish(h, rows.transpose(1, 2)[first_row, first_position])
        # of the last layer only the newest tokens go on
        q, k, v = self._layers[-1].qkv(h, self._num_heads)
        keys, values = self._add_cache(k[places], v[places])
        rows = F.scaled_dot_product_attention(q[leaves][:, :, None], keys, values)[:, :, 0]
        groups, first = _group(leaves)
        h = self._layers[-1].finish(h[leaves[first]], rows[first])
        self._set_logits(h, groups)

    def _add_cache(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, H, F) -> the beams' cache of one more layer, (R, H, C, F)."""
        self._beam.append((k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()))
        return self._beam[-1]

    def _decode(self) -> None:
        """The newest token of every row."""
        position = self.x.shape[1] - 1 - self._start
        newest = self.x[:, -1]
        groups, first = _group(self._groups * (self.model.config.vocab_size + 1) + newest)
        h = self._embed(newest[first], torch.full_like(first, position))
        is_value = position % self.model.config.transition_dim == self._value_dim
        for i, layer in enumerate(self._layers):
            q, k, v = layer.qkv(h, self._num_heads)
            if not is_value:
                cache = self._own if self._own else self._beam
                old_k, old_v = cache[i]
                new_k, new_v = k[groups][:, :, None], v[groups][:, :, None]
                cache[i] = (torch.cat([old_k, new_k], 2), torch.cat([old_v, new_v], 2))
            h = layer.finish(h, self._attend(i, q[groups])[first])
        self._set_logits(h, groups)

    def _attend(self, layer_idx: int, q: Tensor) -> Tensor:
        """(R, H, F) queries over their beam's cache and, between expand and keep, their own."""
        keys, values = self._beam[layer_idx]
        if not self._own:
            return F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]
        own_keys, own_values = self._own[layer_idx]
        # one matrix product a beam: its copies e as rows of q, (beams, H, e, F)
        q = (q / self._head_dim**0.5).view(self._n_expand, -1, *q.shape[1:])
        beam_scores = q.permute(1, 2, 0, 3) @ keys.transpose(-2, -1)
        beam_scores = beam_scores.permute(2, 0, 1, 3).flatten(0, 1)  # (R, H, C)
        own_scores = (q.flatten(0, 1)[:, :, None] @ own_keys.transpose(-2, -1))[:, :, 0]
        weights = torch.cat([beam_scores, own_scores], dim=-1).softmax(dim=-1)
        beam_weights, own_weights = weights.split([keys.shape[2], own_keys.shape[2]], dim=-1)
        tiled = beam_weights.unflatten(0, (self._n_expand, -1)).permute(1, 2, 0, 3)
        from_beam = (tiled @ values).permute(2, 0, 1, 3).flatten(0, 1)
        attended: Tensor = from_beam + (own_weights[:, :, None] @ own_values)[:, :, 0]
        return attended

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(U,) tokens at window positions (U,) -> (U, embed_dim)."""
        config = self.model.config
        index = tokens + positions % config.transition_dim * config.vocab_size
        stop = config.vocab_size * config.transition_dim
        index = torch.where(tokens == config.vocab_size, stop, index)
        h: Tensor = self.model.tok_emb(index) + self.model.pos_emb[0, positions]
        return h

    def _set_logits(self, h: Tensor, groups: Tensor) -> None:
        """h (U, embed_dim) of the newest tokens; groups (R,) rows to U."""
        dim = (self.x.shape[1] - 1) % self.model.config.transition_dim
        logits = F.linear(self.model.ln_f(h), self.model.head.weight[dim])
        self._logits, self._groups = logits.float()[groups], groups
        self._encoded = self.x.shape[1]

    # ---- where things are ----

    @property
    def _head_dim(self) -> int:
        return self.model.config.embed_dim // self._num_heads

    @property
    def _value_dim(self) -> int:
        return self.model.config.transition_dim - 1

    def _next_start(self) -> int:
        return window_start(self.x.shape[1], self.max_len, self.model.config.transition_dim)

    def _visible(self, window_len: int) -> Tensor:
        """Positions of a window that hold no value token, (C,)."""
        positions = torch.arange(window_len, device=self.device)
        return positions[positions % self.model.config.transition_dim != self._value_dim]


def _repeat(cache: Tensor, num_rows: int) -> Tensor:
    """(1, ...) -> (num_rows, ...), in memory of its own."""
    return cache.expand(num_rows, *cache.shape[1:]).contiguous()


def _group(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (R,) in [0, U) of equal keys (R,), and the first row (U,) of each."""
    distinct, ids = keys.unique(return_inverse=True)
    rows = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(distinct, len(keys)).scatter_reduce_(0, ids, rows, "amin")
    return ids, first


def _distinct_prefixes(windows: Tensor, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of the tree of all prefixes of windows (R, W).

    Returns:
        The node (R, W) of every prefix, and each node's token and position, (U,) both.
    """
    nodes, tokens, positions = [], [], []
    ids, count = torch.zeros_like(windows[:, 0]), 0
    for position in range(windows.shape[1]):
        ids, first = _group(ids * num_ids + windows[:, position])
        nodes.append(ids + count)
        tokens.append(windows[first, position])
        positions.append(torch.full_like(first, position))
        count += len(first)
    return torch.stack(nodes, dim=1), torch.cat(tokens), torch.cat(positions)


def _first_places(nodes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A row and a position (U,) where each of `count` nodes of (R, W) is found."""
    flat = torch.arange(nodes.numel(), device=nodes.device)
    missing = torch.full((count,), nodes.numel(), device=nodes.device)
    place = missing.scatter_reduce_(0, nodes.flatten(), flat, "amin")
    return place // nodes.shape[1], place % nodes.shape[1]
