"""From raw arrays to training windows, against the original's dataset (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import load_golden
from numpy.typing import NDArray

from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import TokenWindows, Transitions, build_transitions
from tt_fast.discretizer import Discretizer

FILES = ("dataset_step1", "dataset_step1_penalty", "dataset_step2_penalty")


@dataclass(frozen=True)
class Built:
    """One golden file and what the package makes of its raw arrays."""

    golden: dict[str, NDArray[Any]]
    transitions: Transitions
    discretizer: Discretizer
    windows: TokenWindows


@pytest.fixture(scope="module", params=FILES)
def built(request: pytest.FixtureRequest) -> Built:
    golden = load_golden(request.param)
    penalty = float(golden["penalty"])
    transitions = build_transitions(
        raw_dataset(golden),
        discount=float(golden["discount"]),
        termination_penalty=None if np.isnan(penalty) else penalty,
        max_path_length=int(golden["max_path_length"]),
    )
    num_bins, step = int(golden["N"]), int(golden["step"])
    discretizer = Discretizer.fit(transitions.values, num_bins)
    windows = TokenWindows(
        discretizer.encode(transitions.values),
        transitions.path_lengths,
        int(golden["sequence_length"]) // step,
        num_bins,
        step=step,
        max_path_length=int(golden["max_path_length"]),
    )
    return Built(golden, transitions, discretizer, windows)


def raw_dataset(golden: dict[str, NDArray[Any]]) -> OfflineDataset:
    """The file's raw arrays; its last episode is open, so its end is a truncation."""
    terminations = golden["raw_terminals"].astype(bool)
    truncations = golden["raw_timeouts"].astype(bool)
    truncations[-1] |= not terminations[-1]
    arrays = (golden[f"raw_{key}"] for key in ("observations", "actions", "rewards"))
    return OfflineDataset(*arrays, terminations, truncations)


def test_paths(built: Built) -> None:
    np.testing.assert_array_equal(built.transitions.path_lengths, built.golden["path_lengths"])


def test_transitions(built: Built) -> None:
    rows, golden = built.transitions.values, built.golden["joined_raw"]
    np.testing.assert_array_equal(rows[:, :-1], golden[:, :-1])
    np.testing.assert_array_equal(rows[:, -2:-1], built.golden["rewards_raw"])
    # A value sums at most max_path_length rewards, each with a rounded power of the discount.
    num_terms = int(built.golden["max_path_length"])
    bound = 2 * num_terms * np.finfo(np.float64).eps * absolute_values(built)
    assert (np.abs(rows[:, -1] - golden[:, -1]) <= bound).all()
    np.testing.assert_array_equal(golden[:, -1:], built.golden["values_raw"])


def absolute_values(built: Built) -> NDArray[np.float64]:
    """Upper bound, per step, on the sum of |reward| over its path."""
    lengths = built.golden["path_lengths"]
    magnitudes = np.abs(built.golden["rewards_raw"][:, 0].astype(np.float64))
    totals = np.add.reduceat(magnitudes, np.cumsum(lengths) - lengths)
    return np.repeat(totals, lengths)


def test_thresholds(built: Built) -> None:
    golden = built.golden["thresholds"]
    np.testing.assert_array_equal(built.discretizer.thresholds[:, :-1], golden[:, :-1])
    bound = 2 * int(built.golden["max_path_length"]) * np.finfo(np.float64).eps
    largest = absolute_values(built).max()
    assert np.abs(built.discretizer.thresholds[:, -1] - golden[:, -1]).max() <= bound * largest


def test_windows_start_where_the_originals_do(built: Built) -> None:
    np.testing.assert_array_equal(built.windows.indices, built.golden["indices"][:, :2])


def test_tokens_targets_and_mask(built: Built) -> None:
    batch = built.windows.gather(torch.from_numpy(built.golden["item_idx"]))
    np.testing.assert_array_equal(batch.inputs, built.golden["X"])
    np.testing.assert_array_equal(batch.targets, built.golden["Y"])
    np.testing.assert_array_equal(batch.mask, built.golden["mask"].astype(bool))
