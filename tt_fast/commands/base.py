"""What every subcommand of `tt-fast` has: its fields are its options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every subcommand has."""

    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError

    def saved(self) -> str:
        """What is on disk after Ctrl-C."""
        return "nothing was written"


def to_json(values: Any) -> str:
    """`values` as indented JSON."""
    return json.dumps(values, indent=2)
