"""Whether a model's weights have changed since they were packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fingerprint(weights: Iterable[Tensor]) -> tuple[Any, ...]:
    """What is another one when a weight is.

    Versions alone are not: fused optimizers and writes to `.data` leave them as they are. So the
    contents count, too: sums of their bits, 0.7 ms between two plans at the official size on a CPU.
    """
    found = [weight.detach() for weight in weights]
    places = tuple((w.device, w.data_ptr(), 0 if w.is_inference() else w._version) for w in found)
    return places, _contents(found)


def _contents(weights: list[Tensor]) -> tuple[int, ...]:
    if all(weight.device.type == "cpu" for weight in weights):
        return tuple(map(_sum_of_bits, weights))
    return (sum_of_bytes(weights),)


def sum_of_bytes(weights: list[Tensor]) -> int:
    """Of all weights on a GPU: few launches, one transfer."""
    return int(torch.cat([*map(_bytes, weights)]).sum(dtype=torch.int64))


def _sum_of_bits(weight: Tensor) -> int:
    raw = _bytes(weight).numpy()
    word = np.int64 if raw.nbytes % 8 == 0 else np.uint8
    return int(raw.view(word).sum(dtype=np.int64))


def _bytes(weight: Tensor) -> Tensor:
    return weight.contiguous().view(-1).view(torch.uint8)
