"""All rows of the GPU suite in one file; how near plans are to their floor, how fast steps are.

`python benchmarks/gpu_report.py FOLDER` writes results.csv, floor.csv and steps.csv there.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_common import COLUMNS, Dtype, config_of, gpu_case, plan_floor

from tt_fast.files import atomic_write
from tt_fast.tables import csv_text

PARTS = ("ceilings", "first", "plans", "kernels", "decode", "training")
Record = Mapping[str, str]


def read_records(path: Path) -> list[Record]:
    """The rows of a part; none if there is no such file.

    Raises:
        ValueError: other columns.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected columns {COLUMNS}, got {reader.fieldnames}")
        return list(reader)


def floors(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of every plan of one environment: what products and weights ask for, and the share of it.

    Weights are read out of the second cache, at the rate of the same run.
    """
    rates = {(r["op"], r["dtype"]): float(r["rate"]) for r in records if r["rate"]}
    found = []
    for record in records:
        dtype: Dtype = record["dtype"]  # type: ignore[assignment]
        ceilings = rates.get(("product", dtype)), rates.get(("resident read", "fp32"))
        if record["op"] != "plan" or record["num_envs"] != "1" or None in ceilings:
            continue
        case = gpu_case(record["shape"].split()[0])
        config = config_of(record["setting"], dtype)
        floor = plan_floor(case.model, config, len(case.context(0)))
        least = floor.milliseconds(*ceilings)  # type: ignore[arg-type]
        names = {key: record[key] for key in ("shape", "setting", "dtype", "engine")}
        numbers = {"tokens": floor.tokens, "rows": floor.rows, "rows_asked": floor.rows_asked}
        numbers |= {"flops": floor.flops, "weight_bytes": floor.weight_bytes}
        share = least / float(record["median_ms"])
        found.append({**names, **numbers, "floor_ms": least, "share_of_floor": share})
    return found


def steps(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of every training step: tokens a second, and how many times as fast as a task's first row.

    That is the original's, or the plain model's in float32.
    """
    first: dict[str, float] = {}
    found = []
    for record in records:
        if record["op"] != "train step":
            continue
        milliseconds = float(record["median_ms"])
        times = first.setdefault(record["shape"], milliseconds) / milliseconds
        window_len = gpu_case(record["shape"].split()[0]).model.config.block_size
        tokens = int(record["setting"].split()[1]) * window_len
        names = {key: record[key] for key in ("shape", "setting", "dtype", "engine")}
        rate = 1000.0 * tokens / milliseconds
        found.append({**names, "tokens_per_s": rate, "times_as_fast": times})
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    records = [record for part in PARTS for record in read_records(folder / f"{part}.csv")]
    tables = {"results.csv": records, "floor.csv": floors(records)}
    tables["steps.csv"] = steps(records)
    for name, rows in tables.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(csv_text(rows), encoding="utf-8")
    print(", ".join(f"{len(rows)} rows in {name}" for name, rows in tables.items()))


if __name__ == "__main__":
    main()
