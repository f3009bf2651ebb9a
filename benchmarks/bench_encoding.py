"""Memory and time from a dataset's file to windows of tokens.

    python benchmarks/bench_encoding.py [--transitions 10000000] [--csv FILE]

A synthetic file of halfcheetah's shape goes through what training does before its first step: load,
fit the discretizer, encode, gather batches. Tokens are kept in memory and, in another process, in a
file. First some rows' tokens must be those that `Discretizer.encode` gives them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from tt_fast.checkpoint import origin
from tt_fast.config import ModelConfig, TrainConfig
from tt_fast.data import load_dataset
from tt_fast.data.windows import CHUNK_ROWS, TokenWindows, Transitions, build_transitions
from tt_fast.discretizer import Discretizer
from tt_fast.encoding import encode_transitions
from tt_fast.files import atomic_write
from tt_fast.measure import processor_name
from tt_fast.tables import Column, csv_text, head_line, row_line

# its columns are not those of the tables in README.md, so it does not lie beside their files
CSV = Path(__file__).parent / "results" / "data" / "encoding.csv"
MODEL, TRAIN = ModelConfig(observation_dim=17, action_dim=6), TrainConfig()
EPISODE_STEPS = 1000
BATCHES = 200

COLUMNS = (
    Column("tokens in", -10, lambda row: row["storage"]),
    Column("transitions", 12, lambda row: f"{row['transitions']:,}"),
    Column("load s", 8, lambda row: f"{row['load_s']:.1f}"),
    Column("fit s", 7, lambda row: f"{row['fit_s']:.1f}"),
    Column("encode s", 9, lambda row: f"{row['encode_s']:.1f}"),
    Column("gather ms", 10, lambda row: f"{row['gather_ms']:.2f}"),
    Column("dataset MB", 11, lambda row: f"{row['dataset_mb']:,.0f}"),
    Column("tokens MB", 10, lambda row: f"{row['tokens_mb']:,.0f}"),
    Column("peak MB", 8, lambda row: f"{row['peak_mb']:,.0f}"),
    Column("not in files", 13, lambda row: f"{row['anonymous_mb']:,.0f}"),
    Column("all at once", 12, lambda row: f"{row['whole_mb']:,.0f}"),
)


def main() -> None:
    """The command line."""
    options = parse()
    if options.storage is not None:
        print(json.dumps(measure(options.file, options.storage)))
        return
    rows = []
    print(head_line(COLUMNS))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "synthetic.hdf5"
        write_dataset(file, options.transitions)
        for storage in ("memory", "file"):
            rows.append(run_apart(file, storage))
            print(row_line(COLUMNS, rows[-1]), flush=True)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.csv) as temporary:
        temporary.write_text(csv_text(rows), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--transitions", type=int, default=10_000_000)
    add("--folder", help="where the dataset and the file of tokens lie for a while")
    add("--csv", type=Path, default=CSV)
    add("--file", type=Path, help=argparse.SUPPRESS)
    add("--storage", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_dataset(path: Path, num_steps: int) -> None:
    """Random numbers in D4RL's layout, episodes cut at the time limit."""
    rng = np.random.default_rng(0)
    widths = {"observations": (MODEL.observation_dim,), "actions": (MODEL.action_dim,)}
    with h5py.File(path, "w") as file:
        for key, width in {**widths, "rewards": ()}.items():
            data = file.create_dataset(key, (num_steps, *width), np.float32)
            for start in range(0, num_steps, CHUNK_ROWS):
                count = min(CHUNK_ROWS, num_steps - start)
                data[start : start + count] = rng.standard_normal((count, *width), np.float32)
        file["terminals"] = np.zeros(num_steps, np.bool_)
        file["timeouts"] = np.arange(1, num_steps + 1) % EPISODE_STEPS == 0


def run_apart(file: Path, storage: str) -> dict[str, Any]:
    """`measure` in a fresh process: its peak memory is its own."""
    words = ["--file", str(file), "--storage", storage]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(file: Path, storage: str) -> dict[str, Any]:
    """A row: what each stage takes, and the memory that all of them need."""
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        dataset = load_dataset(file)
    loaded_mb = resident_mb("VmRSS")
    with timed(seconds, "fit"):
        transitions = build_transitions(
            dataset, discount=TRAIN.discount, termination_penalty=TRAIN.termination_penalty
        )
        discretizer = Discretizer.fit_columns(transitions.columns(), TRAIN.num_bins)
    with timed(seconds, "encode"):
        folder = file.parent if storage == "file" else None
        tokens = encode_transitions(transitions, discretizer, MODEL.vocab_size, folder)
        windows = TokenWindows(
            tokens, transitions.path_lengths, MODEL.num_transitions, MODEL.vocab_size,
            has_stop_row=True,
        )  # fmt: skip
    check(transitions, discretizer, tokens)
    with timed(seconds, "gather"):
        for window_ids in torch.randint(len(windows), (BATCHES, TRAIN.batch_size)):
            windows.gather(window_ids)
    arrays = (dataset.observations, dataset.actions, dataset.rewards)
    return {
        "storage": storage,
        "transitions": dataset.num_steps,
        "load_s": seconds["load"],
        "fit_s": seconds["fit"],
        "encode_s": seconds["encode"],
        "gather_ms": 1000.0 * seconds["gather"] / BATCHES,
        "dataset_mb": sum(array.nbytes for array in arrays) / 2**20,
        "tokens_mb": tokens.nbytes / 2**20,
        "loaded_mb": loaded_mb,
        "peak_mb": resident_mb("VmHWM"),
        "anonymous_mb": resident_mb("RssAnon"),
        "whole_mb": loaded_mb + whole_mb(transitions),
        "device": processor_name(),
        "commit": origin()["git_commit"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def resident_mb(name: str) -> float:
    """This process's memory in MB: VmRSS now, RssAnon of it in no file, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) / 1024  # "  123 kB"


def whole_mb(transitions: Transitions) -> float:
    """What fitting takes with all rows at once, MB: float64 rows, a copy of them, one sorted."""
    return 3 * transitions.num_steps * MODEL.transition_dim * 8 / 2**20


def check(transitions: Transitions, discretizer: Discretizer, tokens: np.ndarray[Any, Any]) -> None:
    """Random rows, the first and the last are encoded as one by one, and then comes the stop row.

    Raises:
        AssertionError: they are not.
    """
    chosen = np.random.default_rng(1).integers(0, transitions.num_steps, 1000)
    for row in (0, *chosen.tolist(), transitions.num_steps - 1):
        want = discretizer.encode(transitions.rows(row, row + 1))
        np.testing.assert_array_equal(tokens[row : row + 1], want)
    np.testing.assert_array_equal(tokens[-1], MODEL.vocab_size)


if __name__ == "__main__":
    main()
