"""Tokens made piece by piece: those of the whole, bit for bit, in memory and in a file."""

from __future__ import annotations

import hashlib
import re
import tracemalloc
from pathlib import Path
from typing import Any

import bench_encoding
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import (
    NUM_BINS,
    tiny_dataset,
    tiny_model_config,
    tiny_train_config,
    weights_equal,
)

from tt_fast import Checkpoint, encoding, train
from tt_fast.config import Strategy
from tt_fast.data import OfflineDataset
from tt_fast.data import windows as windows_module
from tt_fast.data.windows import TokenWindows, Transitions, build_transitions
from tt_fast.discretizer import Discretizer
from tt_fast.encoding import encode_transitions, tokenize

# --- all at once, as it was done before -----------------------------------------------------------


def whole_rows(data: OfflineDataset, discount: float, penalty: float | None) -> NDArray[np.float64]:
    """(num_steps, transition_dim): every row but the last joined in float64."""
    num_steps = data.num_steps - 1
    rewards = data.rewards[:num_steps].astype(np.float64)
    if penalty is not None:
        rewards[data.terminations[:num_steps]] = penalty
    values, after = np.empty(num_steps), 0.0
    for t in reversed(range(num_steps)):
        if data.terminations[t] or data.truncations[t]:
            after = 0.0
        values[t] = after
        after = rewards[t] + discount * after
    columns = [data.observations[:num_steps], data.actions[:num_steps]]
    return np.concatenate([*columns, rewards[:, None], values[:, None]], axis=1, dtype=np.float64)


