"""Transitions and windows against loops over episodes, and every refusal."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import TokenWindows, build_transitions, marginal_entropies

STOP = 11


def dataset(num_steps: int, seed: int = 0, ends: dict[int, str] | None = None) -> OfflineDataset:
    """Random steps; `ends` says which rows terminate, truncate or do both. The last row ends."""
    rng = np.random.default_rng(seed)
    ends = {num_steps - 1: "truncates"} | (ends or {})
    terminates = [ends.get(t, "") in ("terminates", "both") for t in range(num_steps)]
    truncates = [ends.get(t, "") in ("truncates", "both") for t in range(num_steps)]
    return OfflineDataset(
        rng.standard_normal((num_steps, 3), dtype=np.float32),
        rng.standard_normal((num_steps, 2), dtype=np.float32),
        rng.standard_normal(num_steps, dtype=np.float32),
        np.array(terminates),
        np.array(truncates),
    )


@st.composite
def datasets(draw: st.DrawFn) -> OfflineDataset:
    num_steps = draw(st.integers(2, 40))
    kinds = st.sampled_from(["terminates", "truncates", "both"])
    ends = draw(st.dictionaries(st.integers(0, num_steps - 1), kinds))
    return dataset(num_steps, draw(st.integers(0, 99)), ends)


# --- transitions ----------------------------------------------------------------------------------


@given(
    datasets(),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([None, -100.0]),
)
def test_transitions_equal_a_loop_over_paths(
    data: OfflineDataset, discount: float, penalty: float | None
) -> None:
    built = build_transitions(
        data, discount=discount, termination_penalty=penalty, max_path_length=40
    )
    rewards = data.rewards.astype(np.float64)
    if penalty is not None:
        rewards[data.terminations] = penalty
    rows = np.concatenate([data.observations, data.actions, rewards[:, None]], axis=1)
    paths = reference.paths(rows, data.terminations | data.truncations)

    assert built.path_lengths.tolist() == [len(path) for path in paths]
    np.testing.assert_array_equal(built.values[:, :-1], np.concatenate(paths))
    values = [reference.values_of_rewards(path[:, -1], discount) for path in paths]
    # 40 additions and powers, each rounded once
    bound = 2 * 40 * np.finfo(np.float64).eps * np.abs(rewards).sum()
    assert np.abs(built.values[:, -1] - np.concatenate(values)).max() <= bound


def test_only_the_last_raw_row_is_left_out() -> None:
    data = dataset(6, ends={2: "terminates", 4: "truncates"})
    built = build_transitions(data, discount=0.9, termination_penalty=None)
    assert built.path_lengths.tolist() == [3, 2]
    assert built.values.shape == (5, 7)


def test_the_penalty_replaces_the_reward_of_terminations_alone() -> None:
    data = dataset(7, ends={1: "terminates", 3: "truncates", 5: "both"})
    rewards = build_transitions(data, discount=0.9, termination_penalty=-7.0).values[:, -2]
    kept = data.rewards[:6].astype(np.float64)
    assert rewards.tolist() == [kept[0], -7.0, kept[2], kept[3], kept[4], -7.0]


def test_the_dataset_is_not_changed() -> None:
    data = dataset(4, ends={1: "terminates"})
    before = data.rewards.copy()
    build_transitions(data, discount=0.9, termination_penalty=-100.0)
    np.testing.assert_array_equal(data.rewards, before)


def test_a_single_row_has_no_transition() -> None:
    with pytest.raises(ValueError, match="dataset: expected at least 2 rows, got 1"):
        build_transitions(dataset(1), discount=0.9, termination_penalty=None)


def test_an_episode_longer_than_the_maximum_is_refused() -> None:
    message = "max_path_length: expected at least the longest episode's 5, got 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_transitions(
            dataset(9, ends={4: "truncates"}),
            discount=0.9,
            termination_penalty=None,
            max_path_length=4,
        )


# --- windows --------------------------------------------------------------------------------------


def random_tokens(path_lengths: list[int], transition_dim: int = 4) -> NDArray[np.int64]:
    rng = np.random.default_rng(sum(path_lengths))
    return rng.integers(0, STOP, (sum(path_lengths), transition_dim))


def windows_of(path_lengths: list[int], num_transitions: int = 3, **settings: Any) -> TokenWindows:
    lengths = np.array(path_lengths, dtype=np.int64)
    return TokenWindows(random_tokens(path_lengths), lengths, num_transitions, STOP, **settings)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_windows_equal_a_loop_over_paths(
    path_lengths: list[int], num_transitions: int, step: int, max_path_length: int
) -> None:
    windows = windows_of(path_lengths, num_transitions, step=step, max_path_length=max_path_length)
    paths = np.split(random_tokens(path_lengths), np.cumsum(path_lengths)[:-1])
    starts = [(i, t) for i, length in enumerate(path_lengths) for t in range(length - 1)]

    assert windows.indices.tolist() == [list(start) for start in starts]
    assert len(windows) == len(starts)
    batch = windows.gather(torch.arange(len(windows)))
    assert windows.window_len == batch.inputs.shape[1] == num_transitions * 4 - 1
    assert (batch.inputs.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    for row, (path_idx, start) in enumerate(starts):
        expected = reference.window(
            paths[path_idx], start, num_transitions, step, STOP, max_path_length
        )
        assert tuple(part[row].tolist() for part in batch) == expected


def test_gather_takes_windows_in_any_order_and_number() -> None:
    windows = windows_of([5, 7])
    whole = windows.gather(torch.arange(len(windows)))
    ids = torch.tensor([9, 0, 0, 4])
    for part, expected in zip(windows.gather(ids), whole, strict=True):
        assert torch.equal(part, expected[ids])
    for part, expected in zip(windows.gather(ids[::2]), whole, strict=True):
        assert torch.equal(part, expected[ids[::2]])


def test_goals_are_the_last_observation_of_the_path() -> None:
    windows = windows_of([3, 1, 4])
    tokens = random_tokens([3, 1, 4])
    goals = windows.goals(torch.arange(len(windows)), 2)
    assert windows.indices[:, 0].tolist() == [0, 0, 2, 2, 2]
    assert goals.tolist() == [tokens[2, :2].tolist()] * 2 + [tokens[7, :2].tolist()] * 3


def test_stop_tokens_above_a_byte_are_kept() -> None:
    tokens = np.array([[298, 299], [3, 4], [5, 6]])
    windows = TokenWindows(tokens, np.array([3]), 2, 300)
    assert windows.gather(torch.tensor([0])).inputs.tolist() == [[298, 299, 3]]
    last = windows.gather(torch.tensor([1]))
    assert last.targets.tolist() == [[4, 5, 6]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.zeros(4, int), [4], 2),
            "tokens: expected shape (num_steps, transition_dim), got (4,)",
        ),
        ((np.zeros((4, 2), int), [3], 2), "tokens: expected 3 rows, as path_lengths sums, got 4"),
        ((np.zeros((4, 2), int), [4], 0), "num_transitions: expected an integer >= 1, got 0"),
        (
            (np.zeros((2, 2), int), [1, 1], 2),
            "path_lengths: expected an episode of 2 or more steps",
        ),
    ],
)
def test_windows_refuse(arguments: tuple[Any, list[int], int], message: str) -> None:
    tokens, path_lengths, num_transitions = arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenWindows(tokens, np.array(path_lengths), num_transitions, STOP)


def test_windows_refuse_a_step_of_zero() -> None:
    with pytest.raises(ValueError, match="step: expected an integer >= 1, got 0"):
        windows_of([4], step=0)


# --- marginals ------------------------------------------------------------------------------------


def test_marginal_entropies_are_those_of_the_counted_targets() -> None:
    windows = windows_of([6, 2, 5], max_path_length=4)
    batch = windows.gather(torch.arange(len(windows)))
    entropies, counts = marginal_entropies(windows)
    for dim in range(4):
        at_dim = (np.arange(windows.window_len) + 1) % 4 == dim
        chosen = batch.targets[:, at_dim][batch.mask[:, at_dim]].tolist()
        shares = [count / len(chosen) for count in Counter(chosen).values()]
        assert counts[dim] == len(chosen)
        assert entropies[dim] == pytest.approx(-math.fsum(p * math.log(p) for p in shares))


def test_windows_are_gathered_where_they_were_moved() -> None:
    """On torch's device without memory: an operand that was left behind would raise."""
    windows = TokenWindows(np.zeros((9, 3), dtype=np.int64), np.array([5, 4]), 2, 7)
    moved = windows.to(torch.device("meta"))
    batch, goals = moved.gather(torch.arange(4)), moved.goals(torch.arange(4), 2)
    assert {x.device.type for x in (*batch, goals)} == {"meta"}
    assert batch.inputs.shape == windows.gather(torch.arange(4)).inputs.shape
    assert windows.device.type == "cpu"
