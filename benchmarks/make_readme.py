"""Write the tables of README.md from results/*.csv.

python benchmarks/make_readme.py                  # the tables alone
python benchmarks/make_readme.py plan.json        # first results/plan.csv from pytest-benchmark
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import README, RESULTS, Row, render, with_results, write_rows

from tt_fast.files import atomic_write


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_text = "files of pytest --benchmark-json; each becomes results/<its name>.csv"
    parser.add_argument("benchmarks", nargs="*", type=Path, metavar="JSON", help=help_text)
    for path in parser.parse_args().benchmarks:
        write_rows(RESULTS / f"{path.stem}.csv", rows_of_json(path))
    text = with_results(README.read_text(encoding="utf-8"), render())
    with atomic_write(README) as temporary:
        temporary.write_text(text, encoding="utf-8")


def rows_of_json(path: Path) -> list[Row]:
    """The rows that bench_plan.py left in pytest-benchmark's file.

    Raises:
        ValueError: it has none.
    """
    runs = json.loads(path.read_text(encoding="utf-8")).get("benchmarks", [])
    rows = [Row(**run["extra_info"]["row"]) for run in runs if "row" in run["extra_info"]]
    if not rows:
        raise ValueError(f"{path}: expected rows of bench_plan.py, got none")
    return rows


if __name__ == "__main__":
    main()
