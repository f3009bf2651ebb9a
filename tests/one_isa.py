"""The C++ core as the training pass sees it, with one of its instruction sets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tt_fast.planning.cpu import _core


class OneIsa:
    """Calls go to the core with this instruction set as their last argument, and are counted."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(_core, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments[:-1], self.isa)

        return call
