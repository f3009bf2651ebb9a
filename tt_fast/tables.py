"""Text tables of fixed columns, so that a row can be printed as soon as it is known, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a text table."""

    title: str
    width: int
    """Characters; below zero to align to the left"""
    text: Callable[[Any], str]
    """The cell of a row"""


def head_line(columns: Sequence[Column]) -> str:
    """The titles."""
    return _line(columns, [column.title for column in columns])


def row_line(columns: Sequence[Column], row: object) -> str:
    """The cells of a row."""
    return _line(columns, [column.text(row) for column in columns])


def number(value: float | None, digits: int = 0) -> str:
    """A number with so many digits after the point; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """A positive number with about three digits in all; "-" for None."""
    size = value or 0.0
    return number(value, 0 if size >= 100.0 else 1 if size >= 10.0 else 2)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV; its columns are the keys of all rows, in the order of their first use. None is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    padded = (
        f"{cell:<{-column.width}}" if column.width < 0 else f"{cell:>{column.width}}"
        for column, cell in zip(columns, cells, strict=True)
    )
    return " ".join(padded).rstrip()
