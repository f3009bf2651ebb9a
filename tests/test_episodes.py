"""A dataset's episodes and its summary."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from raw_data import make_arrays, without

from tt_fast.data import OfflineDataset, load_dataset

# --- summary


def test_summary():
    arrays = make_arrays(terminals=[1], timeouts=[4])
    arrays["rewards"] = np.arange(6.0)
    summary = load_dataset(arrays, env_id="Mine-v0", ref_scores=(0, 10)).summary()
    assert (summary.num_episodes, summary.num_transitions) == (3, 6)
    assert (summary.returns.min, summary.returns.mean, summary.returns.max) == (1.0, 5.0, 9.0)
    assert (summary.normalized.min, summary.normalized.max) == (10.0, 90.0)
    assert (summary.lengths.min, summary.lengths.mean, summary.lengths.max) == (1.0, 2.0, 3.0)
    assert (summary.num_terminations, summary.num_truncations, summary.num_nans) == (1, 2, 0)
    json.dumps(summary.to_dict())
    lines = str(summary).splitlines()
    assert "return min / mean / max      1.0 / 5.0 / 9.0" in lines
    assert "normalised min / mean / max  10.0 / 50.0 / 90.0" in lines
    assert "environment                  Mine-v0" in lines


def test_summary_counts_nans_of_a_dataset_made_by_hand():
    arrays = make_arrays()
    arrays["rewards"][2] = arrays["actions"][0, 0] = np.nan
    flags = {"terminations": arrays["terminals"], "truncations": np.eye(6, dtype=bool)[5]}
    dataset = OfflineDataset(**without(arrays, "terminals", "timeouts"), **flags)
    assert dataset.summary().num_nans == 2
    assert "no reference scores" in str(dataset.summary())


def test_returns_are_summed_in_float64():
    arrays = make_arrays(100_000) | {"rewards": np.full(100_000, 0.1, np.float32)}
    exact = np.float64(np.float32(0.1)) * 100_000
    np.testing.assert_allclose(load_dataset(arrays).episode_returns, [exact], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": np.zeros((0, 3), np.float32)}, "observations: expected at least one row"),
        (
            {"observations": np.zeros(6, np.float32)},
            "observations: expected float32 or float64, 2-D, 6 rows",
        ),
        ({"actions": np.zeros((6, 2), int)}, "actions: expected float32 or float64, 2-D, 6 rows"),
        (
            {"rewards": np.zeros((6, 1), np.float32)},
            "rewards: expected float32 or float64, 1-D, 6 rows",
        ),
        ({"terminations": np.zeros(5, bool)}, "terminations: expected bool, 1-D, 6 rows"),
        ({"truncations": np.zeros(6, int)}, "truncations: expected bool, 1-D, 6 rows"),
        ({"truncations": np.zeros(6, bool)}, "truncations: expected True in the last row"),
    ],
)
def test_dataset_made_by_hand_is_checked(change, message):
    arrays = make_arrays()
    fields = without(arrays, "terminals", "timeouts")
    fields |= {"terminations": arrays["terminals"], "truncations": np.eye(6, dtype=bool)[5]}
    with pytest.raises(ValueError, match=re.escape(message)):
        OfflineDataset(**(fields | change))
