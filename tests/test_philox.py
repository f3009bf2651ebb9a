"""The generator's known answers and its addressing."""

import numpy as np
import pytest

from tt_fast.planning.philox import philox_uniforms, philox_word


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [
        ((0, 0), (0, 0, 0, 0), 0x6627E8D5),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xD16CFE09,
        ),
        ((42, 0), (5, 7, 2, 0), 0x8434339E),
    ],
)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], word: int) -> None:
    words = philox_word(key, tuple(np.asarray(np.uint64(c)) for c in counter))
    assert int(words) == word


def test_uniforms_are_addressed_by_row_token_and_plan() -> None:
    numbers = philox_uniforms(seed=42, plan_index=2, num_draws=9, num_rows=6)
    assert numbers.shape == (9, 6)
    assert numbers[7, 5] == pytest.approx(0.5164215, abs=1e-7)
    larger = philox_uniforms(seed=42, plan_index=2, num_draws=20, num_rows=30)
    np.testing.assert_array_equal(larger[:9, :6], numbers)


def test_high_seed_bits_count() -> None:
    low = philox_uniforms(7, 0, 3, 3)
    assert not np.array_equal(low, philox_uniforms(7 + (1 << 32), 0, 3, 3))
    np.testing.assert_array_equal(low, philox_uniforms(7 + (1 << 64), 0, 3, 3))


def test_uniforms_look_uniform() -> None:
    numbers = philox_uniforms(1, 0, 400, 250).ravel()
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=50, range=(0.0, 1.0))[0]
    expected = numbers.size / 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 94.6  # 99.99 % quantile at 49 degrees of freedom
