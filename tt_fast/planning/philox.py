"""The random numbers of a plan: philox4x32-10, addressed by (seed, row, token, plan).

A counter-based generator (Salmon et al., SC 2011) gives every draw its own address, so backends
that share or skip work still see the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox_word(
    key: tuple[int, int], counter: tuple[NDArray[np.uint64], ...]
) -> NDArray[np.uint64]:
    """Word 0 of philox4x32-10.

    Args:
        key: two 32-bit words.
        counter: four arrays of 32-bit words (as uint64) that broadcast together.

    Returns:
        32-bit words as uint64, of the broadcast shape.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0


def philox_uniforms(
    seed: int, plan_index: int, num_draws: int, num_rows: int
) -> NDArray[np.float64]:
    """Uniforms in [0, 1) of one plan: 24 bits each.

    Args:
        seed: key, taken modulo 2**64.
        plan_index: third word of the counter, taken modulo 2**32.
        num_draws: tokens drawn in the plan (second word).
        num_rows: rows after the tiling by n_expand (first word).

    Returns:
        (num_draws, num_rows).
    """
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    rows = np.arange(num_rows, dtype=np.uint64)[None, :]
    draws = np.arange(num_draws, dtype=np.uint64)[:, None]
    plan = np.uint64(plan_index & 0xFFFFFFFF)
    words = philox_word(key, (rows, draws, np.asarray(plan), np.asarray(np.uint64(0))))
    return (words >> np.uint64(8)).astype(np.float64) * 2.0**-24
