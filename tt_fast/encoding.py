"""From a dataset to the tokens that training reads, in memory or in a file.

Columns are fitted and rows encoded piece by piece: besides the dataset only rewards and values, and
a byte a token, are ever whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_fast.config import ModelConfig, TokenStorage, TrainConfig
from tt_fast.data.episodes import OfflineDataset
from tt_fast.data.windows import (
    CHUNK_ROWS,
    TokenWindows,
    Transitions,
    build_transitions,
    token_dtype,
)
from tt_fast.discretizer import Discretizer
from tt_fast.limits import memory_limit
from tt_fast.validate import require

Tokens = NDArray[np.integer[Any]]

_MEMORY_SHARE = 4  # of free memory, tokens may take one part in so many before they go to a file
_MEMORY_INFO = Path("/proc/meminfo")


def tokenize(
    dataset: OfflineDataset,
    model_config: ModelConfig,
    train_config: TrainConfig,
    folder: str | Path | None = None,
    *,
    num_processes: int = 1,
) -> tuple[Discretizer, TokenWindows]:
    """Fit the discretizer to a dataset's transitions and cut their tokens into windows.

    Args:
        dataset: what to learn from.
        model_config: its vocab_size is the stop token.
        train_config: its `token_storage` says where the tokens are kept.
        folder: where a file of tokens may lie, not in memory itself; None: they stay in memory.
        num_processes: that do the same on this machine, at most.

    Raises:
        ValueError: a dataset that does not fit the configs; no folder for a file.
        OSError: the disk is full.
    """
    stop_token = model_config.vocab_size
    num_tokens = dataset.num_steps * model_config.transition_dim  # a row of stop tokens among them
    num_bytes = num_tokens * token_dtype(stop_token).itemsize
    in_file = _choose_file(train_config.token_storage, num_bytes * num_processes, folder)
    transitions = build_transitions(
        dataset,
        discount=train_config.discount,
        termination_penalty=train_config.termination_penalty,
        max_path_length=train_config.max_path_length,
    )
    longest = int(transitions.path_lengths.max())
    require(longest >= 2, "dataset", "an episode of 2 or more steps before its last row", longest)
    discretizer = Discretizer.fit_columns(
        transitions.columns(), train_config.num_bins, train_config.strategy
    )
    windows = TokenWindows(
        encode_transitions(transitions, discretizer, stop_token, folder if in_file else None),
        transitions.path_lengths,
        model_config.num_transitions,
        stop_token,
        step=train_config.step,
        max_path_length=train_config.max_path_length,
        has_stop_row=True,
    )
    return discretizer, windows


def _choose_file(storage: TokenStorage, num_bytes: int, folder: str | Path | None) -> bool:
    """Whether so many bytes of tokens are kept in a file.

    Raises:
        ValueError: they must be, and there is no folder for it.
    """
    if storage == "file":
        require(folder is not None, "folder", 'a folder, for token_storage="file"', folder)
    if storage != "auto" or folder is None:
        return storage == "file"
    known = [size for size in (_available_memory(), memory_limit()) if size is not None]
    return bool(known) and num_bytes > min(known) // _MEMORY_SHARE


def _available_memory() -> int | None:
    """Bytes that programs can still get without swapping; None where the system does not say."""
    try:
        lines = _MEMORY_INFO.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    kilobytes = found.get("MemAvailable", "").split()[:1]  # "  123456 kB"
    return 1024 * int(kilobytes[0]) if kilobytes else None


def encode_transitions(
    transitions: Transitions,
    discretizer: Discretizer,
    stop_token: int,
    folder: str | Path | None = None,
) -> Tokens:
    """(num_steps + 1, transition_dim) tokens of all rows, and a row of stop tokens.

    Args:
        transitions: what to encode.
        discretizer: of as many dimensions.
        stop_token: it decides the type, `token_dtype`.
        folder: where an unnamed file holds the tokens, gone when the array is; None: in memory.
    """
    dtype, num_rows = token_dtype(stop_token), transitions.num_steps + 1
    shape = num_rows, discretizer.transition_dim
    chunks = _token_chunks(transitions, discretizer, stop_token)
    if folder is not None:
        return _in_file(chunks, shape, dtype, folder)
    tokens = np.empty(shape, dtype)
    start = 0
    for chunk in chunks:
        tokens[start : start + len(chunk)] = chunk
        start += len(chunk)
    return tokens


def _token_chunks(
    transitions: Transitions, discretizer: Discretizer, stop_token: int
) -> Iterator[NDArray[np.int64]]:
    """(rows, transition_dim) each: some CHUNK_ROWS rows at a time, and the row of stop tokens."""
    for start in range(0, transitions.num_steps, CHUNK_ROWS):
        yield discretizer.encode(transitions.rows(start, start + CHUNK_ROWS))
    yield np.full((1, discretizer.transition_dim), stop_token)


def _in_file(
    chunks: Iterator[NDArray[np.int64]],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    folder: str | Path,
) -> Tokens:
    """The chunks in a file that has no name, or loses it at once, mapped into memory.

    They are written, not stored through the map: a full disk is then an OSError, not a signal.
    """
    with tempfile.TemporaryFile(prefix=".tokens.", dir=folder) as file:
        for chunk in chunks:
            file.write(chunk.astype(dtype).tobytes())
        file.flush()
        return np.memmap(file, dtype, "r+", shape=shape)
