"""One way to refuse bad input: name the argument, say what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise ``ValueError("<name>: expected <expected>, got <got>")``."""
    raise ValueError(f"{name}: expected {expected}, got {got!r}")


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """`refuse` unless `condition` holds."""
    if not condition:
        refuse(name, expected, got)


def require_type(name: str, value: object, kind: type, hint: str = "") -> None:
    """`value` is an instance of one of this package's classes; `hint` says how to get one."""
    require(isinstance(value, kind), name, f"a tt_fast.{kind.__name__}{hint}", type(value).__name__)


def require_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """`value` as a Python int; it is an integer (bool is not) in [minimum, maximum]."""
    try:
        number = operator.index(value)
    except TypeError:
        refuse(name, "an integer", value)
    require(not isinstance(value, bool), name, "an integer", value)
    upper = "" if maximum is None else f" and <= {maximum}"
    inside = number >= minimum and (maximum is None or number <= maximum)
    require(inside, name, f"an integer >= {minimum}{upper}", value)
    return number


def require_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """`value` is a finite real number in [low, high], or (low, high] with `open_low`."""
    opening = "(" if open_low or low == -math.inf else "["
    span = f"{opening}{low}, {high}{')' if high == math.inf else ']'}"
    require(_is_finite(value), name, f"a finite number in {span}", value)
    inside = (value > low if open_low else value >= low) and value <= high
    require(inside, name, f"a number in {span}", value)


def _is_finite(value: Any) -> bool:
    """A finite real number; no bool, no text, no array."""
    try:
        is_one = getattr(value, "ndim", 0) == 0
        return is_one and math.isfinite(value) and not isinstance(value, bool)
    except (TypeError, OverflowError):  # no number, or an integer that no float holds
        return False


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`."""
    require(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)