def whole_thresholds(
    rows: NDArray[np.float64], num_bins: int, strategy: Strategy
) -> NDArray[np.float64]:
    if strategy == "uniform":
        return np.linspace(rows.min(axis=0), rows.max(axis=0), num_bins + 1)
    ordered = np.sort(rows, axis=0)
    return np.concatenate([ordered[:: -(-len(rows) // num_bins)], ordered[-1:]])


def whole_tokens(
    rows: NDArray[np.float64], thresholds: NDArray[np.float64], stop_token: int
) -> torch.Tensor:
    """Tokens in int64, a row of stop tokens joined to them, then the small type."""
    tokens = np.empty(rows.shape, dtype=np.int64)
    for dim in range(rows.shape[1]):
        tokens[:, dim] = np.searchsorted(thresholds[:, dim], rows[:, dim], side="right") - 1
    tokens = np.clip(tokens, 0, len(thresholds) - 2)
    stop_row = np.full((1, rows.shape[1]), stop_token)
    small = torch.uint8 if stop_token <= 255 else torch.int32
    return torch.from_numpy(np.concatenate([tokens, stop_row])).to(small)


def whole_digest(tokens: torch.Tensor, path_lengths: NDArray[np.int64]) -> str:
    return hashlib.sha256(tokens.numpy().tobytes() + path_lengths.tobytes()).hexdigest()


def digest_of(windows: TokenWindows) -> str:
    digest = hashlib.sha256()
    windows.update_digest(digest)
    return digest.hexdigest()


@st.composite
def datasets(draw: st.DrawFn) -> OfflineDataset:
    """Few distinct values, zeros of both signs, constant columns; ends anywhere."""
    num_steps = draw(st.integers(3, 60))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ends = rng.random((2, num_steps)) < 0.1
    ends[1, -1] = True
    ends[:, 0] = False  # a window needs two steps
    observations, actions, rewards = (
        (rng.integers(-3, 4, shape) * np.float32(scale)).astype(np.float32)
        for shape, scale in (((num_steps, 3), 0.3), ((num_steps, 2), -0.1), ((num_steps,), 0.7))
    )
    observations[:, draw(st.integers(0, 2))] = 0.1
    return OfflineDataset(observations, actions, rewards, ends[0], ends[1])


@settings(deadline=None)
@given(
    datasets(),
    st.sampled_from(["quantile", "uniform"]),
    st.sampled_from([None, -100.0]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([1, 3, 7, 64]),
    st.booleans(),
)
def test_pieces_equal_the_whole_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    data: OfflineDataset,
    strategy: Strategy,
    penalty: float | None,
    discount: float,
    chunk_rows: int,
    in_file: bool,
) -> None:
    num_bins = 300 if strategy == "uniform" and chunk_rows == 7 else 2
    config = tiny_train_config(
        num_bins=num_bins, strategy=strategy, termination_penalty=penalty, discount=discount,
        token_storage="file" if in_file else "auto",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK_ROWS", chunk_rows)
        patch.setattr(windows_module, "CHUNK_ROWS", chunk_rows)
        discretizer, windows = tokenize(
            data, tiny_model_config(vocab_size=num_bins), config, tmp_path_factory.getbasetemp()
        )
        digest = digest_of(windows)
    rows = whole_rows(data, discount, penalty)
    thresholds = whole_thresholds(rows, num_bins, strategy)
    tokens = whole_tokens(rows, thresholds, num_bins)
    built = build_transitions(data, discount=discount, termination_penalty=penalty)

    assert built.values.tobytes() == rows.tobytes()
    assert discretizer.thresholds.tobytes() == thresholds.tobytes()
    assert windows._tokens.dtype == tokens.dtype
    assert torch.equal(windows._tokens, tokens)
    assert digest == whole_digest(tokens, built.path_lengths)
    batch = windows.gather(torch.arange(len(windows)))
    plain = TokenWindows(
        tokens[:-1].long().numpy(), built.path_lengths, 4, num_bins, max_path_length=100
    )
    for part, want in zip(batch, plain.gather(torch.arange(len(plain))), strict=True):
        assert torch.equal(part, want)


def test_fitting_columns_equals_fitting_their_matrix() -> None:
    rows = np.random.default_rng(0).normal(size=(97, 4)).round(1)
    rows[:, 2] = -0.1  # where one column is constant, linspace rounds all of them otherwise
    for strategy in ("quantile", "uniform"):
        whole = Discretizer.fit(rows, 7, strategy).thresholds
        assert whole.tobytes() == whole_thresholds(rows, 7, strategy).tobytes()
        columns = (column for column in rows.T)
        assert Discretizer.fit_columns(columns, 7, strategy).thresholds.tobytes() == whole.tobytes()


# --- files ----------------------------------------------------------------------------------------


def test_a_file_has_no_name_and_is_read_through_a_map(tmp_path: Path) -> None:
    built = build_transitions(tiny_dataset(), discount=0.9, termination_penalty=None)
    discretizer = Discretizer.fit(built.values, NUM_BINS)
    tokens = encode_transitions(built, discretizer, NUM_BINS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(tokens, np.memmap)
    np.testing.assert_array_equal(tokens, encode_transitions(built, discretizer, NUM_BINS))


@pytest.mark.parametrize("vocab_size", [NUM_BINS, 300])
def test_training_on_a_file_equals_training_in_memory(tmp_path: Path, vocab_size: int) -> None:
    runs: dict[str, Checkpoint] = {}
    for storage in ("memory", "file"):
        config = tiny_train_config(
            max_epochs=0.5, token_storage=storage, num_bins=vocab_size, strategy="uniform"
        )
        model_config = tiny_model_config(vocab_size=vocab_size)
        runs[storage] = train(
            tiny_dataset(), model_config, config, tmp_path / storage, progress=False
        )
    assert weights_equal(runs["memory"].model, runs["file"].model)
    names = [sorted(p.name for p in (tmp_path / storage).iterdir()) for storage in runs]
    assert names[0] == names[1]


def test_a_run_may_go_on_with_its_tokens_elsewhere(tmp_path: Path) -> None:
    for epochs, storage in ((0.3, "memory"), (0.6, "file")):
        config = tiny_train_config(max_epochs=epochs, token_storage=storage)
        moved = train(
            tiny_dataset(), tiny_model_config(), config, tmp_path, resume=True, progress=False
        )
    whole = train(tiny_dataset(), tiny_model_config(), config, tmp_path / "whole", progress=False)
    assert moved.metadata["step"] == whole.metadata["step"] > 0


def test_nothing_is_left_of_a_file_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Discretizer, "encode", full_disk)
    config = tiny_train_config(token_storage="file")
    with pytest.raises(OSError, match="No space left"):
        tokenize(tiny_dataset(), tiny_model_config(), config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("available", "in_file"),
    # 100 rows of 7 tokens take 700 bytes
    [(2799, True), (2800, False), (None, False)],
)
def test_auto_takes_a_file_above_a_quarter_of_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int | None, in_file: bool
) -> None:
    monkeypatch.setattr(encoding, "_available_memory", lambda: available)
    folders: list[Path | None] = []
    encode = encoding.encode_transitions

    def noting_encode(*arguments: Any) -> NDArray[Any]:
        folders.append(arguments[-1])
        return encode(*arguments)

    monkeypatch.setattr(encoding, "encode_transitions", noting_encode)
    arguments = tiny_dataset(), tiny_model_config(), tiny_train_config()
    tokenize(*arguments, tmp_path)
    tokenize(*arguments)  # without a folder there is no choice
    assert folders == [tmp_path if in_file else None, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal:  9 kB\nMemAvailable:    2000 kB\n", 2_048_000),
        ("MemTotal:  9 kB\n", None),
        (None, None),
    ],
)
def test_available_memory_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: int | None
) -> None:
    monkeypatch.setattr(encoding, "_MEMORY_INFO", tmp_path / "meminfo")
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert encoding._available_memory() == expected


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_file", [False, True])
def test_only_tokens_and_a_few_columns_are_ever_whole(tmp_path: Path, in_file: bool) -> None:
    num_steps, rng = 300_000, np.random.default_rng(0)
    data = OfflineDataset(
        rng.standard_normal((num_steps, 17), np.float32),
        rng.standard_normal((num_steps, 6), np.float32),
        rng.standard_normal(num_steps, np.float32),
        np.zeros(num_steps, np.bool_),
        np.arange(1, num_steps + 1) % 1000 == 0,
    )
    config = tiny_train_config(
        num_bins=100, max_path_length=1000, token_storage="file" if in_file else "memory"
    )
    model_config = tiny_model_config(observation_dim=17, action_dim=6, vocab_size=100)
    tracemalloc.start()
    try:
        _, windows = tokenize(data, model_config, config, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    column, chunk = 8 * num_steps, 8 * 25 * windows_module.CHUNK_ROWS
    tokens = 0 if in_file else 25 * (num_steps + 1)
    # rewards and values; then a column and its sorted copy, or the tokens and some chunks
    assert peak < 2 * column + max(2.5 * column, tokens + 5 * chunk)
    assert peak < 25 * column / 1.5  # whole rows in float64 are 25 columns
    assert len(windows) == num_steps - 301  # one path is a step shorter


def test_the_benchmark_checks_and_measures(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    bench_encoding.write_dataset(tmp_path / "data.hdf5", 2500)
    rows = [bench_encoding.measure(tmp_path / "data.hdf5", name) for name in ("memory", "file")]
    assert {row["transitions"] for row in rows} == {2500}
    assert all(row["peak_mb"] >= row["anonymous_mb"] > 0 for row in rows)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["quantile", "uniform"])
def test_episodes_of_one_step_are_too_short(strategy: Strategy) -> None:
    config = tiny_train_config(strategy=strategy)
    with pytest.raises(ValueError, match=r"dataset: expected an episode of 2 or more steps"):
        tokenize(tiny_dataset(length=1), tiny_model_config(), config)


def test_a_file_needs_a_folder() -> None:
    message = 'folder: expected a folder, for token_storage="file", got None'
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(tiny_dataset(), tiny_model_config(), tiny_train_config(token_storage="file"))


def test_columns_that_are_not_finite_are_refused() -> None:
    columns = [np.zeros(4), np.array([0.0, 1.0, np.nan, np.inf])]
    message = "transitions: expected finite numbers, got 'nan at row 2, column 1'"
    with pytest.raises(ValueError, match=re.escape(message)):
        Discretizer.fit_columns(columns, 2)


def test_tokens_with_a_stop_row_must_have_the_type_that_is_kept() -> None:
    tokens = np.zeros((4, 2), np.int64)
    message = "tokens: expected uint8, as they have a stop row, got dtype('int64')"
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenWindows(tokens, np.array([3]), 2, 7, has_stop_row=True)
    with pytest.raises(ValueError, match="tokens: expected 4 rows, as path_lengths sums, got 3"):
        TokenWindows(tokens, np.array([4]), 2, 7, has_stop_row=True)


def test_rows_and_columns_are_those_of_the_whole() -> None:
    built = build_transitions(tiny_dataset(), discount=0.9, termination_penalty=None)
    assert isinstance(built, Transitions)
    np.testing.assert_array_equal(np.stack(list(built.columns()), axis=1), built.values)
    np.testing.assert_array_equal(built.rows(90, 200), built.values[90:])
