"""The refusals every module shares."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from tt_fast.validate import require, require_choice, require_int, require_number


def test_require_names_the_argument_the_expectation_and_what_came() -> None:
    require(True, "width", "a number", "x")
    with pytest.raises(ValueError, match=r"^width: expected a number, got 'x'$"):
        require(False, "width", "a number", "x")


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(5)])
def test_integers_inside_pass(value: Any) -> None:
    assert type(require_int("count", value, 1, 5)) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "count: expected an integer, got 1.0"),
        ("1", "count: expected an integer, got '1'"),
        (True, "count: expected an integer, got True"),
        (None, "count: expected an integer, got None"),
        (np.array([1, 2]), "count: expected an integer, got array([1, 2])"),
        (0, "count: expected an integer >= 1 and <= 5, got 0"),
        (6, "count: expected an integer >= 1 and <= 5, got 6"),
    ],
)
def test_integers_outside_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_int("count", value, 1, 5)


def test_an_integer_without_a_maximum() -> None:
    require_int("count", 10**30, 1)
    with pytest.raises(ValueError, match=r"^count: expected an integer >= 1, got -2$"):
        require_int("count", -2, 1)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), np.int64(1)])
def test_numbers_inside_pass(value: Any) -> None:
    require_number("share", value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "share: expected a finite number in [0.0, 1.0], got '0.5'"),
        (None, "share: expected a finite number in [0.0, 1.0], got None"),
        (False, "share: expected a finite number in [0.0, 1.0], got False"),
        (math.nan, "share: expected a finite number in [0.0, 1.0], got nan"),
        (math.inf, "share: expected a finite number in [0.0, 1.0], got inf"),
        pytest.param(
            10**400, f"share: expected a finite number in [0.0, 1.0], got {10**400}", id="too large"
        ),
        (
            np.array([0.1, 0.2]),
            "share: expected a finite number in [0.0, 1.0], got array([0.1, 0.2])",
        ),
        (-0.1, "share: expected a number in [0.0, 1.0], got -0.1"),
        (1.1, "share: expected a number in [0.0, 1.0], got 1.1"),
    ],
)
def test_numbers_outside_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_number("share", value, 0.0, 1.0)


def test_a_number_with_an_open_low_end() -> None:
    require_number("rate", 1e-300, 0.0, open_low=True)
    with pytest.raises(ValueError, match=re.escape("rate: expected a number in (0.0, inf), got 0")):
        require_number("rate", 0, 0.0, open_low=True)


def test_choices() -> None:
    require_choice("overflow", "crop", ("crop", "grow"))
    with pytest.raises(
        ValueError, match=r"^overflow: expected one of 'crop', 'grow', got 'slide'$"
    ):
        require_choice("overflow", "slide", ("crop", "grow"))
